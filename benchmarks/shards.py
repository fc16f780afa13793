"""Shards like the real ones, made here: JPEGs with the spectrum of photographs, captions and documents of English words."""

from __future__ import annotations

import base64
import io
import json
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from benchmarks.backbones import read_merges

SHARDS = 16
DISTINCT = 24  # pictures of a size; samples share them
THRESHOLD = 0.24  # of similarity, as in the published recipes
SPECTRUM = 1.4  # amplitude falls as 1 / frequency to this power: JPEGs of 2 to 2.5 bits a pixel, as photographs on the web have
QUALITY = 88


class Size(NamedTuple):
    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.width}×{self.height}"


def picture(rng: np.random.Generator, size: Size) -> bytes:
    """A JPEG of random clouds with the spectrum of photographs: less of it in the colors than in the brightness."""
    fy, fx = np.fft.fftfreq(size.height)[:, None], np.fft.rfftfreq(size.width)[None]
    frequency = np.hypot(fy, fx)
    frequency[0, 0] = np.inf
    planes = []
    for contrast in (48, 12, 12):  # Y, Cb, Cr
        noise = rng.standard_normal((*frequency.shape, 2)).astype(np.float32).view(np.complex64)[..., 0]
        plane = np.fft.irfft2(noise / frequency**SPECTRUM, s=(size.height, size.width))
        planes.append(128 + contrast * plane / plane.std())
    image = Image.fromarray(np.stack(planes, -1).clip(0, 255).astype(np.uint8), "YCbCr")
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()


class Words:
    """English words, common ones more often."""

    def __init__(self, rng: np.random.Generator) -> None:
        pieces = [
            first + second.removesuffix("</w>") for first, second in read_merges()[:20_000] if second.endswith("</w>")
        ]
        self._words = [piece for piece in pieces if piece.isascii() and piece.isalpha()]
        weights = 1 / (10 + np.arange(len(self._words)))
        self._bounds = np.cumsum(weights / weights.sum())
        self._rng = rng

    def sentence(self, low: int, high: int) -> str:
        count = int(self._rng.integers(low, high + 1))
        chosen = np.searchsorted(self._bounds, self._rng.random(count)).clip(max=len(self._words) - 1)
        return " ".join(self._words[index] for index in chosen).capitalize() + "."


Files = Callable[[list[bytes], Words, int], list[tuple[str, bytes]]]
"""Pictures, words and a sample's number → its files."""


def write_laion(folder: Path, size: Size, samples: int, seed: int = 0) -> str:
    """Pairs with captions of 6 to 20 words. Returns the shards' pattern; writes nothing where they are there already."""
    rng = np.random.default_rng(seed)

    def files(pictures: list[bytes], words: Words, number: int) -> list[tuple[str, bytes]]:
        caption = words.sentence(6, 20).encode()
        return [(f"{number:08d}.jpg", pictures[number % DISTINCT]), (f"{number:08d}.txt", caption)]

    return _write(folder, size, samples, rng, files)


def write_mmc4(folder: Path, size: Size, samples: int, seed: int = 0) -> str:
    """Documents of 2 to 8 pictures and 10 to 25 sentences; a fifth of the pictures is too dissimilar to be used."""
    rng = np.random.default_rng(seed)

    def files(pictures: list[bytes], words: Words, number: int) -> list[tuple[str, bytes]]:
        sentences = [words.sentence(6, 24) for _ in range(rng.integers(10, 26))]
        count = int(rng.integers(2, 9))
        similarity = 0.05 + 0.12 * rng.random((count, len(sentences)))
        places = rng.permutation(len(sentences))[:count]
        similarity[np.arange(count), places] = np.where(rng.random(count) < 0.8, 0.3, 0.2)
        chosen = rng.integers(0, DISTINCT, count)
        document = {
            "text_list": sentences,
            "similarity_matrix": similarity.tolist(),
            "image_info": [{"image_base64": base64.b64encode(pictures[index]).decode()} for index in chosen],
        }
        return [(f"{number:08d}.json", json.dumps(document).encode())]

    return _write(folder, size, samples, rng, files)


def _write(folder: Path, size: Size, samples: int, rng: np.random.Generator, files: Files) -> str:
    pattern = str(folder / f"{{{0:05d}..{SHARDS - 1:05d}}}.tar")
    done = folder / f"{samples}-samples"
    if done.exists():
        return pattern
    folder.mkdir(parents=True, exist_ok=True)
    pictures = [picture(rng, size) for _ in range(DISTINCT)]
    words = Words(rng)
    for shard in range(SHARDS):
        with tarfile.open(folder / f"{shard:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for number in range(shard, samples, SHARDS):
                add(tar, files(pictures, words, number))
    done.touch()
    return pattern


def add(tar: tarfile.TarFile, files: Iterable[tuple[str, bytes]]) -> None:
    for name, data in files:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
