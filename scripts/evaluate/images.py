"""Latents of images: each image is encoded once, however many prompts it stands in."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from open_flamingo import Flamingo
from open_flamingo.train.data.decoding import decode_rgb

GRAY = (128, 128, 128)
ENCODED_AT_ONCE = 32
Key = Path | None  # of an image; None is a blank one


def read_image(key: Key) -> Image.Image:
    """Raises ValueError, naming the file, where it cannot be decoded."""
    if key is None:
        return Image.new("RGB", (224, 224), GRAY)
    try:
        return decode_rgb(key.read_bytes())
    except Exception as error:  # a broken image can raise anything
        raise ValueError(f"the image {key} cannot be read: {error}") from error


class Images:
    """Reads images on threads, ahead of need.

    Args:
        image_processor: PIL image → [3, height, width].
        workers: threads.
        where: image → the flag and line that name it, for errors.
    """

    def __init__(
        self, image_processor: Callable[[Image.Image], Tensor], workers: int, where: Mapping[Path, str] | None = None
    ) -> None:
        self._image_processor = image_processor
        self._where = where or {}
        self._pool = ThreadPoolExecutor(max(1, workers))
        self._reading: dict[Key, Future[Tensor]] = {}

    def prefetch(self, keys: Iterable[Key]) -> None:
        for key in keys:
            if key not in self._reading:
                self._reading[key] = self._pool.submit(self._read, key)

    def take(self, keys: Sequence[Key]) -> Tensor:
        """[M, 3, height, width]."""
        self.prefetch(keys)
        return torch.stack([self._reading.pop(key).result() for key in keys])

    def _read(self, key: Key) -> Tensor:
        try:
            image = read_image(key)
        except ValueError as error:
            raise ValueError(f"{self._where[key]}: {error}" if key in self._where else str(error)) from error
        return self._image_processor(image)

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


class Latents:
    """The latents of images, the `capacity` last used of which are kept on the model's device."""

    def __init__(self, model: Flamingo, images: Images, device: torch.device, capacity: int) -> None:
        self._model, self._images, self._device = model, images, device
        self._capacity = capacity
        self._kept: OrderedDict[Key, Tensor] = OrderedDict()  # each [L, E]
        self.encoded = 0  # images that the vision encoder has seen

    def prefetch(self, rows: Sequence[Sequence[Key]]) -> None:
        """Starts to read what these rows need and is not kept."""
        self._images.prefetch(key for key in _unique(rows) if key not in self._kept)

    @torch.no_grad()
    def batch(self, rows: Sequence[Sequence[Key]]) -> Tensor:
        """[B, N, L, E]: each row's images, of N that the longest row has; the rest is 0."""
        needed = _unique(rows)
        found = {key: self._kept.pop(key) for key in needed if key in self._kept}
        new = [key for key in needed if key not in found]
        for start in range(0, len(new), ENCODED_AT_ONCE):
            keys = new[start : start + ENCODED_AT_ONCE]
            found |= zip(keys, self._model.encode_images(self._images.take(keys).to(self._device)), strict=True)
        self.encoded += len(new)
        self._kept |= found  # at the end: they are the last used
        while len(self._kept) > self._capacity:
            self._kept.popitem(last=False)
        one: Any = next(iter(found.values()))
        result = one.new_zeros(len(rows), max(map(len, rows)), *one.shape)
        for row, of in enumerate(rows):
            result[row, : len(of)] = torch.stack([found[key] for key in of])
        return result


def _unique(rows: Sequence[Sequence[Key]]) -> list[Key]:
    return list(dict.fromkeys(key for row in rows for key in row))
