"""Gated cross-attention from text to image latents, and the mask that says which image a token sees.

After Flamingo (Alayrac et al. 2022, sections 3.1.2 and 3.1.3). Module names are open-flamingo 2.0.1's, so its weights
load.

Dimensions: B batch, T text tokens, N images, L latents per image, D text width, E image width.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .resampler import FeedForward, merge_heads, split_heads


class MediaMask(NamedTuple):
    """Which latents each text token attends to.

    attend: bool[B, 1, T, N·L], True where token t sees the latent. A token that sees no image has True everywhere:
        a softmax over nothing is NaN, in the forward or (with some kernels) only in the backward pass.
    visible: bool[B, T, 1], False for the tokens that see no image; the attention's output is set to 0 there.
    """

    attend: Tensor
    visible: Tensor


def media_mask(text_time: Tensor, num_images: int, num_latents: int) -> MediaMask:
    """The mask under which a token sees the image just before it, and no other.

    Args:
        text_time: long[B, T], the number (from 1) of the image each token sees, 0 for none.
        num_images: N.
        num_latents: L.
    """
    visible = (text_time > 0).unsqueeze(-1)  # [B, T, 1]
    images = torch.arange(1, num_images + 1, device=text_time.device)
    attend = (text_time.unsqueeze(-1) == images) | ~visible  # [B, T, N]
    return MediaMask(attend.repeat_interleave(num_latents, dim=-1).unsqueeze(1), visible)


class MaskedCrossAttention(nn.Module):
    """Text attends to image latents."""

    def __init__(self, dim: int, dim_visual: int, dim_head: int = 64, heads: int = 8) -> None:
        super().__init__()
        self.heads = heads
        inner = dim_head * heads
        self.norm = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_kv = nn.Linear(dim_visual, inner * 2, bias=False)
        self.to_out = nn.Linear(inner, dim, bias=False)

    def forward(self, hidden_states: Tensor, media: Tensor, mask: MediaMask) -> Tensor:
        """hidden_states [B, T, D], media [B, N·L, E] → [B, T, D]; exactly 0 for a token that sees no image."""
        query = self.to_q(self.norm(hidden_states))
        key, value = self.to_kv(media).chunk(2, dim=-1)
        query, key, value = (split_heads(x, self.heads) for x in (query, key, value))
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask.attend)
        return self.to_out(merge_heads(out)) * mask.visible


class GatedCrossAttentionBlock(nn.Module):
    """Cross-attention and a feed-forward, each behind tanh of a gate that starts at 0: at first, the identity.

    Args:
        dim: D, the language model's width.
        dim_visual: E, the width of the latents.
        dim_head, heads: attention of `heads` × `dim_head`.
        ff_mult: the feed-forward's inner width ÷ D.
    """

    def __init__(self, dim: int, dim_visual: int, dim_head: int = 64, heads: int = 8, ff_mult: int = 4) -> None:
        super().__init__()
        self.attn = MaskedCrossAttention(dim, dim_visual, dim_head, heads)
        self.attn_gate = nn.Parameter(torch.zeros(1))
        self.ff = FeedForward(dim, ff_mult)
        self.ff_gate = nn.Parameter(torch.zeros(1))

    def forward(self, hidden_states: Tensor, media: Tensor, mask: MediaMask) -> Tensor:
        """hidden_states [B, T, D], media [B, N·L, E] → [B, T, D], in the type of `hidden_states`.

        Everything comes in by argument, so that activation checkpointing may call it again in the backward pass.
        """
        dtype = hidden_states.dtype
        attended = self.attn(hidden_states, media, mask) * self.attn_gate.tanh()
        hidden_states = hidden_states + attended.to(dtype)
        fed = self.ff(hidden_states) * self.ff_gate.tanh()
        return hidden_states + fed.to(dtype)
