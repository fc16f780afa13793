"""Bytes of an image → the pixels that the vision encoder sees, within 1/255 of the reference's (2/255 in one of 100,000).

The reference decodes with Pillow, resizes the shorter side (bicubic, antialiased), crops the center and normalizes. Here JPEG is
decoded by libjpeg-turbo, torch resizes the bytes, and normalizing is left to the training step, on the device.
"""

import warnings
from collections.abc import Callable
from contextlib import suppress
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
# Steps of a Compose that do nothing that is not done here anyway: to RGB, to a tensor.
NEUTRAL = {"MaybeConvertMode", "MaybeToTensor", "ToTensor", "_convert_to_rgb"}
ANTIALIASED = (InterpolationMode.BICUBIC, InterpolationMode.BILINEAR)  # torch resizes bytes with these as Pillow does
# An image of 1,000,000 x 1 pixels, resized whole, would take 150 GB: the ends, which the crop does not reach, are cut off first.
MAX_ASPECT_RATIO = 128


@dataclass(frozen=True)
class ImageSpec:
    """A standard CLIP pipeline: resize, crop the center, normalize."""

    resize: int | tuple[int, int]  # the shorter side, or (height, width), in pixels
    crop: tuple[int, int]  # (height, width) of the result
    interpolation: InterpolationMode  # bicubic or bilinear, antialiased
    mean: tuple[float, ...]  # by channel, for pixels in [0, 1]
    std: tuple[float, ...]

    def resize_and_crop(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 [height, width, 3] → uint8 [3, H, W]."""
        if isinstance(self.resize, int):
            longest = MAX_ASPECT_RATIO * min(pixels.shape[:2])
            top, left = (max(0, side - longest) // 2 for side in pixels.shape[:2])
            pixels = pixels[top : pixels.shape[0] - top, left : pixels.shape[1] - left]
            shorter = min(pixels.shape[:2])
            size = [int(self.resize * side / shorter) for side in pixels.shape[:2]]  # rounded as torchvision does
        else:
            size = list(self.resize)
        top, left = (round((new - crop) / 2.0) for new, crop in zip(size, self.crop))
        channels_last = torch.from_numpy(pixels).permute(2, 0, 1)[None]  # no copy, and what the fast kernel takes
        whole = F.interpolate(channels_last, size, mode=self.interpolation.value, antialias=True)[0].numpy()
        return whole[:, top : top + self.crop[0], left : left + self.crop[1]]


def image_spec(image_processor: Any) -> ImageSpec | None:
    """What `image_processor` does, read from its parts; None where it is not a standard CLIP pipeline."""
    if not isinstance(image_processor, Compose):
        return None
    steps: dict[type, Any] = {}
    for step in image_processor.transforms:
        if type(step) in (Resize, CenterCrop, Normalize) and type(step) not in steps:
            steps[type(step)] = step
        elif getattr(step, "__name__", type(step).__name__) not in NEUTRAL:
            return None
    resize, crop, normalize = (steps.get(kind) for kind in (Resize, CenterCrop, Normalize))
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


def normalization(image_processor: Any) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Mean and standard deviation by channel, to apply to `images / 255`; None where the loader gives normalized floats."""
    spec = image_spec(image_processor)
    return None if spec is None else (spec.mean, spec.std)


def image_size(data: bytes) -> tuple[int, int]:
    """(width, height) from the header; no pixel is decoded. Raises what Pillow does for a broken one, or a decompression bomb."""
    if data.startswith(JPEG):
        with suppress(ValueError):  # Pillow knows more kinds
            height, width = simplejpeg.decode_jpeg_header(data)[:2]
            return width, height
    with open_image(data) as image:
        return image.size


class ImagePreparer:
    """Bytes → uint8 [3, H, W]; float32 and normalized where `image_processor` is not a standard CLIP pipeline."""

    def __init__(self, image_processor: Callable[[Image.Image], Tensor], max_pixels: int | None = None) -> None:
        self.spec = image_spec(image_processor)
        self.max_pixels = MAX_PIXELS if max_pixels is None else min(max_pixels, MAX_PIXELS)
        self._image_processor = image_processor

    def exceeds_max_pixels(self, data: bytes) -> bool:
        """Whether the header says more than `max_pixels`, or more than Pillow ever opens (a decompression bomb)."""
        try:
            width, height = image_size(data)
        except Image.DecompressionBombError:
            return True
        except Exception:
            return False  # broken: an error if it is ever used
        return width * height > self.max_pixels

    def __call__(self, data: bytes, flip: bool = False) -> np.ndarray:
        """The image, mirrored if `flip`. Raises SampleError if it cannot be decoded to its end."""
        try:
            if self.spec is not None:
                chosen = self.spec.resize_and_crop(_decode(data))
            else:
                chosen = np.asarray(self._image_processor(decode_rgb(data)), dtype=np.float32)
        except Exception as error:  # a broken image can raise anything
            raise SampleError("corrupt_image", str(error)) from error
        return np.ascontiguousarray(chosen[:, :, ::-1] if flip else chosen)


def _decode(data: bytes) -> np.ndarray:
    """uint8 [H, W, 3], as Pillow gives it, but sooner where it is a JPEG."""
    with suppress(ValueError):  # Pillow must do it or say what is wrong
        # CMYK has more than one way to become RGB.
        if data.startswith(JPEG) and simplejpeg.decode_jpeg_header(data)[2] in ("RGB", "YCbCr", "Gray"):
            return simplejpeg.decode_jpeg(data, "RGB", strict=True)
    return np.array(decode_rgb(data))
