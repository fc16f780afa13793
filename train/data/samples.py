"""What flows through the loader, and the two ways a sample can fail to."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


class Drop(Exception):
    """This sample is left out on purpose; the argument is the reason, a short name that is counted."""


class SampleError(Exception):
    """This sample, or shard, is broken. `reason` is a short name that is counted, `message` says more."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(f"{reason}: {message}")
        self.reason = reason


class DataError(RuntimeError):
    """The data is too broken to go on; the message names a shard."""


@dataclass
class Sample:
    """One caption or document, ready to be batched.

    Attributes:
        images: each uint8 [3, H, W], or float32 and normalised if the image processor is not a standard one, in the order
            of the `<image>` tokens of `input_ids`.
        input_ids: at most the longest text its kind allows, without padding.
        key: `shard-url#sample-key`.
    """

    images: list[np.ndarray]
    input_ids: list[int]
    key: str
