"""Samples → batches, in an order that depends on the seed and the number of lanes alone.

    LaneDataset     in each loader process: its part of each batch, without end
    Worker          in the training process: a loader process, and the parts received from it
    Loader          in the training process: joins a part of each worker into a `Batch`

Sample i of the run is the (i ÷ lanes)-th accepted sample of lane i mod lanes. It is loaded by process p = i mod (ranks ×
workers), which is worker p ÷ ranks of rank p mod ranks. As ranks × workers divides the lanes, each process owns whole lanes; as
workers divides the batch, each has an equal part of every batch.

B batch, N images, T text tokens; H, W height and width of an image.
"""

from __future__ import annotations

import atexit
import os
import queue
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from open_flamingo.train.data.images import ImagePreparer
from open_flamingo.train.data.labels import IGNORE
from open_flamingo.train.data.laion import LaionPreparer
from open_flamingo.train.data.lanes import Cursor
from open_flamingo.train.data.mmc4 import Mmc4Preparer
from open_flamingo.train.data.options import DataOptions
from open_flamingo.train.data.samples import DataError
from open_flamingo.train.data.shards import expand_shards
from open_flamingo.train.data.workers import (
    Collator,
    Failure,
    LaneDataset,
    LoaderState,
    Worker,
    WorkerBatch,
    kill_workers,
)


@dataclass
class Batch:
    """One rank's batch, right-padded. Padding at the end of a row changes nothing that is computed before it.

    Attributes:
        images: uint8 [B, N, 3, H, W], N the most images of any row, or float32 and normalized where `normalization` is None.
            Rows with fewer are filled with zeros.
        image_counts: images of each row; also its number of `<image>` tokens.
        input_ids, labels: int64 [B, T].
        keys: `shard-url#sample-key` of each row.
        cursors: of this rank's lanes, after this batch.
        samples: consumed by all ranks, with this batch.
        dropped: samples left out on purpose since the batch before, by reason.
        errors: broken samples and shards since the batch before, by reason.
    """

    images: Tensor
    image_counts: list[int]
    input_ids: Tensor
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
        self._workers = [Worker(dataset, number) for number in range(self.options.workers)]
        self._own_parts = dataset.parts(0)  # where there are no workers
        self._closed = False
        # Python would send the workers a SIGTERM, and wait for them.
        atexit.register(kill_workers, self._workers, os.getpid())

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
        kill_workers(self._workers, os.getpid())

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _share(self, number: int, deadline: float) -> WorkerBatch:
        """The next one of worker `number`."""
        part: WorkerBatch | Failure | None
        if not self._workers:
            part = next(self._own_parts)
        else:
            worker = self._workers[number]
            try:
                part = worker.take(deadline - time.monotonic())
            except queue.Empty:
                part = Failure(f"{self._name(number)} hangs: it has given nothing for {self._timeout:g} seconds")
            if part is None:
                part = Failure(f"{self._name(number)} {worker.describe_exit()}")
        if isinstance(part, Failure):
            self.close()
            raise DataError(part.message)
        return part

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

    def _join(self, parts: list[WorkerBatch]) -> Batch:
        """Rows in the order of the run: they take turns among the workers, beginning where `samples` says."""
        options, workers = self.options, len(parts)
        first = self.samples + (options.rank - self.samples) % options.world_size
        turn = first // options.world_size
        rows = [((turn + m) % workers, m // workers) for m in range(options.batch_size)]  # of the batch: worker, row
        counts = [parts[worker].image_counts[row] for worker, row in rows]
        return Batch(
            images=self._join_images(parts, rows, counts),
            image_counts=counts,
            input_ids=self._join_text([part.input_ids for part in parts], rows, self._pad_token_id),
            labels=self._join_text([part.labels for part in parts], rows, IGNORE),
            keys=[parts[worker].keys[row] for worker, row in rows],
            cursors={lane: cursor for part in parts for lane, cursor in part.cursors.items()},
            samples=self.samples + options.batch_size * options.world_size,
            dropped=sum((part.counts.dropped for part in parts), Counter()),
            errors=sum((part.counts.errors for part in parts), Counter()),
        )

    def _join_images(self, parts: list[WorkerBatch], rows: list[tuple[int, int]], counts: list[int]) -> Tensor:
        shape, dtype = parts[0].images.shape[1:], torch.from_numpy(parts[0].images).dtype
        joined = torch.empty(len(rows), max(counts), *shape, dtype=dtype, pin_memory=self._pin)
        # Copied by numpy: torch would start all its threads for each image.
        target, sources = joined.numpy(), [part.images for part in parts]
        starts = [np.cumsum([0, *part.image_counts]).tolist() for part in parts]
        for place, ((worker, row), count) in enumerate(zip(rows, counts, strict=True)):
            start = starts[worker][row]
            target[place, :count] = sources[worker][start : start + count]
            target[place, count:] = 0
        return joined

    def _join_text(self, texts: list[np.ndarray], rows: list[tuple[int, int]], fill: int) -> Tensor:
        longest = max(text.shape[1] for text in texts)
        joined = torch.full((len(rows), longest), fill, pin_memory=self._pin)
        target = joined.numpy()
        for place, (worker, row) in enumerate(rows):
            target[place, : texts[worker].shape[1]] = texts[worker][row]
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
    collate = Collator(options.kind, encode.media_token_id, encode.eoc_token_id, tokenizer.pad_token_id)
    return Loader(LaneDataset(options, urls, prepare, collate, state))
