"""Trained weights ↔ the reference's parameter names.

A checkpoint of open-flamingo 2.0.1 holds what is trained and, of what is frozen, everything with "embed" in its name and
the tied head. Its names are this model's, but for three things: the trained rows are part of the full embedding matrix;
an unfiltered state dict also lists the decoder layers and the gated blocks under second names; and DDP puts `module.` in
front.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys

from .language_model import heads_are_tied, input_embedding, output_head

if TYPE_CHECKING:
    from .flamingo import Flamingo

ROWS = ".new_rows"
LANGUAGE_MODEL = "lang_encoder."
Gather = Callable[[Tensor], Tensor]


def module_name(root: nn.Module, module: nn.Module | None) -> str | None:
    """The first name of `module` in `root`, None if it is not there."""
    return next((name for name, other in root.named_modules() if other is module), None)


def embedding_name(model: "Flamingo") -> str:
    """The full embedding matrix's name."""
    return f"{module_name(model, input_embedding(model.lang_encoder))}.weight"


def head_name(model: "Flamingo") -> str | None:
    """The output head's matrix's name, None if the head is the embedding itself."""
    head = output_head(model.lang_encoder)
    if head is None or head is input_embedding(model.lang_encoder):
        return None
    return f"{module_name(model, head)}.weight"


def with_rows(module: Any, gather: Gather = Tensor.detach) -> Tensor:
    """A copy of `module.weight` with the rows of the new tokens written in."""
    weight = gather(module.weight).clone()
    if hasattr(module, "new_rows"):
        weight[module.new_ids] = gather(module.new_rows).to(weight.dtype)
    return weight


def saved_parameters(model: "Flamingo") -> Iterator[tuple[str, nn.Parameter]]:
    """What a checkpoint holds, as it is in the model: see `trained_state_dict`."""
    matrices = (embedding_name(model), head_name(model))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or name in matrices or (name.startswith(LANGUAGE_MODEL) and "embed" in name):
            yield name, parameter


def trained_tensors(model: "Flamingo", gather: Gather = Tensor.detach) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of what a checkpoint keeps, one at a time: see `trained_state_dict`.

    Args:
        gather: makes a whole, detached tensor of a parameter. If that needs all ranks, every rank must go through all of them; one
            that keeps none holds one whole tensor at a time.
    """
    embedding, head = embedding_name(model), head_name(model)
    for name, parameter in saved_parameters(model):
        if name not in (embedding, head) and not name.endswith(ROWS):
            yield name, gather(parameter)
    matrix = with_rows(input_embedding(model.lang_encoder), gather)
    yield embedding, matrix
    if head is not None:
        tied = heads_are_tied(model.lang_encoder)
        yield head, matrix if tied else with_rows(output_head(model.lang_encoder), gather)


def trained_state_dict(model: "Flamingo", gather: Gather = Tensor.detach) -> dict[str, Tensor]:
    """What a checkpoint keeps, under the reference's names (without `module.`), detached but not copied.

    That is what the reference keeps (trained parameters, the language model's parameters with "embed" in their name, and
    a tied head), and, where the head is not tied, its matrix as well: the reference loses the new tokens' rows of
    it. The embedding matrix and the head are copies with the trained rows written in.
    """
    return dict(trained_tensors(model, gather))


def reference_parameter_names(model: "Flamingo") -> dict[str, str]:
    """Name here → name in the reference, of each parameter that the reference trains, in its `named_parameters` order.

    The reference's optimizer state is numbered in that order. What it cannot train (`train_output_rows`) is not listed;
    its state of the embedding is of the full matrix.
    """
    embedding = embedding_name(model)
    rows = embedding.removesuffix(".weight") + ROWS
    return {
        name: embedding if name == rows else name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and (name == rows or not name.endswith(ROWS))
    }


def load_into(
    model: "Flamingo", state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False
) -> _IncompatibleKeys:
    """Load a state dict of this program or of the reference, filtered or not, with or without `module.`.

    Full matrices may have more or fewer rows than here (padding of the vocabulary): the rows that both have are
    loaded. Frozen parameters may be absent, since checkpoints do not hold them.

    Args:
        model: the model to load into.
        state_dict: name → tensor.
        strict: raise if anything trained is missing or anything is unexpected.
        assign: as for `torch.nn.Module.load_state_dict`.

    Returns:
        `missing_keys`: trained parameters that were not there, but for an untied head's rows, which the reference does
        not save. `unexpected_keys`: names that mean nothing here.

    Raises:
        ValueError: a parameter has another shape here, so the checkpoint is of another model.
        RuntimeError: `strict`, and keys are missing or unexpected.
    """
    own = nn.Module.state_dict(model)
    given = to_own_names(model, state_dict)
    for name in sorted(given.keys() & own.keys()):
        if given[name].shape != own[name].shape:
            raise ValueError(
                f"{name} has shape {tuple(given[name].shape)} in the checkpoint and {tuple(own[name].shape)} in this "
                "model: it is the checkpoint of another model"
            )
    missing = [name for name in reference_parameter_names(model) if name not in given]
    unexpected = [name for name in given if name not in own and not is_old_buffer(name)]
    if strict and (missing or unexpected):
        raise RuntimeError(f"cannot load the state dict: missing {missing}, unexpected {unexpected}")
    known = {name: tensor for name, tensor in given.items() if name in own}
    nn.Module.load_state_dict(model, known, strict=False, assign=assign)
    return _IncompatibleKeys(missing, unexpected)


def to_own_names(model: "Flamingo", state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict under this model's names and with its numbers of rows; unknown names stay as they are."""
    layers = f"{LANGUAGE_MODEL}{model.decoder_layers_name}."
    aliases = {
        f"{LANGUAGE_MODEL}old_decoder_blocks.": "decoder_layer",
        f"{LANGUAGE_MODEL}gated_cross_attn_layers.": "gated_cross_attn_layer",
    }
    given: dict[str, Tensor] = {}
    second: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        name = name.removeprefix("module.")
        alias = next((alias for alias in aliases if name.startswith(alias)), None)
        if alias is None:
            given[name] = tensor
        else:
            index, _, rest = name.removeprefix(alias).partition(".")
            second[f"{layers}{index}.{aliases[alias]}.{rest}"] = tensor
    given = second | given

    embedding, head = embedding_name(model), head_name(model)
    if head is not None:
        # transformers 5 renamed GPT-NeoX's head; checkpoints of the reference's day have the old name.
        for old in (f"{LANGUAGE_MODEL}embed_out.weight", f"{LANGUAGE_MODEL}lm_head.weight"):
            if old in given and old != head:
                given[head] = given.pop(old)
        if heads_are_tied(model.lang_encoder):
            tied = given.pop(head, None)
            if tied is not None:
                given.setdefault(embedding, tied)
    for matrix in (embedding, head):
        if matrix is not None and matrix in given:
            _split_rows(model, matrix, given)
    return given


def _split_rows(model: "Flamingo", name: str, given: dict[str, Tensor]) -> None:
    """Replace a full matrix in `given` by one of this model's size and, if it has them, the trained rows."""
    module: Any = model.get_submodule(name.removesuffix(".weight"))
    matrix, own = given[name], module.weight.detach()
    if matrix.shape[1:] != own.shape[1:]:
        return  # the caller names it
    rows = min(len(matrix), len(own))
    if len(matrix) != len(own):
        given[name] = torch.cat([matrix[:rows].to(own), own[rows:]])
    if hasattr(module, "new_rows") and int(module.new_ids.max()) < rows:
        ids = module.new_ids.to(matrix.device)
        given.setdefault(name.removesuffix(".weight") + ROWS, matrix[ids])


def is_old_buffer(name: str) -> bool:
    """Constants that older versions of transformers kept in state dicts: causal masks and rotary frequencies."""
    return name.startswith(LANGUAGE_MODEL) and name.endswith(
        (".inv_freq", ".masked_bias", ".attn.bias", ".attention.bias", ".embed_positions.weights", ".position_ids")
    )
