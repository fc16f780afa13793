"""`pairs`: images with captions, from tables, or from folders of images with `.txt` or `.json` files beside them."""

from __future__ import annotations

import functools
import json
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from open_flamingo.scripts.convert.engine import Skip
from open_flamingo.scripts.convert.tables import IMAGE_FIELDS, IMAGE_SUFFIXES, Table, as_pair_file, choose, image_bytes


@dataclass
class Pairs(Table):
    """One image and its caption → `jpg`, `png`, or `webp` with a `json`; and `txt`."""

    flag = "laion_shards"
    noun = "pair"
    entry = "image"

    def inputs(self) -> list[str]:
        """A folder is its `metadata.csv`, `.jsonl` or `.parquet` (Hugging Face's imagefolder), or all folders of images in it."""
        found = []
        for path in super().inputs():
            tables = [Path(path) / f"metadata.{kind}" for kind in ("csv", "jsonl", "parquet")]
            table = next((table for table in tables if table.exists()), None)
            if table or not os.path.isdir(path):
                found.append(str(table or path))
                continue
            for folder, folders, _ in os.walk(path):
                folders.sort()
                table = next((name for t in tables if (name := Path(folder) / t.name).exists()), None)
                if table:  # an imagefolder has one in each split
                    found.append(str(table))
                elif images_of(folder):
                    found.append(folder)
        if not found:
            raise ValueError(f"no image is in {', '.join(self.paths)}: looked for are {', '.join(IMAGE_SUFFIXES)}")
        return found

    def entries(self, folder: str) -> list[str]:
        return images_of(folder)

    def sample(self, path: str, row: Any, counts: Counter[str]) -> list[tuple[str, bytes]]:
        record = self.record(row)
        if os.path.isdir(path):
            image, caption = record["image"], self._beside(Path(path) / record["image"])
            folder = Path(path)
        else:
            image = choose(record, self.image_field, IMAGE_FIELDS, "no_image", "--image_field")
            if (self.image_field or "").startswith("base64") or (
                not self.image_field and image is record.get("base64")
            ):
                image = {"base64": image}
            caption, folder = self.caption(record), self.folder(path)
        suffix, data = as_pair_file(image_bytes(image, folder))
        counts["images"] += 1
        # Training takes a webp only beside a json, as img2dataset writes them.
        return [(suffix, data), ("txt", caption.encode()), *([("json", b"{}")] if suffix == "webp" else [])]

    def _beside(self, image: Path) -> str:
        """The caption in `{stem}.txt`, or in a field of `{stem}.json`."""
        text, fields = image.with_suffix(".txt"), image.with_suffix(".json")
        try:
            if text.exists() and not self.caption_field:
                record: Any = {"caption": text.read_text(encoding="utf-8")}
            elif fields.exists():
                record = json.loads(fields.read_text(encoding="utf-8"))
            else:
                raise Skip("no_caption", f"neither {text} nor {fields.name} exists")
        except (OSError, ValueError) as error:
            raise Skip("no_caption", f"the file beside {image} cannot be read: {error}") from error
        return self.caption(self.record(record))


@functools.lru_cache(maxsize=1)  # several shards of one folder
def images_of(folder: str) -> list[str]:
    """Names of the images of a folder, sorted; not of its subfolders."""
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if entry.name.lower().endswith(IMAGE_SUFFIXES)]
    return sorted(name for name in names if not name.startswith("."))
