"""Whether the run is well: numbers that are not finite, signals, ranks that have died or hang.

    Signals     SIGTERM, SIGINT and SIGUSR1 ask for a stop after the update
    Health      what all ranks agree on before each backward pass: is the loss finite everywhere, was a stop asked for
    Watchdog    ends a process that waits too long, and names the rank that it waits for

What an agreement costs: one number read from the device for each forward pass, once it has ended. Without it, no rank
could know that another must leave this batch out before they average the gradients.
"""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from open_flamingo.train.data.loader import Batch
from open_flamingo.train.distributed import TORCHRUN, World, gather_objects

log = logging.getLogger(__name__)

EXIT_STOPPED = 75
"""The exit code of a run that saved because a signal asked for it, and is to be started again (EX_TEMPFAIL)."""
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
BAD_BATCHES = "bad_batches.jsonl"


class Signals:
    """Within this `with`, the first signal is only noted; a second SIGINT ends the program at once.

    Attributes:
        received: the name of the first one, None before it.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._when = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():  # else Python allows no handlers
            self._before = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def ask_to_stop(self) -> None:
        """As a SIGTERM does."""
        self.received = self.received or signal.SIGTERM.name

    def _note(self, number: int, frame: FrameType | None) -> None:
        # Ctrl-C under torchrun comes twice at once: from the terminal, and from torchrun.
        if number == signal.SIGINT and self.received is not None and time.monotonic() - self._when > 1:
            # To the terminal itself: the log may be what is blocked.
            os.write(2, b"\nstopped at once, without saving\n")
            os._exit(128 + number)
        if self.received is None:
            self.received, self._when = signal.Signals(number).name, time.monotonic()


class _Unseen(NamedTuple):
    """An update whose gradient norm has not been looked at."""

    norm: torch.Tensor
    keys: list[str]
    update: int


class Agreement(NamedTuple):
    """Of the forward passes of all ranks on one batch each."""

    loss: float  # the mean over the labeled tokens of all ranks together
    weight: float  # of this rank's own mean, so that the average over the ranks is `loss`: 1 on average, and on a single rank


class Health:
    """What the ranks agree on, so that all of them do the same.

    Args:
        world: None: this process alone.
        folder: of the run, where rank 0 records what was bad.
        signals, watchdog: of this process, if it has them.

    Attributes:
        bad_in_a_row: updates up to the last one of which a part, or all, was left out.
        bad_batches: by dataset, batches of all ranks together that were left out for a loss that is not finite.
        stop: the signal that asked any rank to stop.
    """

    def __init__(
        self,
        world: World | None = None,
        folder: Path | None = None,
        signals: Signals | None = None,
        watchdog: Watchdog | None = None,
    ) -> None:
        self._world = world or World(0, 1, 0, torch.device("cpu"), "one process")
        self._folder = folder
        self._signals = signals
        self._watchdog = watchdog
        self._update = 0
        self._keys: list[str] = []  # of this rank's samples of this update
        self._part_left_out = False
        self._unseen: _Unseen | None = None
        self.bad_in_a_row = 0
        self.bad_batches: Counter[str] = Counter()
        self.stop: str | None = None

    def begin(self, update: int) -> None:
        """Update number `update` begins."""
        self._update = update
        self._part_left_out = False
        self._keys = []

    def at(self, where: str) -> None:
        """For the watchdog: the training has come to `where`. All ranks call this in the same places."""
        if self._watchdog is not None:
            self._watchdog.set_phase(f"update {self._update}, {where}")

    def before_forward(self, kind: str, batch: Batch) -> None:
        self._keys += batch.keys
        self.at(f"{kind} batch of {_shards(batch)}")

    def agree(self, kind: str, batch: Batch, loss: torch.Tensor) -> Agreement | None:
        """What this forward pass counts for; None if its loss, float32 [], is not finite on some rank. All ranks must call this.

        Waits for the forward pass, on all ranks; and takes the occasion to agree on all else.
        """
        self.at(f"waiting for the other ranks after a {kind} batch of {_shards(batch)}")
        loss = loss.detach().double()  # which counts tokens exactly
        labels = batch.num_labels
        received = None if self._signals is None else self._signals.received
        stops = [float(received == number.name) for number in STOP_SIGNALS]
        bad_norm = False if self._unseen is None else ~self._unseen.norm.isfinite()
        sums = torch.cat(
            [loss.new_tensor([labels, *stops]), torch.stack([loss * labels, bad_norm + loss.new_zeros(())])]
        )
        if dist.is_initialized():
            dist.all_reduce(sums)
        total_labels, *stops, total_loss, bad_norms = sums.tolist()
        self._see(bad_norms > 0)
        self.stop = next((number.name for number, count in zip(STOP_SIGNALS, stops, strict=True) if count), self.stop)
        if not math.isfinite(total_loss):
            self._part_left_out = True
            self.bad_batches[kind] += 1
            self._record(f"{kind} loss", None if bool(loss.isfinite()) else batch.keys, self._update)
            return None
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        return Agreement(total_loss / max(1.0, total_labels), labels * ranks / max(1.0, total_labels))

    def end(self, norm: torch.Tensor | None, overflow_is_normal: bool = False) -> None:
        """The update is done: its gradient norm, on the device; None if all its parts were left out.

        The norm is not waited for: it is looked at in the next agreement, or when `settle` is called.

        Args:
            overflow_is_normal: fp16 finds its scale by overflowing; only a long row of that is bad.
        """
        if self._part_left_out:
            self.bad_in_a_row += 1
        elif norm is not None:
            self._unseen = _Unseen(norm.detach(), [] if overflow_is_normal else self._keys, self._update)

    def settle(self) -> None:
        """Looks at the norm of the last update, waiting for it. It is the same on all ranks."""
        if self._unseen is not None:
            self._see(not bool(self._unseen.norm.isfinite()))

    def _see(self, bad: bool) -> None:
        unseen, self._unseen = self._unseen, None
        if unseen is None:
            return
        self.bad_in_a_row = self.bad_in_a_row + 1 if bad else 0
        if bad and unseen.keys:
            self._record("gradient norm", unseen.keys, unseen.update)

    def _record(self, what: str, keys: list[str] | None, update: int) -> None:
        """One line in the run's folder and one in the log. `keys`: this rank's samples, None if they are not suspect."""
        samples = {rank: of for rank, of in enumerate(gather_objects(keys)) if of is not None}
        if not self._world.is_main:
            return
        count = sum(map(len, samples.values()))
        log.warning(
            "update %d: the %s is not finite on rank %s: left out on all ranks. Its %d samples are in %s",
            *(update, what, ", ".join(map(str, samples)), count, BAD_BATCHES),
        )
        if self._folder is None:
            return
        shards = {
            rank: [dict(zip(("shard", "key"), key.rsplit("#", 1), strict=True)) for key in of]
            for rank, of in samples.items()
        }
        try:
            with open(self._folder / BAD_BATCHES, "a", encoding="utf-8") as file:
                file.write(json.dumps({"update": update, "not_finite": what, "samples_by_rank": shards}) + "\n")
        except OSError as error:
            log.warning("%s cannot be written: %s", self._folder / BAD_BATCHES, error)


@torch.no_grad()
def check_finite(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Raises ValueError, naming the first, if a trained weight or a moment of this rank is not finite."""
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
            f"{len(wrong)} tensors of the model or its optimiser hold numbers that are not finite, the first {wrong[0]}. The "
            "checkpoints before are whole: start again from them; if it comes back, suspect this machine's memory"
        )


NAMED_SHARDS = 3


def _shards(batch: Batch) -> str:
    shards = list(dict.fromkeys(key.rsplit("#", 1)[0] for key in batch.keys))
    rest = len(shards) - NAMED_SHARDS
    return ", ".join(shards[:NAMED_SHARDS]) + (f" and {rest} more" if rest > 0 else "")


class _Report(NamedTuple):
    """What a rank lets the others know of itself."""

    beat: int  # grows while the process lives
    progress: int  # phases begun, the same on all ranks that are equally far
    phase: str
    host: str
    pid: int


class Watchdog:
    """Ends this process when it has been in one phase for longer than that phase may take, and says which rank is behind.

    One thread sends heartbeats to the store in which the ranks have met, and reads there who is behind when that is asked for;
    another watches the time, as the store may not answer. Neither disturbs the training. The second also sees when the
    torchrun above has died, and then asks for a stop, as a SIGTERM does.

    Args:
        timeout: of a phase of the training, in seconds.
        startup_timeout: of a phase before the first update is done.
    """

    def __init__(self, world: World, timeout: float, startup_timeout: float) -> None:
        self._world = world
        self._timeout = timeout
        self._limit: float | None = startup_timeout
        self._default_limit = startup_timeout
        self._interval = min(1.0, timeout / 10)
        self._progress, self._phase, self._since = 0, "the start", time.monotonic()
        self._rank_0: _Report | None = None  # the last that was heard of the rank that keeps the store
        self._store = world.store.clone() if world.store is not None and world.world_size > 1 else None
        self._over, self._asked, self._answered = threading.Event(), threading.Event(), threading.Event()
        self._verdict: str | None = None
        self._heard = time.monotonic()  # from the store
        self._parent = os.getppid()
        self.before_exit: Callable[[], None] = lambda: None  # called where the process is about to end with an error

    def __enter__(self) -> Watchdog:
        for loop in (self._heartbeat, self._watch) if self._store is not None else (self._watch,):
            threading.Thread(target=loop, name=f"watchdog {loop.__name__}", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()

    def set_phase(self, phase: str, limited: bool = True) -> None:
        """The run has come to `phase`. All ranks call this in the same places.

        Args:
            limited: False for what may rightly take any time, such as writing a checkpoint: a line is logged each minute.
        """
        self._progress, self._phase, self._since = self._progress + 1, phase, time.monotonic()
        self._limit = self._default_limit if limited else None

    def startup_is_over(self) -> None:
        self._default_limit = self._timeout

    def _watch(self) -> None:
        minutes = 0
        while not self._over.wait(self._interval):
            if self._world.launcher == TORCHRUN and os.getppid() != self._parent:
                log.error("torchrun (pid %d) has died: stopping", self._parent)
                os.kill(os.getpid(), signal.SIGTERM)
                self._parent = os.getppid()
            elapsed, limit = time.monotonic() - self._since, self._limit
            if limit is None and int(elapsed / 60) > minutes:
                log.info("%s: %d s so far", self._phase, elapsed)
            minutes = int(elapsed / 60)
            if limit is not None and elapsed > limit and self._world.world_size > 1:
                flag = "--startup_timeout" if limit != self._timeout else "--dist_timeout"
                where = f"rank {self._world.rank} has been at {self._phase} for {elapsed:.0f} s ({flag})"
                log.error("%s. %s", where, self.diagnose() or "No rank is known to be behind.")
                self.before_exit()
                os._exit(1)

    def _heartbeat(self) -> None:
        assert self._store is not None
        beat, asks = 0, False
        try:
            while not self._over.wait(self._interval if beat else 0):
                beat += 1
                report = _Report(beat, self._progress, self._phase, socket.gethostname(), os.getpid())
                self._store.set(_key(self._world.rank), json.dumps(report))
                self._rank_0 = _Report(*json.loads(self._store.get(_key(0))))
                self._heard = time.monotonic()
                if not self._asked.is_set() or self._answered.is_set():
                    continue
                if not asks:  # one rank does, and tells the others
                    asks = True
                    if self._store.add("health/asked", 1) == 1:
                        self._store.set("health/verdict", self._compare())
                if self._store.check(["health/verdict"]):
                    self._verdict = self._store.get("health/verdict").decode()
                    self._answered.set()
        except RuntimeError:  # the store has gone with its rank
            self._verdict = _last_heard(0, "has died or hangs", self._rank_0)
            self._answered.set()

    def diagnose(self) -> str | None:
        """Which rank the others wait for, in words; None if there is none. Takes some seconds."""
        self._limit = None  # the process ends with what is found here
        if self._store is None:
            return None
        self._asked.set()
        if self._answered.wait(10 + 6 * self._interval):
            time.sleep(2 * self._interval)  # this process may keep the store, and the others have not read it yet
            return self._verdict or None
        if time.monotonic() - self._heard < 5 + 2 * self._interval:
            return None  # the rank that compares is gone; what it found is in its log
        return f"{_last_heard(0, 'has died or hangs', self._rank_0)} (The store that it keeps does not answer.)"

    def _compare(self) -> str:
        """What the reports of all ranks say, read twice; empty if none is behind."""
        before = self._read()
        time.sleep(3 * self._interval)
        now = self._read()
        others = [rank for rank in range(self._world.world_size) if rank != self._world.rank]
        if silent := [rank for rank in others if rank not in now or now[rank] == before.get(rank)]:
            return " ".join(_last_heard(rank, "has died or hangs", now.get(rank)) for rank in silent)
        least = min(report.progress for report in now.values())
        behind = [rank for rank, report in now.items() if report.progress == least]
        return " ".join(_last_heard(rank, "is behind", now[rank]) for rank in behind if len(behind) < len(now))

    def _read(self) -> dict[int, _Report]:
        assert self._store is not None
        ranks = [rank for rank in range(self._world.world_size) if self._store.check([_key(rank)])]
        return {rank: _Report(*json.loads(self._store.get(_key(rank)))) for rank in ranks}


def _key(rank: int) -> str:
    return f"health/{rank}"


def _last_heard(rank: int, what: str, report: _Report | None) -> str:
    if report is None:
        return f"Rank {rank} {what}: it never reported."
    return f"Rank {rank} ({report.host}, pid {report.pid}) {what}: last heard of at {report.phase}."


def is_of_communication(error: BaseException) -> bool:
    """Whether a collective failed, as it does when another rank has died."""
    text = str(error).lower()
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and ("gloo" in text or "nccl" in text))
