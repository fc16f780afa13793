"""What all formats share: shards written in parallel, resumed after a stop, with progress and a summary.

The input is a list of files or folders, each of one or more blocks of rows that can be read on their own. Shard s holds rows
s × num_files_per_shard and on, counted over all blocks, so what is in it depends on the input alone. It is written beside its
place and renamed, then listed in `convert.shards.jsonl`; a run that is started again does what is not listed.
"""

from __future__ import annotations

import io
import json
import math
import multiprocessing
import os
import tarfile
import threading
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

from open_flamingo.train.atomic import atomic_write

SETTINGS = "convert.json"
FINISHED = "convert.shards.jsonl"

# Rows of one block: its place in the list of blocks, its input, its position there, the first row and the one after the last.
Piece = tuple[int, str, int, int, int]


class Skip(Exception):
    """This row becomes no sample. `reason` is a short name that is counted, `message` says more."""

    def __init__(self, reason: str, message: str = "") -> None:
        super().__init__(message)
        self.reason = reason


@dataclass
class Format:
    """A kind of input. The methods run in the workers, but for `inputs` and `summary`."""

    flag = "mmc4_shards"  # of training, which takes the shards
    noun = "document"
    image_advice = "Is --image_dir right?"  # where no image at all was found

    def settings(self) -> dict[str, Any]:
        """What decides what becomes of a row: another value needs another folder of shards."""
        return {}

    def inputs(self) -> list[str]:
        """Files or folders, in order. Raises ValueError if there are none."""
        raise NotImplementedError

    def describe(self, path: str) -> str | None:
        """What tells a changed input from the old one; None if it is missing."""
        return f"{os.path.getsize(path)} bytes" if os.path.isfile(path) else None

    def blocks(self, index: int, path: str, size: int) -> list[tuple[int, int]]:
        """(position, number of rows) of each part of the index-th input that can be read on its own; of some `size` rows at best."""
        raise NotImplementedError

    def rows(self, path: str, position: int) -> Iterator[Any]:
        """The rows from `position` on."""
        raise NotImplementedError

    def sample(self, path: str, row: Any, counts: Counter[str]) -> Iterable[tuple[str, bytes]]:
        """Suffix and contents of each file of a sample. Raises Skip; counts images, and what else is missing."""
        raise NotImplementedError

    def summary(self, totals: Counter[str], shards: int, missing: list[str]) -> str:
        lines = [f"{totals['documents']:,} {self.noun}s in {shards:,} shards, {totals['images']:,} images"]
        for name, count in sorted(totals.items()):
            if name.startswith("missing/"):
                lines.append(f"  left out, {name.removeprefix('missing/')}: {count:,}")
        return "\n".join([*lines, *(f"  no such input: {path}" for path in missing[:10])])

    def advice(self, totals: Counter[str], most_images: int) -> str:
        """More flags that training needs."""
        return ""


def convert(form: Format, out: Path, size: int, workers: int) -> None:
    """Writes the shards of `size` samples that do not exist yet, and prints what was missing in all of them.

    Raises ValueError if there is no input, if nothing of it can be used, or if `out` holds shards of another input.
    """
    from tqdm import tqdm

    paths = form.inputs()
    found = {path: form.describe(path) for path in paths}
    out.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(out)

    with ProcessPoolExecutor(workers, initializer=_exit_with_parent) as pool:
        blocks = _blocks(pool, form, out, size, found)
        shards = _plan(out, size, blocks)
        finished = _read_finished(out)
        totals = sum((Counter(entry["counts"]) for entry in finished.values()), Counter())
        entries = list(finished.values())
        done = totals["documents"] + totals["bad_documents"]
        with (
            tqdm(total=sum(rows for *_, rows in blocks), initial=done, unit=form.noun) as bar,
            open(out / FINISHED, "a", encoding="utf-8", buffering=1) as listing,
        ):
            left = [(form, path, pieces) for path, pieces in shards.items() if path.name not in finished]
            for entry in pool.map(write_shard, left):
                listing.write(json.dumps(entry) + "\n")
                entries.append(entry)
                totals += Counter(entry["counts"])
                bar.update(entry["counts"].get("documents", 0) + entry["counts"].get("bad_documents", 0))
    _remove_leftovers(out)  # a worker of a killed run may have begun another shard before it noticed
    _report(form, out, shards, totals, entries, [path for path, size in found.items() if size is None])


def _remove_leftovers(out: Path) -> None:
    for leftover in out.glob(".*.tmp"):  # of a run that was killed
        leftover.unlink(missing_ok=True)


def _blocks(
    pool: ProcessPoolExecutor, form: Format, out: Path, size: int, found: dict[str, str | None]
) -> list[tuple[str, int, int]]:
    """(input, position, number of rows) of each block; what decides which row goes where is kept in `out`."""
    from tqdm import tqdm

    paths = list(found)
    settings = {"num_files_per_shard": size, "options": form.settings(), "inputs": found}
    if not (out / SETTINGS).exists():
        counted = pool.map(form.blocks, range(len(paths)), paths, [size] * len(paths))
        counted = list(tqdm(counted, total=len(paths), desc="counting", unit="input"))
        blocks = [(path, *block) for path, parts in zip(paths, counted, strict=True) for block in parts]
        with atomic_write(out / SETTINGS) as file:
            file.write(json.dumps({**settings, "blocks": blocks}).encode())
    saved = json.loads((out / SETTINGS).read_text(encoding="utf-8"))
    for was, now in zip_longest(_describe(saved), _describe(settings), fillvalue="nothing"):
        if was != now:
            raise ValueError(
                f"{out} holds shards of another input: {was}, now {now}. Use the same input, or another --output_dir"
            )
    return [(path, position, rows) for path, position, rows in saved["blocks"]]


def _describe(settings: dict[str, Any]) -> list[str]:
    # Empty where another version of this program wrote them.
    inputs = (f"{path}: {'missing' if size is None else size}" for path, size in settings.get("inputs", {}).items())
    options = (f"{name} {value}" for name, value in settings.get("options", {}).items())
    return [f"num_files_per_shard {settings['num_files_per_shard']}", *options, *inputs]


def _plan(out: Path, size: int, blocks: list[tuple[str, int, int]]) -> dict[Path, list[Piece]]:
    """Shard → what it holds."""
    shards: dict[Path, list[Piece]] = defaultdict(list)
    first = 0  # of the block, counted over all blocks
    for index, (path, position, count) in enumerate(blocks):
        for shard in range(first // size, math.ceil((first + count) / size)):
            start, end = max(shard * size - first, 0), min((shard + 1) * size - first, count)
            shards[out / f"{shard:09d}.tar"].append((index, path, position, start, end))
        first += count
    return shards


def _read_finished(out: Path) -> dict[str, dict[str, Any]]:
    """Shard → its entry, of the shards that are listed and exist."""
    path = out / FINISHED
    path.touch()
    listing = path.read_bytes()
    whole = listing[: listing.rfind(b"\n") + 1]
    os.truncate(path, len(whole))  # killed while it wrote a line: that shard is written again
    entries = map(json.loads, whole.splitlines())
    return {entry["shard"]: entry for entry in entries if (out / entry["shard"]).exists()}


def _exit_with_parent() -> None:
    """Without this, a worker of a killed run would wait for work forever, after finishing what it had."""

    def wait() -> None:
        multiprocessing.parent_process().join()  # type: ignore[union-attr]
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def write_shard(shard: tuple[Format, Path, list[Piece]]) -> dict[str, Any]:
    """Writes one shard, whole or not at all; returns its name, what became of its rows, and an example of each reason."""
    form, out, pieces = shard
    counts: Counter[str] = Counter()
    examples: dict[str, str] = {}
    most_images = 0
    with atomic_write(out) as file, tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for index, path, position, start, end in pieces:
            for number, row in enumerate(islice(form.rows(path, position), start, end), start):
                before = counts["images"]
                try:
                    files = list(form.sample(path, row, counts))
                except Skip as skip:
                    counts["images"] = before
                    counts["bad_documents"] += 1
                    counts[f"missing/{skip.reason}"] += 1
                    examples.setdefault(skip.reason, f"{path}, row {number} of block {index}: {skip}")
                    continue
                most_images = max(most_images, counts["images"] - before)
                for suffix, data in files:
                    # Neither time nor user: the same input gives the same bytes.
                    info = tarfile.TarInfo(f"{index:06d}_{number:06d}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
                counts["documents"] += 1
    return {"shard": out.name, "counts": dict(+counts), "examples": examples, "most_images": most_images}


def _report(
    form: Format,
    out: Path,
    shards: dict[Path, list[Piece]],
    totals: Counter[str],
    entries: list[dict[str, Any]],
    missing: list[str],
) -> None:
    """Prints the summary, an example of each reason, and what to train with. Raises ValueError if there is nothing."""
    print(form.summary(totals, len(shards), missing))
    examples: dict[str, str] = {}
    for entry in sorted(entries, key=lambda entry: entry["shard"]):
        examples = entry.get("examples", {}) | examples
    for reason, example in sorted(examples.items()):
        print(f"  {reason}, for example: {example}")
    if shards and not totals["documents"]:
        raise ValueError("nothing could be converted: the lines above say why")
    if shards and not totals["images"]:
        print(f"NO IMAGE FOUND: nothing can be learned from these shards. {form.image_advice}")
    elif shards:
        more = form.advice(totals, max((entry.get("most_images", 0) for entry in entries), default=0))
        print(f"train on them with --{form.flag} '{out}/{{{0:09d}..{len(shards) - 1:09d}}}.tar'{more}")
