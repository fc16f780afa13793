"""Where the time of a step goes: a pass of its own, as looking at it costs time."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PARTS = (
    "data wait",
    "vision",
    "resampler",
    "language model forward",
    "language model backward",
    "optimizer",
    "rest",
)
"""resampler: forward and backward. language model: with gated cross-attention, head and loss; embeddings too. rest: labels,
masks, copies to the device, clipping."""


class Parts:
    """Seconds by part. `mark(part)` says what the time since the last mark went to."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._device = device
        self._last = self._now()
        self._in_backward = False

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def mark(self, part: str) -> None:
        now = self._now()
        self.seconds[part] += now - self._last
        self._last = now

    @contextmanager
    def watching(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
        """Marks the forward passes of `model` and of its `perceiver`, all backward passes, and the optimizer's steps."""
        perceiver = model.get_submodule("perceiver")
        original = Tensor.backward

        def after_perceiver(module: nn.Module, args: Any, latents: Tensor) -> None:
            self.mark("resampler")
            if latents.requires_grad and not self._in_backward:  # not where its forward is repeated in backward
                latents.register_hook(lambda gradient: self.mark("language model backward"))

        def backward(tensor: Tensor, *args: Any, **kwargs: Any) -> None:
            self.mark("rest")
            self._in_backward = True
            original(tensor, *args, **kwargs)
            self._in_backward = False
            self.mark("resampler")  # what follows the gradient of its latents

        with ExitStack() as stack:
            for handle in (
                model.register_forward_pre_hook(lambda *_: self.mark("rest")),
                model.register_forward_hook(lambda *_: self.mark("language model forward")),
                perceiver.register_forward_pre_hook(lambda *_: self.mark("rest")),
                perceiver.register_forward_hook(after_perceiver),
                optimizer.register_step_pre_hook(lambda *_: self.mark("rest")),
                optimizer.register_step_post_hook(lambda *_: self.mark("optimizer")),
            ):
                stack.callback(handle.remove)
            stack.enter_context(patch.object(Tensor, "backward", backward))
            self._last = self._now()
            yield
            self.mark("rest")

    def vision(self, function: Any) -> Any:
        """`function`, its time marked as vision."""

        def marked(*args: Any, **kwargs: Any) -> Any:
            self.mark("rest")
            result = function(*args, **kwargs)
            self.mark("vision")
            return result

        return marked

    def data(self, loader: Any) -> Iterator[Any]:
        """The items of `loader`, the time to get them marked as data wait."""
        iterator = iter(loader)
        while True:
            self.mark("rest")
            try:
                item = next(iterator)
            except StopIteration:
                return
            self.mark("data wait")
            yield item

    def each(self, steps: int) -> dict[str, float]:
        """Seconds a step, by part."""
        return {part: self.seconds[part] / steps for part in PARTS}


def peak_memory(device: torch.device) -> int:
    """Bytes: on a GPU, the most that tensors have held; on the CPU, the process's largest resident size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large square matrix product on random numbers: the best of several, as a ceiling must be."""
    size, rounds = (8192, 20) if device.type == "cuda" else (2048, 12)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(rounds):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        F.linear(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def loading_rate(batches: Iterator[tuple[list[int], Tensor]], skip: int, seconds: float) -> dict[str, float]:
    """How fast a loader is, after its first `skip` batches, which were waiting ready or took its start.

    Args:
        batches: images of each row, and the attention mask.
        skip: batches that do not count.
        seconds: for how long to take batches.

    Returns:
        samples_per_second, and images and tokens of a sample, so that two loaders can be seen to do the same.
    """
    for _ in range(skip):
        next(batches)
    samples = images = tokens = 0
    start = time.perf_counter()
    while time.perf_counter() - start < seconds:
        counts, mask = next(batches)
        samples += len(counts)
        images += sum(counts)
        tokens += int(mask.sum())
    elapsed = time.perf_counter() - start
    return {"samples_per_second": samples / elapsed, "images": images / samples, "tokens": tokens / samples}
