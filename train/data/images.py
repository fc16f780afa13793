"""Bytes of a picture → the pixels that the vision encoder sees.

The reference decodes with Pillow, resizes the shorter side (bicubic, antialiased), crops the centre and normalises. Here JPEG
is decoded by libjpeg-turbo without Pillow around it, and pictures that shrink are resized by torch's 8-bit kernel: at most
1/255 from the reference, in a third of the time. The rest takes Pillow's way. Normalising is left to the training step, on
the device.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import simplejpeg
import torch
from PIL import Image
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize

from open_flamingo.train.data.samples import SampleError

# Ours is `max_image_pixels`; Pillow's warning would come once a worker for pictures that the user allows.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

JPEG = b"\xff\xd8\xff"
RESAMPLING = {
    InterpolationMode.BICUBIC: (Image.Resampling.BICUBIC, "bicubic"),
    InterpolationMode.BILINEAR: (Image.Resampling.BILINEAR, "bilinear"),
}
# Steps of a Compose that do here nothing that is not done anyway: to RGB, to a tensor.
NEUTRAL = {"MaybeConvertMode", "MaybeToTensor", "ToTensor", "_convert_to_rgb"}


@dataclass(frozen=True)
class ImageSpec:
    """A standard CLIP pipeline: resize, crop the centre, normalise.

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
    if resize is None or normalize is None or resize.max_size is not None or resize.interpolation not in RESAMPLING:
        return None
    size = resize.size if isinstance(resize.size, int) else tuple(resize.size)
    if isinstance(size, tuple) and len(size) == 1:
        size = size[0]
    if crop is None and isinstance(size, int):
        return None  # the results would differ in shape
    crop_size = tuple(crop.size) if crop is not None else size
    smallest = (size, size) if isinstance(size, int) else size
    if crop_size[0] > smallest[0] or crop_size[1] > smallest[1]:
        return None  # would pad
    mean, std = tuple(map(float, normalize.mean)), tuple(map(float, normalize.std))
    return ImageSpec(size, crop_size, resize.interpolation, mean, std)


def normalization(image_processor: Any) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Mean and standard deviation to apply to `images / 255`; None where the loader's images are normalised already."""
    spec = image_spec(image_processor)
    return None if spec is None else (spec.mean, spec.std)


def image_size(data: bytes) -> tuple[int, int] | None:
    """(width, height) from the header; None if it cannot be read. No pixel is decoded."""
    try:
        if data.startswith(JPEG):
            height, width = simplejpeg.decode_jpeg_header(data)[:2]
            return width, height
    except ValueError:
        pass  # Pillow knows more kinds
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.size
    except Exception:
        return None


class ImagePreparer:
    """Bytes → uint8 [3, H, W]; float32 and normalised where `image_processor` is not a standard CLIP pipeline.

    Args:
        max_pixels: pictures of more are `too_large`; None for no limit but Pillow's own.
    """

    def __init__(self, image_processor: Callable[[Image.Image], torch.Tensor], max_pixels: int | None = None) -> None:
        self.spec = image_spec(image_processor)
        self.max_pixels = max_pixels
        self._image_processor = image_processor if self.spec is None else None

    def too_large(self, data: bytes) -> bool:
        """Whether the header says more than `max_pixels`, or more than Pillow ever opens (a decompression bomb)."""
        size = image_size(data)
        if size is None:
            try:
                Image.open(io.BytesIO(data)).close()
            except Image.DecompressionBombError:
                return True
            except Exception:
                return False  # broken: an error if it is ever used
            return False
        return self.max_pixels is not None and size[0] * size[1] > self.max_pixels

    def __call__(self, data: bytes, flip: bool = False) -> np.ndarray:
        """The picture, mirrored if `flip`.

        Raises SampleError if it cannot be decoded to its end.
        """
        try:
            if self.spec is None:
                assert self._image_processor is not None
                image = self._image_processor(_decode_with_pillow(data))
                chosen = np.asarray(image, dtype=np.float32)
            else:
                chosen = self._standard(data, self.spec)
        except Exception as error:  # a broken picture can raise anything
            raise SampleError("corrupt_image", str(error)) from error
        return np.ascontiguousarray(chosen[:, :, ::-1] if flip else chosen)

    def _standard(self, data: bytes, spec: ImageSpec) -> np.ndarray:
        pixels = _decode_jpeg(data)
        image = None
        if pixels is None:
            image = _decode_with_pillow(data)
        width, height = image.size if image is not None else (pixels.shape[1], pixels.shape[0])  # type: ignore[union-attr]
        resized = _resized(spec.resize, height, width)
        if resized[0] <= height and resized[1] <= width:
            return _shrink(np.asarray(image) if pixels is None else pixels, resized, spec)
        # Enlarged, torch's 8-bit kernel is up to 2/255 off.
        return _resize_with_pillow(Image.fromarray(pixels) if image is None else image, resized, spec)


def _decode_jpeg(data: bytes) -> np.ndarray | None:
    """uint8 [H, W, 3] as Pillow gives; None where Pillow must do it or say what is wrong."""
    if not data.startswith(JPEG):
        return None
    try:
        colours = simplejpeg.decode_jpeg_header(data)[2]
        if colours not in ("RGB", "YCbCr", "Gray"):  # CMYK has more than one way to become RGB
            return None
        return simplejpeg.decode_jpeg(data, "RGB", strict=True)
    except ValueError:
        return None


def _decode_with_pillow(data: bytes) -> Image.Image:
    with Image.open(io.BytesIO(data)) as image:
        return image.convert("RGB")


def _resized(resize: int | tuple[int, int], height: int, width: int) -> tuple[int, int]:
    """(height, width) after resizing, rounded as torchvision does."""
    if not isinstance(resize, int):
        return resize
    return (resize, int(resize * width / height)) if height <= width else (int(resize * height / width), resize)


def _crop_origin(resized: tuple[int, int], crop: tuple[int, int]) -> tuple[int, int]:
    return round((resized[0] - crop[0]) / 2.0), round((resized[1] - crop[1]) / 2.0)


def _shrink(pixels: np.ndarray, resized: tuple[int, int], spec: ImageSpec) -> np.ndarray:
    image = torch.from_numpy(pixels if pixels.flags.writeable else pixels.copy()).permute(2, 0, 1)
    if resized != pixels.shape[:2]:
        mode = RESAMPLING[spec.interpolation][1]
        image = torch.nn.functional.interpolate(image[None], resized, mode=mode, antialias=True)[0]
    top, left = _crop_origin(resized, spec.crop)
    return image[:, top : top + spec.crop[0], left : left + spec.crop[1]].numpy()


def _resize_with_pillow(image: Image.Image, resized: tuple[int, int], spec: ImageSpec) -> np.ndarray:
    # Only what the crop keeps is computed: a line of 20,000 × 1 pixels would be 3 GB at full width.
    top, left = _crop_origin(resized, spec.crop)
    y, x = image.height / resized[0], image.width / resized[1]
    box = (left * x, top * y, (left + spec.crop[1]) * x, (top + spec.crop[0]) * y)
    result = image.resize((spec.crop[1], spec.crop[0]), RESAMPLING[spec.interpolation][0], box=box)
    return np.asarray(result).transpose(2, 0, 1)
