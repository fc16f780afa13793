"""MMC4: zips of documents, and a folder of downloaded images for each.

Image `image_name` of a document in the i-th zip of the list (from 0) is looked for in `{image_dir}/{i}/{image_name}`. An image that
is missing or broken is left out, its document stays.
"""

from __future__ import annotations

import io
import json
import os
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from open_flamingo.scripts.convert.engine import Format, Skip

JPEG_QUALITY = 75  # the reference's (Pillow's default); training leaves out images of fewer than 11,000 such bytes


@dataclass
class Mmc4(Format):
    zip_files: str
    image_dir: Path
    image_advice = "--image_dir holds a folder per zip: 0, 1, …"

    def inputs(self) -> list[str]:
        from braceexpand import braceexpand

        zips = list(braceexpand(os.path.expanduser(self.zip_files)))
        if not any(map(os.path.isfile, zips)):
            raise ValueError(f"--zip_files {self.zip_files!r} matches no file; the first one looked for is {zips[0]}")
        if not self.image_dir.is_dir():
            raise ValueError(f"--image_dir {self.image_dir} is not a folder")
        return zips

    def blocks(self, index: int, path: str, size: int) -> list[tuple[int, int]]:
        return [(index, sum(1 for _ in read_documents(path)) if os.path.isfile(path) else 0)]

    def rows(self, path: str, position: int) -> Iterator[tuple[int, bytes]]:
        return ((position, line) for line in read_documents(path))

    def sample(self, path: str, row: tuple[int, bytes], counts: Counter[str]) -> list[tuple[str, bytes]]:
        index, line = row
        try:
            return [("json", _with_images(line, self.image_dir / str(index), counts))]
        except (ValueError, KeyError, TypeError, RecursionError) as error:  # a thousand brackets deep
            raise Skip("bad_row", str(error)) from error

    def summary(self, totals: Counter[str], shards: int, missing: list[str]) -> str:
        lines = [
            f"{totals['documents']:,} documents in {shards:,} shards, {totals['images']:,} images",
            f"missing: {totals['missing_images']:,} images, {len(missing):,} zips; "
            f"unreadable: {totals['bad_images']:,} images, {totals['bad_documents']:,} documents",
        ]
        return "\n".join([*lines, *(f"  no such zip: {path}" for path in missing[:10])])


def read_documents(path: str) -> Iterator[bytes]:
    """The lines of a zip's document file, empty ones left out. Raises ValueError, naming the zip, if it cannot be read."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            with archive.open(next((name for name in names if name.endswith((".jsonl", ".json"))), names[0])) as lines:
                yield from (line for line in lines if line.strip())
    except (zipfile.BadZipFile, zlib.error, IndexError, EOFError) as error:
        raise ValueError(f"{path} is not a readable zip of documents: {error}") from error


def _with_images(line: bytes, image_dir: Path, counts: Counter[str]) -> bytes:
    """The document of a line, with its images in it. Raises ValueError, KeyError or TypeError if it cannot be read."""
    import pybase64

    from open_flamingo.train.data.decoding import decode_rgb  # opens what training opens

    document: dict[str, Any] = json.loads(line)
    for info, name in [(info, os.path.normpath(str(info["image_name"]))) for info in document["image_info"]]:
        try:
            if os.path.isabs(name) or name.startswith(".."):
                raise ValueError("a document must not reach other files")
            image = io.BytesIO()
            decode_rgb((image_dir / name).read_bytes()).save(image, format="JPEG", quality=JPEG_QUALITY)
            info["image_base64"] = pybase64.b64encode(image.getvalue()).decode("ascii")
            counts["images"] += 1
        except (FileNotFoundError, NotADirectoryError):
            counts["missing_images"] += 1
        except Exception:  # a broken image can raise anything
            counts["bad_images"] += 1
    return json.dumps(document).encode()
