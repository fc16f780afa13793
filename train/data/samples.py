"""What flows through the loader, and the two ways a sample can fail to."""

import logging
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

logger = logging.getLogger(__name__)

RawSample = dict[str, Any]  # suffix → bytes of a sample's files; "__key__", "__url__" (of its shard)


class Drop(Exception):
    """This sample is left out on purpose; the argument is the reason, a short name that is counted."""


class SampleError(Exception):
    """This sample, or shard, is broken. `reason` is a short name that is counted, `message` says more."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(f"{reason}: {message}")
        self.reason = reason


class DataError(RuntimeError):
    """The data is too broken to go on; the message names a shard."""


def check_suffixes(raw: RawSample, looked_for: tuple[str, ...]) -> None:
    """For a sample that lacks a file. Raises SampleError where a longer suffix than those of `looked_for` ends in one of them.

    As in WebDataset, a file's key ends at the first dot of its name: all that follows is the suffix.
    """
    for suffix in raw:
        if suffix.endswith(tuple(f".{known}" for known in looked_for)):
            raise SampleError(
                "unknown_suffix",
                f"{raw['__key__']}.{suffix} has the suffix {suffix!r}, as a suffix begins at the first dot of a name; looked for are "
                f"{', '.join(looked_for)}: rename the files so that there is one dot in each",
            )


@dataclass
class Sample:
    """One caption or document, ready to be batched."""

    images: list[np.ndarray]  # each as `ImagePreparer` gives it, in the order of the `<image>` tokens
    input_ids: list[int]  # without padding, at most as many as its kind allows
    key: str  # `shard-url#sample-key`


@dataclass
class Counts:
    """What did not become a sample, by reason: `dropped` on purpose, `errors` because something is broken."""

    dropped: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)  # the first error of each reason

    def error(self, reason: str, where: str, message: str) -> None:
        """Counts an error. The first of each reason is also logged, so that there is one to look at."""
        self.errors[reason] += 1
        if reason not in self.examples:
            self.examples[reason] = f"{where}: {message}"
            logger.warning("left out %s: %s (others of this kind are only counted)", where, message)

    def summary(self) -> str:
        """The counts, and an example of the most frequent error."""
        text = f"Left out so far: {dict(self.dropped)}, broken: {dict(self.errors)}"
        if self.errors:
            text += f", for example {self.examples[self.errors.most_common(1)[0][0]]}"
        return text

    def take(self) -> "Counts":
        """The counts since the last `take`."""
        taken = Counts(self.dropped, self.errors)
        self.dropped, self.errors = Counter(), Counter()
        return taken
