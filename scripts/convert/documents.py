"""Documents of text and images whose order is known: `interleaved`, `obelics` and `llava`.

They become MMC4's generated (`is_gpt`) kind, in which markers in the text say where each image stands: training matches nothing
there, has no threshold of similarity and no least size of an image, and drops no document for having one image only. The
reference's loader reads it as well. Text after an image is what it describes.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from open_flamingo.scripts.convert.engine import Skip
from open_flamingo.scripts.convert.tables import IMAGE_SUFFIXES, Table, image_bytes

MARKER = re.compile(r"_!_IMAGE(\d+)_!_")
MAX_DOCUMENT = 63 << 20  # bytes; training leaves out samples of more than 64 MiB
USUAL_MAX_IMAGES = 6  # of --mmc4_max_num_images
SPEAKERS = {"human": "User:", "user": "User:", "gpt": "Assistant:", "assistant": "Assistant:", "system": ""}


def document(parts: Iterable[str | bytes], counts: Counter[str]) -> list[tuple[str, bytes]]:
    """Texts and images (as bytes), in order → the json file. Raises Skip if no text follows the first image."""
    import pybase64

    words: list[str] = []
    images: dict[str, dict[str, str]] = {}
    is_described = False
    for part in parts:
        if isinstance(part, bytes):
            marker = f"_!_IMAGE{len(images) + 1}_!_"
            images[marker] = {"base64_image": pybase64.b64encode(part).decode("ascii")}
            words.append(marker)
        elif text := MARKER.sub(r"IMAGE\1", part).strip():  # a marker that is written out would take an image
            words.append(text)
            is_described = is_described or bool(images)
    if not images:
        raise Skip("no_image", "the document has no image that can be used")
    if not is_described:
        raise Skip("no_text_after_image", "only text after an image is learned: there is none")
    data = json.dumps({"is_gpt": True, "example": " ".join(words), "image_map": images}).encode()
    if len(data) > MAX_DOCUMENT:
        raise Skip("too_large", f"{len(data) >> 20} MiB; training reads 64 at most: make the images smaller or fewer")
    counts["images"] += len(images)
    return [("json", data)]


@dataclass
class Documents(Table):
    """An image that is missing or broken is left out and counted by reason, its document stays."""

    def sample(self, path: str, row: Any, counts: Counter[str]) -> list[tuple[str, bytes]]:
        try:
            return document(self.parts(self.record(row), self.folder(path), counts), counts)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise Skip("bad_row", f"not as the format says: {type(error).__name__}: {error}") from error

    def parts(self, record: dict[str, Any], folder: Path, counts: Counter[str]) -> list[str | bytes]:
        raise NotImplementedError

    def image(self, value: Any, folder: Path, counts: Counter[str]) -> list[bytes]:
        """One image, or none where it cannot be used."""
        try:
            return [image_bytes(value, folder)]
        except Skip as skip:
            counts[f"missing/images: {skip.reason}"] += 1
            return []

    def advice(self, totals: Counter[str], most_images: int) -> str:
        return f" --mmc4_max_num_images {most_images}" if most_images > USUAL_MAX_IMAGES else ""


@dataclass
class Interleaved(Documents):
    """{"content": [{"type": "text", "text": …}, {"type": "image", "path" | "base64" | "bytes": …}, …]}"""

    def parts(self, record: dict[str, Any], folder: Path, counts: Counter[str]) -> list[str | bytes]:
        parts: list[str | bytes] = []
        for item in record["content"]:
            if item["type"] == "text":
                parts.append(item["text"])
            elif item["type"] == "image":
                value = item.get(self.image_field) if self.image_field else item
                parts += self.image(value, folder, counts)
            else:
                raise ValueError(f"type must be text or image, not {item['type']!r}")
        return parts


@dataclass
class Obelics(Documents):
    """{"images": [url or null, …], "texts": [text or null, …]}: at each place one of the two is null."""

    def parts(self, record: dict[str, Any], folder: Path, counts: Counter[str]) -> list[str | bytes]:
        images, texts = record["images"], record["texts"]
        if len(images) != len(texts):
            raise ValueError(f"{len(images)} images but {len(texts)} texts: they must be lists of one length")
        parts: list[str | bytes] = []
        for url, text in zip(images, texts):
            if url is not None:
                parts += self.image(downloaded(url, str(folder)), folder, counts)
            elif text is not None:
                parts.append(text)
        return parts


def downloaded(url: str, folder: str) -> str | None:
    """The file of a URL: as img2dataset lists it, by a hash of the URL, or by the URL's file name. None if there is none."""
    if listed := img2dataset_index(folder).get(url):
        return listed
    name = os.path.basename(unquote(urlsplit(url).path))
    stems = [hashlib.new(kind, url.encode()).hexdigest() for kind in ("sha256", "md5", "sha1")]
    suffixes = dict.fromkeys([Path(name).suffix, *IMAGE_SUFFIXES, ""])
    names = [f"{stem}{suffix}" for stem in stems for suffix in suffixes] + [name]
    return next((name for name in names if name and os.path.isfile(os.path.join(folder, name))), None)


@functools.lru_cache(maxsize=1)
def img2dataset_index(folder: str) -> dict[str, str]:
    """URL → image, of img2dataset's output as files: 00000/000000000.jpg with a .json that says the URL beside it."""
    found: dict[str, str] = {}
    for path in sorted(Path(folder).glob("*/*.json")):
        try:
            url = json.loads(path.read_bytes())["url"]
        except (ValueError, KeyError, TypeError, OSError):
            continue
        image = next((path.with_suffix(s) for s in IMAGE_SUFFIXES if path.with_suffix(s).exists()), None)
        if image and isinstance(url, str):
            found[url] = str(image.relative_to(folder))
    return found


@dataclass
class Llava(Documents):
    """{"image": name, list of names or none, "conversations": [{"from": "human", "value": "<image>…"}, …]}"""

    def parts(self, record: dict[str, Any], folder: Path, counts: Counter[str]) -> list[str | bytes]:
        names = record.get(self.image_field or "image") or []
        images = iter(names if isinstance(names, list) else [names])
        parts: list[str | bytes] = []
        for turn in record["conversations"]:
            speaker = SPEAKERS.get(turn["from"], f"{turn['from']}:")
            before, *after = turn["value"].split("<image>")
            for i, text in enumerate([before, *after]):
                if i > 0:
                    name = next(images, None)
                    if name is None:
                        raise ValueError("the text has more <image> than there are images")
                    parts += self.image(name, folder, counts)
                if text.strip():  # an image that begins a turn stands before the speaker: it describes the whole turn
                    parts.append(f"{speaker} {text.strip()}".strip())
                    speaker = ""
        if next(images, None) is not None:
            raise ValueError("there are more images than <image> in the text")
        return parts
