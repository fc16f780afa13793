"""Bytes of an image → the pixels that the vision encoder sees.

The reference decodes with Pillow, resizes the shorter side (bicubic, antialiased), crops the center and normalizes. Here JPEG is
decoded by libjpeg-turbo without Pillow around it, torch resizes the bytes, and normalizing is left to the training step, on the
device. Pixels are within 1/255 of the reference's; within 2/255 in at most one of 100,000.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize

from open_flamingo.train.data.decoding import decode_rgb, open_image
from open_flamingo.train.data.samples import SampleError

# Ours is `max_image_pixels`; Pillow's warning would come once a worker for images that the user allows.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")  # of broken images: errors are counted

JPEG = b"\xff\xd8\xff"
# A decompression bomb for Pillow, and for us where a JPEG does not pass through Pillow.
MAX_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 89_478_485)
# Steps of a Compose that do here nothing that is not done anyway: to RGB, to a tensor.
NEUTRAL = {"MaybeConvertMode", "MaybeToTensor", "ToTensor", "_convert_to_rgb"}
# What torch resizes bytes with as Pillow does.
ANTIALIASED = (InterpolationMode.BICUBIC, InterpolationMode.BILINEAR)
# An image of 1,000,000 x 1 pixels, resized whole, would take 150 GB. The ends of longer ones are cut off first: the crop does not
# reach them.
MAX_ASPECT_RATIO = 128


@dataclass(frozen=True)
class ImageSpec:
    """A standard CLIP pipeline: resize, crop the center, normalize.

    Attributes:
        resize: the shorter side, or (height, width), in pixels.
        crop: (height, width) of the result.
        interpolation: bicubic or bilinear, antialiased.
        mean, std: by channel, for pixels in [0, 1].
    """

    resize: int | tuple[int, int]
    crop: tuple[int, int]
    interpolation: InterpolationMode
    mean: tuple[float, ...]
    std: tuple[float, ...]


def image_spec(image_processor: Any) -> ImageSpec | None:
    """What `image_processor` does, read from its parts; None where it is not a standard CLIP pipeline."""
    if not isinstance(image_processor, Compose):
        return None
    resize = crop = normalize = None
    for step in image_processor.transforms:
        if isinstance(step, Resize) and resize is None:
            resize = step
        elif isinstance(step, CenterCrop) and crop is None:
            crop = step
        elif isinstance(step, Normalize) and normalize is None:
            normalize = step
        elif getattr(step, "__name__", type(step).__name__) not in NEUTRAL:
            return None
    if resize is None or normalize is None or resize.max_size is not None or resize.interpolation not in ANTIALIASED:
        return None
    sides = [resize.size] if isinstance(resize.size, int) else list(resize.size)
    if crop is None and len(sides) == 1:
        return None  # the results would differ in shape
    height, width = sides[0], sides[-1]
    crop_height, crop_width = (height, width) if crop is None else crop.size
    if crop_height > height or crop_width > width:
        return None  # would pad
    return ImageSpec(
        resize=height if len(sides) == 1 else (height, width),
        crop=(crop_height, crop_width),
        interpolation=resize.interpolation,
        mean=tuple(map(float, normalize.mean)),
        std=tuple(map(float, normalize.std)),
    )


def normalization(image_processor: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation by channel, to apply to `images / 255`; 0 and 1 where the loader gives normalized floats."""
    spec = image_spec(image_processor)
    return ((0.0,) * 3, (1.0,) * 3) if spec is None else (spec.mean, spec.std)


def image_size(data: bytes) -> tuple[int, int] | None:
    """(width, height) from the header; None if it cannot be read. No pixel is decoded."""
    try:
        if data.startswith(JPEG):
            height, width = simplejpeg.decode_jpeg_header(data)[:2]
            return width, height
    except ValueError:
        pass  # Pillow knows more kinds
    try:
        with open_image(data) as image:
            return image.size
    except Exception:
        return None


class ImagePreparer:
    """Bytes → uint8 [3, H, W]; float32 and normalized where `image_processor` is not a standard CLIP pipeline.

    Args:
        max_pixels: images of more are `too_large`; None for no limit but `MAX_PIXELS`, which is Pillow's own.
    """

    def __init__(
        self,
        image_processor: Callable[[Image.Image], Tensor],
        max_pixels: int | None = None,
    ) -> None:
        self.spec = image_spec(image_processor)
        self.max_pixels = MAX_PIXELS if max_pixels is None else min(max_pixels, MAX_PIXELS)
        self._image_processor = image_processor if self.spec is None else None

    def exceeds_max_pixels(self, data: bytes) -> bool:
        """Whether the header says more than `max_pixels`, or more than Pillow ever opens (a decompression bomb)."""
        size = image_size(data)
        if size is None:
            try:
                open_image(data).close()
            except Image.DecompressionBombError:
                return True
            except Exception:
                return False  # broken: an error if it is ever used
            return False
        return size[0] * size[1] > self.max_pixels

    def __call__(self, data: bytes, flip: bool = False) -> np.ndarray:
        """The image, mirrored if `flip`.

        Raises SampleError if it cannot be decoded to its end.
        """
        try:
            if self.spec is None:
                assert self._image_processor is not None
                image = self._image_processor(decode_rgb(data))
                chosen = np.asarray(image, dtype=np.float32)[:, :, :: -1 if flip else 1]
            else:
                decoded = _decode_jpeg(data)
                if decoded is None:
                    decoded = np.array(decode_rgb(data))
                chosen = _resize_and_crop(decoded, self.spec, flip)
        except Exception as error:  # a broken image can raise anything
            raise SampleError("corrupt_image", str(error)) from error
        return np.ascontiguousarray(chosen)


def _decode_jpeg(data: bytes) -> np.ndarray | None:
    """uint8 [H, W, 3], as Pillow gives it, but sooner; None where Pillow must do it or say what is wrong."""
    if not data.startswith(JPEG):
        return None
    try:
        colors = simplejpeg.decode_jpeg_header(data)[2]
        if colors not in ("RGB", "YCbCr", "Gray"):  # CMYK has more than one way to become RGB
            return None
        return simplejpeg.decode_jpeg(data, "RGB", strict=True)
    except ValueError:
        return None


def _resize_and_crop(pixels: np.ndarray, spec: ImageSpec, flip: bool) -> np.ndarray:
    """uint8 [height, width, 3] → uint8 [3, H, W]."""
    if isinstance(spec.resize, int):
        pixels = _without_ends(pixels)
    resized = _resized(spec.resize, *pixels.shape[:2])
    top, left = (round((new - crop) / 2.0) for new, crop in zip(resized, spec.crop))
    channels_last = torch.from_numpy(pixels).permute(2, 0, 1).unsqueeze(0)  # no copy, and what the fast kernel takes
    whole = F.interpolate(channels_last, resized, mode=spec.interpolation.value, antialias=True)[0].numpy()
    crop = whole[:, top : top + spec.crop[0], left : left + spec.crop[1]]
    return crop[:, :, ::-1] if flip else crop


def _resized(resize: int | tuple[int, int], height: int, width: int) -> tuple[int, int]:
    """(height, width) after resizing, rounded as torchvision does."""
    if not isinstance(resize, int):
        return resize
    return (resize, int(resize * width / height)) if height <= width else (int(resize * height / width), resize)


def _without_ends(pixels: np.ndarray) -> np.ndarray:
    longest = MAX_ASPECT_RATIO * min(pixels.shape[:2])
    top, left = ((max(0, side - longest) // 2) for side in pixels.shape[:2])
    return pixels[top : pixels.shape[0] - top, left : pixels.shape[1] - left]
