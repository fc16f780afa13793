"""Writes small LAION and MMC4 shards of made-up pictures; the same arguments always give the same bytes.

    pattern = write_laion(tmp_path)          # image–caption pairs
    pattern = write_mmc4(tmp_path)           # interleaved documents

Both return the brace pattern that `--laion_shards` and `--mmc4_shards` take.
"""

from __future__ import annotations

import base64
import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

COLORS = {"red": (200, 40, 40), "green": (40, 180, 60), "blue": (50, 70, 210), "yellow": (220, 200, 50)}
NOUNS = ["fox", "dog", "house", "river", "tree", "boat"]
FILLER = ["It was a long day.", "Nobody said a word.", "The road went on.", "Then it began to rain."]


def picture(rng: np.random.Generator, color: str, size: tuple[int, int] = (64, 48), noise: int = 20) -> bytes:
    """A JPEG of one color with noise on it. `size` is (width, height)."""
    width, height = size
    pixels = np.array(COLORS[color]) + rng.integers(-noise, noise + 1, size=(height, width, 3))
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, format="JPEG", quality=90)
    return buffer.getvalue()


def big_picture(rng: np.random.Generator, color: str) -> bytes:
    """A JPEG of at least 11,000 bytes: MMC4 drops smaller images as icons, so these are mostly noise."""
    data = picture(rng, color, size=(144, 120), noise=120)
    assert len(data) >= 11_000
    return data


def write_tar(path: Path, files: Iterable[tuple[str, bytes]]) -> None:
    """A tar of (name, contents), with nothing in it that depends on the time or the user."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def pattern_of(folder: Path, stem: str, shards: int) -> str:
    last = shards - 1
    return str(folder / (f"{stem}-{{000000..{last:06d}}}.tar" if shards > 1 else f"{stem}-000000.tar"))


def write_laion(folder: str | Path, shards: int = 2, samples: int = 8, seed: int = 0) -> str:
    """`shards` tars of `samples` pairs of jpg and txt each, the caption naming the color. Returns the pattern."""
    folder = Path(folder)
    for shard in range(shards):
        files = []
        for sample in range(samples):
            rng = np.random.default_rng([seed, 0, shard, sample])
            color = str(rng.choice(list(COLORS)))
            caption = f"a {color} {rng.choice(NOUNS)}, number {shard * samples + sample}"
            key = f"{shard:04d}{sample:05d}"
            size = (int(rng.integers(40, 90)), int(rng.integers(40, 90)))
            files += [(f"{key}.jpg", picture(rng, color, size)), (f"{key}.txt", caption.encode())]
        write_tar(folder / f"laion-{shard:06d}.tar", files)
    return pattern_of(folder, "laion", shards)


def document(rng: np.random.Generator, images: int, number: int, low: float = 10.0, high: float = 40.0) -> dict:
    """An MMC4 document of `images` pictures, each similar (`high`) to one sentence and to no other (`low`).

    The sentence of picture i is not the i-th: assignments cross, as in real documents.
    """
    colors = [str(rng.choice(list(COLORS))) for _ in range(images)]
    sentences = [str(rng.choice(FILLER)) for _ in range(images + 2)]
    places = rng.permutation(len(sentences))[:images]
    similarity = np.full((images, len(sentences)), low) + rng.random((images, len(sentences)))
    for image, place in enumerate(places):
        sentences[place] = f"A {colors[image]} {rng.choice(NOUNS)}."
        similarity[image, place] = high + rng.random()
    sentences[-1] += f" Document {number}."
    return {
        "text_list": sentences,
        "similarity_matrix": similarity.round(4).tolist(),
        "image_info": [
            {"image_name": f"{number}-{i}.jpg", "image_base64": base64.b64encode(big_picture(rng, color)).decode()}
            for i, color in enumerate(colors)
        ],
    }


def synthetic_document(rng: np.random.Generator, images: int, number: int) -> dict:
    """A document of the `is_gpt` kind: the text holds markers, and `image_map` says which picture each stands for."""
    parts, image_map = [f"Story {number}."], {}
    for i in range(images):
        color = str(rng.choice(list(COLORS)))
        marker = f"_!_IMAGE{i + 1}_!_"
        parts.append(f"{marker} A {color} {rng.choice(NOUNS)}.")
        image_map[marker] = {"base64_image": base64.b64encode(picture(rng, color)).decode()}
    return {"is_gpt": True, "example": " ".join(parts), "image_map": image_map}


def write_mmc4(folder: str | Path, shards: int = 2, documents: int = 8, seed: int = 0) -> str:
    """`shards` tars of `documents` json documents each, of one to three pictures. Returns the pattern.

    Matched similarities are over 40 and the others under 11, so that the default threshold of 30 keeps every match; a
    document of one picture is dropped by the coin half of the time.
    """
    folder = Path(folder)
    for shard in range(shards):
        files = []
        for sample in range(documents):
            rng = np.random.default_rng([seed, 1, shard, sample])
            number = shard * documents + sample
            data = json.dumps(document(rng, images=1 + number % 3, number=number)).encode()
            files.append((f"{shard:04d}{sample:05d}.json", data))
        write_tar(folder / f"mmc4-{shard:06d}.tar", files)
    return pattern_of(folder, "mmc4", shards)
