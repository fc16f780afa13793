"""Perceiver resampler: any number of patch tokens → a fixed number of latents per image.

After Flamingo (Alayrac et al. 2022, section 3.1.1). Module names are open-flamingo 2.0.1's, so its weights load.

Dimensions: B batch, N images, F frames, V patch tokens, L latents, D width, H heads, K width of a head.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class FeedForward(nn.Sequential):
    """Pre-norm feed-forward D → mult·D → D without biases, as in both trained parts of the model."""

    def __init__(self, dim: int, mult: int = 4) -> None:
        super().__init__(
            nn.LayerNorm(dim),
            nn.Linear(dim, dim * mult, bias=False),
            nn.GELU(),
            nn.Linear(dim * mult, dim, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] → [..., D]."""
        if torch.compiler.is_compiling():  # the compiler decides what it keeps
            return super().forward(x)
        norm, widen, _, narrow = self
        hidden = widen(norm(x))
        return _GeluLinear.apply(hidden, narrow.weight.to(hidden.dtype))


class _GeluLinear(torch.autograd.Function):
    """`linear(gelu(hidden), weight)` that keeps `hidden` alone for the backward pass, and makes gelu's result there again.

    It is the widest tensor of the block: autograd would keep both.
    """

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


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, T, H·K] → [B, H, T, K], the layout of `scaled_dot_product_attention`."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """[B, H, T, K] → [B, T, H·K]."""
    return x.transpose(1, 2).flatten(2)


class PerceiverAttention(nn.Module):
    """The latents attend to the patch tokens and to themselves."""

    def __init__(self, dim: int, dim_head: int = 64, heads: int = 8) -> None:
        super().__init__()
        self.heads = heads
        inner = dim_head * heads
        self.norm_media = nn.LayerNorm(dim)
        self.norm_latents = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_kv = nn.Linear(dim, inner * 2, bias=False)
        self.to_out = nn.Linear(inner, dim, bias=False)

    def forward(self, features: Tensor, latents: Tensor) -> Tensor:
        """features [B, V, D], latents [B, L, D] → [B, L, D] (to be added to the latents)."""
        latents = self.norm_latents(latents)
        query = self.to_q(latents)
        key, value = self.to_kv(torch.cat([self.norm_media(features), latents], dim=1)).chunk(2, dim=-1)
        query, key, value = (split_heads(x, self.heads) for x in (query, key, value))
        out = F.scaled_dot_product_attention(query, key, value)
        return self.to_out(merge_heads(out))


class PerceiverResampler(nn.Module):
    """
    Args:
        dim: D, the width of the vision encoder's patch tokens and of the latents.
        depth: attention and feed-forward pairs.
        dim_head, heads: attention of `heads` × `dim_head`, whatever `dim` is.
        num_latents: L, latents per image.
        ff_mult: the feed-forward's inner width ÷ D.
    """

    def __init__(
        self,
        dim: int,
        depth: int = 6,
        dim_head: int = 64,
        heads: int = 8,
        num_latents: int = 64,
        ff_mult: int = 4,
    ) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(num_latents, dim))
        self.layers = nn.ModuleList(
            nn.ModuleList([PerceiverAttention(dim, dim_head, heads), FeedForward(dim, ff_mult)]) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim)

    def forward(self, features: Tensor) -> Tensor:
        """Patch tokens [B, N, F, V, D] → latents [B, N, L, D]. Each image is resampled on its own."""
        batch, images = features.shape[:2]
        features = features.flatten(2, 3).flatten(0, 1)  # [B·N, F·V, D]
        latents = self.latents.expand(batch * images, -1, -1)
        pair: Any
        for pair in self.layers:
            attention, feed = pair
            latents = attention(features, latents) + latents
            latents = feed(latents) + latents
        return self.norm(latents).unflatten(0, (batch, images))
