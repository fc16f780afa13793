"""What is trained with which weight decay, and the learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR


def build_optimizer(model: nn.Module, learning_rate: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW over the trained parameters: weight decay on the gated cross-attention, none elsewhere.

    The two groups, and the order within them, are those of the reference, so its optimiser states can be read.
    """
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    decayed = [parameter for name, parameter in trained if "gated_cross_attn_layer" in name]
    plain = [parameter for name, parameter in trained if "gated_cross_attn_layer" not in name]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    # Fused: one pass over all tensors; the same numbers on every run, which resuming bit for bit needs.
    return torch.optim.AdamW(groups, lr=learning_rate, fused=True)


@torch.no_grad()
def clipped_step(
    optimizer: torch.optim.Optimizer, norm: torch.Tensor, max_norm: float, scale: torch.Tensor | float = 1.0
) -> None:
    """A step on gradients divided by `scale` and clipped to a global norm of `max_norm`, in one pass over them.

    Changes neither weights nor moments where `norm` is not finite; all of it is decided on the device.

    Args:
        optimizer: a fused one of torch's.
        norm: of all gradients together, once divided by `scale`, float32 [], the same on every rank.
    """
    norm = norm.float()
    fused: Any = optimizer
    fused.grad_scale = scale * ((norm + 1e-6) / max_norm).clamp(min=1.0)  # what it divides gradients by
    fused.found_inf = (~norm.isfinite()).float()  # 1: do nothing
    try:
        optimizer.step()
    finally:
        del fused.grad_scale, fused.found_inf


def parameter_names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """The names of the optimiser's parameters, in the order of its state dict's indices."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]


def _constant(step: int, warmup: int, total: int) -> float:
    return step / warmup if step < warmup else 1.0


def _linear(step: int, warmup: int, total: int) -> float:
    if step < warmup:
        return step / warmup
    return max(0.0, (total - step) / max(1, total - warmup))


def _cosine(step: int, warmup: int, total: int) -> float:
    if step < warmup:
        return step / warmup
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(1, total - warmup))))


_SCHEDULES: dict[str, Callable[[int, int, int], float]] = {
    "constant": _constant,
    "linear": _linear,
    "cosine": _cosine,
}


def build_scheduler(
    optimizer: torch.optim.Optimizer, name: str, warmup_updates: int, total_updates: int, updates_done: int = 0
) -> LambdaLR:
    """The learning rate as a function of the number of updates done: rises linearly from 0, then `name`'s shape.

    It starts at `updates_done`, so that a resumed run needs no more than that number, and new values of the flags
    (rate, schedule, length) hold from there on.
    """
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])
    schedule = _SCHEDULES[name]
    return LambdaLR(optimizer, lambda step: schedule(step, warmup_updates, total_updates), last_epoch=updates_done - 1)
