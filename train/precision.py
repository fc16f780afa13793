"""What is computed, and held, in which precision.

| --precision | products | frozen matrices | what is trained, and the optimizer's state |
|---|---|---|---|
| fp32 | float32 | float32 | float32 |
| amp_bf16 | bfloat16 | bfloat16 | float32 |
| fp16 | float16, the loss scaled | float16 | float32 |
| bf16 | bfloat16 | bfloat16 | bfloat16 |

Embeddings, norms (but those of OpenCLIP's ViT) and the output head are bfloat16 only in bf16; the loss is computed in float32 in all of them.
"""

from collections import Counter
from contextlib import AbstractContextManager, nullcontext

import torch
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from open_flamingo import Flamingo
from open_flamingo.language_model import output_head
from open_flamingo.vision import fuse_quick_gelu
from open_flamingo.weights import cast_weights

# What autocast computes products in. (bf16 has no autocast: there, everything is in it to begin with.)
_AUTOCAST = {"amp_bf16": torch.bfloat16, "amp_bfloat16": torch.bfloat16, "fp16": torch.float16}

# Layers whose weights autocast would convert to the lower precision on every forward pass anyway. Holding their frozen weights in
# it gives the same numbers for half the memory. Embeddings and norms are not among them: autocast computes those in float32.
_MATRIX_LAYERS = (nn.Linear, nn.MultiheadAttention, nn.Conv1d, nn.Conv2d, nn.Conv3d, Conv1D)

# Of the loss scale: where it starts, and after how many updates without an overflow it doubles. torch.amp's values.
INITIAL_SCALE = 2.0**16
GROWTH_INTERVAL = 2000
SCALE_RANGE = (2.0**-16, 2.0**32)  # at 0 or infinity it would stay


def choose_kernels(deterministic: bool) -> None:
    """Sets for the whole process which of torch's kernels compute on a GPU."""
    # torch 2.11 prefers cuDNN's attention on an H100: a new plan of about a second for every new number of images, and a backward
    # pass that gives other bits on each run.
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.use_deterministic_algorithms(deterministic)
    # Otherwise NaN would be written into each empty tensor.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def autocast_dtype(precision: str) -> torch.dtype | None:
    """What autocast computes products in; None where there is no autocast."""
    return _AUTOCAST.get(precision)


def autocast(precision: str, device: torch.device) -> AbstractContextManager:
    """The context of a forward pass in `precision`."""
    dtype = autocast_dtype(precision)
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def cast_frozen_weights(model: Flamingo, precision: str) -> None:
    """Casts the weights of `model`, in place, to what `precision` holds them in.

    In bf16 that is all parameters: see `cast_weights`. Under autocast, only frozen matrices are cast. A matrix that is also used in
    another way (an output head tied to the embeddings) stays as it is, and so does the output head, since checkpoints hold it. OpenCLIP's
    own ViT is cast as a whole: between its layers it keeps what it computes in the lower precision anyway, and then it needs no autocast
    (see `Flamingo._encode`), whose conversions take a third of its time.
    """
    if precision != "fp32":
        fuse_quick_gelu(model.vision_encoder)  # before its matrices are rounded
    if precision == "bf16":
        cast_weights(model, torch.bfloat16)
    elif precision in _AUTOCAST:
        if isinstance(model.vision_encoder, VisionTransformer):
            model.vision_encoder.to(_AUTOCAST[precision])
        users = Counter(id(parameter) for module in model.modules() for parameter in module.parameters(recurse=False))
        for module in model.modules():
            if isinstance(module, _MATRIX_LAYERS) and module is not output_head(model.lang_encoder):
                for parameter in module.parameters(recurse=False):
                    if not parameter.requires_grad and users[id(parameter)] == 1:
                        parameter.data = parameter.data.to(_AUTOCAST[precision])


class LossScaler:
    """For fp16, keeps the gradients of a backward pass within the range: the loss is multiplied by a scale, which halves when a
    gradient overflows and doubles after `GROWTH_INTERVAL` updates in which none did.

    torch.amp.GradScaler's rule, but decided by the global gradient norm: the same number on all ranks, however the gradients are
    sharded (an overflow on any makes it infinite or not a number). All of it stays on the device: the loop never waits for it.
    """

    def __init__(self, device: torch.device) -> None:
        self.scale = torch.tensor(INITIAL_SCALE, device=device)
        self.good_updates = torch.zeros((), dtype=torch.int32, device=device)  # since the scale last changed
        # Updates that changed no weight because a gradient overflowed, since the run began.
        self.skipped = torch.zeros((), dtype=torch.int32, device=device)

    @torch.no_grad()
    def update(self, norm: Tensor) -> None:
        """After an update, whose unscaled gradients had this norm, float32 []."""
        overflow = ~norm.isfinite()
        good_updates = self.good_updates + 1
        grown = good_updates >= GROWTH_INTERVAL
        factor = torch.where(overflow, 0.5, torch.where(grown, 2.0, 1.0))
        self.scale.mul_(factor).clamp_(*SCALE_RANGE)
        self.good_updates.copy_(torch.where(overflow | grown, 0, good_updates))
        self.skipped.add_(overflow)

    def state_dict(self) -> dict[str, float | int]:
        """All attributes as numbers. Waits for the device."""
        return {name: tensor.item() for name, tensor in vars(self).items()}

    def load_state_dict(self, state: dict[str, float | int]) -> None:
        for name, tensor in vars(self).items():
            tensor.fill_(state[name])
