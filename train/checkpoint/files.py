"""Checkpoints on disk: names, atomic writing, checksums, reading, deleting."""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
import re
import shutil
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from open_flamingo.train.atomic import atomic_write
from open_flamingo.train.checkpoint import SHARDED_STATE
from open_flamingo.train.schedule import Progress

log = logging.getLogger(__name__)

_EPOCH_END = re.compile(r"checkpoint_(\d+)(\.pt)?")
_WITHIN_EPOCH = re.compile(r"epoch_(\d+)_step_(\d+)(\.pt)?")
KEEP_WITHIN_EPOCH = 2
SUMS = "SHA256SUMS"  # of a sharded checkpoint's folder, the checksums of all other files


def checkpoint_path(folder: Path, progress: Progress, sharded: bool = False) -> Path:
    name = f"epoch_{progress.epoch}_step_{progress.step}" if progress.samples else f"checkpoint_{progress.epoch - 1}"
    return folder / f"{name}{'' if sharded else '.pt'}"


def save(checkpoint: dict[str, Any], path: Path) -> None:
    """Writes `checkpoint` so that `path` is at every moment either the old file, absent, or the new one whole.

    Raises OSError where there is no room, or no way to write.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        try:
            torch.save(checkpoint, file)  # a zip archive, with a checksum of each tensor: see `verify`
            file.flush()
        except RuntimeError as error:  # torch's own way to say that a write failed
            reason = error.__context__ if isinstance(error.__context__, OSError) else str(error).splitlines()[0]
            raise OSError(f"{path}: {reason}") from error


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_part_of_sums(folder: Path, names: Iterable[str], rank: int) -> None:
    """Writes the checksums of the files that `rank` has written to a sharded checkpoint, for `write_sums`."""
    (folder / f"{SUMS}.{rank}").write_text(_sums(folder / name for name in names))


def write_sums(folder: Path) -> None:
    """Writes the checksums of the files of a sharded checkpoint, as `sha256sum --check` reads them: those of its parts, which go,
    and of what is in none of them."""
    parts = sorted(folder.glob(f"{SUMS}.*"))
    lines = [line for part in parts for line in part.read_text().splitlines(keepends=True)]
    known = {line.rstrip("\n").split("  ", 1)[1] for line in lines}
    rest = [path for path in folder.iterdir() if path.name not in known and not path.name.startswith(SUMS)]
    (folder / SUMS).write_text("".join(lines) + _sums(sorted(rest)))
    for part in parts:
        part.unlink()


def _sums(paths: Iterable[Path]) -> str:
    return "".join(f"{sha256(path)}  {path.name}\n" for path in paths)


def verify(path: Path) -> None:
    """Compares what lies on disk with the checksums that were stored when it was written.

    A file's are those of a zip archive, of which `torch.save` makes an entry of each tensor. Files of before torch 1.6 have
    none.

    Raises ValueError, naming the file, where a byte has changed or is missing.
    """
    damaged = f"{path} is damaged"
    try:
        if path.is_dir():
            for line in (path / SUMS).read_text().splitlines():
                expected, name = line.split("  ", 1)
                if sha256(path / name) != expected:
                    raise ValueError(f"{damaged}: {name} is not what was written")
        elif zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if (wrong := archive.testzip()) is not None:
                    raise ValueError(f"{damaged}: {wrong} in it is not what was written")
    except ValueError:
        raise
    except Exception as error:  # a damaged archive makes zipfile raise almost anything
        raise ValueError(f"{damaged}: {error or type(error).__name__}") from error


def load(path: Path) -> dict[str, Any]:
    """The checkpoint at `path`. Bare weights become `{"model_state_dict": weights}`; a sharded one comes without its
    tensors.

    Its tensors lie in the file until they are read, so that not every rank of a machine holds them in memory: copy
    what is to stay.

    Raises ValueError, naming the file, if it cannot be read; nothing in it is executed.
    """
    if path.is_dir():
        return load(path / SHARDED_STATE)
    try:
        # Files of before torch 1.6 are not zip archives, and can only be read whole.
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # broken bytes make torch raise almost anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} cannot be read as a checkpoint: {reason}") from error
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path} is not a checkpoint: it holds a {type(checkpoint).__name__}, not a dict")
    if "model_state_dict" not in checkpoint and path.name != SHARDED_STATE:
        if not checkpoint or not all(isinstance(value, torch.Tensor) for value in checkpoint.values()):
            raise ValueError(f"{path} is not a checkpoint: it has neither model_state_dict nor bare weights")
        checkpoint = {"model_state_dict": checkpoint}
    return checkpoint


def newest_first(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, the furthest trained first."""
    found: list[tuple[tuple[int, int], Path]] = []
    for path in folder.glob("*"):
        if match := _EPOCH_END.fullmatch(path.name):
            found.append(((int(match[1]) + 1, 0), path))
        elif match := _WITHIN_EPOCH.fullmatch(path.name):
            found.append(((int(match[1]), int(match[2])), path))
    return [path for _, path in sorted(found, reverse=True)]


def newest_readable(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint of `folder` that can be read, with its path; what cannot be read is named and skipped."""
    for path in newest_first(folder):
        try:
            verify(path)
            return path, load(path)
        except ValueError as error:
            log.warning("%s; going back to the one before it", error)
    return None


def fingerprint(path: Path) -> str:
    """Tells the checkpoint at `path` from all others, under whatever name it lies: made of the checksums of its parts."""
    if path.is_dir():
        path = path / SUMS
    elif zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            entries = [(entry.filename, entry.CRC, entry.file_size) for entry in archive.infolist()]
        return hashlib.sha256(repr(entries).encode()).hexdigest()
    return sha256(path)


def set_aside(folder: Path, start: Path | None) -> None:
    """Moves the checkpoints of `folder` that are further than `start`, one of them, to a folder of their own; all of them where
    `start` is not one of them: the run that begins is another one, and its checkpoints would be mistaken for older ones."""
    found = newest_first(folder)
    own = start is not None and start.parent.resolve() == folder.resolve()
    names = [path.name for path in found]
    later = found[: names.index(start.name)] if own and start is not None and start.name in names else found
    if not later:
        return
    place = next(place for n in itertools.count(1) if not (place := folder / f"set_aside_{n}").exists())
    place.mkdir()
    for path in later:
        os.replace(path, place / path.name)
    metrics = folder / "metrics.jsonl"
    if metrics.exists():
        shutil.copy(metrics, place)
    log.warning(
        "starting from %s: the %d checkpoints of %s that do not lead to it are now in %s",
        start,
        len(later),
        folder,
        place,
    )


def prune(folder: Path, newest: Path, only_newest: bool) -> None:
    """Deletes what `newest`, now safe on disk, makes superfluous: all others if `only_newest`, else the within-epoch
    ones but for the newest two. Half-written files of a killed run go too."""
    older = newest_first(folder)
    if not only_newest:
        older = [path for path in older if _WITHIN_EPOCH.fullmatch(path.name)][KEEP_WITHIN_EPOCH:]
    for path in older:
        if path != newest:
            _delete(path)
    for path in [*folder.glob(".*.pt.*"), *folder.glob(".*.saving")]:
        _delete(path)


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
