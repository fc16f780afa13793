"""Fused attention for MPT, the language model of most OpenFlamingos: transformers' own makes all scores, in float32, in ten kernels.

Dimensions: B batch, T text tokens, H heads, S longest text, D text width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.mpt.modeling_mpt import MptAttention


class FusedMptAttention(MptAttention):
    """`MptAttention` whose ALiBi goes to `scaled_dot_product_attention` as a bias, where no cache is used and all rows of the batch
    have one mask (`causal_mask`); otherwise it is what it was."""

    def forward(
        self, hidden_states: Tensor, position_bias: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """hidden_states [B, T, D], position_bias [H, 1, S], attention_mask bool[B or 1, 1, T, T], True where a token must not look →
        [B, T, D] and None, or the attention weights."""
        has_cache = any(value is not None for value in kwargs.values())
        if has_cache or attention_mask is None or len(attention_mask) > 1 or position_bias.shape[1] > 1:
            return super().forward(hidden_states, position_bias, attention_mask=attention_mask, **kwargs)
        joined = self.Wqkv(hidden_states)
        if self.clip_qkv:
            joined = joined.clamp(min=-self.clip_qkv, max=self.clip_qkv)
        query, key, value = (x.unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for x in joined.chunk(3, dim=-1))
        bias = relative_bias(position_bias, attention_mask, query.dtype)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=self.softmax_scale)
        return self.out_proj(attended.transpose(1, 2).flatten(2)), None


def relative_bias(position_bias: Tensor, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """ALiBi [1, H, T, T] in `dtype`, with the lowest number where bool[1, 1, T, T] `mask` is True. Made once for all layers of a call.

    transformers' bias is the distance of a key to the end of the longest text, which a softmax cannot tell from that to the query;
    but in bfloat16 such numbers would be too coarse.
    """
    compiles = torch.compiler.is_compiling()  # where it becomes a part of each layer's kernels
    if not compiles and hasattr(position_bias, "relative"):
        return position_bias.relative
    slopes = -position_bias[:, :, -2:-1]  # [H, 1, 1]: of the last key but one
    places = torch.arange(mask.shape[-1], device=mask.device)
    made = (slopes * (places - places[:, None])).to(dtype).masked_fill(mask, torch.finfo(dtype).min)
    if not compiles:
        position_bias.relative = made  # type: ignore[attr-defined]
    return made


def causal_mask(length: int, device: torch.device) -> Tensor:
    """bool[1, 1, T, T], True where a token must not look; for all rows of a batch."""
    return torch.ones(length, length, dtype=torch.bool, device=device).triu(1)[None, None]


def fuse_attention(lang_encoder: nn.Module) -> bool:
    """Whether `lang_encoder` is transformers' MPT, whose attention is changed in place."""
    layers = [module for module in lang_encoder.modules() if type(module) is MptAttention]
    for layer in layers:
        layer.__class__ = FusedMptAttention
    return bool(layers)
