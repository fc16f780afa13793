"""The language-modelling loss, with logits only where a label counts.

Of a batch of B × T tokens and a vocabulary of V, the full logits are the largest tensor of a step by far (B·T·V), and
most of their rows have no label. Here the hidden states of labelled positions are picked first, and logits are made of
a bounded number of them at a time.
"""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import BaseModelOutputWithPast

IGNORED = -100
"""The label of a token that does not count."""

MAX_LOGITS = 2**25
"""Logits alive at once, in elements: 128 MiB in float32, some 670 positions of a vocabulary of 50,000."""


def labelled_loss(lang_encoder: nn.Module, hidden_states: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy of the next token over the positions that have a label, in float32.

    Equal to Hugging Face's loss on full logits, but 0 (with a gradient of 0) where no label counts.

    Args:
        lang_encoder: a Hugging Face causal language model; its head makes the logits.
        hidden_states: [B, T, D], the last hidden states of its base model.
        labels: long[B, T], `IGNORED` where a token does not count; label t is predicted from hidden state t - 1. May
            lie on the CPU: then picking its positions does not wait for the GPU.
    """
    targets = labels[:, 1:].flatten()
    picked = (targets != IGNORED).nonzero().squeeze(-1)
    targets = targets[picked].to(hidden_states.device, non_blocking=True)
    picked = picked.to(hidden_states.device, non_blocking=True)
    hidden_states = hidden_states[:, :-1].flatten(0, 1).index_select(0, picked)

    def summed_loss(hidden: Tensor, target: Tensor) -> Tensor:
        logits = logits_of(lang_encoder, hidden)
        return F.cross_entropy(logits.float(), target, reduction="sum")

    vocabulary = lang_encoder.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    chunk = max(1, MAX_LOGITS // vocabulary)
    if len(targets) <= chunk:
        total = summed_loss(hidden_states, targets)
    else:
        pieces = zip(hidden_states.split(chunk), targets.split(chunk))
        losses = [checkpoint(summed_loss, *piece, use_reentrant=False, preserve_rng_state=False) for piece in pieces]
        total = torch.stack(losses).sum()
    return total / max(1, len(targets))


class Echo(nn.Module):
    """Stands in for a language model's base model, and gives the hidden states that it was made with."""

    def __init__(self, hidden_states: Tensor) -> None:
        super().__init__()
        self.hidden_states = hidden_states

    @property
    def decoder(self) -> "Echo":
        """OPT's head calls `model.decoder`."""
        return self

    def forward(self, *args: Any, **kwargs: Any) -> BaseModelOutputWithPast:
        return BaseModelOutputWithPast(last_hidden_state=self.hidden_states)


def logits_of(lang_encoder: nn.Module, hidden_states: Tensor) -> Tensor:
    """Logits [P, V] of hidden states [P, D], by whatever the model does after its base model.

    Heads are more than a matrix: Gemma 2 caps its logits, Cohere and Granite scale them. So the model's own forward
    runs, on a shallow copy whose base model is an `Echo`: the copy shares all parameters and is thrown away.
    """
    model: Any = copy.copy(lang_encoder)
    model._modules = dict(lang_encoder._modules)
    model._modules[model.base_model_prefix] = Echo(hidden_states.unsqueeze(0))
    return model.forward(input_ids=None, use_cache=False, return_dict=True).logits.squeeze(0)


def has_base_model(lang_encoder: nn.Module) -> bool:
    """Whether the model keeps what makes hidden states apart from its head (code from a hub may not)."""
    return isinstance(lang_encoder._modules.get(getattr(lang_encoder, "base_model_prefix", "")), nn.Module)
