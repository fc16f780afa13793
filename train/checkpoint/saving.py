"""Saving the run while training goes on."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from open_flamingo import Flamingo
from open_flamingo.train.checkpoint import files
from open_flamingo.train.checkpoint.resume import TrainState, resume_state
from open_flamingo.train.checkpoint.sharded import ShardedSaver
from open_flamingo.train.distributed import raise_on_all_ranks
from open_flamingo.train.errors import UserError, user_error
from open_flamingo.train.health import check_finite
from open_flamingo.train.parallel import full_tensor
from open_flamingo.train.schedule import Progress
from open_flamingo.train.watchdog import Watchdog
from open_flamingo.weights import trained_tensors

log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of a run, in the format and with the --save_errors of its flags. Every rank makes the same calls.

    Args:
        ask_to_stop: called at once, on rank 0, when a checkpoint could not be written and --save_errors is stop.
        upload: called with each file that is on disk.

    Attributes:
        problem: why the last checkpoint could not be written, None if it was.
    """

    def __init__(
        self,
        state: TrainState,
        watchdog: Watchdog,
        ask_to_stop: Callable[[], None],
        upload: Callable[[Path], None] | None,
    ) -> None:
        self.problem: str | None = None
        self._state = state
        self._watchdog = watchdog
        self._is_sharded = state.args.checkpoint_format == "sharded"
        self._stops = state.args.save_errors == "stop"
        failed = ask_to_stop if self._stops else None  # otherwise it would know only at the next save
        only_newest = state.args.delete_previous_checkpoint
        self._saver: ShardedSaver | FileSaver
        if self._is_sharded:
            self._saver = ShardedSaver(only_newest, failed)
        else:
            self._saver = FileSaver(only_newest, failed, upload)

    def save(self, progress: Progress) -> None:
        """Starts to write; returns once the tensors are copied to host memory."""
        state, trainer = self._state, self._state.trainer
        path = files.checkpoint_path(Path(state.args.run_name), progress, self._is_sharded)
        self._watchdog.set_phase(f"update {progress.step}, saving {path}", limited=False)
        with user_error("nothing is saved, and training ends"), raise_on_all_ranks():
            check_finite(state.model, trainer.optimizer)
        self.finish()  # the one before
        for group in trainer.optimizer.param_groups:
            group["lr"] = state.plan.rate_after(progress)  # of the next update, as the reference saves it
        contents = resume_state(state, progress)
        self._write(partial(self._saver.save, state.model, trainer.optimizer, contents, path))

    def finish(self) -> None:
        """Waits for what is still being written."""
        self._write(self._saver.finish)

    def close(self) -> None:
        """When the run ends with an error: waits for what this process can finish by itself."""
        self._saver.close()

    def _write(self, function: Callable[[], None]) -> None:
        """Calls `function` on every rank; where it fails on any, ends the run or only warns, as --save_errors says."""
        try:
            with raise_on_all_ranks():
                function()
            self.problem = None
        except (ValueError, OSError) as error:
            self.problem = f"a checkpoint could not be written: {error}. The ones before it are whole"
            if self._stops:
                raise UserError(
                    f"{self.problem}. Start again when there is room (--save_errors warn trains on)"
                ) from error
            log.warning("%s; training goes on (--save_errors warn)", self.problem)


CopyFn = Callable[[str, Tensor], Tensor]  # name and tensor → what a checkpoint holds of it


class FileSaver:
    """Writes checkpoints of one file in the background, one at a time. Every rank makes one, and makes the same calls.

    Training stands still while rank 0 copies the tensors into memory of the host, which it keeps for the next checkpoint: on a
    GPU, page-locked memory.

    Args:
        failed: called at once, on rank 0, when a checkpoint could not be written; `finish` says why.
        saved: called with each checkpoint that is on disk.
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
        copy_fn = None if state is None else self._copy
        tensors = {
            "model_state_dict": _gather_weights(model, copy_fn),
            "optimizer_state_dict": _gather_optimizer(optimizer, copy_fn),
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
            files.save(checkpoint, path)
            files.prune(path.parent, path, self._only_newest)
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
        try:
            self.finish()
        except Exception as error:
            log.error("a checkpoint could not be written: %s", error)


def _host_memory(tensor: Tensor) -> Tensor:
    """Uninitialized memory for a copy of `tensor`, page-locked where that speeds the copy up."""
    try:
        return torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
    except RuntimeError:  # the machine has a limit of page-locked memory
        return torch.empty_like(tensor, device="cpu")


def _gather_weights(model: Flamingo, copy_fn: CopyFn | None) -> dict[str, Tensor]:
    """What a checkpoint keeps of the model; nothing without `copy_fn`. Every rank must call this."""
    weights: dict[str, Tensor] = {}
    last = copy = None
    for name, tensor in trained_tensors(model, full_tensor):
        if copy_fn is not None:
            if tensor is not last:  # a tied matrix comes twice, and is stored once
                copy = copy_fn(f"model/{name}", tensor)
            assert copy is not None
            weights[name] = copy
            last = tensor  # no more: of a sharded model each is whole on the device
    return weights


def _gather_optimizer(optimizer: torch.optim.Optimizer, copy_fn: CopyFn | None) -> dict[str, Any]:
    """The optimizer's state with whole moments; empty moments without `copy_fn`. Sharded moments are gathered one at a time,
    so every rank must call this."""
    state = optimizer.state_dict()
    moments: dict[int, dict[str, Any]] = {}
    for index, of in state["state"].items():
        moments[index] = {}
        for key, value in of.items():
            gathered = full_tensor(value)
            if copy_fn is not None:
                moments[index][key] = copy_fn(f"optimizer/{index}/{key}", gathered)
    return {"state": moments, "param_groups": state["param_groups"]}
