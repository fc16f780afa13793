"""Trained weights ↔ the reference's parameter names.

A checkpoint of open-flamingo 2.0.1 holds what is trained and, of what is frozen, everything with "embed" in its name and the tied
head. Its names are this model's, but for three things: the trained rows are part of the full embedding matrix; an unfiltered state
dict also lists the decoder layers and the gated blocks under second names; and DDP puts `module.` in front.
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
# Constants that older versions of transformers kept in state dicts: causal masks and rotary frequencies.
OLD_BUFFERS = (
    ".inv_freq",
    ".masked_bias",
    ".attn.bias",
    ".attention.bias",
    ".embed_positions.weights",
    ".position_ids",
)
Gather = Callable[[Tensor], Tensor]


def embedding_name(model: "Flamingo") -> str:
    """The full embedding matrix's name."""
    return _weight_name(model, input_embedding(model.lang_encoder))


def head_name(model: "Flamingo") -> str | None:
    """The output head's matrix's name, None if the head is the embedding itself."""
    head = output_head(model.lang_encoder)
    return None if head is input_embedding(model.lang_encoder) else _weight_name(model, head)


def _weight_name(model: nn.Module, module: nn.Module) -> str:
    return next(f"{name}.weight" for name, other in model.named_modules() if other is module)


def saved_parameters(model: "Flamingo") -> Iterator[tuple[str, nn.Parameter]]:
    """What a checkpoint holds, as it is in the model: see `trained_tensors`."""
    matrices = (embedding_name(model), head_name(model))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or name in matrices or (name.startswith(LANGUAGE_MODEL) and "embed" in name):
            yield name, parameter


def trained_tensors(model: "Flamingo", gather: Gather = Tensor.detach) -> Iterator[tuple[str, Tensor]]:
    """What a checkpoint keeps, one tensor at a time, under the reference's names (without `module.`).

    That is what the reference keeps, and a head that is not tied as well: the reference loses the new tokens' rows of it. The
    embedding matrix and the head are copies with the trained rows written in.

    `gather` makes a whole, detached tensor of a parameter. If that needs all ranks, every rank must go through all of them; one that
    keeps none holds one whole tensor at a time.
    """
    embedding, head = embedding_name(model), head_name(model)
    for name, parameter in saved_parameters(model):
        if name not in (embedding, head) and not name.endswith(ROWS):
            yield name, gather(parameter)
    matrix = _with_rows(input_embedding(model.lang_encoder), gather)
    yield embedding, matrix
    if head is not None:
        tied = heads_are_tied(model.lang_encoder)
        yield head, matrix if tied else _with_rows(output_head(model.lang_encoder), gather)


def _with_rows(module: Any, gather: Gather) -> Tensor:
    """A copy of `module.weight` with the rows of the new tokens written in."""
    weight = gather(module.weight).clone()
    if hasattr(module, "new_rows"):
        weight[module.new_ids] = gather(module.new_rows).to(weight.dtype)
    return weight


def cast_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Casts all parameters in place, but of the buffers only the running statistics of batch norms: what else lies in buffers (frequencies
    of rotary embeddings) Hugging Face models keep in float32 whatever they are loaded in."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)):
            module.to(dtype)


def reference_parameter_names(model: "Flamingo") -> dict[str, str]:
    """Name here → name in the reference, of each parameter that the reference trains, in the order that numbers its optimizer state.

    What it cannot train (`train_output_rows`) is not listed; its state of the embedding is of the full matrix.
    """
    embedding = embedding_name(model)
    rows = embedding.removesuffix(".weight") + ROWS
    return {
        name: embedding if name == rows else name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and (name == rows or not name.endswith(ROWS))
    }


def load_into(model: "Flamingo", state_dict: Mapping[str, Tensor], strict: bool, assign: bool) -> _IncompatibleKeys:
    """Load a state dict of this program or of the reference, filtered or not, with or without `module.`.

    Full matrices may have more or fewer rows than here (padding of the vocabulary): the rows that both have are loaded. Frozen
    parameters may be absent, since checkpoints do not hold them. `strict` (RuntimeError if anything is missing or unexpected) and
    `assign` are those of `nn.Module.load_state_dict`. ValueError if a shape is that of another model.

    Returns:
        `missing_keys`: trained parameters that were not there, but for an untied head's rows, which the reference does not save.
        `unexpected_keys`: names that mean nothing here.
    """
    own = nn.Module.state_dict(model)
    given = _to_own_names(model, state_dict)
    known = {name: tensor for name, tensor in given.items() if name in own}
    for name, tensor in sorted(known.items()):
        if tensor.shape != own[name].shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)} in the checkpoint and {tuple(own[name].shape)} in this "
                "model: it is the checkpoint of another model"
            )
    missing = [name for name in reference_parameter_names(model) if name not in given]
    old = {name for name in given if name.startswith(LANGUAGE_MODEL) and name.endswith(OLD_BUFFERS)}
    unexpected = [name for name in given if name not in own and name not in old]
    if strict and (missing or unexpected):
        raise RuntimeError(f"cannot load the state dict: missing {missing}, unexpected {unexpected}")
    nn.Module.load_state_dict(model, known, strict=False, assign=assign)
    return _IncompatibleKeys(missing, unexpected)


def _to_own_names(model: "Flamingo", state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict under this model's names and with its numbers of rows; unknown names stay as they are."""
    layers = f"{LANGUAGE_MODEL}{model.decoder_layers_name}"
    given: dict[str, Tensor] = {}
    second: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        name = name.removeprefix("module.")
        match name.split(".", 3):
            case ["lang_encoder", "old_decoder_blocks", index, rest]:
                second[f"{layers}.{index}.decoder_layer.{rest}"] = tensor
            case ["lang_encoder", "gated_cross_attn_layers", index, rest]:
                second[f"{layers}.{index}.gated_cross_attn_layer.{rest}"] = tensor
            case _:
                given[name] = tensor
    given = second | given

    embedding, head = embedding_name(model), head_name(model)
    if head is not None:
        old_head = f"{LANGUAGE_MODEL}embed_out.weight"  # GPT-NeoX's, before transformers 5
        if old_head in given:
            given[head] = given.pop(old_head)
        if head in given and heads_are_tied(model.lang_encoder):
            given.setdefault(embedding, given.pop(head))
    for matrix_name in (embedding, head):
        if matrix_name is None or matrix_name not in given:
            continue
        module: Any = model.get_submodule(matrix_name.removesuffix(".weight"))
        matrix, own = given[matrix_name], module.weight.detach()
        if matrix.shape[1:] != own.shape[1:]:
            continue  # the caller names it
        rows = min(len(matrix), len(own))
        if len(matrix) != len(own):
            given[matrix_name] = torch.cat([matrix[:rows].to(own), own[rows:]])
        if hasattr(module, "new_rows") and int(module.new_ids.max()) < rows:
            given.setdefault(matrix_name.removesuffix(".weight") + ROWS, matrix[module.new_ids.to(matrix.device)])
    return given
