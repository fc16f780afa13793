"""Training on a CPU, faster, for as long as a `with fast_kernels(...)` lasts.

Two of torch's operators are slow there, and are given another kernel of what torch itself is made of:

- float32 products. torch leaves them to MKL, which takes a slow path on CPUs that are not Intel's. oneDNN, which torch uses for
  bfloat16 and which comes with it, has no such favourite: on an AMD EPYC (Zen 5, 2 cores), 0.45 against 0.20 TFLOP/s.
- bfloat16 attention of short sequences. torch's fused kernel works in small tiles; products of whole matrices take a half to a
  fifth of its time, mostly in the backward pass, and the attention weights that they keep are small.

`python -m benchmarks small` shows what that makes of an update. The kernels are replaced below autograd in torch's
dispatcher, so it does not matter whose code calls them.

And the C library is told to keep memory that is freed (`keep_freed_memory`).
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
MAX_ATTENTION_WEIGHTS = 2**23
"""Of a call, all rows and heads together: 16 MiB in bfloat16, kept for the backward pass. Longer texts take torch's kernel."""


@contextmanager
def fast_kernels(device: torch.device, precision: str, compiled: bool = False) -> Iterator[None]:
    """Within this `with`, `linear` and `scaled_dot_product_attention` are the faster ones, where they are.

    Args:
        device: of the training; nothing happens on a GPU.
        precision: --precision.
        compiled: whether the model is compiled: the compiler chooses its own kernels.
    """
    with ExitStack() as stack:
        if device.type == "cpu":
            keep_freed_memory()
        if device.type == "cpu" and not compiled and torch.backends.mkldnn.is_available():
            library = torch.library.Library("aten", "IMPL")
            stack.callback(library._destroy)
            if precision == "fp32" and mkl_is_slow() and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
                library.impl("linear", _linear, "AutogradCPU")
                # One kernel for a whole layer in eval mode, which calls MKL in itself.
                stack.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
                torch.backends.mha.set_fastpath_enabled(False)
            elif precision in ("amp_bf16", "amp_bfloat16", "bf16"):
                library.impl("scaled_dot_product_attention", _attention, "AutogradCPU")
        yield


def keep_freed_memory() -> None:
    """Has glibc keep what is freed for what is asked for next, until the process ends.

    It would give large blocks back to the system, and the activations of the next pass would be taken anew, zeroed page by page:
    some 10 % of an update of `python -m benchmarks small --precision amp_bf16`. The most that is held at once stays the same.
    Other C libraries are left as they are.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    # Larger blocks are maps of their own. Old versions of glibc allow no more than the second.
    mallopt(M_MMAP_THRESHOLD, 2**30) or mallopt(M_MMAP_THRESHOLD, 2**25)


def mkl_is_slow() -> bool:
    """Whether torch uses MKL on a CPU that is not Intel's."""
    if not torch.backends.mkl.is_available():
        return False
    try:
        return "GenuineIntel" not in Path("/proc/cpuinfo").read_text()
    except OSError:
        return "Intel" not in platform.processor()


# ---------------------------------------------------------------------------------------------------------------------
# float32 products


def _product(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """left [M, K] @ right.T [K, N] + bias, by oneDNN."""
    return torch.ops.mkldnn._linear_pointwise(left, right, bias, "none", [], "")


class _OneDNNLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        needs_x, needs_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        of_x = None if weight is None else _product(gradient, weight.t())
        of_weight = None if x is None else _product(gradient.t(), x.t())
        of_bias = gradient.sum(0) if ctx.needs_input_grad[2] else None
        return of_x, of_weight, of_bias


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if not (x.dtype == weight.dtype == torch.float32 and weight.ndim == 2 and x.numel() > 0):
        return torch.ops.aten.linear.default.decompose(x, weight, bias)
    return _OneDNNLinear.apply(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], len(weight))


# ---------------------------------------------------------------------------------------------------------------------
# bfloat16 attention


class _PlainAttention(torch.autograd.Function):
    """softmax(query · keyᵀ · scale) · value, of [M, T, K], [M, S, K] and [M, S, K]; `bias` is added to the scores."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float) -> Tensor:
        scores = torch.baddbmm(bias, query, key.transpose(1, 2), alpha=scale)
        weights = torch.softmax(scores, -1)
        ctx.scale = scale
        ctx.save_for_backward(query, key, value, weights)
        return torch.bmm(weights, value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, weights = ctx.saved_tensors
        of_value = torch.bmm(weights.transpose(1, 2), gradient)
        of_weights = torch.bmm(gradient, value.transpose(1, 2))
        of_scores = torch.ops.aten._softmax_backward_data(of_weights, weights, -1, weights.dtype).mul_(ctx.scale)
        return torch.bmm(of_scores, key), torch.bmm(of_scores.transpose(1, 2), query), of_value, None, None


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    plain = (
        query.dtype == key.dtype == value.dtype == torch.bfloat16
        and query.ndim == key.ndim == value.ndim == 4
        and query.shape[:2] == key.shape[:2]
        and (attn_mask is None or (attn_mask.dtype == torch.bool and attn_mask.ndim == 4 and attn_mask.shape[1] == 1))
        and dropout_p == 0
        and query.shape[:3].numel() * key.shape[2] <= MAX_ATTENTION_WEIGHTS
        # torch gives 0 for a query that sees nothing, and a plain softmax what is no number.
        and (attn_mask is None or bool(attn_mask.any(-1).all()))
    )
    if not plain:
        return torch.ops.aten.scaled_dot_product_attention.default.decompose(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    batch, heads, length, width = query.shape
    bias = query.new_zeros(())
    if attn_mask is not None:  # [B or 1, 1, T, S]
        bias = bias.where(attn_mask, float("-inf")).expand(batch, heads, -1, -1).flatten(0, 1)
    elif is_causal:
        bias = query.new_full((length, key.shape[2]), float("-inf")).triu_(1)
    parts = (part.flatten(0, 1) for part in (query, key, value))
    return _PlainAttention.apply(*parts, bias, width**-0.5 if scale is None else scale).unflatten(0, (batch, heads))
