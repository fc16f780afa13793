"""Converts MMC4 (zips of documents, and a folder of downloaded images) to the WebDataset shards that training reads.

    python scripts/convert_mmc4_to_wds.py --output_dir shards --zip_files '/data/mmc4/docs_shard_{0..23098}.zip' \\
        --image_dir /data/mmc4/images --workers 16

Image `image_name` of a document in the i-th zip of the list (from 0) is looked for in `{image_dir}/{i}/{image_name}`. An image that
is missing or broken is left out, its document stays.

Shard s holds documents s × num_files_per_shard and on, counted over all zips, so what is in it depends on the input alone. It is
written beside its place and renamed, then listed in `convert.shards.jsonl`; a run that is started again does what is not listed.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a file: use this checkout, installed or not
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    import open_flamingo

    open_flamingo.__path__.append(sys.path[0])

import argparse
import io
import json
import math
import multiprocessing
import os
import tarfile
import threading
import zipfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice, zip_longest
from typing import Any

from open_flamingo.train.arguments import positive_int
from open_flamingo.train.atomic import atomic_write

SETTINGS = "convert.json"
FINISHED = "convert.shards.jsonl"
JPEG_QUALITY = 75  # the reference's (Pillow's default); training leaves out images of fewer than 11,000 such bytes

# Documents of one zip: its place in the list, its path, the folder of its images, the first document and the one after the last.
Piece = tuple[int, str, Path, int, int]


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line. Raises SystemExit with a message where the input cannot be used."""
    parser = argparse.ArgumentParser(
        description="Converts MMC4 to WebDataset shards. Start it again to go on after a stop."
    )
    add = parser.add_argument
    add("--output_dir", type=Path, required=True, help="folder for the shards, 000000000.tar and on")
    add("--zip_files", required=True, help="zips of documents: 'docs/shard_{0..23098}.zip'")
    add("--image_dir", type=Path, required=True, help="images: {image_dir}/{place in the list of zips}/{image_name}")
    add("--num_files_per_shard", type=positive_int, default=1000, help="documents per shard (default: %(default)s)")
    add("--workers", type=positive_int, default=1, help="processes (default: %(default)s)")
    try:
        convert(parser.parse_args(argv))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except BrokenProcessPool:
        sys.exit(
            "error: a worker was killed: is the machine out of memory? The same command goes on, with fewer --workers if it is"
        )


def convert(args: argparse.Namespace) -> None:
    """Writes the shards that do not exist yet, and prints what was missing in all of them.

    Raises ValueError if no zip is found, or if --output_dir holds shards of another input.
    """
    from braceexpand import braceexpand
    from tqdm import tqdm

    out: Path = args.output_dir
    zips = list(braceexpand(os.path.expanduser(args.zip_files)))
    sizes = {path: os.path.getsize(path) if os.path.isfile(path) else None for path in zips}
    missing_zips = [path for path in zips if sizes[path] is None]
    if len(missing_zips) == len(zips):
        raise ValueError(f"--zip_files {args.zip_files!r} matches no file; the first one looked for is {zips[0]}")
    if not args.image_dir.is_dir():
        raise ValueError(f"--image_dir {args.image_dir} is not a folder")
    out.mkdir(parents=True, exist_ok=True)
    for leftover in out.glob(".*.tmp"):  # of a run that was killed
        leftover.unlink()

    with ProcessPoolExecutor(args.workers, initializer=_exit_with_parent) as pool:
        # What decides which document goes where is kept, with the number of documents in each zip.
        settings = {"num_files_per_shard": args.num_files_per_shard, "zip_sizes": sizes}
        if not (out / SETTINGS).exists():
            documents = list(tqdm(pool.map(count_documents, zips), total=len(zips), desc="counting", unit="zip"))
            with atomic_write(out / SETTINGS) as file:
                file.write(json.dumps({**settings, "documents": documents}).encode())
        saved = json.loads((out / SETTINGS).read_text(encoding="utf-8"))
        for was, now in zip_longest(_describe(saved), _describe(settings), fillvalue="nothing"):
            if was != now:
                raise ValueError(
                    f"{out} holds shards of another input: {was}, now {now}. Use the same input, or another --output_dir"
                )
        shards = _plan(args, zips, saved["documents"])
        finished = _read_finished(out)
        totals = sum(finished.values(), Counter())
        done = totals["documents"] + totals["bad_documents"]
        with (
            tqdm(total=sum(saved["documents"]), initial=done, unit="document") as bar,
            open(out / FINISHED, "a", encoding="utf-8", buffering=1) as listing,
        ):
            left = [(path, pieces) for path, pieces in shards.items() if path.name not in finished]
            for name, counts in pool.map(write_shard, left):
                listing.write(json.dumps({"shard": name, "counts": counts}) + "\n")
                totals += counts
                bar.update(counts["documents"] + counts["bad_documents"])

    print(f"{totals['documents']:,} documents in {len(shards):,} shards, {totals['images']:,} images")
    print(f"missing: {totals['missing_images']:,} images, {len(missing_zips):,} zips", end="; ")
    print(f"unreadable: {totals['bad_images']:,} images, {totals['bad_documents']:,} documents")
    for path in missing_zips[:10]:
        print(f"  no such zip: {path}")
    if totals["documents"] and not totals["images"]:
        print("NO IMAGE FOUND: nothing can be learned from these shards. --image_dir holds a folder per zip: 0, 1, …")
    elif shards:
        print(f"train on them with --mmc4_shards '{out}/{{{0:09d}..{len(shards) - 1:09d}}}.tar'")


def _describe(settings: dict[str, Any]) -> list[str]:
    sizes = (
        f"{path}: {'missing' if size is None else f'{size} bytes'}" for path, size in settings["zip_sizes"].items()
    )
    return [f"num_files_per_shard {settings['num_files_per_shard']}", *sizes]


def _plan(args: argparse.Namespace, zips: list[str], documents: list[int]) -> dict[Path, list[Piece]]:
    """Shard → what it holds."""
    shards: dict[Path, list[Piece]] = defaultdict(list)
    size, first = args.num_files_per_shard, 0  # `first`: of the zip, counted over all zips
    for index, (zip_path, count) in enumerate(zip(zips, documents, strict=True)):
        for shard in range(first // size, math.ceil((first + count) / size)):
            start, end = max(shard * size - first, 0), min((shard + 1) * size - first, count)
            piece = (index, zip_path, args.image_dir / str(index), start, end)
            shards[args.output_dir / f"{shard:09d}.tar"].append(piece)
        first += count
    return shards


def _read_finished(out: Path) -> dict[str, Counter[str]]:
    """Shard → counts, of the shards that are listed and exist."""
    path = out / FINISHED
    path.touch()
    listing = path.read_bytes()
    whole = listing[: listing.rfind(b"\n") + 1]
    os.truncate(path, len(whole))  # killed while it wrote a line: that shard is written again
    entries = map(json.loads, whole.splitlines())
    return {entry["shard"]: Counter(entry["counts"]) for entry in entries if (out / entry["shard"]).exists()}


def _exit_with_parent() -> None:
    """Without this, a worker of a killed run would wait for work forever, after finishing what it had."""

    def wait() -> None:
        multiprocessing.parent_process().join()  # type: ignore[union-attr]
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def read_documents(path: str) -> Iterator[bytes]:
    """The lines of a zip's document file, empty ones left out. Raises ValueError, naming the zip, if it cannot be read."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            with archive.open(next((name for name in names if name.endswith((".jsonl", ".json"))), names[0])) as lines:
                yield from (line for line in lines if line.strip())
    except (zipfile.BadZipFile, zlib.error, IndexError, EOFError) as error:
        raise ValueError(f"{path} is not a readable zip of documents: {error}") from error


def count_documents(path: str) -> int:
    return sum(1 for _ in read_documents(path)) if os.path.isfile(path) else 0


def write_shard(shard: tuple[Path, list[Piece]]) -> tuple[str, Counter[str]]:
    """Writes one shard, whole or not at all; returns its name and what became of its documents and images."""
    path, pieces = shard
    counts: Counter[str] = Counter()
    with atomic_write(path) as file, tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for zip_index, zip_path, image_dir, start, end in pieces:
            for number, line in enumerate(islice(read_documents(zip_path), start, end), start):
                try:
                    document = _with_images(line, image_dir, counts)
                except (ValueError, KeyError, TypeError, RecursionError):  # a thousand brackets deep
                    counts["bad_documents"] += 1
                    continue
                # Neither time nor user: the same input gives the same bytes.
                info = tarfile.TarInfo(f"{zip_index:06d}_{number:06d}.json")
                info.size = len(document)
                tar.addfile(info, io.BytesIO(document))
                counts["documents"] += 1
    return path.name, counts


def _with_images(line: bytes, image_dir: Path, counts: Counter[str]) -> bytes:
    """The document of a line, with its images in it. Raises ValueError, KeyError or TypeError if it cannot be read."""
    import pybase64

    from open_flamingo.train.data.decoding import decode_rgb  # opens what training opens

    document = json.loads(line)
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


if __name__ == "__main__":
    main()
