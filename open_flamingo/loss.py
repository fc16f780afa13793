"""The language-modeling loss, with logits only where a label counts.

Of a batch of B × T tokens and a vocabulary of V, the full logits are the largest tensor of a step by far (B·T·V), and most of their
rows have no label. Here the hidden states of labeled positions are picked first, and logits are made of a bounded number of them at
a time. Their gradients are taken at once, while the logits are there, and only those of the hidden states are kept for the backward
pass: no logits are, and none are made twice.
"""

import copy
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import BaseModelOutputWithPast

from .language_model import compute_dtype, heads_are_tied, input_embedding, output_head, replaced

IGNORED = -100  # the label of a token that does not count
# Bytes of logits alive at once: on a CPU few, so that they stay near its cache; on a GPU few rows would leave the matrix units idle,
# and each piece is some 30 kernels to launch. Each piece reads the head's matrix again.
MAX_LOGITS, MAX_LOGITS_ON_GPU = 2**24, 2**27


class LabeledPositions(NamedTuple):
    """Which hidden states predict a token that counts, and that token: label t is predicted from hidden state t - 1."""

    positions: Tensor  # long[P], indices into the hidden states without each row's last, flattened: [B·(T - 1)]
    targets: Tensor  # long[P], what follows each


def labeled_positions(labels: Tensor, device: torch.device) -> LabeledPositions:
    """Of labels long[B, T], on `device`. Labels on a GPU are waited for."""
    targets = labels[:, 1:].flatten()
    positions = (targets != IGNORED).nonzero().squeeze(-1)
    return LabeledPositions(copy_to(device, positions), copy_to(device, targets[positions]))


def copy_to(device: torch.device, tensor: Tensor) -> Tensor:
    """`tensor` on `device`. From the CPU to a GPU, without waiting for what is queued there."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)  # from other memory, the copy may wait
    return tensor.to(device)


def labeled_loss(
    lang_encoder: nn.Module, hidden_states: Tensor, positions: Tensor, targets: Tensor, per_token: bool = False
) -> Tensor:
    """Mean cross entropy of the tokens that count, in float32, given the last hidden states [B, T, D] of the base model.

    Equal to Hugging Face's loss on full logits, but 0 (with a gradient of 0) where no label counts. With `per_token`, and without
    gradients, that of each token: [P].
    """
    hidden_states = hidden_states[:, :-1].flatten(0, 1).index_select(0, positions)
    embedding, head = input_embedding(lang_encoder), output_head(lang_encoder)
    dtype = compute_dtype(hidden_states)
    max_logits = MAX_LOGITS if hidden_states.device.type == "cpu" else MAX_LOGITS_ON_GPU
    chunk = max(1, max_logits // dtype.itemsize // len(embedding.weight))
    pieces = zip(hidden_states.split(chunk), targets.split(chunk))
    owner = embedding if heads_are_tied(lang_encoder) else head
    trained_rows = [parameter for parameter in owner.parameters() if parameter.requires_grad]
    # A frozen head is held in float32, as checkpoints hold it: autocast would convert it again for every piece.
    weight = head._parameters.get("weight")
    convert = weight is not None and not weight.requires_grad and weight.dtype != dtype
    with replaced(head._parameters, "weight", weight.to(dtype)) if convert else nullcontext():
        if per_token:
            return torch.cat([_loss(lang_encoder, *piece, reduction="none") for piece in pieces])
        if not torch.is_grad_enabled():
            total: Any = sum(_loss(lang_encoder, *piece) for piece in pieces)
        elif dtype == torch.float16:
            # The loss scale must come before any rounding to float16: so gradients wait for the backward pass, and logits are made
            # a second time there.
            losses = [checkpoint(_loss, lang_encoder, *piece, use_reentrant=False) for piece in pieces]
            total = torch.stack(losses).sum()
        else:
            total = _SummedLoss.apply(lang_encoder, chunk, hidden_states, targets, *trained_rows)
    return total / max(1, len(targets))


def _loss(lang_encoder: nn.Module, hidden_states: Tensor, targets: Tensor, reduction: str = "sum") -> Tensor:
    return F.cross_entropy(logits_of(lang_encoder, hidden_states).float(), targets, reduction=reduction)


class _SummedLoss(torch.autograd.Function):
    """The sum of the cross entropies, whose forward pass also takes its gradients, of `chunk` rows of `hidden` at a time."""

    @staticmethod
    def forward(
        ctx: Any, lang_encoder: nn.Module, chunk: int, hidden: Tensor, targets: Tensor, *trained: Tensor
    ) -> Tensor:
        total = hidden.new_zeros((), dtype=torch.float32)
        hidden_gradient = torch.empty_like(hidden)
        gradients = [torch.zeros_like(tensor) for tensor in trained]
        for place in range(0, len(targets), chunk):
            piece = hidden[place : place + chunk].detach().requires_grad_()
            with torch.enable_grad():
                logits = logits_of(lang_encoder, piece)
            loss, gradient = _loss_and_gradient(logits.detach(), targets[place : place + chunk])
            of_piece, *of_trained = torch.autograd.grad(logits, [piece, *trained], gradient)
            del logits, gradient  # before the next ones are made
            total += loss
            hidden_gradient[place : place + chunk] = of_piece
            for gradient, part in zip(gradients, of_trained):
                gradient += part
        ctx.save_for_backward(hidden_gradient, *gradients)
        return total

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> Any:
        of_hidden, *of_trained = ((tensor.float() * outputs[0]).to(tensor.dtype) for tensor in ctx.saved_tensors)
        return None, None, of_hidden, None, *of_trained


def _loss_and_gradient(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of the cross entropies, float32[], of `logits` [P, V], which may be overwritten; and its gradient with respect to them:
    softmax(logits) - onehot(targets). Autograd would make four more tensors of this size."""
    return (_in_passes if logits.device.type == "cpu" else _by_softmax)(logits, targets[:, None])


def _in_passes(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    values = logits.float()  # float32 values are the logits themselves
    values.sub_(values.amax(1, keepdim=True))
    of_target = values.gather(1, targets)
    sums = values.exp_().sum(1, keepdim=True)
    total = (sums.log() - of_target).sum()
    values.div_(sums).scatter_add_(1, targets, sums.new_full((), -1.0).expand(targets.shape))
    return total, values if values is logits else logits.copy_(values)


def _by_softmax(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """For a GPU: few kernels, where `_in_passes` has eleven. (On a CPU those find their piece in its cache, and are faster.)"""
    of_target = F.log_softmax(logits, 1, dtype=torch.float32).gather(1, targets)
    gradient = logits.softmax(1, dtype=logits.dtype)  # given, as autocast would take float32
    # The target's probability less 1, before anything is rounded: of one near 1 nothing would be left.
    return -of_target.sum(), gradient.scatter_(1, targets, of_target.expm1().to(gradient.dtype))


def full_loss(logits: Tensor, positions: Tensor, targets: Tensor, per_token: bool = False) -> Tensor:
    """The same of full logits [B, T, V], for models whose head cannot be run alone."""
    logits = logits[:, :-1].flatten(0, 1).index_select(0, positions).float()
    if per_token:
        return F.cross_entropy(logits, targets, reduction="none")
    return F.cross_entropy(logits, targets, reduction="sum") / max(1, len(targets))


class EchoOutput(BaseModelOutputWithPast):
    """What else a base model may return (GPT-2: cross attentions; mixtures of experts: router logits) is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)


@dataclass(eq=False)  # hashed, as modules are
class Echo:
    """Stands in for a base model: gives these hidden states, and has what that one has (Falcon-H1's head reads a constant of it)."""

    base_model: nn.Module
    hidden_states: Tensor

    @property
    def decoder(self) -> "Echo":  # which OPT's head calls
        return self

    def __getattr__(self, name: str) -> Any:
        return getattr(self.base_model, name)

    def __call__(self, *args: Any, **kwargs: Any) -> EchoOutput:
        return EchoOutput(last_hidden_state=self.hidden_states)


def logits_of(lang_encoder: nn.Module, hidden_states: Tensor) -> Tensor:
    """Logits [P, V] of hidden states [P, D], by whatever the model does after its base model.

    Heads are more than a matrix: Gemma 2 caps its logits, Cohere and Granite scale them. So the model's own forward runs, on a
    shallow copy whose base model is an `Echo`: the copy shares all parameters and is thrown away.
    """
    model: Any = copy.copy(lang_encoder)
    echo: Any = Echo(model.base_model, hidden_states.unsqueeze(0))
    model._modules = lang_encoder._modules | {model.base_model_prefix: echo}
    return model.forward(input_ids=None, use_cache=False, return_dict=True).logits.squeeze(0)


def has_base_model(lang_encoder: nn.Module) -> bool:
    """Whether the model keeps what makes hidden states apart from its head. Code from a hub may not: MPT-1B's has neither a base
    model nor a head, but multiplies by the embedding matrix."""
    base_model = lang_encoder._modules.get(getattr(lang_encoder, "base_model_prefix", ""))
    return base_model is not None and output_head(lang_encoder) is not input_embedding(lang_encoder)
