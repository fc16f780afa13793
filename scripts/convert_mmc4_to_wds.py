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
import multiprocessing
import os
import tarfile
import threading
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from open_flamingo.train.atomic import atomic_write

SETTINGS = "convert.json"
FINISHED = "convert.shards.jsonl"
JPEG_QUALITY = 75  # the reference's (Pillow's default); training leaves out images of fewer than 11,000 such bytes


@dataclass(frozen=True)
class Piece:
    """Documents `start` to `end` of one zip; images are in the folder `image_dir`."""

    zip_index: int
    zip_path: str
    image_dir: str
    start: int
    end: int


@dataclass
class Job:
    """One shard to write."""

    path: Path
    pieces: list[Piece] = field(default_factory=list)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line. Raises SystemExit with a message where the input cannot be used."""
    args = parse_args(argv)
    try:
        convert(args)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Converts MMC4 to WebDataset shards. Start it again to go on after a stop."
    )
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for the shards, 000000000.tar and on")
    parser.add_argument("--zip_files", required=True, help="zips of documents: 'docs/shard_{0..23098}.zip'")
    parser.add_argument(
        "--image_dir", type=Path, required=True, help="images: {image_dir}/{place in the list of zips}/{image_name}"
    )
    parser.add_argument(
        "--num_files_per_shard", type=_positive, default=1000, help="documents per shard (default: %(default)s)"
    )
    parser.add_argument("--workers", type=_positive, default=1, help="processes (default: %(default)s)")
    return parser.parse_args(argv)


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"at least 1, not {value}")
    return value


def convert(args: argparse.Namespace) -> None:
    """Writes the shards that do not exist yet, and prints what was missing in all of them.

    Raises ValueError if no zip is found, or if --output_dir holds shards of another input.
    """
    from braceexpand import braceexpand
    from tqdm import tqdm

    out: Path = args.output_dir
    zips = list(braceexpand(os.path.expanduser(args.zip_files)))
    missing_zips = [path for path in zips if not os.path.isfile(path)]
    if len(missing_zips) == len(zips):
        raise ValueError(f"--zip_files {args.zip_files!r} matches no file; the first one looked for is {zips[0]}")
    if not args.image_dir.is_dir():
        raise ValueError(f"--image_dir {args.image_dir} is not a folder")
    out.mkdir(parents=True, exist_ok=True)
    for leftover in out.glob(".*.tmp"):  # of a run that was killed
        leftover.unlink()

    with _pool(args.workers) as run:
        documents = _count_documents(out, zips, missing_zips, args.num_files_per_shard, run)
        jobs = _plan(args, zips, documents)
        finished = _read_finished(out, {job.path.name for job in jobs})
        done = sum(counts["documents"] + counts["bad_documents"] for counts in finished.values())
        with (
            tqdm(total=sum(documents), initial=done, unit="document") as bar,
            open(out / FINISHED, "a", encoding="utf-8") as listing,
        ):
            for shard, counts in run(write_shard, [job for job in jobs if job.path.name not in finished]):
                listing.write(json.dumps({"shard": shard, "counts": counts}) + "\n")
                listing.flush()
                finished[shard] = counts
                bar.update(counts["documents"] + counts["bad_documents"])
    _print_summary(out, len(jobs), sum(finished.values(), Counter()), missing_zips)


def _count_documents(out: Path, zips: list[str], missing: list[str], per_shard: int, run: Any) -> list[int]:
    """How many documents each zip has. Counted once; then kept, with all that decides which document goes where."""
    from tqdm import tqdm

    sizes = {path: None if path in missing else os.path.getsize(path) for path in zips}
    settings = {"num_files_per_shard": per_shard, "zip_sizes": sizes}
    path = out / SETTINGS
    if path.exists():
        saved = json.loads(path.read_text(encoding="utf-8"))
        for name, value in settings.items():
            if saved[name] != value:
                raise ValueError(
                    f"{out} holds shards of another {name}: {_difference(saved[name], value)}. Use the same input, or another "
                    "--output_dir"
                )
        return saved["documents"]
    found = [zip_path for zip_path in zips if zip_path not in missing]
    counts = dict(zip(found, tqdm(run(count_documents, found), total=len(found), desc="counting", unit="zip")))
    documents = [counts.get(zip_path, 0) for zip_path in zips]
    with atomic_write(path) as file:
        file.write(json.dumps({**settings, "documents": documents}).encode())
    return documents


def _difference(old: Any, new: Any) -> str:
    if not isinstance(old, dict):
        return f"{old}, now {new}"
    changed = [key for key in {**old, **new} if old.get(key, "absent") != new.get(key, "absent")]
    return f"{len(changed)} differ, the first is {changed[0]}" if changed else "their order differs"


def _plan(args: argparse.Namespace, zips: list[str], documents: list[int]) -> list[Job]:
    jobs: list[Job] = []
    room = 0  # in the last shard
    for index, (path, count) in enumerate(zip(zips, documents, strict=True)):
        start = 0
        while start < count:
            if room == 0:
                jobs.append(Job(args.output_dir / f"{len(jobs):09d}.tar"))
                room = args.num_files_per_shard
            end = min(count, start + room)
            jobs[-1].pieces.append(Piece(index, path, str(args.image_dir / str(index)), start, end))
            room -= end - start
            start = end
    return jobs


def _read_finished(out: Path, names: set[str]) -> dict[str, Counter[str]]:
    """Shard → counts, of the shards that are listed and exist."""
    path = out / FINISHED
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    whole = [line for line in lines if line.endswith("\n")]
    if len(whole) < len(lines):  # killed while it wrote the line: that shard is written again
        with atomic_write(path) as file:
            file.write("".join(whole).encode())
    entries = {entry["shard"]: Counter(entry["counts"]) for entry in map(json.loads, whole)}
    return {shard: counts for shard, counts in entries.items() if shard in names and (out / shard).exists()}


# ------------------------------------------------------------------------------------------------- in the worker processes


@contextmanager
def _open_documents(path: str) -> Iterator[Iterator[bytes]]:
    """The lines of a zip's document file, empty ones left out."""
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        name = next((name for name in names if name.endswith((".jsonl", ".json"))), names[0])
        with archive.open(name) as lines:
            yield (line for line in lines if line.strip())


def count_documents(path: str) -> int:
    """Raises ValueError, naming the zip, if it cannot be read."""
    try:
        with _open_documents(path) as lines:
            return sum(1 for _ in lines)
    except (zipfile.BadZipFile, IndexError, EOFError) as error:
        raise ValueError(f"{path} is not a readable zip of documents: {error}") from error


def write_shard(job: Job) -> tuple[str, Counter[str]]:
    """Writes one shard, whole or not at all; returns its name and what became of its documents and images."""
    counts: Counter[str] = Counter()
    with atomic_write(job.path) as file, tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for piece in job.pieces:
            with _open_documents(piece.zip_path) as lines:
                for number, line in enumerate(islice(lines, piece.start, piece.end), piece.start):
                    document = _read_document(line, piece.image_dir, counts)
                    if document is None:
                        counts["bad_documents"] += 1
                        continue
                    # Neither time nor user: the same input gives the same bytes.
                    info = tarfile.TarInfo(f"{piece.zip_index:06d}_{number:06d}.json")
                    data = json.dumps(document).encode()
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
                    counts["documents"] += 1
    return job.path.name, counts


def _read_document(line: bytes, image_dir: str, counts: Counter[str]) -> dict[str, Any] | None:
    """The document with its images in it; None if it cannot be read."""
    try:
        document = json.loads(line)
        infos = [(info, info["image_name"]) for info in document["image_info"]]
    except (ValueError, KeyError, TypeError):
        return None
    for info, name in infos:
        path = os.path.normpath(str(name))
        if os.path.isabs(path) or path.startswith("..") or "\0" in path:  # a document must not reach other files
            counts["bad_images"] += 1
            continue
        try:
            info["image_base64"] = _read_image(os.path.join(image_dir, path))
            counts["images"] += 1
        except (FileNotFoundError, NotADirectoryError):
            counts["missing_images"] += 1
        except Exception:  # a broken image can raise anything
            counts["bad_images"] += 1
    return document


def _read_image(path: str) -> str:
    """The image at `path` as a JPEG in base64. Opens what training opens."""
    import pybase64

    from open_flamingo.train.data.decoding import decode_rgb

    buffer = io.BytesIO()
    decode_rgb(Path(path).read_bytes()).save(buffer, format="JPEG", quality=JPEG_QUALITY)
    return pybase64.b64encode(buffer.getvalue()).decode("ascii")


@contextmanager
def _pool(workers: int) -> Iterator[Callable[..., Any]]:
    """`map`, in `workers` processes; results in order, as they come."""
    if workers == 1:
        yield map
        return
    with multiprocessing.Pool(workers, initializer=_exit_with_parent) as pool:
        yield pool.imap


def _exit_with_parent() -> None:
    """Without this, a worker of a killed run would wait for work forever, after finishing what it had."""

    def wait() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _print_summary(out: Path, shards: int, counts: Counter[str], missing_zips: list[str]) -> None:
    print(f"{counts['documents']:,} documents in {shards:,} shards, {counts['images']:,} images")
    print(f"missing: {counts['missing_images']:,} images, {len(missing_zips):,} zips", end="; ")
    print(f"unreadable: {counts['bad_images']:,} images, {counts['bad_documents']:,} documents")
    for path in missing_zips[:10]:
        print(f"  no such zip: {path}")
    if counts["documents"] and not counts["images"]:
        print(
            "NO IMAGE WAS FOUND: nothing can be learned from these shards. --image_dir holds a folder per zip: 0, 1, …"
        )
    elif shards:
        print(f"train on them with --mmc4_shards '{out}/{{{0:09d}..{shards - 1:09d}}}.tar'")


if __name__ == "__main__":
    main()
