"""Bytes of a picture → the pixels that the vision encoder sees.

The reference decodes with Pillow, resizes the shorter side (bicubic, antialiased), crops the centre and normalises. Here JPEG
is decoded by libjpeg-turbo without Pillow around it, resizing makes no more than the crop keeps, and normalising is left to the
training step, on the device. Pixels are within 1/255 of the reference's.

Resizing is done by a few lines of C (`resize.c`), faster than by Pillow and with its very pixels. Where they were not compiled,
or the processor has no AVX2, Pillow does it.
"""

from __future__ import annotations

import ctypes
import functools
import io
import sysconfig
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image
from torch import Tensor
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize

from open_flamingo.train.data.samples import SampleError

# Ours is `max_image_pixels`; Pillow's warning would come once a worker for pictures that the user allows.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")  # of broken pictures: errors are counted

JPEG = b"\xff\xd8\xff"
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
    """

    def __init__(
        self,
        image_processor: Callable[[Image.Image], Tensor],
        max_pixels: int | None = None,
    ) -> None:
        self.spec = image_spec(image_processor)
        self.max_pixels = MAX_PIXELS if max_pixels is None else min(max_pixels, MAX_PIXELS)
        self._image_processor = image_processor if self.spec is None else None

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
                chosen = _resize_and_crop(decoded, self.spec, flip)
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
    library, resized = _library(), _resized(spec.resize, *pixels.shape[:2])
    top, left = (round((new - crop) / 2.0) for new, crop in zip(resized, spec.crop))
    if library is None and max(new / crop for new, crop in zip(resized, spec.crop)) <= MAX_STRETCH:
        return _resize_by_pillow(pixels, spec, resized, top, left)[:, :, :: -1 if flip else 1]
    resampling = _resampling if max(pixels.shape) <= MAX_CACHED else _resampling.__wrapped__
    down, across = (
        resampling(*sizes, spec.interpolation, mirrored)
        for *sizes, mirrored in zip(pixels.shape, resized, (top, left), spec.crop, (False, flip))
    )
    source = pixels[down.start : down.stop, across.start : across.stop]  # all that the crop depends on
    if library is None or across.of_bytes is None:
        return down.sums(across.sums(source, 1), 0).transpose(2, 0, 1)[:3]
    return _resize_by_c(library, source, down, *across.of_bytes)


def _resize_by_pillow(pixels: np.ndarray, spec: ImageSpec, resized: tuple[int, int], top: int, left: int) -> np.ndarray:
    method = Image.Resampling[spec.interpolation.name]
    height, width = spec.crop
    image = Image.frombuffer("RGBX", (pixels.shape[1], pixels.shape[0]), pixels, "raw", "RGBX", 0, 1)
    narrow = image.resize((resized[1], image.height), method).crop((left, 0, left + width, image.height))
    whole = narrow.resize((width, resized[0]), method)
    return np.asarray(whole)[top : top + height, :, :3].transpose(2, 0, 1)


def resizes_in_c() -> bool:
    """Whether resize.c was compiled, and can be used here."""
    return _library() is not None


@functools.cache
def _library() -> ctypes.CDLL | None:
    """What `resize.c` was compiled to, where it was and can be used."""
    try:
        library = ctypes.CDLL(str(Path(__file__).with_name(f"_resize{sysconfig.get_config_var('EXT_SUFFIX')}")))
    except OSError:
        return None
    arrays: list[Any] = [ctypes.c_void_p, ctypes.c_void_p]
    numbers: list[Any] = [ctypes.c_int64, ctypes.c_int64]
    library.of_resize.argtypes = [arrays[0], *numbers, *arrays, *numbers, *arrays, *numbers, *arrays]
    library.of_resize.restype = None
    return library if library.of_supported() else None


def _resize_by_c(
    library: ctypes.CDLL, source: np.ndarray, down: _Resampling, first: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """uint8 [down.stop - down.start, across.stop - across.start, 4] → uint8 [3, H, W].

    Args:
        first, weights: of `across.of_bytes`.
    """
    height, width = len(down.first), len(first)
    padded = -width // 8 * -8
    between = np.empty((len(source), padded, 4), dtype=np.uint8)
    result = np.empty((3, height, padded), dtype=np.uint8)
    library.of_resize(
        *(source.ctypes.data, source.strides[0], len(source)),
        *(first.ctypes.data, weights.ctypes.data, width, weights.shape[1] // 4),
        *(down.first.ctypes.data, down.weights.ctypes.data, height, down.weights.shape[1]),
        *(between.ctypes.data, result.ctypes.data),
    )
    return result[:, :, :width]


@dataclass(frozen=True, eq=False)
class _Resampling:
    """Sums of rows, with weights: each pixel of the result along an axis is one of the few pixels around its place in the source.

    start, stop: the source's pixels that are needed.
    first: int32 [count], where each sum begins, from `start`.
    weights: int32 [count, taps], of 22 bits. No sum reaches beyond `stop`.
    """

    start: int
    stop: int
    first: np.ndarray
    weights: np.ndarray

    @functools.cached_property
    def of_bytes(self) -> tuple[np.ndarray, np.ndarray] | None:
        """`first` and `weights` as resize.c takes them along rows: of an even number of pixels, and four times, for each byte of
        a pixel. None where the source has not so many."""
        padding = self.weights.shape[1] % 2
        weights = np.pad(self.weights, ((0, 0), (0, padding)))
        if weights.shape[1] > self.stop - self.start:
            return None
        first, weights = _within(self.first, weights, self.stop - self.start)
        return first, weights.repeat(4, axis=1)

    def sums(self, source: np.ndarray, axis: int) -> np.ndarray:
        """uint8 → uint8, with `count` instead of `stop - start` along `axis`: slowly, of any source."""
        of_axis = (-1, *(source.ndim - 1 - axis) * (1,))
        total = np.int32(1 << (BITS - 1))
        for tap, weights in enumerate(self.weights.T):
            total = total + weights.reshape(of_axis) * np.take(source, self.first + tap, axis)
        return (total >> BITS).clip(0, 255).astype(np.uint8)


def _within(first: np.ndarray, weights: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """The same sums, of which none reaches beyond `length`: their last weights, which do, are 0, and become the first ones."""
    beyond = (first + weights.shape[1] - length).clip(min=0)
    places = (np.arange(weights.shape[1]) - beyond[:, None]) % weights.shape[1]
    return (first - beyond).astype(np.int32), np.take_along_axis(weights, places, axis=1)


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
    weights = np.trunc(weights * 2**BITS + np.copysign(0.5, weights)).astype(np.int32)
    begin, end = int(first[0]), int(last[-1])
    first, weights = _within(first - begin, weights, end - begin)
    if mirrored:
        first, weights = first[::-1], weights[::-1]
    return _Resampling(begin, end, np.ascontiguousarray(first), np.ascontiguousarray(weights))


def _bicubic(distance: np.ndarray) -> np.ndarray:
    """Keys' cubic convolution with a = -0.5, Pillow's and everybody's antialiased bicubic. Of distances ≥ 0."""
    near = (1.5 * distance - 2.5) * distance**2 + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    return np.where(distance < 1, near, np.where(distance < 2, far, 0.0))


def _bilinear(distance: np.ndarray) -> np.ndarray:
    return (1 - distance).clip(min=0)


KERNELS = {InterpolationMode.BICUBIC: (_bicubic, 2.0), InterpolationMode.BILINEAR: (_bilinear, 1.0)}
"""Each with how many pixels it reaches."""
BITS = 22
"""Of a weight: Pillow's precision."""
MAX_STRETCH = 16
"""How many times its crop Pillow makes a picture in full: a line of 1,000,000 × 1 pixels would be 700 MB."""
MAX_CACHED = 8192
"""The longest side whose weights are kept, 1 KB for 32 pixels: those of a line of 1,000,000 pixels are 30 MB."""
