"""How likely each class name is after a prompt, in nats per token.

As in the reference, a name's score is the mean over its tokens, without an end token, so that long names do not lose by length.

Dimensions: B prompts, T their tokens, C class names, S tokens of the longest name, V vocabulary.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from open_flamingo import Flamingo
from open_flamingo.language_model import cache_length

log = logging.getLogger(__name__)

# Of one pass, cached ones included: what the key-value cache and the logits of all names at once may take.
MAX_TOKENS = 1 << 14
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.05}  # nats, between the two ways


class ClassNames:
    """Class names as tokens.

    Args:
        names: each of at least one token; ValueError otherwise.
    """

    def __init__(self, names: Sequence[str], tokenizer: Any, device: torch.device) -> None:
        ids = [tokenizer(name, add_special_tokens=False).input_ids for name in names]
        if empty := [name for name, of in zip(names, ids, strict=True) if not of]:
            raise ValueError(f"the tokenizer makes no token of the class name {empty[0]!r}")
        self.lengths = torch.tensor([len(of) for of in ids], device=device)
        self.ids = torch.full((len(ids), int(self.lengths.max())), tokenizer.pad_token_id, device=device)  # [C, S]
        for row, of in enumerate(ids):
            self.ids[row, : len(of)] = torch.tensor(of, device=device)
        self.mask = torch.arange(self.ids.shape[1], device=device) < self.lengths.unsqueeze(1)  # [C, S]


@torch.no_grad()
def class_log_likelihoods(
    model: Flamingo, input_ids: Tensor, attention_mask: Tensor, names: ClassNames, use_cache: bool = True
) -> Tensor:
    """float32 [B, C] for prompts [B, T], padded on the left, whose images are cached in the model (`cache_latents`).

    With `use_cache`, the prompt is computed once and all names go on from its key-value cache in one pass (several, where they are too
    many: see `MAX_TOKENS`). Without it, each name is computed with the whole prompt: the same result, for any language model.
    """
    per_token = _cached if use_cache else _uncached
    sums = torch.where(names.mask, per_token(model, input_ids, attention_mask, names), 0.0).sum(-1)
    return sums / names.lengths


def _cached(model: Flamingo, input_ids: Tensor, attention_mask: Tensor, names: ClassNames) -> Tensor:
    """Of each token of each name, float32 [B, C, S]."""
    prompt = model(None, input_ids, attention_mask, use_cache=True, logits_to_keep=1)
    # The first token of each name follows the prompt's last, so a name of one token needs no more.
    first = prompt.logits[:, -1].float().log_softmax(-1)[:, names.ids[:, 0]]  # [B, C]
    result = first.new_zeros(*first.shape, names.ids.shape[1])
    result[..., 0] = first
    longer = (names.lengths > 1).nonzero().flatten()
    longer = longer[names.lengths[longer].argsort(stable=True)]  # alike in length in one pass
    rows, length = input_ids.shape
    at_once = max(1, MAX_TOKENS // (rows * (length + names.ids.shape[1])))
    parts = longer.split(at_once)
    for number, part in enumerate(parts):
        size = int(names.lengths[part].max())
        ids = names.ids[part, :size].repeat(rows, 1)  # [B·C', S'], each prompt's names in a row
        cache = prompt.past_key_values if number == len(parts) - 1 else copy.deepcopy(prompt.past_key_values)
        # Public, and there for every kind of layer: beam search uses it.
        cache.reorder_cache(torch.arange(rows, device=ids.device).repeat_interleave(len(part)))
        assert cache_length(cache) == length
        mask = torch.cat([attention_mask.repeat_interleave(len(part), 0), torch.ones_like(ids[:, :-1])], 1)
        logits = model(None, ids[:, :-1], mask, past_key_values=cache, use_cache=True).logits
        scores = _scores_of(logits, ids[:, 1:])
        result[:, part, 1:size] = scores.unflatten(0, (rows, len(part)))
    return result


def _uncached(model: Flamingo, input_ids: Tensor, attention_mask: Tensor, names: ClassNames) -> Tensor:
    """As `_cached`, a name at a time."""
    result = []
    size = names.ids.shape[1]
    for of, length in zip(names.ids, names.lengths.tolist(), strict=True):
        ids = torch.cat([input_ids, of[:length].expand(len(input_ids), -1)], 1)
        mask = torch.cat([attention_mask, torch.ones_like(ids[:, -length:])], 1)
        # The images are those that the whole text names, as at the prompt's end.
        logits = model(None, ids, mask, use_cache=False, logits_to_keep=length + 1).logits[:, -length - 1 : -1]
        scores = _scores_of(logits, ids[:, -length:])
        result.append(torch.nn.functional.pad(scores, (0, size - length)))
    return torch.stack(result, 1)


def _scores_of(logits: Tensor, ids: Tensor) -> Tensor:
    """Logits [.., V] of tokens [..] → their log likelihoods, float32 [..]."""
    return logits.float().log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)


def can_use_cache(model: Flamingo, input_ids: Tensor, attention_mask: Tensor, names: ClassNames) -> bool:
    """Whether a language model gives the same with its cache, on these prompts; some state space models cannot go on by several tokens."""
    try:
        cached = class_log_likelihoods(model, input_ids, attention_mask, names)
    except Exception as error:  # of the model's own code: anything
        log.warning("classes are computed without a key-value cache: with it, %s: %s", type(error).__name__, error)
        return False
    difference = (class_log_likelihoods(model, input_ids, attention_mask, names, use_cache=False) - cached).abs().max()
    if difference < TOLERANCE[next(model.lang_encoder.parameters()).dtype]:
        return True
    log.warning("classes are computed without a key-value cache: with it, they differ by %.3g nats", difference)
    return False
