"""What is trained with which weight decay, and the learning-rate schedules."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn


def build_optimizer(model: nn.Module, learning_rate: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW over the trained parameters: weight decay on the gated cross-attention, none elsewhere.

    The two groups, and the order within them, are those of the reference, so its optimizer states can be read.
    """
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    decayed = [parameter for name, parameter in trained if "gated_cross_attn_layer" in name]
    plain = [parameter for name, parameter in trained if "gated_cross_attn_layer" not in name]
    # `initial_lr` is for the reference, whose scheduler looks for it in a checkpoint.
    shared = {"lr": learning_rate, "initial_lr": learning_rate}
    groups = [
        {"params": decayed, "weight_decay": weight_decay, **shared},
        {"params": plain, "weight_decay": 0.0, **shared},
    ]
    # Fused: one pass over all tensors; the same numbers on every run, which resuming bit for bit needs.
    return torch.optim.AdamW(groups, fused=True)


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


def learning_rate(name: str, base: float, position: float, warmup: float, total: float) -> float:
    """The rate of the update after `position`: it rises linearly from 0 to `base`, then follows the shape `name`.

    Args:
        position, warmup, total: in updates. A position need not be whole: see `resume.Plan.schedule_position`.
    """
    if position < warmup:
        return base * position / warmup
    done = (position - warmup) / max(1, total - warmup)
    factor = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}[name]
    return base * max(0.0, factor)
