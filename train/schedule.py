"""How long a run is, how far it is, and the learning rate there. All counted in samples: a resumed run may have other ranks."""

import argparse
import math
from dataclasses import dataclass, field, replace
from typing import Self


@dataclass(frozen=True)
class Progress:
    """How far a run is."""

    step: int = 0  # updates done, of whatever size; it never goes back
    epoch: int = 0  # epochs finished
    samples: dict[str, int] = field(default_factory=dict)  # of each dataset since then, all ranks together


@dataclass(frozen=True)
class Plan:
    """The length of a run, and its learning rate schedule. Samples are counted per dataset, all ranks together."""

    samples_per_update: dict[str, int]
    samples_per_epoch: dict[str, int]  # of the flags; an epoch is as many whole updates as fit, at least one
    num_epochs: int
    schedule_unit: dict[str, int]  # samples_per_update of the run's start, in which warm-up and schedule are counted
    learning_rate: float = 1e-4
    lr_scheduler: str = "constant"
    warmup_steps: int = 0

    @classmethod
    def from_flags(cls, args: argparse.Namespace, world_size: int) -> Self:
        kinds = [kind for kind in ("laion", "mmc4") if getattr(args, f"{kind}_shards") is not None]
        batches_per_update = world_size * args.gradient_accumulation_steps
        sizes = {kind: getattr(args, f"batch_size_{kind}") * batches_per_update for kind in kinds}
        samples = {kind: getattr(args, f"train_num_samples_{kind}") for kind in kinds}
        return cls(sizes, samples, args.num_epochs, sizes, args.learning_rate, args.lr_scheduler, args.warmup_steps)

    @property
    def updates_per_epoch(self) -> int:
        return max(1, min(self.samples_per_epoch[kind] // size for kind, size in self.samples_per_update.items()))

    def _updates_left_in_epoch(self, progress: Progress) -> int:
        kind, size = next(iter(self.samples_per_update.items()))
        return max(1, self.updates_per_epoch - -(-progress.samples.get(kind, 0) // size))

    def updates_left(self, progress: Progress) -> int:
        """Of the whole run; 0 once it has finished."""
        epochs = self.num_epochs - progress.epoch
        return 0 if epochs <= 0 else (epochs - 1) * self.updates_per_epoch + self._updates_left_in_epoch(progress)

    def after_update(self, progress: Progress) -> Progress:
        if self._updates_left_in_epoch(progress) == 1:
            return Progress(progress.step + 1, progress.epoch + 1)
        samples = {kind: progress.samples.get(kind, 0) + size for kind, size in self.samples_per_update.items()}
        return Progress(progress.step + 1, progress.epoch, samples)

    def epochs_done(self, progress: Progress) -> float:
        left = self._updates_left_in_epoch(progress) / self.updates_per_epoch if progress.samples else 1.0
        return round(progress.epoch + 1 - left, 4)

    def rate_after(self, progress: Progress) -> float:
        """The learning rate of the update that follows `progress`."""
        kind, unit = next(iter(self.schedule_unit.items()))
        per_epoch = replace(self, samples_per_update=self.schedule_unit).updates_per_epoch
        position = progress.epoch * per_epoch + progress.samples.get(kind, 0) / unit
        total = self.num_epochs * per_epoch
        return learning_rate(self.lr_scheduler, self.learning_rate, position, self.warmup_steps, total)


def learning_rate(name: str, base: float, position: float, warmup: float, total: float) -> float:
    """The rate of the update after `position`: it rises linearly from 0 to `base`, then follows the shape `name`. All are counted in
    updates of `Plan.schedule_unit`; a position need not be whole."""
    if position < warmup:
        return base * position / warmup
    done = (position - warmup) / max(1, total - warmup)
    factor = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}[name]
    return base * max(0.0, factor)
