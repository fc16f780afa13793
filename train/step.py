"""One optimizer update."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import nn

from open_flamingo.loss import labelled_positions
from open_flamingo.train.data.loader import Batch, Loader
from open_flamingo.train.health import Health
from open_flamingo.train.optimizer import clipped_step
from open_flamingo.train.parallel import gradient_sync
from open_flamingo.train.precision import LossScaler, autocast
from open_flamingo.weights import whole

MAX_GRADIENT_NORM = 1.0


class Source:
    """One of the datasets, as the loop sees it: where batches come from, and what has come since the last log line.

    Args:
        kind: "laion" or "mmc4".
        weight: of its loss.
        loader: its batches.
        normalization: mean and standard deviation of each channel that images still need, None if they need none.
        device: where the model is.
    """

    def __init__(
        self,
        kind: str,
        weight: float,
        loader: Loader,
        normalization: tuple[Sequence[float], Sequence[float]] | None,
        device: torch.device,
    ) -> None:
        self.kind = kind
        self.weight = weight
        self.loader = loader
        self.device = device
        self._normalization = None
        if normalization is not None:
            mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in normalization)
            self._normalization = mean, std
        self.dropped: Counter[str] = Counter()  # on purpose, by reason, since the program started
        self.errors: Counter[str] = Counter()
        self.last: Batch | None = None  # whose cursors the next checkpoint stores
        self.loss = 0.0  # of all ranks together, summed over `forwards`
        self.forwards = self.samples = 0  # of this rank
        self.seconds_waited = 0.0  # for batches

    def next_batch(self) -> Batch:
        start = time.perf_counter()
        batch = next(self.loader)
        self.seconds_waited += time.perf_counter() - start
        self.dropped.update(batch.dropped)
        self.errors.update(batch.errors)
        self.samples += len(batch.keys)
        self.last = batch
        return batch

    def reset(self) -> None:
        """Starts a new span of logging."""
        self.loss = 0.0
        self.forwards = self.samples = 0
        self.seconds_waited = 0.0

    def images(self, batch: Batch) -> torch.Tensor:
        """The images of `batch` as the vision encoder takes them: float32 [B, N, 3, H, W], on the device."""
        images = batch.images.to(self.device, non_blocking=True)
        if self._normalization is not None:  # sent as bytes, a quarter of the floats
            mean, std = self._normalization
            images = (images.float() / 255 - mean) / std
        return images


def loss_of(model: nn.Module, batch: Batch, source: Source, precision: str) -> torch.Tensor:
    """The unweighted loss of one batch, float32 []."""
    device = source.device
    with autocast(precision, device):
        return model(
            vision_x=source.images(batch).unsqueeze(2),  # the reference's frame axis: [B, N, 1, 3, H, W]
            lang_x=batch.input_ids.to(device, non_blocking=True),
            # No attention mask: padding is on the right, where causal attention never looks, and the kernels for causal
            # attention without a mask are the fast ones.
            labels=labelled_positions(batch.labels, device),  # picked here, without waiting for the device
            image_counts=batch.image_counts,
        ).loss


def train_update(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    learning_rate: float,
    sources: list[Source],
    accumulation: int,
    precision: str,
    scaler: LossScaler | None = None,
    health: Health | None = None,
    synchronise: Callable[[], None] | None = None,
) -> torch.Tensor | None:
    """Trains on `accumulation` batches of each source; one synchronisation, one clipping, one step of the optimizer.

    The loss of a forward pass is the mean over the labeled tokens of all ranks together: each rank's own mean counts by its share
    of them. So the ranks compute what one rank would of the global batch, to float32 rounding.

    Each backward pass follows its forward, so only one batch's activations are held at a time. A batch whose loss is
    not finite on any rank is left out on all, and an update whose gradient norm is not finite changes no weight; either
    counts as done: its samples are behind it, and the schedule has moved on.

    Args:
        learning_rate: of this update.
        scaler: for --precision fp16.
        health: what the ranks agree on; by default of this process alone.
        synchronise: averages the gradients over the ranks without adding to them, where the pass that should have done
            it was left out.

    Returns:
        the global gradient norm before clipping, float32 [], on the device; not finite where the update was skipped;
        None where every batch was left out
    """
    health = health or Health()
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    used = synchronised = False
    for micro in range(accumulation):
        for source in sources:
            last = micro == accumulation - 1 and source is sources[-1]
            health.at(f"loading {source.kind} data")
            batch = source.next_batch()
            health.before_forward(source.kind, batch)
            with gradient_sync(model, synchronise=last):
                loss = loss_of(model, batch, source, precision)
                agreed = health.agree(source.kind, batch, loss)
                if agreed is None:
                    continue
                weighted = loss * (source.weight / accumulation * agreed.weight)
                (weighted if scaler is None else weighted * scaler.scale).backward()
            used, synchronised = True, last
            source.loss += agreed.loss
            source.forwards += 1
    gradient_norm = None
    if used:
        if not synchronised and synchronise is not None:
            synchronise()
        gradient_norm = whole(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
        if scaler is None:
            clipped_step(optimizer, gradient_norm, MAX_GRADIENT_NORM)
        else:
            gradient_norm = scaler.step(optimizer, gradient_norm, MAX_GRADIENT_NORM)
    # Zeroed, not freed: under DDP the gradients are views of its buckets, and fresh ones would be held beside those.
    optimizer.zero_grad(set_to_none=False)
    health.end(gradient_norm, overflow_is_normal=scaler is not None)
    return gradient_norm
