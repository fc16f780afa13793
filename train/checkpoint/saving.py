"""Saving the run while training goes on."""

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from open_flamingo import Flamingo
from open_flamingo.language_model import heads_are_tied
from open_flamingo.train.checkpoint import files
from open_flamingo.train.checkpoint.resume import TrainState, resume_state
from open_flamingo.train.checkpoint.sharded import host_copies, start_sharded
from open_flamingo.train.distributed import raise_on_all_ranks
from open_flamingo.train.errors import UserError, user_error
from open_flamingo.train.health import check_finite
from open_flamingo.train.parallel import full_tensor
from open_flamingo.train.schedule import Progress
from open_flamingo.train.watchdog import Watchdog
from open_flamingo.weights import embedding_name, head_name, trained_tensors

log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of a run, in the format and with the --save_errors of its flags. Every rank makes the same calls.

    Args:
        ask_to_stop: called at once, on rank 0, when a checkpoint could not be written and --save_errors is stop.
        upload: called with each one that is on disk, on rank 0.
    """

    def __init__(
        self, state: TrainState, watchdog: Watchdog, ask_to_stop: Callable[[], None], upload: Callable[[Path], None]
    ) -> None:
        self.problem: str | None = None  # why the last one could not be written
        self._state = state
        self._watchdog = watchdog
        self._ask_to_stop = ask_to_stop
        self._upload = upload
        self._stops = state.args.save_errors == "stop"
        self._is_sharded = state.args.checkpoint_format == "sharded"
        self._start: Callable[..., Callable[[], None]]
        if self._is_sharded:  # with a process group of its own: the training goes on using the other
            self._start = partial(start_sharded, dist.new_group(backend="gloo"), host_copies(state.world.device))
        else:
            trained = sum(p.numel() * p.element_size() for p in state.model.parameters() if p.requires_grad)
            nbytes = 3 * trained if state.world.is_main else 0  # weights and two moments
            self._start = partial(start_file, HostCopies(nbytes, state.world.device))
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._written: Future[None] | None = None

    def save(self, progress: Progress) -> None:
        """Starts to write; returns once the tensors are copied to host memory."""
        state, optimizer = self._state, self._state.trainer.optimizer
        path = files.checkpoint_path(Path(state.args.run_name), progress, self._is_sharded)
        self._watchdog.set_phase(f"update {progress.step}, saving {path}", limited=False)
        with user_error("nothing is saved, and training ends"), raise_on_all_ranks():
            check_finite(state.model, optimizer)
        self.finish()  # the one before
        self.problem = None
        for group in optimizer.param_groups:
            group["lr"] = state.plan.rate_after(progress)  # of the next update, as the reference saves it
        contents = resume_state(state, progress)
        with self._save_errors():
            write = self._start(state.model, optimizer, contents, path)
            self._written = self._thread.submit(self._write, write, path)

    def _write(self, write: Callable[[], None], path: Path) -> None:
        try:
            write()
            if self._state.world.is_main:
                files.prune(path.parent, path, self._state.args.delete_previous_checkpoint)
        except BaseException:
            if self._stops and self._state.world.is_main:
                self._ask_to_stop()  # otherwise the run would know only at the next save
            raise
        if self._state.world.is_main:
            log.info("saved %s", path)
            self._upload(path)

    def finish(self) -> None:
        """Waits for what is still being written."""
        with self._save_errors():
            written, self._written = self._written, None
            if written is not None:
                written.result()

    def close(self) -> None:
        """When the run ends with an error: waits for what this process can finish by itself."""
        if self._written is not None and not self._is_sharded and (error := self._written.exception()):
            log.error("a checkpoint could not be written: %s", error)

    @contextmanager
    def _save_errors(self) -> Iterator[None]:
        """Where what is within fails on any rank, ends the run or only warns, as --save_errors says."""
        try:
            with raise_on_all_ranks():
                yield
        except (ValueError, OSError) as error:
            self.problem = f"a checkpoint could not be written: {error}. The ones before it are whole"
            if self._stops:
                raise UserError(
                    f"{self.problem}. Start again when there is room (--save_errors warn trains on)"
                ) from error
            log.warning("%s; training goes on (--save_errors warn)", self.problem)


class HostCopies:
    """Copies of tensors in host memory, by name: each checkpoint's in the place of the last one's.

    For a GPU's tensors the memory is page-locked, or copying would take ten times as long. To lock it takes seconds too (8.3 s for the
    11.7 GB of a 3B model on an H200), so a thread begins with it at once, `nbytes` in large pieces.
    """

    PIECE = 2**28  # torch rounds page-locked memory up to a power of two

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self._pin = device.type == "cuda"
        self._copies: dict[str, Tensor] = {}
        self._thread = ThreadPoolExecutor(1, initializer=lambda: torch.cuda.set_device(device) if self._pin else None)
        sizes = [min(self.PIECE, nbytes - begin) for begin in range(0, nbytes, self.PIECE)]
        self._pieces = [self._thread.submit(self._allocate, size) for size in sizes]
        self._left = self._allocate(0)

    def copy(self, name: str, tensor: Tensor) -> Tensor:
        """A copy on the host, which is there once the GPU is synchronized."""
        if name not in self._copies:
            self._copies[name] = self._empty_like(tensor)
        return self._copies[name].copy_(tensor, non_blocking=True)

    def _empty_like(self, tensor: Tensor) -> Tensor:
        size = -(-tensor.nbytes // 64) * 64  # aligned for any type of number
        if size > len(self._left):
            piece = self._pieces.pop(0).result() if self._pieces else self._allocate(0)
            self._left = piece if size <= len(piece) else self._allocate(max(size, self.PIECE if self._pin else 0))
        memory, self._left = self._left[:size], self._left[size:]
        # With a storage of its own: torch.save would store all of the piece that a view lies in.
        return torch.frombuffer(memory.numpy(), dtype=tensor.dtype, count=tensor.numel()).view(tensor.shape)

    def _allocate(self, size: int) -> Tensor:
        """uint8 [size]"""
        try:
            return torch.empty(size, dtype=torch.uint8, pin_memory=self._pin)
        except RuntimeError:  # the machine has a limit of page-locked memory
            return torch.empty(size, dtype=torch.uint8)


def start_file(
    copies: HostCopies, model: Flamingo, optimizer: Optimizer, state: dict[str, Any] | None, path: Path
) -> Callable[[], None]:
    """Copies the tensors of a checkpoint of one file to host memory; training stands still until then. Every rank calls this.

    Args:
        copies: that memory, as the checkpoint before has left it.
        state: what is not a tensor, on rank 0; None on others.

    Returns what writes the file, in the background, and raises OSError where it cannot.
    """

    def copy(name: str, tensor: Tensor) -> Tensor | None:
        # Sharded tensors are gathered one at a time: other ranks than 0 take part, and keep nothing.
        return None if state is None else copies.copy(name, tensor)

    tied = head_name(model) if heads_are_tied(model.lang_encoder) else None
    tensors = trained_tensors(model, full_tensor)
    weights = {name: copy(f"model/{name}", tensor) for name, tensor in tensors if name != tied}
    if tied is not None:
        weights[tied] = weights[embedding_name(model)]  # stored once
    optimizer_state = optimizer.state_dict()
    for index, moments in optimizer_state["state"].items():
        copied = {key: copy(f"optimizer/{index}/{key}", full_tensor(value)) for key, value in moments.items()}
        optimizer_state["state"][index] = copied
    if state is None:
        return lambda: None
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # until the copies are there
    return partial(files.save, state | {"model_state_dict": weights, "optimizer_state_dict": optimizer_state}, path)
