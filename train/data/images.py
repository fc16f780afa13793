"""Bytes of a picture → the pixels that the vision encoder sees.

The reference decodes with Pillow, resizes the shorter side (bicubic, antialiased), crops the centre and normalises. Here JPEG
is decoded by libjpeg-turbo without Pillow around it, resizing is two weighted sums that make no more than the crop keeps, and
normalising is left to the training step, on the device. Pixels are within 1/255 of the reference's.

torch's 8-bit resize (`--fast_resize`) takes a half to a third of the time of these sums, which take half of Pillow's. But its
weights have 16 bits: of a million values, one (in pictures of text, ten) is 2/255 off. So it has to be asked for.
"""

from __future__ import annotations

import functools
import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize

from open_flamingo.train.data.samples import SampleError

# Ours is `max_image_pixels`; Pillow's warning would come once a worker for pictures that the user allows.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")  # of broken pictures: errors are counted

JPEG = b"\xff\xd8\xff"
# How many times as wide as its crop `--fast_resize` makes a picture in full: a line of 1,000,000 × 1 pixels would be 900 MB.
MAX_STRETCH = 16
# A decompression bomb for Pillow, and for us where a JPEG does not pass through Pillow.
MAX_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 89_478_485)
# What is found on the web. Pillow knows fifty more, and runs Ghostscript on a picture that says it is EPS.
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "ICO", "TGA")
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
    if resize is None or normalize is None or resize.max_size is not None or resize.interpolation not in KERNELS:
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
    """Mean and standard deviation by channel, to apply to `images / 255`; 0 and 1 where the loader gives normalised floats."""
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
        with _open(data) as image:
            return image.size
    except Exception:
        return None


class ImagePreparer:
    """Bytes → uint8 [3, H, W]; float32 and normalised where `image_processor` is not a standard CLIP pipeline.

    Args:
        max_pixels: pictures of more are `too_large`; None for no limit but `MAX_PIXELS`, which is Pillow's own.
        fast_resize: resize by torch, hardly less exactly.
    """

    def __init__(
        self,
        image_processor: Callable[[Image.Image], torch.Tensor],
        max_pixels: int | None = None,
        fast_resize: bool = False,
    ) -> None:
        self.spec = image_spec(image_processor)
        self.max_pixels = MAX_PIXELS if max_pixels is None else min(max_pixels, MAX_PIXELS)
        self._image_processor = image_processor if self.spec is None else None
        self._fast_resize = fast_resize

    def too_large(self, data: bytes) -> bool:
        """Whether the header says more than `max_pixels`, or more than Pillow ever opens (a decompression bomb)."""
        size = image_size(data)
        if size is None:
            try:
                _open(data).close()
            except Image.DecompressionBombError:
                return True
            except Exception:
                return False  # broken: an error if it is ever used
            return False
        return size[0] * size[1] > self.max_pixels

    def __call__(self, data: bytes, flip: bool = False) -> np.ndarray:
        """The picture, mirrored if `flip`.

        Raises SampleError if it cannot be decoded to its end.
        """
        try:
            if self.spec is None:
                assert self._image_processor is not None
                image = self._image_processor(_decode_with_pillow(data))
                chosen = np.asarray(image, dtype=np.float32)[:, :, :: -1 if flip else 1]
            else:
                decoded = _decode_jpeg(data)
                if decoded is None:
                    decoded = np.array(_decode_with_pillow(data).convert("RGBX"))
                chosen = (_resize_and_crop_by_torch if self._fast_resize else _resize_and_crop)(
                    decoded, self.spec, flip
                )
        except Exception as error:  # a broken picture can raise anything
            raise SampleError("corrupt_image", str(error)) from error
        return np.ascontiguousarray(chosen)


def _decode_jpeg(data: bytes) -> np.ndarray | None:
    """uint8 [H, W, 4], as Pillow gives it as RGBX, but sooner; None where Pillow must do it or say what is wrong."""
    if not data.startswith(JPEG):
        return None
    try:
        colours = simplejpeg.decode_jpeg_header(data)[2]
        if colours not in ("RGB", "YCbCr", "Gray"):  # CMYK has more than one way to become RGB
            return None
        return simplejpeg.decode_jpeg(data, "RGBX", strict=True)
    except ValueError:
        return None


def _decode_with_pillow(data: bytes) -> Image.Image:
    with _open(data) as image:
        return image.convert("RGB")


def _open(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data), formats=_formats())


@functools.cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _resized(resize: int | tuple[int, int], height: int, width: int) -> tuple[int, int]:
    """(height, width) after resizing, rounded as torchvision does."""
    if not isinstance(resize, int):
        return resize
    return (resize, int(resize * width / height)) if height <= width else (int(resize * height / width), resize)


def _resize_and_crop(pixels: np.ndarray, spec: ImageSpec, flip: bool) -> np.ndarray:
    """uint8 [height, width, 4] → uint8 [3, H, W], as Pillow's `resize` makes them.

    Along rows first, then along columns: the order of every Pillow before 13, which takes the other one for tall pictures.
    Between the two, values are rounded and clipped, so the order is seen at sharp edges.
    """
    resized = _resized(spec.resize, *pixels.shape[:2])
    resampling = _resampling if max(pixels.shape) <= MAX_CACHED else _resampling.__wrapped__
    down, across = (
        resampling(size, new_size, round((new_size - crop) / 2.0), crop, spec.interpolation, mirrored)
        for size, new_size, crop, mirrored in zip(pixels.shape, resized, spec.crop, (False, flip))
    )
    whole = torch.from_numpy(pixels).view(torch.int32).squeeze(2)  # [height, width], a pixel a number
    source = whole[down.start : down.stop, across.start : across.stop]  # all that the crop depends on
    strips = []
    for strip in source.split(STRIP):
        columns = torch.empty(strip.T.shape, dtype=torch.int32).copy_(strip.contiguous().T)
        narrow = across(columns.view(torch.uint8).float())  # [W, height of the strip * 4]
        narrow.add_(0.5).floor_().clamp_(0, 255)  # rounded and clipped as Pillow does
        strips.append(narrow.view(torch.complex128).T)  # a pixel, of four floats, is moved as one
    rows = torch.cat(strips).view(torch.float32)  # [height, W * 4]
    result = down(rows).add_(0.5).clamp_(0, 255)  # of which the fraction is cut off
    planes = result.view(*spec.crop, 4)[..., :3].permute(2, 0, 1)
    return planes.to(torch.uint8, memory_format=torch.contiguous_format).numpy()


class _Resampling(NamedTuple):
    """Sums of rows, with weights: each pixel of the result along an axis is one of the few pixels around its place in the source.

    An embedding bag is just that, and torch has a fast one (FBGEMM's).

    start, stop: the source's pixels that are needed.
    places: int32 [count, taps], the rows of each sum, from `start`.
    weights: float32 [count, taps].
    """

    start: int
    stop: int
    places: Tensor
    weights: Tensor

    def __call__(self, rows: Tensor) -> Tensor:
        """float32 [stop - start, *] → [count, *]."""
        return F.embedding_bag(self.places, rows, per_sample_weights=self.weights, mode="sum")


@functools.lru_cache(maxsize=512)
def _resampling(
    size: int, resized: int, start: int, count: int, interpolation: InterpolationMode, mirrored: bool
) -> _Resampling:
    """The pixels start .. start + count of `size` pixels resized to `resized`; the last one first if `mirrored`.

    Pillow's arithmetic (Resample.c): a kernel as wide as a pixel of the coarser grid asks for, and weights of 22 bits.
    """
    kernel, reach = KERNELS[interpolation]
    scale = size / resized  # pixels of the source for one of the result
    widening = max(scale, 1.0)
    centres = (np.arange(start, start + count) + 0.5) * scale
    first = (centres - reach * widening + 0.5).astype(int).clip(min=0)
    last = (centres + reach * widening + 0.5).astype(int).clip(max=size)
    places = first[:, None] + np.arange((last - first).max())
    weights = kernel(np.abs(places - centres[:, None] + 0.5) / widening) * (places < last[:, None])
    weights /= weights.sum(1, keepdims=True)
    weights = np.trunc(weights * 2**22 + np.copysign(0.5, weights)) / 2**22
    places = places.clip(max=last[-1] - 1) - first[0]  # beyond `last` weights are 0
    if mirrored:
        places, weights = places[::-1], weights[::-1]
    return _Resampling(
        int(first[0]),
        int(last[-1]),
        torch.from_numpy(places.astype(np.int32)),
        torch.from_numpy(weights.astype(np.float32)),
    )


def _bicubic(distance: np.ndarray) -> np.ndarray:
    """Keys' cubic convolution with a = -0.5, Pillow's and everybody's antialiased bicubic. Of distances ≥ 0."""
    near = (1.5 * distance - 2.5) * distance**2 + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    return np.where(distance < 1, near, np.where(distance < 2, far, 0.0))


def _bilinear(distance: np.ndarray) -> np.ndarray:
    return (1 - distance).clip(min=0)


KERNELS = {InterpolationMode.BICUBIC: (_bicubic, 2.0), InterpolationMode.BILINEAR: (_bilinear, 1.0)}
"""Each with how many pixels it reaches."""
STRIP = 192
"""Rows of a picture that are made narrower at a time: they stay in a processor's cache."""
MAX_CACHED = 8192
"""The longest side whose weights are kept, 1 KB for 32 pixels: those of a line of 1,000,000 pixels are 30 MB."""


def _resize_and_crop_by_torch(pixels: np.ndarray, spec: ImageSpec, flip: bool) -> np.ndarray:
    """uint8 [height, width, 4] → uint8 [3, H, W], of which 4 values in 1000 are 1/255 away from Pillow's, and hardly any farther."""
    (height, width), resized = spec.crop, _resized(spec.resize, *pixels.shape[:2])
    if resized[0] > MAX_STRETCH * height or resized[1] > MAX_STRETCH * width:
        return _resize_and_crop(pixels, spec, flip)
    planes = torch.from_numpy(pixels).permute(2, 0, 1).unsqueeze(0)
    whole = F.interpolate(planes, size=resized, mode=spec.interpolation.value, antialias=True).squeeze(0).numpy()
    top, left = round((resized[0] - height) / 2.0), round((resized[1] - width) / 2.0)
    cropped = whole[:3, top : top + height, left : left + width]
    return cropped[:, :, ::-1] if flip else cropped
