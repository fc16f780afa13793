"""Which tokens count in the loss. B batch, T text tokens."""

import torch
from torch import Tensor

IGNORE = -100  # what torch's cross_entropy skips


def laion_labels(input_ids: Tensor, media_token_id: int, pad_token_id: int) -> Tensor:
    """Of captions, everything but padding and `<image>`: int64 [B, T] → int64 [B, T], -100 where a token does not count."""
    return input_ids.masked_fill((input_ids == media_token_id) | (input_ids == pad_token_id), IGNORE)


def mmc4_labels(input_ids: Tensor, media_token_id: int, eoc_token_id: int, pad_token_id: int) -> Tensor:
    """Of documents, only text after an `<image>`, up to and with its `<|endofchunk|>`: int64 [B, T] → int64 [B, T], -100 elsewhere.

    Padding, `<image>`, text before the first `<image>` and text between `<|endofchunk|>` and the next `<image>` do not count.
    """
    is_media, is_eoc = input_ids == media_token_id, input_ids == eoc_token_id
    # The place (from 1; 0: none yet) of the newest <image> up to each token, and of the newest <|endofchunk|> before it:
    # the <|endofchunk|> that ends a chunk is itself part of the chunk.
    place = torch.arange(1, input_ids.shape[1] + 1, device=input_ids.device).expand_as(input_ids)
    last_media = torch.where(is_media, place, 0).cummax(dim=1).values
    last_eoc = torch.where(is_eoc, place, 0).cummax(dim=1).values.roll(1, dims=1)
    last_eoc[:, :1] = 0
    counts = (last_media > last_eoc) & ~is_media & (input_ids != pad_token_id)
    return input_ids.masked_fill(~counts, IGNORE)
