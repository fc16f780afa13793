"""Checkpoints: written whole or not at all, found again, and refused when they belong to another run.

    {run_name}/checkpoint_{epoch}.pt              at each epoch's end (epochs count from 0), as the reference
    {run_name}/epoch_{epoch}_step_{update}.pt     every --save_steps updates within an epoch, the newest two

`FileSaver` writes them while training goes on. With --checkpoint_format sharded, folders of the same names without `.pt`: see sharded.py.

A checkpoint is a dict. The reference's keys: `epoch` (the last finished one, -1 if none), `model_state_dict` (trained
parameters under the reference's names), `optimizer_state_dict`, `lr_scheduler_state_dict`. Ours: `step` (updates done),
`data` (a loader state for each dataset), `loss_scaler_state_dict` (fp16), `random_states` (one a rank),
`optimizer_parameter_names`, `flags`, `versions`.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
import re
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from open_flamingo import Flamingo
from open_flamingo.train.arguments import SHARDED_STATE
from open_flamingo.weights import trained_tensors, whole

log = logging.getLogger(__name__)

_EPOCH_END = re.compile(r"checkpoint_(\d+)(\.pt)?")
_WITHIN_EPOCH = re.compile(r"epoch_(\d+)_step_(\d+)(\.pt)?")
KEEP_WITHIN_EPOCH = 2
SUMS = "SHA256SUMS"
"""Of a sharded checkpoint's folder, the file of the checksums of all others."""


def epoch_end_path(folder: Path, epoch: int, sharded: bool = False) -> Path:
    return folder / f"checkpoint_{epoch}{'' if sharded else '.pt'}"


def within_epoch_path(folder: Path, epoch: int, step: int, sharded: bool = False) -> Path:
    return folder / f"epoch_{epoch}_step_{step}{'' if sharded else '.pt'}"


def save(checkpoint: dict[str, Any], path: Path) -> None:
    """Writes `checkpoint` so that `path` is at every moment either the old file, absent, or the new one whole.

    Raises OSError where there is no room, or no way to write.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        try:
            try:
                torch.save(checkpoint, file)  # a zip archive, with a checksum of each tensor: see `verify`
                file.flush()
            except RuntimeError as error:  # torch's own way to say that a write failed
                reason = error.__context__ if isinstance(error.__context__, OSError) else str(error).splitlines()[0]
                raise OSError(f"{path}: {reason}") from error
            os.fsync(file.fileno())
            os.chmod(file.name, 0o666 & ~_umask())  # mkstemp makes it private; a checkpoint is like any other file
            os.replace(file.name, path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise
    _sync_folder(path.parent)


Keep = Callable[[str, Tensor], Tensor]
"""Name and tensor → what a checkpoint holds of it."""


class FileSaver:
    """Writes checkpoints of one file in the background, one at a time. Every rank makes one, and makes the same calls.

    Training stands still while rank 0 copies the tensors into memory of the host, which it keeps for the next checkpoint: on a
    GPU, page-locked memory.

    Args:
        failed: told at once, on rank 0, that a checkpoint could not be written; `finish` says why.
        saved: told of each checkpoint that is on disk.
    """

    def __init__(
        self,
        only_newest: bool,
        failed: Callable[[], None] | None = None,
        saved: Callable[[Path], None] | None = None,
    ) -> None:
        self._only_newest = only_newest
        self._failed = failed
        self._saved = saved
        self._copies: dict[str, Tensor] = {}
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._written: Future[None] | None = None

    def save(self, model: Flamingo, optimizer: torch.optim.Optimizer, state: dict[str, Any] | None, path: Path) -> None:
        """Starts to write; returns once the tensors are copied to host memory. Call `finish` before.

        Args:
            state: what is not a tensor, on rank 0; None on others.
        """
        keep = None if state is None else self._copy
        tensors = {
            "model_state_dict": _gather_weights(model, keep),
            "optimizer_state_dict": _gather_optimizer(optimizer, keep),
        }
        if state is None:
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # until the copies are there
        self._written = self._thread.submit(self._write, state | tensors, path)

    def _copy(self, name: str, tensor: Tensor) -> Tensor:
        copy = self._copies.get(name)
        if copy is None:
            copy = self._copies[name] = _host_memory(tensor)
        return copy.copy_(tensor, non_blocking=True)

    def _write(self, checkpoint: dict[str, Any], path: Path) -> None:
        try:
            save(checkpoint, path)
            prune(path.parent, path, self._only_newest)
        except BaseException:
            if self._failed is not None:
                self._failed()
            raise
        log.info("saved %s", path)
        if self._saved is not None:
            self._saved(path)

    def finish(self) -> None:
        """Waits for the last checkpoint. Raises OSError where it could not be written."""
        written, self._written = self._written, None
        if written is not None:
            written.result()

    def close(self) -> None:
        """Waits for what is still being written when the run ends with an error."""
        try:
            self.finish()
        except Exception as error:
            log.error("a checkpoint could not be written: %s", error)


def _host_memory(tensor: Tensor) -> Tensor:
    """Uninitialised memory for a copy of `tensor`, page-locked where that speeds the copy up."""
    try:
        return torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
    except RuntimeError:  # the machine does not let us have so much
        return torch.empty_like(tensor, device="cpu")


def _gather_weights(model: Flamingo, keep: Keep | None) -> dict[str, Tensor]:
    """What a checkpoint keeps of the model; nothing without `keep`. Every rank must call this."""
    weights: dict[str, Tensor] = {}
    last = copy = None
    for name, tensor in trained_tensors(model):
        if keep is not None:
            if tensor is not last:  # a tied matrix comes twice, and is stored once
                copy = keep(f"model/{name}", tensor)
            assert copy is not None
            weights[name] = copy
            last = tensor  # no more: of a sharded model each is whole on the device
    return weights


def _gather_optimizer(optimizer: torch.optim.Optimizer, keep: Keep | None) -> dict[str, Any]:
    """The optimiser's state with whole moments; empty moments without `keep`. Sharded moments are gathered one at a time, so
    every rank must call this."""
    state = optimizer.state_dict()
    moments: dict[int, dict[str, Any]] = {}
    for index, of in state["state"].items():
        moments[index] = {}
        for key, value in of.items():
            gathered = whole(value)
            if keep is not None:
                moments[index][key] = keep(f"optimizer/{index}/{key}", gathered)
    return {"state": moments, "param_groups": state["param_groups"]}


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    """Makes a rename in `folder` survive a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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


def changed_flags(saved: dict[str, Any], current: dict[str, Any], names: tuple[str, ...]) -> Iterator[str]:
    """One line for each flag of `names` that is not what it was when the checkpoint was made."""
    for name in names:
        if name in saved and saved[name] != current[name]:
            yield f"--{name} was {saved[name]!r} and is now {current[name]!r}"


def random_state() -> dict[str, Any]:
    """This process's torch random states. Samples do not depend on them: their randomness is a function of the seed."""
    return {
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def restore_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
