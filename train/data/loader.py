"""Samples → batches, in an order that depends on the seed and the number of lanes alone.

Sample i of the run is the (i ÷ lanes)-th accepted sample of lane i mod lanes. It is loaded by process p = i mod (ranks ×
workers), which is worker p ÷ ranks of rank p mod ranks. As ranks × workers divides the lanes, each process owns whole lanes; as
workers divides the batch, each has an equal part of every batch.
"""

import atexit
import os
import queue
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from open_flamingo.train.data.images import ImagePreparer
from open_flamingo.train.data.labels import IGNORE, laion_labels, mmc4_labels
from open_flamingo.train.data.laion import LaionPreparer
from open_flamingo.train.data.lanes import Cursor, ShardOrder
from open_flamingo.train.data.mmc4 import Mmc4Preparer
from open_flamingo.train.data.options import DataOptions
from open_flamingo.train.data.samples import DataError, Sample
from open_flamingo.train.data.shards import expand_shards
from open_flamingo.train.data.text import TextEncoder
from open_flamingo.train.data.workers import KILL_WAIT, PREFETCH, LaneDataset, LoaderState, Part, Preparer, Worker
from open_flamingo.train.flops import Work


@dataclass
class Batch:
    """One rank's batch: B rows of N images (the most of any row) and T tokens, right-padded.

    Padding at the end of a row changes nothing that is computed before it.
    """

    images: Tensor  # uint8 [B, N, 3, H, W] (see `ImagePreparer`); zeros where a row has fewer images
    image_counts: list[int]  # of each row; also its number of `<image>` tokens
    input_ids: Tensor  # int64 [B, T]
    labels: Tensor  # int64 [B, T]
    keys: list[str]  # `shard-url#sample-key` of each row
    # Of training:
    cursors: dict[int, Cursor] = field(default_factory=dict)  # of this rank's lanes, after this batch
    samples: int = 0  # consumed by all ranks, with this batch
    dropped: Counter[str] = field(default_factory=Counter)  # left out on purpose since the batch before, by reason
    errors: Counter[str] = field(default_factory=Counter)  # broken samples and shards since the batch before, by reason
    work: Work = field(default_factory=Work)

    @property
    def num_labels(self) -> int:
        """Tokens that count in the loss. (The first of a row is never predicted.)"""
        return int((self.labels[:, 1:] != IGNORE).sum())


class Loader(Iterator[Batch]):
    """Batches without end. Iterate it once; `close` it, or leave it with `with`, to stop its workers."""

    def __init__(self, dataset: LaneDataset) -> None:
        self.dataset = dataset
        self.options = dataset.options
        self.urls = dataset.order.urls
        self.samples = dataset.state.samples
        self._cursors = dict(dataset.state.cursors)
        self._pin = torch.cuda.is_available()
        self._timeout = self.options.startup_timeout
        self._workers = [Worker(dataset, number) for number in range(self.options.workers)]
        self._own_parts = dataset.parts(0)  # where there are no workers
        # For a GPU a thread collects the next batch while this one is trained on: the main thread has kernels to launch.
        self._thread = None
        if self._pin and self._workers:
            device = torch.cuda.current_device()
            self._thread = ThreadPoolExecutor(1, initializer=lambda: torch.cuda.set_device(device))
        self._ahead: Future[Batch] | None = None
        self._closed = False
        self._pid = os.getpid()
        if self._workers:  # Python would send them a SIGTERM, and wait for them
            atexit.register(self.close)

    def __next__(self) -> Batch:
        """Raises DataError where the data is too broken to go on (see `Lane`), or a worker died or hangs."""
        if self._closed:
            raise StopIteration
        if self._thread is None:
            return self._collect()
        batch = (self._ahead or self._thread.submit(self._collect)).result()
        self._ahead = self._thread.submit(self._collect)
        return batch

    def _collect(self) -> Batch:
        options, workers = self.options, max(1, self.options.workers)
        deadline = time.monotonic() + self._timeout
        parts = [self._take(number, deadline) for number in range(workers)]
        self._timeout = options.timeout
        # Rows in the order of the run: they take turns among the workers, beginning where `samples` says.
        turn = (self.samples + (options.rank - self.samples) % options.world_size) // options.world_size
        samples = [parts[(turn + row) % workers].samples[row // workers] for row in range(options.batch_size)]
        batch = replace(
            collate(samples, options.kind, self.dataset.prepare.encode, self._pin),
            cursors={lane: cursor for part in parts for lane, cursor in part.cursors.items()},
            samples=self.samples + options.batch_size * options.world_size,
            dropped=sum((part.counts.dropped for part in parts), Counter()),
            errors=sum((part.counts.errors for part in parts), Counter()),
        )
        self.samples = batch.samples
        self._cursors |= batch.cursors
        return batch

    def close(self) -> None:
        """Kills the workers, if this is the process that started them and not a fork of it."""
        self._closed = True
        if os.getpid() != self._pid:
            return
        atexit.unregister(self.close)
        if self._thread is not None:
            self._thread.shutdown(wait=False, cancel_futures=True)
        for worker in self._workers:
            worker.kill()
        deadline = time.monotonic() + KILL_WAIT
        for worker in self._workers:
            worker.process.join(max(0.0, deadline - time.monotonic()))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _take(self, number: int, deadline: float) -> Part:
        """The next part of worker `number`. Raises DataError."""
        if not self._workers:
            part = next(self._own_parts)
        else:
            worker = self._workers[number]
            try:
                part = worker.take(deadline - time.monotonic()) or self._lost(number, worker.describe_exit())
            except queue.Empty:
                part = self._lost(number, f"hangs: it has given nothing for {self._timeout:g} seconds")
        if isinstance(part, DataError):
            self.close()
            raise part
        return part

    def _lost(self, number: int, what: str) -> DataError:
        """Says which worker it is, and where it reads, as far as the batches that came tell."""
        options = self.options
        lane = self.dataset.next_sample(number, self.samples) % options.lanes
        shard = self.dataset.order.url(lane, self._cursors.get(lane, (0, 0))[0])
        return DataError(
            f"{options.kind} loader worker {number} of rank {options.rank} (pid {self._workers[number].process.pid}), which was "
            f"up to {PREFETCH} batches beyond {shard} (lane {lane}), {what}"
        )


def collate(samples: list[Sample], kind: str, encode: TextEncoder, pin: bool = False) -> Batch:
    """A batch of `samples`, in memory that is page-locked if `pin`."""
    first = torch.from_numpy(samples[0].images[0])
    most = max(len(sample.images) for sample in samples)
    images = torch.empty(len(samples), most, *first.shape, dtype=first.dtype, pin_memory=pin)
    longest = max(len(sample.input_ids) for sample in samples)
    input_ids = torch.full((len(samples), longest), encode.pad_token_id, pin_memory=pin)
    # Copied by numpy: torch would start all its threads for each image.
    for image_row, text_row, sample in zip(images.numpy(), input_ids.numpy(), samples, strict=True):
        np.stack(sample.images, out=image_row[: len(sample.images)])
        image_row[len(sample.images) :] = 0
        text_row[: len(sample.input_ids)] = sample.input_ids
    if kind == "laion":
        labels = laion_labels(input_ids, encode.media_token_id, encode.pad_token_id)
    else:
        labels = mmc4_labels(input_ids, encode.media_token_id, encode.eoc_token_id, encode.pad_token_id)
    counts, lengths = ([len(of) for of in column] for column in zip(*((s.images, s.input_ids) for s in samples)))
    work = Work(
        images=sum(counts),
        tokens=sum(lengths),
        with_image=sum(len(sample.input_ids) - sample.input_ids.index(encode.media_token_id) for sample in samples),
        labeled=int((labels[:, 1:] != IGNORE).sum()),  # the first of a row is never predicted
        pairs=sum(length * (length + 1) // 2 for length in lengths),
    )
    keys = [sample.key for sample in samples]
    return Batch(images, counts, input_ids, labels.pin_memory() if pin else labels, keys, work=work)


def build_preparer(
    options: DataOptions, tokenizer: Any, image_processor: Callable[..., Tensor]
) -> LaionPreparer | Mmc4Preparer:
    """Raw samples → `Sample`s."""
    images = ImagePreparer(image_processor, options.max_image_pixels)
    if options.kind == "laion":
        return LaionPreparer(tokenizer, images)
    if options.kind == "mmc4":
        return Mmc4Preparer(
            tokenizer, images, options.mmc4_textsim_threshold, options.mmc4_min_num_images, options.mmc4_max_num_images
        )
    raise ValueError(f"kind is 'laion' or 'mmc4', not {options.kind!r}")


def build_loader(
    options: DataOptions,
    tokenizer: Any,
    image_processor: Callable[..., Tensor],
    state: LoaderState | None = None,
    prepare: Preparer | None = None,
) -> Loader:
    """The batches of one dataset, from `state` on; None, or an empty one, for a new run. `prepare` takes the place of `build_preparer`'s.

    `tokenizer` and `image_processor` are as `create_model_and_transforms` gives them; a standard CLIP pipeline is only read, and
    `images.normalization` says what is left to do on the device.

    Raises ValueError for options that do not fit together or a `state` of another number of lanes.
    """
    workers = max(1, options.workers)
    if options.lanes % (options.world_size * workers) or options.batch_size % workers:
        raise ValueError(
            f"{options.world_size} ranks × {options.workers} workers must divide the {options.lanes} lanes, and the workers the "
            f"batch of {options.batch_size}: see resolve_workers and resolve_lanes"
        )
    state = state or LoaderState()
    if state.samples and set(state.cursors) != set(range(options.lanes)):
        raise ValueError(f"the state is of {len(state.cursors)} lanes, the run has {options.lanes}")
    urls = tuple(expand_shards(options.shards)) if isinstance(options.shards, str) else options.shards
    if not urls:
        raise ValueError(f"no {options.kind} shards: {options.shards!r}")
    prepare = prepare or build_preparer(options, tokenizer, image_processor)
    order = ShardOrder(urls, options.lanes, options.seed, options.kind, options.resampled)
    return Loader(LaneDataset(options, order, prepare, state))
