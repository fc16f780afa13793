"""Loader processes: each prepares its part of every batch, and sends it through a pipe of its own."""

import fcntl
import itertools
import multiprocessing
import os
import pickle
import queue
import signal
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, Protocol, Self

import torch

from open_flamingo.train.data.lanes import Counts, Cursor, Lane, Randomness, ShardOrder
from open_flamingo.train.data.options import DataOptions
from open_flamingo.train.data.samples import DataError, RawSample, Sample
from open_flamingo.train.data.text import TextEncoder

SHUFFLE_BUFFER = {"laion": 500, "mmc4": 32}  # undecoded samples of each lane: about 10 MB (a document has some 300 KB)
PREFETCH = 2  # batches that the workers are ahead
KILL_WAIT = 5.0  # seconds; one that waits for a dead file server cannot even be killed
PIPE_SIZE = 1 << 20  # bytes: the most that Linux grants everybody. Its default is 64 KiB, half an image.


class Preparer(Protocol):
    """What makes a kind of samples: `laion.LaionPreparer`, `mmc4.Mmc4Preparer`."""

    encode: TextEncoder

    def __call__(self, raw: RawSample, randomness: Randomness, counts: Counts) -> Sample:
        """Raises Drop or SampleError for what is left out."""
        ...


@dataclass
class LoaderState:
    """Where a run stands in one dataset."""

    samples: int = 0  # consumed so far, by all ranks together
    cursors: dict[int, Cursor] = field(default_factory=dict)  # see `lanes`; of all lanes of the run

    def to_json(self) -> dict[str, Any]:
        return {"samples": self.samples, "cursors": [[lane, *cursor] for lane, cursor in sorted(self.cursors.items())]}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        return cls(int(data["samples"]), {int(lane): (int(k), int(n)) for lane, k, n in data["cursors"]})


@dataclass
class Part:
    """One worker's part of a batch."""

    samples: list[Sample]
    cursors: dict[int, Cursor]  # of its lanes, after these samples
    counts: Counts  # of what was left out since the part before


@dataclass
class LaneDataset:
    """What each loader process reads."""

    options: DataOptions
    order: ShardOrder
    prepare: Preparer
    state: LoaderState

    def next_sample(self, worker: int, samples: int) -> int:
        """The first sample of the run, from number `samples` on, that loader process `worker` of this rank loads."""
        process = worker * self.options.world_size + self.options.rank
        return samples + (process - samples) % (self.options.world_size * max(1, self.options.workers))

    def parts(self, worker: int) -> Iterator[Part | DataError]:
        """The parts of loader process `worker` of this rank, without end but for an error."""
        options, workers, counts = self.options, max(1, self.options.workers), Counts()
        processes = options.world_size * workers
        buffer_size = options.shuffle_buffer or SHUFFLE_BUFFER[options.kind]
        lanes = {
            lane: Lane(lane, self.order, self.prepare, buffer_size, self.state.cursors.get(lane, (0, 0)), counts)
            for lane in range(self.next_sample(worker, 0), options.lanes, processes)
        }
        numbers = itertools.count(self.next_sample(worker, self.state.samples), processes)
        try:
            while True:
                rows = itertools.islice(numbers, options.batch_size // workers)
                samples = [next(lanes[number % options.lanes]) for number in rows]
                yield Part(samples, {index: lane.cursor for index, lane in lanes.items()}, counts.take())
        except DataError as error:
            yield error


def _work(dataset: LaneDataset, number: int, sender: Connection) -> None:
    """The program of a loader process."""
    # Otherwise the tokenizer warns of the fork in every worker; its threads would only take cores from other workers.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
    # SLURM sends signals to every process of a job. They are meant for the training process, which finishes its update,
    # saves and then kills its workers.
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(name, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with suppress(BrokenPipeError):  # the training process has died
        for part in dataset.parts(number):
            sender.send_bytes(pickle.dumps(part, protocol=5))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


class Worker:
    """Loader process `number` of this rank, and the parts that were received from it.

    Each has a pipe of its own: one that dies or stops in the middle of a part closes or blocks no other's. A thread
    reads from it, so that the training process never waits longer than it wants to.
    """

    def __init__(self, dataset: LaneDataset, number: int) -> None:
        self._receiver, sender = multiprocessing.Pipe(duplex=False)
        with suppress(OSError, AttributeError):  # not on Linux
            fcntl.fcntl(sender.fileno(), fcntl.F_SETPIPE_SZ, PIPE_SIZE)
        self.process = multiprocessing.Process(target=_work, args=(dataset, number, sender), daemon=True)
        self.process.start()
        sender.close()  # the worker's is the only one: when it dies, the pipe ends
        self._received: queue.SimpleQueue[Part | DataError | None] = queue.SimpleQueue()
        self._room = threading.Semaphore(PREFETCH - 1)  # one more waits in the pipe
        self._killed = False
        threading.Thread(target=self._receive, name=f"loader worker {number}", daemon=True).start()

    def _receive(self) -> None:
        with suppress(EOFError, OSError):
            while self._room.acquire() and not self._killed:
                self._received.put(pickle.loads(self._receiver.recv_bytes()))
        self._receiver.close()
        self._received.put(None)

    def take(self, timeout: float) -> Part | DataError | None:
        """Its next part, None if it has ended. Raises queue.Empty after `timeout` seconds."""
        self._room.release()
        return self._received.get(timeout=max(0.0, timeout))

    def kill(self) -> None:
        self._killed = True
        self._room.release()
        self.process.kill()  # a stopped process ignores all else

    def describe_exit(self) -> str:
        self.process.join(KILL_WAIT)
        code = self.process.exitcode
        if code is None or code >= 0:
            return f"ended with exit status {code}: its own error message is above"
        hint = ": is the machine out of memory?" if -code == signal.SIGKILL else ""
        return f"was killed by {signal.Signals(-code).name}{hint}"
