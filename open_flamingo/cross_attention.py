"""Gated cross-attention from text to image latents, and the mask that says which image a token sees.

After Flamingo (Alayrac et al. 2022, sections 3.1.2 and 3.1.3). Module names are open-flamingo 2.0.1's, so its weights load.

Dimensions: B batch, T text tokens, N images, L latents per image, D text width, E image width.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .resampler import ATTENTION_WIDTH, FeedForward, attend


class MediaMask(NamedTuple):
    """Which latents each text token attends to.

    A token that sees no image attends to all: a softmax over nothing is NaN, in the forward or (with some kernels) only in the
    backward pass.
    """

    attend: Tensor  # bool[B, 1, T, N·L], True where token t attends to the latent
    visible: Tensor  # bool[B, T, 1], False for the tokens that see no image; the attention's output is set to 0 there


def media_mask(text_time: Tensor, num_images: int, num_latents: int) -> MediaMask:
    """Of `text_time` long[B, T], the number (from 1) of the image that each token sees, 0 for none."""
    text_time = text_time.unsqueeze(-1)  # [B, T, 1]
    visible = text_time > 0
    of_latents = torch.arange(num_images * num_latents, device=text_time.device) // num_latents + 1  # each one's image
    return MediaMask((text_time.unsqueeze(1) == of_latents) | ~visible.unsqueeze(1), visible)


class MaskedCrossAttention(nn.Module):
    """Text attends to image latents."""

    def __init__(self, dim: int, dim_visual: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, ATTENTION_WIDTH, bias=False)
        self.to_kv = nn.Linear(dim_visual, 2 * ATTENTION_WIDTH, bias=False)
        self.to_out = nn.Linear(ATTENTION_WIDTH, dim, bias=False)

    def forward(
        self, hidden_states: Tensor, media: Tensor, mask: MediaMask, kept: dict[nn.Module, Tensor] | None = None
    ) -> Tensor:
        """hidden_states [B, T, D], media [B, N·L, E] → [B, T, D]; exactly 0 for a token that sees no image.

        `hidden_states` and `mask` may have a multiple of the rows of `media`, which stand for its rows repeated in place (beams). Keys
        and values are those in `kept`, where they are put by the first of several calls with the same media.
        """
        query = self.to_q(self.norm(hidden_states))
        if kept is None:
            keys_values = self.to_kv(media)
        else:
            if self not in kept:
                kept[self] = self.to_kv(media)
            keys_values = kept[self]
        rows, beams = len(media), len(query) // len(media)
        if beams == 1:
            return self.to_out(attend(query, keys_values, mask.attend)) * mask.visible
        # All beams' tokens as if they were one text: keys and values need no copy for each.
        folded = query.unflatten(0, (rows, beams)).flatten(1, 2)
        visible = mask.attend.squeeze(1).unflatten(0, (rows, beams)).flatten(1, 2).unsqueeze(1)
        attended = attend(folded, keys_values, visible).unflatten(1, (beams, -1)).flatten(0, 1)
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
        self, hidden_states: Tensor, media: Tensor, mask: MediaMask, kept: dict[nn.Module, Tensor] | None = None
    ) -> Tensor:
        """hidden_states [B, T, D], media [B, N·L, E] → [B, T, D], in the type of `hidden_states`. For rows and `kept`, see
        `MaskedCrossAttention`."""
        dtype = hidden_states.dtype
        attended = self.attn(hidden_states, media, mask, kept) * self.attn_gate.tanh()
        hidden_states = hidden_states + attended.to(dtype)
        fed = self.ff(hidden_states) * self.ff_gate.tanh()
        return hidden_states + fed.to(dtype)
