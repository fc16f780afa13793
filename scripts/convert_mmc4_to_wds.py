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
import multiprocessing.connection
import os
import tarfile
import threading
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import IO, Any

SETTINGS = "convert.json"
FINISHED = "convert.shards.jsonl"
JPEG_QUALITY = 75  # the reference's (Pillow's default); training leaves out pictures of fewer than 11,000 such bytes


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

    path: str
    pieces: list[Piece]


@dataclass
class Report:
    """What became of the documents and images of one shard, or of all."""

    shard: str = ""
    counts: Counter[str] = field(default_factory=Counter)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line. Raises SystemExit with a message where the input cannot be used."""
    args = parse_args(argv)
    try:
        convert(args.output_dir, args.zip_files, args.image_dir, args.num_files_per_shard, args.workers)
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


def convert(output_dir: Path, zip_files: str, image_dir: Path, num_files_per_shard: int, workers: int) -> Report:
    """Writes the shards that are not there yet, and prints what was missing in all of them.

    Raises ValueError if no zip is found, or if `output_dir` holds shards of another input.
    """
    from braceexpand import braceexpand
    from tqdm import tqdm

    zips = list(braceexpand(os.path.expanduser(zip_files)))
    missing_zips = [path for path in zips if not os.path.isfile(path)]
    if len(missing_zips) == len(zips):
        raise ValueError(f"--zip_files {zip_files!r} matches no file; the first one looked for is {zips[0]}")
    if not image_dir.is_dir():
        raise ValueError(f"--image_dir {image_dir} is not a folder")
    output_dir.mkdir(parents=True, exist_ok=True)
    for leftover in output_dir.glob(".*.tmp"):  # of a run that was killed
        leftover.unlink()

    with _pool(workers) as run:
        documents = _documents(output_dir, zips, missing_zips, num_files_per_shard, run)
        jobs = _jobs(output_dir, zips, documents, image_dir, num_files_per_shard)
        finished = _read_finished(output_dir, {Path(job.path).name for job in jobs})
        to_do = [job for job in jobs if Path(job.path).name not in finished]
        done_before = sum(report.counts["documents"] + report.counts["bad_documents"] for report in finished.values())
        with (
            tqdm(total=sum(documents), initial=done_before, unit="document") as bar,
            open(output_dir / FINISHED, "a", encoding="utf-8") as listing,
        ):
            for report in run(write_shard, to_do):
                listing.write(json.dumps({"shard": report.shard, "counts": report.counts}) + "\n")
                listing.flush()
                finished[report.shard] = report
                bar.update(report.counts["documents"] + report.counts["bad_documents"])

    total = Report(counts=sum((report.counts for report in finished.values()), Counter()))
    _summarise(output_dir, jobs, total.counts, missing_zips)
    return total


def _documents(output_dir: Path, zips: list[str], missing: list[str], num_files_per_shard: int, run: Any) -> list[int]:
    """How many documents each zip has. Counted once; then kept, with all that decides which document goes where."""
    from tqdm import tqdm

    inputs = {path: None if path in missing else os.path.getsize(path) for path in zips}
    settings = {"num_files_per_shard": num_files_per_shard, "zip_sizes": inputs}
    path = output_dir / SETTINGS
    if path.exists():
        saved = json.loads(path.read_text(encoding="utf-8"))
        for name, value in settings.items():
            if saved[name] != value:
                raise ValueError(
                    f"{output_dir} holds shards of another {name}: {_difference(saved[name], value)}. "
                    "Use the same input, or another --output_dir"
                )
        return saved["documents"]
    there = [zip_path for zip_path in zips if zip_path not in missing]
    counted = dict(
        zip(there, tqdm(run(count_documents, there), total=len(there), desc="counting", unit="zip"), strict=True)
    )
    documents = [counted.get(zip_path, 0) for zip_path in zips]
    with replacing(path) as file:
        file.write(json.dumps({**settings, "documents": documents}).encode())
    return documents


def _difference(old: Any, new: Any) -> str:
    if not isinstance(old, dict):
        return f"{old}, now {new}"
    changed = [key for key in {**old, **new} if old.get(key, "absent") != new.get(key, "absent")]
    first = changed[0] if changed else "their order"
    return f"{len(changed)} differ, the first is {first}" if changed else f"{first} differs"


def _jobs(
    output_dir: Path, zips: list[str], documents: list[int], image_dir: Path, num_files_per_shard: int
) -> list[Job]:
    jobs: list[Job] = []
    room = 0  # in the last shard
    for index, (path, count) in enumerate(zip(zips, documents, strict=True)):
        start = 0
        while start < count:
            if room == 0:
                jobs.append(Job(str(output_dir / f"{len(jobs):09d}.tar"), []))
                room = num_files_per_shard
            end = min(count, start + room)
            jobs[-1].pieces.append(Piece(index, path, str(image_dir / str(index)), start, end))
            room -= end - start
            start = end
    return jobs


def _read_finished(output_dir: Path, names: set[str]) -> dict[str, Report]:
    """Reports of the shards that are listed and there."""
    finished = {}
    path = output_dir / FINISHED
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    whole = [line for line in lines if line.endswith("\n")]
    if len(whole) < len(lines):  # killed while it wrote the line: that shard is written again
        with replacing(path) as file:
            file.write("".join(whole).encode())
    for line in whole:
        entry = json.loads(line)
        if entry["shard"] in names and (output_dir / entry["shard"]).exists():
            finished[entry["shard"]] = Report(entry["shard"], Counter(entry["counts"]))
    return finished


# --------------------------------------------------------------------------------------------------------- in the workers


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


def write_shard(job: Job) -> Report:
    """Writes one shard, whole or not at all."""
    report = Report(Path(job.path).name)
    with replacing(Path(job.path)) as file, tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for piece in job.pieces:
            with _open_documents(piece.zip_path) as lines:
                for line_number, line in enumerate(islice(lines, piece.start, piece.end), piece.start):
                    document = _read_document(line, piece.image_dir, report.counts)
                    if document is None:
                        report.counts["bad_documents"] += 1
                        continue
                    # Neither time nor user: the same input gives the same bytes.
                    info = tarfile.TarInfo(f"{piece.zip_index:06d}_{line_number:06d}.json")
                    data = json.dumps(document).encode()
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
                    report.counts["documents"] += 1
    return report


def _read_document(line: bytes, image_dir: str, counts: Counter[str]) -> dict[str, Any] | None:
    """The document with its images in it; None if it cannot be read."""
    try:
        document = json.loads(line)
        infos = [(info, info["image_name"]) for info in document["image_info"]]
    except (ValueError, KeyError, TypeError):
        return None
    for info, name in infos:
        path = os.path.normpath(str(name))
        if (
            os.path.isabs(path) or path.startswith("..") or "\0" in path
        ):  # a document must not reach other files of ours
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
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file that takes the place of `path` once it is written and flushed; if that fails, `path` is as before."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(beside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


@contextmanager
def _pool(workers: int) -> Iterator[Any]:
    """`map`, in `workers` processes; results in order, as they come."""
    if workers == 1:
        yield map
        return
    with multiprocessing.Pool(workers, initializer=_end_with_parent) as pool:
        yield pool.imap


def _end_with_parent() -> None:
    """Without this, a worker of a killed run would wait for work for ever, after finishing what it had."""

    def wait() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _summarise(output_dir: Path, jobs: list[Job], counts: Counter[str], missing_zips: list[str]) -> None:
    print(f"{counts['documents']:,} documents in {len(jobs):,} shards, {counts['images']:,} images")
    print(f"missing: {counts['missing_images']:,} images, {len(missing_zips):,} zips", end="; ")
    print(f"unreadable: {counts['bad_images']:,} images, {counts['bad_documents']:,} documents")
    for path in missing_zips[:10]:
        print(f"  no such zip: {path}")
    if counts["documents"] and not counts["images"]:
        print(
            "NO IMAGE WAS FOUND: nothing can be learnt from these shards. --image_dir holds one folder a zip: 0, 1, …"
        )
    elif jobs:
        print(f"train on them with --mmc4_shards '{output_dir}/{{{0:09d}..{len(jobs) - 1:09d}}}.tar'")


if __name__ == "__main__":
    main()
