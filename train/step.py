"""One optimizer update, whole: forward, agreement of the ranks, backward, clipping, step."""

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import InitVar, dataclass, field

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from open_flamingo.loss import labeled_positions
from open_flamingo.train.data.loader import Batch, Loader
from open_flamingo.train.flops import Work
from open_flamingo.train.health import Health
from open_flamingo.train.optimizer import clipping
from open_flamingo.train.parallel import full_tensor, gradient_sync
from open_flamingo.train.precision import LossScaler, autocast

MAX_GRADIENT_NORM = 1.0
Normalization = tuple[Sequence[float], Sequence[float]] | None  # mean and std per channel that images still need


@dataclass(eq=False)
class TrainDataset:
    """A dataset: where its batches come from, and what has come since the last log line."""

    kind: str
    weight: float  # of its loss
    loader: Loader | None  # None where batches come from elsewhere, as in validation
    normalization: InitVar[Normalization]
    device: torch.device
    dropped: Counter[str] = field(default_factory=Counter)  # on purpose, by reason, since the program started
    errors: Counter[str] = field(default_factory=Counter)
    last: Batch | None = None  # whose cursors the next checkpoint stores

    def __post_init__(self, normalization: Normalization) -> None:
        self._mean_std = normalization and [torch.tensor(v, device=self.device).view(3, 1, 1) for v in normalization]
        self.reset()

    def reset(self) -> None:
        """Start a new span of logging."""
        self.loss = 0.0  # of all ranks together, summed over `forwards`
        self.forwards = self.samples = self.positions = 0  # of this rank; positions: of tokens and padding
        self.work = Work()
        self.seconds_waited = 0.0  # for batches

    def next_batch(self) -> Batch:
        start = time.perf_counter()
        assert self.loader is not None
        batch = next(self.loader)
        self.seconds_waited += time.perf_counter() - start
        self.dropped.update(batch.dropped)
        self.errors.update(batch.errors)
        self.samples += len(batch.keys)
        self.positions += batch.input_ids.numel()
        self.work = self.work.plus(batch.work)
        self.last = batch
        return batch

    def close(self) -> None:
        """Stop the loader's workers."""
        if self.loader is not None:
            self.loader.close()

    def images(self, batch: Batch) -> torch.Tensor:
        """The images of `batch` as the vision encoder takes them: float32 [B, N, 3, H, W], on the device."""
        images = batch.images.to(self.device, non_blocking=True)
        if self._mean_std is not None:  # sent as bytes, a quarter of the floats
            mean, std = self._mean_std
            images = (images.float() / 255 - mean) / std
        return images


@dataclass
class Trainer:
    """What an update works on, and what is to be logged of it."""

    model: nn.Module  # wrapped by `parallelize`
    optimizer: torch.optim.Optimizer
    datasets: Sequence[TrainDataset]
    precision: str = "fp32"
    accumulation: int = 1
    scaler: LossScaler | None = None  # for fp16
    reduce_gradients: Callable[[], None] = lambda: None  # where the pass that should have averaged them was left out
    parts: dict[str, list[nn.Parameter]] = field(default_factory=dict)  # what is trained, see `model_parts`
    part_norms: dict[str, torch.Tensor] = field(default_factory=dict)  # of the last gradient that is logged
    clipped: torch.Tensor | float = 0.0  # updates whose gradient was clipped, since the last log line
    seconds: list[float] = field(default_factory=list)  # of each update since then


def model_parts(model: nn.Module, trained: bool) -> dict[str, list[nn.Parameter]]:
    """The parameters of a Flamingo that are trained, or those that are not, by part."""
    parts: dict[str, list[nn.Parameter]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad == trained:
            part = {"vision_encoder": "vision_encoder", "perceiver": "resampler"}.get(
                name.split(".")[0], "language_model"
            )
            if "gated_cross_attn" in name:
                part = "cross_attention"
            elif trained and part == "language_model":
                part = "new_rows"
            parts[part].append(parameter)
    return dict(parts)


def part_sizes(model: nn.Module) -> Iterator[tuple[str, dict[str, int]]]:
    """("trained", its parameters by part), then ("frozen", …)."""
    for title, trained in (("trained", True), ("frozen", False)):
        parts = model_parts(model, trained)
        yield title, {part.replace("_", " "): sum(p.numel() for p in of) for part, of in parts.items()}


def train_step(
    trainer: Trainer, learning_rate: float, health: Health | None = None, is_logged: bool = False
) -> torch.Tensor | None:
    """Train on `accumulation` batches of each dataset; gradients are averaged over the ranks once, clipped once, applied once.

    The loss of a forward pass is the mean over the labeled tokens of all ranks together. A batch whose loss is not finite on any rank is
    left out on all, and an update whose gradient norm is not finite changes no weight; either counts as done in data and schedule.
    Returns the global gradient norm before clipping, float32 [], on the device; None if every batch was left out.
    """
    began = time.perf_counter()
    trainer.part_norms = {}
    health = health or Health()  # of this process alone
    model, optimizer, scaler = trainer.model, trainer.optimizer, trainer.scaler
    scale = 1.0 if scaler is None else scaler.scale
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    backwards, reduced = 0, False
    for micro_step in range(trainer.accumulation):
        for dataset in trainer.datasets:
            is_last = micro_step == trainer.accumulation - 1 and dataset is trainer.datasets[-1]
            health.set_phase(f"loading {dataset.kind} data")
            batch = dataset.next_batch()
            health.before_forward(dataset.kind, batch)
            with gradient_sync(model, enabled=is_last):
                with autocast(trainer.precision, dataset.device):
                    loss = compute_loss(model, dataset, batch)
                agreed = health.agree(dataset.kind, batch, loss)
                if agreed is None:  # not finite
                    continue
                mean_loss, share = agreed
                (loss * (dataset.weight / trainer.accumulation * share) * scale).backward()
            backwards, reduced = backwards + 1, is_last
            dataset.loss += mean_loss
            dataset.forwards += 1

    gradient_norm = None
    if backwards:
        if not reduced:
            trainer.reduce_gradients()
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        gradient_norm = _gradient_norm(parameters) / scale
        if is_logged:
            trainer.part_norms = {part: _gradient_norm(of) / scale for part, of in trainer.parts.items()}
        trainer.clipped = trainer.clipped + ((gradient_norm > MAX_GRADIENT_NORM) & gradient_norm.isfinite())
        with clipping(optimizer, gradient_norm, MAX_GRADIENT_NORM, scale):
            optimizer.step()
        if scaler is not None:
            scaler.update(gradient_norm)
    # Under DDP zeroed, not freed: there the gradients are views of its buckets, and fresh ones would be held beside those.
    optimizer.zero_grad(set_to_none=not isinstance(model, DistributedDataParallel))
    health.end(gradient_norm, overflow_is_normal=scaler is not None)
    trainer.seconds.append(time.perf_counter() - began)
    return gradient_norm


def _gradient_norm(parameters: list[nn.Parameter]) -> torch.Tensor:
    """Of all of them together, float32 []. All ranks must call this."""
    return full_tensor(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])).float()


def compute_loss(model: nn.Module, dataset: TrainDataset, batch: Batch, per_token: bool = False) -> torch.Tensor:
    """The unweighted loss of one batch, float32 []; `per_token` (without gradients): of each token that counts."""
    return model(
        vision_x=dataset.images(batch).unsqueeze(2),  # the reference's frame axis: [B, N, 1, 3, H, W]
        # No attention mask: padding is on the right, where causal attention never looks, and kernels without a mask are the fast ones.
        lang_x=batch.input_ids.to(dataset.device, non_blocking=True),
        labels=labeled_positions(batch.labels, dataset.device),  # picked here, without waiting for the device
        image_counts=batch.image_counts,
        per_token=per_token,
    ).loss
