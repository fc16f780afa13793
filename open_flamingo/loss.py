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

from .language_model import input_embedding, output_head

IGNORED = -100
"""The label of a token that does not count."""

MAX_LOGITS = 2**25
"""Logits alive at once, in elements: 128 MiB in float32, some 670 positions of a vocabulary of 50,000."""


def labelled_positions(labels: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Which hidden states predict a token that counts, and that token.

    Args:
        labels: long[B, T], `IGNORED` where a token does not count. On a GPU this waits for it, on the CPU it does not.
        device: where the result goes.

    Returns:
        positions: long[P], indices into the hidden states without each row's last, flattened: [B·(T - 1)].
        targets: long[P], what follows each: label t is predicted from hidden state t - 1.
    """
    targets = labels[:, 1:].flatten()
    positions = (targets != IGNORED).nonzero().squeeze(-1)
    return positions.to(device, non_blocking=True), targets[positions].to(device, non_blocking=True)


def labelled_loss(lang_encoder: nn.Module, hidden_states: Tensor, positions: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy of the tokens that count, in float32.

    Equal to Hugging Face's loss on full logits, but 0 (with a gradient of 0) where no label counts.

    Args:
        lang_encoder: a Hugging Face causal language model; its head makes the logits.
        hidden_states: [B, T, D], the last hidden states of its base model.
        positions, targets: of `labelled_positions`.
    """
    hidden_states = hidden_states[:, :-1].flatten(0, 1).index_select(0, positions)

    def summed_loss(hidden: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(logits_of(lang_encoder, hidden).float(), target, reduction="sum")

    vocabulary = len(input_embedding(lang_encoder).weight)
    chunk = max(1, MAX_LOGITS // vocabulary)
    if len(targets) <= chunk:
        total = summed_loss(hidden_states, targets)
    else:
        pieces = zip(hidden_states.split(chunk), targets.split(chunk))
        losses = [checkpoint(summed_loss, *piece, use_reentrant=False, preserve_rng_state=False) for piece in pieces]
        total = torch.stack(losses).sum()
    return total / max(1, len(targets))


def full_loss(logits: Tensor, positions: Tensor, targets: Tensor) -> Tensor:
    """The same of full logits [B, T, V], for models whose head cannot be run alone."""
    logits = logits[:, :-1].flatten(0, 1).index_select(0, positions)
    return F.cross_entropy(logits.float(), targets, reduction="sum") / max(1, len(targets))


class EchoOutput(BaseModelOutputWithPast):
    """What else a base model may return (GPT-2: cross attentions; mixtures of experts: router logits) is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)


class Echo(nn.Module):
    """Stands in for a language model's base model, and gives the hidden states that it was made with."""

    def __init__(self, hidden_states: Tensor) -> None:
        super().__init__()
        self.hidden_states = hidden_states

    @property
    def decoder(self) -> "Echo":
        """OPT's head calls `model.decoder`."""
        return self

    def forward(self, *args: Any, **kwargs: Any) -> EchoOutput:
        return EchoOutput(last_hidden_state=self.hidden_states)


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
    """Whether the model keeps what makes hidden states apart from its head. Code from a hub may not: MPT-1B's has neither
    a base model nor a head, but multiplies by the embedding matrix."""
    head = output_head(lang_encoder)
    base_model = lang_encoder._modules.get(getattr(lang_encoder, "base_model_prefix", ""))
    return base_model is not None and head is not None and head is not input_embedding(lang_encoder)
