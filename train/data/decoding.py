"""Bytes of a stranger's image → a Pillow image, of the kinds that are found on the web. The converter imports it: no torch."""

import io

from PIL import Image

Image.init()
# What is found on the web. Pillow knows fifty more, and runs Ghostscript on an image that says it is EPS.
_WEB = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "ICO", "TGA")
FORMATS = tuple(name for name in _WEB if name in Image.OPEN)  # some builds of Pillow lack some


def open_image(data: bytes) -> Image.Image:
    """Nothing is decoded yet. Raises what Pillow does: for another format, a broken header, or a decompression bomb."""
    return Image.open(io.BytesIO(data), formats=FORMATS)


def decode_rgb(data: bytes) -> Image.Image:
    with open_image(data) as image:
        return image.convert("RGB")
