"""What is computed, and held, in which precision."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from open_flamingo import Flamingo
from open_flamingo.language_model import output_head

# Layers whose weights autocast would convert to the lower precision on every forward pass anyway. Holding their frozen
# weights in it gives the same numbers for half the memory. Embeddings and norms are not among them: autocast computes
# those in float32.
_MATRIX_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, Conv1D)


def autocast(precision: str, device: torch.device) -> AbstractContextManager:
    """The context of a forward pass in `precision`."""
    if precision in ("amp_bf16", "amp_bfloat16"):
        return torch.autocast(device.type, torch.bfloat16)
    return nullcontext()


def hold_frozen_weights(model: Flamingo, precision: str) -> None:
    """Converts the frozen matrix weights of `model`, in place, to what autocast computes their products in.

    A matrix that is also used in another way (an output head tied to the embeddings) stays as it is, and so does the
    output head, since checkpoints hold it.
    """
    if precision not in ("amp_bf16", "amp_bfloat16"):
        return
    users: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            users[id(parameter)] = users.get(id(parameter), 0) + 1
    for module in model.modules():
        if isinstance(module, _MATRIX_LAYERS) and module is not output_head(model.lang_encoder):
            for parameter in module.parameters(recurse=False):
                if not parameter.requires_grad and users[id(parameter)] == 1:
                    parameter.data = parameter.data.to(torch.bfloat16)
