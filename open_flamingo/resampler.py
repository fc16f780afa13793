"""Perceiver resampler: any number of patch tokens → a fixed number of latents per image.

After Flamingo (Alayrac et al. 2022, section 3.1.1). Module names are open-flamingo 2.0.1's, so its weights load.

Dimensions: B batch, N images, F frames, V patch tokens, L latents, D width, H heads, K width of a head.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

HEADS = 8
ATTENTION_WIDTH = HEADS * 64  # H·K of both kinds of attention, whatever D is


class FeedForward(nn.Sequential):
    """Pre-norm feed-forward D → 4·D → D without biases, as in both trained parts of the model."""

    def __init__(self, dim: int) -> None:
        widen, narrow = nn.Linear(dim, 4 * dim, bias=False), GeluLinear(4 * dim, dim, bias=False)
        super().__init__(nn.LayerNorm(dim), widen, nn.Identity(), narrow)  # the names of parameters are their places


class GeluLinear(nn.Linear):
    """`linear(gelu(x))`."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():  # the compiler decides what it keeps
            return super().forward(F.gelu(x))
        return _GeluLinear.apply(x, self.weight.to(x.dtype))


class _GeluLinear(torch.autograd.Function):
    """`linear(gelu(hidden), weight)` that keeps only `hidden` for the backward pass: autograd would keep gelu's result, as wide, too."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        return F.linear(F.gelu(hidden), weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        hidden, weight = ctx.saved_tensors
        flat = gradient.flatten(0, -2)
        of_weight = F.linear(flat.t(), F.gelu(hidden).flatten(0, -2).t())
        of_hidden = torch.ops.aten.gelu_backward(F.linear(gradient, weight.t()), hidden)
        return of_hidden, of_weight


def attend(query: Tensor, keys_values: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention in `HEADS` heads: queries [B, T, H·K], keys and values [B, S, 2·H·K], mask [B, 1, T, S] → [B, T, H·K]."""
    query, key, value = (x.unflatten(-1, (HEADS, -1)).transpose(1, 2) for x in (query, *keys_values.chunk(2, dim=-1)))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2).flatten(2)


class PerceiverAttention(nn.Module):
    """The latents attend to the patch tokens and to themselves."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm_media = nn.LayerNorm(dim)
        self.norm_latents = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, ATTENTION_WIDTH, bias=False)
        self.to_kv = nn.Linear(dim, 2 * ATTENTION_WIDTH, bias=False)
        self.to_out = nn.Linear(ATTENTION_WIDTH, dim, bias=False)

    def forward(self, features: Tensor, latents: Tensor) -> Tensor:
        """features [B, V, D], latents [B, L, D] → [B, L, D] (to be added to the latents)."""
        latents = self.norm_latents(latents)
        query = self.to_q(latents)
        keys_values = self.to_kv(torch.cat([self.norm_media(features), latents], dim=1))
        return self.to_out(attend(query, keys_values))


class PerceiverResampler(nn.Module):
    """`depth` layers of attention and feed-forward make `num_latents` latents of width `dim` from patch tokens of that width."""

    def __init__(self, dim: int, depth: int = 6, num_latents: int = 64) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(num_latents, dim))
        self.layers = nn.ModuleList(nn.ModuleList([PerceiverAttention(dim), FeedForward(dim)]) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)

    def forward(self, features: Tensor) -> Tensor:
        """Patch tokens [B, N, F, V, D] → latents [B, N, L, D]. Each image is resampled on its own."""
        batch, images = features.shape[:2]
        features = features.flatten(2, 3).flatten(0, 1)  # [B·N, F·V, D]
        latents = self.latents.repeat(batch * images, 1, 1)
        layers: Any = self.layers
        for attention, feed in layers:
            latents = attention(features, latents) + latents
            latents = feed(latents) + latents
        return self.norm(latents).unflatten(0, (batch, images))
