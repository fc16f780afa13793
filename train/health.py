"""What the ranks agree on: losses and gradients that are not finite, signals that ask for a stop."""

import json
import logging
import math
import os
import signal
import threading
import time
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from open_flamingo.train.data.loader import Batch
from open_flamingo.train.distributed import World, gather_objects
from open_flamingo.train.watchdog import Watchdog

log = logging.getLogger(__name__)

EXIT_STOPPED = 75  # EX_TEMPFAIL: a signal asked for a stop, the run has saved and is to be started again
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
BAD_BATCHES = "bad_batches.jsonl"


class Signals:
    """Within this `with`, the first of `STOP_SIGNALS` is only noted, in `received`; a second SIGINT ends the program at once."""

    def __init__(self) -> None:
        self.received: str | None = None
        self._when = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            self._before = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def ask_to_stop(self) -> None:
        self.received = self.received or signal.SIGTERM.name

    def _note(self, number: int, frame: FrameType | None) -> None:
        # Ctrl-C under torchrun comes twice at once: from the terminal, and from torchrun.
        if number == signal.SIGINT and self.received is not None and time.monotonic() - self._when > 1:
            # To the terminal itself: the log may be what is blocked.
            os.write(2, b"\nstopped at once, without saving\n")
            os._exit(128 + number)
        if self.received is None:
            self.received, self._when = signal.Signals(number).name, time.monotonic()


class Health:
    """What the ranks agree on before each backward pass, so that all of them do the same. It costs one read from the device per forward
    pass: without it, no rank could know that another must leave this batch out before they average the gradients.

    Rank 0 records what was bad in `folder`, the run's. Without arguments: of this process alone.
    """

    def __init__(
        self, folder: Path | None = None, signals: Signals | None = None, watchdog: Watchdog | None = None
    ) -> None:
        self._folder = folder
        self._signals = signals or Signals()
        self._watchdog = watchdog or Watchdog(World(), math.inf, math.inf)
        # The gradient norm of an update, its samples and number: not waited for, but looked at in the next agreement.
        self._pending: tuple[torch.Tensor, list[str], int] | None = None
        self.consecutive_bad_steps = 0  # updates up to the last one of which a part, or all, was left out
        self.bad_batches: Counter[str] = Counter()  # left out for their loss, on all ranks together, by dataset
        self.stop: str | None = None  # the signal that asked any rank to stop
        self.begin(0)

    def begin(self, step: int) -> None:
        """Update number `step` begins."""
        self._keys: list[str] = []  # of this rank's samples
        self._step, self._part_left_out = step, False

    def set_phase(self, phase: str) -> None:
        self._watchdog.set_phase(f"update {self._step}, {phase}")

    def before_forward(self, kind: str, batch: Batch) -> None:
        self._keys += batch.keys
        self.set_phase(f"{kind} batch of {_shards(batch)}")

    def agree(self, kind: str, batch: Batch, loss: torch.Tensor) -> tuple[float, float] | None:
        """The mean loss over the labeled tokens of all ranks, and the weight of this rank's own mean `loss`, float32 [], with which the
        average over the ranks is that; None if it is not finite on some rank. All ranks must call this: it waits for the forward pass of
        each, and takes the occasion to agree on everything else."""
        self.set_phase(f"waiting for the other ranks after a {kind} batch of {_shards(batch)}")
        loss = loss.detach().double()  # which counts tokens exactly
        labels = batch.num_labels
        counts = loss.new_tensor([labels, *(self._signals.received == number.name for number in STOP_SIGNALS)])
        bad_norm = False if self._pending is None else ~self._pending[0].isfinite()
        sums = torch.cat([counts, torch.stack([loss * labels, bad_norm + loss.new_zeros(())])])
        if dist.is_initialized():
            dist.all_reduce(sums)
        total_labels, *stops, total_loss, bad_norms = sums.tolist()
        self._check_pending_norm(bad_norms > 0)
        self.stop = next((number.name for number, count in zip(STOP_SIGNALS, stops, strict=True) if count), self.stop)
        if not math.isfinite(total_loss):
            self._part_left_out = True
            self.bad_batches[kind] += 1
            self._record(f"{kind} loss", None if bool(loss.isfinite()) else batch.keys, self._step)
            return None
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        return total_loss / max(1.0, total_labels), labels * ranks / max(1.0, total_labels)

    def asked_to_stop(self) -> bool:
        """Whether a signal has asked any rank to stop, outside of an update. All ranks must call this."""
        self.stop = next((name for name in gather_objects(self._signals.received) if name is not None), self.stop)
        return self.stop is not None

    def end(self, norm: torch.Tensor | None, overflow_is_normal: bool = False) -> None:
        """The update is done: its gradient norm, on the device; None if all its parts were left out. `overflow_is_normal`: fp16 finds its
        scale by overflowing; only a long row of that is bad."""
        if self._part_left_out:
            self.consecutive_bad_steps += 1
        elif norm is not None:
            self._pending = (norm.detach(), [] if overflow_is_normal else self._keys, self._step)

    def flush(self) -> None:
        """Look at the norm of the last update, waiting for it. It is the same on all ranks."""
        if self._pending is not None:
            self._check_pending_norm(not bool(self._pending[0].isfinite()))

    def _check_pending_norm(self, bad: bool) -> None:
        if self._pending is None:
            return
        (_, keys, step), self._pending = self._pending, None
        self.consecutive_bad_steps = self.consecutive_bad_steps + 1 if bad else 0
        if bad and keys:
            self._record("gradient norm", keys, step)

    def _record(self, what: str, keys: list[str] | None, step: int) -> None:
        """Log and record it. `keys`: this rank's samples, None if they are not suspect."""
        samples = {rank: of for rank, of in enumerate(gather_objects(keys)) if of is not None}
        if dist.is_initialized() and dist.get_rank() != 0:
            return
        log.warning(
            "update %d: the %s is not finite on rank %s: left out on all ranks. Its %d samples are in %s",
            *(step, what, ", ".join(map(str, samples)), sum(map(len, samples.values())), BAD_BATCHES),
        )
        if self._folder is None:
            return
        shards = {rank: [dict(zip(("shard", "key"), key.rsplit("#", 1))) for key in of] for rank, of in samples.items()}
        try:
            with open(self._folder / BAD_BATCHES, "a", encoding="utf-8") as file:
                file.write(json.dumps({"update": step, "not_finite": what, "samples_by_rank": shards}) + "\n")
        except OSError as error:
            log.warning("%s cannot be written: %s", self._folder / BAD_BATCHES, error)


def _shards(batch: Batch, named: int = 3) -> str:
    shards = list(dict.fromkeys(key.rsplit("#", 1)[0] for key in batch.keys))
    return ", ".join(shards[:named]) + (f" and {len(shards) - named} more" if len(shards) > named else "")


@torch.no_grad()
def check_finite(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Raise ValueError, naming the first, if a trained weight or a moment of this rank is not finite."""
    tensors = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            tensors[name] = parameter
            for key, moment in optimizer.state.get(parameter, {}).items():
                tensors[f"{key} of {name}"] = moment
    local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors.values()]
    device = local[0].device
    finite = torch.stack([tensor.isfinite().all().to(device) for tensor in local]).tolist()  # waits for it once
    if wrong := [name for name, is_finite in zip(tensors, finite, strict=True) if not is_finite]:
        raise ValueError(
            f"{len(wrong)} tensors of the model or its optimizer hold numbers that are not finite, the first {wrong[0]}. The "
            "checkpoints before are whole: start again from them; if it comes back, suspect this machine's memory"
        )
