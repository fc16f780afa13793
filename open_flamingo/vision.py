"""Patch tokens out of any OpenCLIP vision tower.

OpenCLIP gives one pooled vector per image; a Flamingo needs the tokens before pooling. For OpenCLIP's own ViTs these are the last
block's output *before* the final layer norm `ln_post`: that is what released OpenFlamingo weights were trained on. OpenCLIP ≥ 2.24
applies `ln_post` to the tokens it returns unless a tower's config says otherwise, so the tower's own output is not used here.

Dimensions: M images, V patch tokens, D width.
"""

from typing import Any

import torch
from open_clip.transformer import QuickGELU
from torch import Tensor, nn


def patch_tokens(tower: Any, images: Tensor) -> Tensor:
    """Images [M, 3, height, width] → patch tokens [M, V, D], found by what the tower is made of:

    - a timm trunk: its feature map, or its tokens less the class and register tokens
    - OpenCLIP's own ViTs and ResNets: the last block's output, before `ln_post` or pooling and without the class token
    - anything else: what it returns, or the last item of a tuple (pooled, tokens)

    Raises ValueError if the tower gives neither tokens [M, V, D] nor a feature map [M, D, height, width].
    """
    if hasattr(tower, "trunk"):
        trunk = tower.trunk
        features = trunk.forward_features(images)
        if features.ndim == 4 and getattr(trunk, "output_fmt", "NCHW") == "NHWC":
            return features.flatten(1, 2)
        if features.ndim == 3:
            features = features[:, getattr(trunk, "num_prefix_tokens", 0) :]
    elif hasattr(tower, "forward_intermediates"):
        features = tower.forward_intermediates(images, indices=1, intermediates_only=True)["image_intermediates"][-1]
    else:
        features = tower(images)
        if isinstance(features, (tuple, list)):
            features = features[-1]

    if features.ndim == 4:
        return features.flatten(2).transpose(1, 2)
    if features.ndim != 3:
        raise ValueError(
            f"the vision encoder {type(tower).__name__} gives features of shape {tuple(features.shape)}: expected "
            "patch tokens (images, tokens, width) or a feature map (images, channels, height, width)"
        )
    return features


@torch.no_grad()
def patch_width(tower: Any, image_size: tuple[int, int]) -> int:
    """D, the width of the tower's patch tokens: measured on one blank image of `image_size` (height, width)."""
    parameter = next(tower.parameters())
    image = torch.zeros(1, 3, *image_size, dtype=parameter.dtype, device=parameter.device)
    return patch_tokens(tower, image).shape[-1]


@torch.no_grad()
def fuse_quick_gelu(tower: nn.Module) -> None:
    """In the ViTs of OpenAI's CLIP x · sigmoid(1.702 · x) is three kernels. It is silu(1.702 · x) / 1.702, one kernel, with the factors
    multiplied into the matrices before and after it, in place."""
    for mlp in tower.modules():
        is_plain = isinstance(
            getattr(mlp, "ln", nn.Identity()), nn.Identity
        )  # a norm between would take the factor away
        if isinstance(mlp, nn.Sequential) and isinstance(getattr(mlp, "gelu", None), QuickGELU) and is_plain:
            for parameter in mlp.get_submodule("c_fc").parameters():
                parameter.mul_(1.702)
            mlp.get_parameter("c_proj.weight").div_(1.702)
            mlp.gelu = nn.SiLU()
