"""Loader processes: each prepares its part of every batch, and sends it through a pipe of its own."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import pickle
import queue
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch

from open_flamingo.train.data.labels import laion_labels, mmc4_labels
from open_flamingo.train.data.lanes import Counts, Cursor, Lane, Prepare, ShardOrder
from open_flamingo.train.data.options import DataOptions
from open_flamingo.train.data.samples import DataError, Sample

# Undecoded samples in the shuffle buffer of each open shard. About 10 MB per lane: LAION images are some 20 KB; MMC4 documents
# some 300 KB, and can be many MB.
SHUFFLE_BUFFER = {"laion": 500, "mmc4": 32}
# Seconds to wait for a killed worker. One that waits for a dead file server cannot even be killed.
KILL_WAIT = 5.0
# Bytes between a worker and the training process: the most that Linux grants everybody. Its default is 64 KiB, half an image.
PIPE_SIZE = 1 << 20


@dataclass
class LoaderState:
    """Where a run stands in one dataset.

    Attributes:
        samples: consumed so far, by all ranks together.
        cursors: by lane, (k, n): n samples of the lane's k-th shard are behind it. All lanes of the run.
    """

    samples: int = 0
    cursors: dict[int, Cursor] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain lists and numbers."""
        return {"samples": self.samples, "cursors": [[lane, *cursor] for lane, cursor in sorted(self.cursors.items())]}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> LoaderState:
        return cls(int(data["samples"]), {int(lane): (int(k), int(n)) for lane, k, n in data["cursors"]})


@dataclass
class WorkerBatch:
    """One worker's part of a batch: rows as in `Batch`, but images of all rows in one row [images, 3, H, W]."""

    images: np.ndarray
    image_counts: list[int]
    input_ids: np.ndarray
    labels: np.ndarray
    keys: list[str]
    cursors: dict[int, Cursor]
    counts: Counts


@dataclass
class Failure:
    """A worker's DataError: as a value, it comes without the traceback of another process."""

    message: str


@dataclass(frozen=True)
class Collator:
    """Samples → the tensors of a part, labels among them."""

    kind: str
    media_token_id: int
    eoc_token_id: int
    pad_token_id: int

    def __call__(self, samples: list[Sample], cursors: dict[int, Cursor], counts: Counts) -> WorkerBatch:
        longest = max(len(sample.input_ids) for sample in samples)
        input_ids = torch.full((len(samples), longest), self.pad_token_id)
        for row, sample in enumerate(samples):
            input_ids[row, : len(sample.input_ids)] = torch.tensor(sample.input_ids)
        if self.kind == "laion":
            labels = laion_labels(input_ids, self.media_token_id, self.pad_token_id)
        else:
            labels = mmc4_labels(input_ids, self.media_token_id, self.eoc_token_id, self.pad_token_id)
        return WorkerBatch(
            images=np.stack([image for sample in samples for image in sample.images]),
            image_counts=[len(sample.images) for sample in samples],
            input_ids=input_ids.numpy(),
            labels=labels.numpy(),
            keys=[sample.key for sample in samples],
            cursors=cursors,
            counts=counts,
        )


class LaneDataset:
    """What each loader process reads."""

    def __init__(
        self, options: DataOptions, urls: list[str], prepare: Prepare, collate: Collator, state: LoaderState
    ) -> None:
        self.options = options
        self.order = ShardOrder(tuple(urls), options.lanes, options.seed, options.kind, options.resampled)
        self.prepare = prepare
        self.collate = collate
        self.state = state

    def parts(self, worker: int) -> Iterator[WorkerBatch | Failure]:
        """The parts of loader process `worker` of this rank, without end but for a failure."""
        try:
            yield from self._parts(worker)
        except DataError as error:
            yield Failure(str(error))

    def _parts(self, worker: int) -> Iterator[WorkerBatch]:
        options, state = self.options, self.state
        workers = max(1, options.workers)
        processes = options.world_size * workers
        process = worker * options.world_size + options.rank
        counts = Counts()
        buffer_size = options.shuffle_buffer or SHUFFLE_BUFFER[options.kind]
        lanes = {
            lane: Lane(lane, self.order, self.prepare, buffer_size, state.cursors.get(lane, (0, 0)), counts)
            for lane in range(process, options.lanes, processes)
        }
        i = state.samples + (process - state.samples) % processes
        while True:
            samples = []
            for _ in range(options.batch_size // workers):
                samples.append(next(lanes[i % options.lanes]))
                i += processes
            cursors = {index: lane.cursor for index, lane in lanes.items()}
            yield self.collate(samples, cursors, counts.take())


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
    """A loader process of this rank, and the parts that were received from it.

    Each has a pipe of its own: one that dies or stops in the middle of a part closes or blocks no other's. A thread
    reads from it, so that the training process never waits longer than it wants to.

    Args:
        number: of the worker on this rank.
    """

    def __init__(self, dataset: LaneDataset, number: int) -> None:
        self._receiver, sender = multiprocessing.Pipe(duplex=False)
        with suppress(OSError, AttributeError):  # not on Linux
            fcntl.fcntl(sender.fileno(), fcntl.F_SETPIPE_SZ, PIPE_SIZE)
        self.process = multiprocessing.Process(target=_work, args=(dataset, number, sender), daemon=True)
        self.process.start()
        sender.close()  # the worker's is the only one: when it dies, the pipe ends
        self._received: queue.SimpleQueue[WorkerBatch | Failure | None] = queue.SimpleQueue()
        self._room = threading.Semaphore(dataset.options.prefetch - 1)  # one more waits in the pipe
        self._killed = False
        threading.Thread(target=self._receive, name=f"loader worker {number}", daemon=True).start()

    def _receive(self) -> None:
        with suppress(EOFError, OSError):
            while self._room.acquire() and not self._killed:
                self._received.put(pickle.loads(self._receiver.recv_bytes()))
        self._receiver.close()
        self._received.put(None)

    def take(self, timeout: float) -> WorkerBatch | Failure | None:
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


def kill_workers(workers: list[Worker], parent: int) -> None:
    """Kills the workers of the process `parent`, if this is it and not a copy."""
    if os.getpid() != parent:
        return
    for worker in workers:
        worker.kill()
    deadline = time.monotonic() + KILL_WAIT
    for worker in workers:
        worker.process.join(max(0.0, deadline - time.monotonic()))
