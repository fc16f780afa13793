"""The first samples of a run, through its ordinary loader, with what became of each raw sample: for `--preview` and `--dry_run`.

Nothing of the rules is repeated here: the preparers' own parts are watched.
"""

import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from open_flamingo.train.data.images import ImagePreparer, image_size
from open_flamingo.train.data.lanes import Randomness
from open_flamingo.train.data.loader import Batch, build_loader, build_preparer, collate
from open_flamingo.train.data.mmc4 import Matches, Mmc4Preparer
from open_flamingo.train.data.options import DataOptions
from open_flamingo.train.data.samples import Counts, DataError, Drop, RawSample, Sample, SampleError
from open_flamingo.train.data.text import TextEncoder

SAMPLES, SECONDS = 1000, 15.0  # raw samples that are read for the figures, and how long
EXAMPLES = 3  # of each reason


class Enough(BaseException):
    """Ends the reading of samples of which too few can be used. No Exception: to the loader that would be a sample's own error."""


def where(raw: RawSample) -> str:
    """`shard-url#sample-key`, as in `Sample`."""
    return f"{raw['__url__']}#{raw['__key__']}"


@dataclass
class Seen:
    """A raw sample and what became of it."""

    raw: RawSample
    sample: Sample | None = None  # None where it is left out
    reason: str = ""  # why it is left out
    message: str = ""  # more of that
    parts: list[str] = field(default_factory=list)  # of its text; none where it did not come that far
    matches: Matches | None = None  # of images and sentences, those under the threshold too
    sizes: list[tuple[int, int]] = field(default_factory=list)  # (width, height) of each image that was decoded
    flips: list[bool] = field(default_factory=list)  # whether it is mirrored


@dataclass
class Figures:
    """Of all samples that were read."""

    tokens: list[int] = field(default_factory=list)  # of each that is used
    images: list[int] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)  # of their images
    similarities: list[float] = field(default_factory=list)  # of all matches, also of samples that are left out


@dataclass
class FirstSamples:
    """What a rank begins with in one dataset."""

    options: DataOptions
    rows: list[tuple[Seen, Batch, int]]  # each with its batch, and its row there
    read: int  # raw samples that were read
    left_out: dict[str, list[Seen]]  # a few of each reason
    figures: Figures
    counts: Counter[str]  # what is left out, by reason
    errors: dict[str, str]  # the first error of each reason that is one
    problem: str = ""  # why there are fewer rows than were asked for


class WatchedPreparer:
    """The preparer that `options` describe, with its answers, and what it did. Keeps the first `number` samples and some that are left out."""

    def __init__(self, options: DataOptions, tokenizer: Any, image_processor: Any, number: int) -> None:
        prepare = build_preparer(options, tokenizer, image_processor)
        watch = self

        class WatchedImages(ImagePreparer):
            def __call__(self, data: bytes, flip: bool = False) -> np.ndarray:
                pixels = super().__call__(data, flip)
                watch._seen.sizes.append(image_size(data))
                watch._seen.flips.append(flip)
                return pixels

        class WatchedEncoder(TextEncoder):
            def __call__(self, parts: list[str]) -> list[int]:
                watch._seen.parts = parts
                return super().__call__(parts)

        prepare.prepare_image = WatchedImages(image_processor, options.max_image_pixels)
        self.encode: TextEncoder = WatchedEncoder(tokenizer, prepare.encode.max_tokens)
        prepare.encode = self.encode
        if isinstance(prepare, Mmc4Preparer):
            self._match, prepare.match = prepare.match, self._watched_match
        self._prepare = prepare
        self._number = number
        self._seen = Seen({})
        self._began = 0.0
        self.least = max(SAMPLES, 10 * number, 10 * options.batch_size)
        self.read = 0
        self.used: list[Seen] = []
        self.left_out: dict[str, list[Seen]] = defaultdict(list)
        self.figures = Figures()
        self.counts = Counts()

    def _watched_match(self, similarity: Any, usable: list[int]) -> Matches:
        self._seen.matches = matches = self._match(similarity, usable)
        self.figures.similarities += matches.similarities.tolist()
        return matches

    @property
    def has_enough(self) -> bool:
        """Whether no more should be read than is needed."""
        return self.read >= SAMPLES or (self.read > 0 and time.monotonic() - self._began > SECONDS)

    def __call__(self, raw: RawSample, randomness: Randomness, counts: Counts) -> Sample:
        """Raises Enough where `number` samples are not to be found in a bearable time."""
        self._began = self._began or time.monotonic()
        if self.read >= self.least and time.monotonic() - self._began > SECONDS:
            raise Enough
        self.read += 1
        self.counts = counts
        self._seen = seen = Seen(raw)
        try:
            seen.sample = self._prepare(raw, randomness, counts)
        except Exception as error:
            reason = error.reason if isinstance(error, SampleError) else "unexpected_error"  # as `Lane` counts it
            seen.reason = str(error) if isinstance(error, Drop) else reason
            seen.message = "" if isinstance(error, Drop) else str(error)
            examples = self.left_out[seen.reason]
            if len(examples) < EXAMPLES and where(raw) not in {where(other.raw) for other in examples}:
                examples.append(seen)
            raise
        self.figures.tokens.append(len(seen.sample.input_ids))
        self.figures.images.append(len(seen.sample.images))
        self.figures.sizes += seen.sizes
        if len(self.used) < self._number:
            self.used.append(seen)
        return seen.sample


def read_first(options: DataOptions, tokenizer: Any, image_processor: Any, number: int) -> FirstSamples:
    """The first `number` samples of the rank that `options` name, and the figures of those that follow."""
    watched = WatchedPreparer(options, tokenizer, image_processor, number)
    # The order does not depend on the workers; here all samples must pass through this process.
    options = replace(options, workers=0)
    first = FirstSamples(options, [], 0, watched.left_out, watched.figures, Counter(), {})
    batches: list[Batch] = []
    rows = 0
    try:
        with build_loader(options, tokenizer, image_processor, prepare=watched) as loader:
            while rows < number or not watched.has_enough:
                batch = next(loader)
                first.counts.update(batch.dropped)
                first.counts.update(batch.errors)
                if rows < number:
                    batches.append(batch)
                    rows += len(batch.keys)
    except (DataError, Enough) as error:
        first.problem = str(error)
    if len(watched.used) > rows:  # of a batch that did not become whole
        batches.append(
            collate([seen.sample for seen in watched.used[rows:] if seen.sample], options.kind, watched.encode)
        )
    first.counts += watched.counts.dropped + watched.counts.errors  # since the last batch
    first.errors, first.read = watched.counts.examples, watched.read
    places = [(batch, row) for batch in batches for row in range(len(batch.keys))]
    first.rows = [(seen, *place) for seen, place in zip(watched.used, places)]
    if len(first.rows) < number and not first.problem:
        first.problem = f"only {len(first.rows)} of the first {watched.read:,} samples can be used"
    return first
