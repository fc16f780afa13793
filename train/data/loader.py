"""Samples → batches, in an order that depends on the seed and the number of lanes alone.

    LaneDataset     in each loader process: the shares of its process, without end
    _Worker         in the training process: a loader process, and the shares received from it
    Loader          in the training process: joins a share of each worker to a `Batch`

Sample i of the run is the (i ÷ lanes)-th accepted sample of lane i mod lanes. It is loaded by process p = i mod (ranks ×
workers), which is worker p ÷ ranks of rank p mod ranks. As ranks × workers divides the lanes, each process owns whole lanes; as
workers divides the batch, each has an equal share of every batch.

B batch, N images, T text tokens; H, W height and width of an image.
"""

from __future__ import annotations

import atexit
import fcntl
import logging
import math
import multiprocessing
import os
import pickle
import queue
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
from torch import Tensor

from open_flamingo.train.data.images import ImagePreparer
from open_flamingo.train.data.laion import LaionPreparer
from open_flamingo.train.data.lanes import Counts, Cursor, Lane, Prepare, ShardOrder
from open_flamingo.train.data.mmc4 import Mmc4Preparer
from open_flamingo.train.data.samples import DataError, Sample
from open_flamingo.train.data.shards import expand_shards
from open_flamingo.train.labels import IGNORE, laion_labels, mmc4_labels

logger = logging.getLogger(__name__)

MIN_LANES = 16
# Undecoded samples in the shuffle buffer of each open shard. About 10 MB a lane: LAION pictures are some 20 KB; MMC4 documents
# some 300 KB, and can be many MB.
SHUFFLE_BUFFER = {"laion": 500, "mmc4": 32}
# Seconds to wait for a killed worker. One that waits for a dead file server cannot even be killed.
KILL_WAIT = 5.0
# Bytes between a worker and the training process: the most that Linux grants everybody. Its default is 64 KiB, half an image.
PIPE_SIZE = 1 << 20


@dataclass(frozen=True)
class DataOptions:
    """Which data, and how it is read.

    Attributes:
        kind: "laion" or "mmc4".
        shards: a pattern (see `shards.expand_shards`) or a list of URLs.
        batch_size: samples a batch on each rank.
        workers: loader processes on each rank; 0 loads in the training process.
        seed: of everything random here.
        lanes: see `resolve_lanes`; ranks × workers must divide it.
        resampled: draw shards with replacement.
        max_image_pixels: larger pictures are left out; None for no limit.
        shuffle_buffer: undecoded samples held for shuffling, in each lane; None for 500 (LAION) or 32 (MMC4). Memory is
            lanes ÷ (ranks × workers) of these in each process.
        prefetch: batches that the workers are ahead.
        timeout: seconds that a batch may take before the worker waited for counts as hung. More than three times
            `streams.STALL`, so that a read that stalls is first tried again.
        startup_timeout: the same for the first batch, for which the workers fill their shuffle buffers.
    """

    kind: str
    shards: str | tuple[str, ...]
    batch_size: int
    workers: int = 1
    seed: int = 42
    lanes: int = MIN_LANES
    resampled: bool = False
    max_image_pixels: int | None = None
    mmc4_textsim_threshold: float = 30
    mmc4_max_num_images: int = 6
    mmc4_min_num_images: int = 1
    shuffle_buffer: int | None = None
    prefetch: int = 2
    timeout: float = 450.0
    startup_timeout: float = 3600.0
    rank: int = 0
    world_size: int = 1


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
class Batch:
    """One rank's batch, right-padded. Padding at the end of a row changes nothing that is computed before it.

    Attributes:
        images: uint8 [B, N, 3, H, W], N the most images of any row, or float32 and normalised where `normalization` is None.
            Rows with fewer are filled with zeros.
        image_counts: images of each row; also its number of `<image>` tokens.
        input_ids, attention_mask, labels: int64 [B, T].
        keys: `shard-url#sample-key` of each row.
        cursors: of this rank's lanes, after this batch.
        samples: consumed by all ranks, with this batch.
        dropped: samples left out on purpose since the batch before, by reason.
        errors: broken samples and shards since the batch before, by reason.
    """

    images: Tensor
    image_counts: list[int]
    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    keys: list[str]
    cursors: dict[int, Cursor]
    samples: int
    dropped: Counter[str]
    errors: Counter[str]

    @property
    def num_labels(self) -> int:
        """Tokens that count in the loss. (The first of a row is never predicted.)"""
        return int((self.labels[:, 1:] != IGNORE).sum())


def resolve_workers(workers: int, batch_size: int, world_size: int, lanes: int | None = None) -> int:
    """The largest number of workers up to `workers` that gives each an equal share of a batch, and whole lanes if `lanes` is given.

    0 stays 0. Says so, as a warning, if it is fewer than asked for.

    Raises ValueError if `lanes` cannot be divided among `world_size` ranks at all.
    """
    if lanes is not None:
        _check_ranks(lanes, world_size)
    best = workers
    while best > 1 and (batch_size % best or (lanes is not None and lanes % (world_size * best))):
        best -= 1
    if best != workers:
        reason = f"a batch of {batch_size}" if batch_size % workers else f"{lanes} lanes on {world_size} ranks"
        logger.warning("%d loader workers a rank instead of %d: %s cannot be shared equally", best, workers, reason)
    return best


def resolve_lanes(data_lanes: int | None, world_size: int, workers: int) -> int:
    """`data_lanes` if given; else the least number ≥ 16 that ranks × workers divides, by a power of two.

    For a power of two of processes that is the smallest power of two ≥ max(16, ranks × workers): enough shards open at
    once to mix well, few enough to hold open.

    Raises ValueError if ranks × workers does not divide `data_lanes`, with the numbers that do.
    """
    processes = world_size * max(1, workers)
    if data_lanes is None:
        odd = processes // (processes & -processes)
        return odd * 2 ** math.ceil(math.log2(max(MIN_LANES, processes) / odd))
    _check_ranks(data_lanes, world_size)
    if data_lanes % processes:
        fitting = [w for w in range(1, data_lanes // world_size + 1) if data_lanes % (world_size * w) == 0]
        raise ValueError(
            f"{data_lanes} data lanes cannot be shared by {world_size} ranks × {max(1, workers)} workers: "
            f"with {world_size} ranks, use one of {fitting} workers"
        )
    return data_lanes


def _check_ranks(lanes: int, world_size: int) -> None:
    if lanes < 1 or lanes % world_size:
        fitting = [ranks for ranks in range(1, max(lanes, 0) + 1) if lanes % ranks == 0]
        raise ValueError(
            f"{lanes} data lanes cannot be shared by {world_size} ranks: use one of {fitting} ranks "
            f"(or, for a new run, a --data_lanes that {world_size} divides)"
        )


@dataclass
class _Share:
    """One worker's part of a batch: rows as in `Batch`, but images of all rows in one row [images, 3, H, W]."""

    images: np.ndarray
    image_counts: list[int]
    input_ids: np.ndarray
    attention_mask: np.ndarray
    labels: np.ndarray
    keys: list[str]
    cursors: dict[int, Cursor]
    counts: Counts


@dataclass
class _Failure:
    """A worker's DataError: as a value, it comes without the traceback of another process."""

    message: str


@dataclass(frozen=True)
class _Collator:
    """Samples → the tensors of a share, labels among them."""

    kind: str
    media_token_id: int
    eoc_token_id: int
    pad_token_id: int

    def __call__(self, samples: list[Sample], cursors: dict[int, Cursor], counts: Counts) -> _Share:
        longest = max(len(sample.input_ids) for sample in samples)
        input_ids = torch.full((len(samples), longest), self.pad_token_id)
        attention_mask = torch.zeros_like(input_ids)
        for row, sample in enumerate(samples):
            input_ids[row, : len(sample.input_ids)] = torch.tensor(sample.input_ids)
            attention_mask[row, : len(sample.input_ids)] = 1
        if self.kind == "laion":
            labels = laion_labels(input_ids, self.media_token_id, self.pad_token_id)
        else:
            labels = mmc4_labels(input_ids, self.media_token_id, self.eoc_token_id, self.pad_token_id)
        return _Share(
            images=np.stack([image for sample in samples for image in sample.images]),
            image_counts=[len(sample.images) for sample in samples],
            input_ids=input_ids.numpy(),
            attention_mask=attention_mask.numpy(),
            labels=labels.numpy(),
            keys=[sample.key for sample in samples],
            cursors=cursors,
            counts=counts,
        )


class LaneDataset:
    """What each loader process reads."""

    def __init__(
        self, options: DataOptions, urls: list[str], prepare: Prepare, collate: _Collator, state: LoaderState
    ) -> None:
        self.options = options
        self.order = ShardOrder(tuple(urls), options.lanes, options.seed, options.kind, options.resampled)
        self.prepare = prepare
        self.collate = collate
        self.state = state

    def shares(self, worker: int) -> Iterator[_Share | _Failure]:
        """The shares of loader process `worker` of this rank, without end but for a failure."""
        try:
            yield from self._shares(worker)
        except DataError as error:
            yield _Failure(str(error))

    def _shares(self, worker: int) -> Iterator[_Share]:
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
        for share in dataset.shares(number):
            sender.send_bytes(pickle.dumps(share, protocol=5))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


class _Worker:
    """A loader process of this rank, and the shares that were received from it.

    Each has a pipe of its own: one that dies or stops in the middle of a share closes or blocks no other's. A thread
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
        self._shares: queue.SimpleQueue[_Share | _Failure | None] = queue.SimpleQueue()
        self._room = threading.Semaphore(dataset.options.prefetch - 1)  # one more waits in the pipe
        self._killed = False
        threading.Thread(target=self._receive, name=f"loader worker {number}", daemon=True).start()

    def _receive(self) -> None:
        with suppress(EOFError, OSError):
            while self._room.acquire() and not self._killed:
                self._shares.put(pickle.loads(self._receiver.recv_bytes()))
        self._receiver.close()
        self._shares.put(None)

    def take(self, timeout: float) -> _Share | _Failure | None:
        """Its next share, None if it has ended. Raises queue.Empty after `timeout` seconds."""
        self._room.release()
        return self._shares.get(timeout=max(0.0, timeout))

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


def _kill(workers: list[_Worker], parent: int) -> None:
    """Kills the workers of the process `parent`, if this is it and not a copy."""
    if os.getpid() != parent:
        return
    for worker in workers:
        worker.kill()
    deadline = time.monotonic() + KILL_WAIT
    for worker in workers:
        worker.process.join(max(0.0, deadline - time.monotonic()))


class Loader:
    """Batches without end. Iterate it once; `close` it, or leave it with `with`, to stop its workers."""

    def __init__(self, dataset: LaneDataset) -> None:
        self.dataset = dataset
        self.options = dataset.options
        self.urls = dataset.order.urls
        self.samples = dataset.state.samples
        self._cursors = dict(dataset.state.cursors)
        self._pad_token_id = dataset.collate.pad_token_id
        self._pin = torch.cuda.is_available()
        self._timeout = self.options.startup_timeout
        self._workers = [_Worker(dataset, number) for number in range(self.options.workers)]
        self._own_shares = dataset.shares(0)  # where there are no workers
        self._closed = False
        # Python would send the workers a SIGTERM, and wait for them.
        atexit.register(_kill, self._workers, os.getpid())

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> Batch:
        """The next batch.

        Raises DataError if the data is too broken to go on, or if a worker died, or gives nothing for `options.timeout` seconds.
        """
        if self._closed:
            raise StopIteration
        deadline = time.monotonic() + self._timeout
        batch = self._join([self._share(worker, deadline) for worker in range(max(1, self.options.workers))])
        self._timeout = self.options.timeout
        self.samples = batch.samples
        self._cursors |= batch.cursors
        return batch

    def close(self) -> None:
        """Stops the workers."""
        self._closed = True
        _kill(self._workers, os.getpid())

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _share(self, number: int, deadline: float) -> _Share:
        """The next one of worker `number`."""
        share: _Share | _Failure | None
        if not self._workers:
            share = next(self._own_shares)
        else:
            worker = self._workers[number]
            try:
                share = worker.take(deadline - time.monotonic())
            except queue.Empty:
                share = _Failure(f"{self._name(number)} hangs: it has given nothing for {self._timeout:g} seconds")
            if share is None:
                share = _Failure(f"{self._name(number)} {worker.describe_exit()}")
        if isinstance(share, _Failure):
            self.close()
            raise DataError(share.message)
        return share

    def _name(self, worker: int) -> str:
        """Which worker, and where it reads, as far as the batches that came tell."""
        options, processes = self.options, self.options.world_size * self.options.workers
        process = worker * options.world_size + options.rank
        lane = (self.samples + (process - self.samples) % processes) % options.lanes  # of its next sample
        shard = self.dataset.order.url(lane, self._cursors.get(lane, (0, 0))[0])
        return (
            f"{options.kind} loader worker {worker} of rank {options.rank} (pid {self._workers[worker].process.pid}), which was "
            f"up to {options.prefetch} batches beyond {shard} (lane {lane}),"
        )

    def _join(self, shares: list[_Share]) -> Batch:
        """Rows in the order of the run: they take turns among the workers, beginning where `samples` says."""
        options, workers = self.options, len(shares)
        first = self.samples + (options.rank - self.samples) % options.world_size
        turn = first // options.world_size
        rows = [((turn + m) % workers, m // workers) for m in range(options.batch_size)]  # of the batch: worker, row
        counts = [shares[worker].image_counts[row] for worker, row in rows]
        return Batch(
            images=self._join_images(shares, rows, counts),
            image_counts=counts,
            input_ids=self._join_text([share.input_ids for share in shares], rows, self._pad_token_id),
            attention_mask=self._join_text([share.attention_mask for share in shares], rows, 0),
            labels=self._join_text([share.labels for share in shares], rows, IGNORE),
            keys=[shares[worker].keys[row] for worker, row in rows],
            cursors={lane: cursor for share in shares for lane, cursor in share.cursors.items()},
            samples=self.samples + options.batch_size * options.world_size,
            dropped=sum((share.counts.dropped for share in shares), Counter()),
            errors=sum((share.counts.errors for share in shares), Counter()),
        )

    def _join_images(self, shares: list[_Share], rows: list[tuple[int, int]], counts: list[int]) -> Tensor:
        shape, dtype = shares[0].images.shape[1:], torch.from_numpy(shares[0].images).dtype
        joined = torch.empty(len(rows), max(counts), *shape, dtype=dtype, pin_memory=self._pin)
        # Copied by numpy: torch would start all its threads for each picture.
        target, sources = joined.numpy(), [share.images for share in shares]
        starts = [np.cumsum([0, *share.image_counts]).tolist() for share in shares]
        for place, ((worker, row), count) in enumerate(zip(rows, counts, strict=True)):
            start = starts[worker][row]
            target[place, :count] = sources[worker][start : start + count]
            target[place, count:] = 0
        return joined

    def _join_text(self, parts: list[np.ndarray], rows: list[tuple[int, int]], fill: int) -> Tensor:
        longest = max(part.shape[1] for part in parts)
        joined = torch.full((len(rows), longest), fill, pin_memory=self._pin)
        target = joined.numpy()
        for place, (worker, row) in enumerate(rows):
            target[place, : parts[worker].shape[1]] = parts[worker][row]
        return joined


def build_loader(
    options: DataOptions,
    tokenizer: Any,
    image_processor: Callable[..., Tensor],
    state: LoaderState | None = None,
) -> Loader:
    """The batches of one dataset, from `state` on.

    Args:
        tokenizer: knows `<image>` and `<|endofchunk|>`, and has a padding token.
        image_processor: as `create_model_and_transforms` gives it; where it is a standard CLIP pipeline it is only read, and
            `images.normalization` says what is left to do on the device.
        state: None, or empty, for a new run.

    Raises ValueError for options that do not fit together or a `state` of another number of lanes; the loader raises DataError when
        100 samples in a row fail, 100 shards in a row (or all) yield none, or a worker dies or hangs.
    """
    processes = options.world_size * max(1, options.workers)
    if options.lanes % processes or options.batch_size % max(1, options.workers):
        raise ValueError(
            f"{options.world_size} ranks × {options.workers} workers must divide the {options.lanes} lanes, and the workers the "
            f"batch of {options.batch_size}: see resolve_workers and resolve_lanes"
        )
    state = state or LoaderState()
    if state.samples and set(state.cursors) != set(range(options.lanes)):
        raise ValueError(f"the state is of {len(state.cursors)} lanes, the run has {options.lanes}")
    urls = expand_shards(options.shards) if isinstance(options.shards, str) else list(options.shards)
    if not urls:
        raise ValueError(f"no {options.kind} shards: {options.shards!r}")
    prepare_image = ImagePreparer(image_processor, options.max_image_pixels)
    prepare: LaionPreparer | Mmc4Preparer
    if options.kind == "laion":
        prepare = LaionPreparer(tokenizer, prepare_image)
    elif options.kind == "mmc4":
        prepare = Mmc4Preparer(
            tokenizer,
            prepare_image,
            options.mmc4_textsim_threshold,
            options.mmc4_min_num_images,
            options.mmc4_max_num_images,
        )
    else:
        raise ValueError(f"kind is 'laion' or 'mmc4', not {options.kind!r}")
    if tokenizer.pad_token_id is None:
        raise ValueError("the tokenizer has no padding token")
    encode = prepare.encode
    collate = _Collator(options.kind, encode.media_token_id, encode.eoc_token_id, tokenizer.pad_token_id)
    return Loader(LaneDataset(options, urls, prepare, collate, state))
