"""Tables of rows: CSV, TSV, JSONL, JSON and Parquet, in blocks that are read on their own; and the images that rows name."""

from __future__ import annotations

import csv
import functools
import glob
import io
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from open_flamingo.scripts.convert.engine import Format, Skip

TABLES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
IMAGE_FIELDS = ("image", "path", "file_name", "image_path", "filepath", "filename", "bytes", "base64", "jpg")
CAPTION_FIELDS = ("caption", "text")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
csv.field_size_limit(1 << 27)  # of a base64 image; the default, 128 KB, is less than an image


@dataclass
class Table(Format):
    """A format whose inputs are tables; what is not one of them is for its subclass."""

    paths: list[str]
    image_dir: Path | None = None  # by default the folder of the table
    image_field: str | None = None
    caption_field: str | None = None
    entry = ""  # field of the rows of a folder, whose values are names in it; "": folders are no input

    def entries(self, folder: str) -> list[str]:
        """Names in a folder, each a row."""
        raise NotImplementedError

    def is_folder(self, path: str) -> bool:
        return bool(self.entry) and os.path.isdir(path)

    def describe(self, path: str) -> str | None:
        return f"{len(self.entries(path))} {self.entry}s" if self.is_folder(path) else super().describe(path)

    def settings(self) -> dict[str, Any]:
        options = {"image_dir": self.image_dir, "image_field": self.image_field, "caption_field": self.caption_field}
        return {"format": type(self).__name__} | {name: value and str(value) for name, value in options.items()}

    def inputs(self) -> list[str]:
        from braceexpand import braceexpand

        names = [name for path in self.paths for name in braceexpand(os.path.expanduser(path))]
        found = [path for name in names for path in (sorted(glob.glob(name)) if "*" in name else [name])]
        missing = [path for path in found if not os.path.exists(path)]
        if missing or not found:
            raise ValueError(f"{(missing or names)[0]} does not exist: give tables ({', '.join(TABLES)}) or folders")
        return found

    def blocks(self, index: int, path: str, size: int) -> list[tuple[int, int]]:
        if self.is_folder(path):
            return [(0, len(self.entries(path)))]
        suffix = Path(path).suffix.lower()
        if suffix == ".parquet":
            metadata = parquet(path).metadata
            return [(group, metadata.row_group(group).num_rows) for group in range(metadata.num_row_groups)]
        if suffix == ".json" and not is_lines(path):
            return [(0, len(json_rows(path)))]
        if suffix not in TABLES:
            raise ValueError(f"{path} is none of {', '.join(TABLES)}, and no folder: convert or rename it")
        found: list[tuple[int, int]] = []
        for number, start in enumerate(row_starts(path)):
            if number % size == 0:
                found.append((start, 0))
            found[-1] = (found[-1][0], number % size + 1)
        return found

    def rows(self, path: str, position: int) -> Iterator[Any]:
        suffix = Path(path).suffix.lower()
        if self.is_folder(path):
            yield from ({self.entry: name} for name in self.entries(path))
        elif suffix == ".parquet":
            for batch in parquet(path).iter_batches(batch_size=64, row_groups=[position]):
                yield from batch.to_pylist()
        elif suffix in (".csv", ".tsv"):
            with open(path, encoding="utf-8-sig", newline="") as text:
                header = next(csv.reader(text, delimiter=delimiter(path)))
            with open(path, "rb") as file:
                file.seek(position)
                lines = (line.decode("utf-8", errors="replace") for line in file)
                for values in csv.reader(lines, delimiter=delimiter(path)):
                    if values:
                        yield dict(zip(header, values))
        elif suffix == ".json" and not is_lines(path):
            yield from json_rows(path)
        else:
            with open(path, "rb") as file:
                file.seek(position)
                yield from (line for line in file if line.strip())

    def record(self, row: Any) -> dict[str, Any]:
        try:
            record = json.loads(row) if isinstance(row, bytes) else row
        except (ValueError, RecursionError) as error:
            raise Skip("bad_row", f"this line is not JSON: {error}") from error
        if not isinstance(record, dict):
            raise Skip("bad_row", f"a row must be an object of fields, not {type(record).__name__}")
        return record

    def folder(self, path: str) -> Path:
        """Where the images of an input are."""
        return self.image_dir or (Path(path) if os.path.isdir(path) else Path(path).parent)

    def caption(self, record: dict[str, Any]) -> str:
        text = choose(record, self.caption_field, CAPTION_FIELDS, "no_caption", "--caption_field")
        if not isinstance(text, str) or not text.strip():
            raise Skip("no_caption", "the caption is empty, or no text")
        return text.strip()


def choose(record: dict[str, Any], field: str | None, usual: tuple[str, ...], reason: str, flag: str) -> Any:
    """The value of `field`, or of the first of the usual ones that is there."""
    for name in (field,) if field else usual:
        if record.get(name) is not None:
            return record[name]
    raise Skip(reason, f"no {field or ' or '.join(usual)} among its fields {', '.join(record)}: name it with {flag}")


def delimiter(path: str) -> str:
    return "\t" if path.lower().endswith(".tsv") else ","


def row_starts(path: str) -> Iterator[int]:
    """The first byte of each row, but of empty ones. A row of CSV can be several lines."""
    at = start = 0

    def lines() -> Iterator[str]:
        nonlocal at
        for line in file:
            at += len(line)
            yield line.decode("utf-8", errors="replace")

    with open(path, "rb") as file:
        is_csv = path.lower().endswith((".csv", ".tsv"))
        rows: Iterator[Any] = csv.reader(lines(), delimiter=delimiter(path)) if is_csv else map(str.strip, lines())
        if is_csv:
            next(rows, None)  # the header
            start = at
        for row in rows:
            if row:
                yield start
            start = at


def is_lines(path: str) -> bool:
    """Whether a .json file holds a row on each line: it does not begin with a list."""
    with open(path, "rb") as file:
        return not file.read(1024).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")


@functools.lru_cache(maxsize=1)  # a list cannot be read in parts: each worker reads it once
def json_rows(path: str) -> list[Any]:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


@functools.lru_cache(maxsize=1)
def parquet(path: str) -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(f"{path}: reading Parquet needs pyarrow: pip install 'open-flamingo[convert]'") from error
    try:
        return pyarrow.parquet.ParquetFile(path)
    except (OSError, pyarrow.ArrowInvalid) as error:
        raise ValueError(f"{path} is not a readable Parquet file: {error}") from error


def image_bytes(value: Any, folder: Path) -> bytes:
    """The bytes of an image that is given as bytes, as a path in `folder`, or as {"bytes" | "base64" | "path": …}.

    Raises Skip: `missing_image`, `outside_image_dir` or `bad_image`.
    """
    import pybase64

    if isinstance(value, dict):
        if value.get("base64") is not None:
            value = {"bytes": value["base64"]}
        data = value.get("bytes")
        if isinstance(data, str):
            try:
                data = pybase64.b64decode(data.partition(",")[2] if data.startswith("data:") else data)
            except ValueError as error:
                raise Skip("bad_image", f"not base64: {error}") from error
        value = data if data is not None else value.get("path")
    if isinstance(value, bytes):
        return checked(value)
    if not isinstance(value, str) or not value:
        raise Skip("missing_image", "no path and no bytes")
    root = os.path.abspath(folder)
    path = os.path.normpath(os.path.join(root, value))
    if os.path.commonpath([root, path]) != root:
        raise Skip("outside_image_dir", f"{value} is not in {root}: say where images may be with --image_dir")
    try:
        return checked(Path(path).read_bytes(), path)
    except (OSError, ValueError) as error:
        raise Skip("missing_image", f"{path} cannot be read ({error}): is --image_dir right?") from error


def checked(data: bytes, name: str = "an image") -> bytes:
    """`data`, if training can decode it to its end. Raises Skip."""
    from open_flamingo.train.data.decoding import open_image

    try:
        with open_image(data) as image:
            image.load()
    except Exception as error:  # a broken image can raise anything
        raise Skip("bad_image", f"{name} cannot be decoded: {error}") from error
    return data


def as_pair_file(data: bytes) -> tuple[str, bytes]:
    """Suffix and bytes as they are where training knows the suffix; a JPEG of good quality otherwise."""
    from open_flamingo.train.data.decoding import open_image

    with open_image(data) as image:
        suffix = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}.get(image.format or "")
        if suffix:
            return suffix, data
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, format="JPEG", quality=95)
    return "jpg", buffer.getvalue()
