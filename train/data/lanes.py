"""Lanes: endless, deterministic streams of samples, each with two integers of state.

A lane reads its shards one after the other, each through a shuffle buffer that drains at the shard's end. Its cursor (k, n) says:
n raw samples of its k-th shard have left the buffer. All that is random about the n-th sample of shard k comes from (seed, kind,
lane, k, n), so the cursor is the whole state.
"""

import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import count

import numpy as np

from open_flamingo.train.data.samples import Counts, DataError, Drop, RawSample, Sample, SampleError
from open_flamingo.train.data.tars import read_shard

Cursor = tuple[int, int]

FAILURES_IN_A_ROW = 100  # broken samples, or shards that yield none: a wrong data set rather than bad luck
BUFFER_BYTES = 256 << 20  # of a lane's shuffle buffer; only large files come near it
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
    return np.argsort(np.random.Philox(key=_hash(key, 16)).random_raw(length), kind="stable")


@dataclass(frozen=True)
class ShardOrder:
    """Which shard comes when in which lane.

    Permutations of the list, one per pass, end to end: lane l takes entries l, l + lanes, … Or each drawn on its own (`resampled`).
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
        """In [0, 1); for documents of one image."""
        return uniform(COIN, *self.key)

    def flip(self, image: int) -> bool:
        """Whether the `image`-th image of the sample is mirrored."""
        return uniform(FLIP, *self.key, image) < 0.5


def shuffle(samples: Iterable[RawSample], size: int, key: tuple[object, ...]) -> Iterator[RawSample]:
    """`samples` through a buffer of `size` (or `BUFFER_BYTES`): each time one of it, drawn by `key` and the samples before it.

    A SampleError of `samples` comes after the buffer has drained, so it cannot change which samples come before it.
    """
    failure: SampleError | None = None

    def readable() -> Iterator[RawSample]:
        nonlocal failure
        try:
            yield from samples
        except SampleError as error:
            failure = error

    source = readable()
    buffer: list[RawSample] = []
    held = 0
    for n in count():
        while not buffer or (len(buffer) < size and held < BUFFER_BYTES):
            if (sample := next(source, None)) is None:
                break
            buffer.append(sample)
            held += _bytes(sample)
        if not buffer:
            break
        chosen = int(uniform(BUFFER, *key, n) * len(buffer))
        buffer[chosen], buffer[-1] = buffer[-1], buffer[chosen]
        held -= _bytes(buffer[-1])
        yield buffer.pop()
    if failure is not None:
        raise failure


def _bytes(sample: RawSample) -> int:
    return sum(len(value) for value in sample.values())


@dataclass
class Lane(Iterator[Sample]):
    """The accepted samples of one lane, from a cursor on, without end.

    Raises DataError (from `next`) after 100 failures in a row, or when 100 shards in a row, or all of the list, yielded nothing.
    """

    index: int
    order: ShardOrder
    prepare: Callable[[RawSample, Randomness, Counts], Sample]  # raises Drop or SampleError for what is left out
    buffer_size: int  # raw samples of the shuffle buffer
    cursor: Cursor  # (0, 0) is the beginning
    counts: Counts  # of what is left out; may be shared between lanes

    def __post_init__(self) -> None:
        self._failures = 0
        self._empty_shards: set[str] = set()
        self._samples = self._run()

    def __next__(self) -> Sample:
        return next(self._samples)

    def _run(self) -> Iterator[Sample]:
        k, skip = self.cursor
        while True:
            url = self.order.url(self.index, k)
            key = (self.order.seed, self.order.kind, self.index, k)
            is_empty = skip == 0  # what is skipped was used before
            try:
                for n, raw in enumerate(shuffle(read_shard(url, self.counts), self.buffer_size, key)):
                    if n < skip or (sample := self._prepared(raw, Randomness((*key, n)), url)) is None:
                        continue
                    is_empty = False
                    self._failures = 0
                    self._empty_shards.clear()
                    self.cursor = (k, n + 1)
                    yield sample
            except SampleError as error:
                self._failed(error, url)
            if is_empty:
                self._empty_shards.add(url)
                empty, shards = len(self._empty_shards), len(set(self.order.urls))
                if empty == min(FAILURES_IN_A_ROW, shards):
                    raise DataError(
                        f"{empty} of the {shards} {self.order.kind} shards, one after another, yielded no sample; the last "
                        f"one is {url}. {self.counts.summary()}"
                    )
            k, skip = k + 1, 0

    def _prepared(self, raw: RawSample, randomness: Randomness, url: str) -> Sample | None:
        """None, and counted, where it is left out."""
        try:
            return self.prepare(raw, randomness, self.counts)
        except Drop as reason:
            self.counts.dropped[str(reason)] += 1
            self._failures = 0
        except SampleError as error:
            self._failed(error, f"{url}#{raw['__key__']}")
        except Exception as error:  # nothing that stands in one sample ends a run; a hundred in a row do
            failure = SampleError("unexpected_error", f"{type(error).__name__}: {error}")
            self._failed(failure, f"{url}#{raw['__key__']}")
        return None

    def _failed(self, error: SampleError, where: str) -> None:
        self.counts.error(error.reason, where, str(error))
        self._failures += 1
        if self._failures >= FAILURES_IN_A_ROW:
            raise DataError(f"{self._failures} {self.order.kind} samples in a row failed; the last is {where}: {error}")
