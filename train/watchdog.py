"""Hung, dead and failed ranks: which one, since when, and where it was last."""

import json
import logging
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple, Self

import torch.distributed as dist

from open_flamingo.train.data.samples import DataError
from open_flamingo.train.distributed import TORCHRUN, World
from open_flamingo.train.errors import UserError

log = logging.getLogger(__name__)


class _Report(NamedTuple):  # of a rank, to the others
    beat: int  # grows while the process lives
    progress: int  # phases begun, the same on all ranks that are equally far
    phase: str
    host: str
    pid: int


class Watchdog:
    """Within this `with`, this process ends after an error, and when it has been in one phase for longer than `timeout` seconds
    (`startup_timeout` before the first update is done); of several ranks, the one to blame is named.

    One thread exchanges heartbeats through the store in which the ranks have met; another watches the time, as the store may not
    answer. The second also sees when the torchrun above has died, and then asks for a stop, as a SIGTERM does.
    """

    def __init__(self, world: World, timeout: float, startup_timeout: float) -> None:
        self._world = world
        self._timeout, self._default_limit = timeout, startup_timeout
        self._interval = min(1.0, timeout / 10)
        self._progress = 0
        self.set_phase("the start")
        self._rank_0: _Report | None = None  # the last from the rank that keeps the store
        self._store: Any = world.store.clone() if world.store is not None and world.world_size > 1 else None
        self._threads: list[threading.Thread] = []
        self._over, self._asked, self._answered = threading.Event(), threading.Event(), threading.Event()
        self._verdict: str | None = None
        self._heard = time.monotonic()  # from the store
        self._parent = os.getppid()
        self.before_exit: Callable[[], None] = lambda: None  # called where the process is about to end with an error

    def __enter__(self) -> Self:
        for loop in (self._heartbeat, self._watch) if self._store is not None else (self._watch,):
            self._threads.append(threading.Thread(target=loop, name=f"watchdog {loop.__name__}", daemon=True))
            self._threads[-1].start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        """After an error, a rank of several says why, or which rank is to blame, and exits at once: NCCL takes a process group down with
        all ranks together, which may be waiting for each other, and nobody would read of the error or see the exit code."""
        if error is not None:
            self.set_phase("ending after an error", limited=False)
            if self._world.world_size > 1:
                # torchrun ends all ranks as soon as the first has ended: let this one finish.
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                # What a collective raises when another rank has died.
                failed = isinstance(error, RuntimeError) and re.search("gloo|nccl", str(error), re.IGNORECASE)
                blamed = self.diagnose() if failed or isinstance(error, dist.DistError) else None
                is_explained = blamed or isinstance(error, (UserError, DataError))
                log.error("%s", blamed or error, exc_info=None if is_explained else error)
            self.before_exit()
            if self._world.world_size > 1:
                sys.stdout.flush()
                os._exit(1)
        self._over.set()
        for thread in self._threads:  # one that still waits for the store when Python ends would abort the process
            thread.join(timeout=10)

    def set_phase(self, phase: str, limited: bool = True) -> None:
        """The run has come to `phase`; all ranks call this in the same places. What is not `limited` (saving) may take any time: a line is
        logged each minute."""
        self._progress, self._phase, self._since = self._progress + 1, phase, time.monotonic()
        self._limit = self._default_limit if limited else None

    def end_startup(self) -> None:
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
                phase = self._phase  # before the diagnosis: while it takes its time, the training may end with an error
                verdict = self.diagnose() or "No rank is known to be behind."
                log.error("rank %d has been at %s for %.0f s (%s). %s", self._world.rank, phase, elapsed, flag, verdict)
                self.before_exit()
                os._exit(1)

    def _heartbeat(self) -> None:
        beat, has_asked = 0, False
        try:
            while not self._over.wait(self._interval if beat else 0):
                beat += 1
                report = _Report(beat, self._progress, self._phase, socket.gethostname(), os.getpid())
                self._store.set(f"health/{self._world.rank}", json.dumps(report))
                self._rank_0 = _Report(*json.loads(self._store.get("health/0")))
                self._heard = time.monotonic()
                if not self._asked.is_set() or self._answered.is_set():
                    continue
                if not has_asked and self._store.add("health/asked", 1) == 1:
                    self._store.set("health/verdict", self._compare())  # the first that asks does it for all
                has_asked = True
                if self._store.check(["health/verdict"]):
                    self._verdict = self._store.get("health/verdict").decode()
                    self._answered.set()
        except RuntimeError:  # the store has gone with its rank
            self._verdict = _describe(0, "died or hung", self._rank_0)
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
        return f"{_describe(0, 'died or hung', self._rank_0)} (The store that it keeps does not answer.)"

    def _compare(self) -> str:
        """What the reports of all ranks say, read twice; empty if none is behind."""
        before = self._read()
        time.sleep(3 * self._interval)
        now = self._read()
        others = [rank for rank in range(self._world.world_size) if rank != self._world.rank]
        if silent := [rank for rank in others if rank not in now or now[rank] == before.get(rank)]:
            return " ".join(_describe(rank, "died or hung", now.get(rank)) for rank in silent)
        least = min(report.progress for report in now.values())
        behind = [rank for rank, report in now.items() if report.progress == least]
        return " ".join(_describe(rank, "is behind", now[rank]) for rank in behind if len(behind) < len(now))

    def _read(self) -> dict[int, _Report]:
        ranks = [rank for rank in range(self._world.world_size) if self._store.check([f"health/{rank}"])]
        return {rank: _Report(*json.loads(self._store.get(f"health/{rank}"))) for rank in ranks}


def _describe(rank: int, what: str, report: _Report | None) -> str:
    if report is None:
        return f"Rank {rank} {what}: it never reported."
    return f"Rank {rank} ({report.host}, pid {report.pid}) {what}; last reported at {report.phase}."
