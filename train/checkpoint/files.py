"""Checkpoints on disk: names, atomic writing, checksums, reading, deleting."""

import hashlib
import itertools
import logging
import math
import os
import re
import shutil
import zipfile
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException

from open_flamingo.train.atomic import atomic_write
from open_flamingo.train.checkpoint import SHARDED_STATE
from open_flamingo.train.schedule import Progress

log = logging.getLogger(__name__)

_NAME = re.compile(r"(checkpoint_\d+|epoch_\d+_step_\d+)(\.pt)?")
SUMS = "SHA256SUMS"  # of a sharded checkpoint's folder, the checksums of all other files


def checkpoint_path(folder: Path, progress: Progress, sharded: bool = False) -> Path:
    name = f"epoch_{progress.epoch}_step_{progress.step}" if progress.samples else f"checkpoint_{progress.epoch - 1}"
    return folder / f"{name}{'' if sharded else '.pt'}"


def first_line(error: BaseException) -> str:
    """What went wrong, in one line: of a failure on several ranks, the first one's."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def save(checkpoint: dict[str, Any], path: Path) -> None:
    """Writes `checkpoint` so that `path` is at every moment either the old file, absent, or the new one whole; or raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        try:
            torch.save(checkpoint, file)  # a zip archive, with a checksum of each tensor: see `verify`
        except RuntimeError as error:  # torch's own way to say that a write failed
            reason = error.__context__ if isinstance(error.__context__, OSError) else first_line(error)
            raise OSError(f"{path}: {reason}") from error


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sums(folder: Path, names: Iterable[str]) -> str:
    """The checksums of files of `folder`, as `sha256sum --check` reads them."""
    return "".join(f"{sha256(folder / name)}  {name}\n" for name in names)


def verify(path: Path) -> None:
    """Raises ValueError, naming the file, where what lies on disk is not what was written, by the checksums that were stored with it.
    A file's are those of a zip archive, in which each tensor is an entry; files of before torch 1.6 have none."""
    wrong = None
    try:
        if path.is_dir():
            lines = [line.split("  ", 1) for line in (path / SUMS).read_text().splitlines()]
            wrong = next((name for expected, name in lines if sha256(path / name) != expected), None)
        elif zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                wrong = archive.testzip()
    except Exception as error:  # a damaged archive makes zipfile raise almost anything
        raise ValueError(f"{path} is damaged: {first_line(error)}") from error
    if wrong is not None:
        raise ValueError(f"{path} is damaged: {wrong} in it is not what was written")


def load(path: Path) -> dict[str, Any]:
    """The checkpoint at `path`. Bare weights become `{"model_state_dict": weights}`; a sharded one comes without its tensors.

    Tensors lie in the file until they are read, so that not every rank of a machine holds them in memory: copy what is to stay.
    Raises ValueError, naming the file, if it cannot be read; nothing in it is executed.
    """
    is_sharded = path.is_dir()
    path = path / SHARDED_STATE if is_sharded else path
    try:
        # Files of before torch 1.6 are not zip archives, and can only be read whole.
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # broken bytes make torch raise almost anything
        raise ValueError(f"{path} cannot be read as a checkpoint: {first_line(error)}") from error
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path} is not a checkpoint: it holds a {type(checkpoint).__name__}, not a dict")
    if is_sharded or "model_state_dict" in checkpoint:
        return checkpoint
    if not checkpoint or not all(isinstance(value, torch.Tensor) for value in checkpoint.values()):
        raise ValueError(f"{path} is not a checkpoint: it has neither model_state_dict nor bare weights")
    return {"model_state_dict": checkpoint}


def newest_first(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, the furthest trained first."""
    found = {path: re.findall(r"\d+", path.name) for path in folder.glob("*") if _NAME.fullmatch(path.name)}
    # An epoch's end is after all updates within it.
    return sorted(found, key=lambda path: ([*map(int, found[path]), math.inf], path.name), reverse=True)


def newest_readable(folder: Path, started_from: Collection[str] = ()) -> tuple[Path, dict[str, Any]] | None:
    """The newest whole checkpoint of `folder`, with its path; what cannot be read is named and skipped. With `started_from`, only
    those of a run that began with one of these count."""
    for path in newest_first(folder):
        try:
            if not started_from or load(path).get("started_from") in started_from:
                verify(path)
                return path, load(path)
        except ValueError as error:
            log.warning("%s; going back to the one before it", error)
    return None


def fingerprint(path: Path) -> str:
    """Tells the checkpoint at `path` from all others, under whatever name it lies: made of the checksums of its parts."""
    if not zipfile.is_zipfile(path):
        return sha256(path / SUMS if path.is_dir() else path)
    try:
        with zipfile.ZipFile(path) as archive:
            entries = [(entry.filename, entry.CRC, entry.file_size) for entry in archive.infolist()]
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    return hashlib.sha256(repr(entries).encode()).hexdigest()


def set_aside(folder: Path, start: Path | None) -> None:
    """Moves the checkpoints of `folder` that do not lead to `start` to a folder of their own: those that are further, or all where it
    is not one of them. Those of the run that begins there would be taken for older ones."""
    later = newest_first(folder)
    if start is not None and start.resolve() in (found := [path.resolve() for path in later]):
        later = later[: found.index(start.resolve())]
    if not later:
        return
    place = next(place for n in itertools.count(1) if not (place := folder / f"set_aside_{n}").exists())
    place.mkdir()
    for path in later:
        os.replace(path, place / path.name)
    for name in ("metrics.jsonl", "captions.jsonl"):
        if (folder / name).exists():
            shutil.copy(folder / name, place)
    message = "starting from %s: the %d checkpoints of %s that do not lead to it are now in %s"
    log.warning(message, start, len(later), folder, place)


def prune(folder: Path, newest: Path, only_newest: bool) -> None:
    """Deletes what `newest`, now safe on disk, makes superfluous: all others if `only_newest`, else those within epochs but for the
    newest two. Half-written ones of a killed run go too."""
    older = newest_first(folder)
    if not only_newest:
        older = [path for path in older if path.name.startswith("epoch_")][2:]
    for path in [*older, *folder.glob(".*.pt.*"), *folder.glob(".*.saving")]:
        if path.is_dir() and path != newest:
            shutil.rmtree(path, ignore_errors=True)
        elif path != newest:
            path.unlink(missing_ok=True)
