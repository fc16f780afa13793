"""Gated cross-attention from text to image latents, and the mask that says which image a token sees.

After Flamingo (Alayrac et al. 2022, sections 3.1.2 and 3.1.3). Module names are open-flamingo 2.0.1's, so its weights load.

Dimensions: B batch, T text tokens, N images, L latents per image, D text width, E image width.
"""

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .resampler import ATTENTION_WIDTH, FeedForward, attend


class MediaMask(NamedTuple):
    """Which latents each text token attends to.

    A token that sees no image attends to all: a softmax over nothing is NaN, in the forward or (with some kernels) only in the
    backward pass.
    """

    bias: Tensor  # [B, 1, T, N·L], added to the scores: 0 where token t attends to the latent, else -inf
    visible: Tensor  # bool[B, T, 1], False for the tokens that see no image; the attention's output is set to 0 there


def media_mask(text_time: Tensor, num_images: int, num_latents: int, dtype: torch.dtype = torch.float32) -> MediaMask:
    """Of `text_time` long[B, T], the number (from 1) of the image that each token sees, 0 for none. `dtype`: that of the attention's
    queries. (Of a mask of bools, each layer's attention would make such a bias anew.)"""
    text_time = text_time.unsqueeze(-1)  # [B, T, 1]
    visible = text_time > 0
    of_latents = torch.arange(num_images * num_latents, device=text_time.device) // num_latents + 1  # each one's image
    hidden = (text_time.unsqueeze(1) != of_latents) & visible.unsqueeze(1)
    bias = visible.new_zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf"))
    return MediaMask(bias, visible)


class MaskedCrossAttention(nn.Module):
    """Text attends to image latents."""

    def __init__(self, dim: int, dim_visual: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, ATTENTION_WIDTH, bias=False)
        self.to_kv = nn.Linear(dim_visual, 2 * ATTENTION_WIDTH, bias=False)
        self.to_out = nn.Linear(ATTENTION_WIDTH, dim, bias=False)

    def forward(
        self, hidden_states: Tensor, media: Tensor, mask: MediaMask, media_cache: dict[nn.Module, Tensor] | None = None
    ) -> Tensor:
        """hidden_states [B, T, D], media [B, N·L, E] → [B, T, D]; exactly 0 for a token that sees no image.

        `hidden_states` and `mask` may have a multiple of the rows of `media`, which stand for its rows repeated in place (beams). Keys
        and values are those in `media_cache`, where they are put by the first of several calls with the same media.
        """
        query = self.to_q(self.norm(hidden_states))
        if media_cache is None:
            keys_values = self.to_kv(media)
        else:
            if self not in media_cache:
                media_cache[self] = self.to_kv(media)
            keys_values = media_cache[self]
        rows, beams = len(media), len(query) // len(media)
        if beams == 1:
            return self.to_out(attend(query, keys_values, mask.bias)) * mask.visible
        # All beams' tokens as if they were one text: keys and values need no copy for each.
        folded = query.unflatten(0, (rows, beams)).flatten(1, 2)
        bias = mask.bias.squeeze(1).unflatten(0, (rows, beams)).flatten(1, 2).unsqueeze(1)
        attended = attend(folded, keys_values, bias).unflatten(1, (beams, -1)).flatten(0, 1)
        return self.to_out(attended) * mask.visible


class GatedCrossAttentionBlock(nn.Module):
    """Cross-attention and a feed-forward, each behind tanh of a gate that starts at 0: at first, the identity."""

    def __init__(self, dim: int, dim_visual: int) -> None:
        super().__init__()
        self.attn = MaskedCrossAttention(dim, dim_visual)
        self.attn_gate = nn.Parameter(torch.zeros(1))
        self.ff = FeedForward(dim)
        self.ff_gate = nn.Parameter(torch.zeros(1))

    def forward(
        self, hidden_states: Tensor, media: Tensor, mask: MediaMask, media_cache: dict[nn.Module, Tensor] | None = None
    ) -> Tensor:
        """hidden_states [B, T, D], media [B, N·L, E] → [B, T, D], in the type of `hidden_states`. For rows and `media_cache`, see
        `MaskedCrossAttention`."""
        hidden_states = gated_sum(hidden_states, self.attn(hidden_states, media, mask, media_cache), self.attn_gate)
        return gated_sum(hidden_states, self.ff(hidden_states), self.ff_gate)


def gated_sum(hidden_states: Tensor, added: Tensor, gate: Tensor) -> Tensor:
    """`hidden_states` + `added` · tanh(`gate`), both [B, T, D], gate [1], in the type of `hidden_states`."""
    if torch.compiler.is_compiling():  # the compiler makes one kernel of it
        return hidden_states + (added * gate.tanh()).to(hidden_states.dtype)
    return _GatedSum.apply(hidden_states, added, gate)


class _GatedSum(torch.autograd.Function):
    """In one kernel, and with gradients in the type of what they are of. Step by step, where `added` is of a lower precision than the
    gate there would be a product in the gate's, forward and backward, and conversions."""

    @staticmethod
    def forward(ctx: Any, hidden_states: Tensor, added: Tensor, gate: Tensor) -> Tensor:
        opened = gate.tanh()
        ctx.save_for_backward(added, opened)
        device = hidden_states.device.type
        # Autocast would convert `added` first.
        with torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext():
            return torch.addcmul(hidden_states, added, opened).to(hidden_states.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        added, opened = ctx.saved_tensors
        of_added = torch.mul(gradient, opened, out=torch.empty_like(added))
        of_opened = (gradient * added).sum(dtype=torch.float32).to(opened.dtype).view(1)
        return gradient, of_added, torch.ops.aten.tanh_backward(of_opened, opened)
