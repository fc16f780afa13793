"""Bytes of a stranger's image → a Pillow image, of the kinds that are found on the web."""

from __future__ import annotations

import functools
import io

from PIL import Image

# What is found on the web. Pillow knows fifty more, and runs Ghostscript on an image that says it is EPS.
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "ICO", "TGA")


def open_image(data: bytes) -> Image.Image:
    """Nothing is decoded yet. Raises what Pillow does: for another format, a broken header, or a decompression bomb."""
    return Image.open(io.BytesIO(data), formats=_formats())


def decode_rgb(data: bytes) -> Image.Image:
    with open_image(data) as image:
        return image.convert("RGB")


@functools.cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)
