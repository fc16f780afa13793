"""Lanes: endless, deterministic streams of samples, each with two integers of state.

    ShardOrder.url(lane, k)     the k-th shard of a lane: a function of the seed alone
    read_shard(url)             raw samples of a shard: {"__key__", "__url__", "jpg": bytes, ...}
    shuffle(samples, size)      the same, in another order; drains at the shard's end
    Lane                        prepared samples, forever; `cursor` (k, n) follows the last one

A lane's cursor (k, n) says: n raw samples of its k-th shard have left the shuffle buffer. All that is random about the
n-th sample of shard k comes from (seed, kind, lane, k, n), so the cursor is the whole state.
"""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from open_flamingo.train.data.samples import Counts, DataError, Drop, RawSample, Sample, SampleError
from open_flamingo.train.data.tars import read_shard

logger = logging.getLogger(__name__)

Cursor = tuple[int, int]

# Broken samples in a row, or shards in a row that yield none, that show a wrong data set rather than bad luck.
FAILURES_IN_A_ROW = 100
# Of the shuffle buffer of a lane: 500 LAION samples are 10 MB, 32 MMC4 documents too. Only large files come near it.
BUFFER_BYTES = 256 << 20
# What the randomness is for; the first element of each key, so that no two uses share numbers.
PASS, DRAW, BUFFER, COIN, FLIP = range(5)


def _hash(key: tuple[object, ...], size: int) -> int:
    # A hash and not a generator: stateless, and the same on any machine and in any version of Python and numpy.
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=size).digest(), "little")


def uniform(*key: object) -> float:
    """A number in [0, 1) that depends on `key` alone. `key` holds ints and strings."""
    return (_hash(key, 8) >> 11) * 2.0**-53


@functools.lru_cache(maxsize=2)  # neighboring lanes are in the same pass, or in the next
def _permutation(length: int, *key: object) -> np.ndarray:
    # Raw bits are kept stable between numpy's versions; `Generator.permutation` is not.
    raw = np.random.Philox(key=_hash(key, 16)).random_raw(length)
    return np.argsort(raw, kind="stable")


@dataclass(frozen=True)
class ShardOrder:
    """Which shard comes when in which lane.

    Without replacement: permutations of the list, one per pass, end to end; lane l takes entries l, l + lanes, …
    With it (`resampled`): each draw on its own.
    """

    urls: tuple[str, ...]
    lanes: int
    seed: int
    kind: str
    resampled: bool = False

    def url(self, lane: int, k: int) -> str:
        """The `k`-th shard of `lane`."""
        if self.resampled:
            return self.urls[_hash((DRAW, self.seed, self.kind, lane, k), 8) % len(self.urls)]
        number, place = divmod(lane + k * self.lanes, len(self.urls))
        return self.urls[_permutation(len(self.urls), PASS, self.seed, self.kind, number)[place]]


@dataclass(frozen=True)
class Randomness:
    """What is random about one sample."""

    key: tuple[object, ...]

    def coin(self) -> float:
        """Uniform in [0, 1): the coin for documents of one image."""
        return uniform(COIN, *self.key)

    def flip(self, image: int) -> bool:
        """Whether the `image`-th image of the sample is mirrored; one coin for each."""
        return uniform(FLIP, *self.key, image) < 0.5


def shuffle(samples: Iterable[RawSample], size: int, key: tuple[object, ...]) -> Iterator[RawSample]:
    """`samples` through a buffer of `size`: each time one of it, drawn by `key` and the number of samples before it.

    The buffer takes no more once it holds `BUFFER_BYTES`.

    What `samples` raises comes after the buffer has drained, so it cannot change which samples come before it.
    """
    iterator = iter(samples)
    buffer: list[RawSample] = []
    failure: SampleError | None = None
    exhausted = False
    n = held = 0
    while True:
        while not exhausted and (not buffer or (len(buffer) < size and held < BUFFER_BYTES)):
            try:
                buffer.append(next(iterator))
                held += _bytes(buffer[-1])
            except StopIteration:
                exhausted = True
            except SampleError as error:
                exhausted, failure = True, error
        if not buffer:
            break
        chosen = int(uniform(BUFFER, *key, n) * len(buffer))
        buffer[chosen], buffer[-1] = buffer[-1], buffer[chosen]
        held -= _bytes(buffer[-1])
        yield buffer.pop()
        n += 1
    if failure is not None:
        raise failure


def _bytes(sample: RawSample) -> int:
    return sum(len(value) for value in sample.values())


Prepare = Callable[[RawSample, Randomness, Counts], Sample]


class Lane:
    """The accepted samples of one lane, from a cursor on, without end.

    Args:
        prepare: raw sample → `Sample`; raises `Drop` or `SampleError`.
        buffer_size: raw samples of the shuffle buffer.
        cursor: where to begin; (0, 0) is the beginning.
        counts: where drops and errors are counted; may be shared between lanes.

    Raises DataError (from `next`) after 100 failures in a row, or when 100 shards in a row, or all of the list, yielded nothing.
    """

    def __init__(
        self, index: int, order: ShardOrder, prepare: Prepare, buffer_size: int, cursor: Cursor, counts: Counts
    ) -> None:
        self.index = index
        self.cursor = cursor
        self._order = order
        self._prepare = prepare
        self._buffer_size = buffer_size
        self._counts = counts
        self._failures = 0
        self._empty_shards: set[str] = set()
        self._samples = self._run()

    def __iter__(self) -> Iterator[Sample]:
        return self

    def __next__(self) -> Sample:
        return next(self._samples)

    def _run(self) -> Iterator[Sample]:
        k, skip = self.cursor
        while True:
            url = self._order.url(self.index, k)
            yielded_any = skip > 0  # what was skipped was used before
            try:
                for n, sample in self._shard(url, k, skip):
                    yielded_any = True
                    self._failures = 0
                    self._empty_shards.clear()
                    self.cursor = (k, n + 1)
                    yield sample
            except SampleError as error:
                self._failed(error, url)
            if not yielded_any:
                self._empty_shards.add(url)
                shards = len(set(self._order.urls))
                if len(self._empty_shards) == min(FAILURES_IN_A_ROW, shards):
                    raise DataError(
                        f"{len(self._empty_shards)} of the {shards} {self._order.kind} shards, one after another, yielded no sample; the last "
                        f"one is {url}. {self._counts.summary()}"
                    )
            k, skip = k + 1, 0

    def _shard(self, url: str, k: int, skip: int) -> Iterator[tuple[int, Sample]]:
        key = (self._order.seed, self._order.kind, self.index, k)
        for n, raw in enumerate(shuffle(read_shard(url, self._counts), self._buffer_size, key)):
            if n < skip:
                continue
            try:
                sample = self._prepare(raw, Randomness((*key, n)), self._counts)
            except SampleError as error:
                self._failed(error, f"{url}#{raw['__key__']}")
            except Drop as reason:
                self._counts.dropped[str(reason)] += 1
                self._failures = 0
            except Exception as error:  # nothing that stands in one sample ends a run; a hundred in a row do
                failure = SampleError("unexpected_error", f"{type(error).__name__}: {error}")
                self._failed(failure, f"{url}#{raw['__key__']}")
            else:
                yield n, sample

    def _failed(self, error: SampleError, where: str) -> None:
        self._counts.error(error.reason, where, str(error))
        self._failures += 1
        if self._failures >= FAILURES_IN_A_ROW:
            raise DataError(
                f"{self._failures} {self._order.kind} samples in a row failed; the last is {where}: {error}"
            )
