"""AdamW over what is trained, and clipping within its step."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def build_optimizer(model: nn.Module, learning_rate: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW over the trained parameters: weight decay on the gated cross-attention, none elsewhere. The two groups, and the order
    within them, are those of the reference, so its optimizer states can be read."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    decayed = [parameter for name, parameter in trained.items() if "gated_cross_attn_layer" in name]
    plain = [parameter for name, parameter in trained.items() if "gated_cross_attn_layer" not in name]
    # `initial_lr` is for the reference, whose scheduler looks for it in a checkpoint.
    rates = {"lr": learning_rate, "initial_lr": learning_rate}
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    # Fused: one pass over all tensors; the same numbers on every run, which resuming bit for bit needs.
    return torch.optim.AdamW([group | rates for group in groups], fused=True)


@contextmanager
def clipping(optimizer: torch.optim.Optimizer, norm: Tensor, max_norm: float, scale: Tensor | float) -> Iterator[None]:
    """Within this `with`, `optimizer.step()` divides gradients by `scale` and clips them to a global norm of `max_norm`, in its own
    pass over them; where `norm` is not finite it changes neither weights nor moments. All of it is decided on the device, by the
    protocol between torch.amp.GradScaler and fused optimizers.

    `norm` is that of all gradients together, once divided by `scale`, float32 [], the same on every rank.
    """
    fused: Any = optimizer
    fused.grad_scale = scale * ((norm + 1e-6) / max_norm).clamp(min=1.0)  # what it divides gradients by
    fused.found_inf = (~norm.isfinite()).float()  # 1: do nothing
    try:
        yield
    finally:
        del fused.grad_scale, fused.found_inf


def trained_parameters(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, nn.Parameter]:
    """The optimizer's parameters by name, in the order of its state dict's indices."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(parameter)]: parameter for group in optimizer.param_groups for parameter in group["params"]}
