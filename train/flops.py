"""Floating-point operations of the matrix products that an update needs, and what devices can do of them per second.

A product of m × k and k × n is 2·m·k·n. Recomputing, padding, masked products and gradients of frozen weights are not needed, so not
counted; nor are elementwise operations.
"""

import operator
import re
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from open_flamingo import Flamingo
from open_flamingo.language_model import input_embedding
from open_flamingo.vision import patch_tokens

# Dense bfloat16 or float16 products per second, from NVIDIA's and AMD's data sheets (without sparsity); by a part of the device's name.
PEAK_FLOPS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H800": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "A40": 149.7e12,
    "A10G": 70e12,
    "V100": 125e12,  # float16
    "MI300X": 1307e12,
    "MI250X": 191.5e12,  # of one of its two dies, which torch sees as a device
}


class Work(NamedTuple):
    """What forward passes work on, without padding."""

    images: int = 0
    tokens: int = 0
    with_image: int = 0  # tokens that see an image
    labeled: int = 0  # tokens that are predicted
    pairs: int = 0  # of a token and one that it attends to: itself and those before it in its row

    def plus(self, other: "Work") -> "Work":
        return Work(*map(operator.add, self, other))


INNER, FF_MULT = 512, 4  # heads × width of a head, and the feed-forward's inner width ÷ its outer, of what is trained


@dataclass(frozen=True)
class ModelFlops:
    """The sizes that decide what an update of a model needs."""

    vision: float  # operations of the vision encoder, forward, for one image
    patches: int  # tokens that it gives of one
    width: int  # of these, and of the latents
    dim: int  # width of the language model
    layers: int  # of it
    decoder: int  # parameters of these layers' matrices
    vocabulary: int  # rows of the output head
    gated: int  # cross-attention blocks
    latents: int = 64  # per image
    depth: int = 6  # of the resampler

    def needed(self, work: Work) -> dict[str, float]:
        """Of one update on these, by part.

        - vision: real images, forward only, since nothing before or in it is trained.
        - resampler: real images, forward and twice that backward (gradients of inputs and of weights), since all of it is trained.
        - gated cross-attention: the same, for every token; each token attends to the latents of one image.
        - language model: forward once and backward once, since frozen weights need no gradient of their own. Causal attention is
          counted over the half that is not masked, forward once and backward twice.
        - head: forward and backward, at the positions that have a label.
        """
        keys = self.patches + self.latents
        resampler = self.depth * (
            2 * self.latents * self.width * INNER * 2  # queries, and the way out
            + 2 * keys * self.width * 2 * INNER  # keys and values
            + 4 * self.latents * keys * INNER  # attention
            + 4 * self.latents * self.width * FF_MULT * self.width
        )
        cross_attention = self.gated * (
            2 * work.tokens * self.dim * INNER * 2
            + 2 * work.images * self.latents * self.width * 2 * INNER
            + 4 * work.with_image * self.latents * INNER
            + 4 * work.tokens * self.dim * FF_MULT * self.dim
        )
        linear = 2 * work.tokens * self.decoder
        attention = self.layers * 4 * self.dim * work.pairs
        return {
            "vision": self.vision * work.images,
            "resampler": 3.0 * resampler * work.images,
            "gated cross-attention": 3.0 * cross_attention,
            "language model": 2.0 * linear + 3.0 * attention,
            "head": 2.0 * 2 * work.labeled * self.dim * self.vocabulary,
        }

    @classmethod
    def of(cls, model: Flamingo, image: Tensor) -> "ModelFlops":
        """Of `model`, before it is wrapped. `image`: float32 [3, H, W]. Raises almost anything for a tower that cannot be on meta."""
        # On the meta device nothing is computed, and any tower can be counted.
        tower = _PatchTokens(model.vision_encoder)
        meta = {name: tensor.to("meta") for name, tensor in (*tower.named_parameters(), *tower.named_buffers())}
        dtype = next(tower.parameters()).dtype
        with torch.no_grad(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            tokens = functional_call(tower, meta, (torch.empty(1, *image.shape, dtype=dtype, device="meta"),))
        layers: Any = list(model.decoder_layers)
        gated = [layer.gated_cross_attn_layer for layer in layers if layer.gated_cross_attn_layer is not None]
        return cls(
            vision=counter.get_total_flops(),
            patches=tokens.shape[1],
            width=tokens.shape[2],
            dim=gated[0].attn.norm.weight.numel(),
            layers=len(layers),
            decoder=round(sum(_visited_weights(layer.decoder_layer, model.lang_encoder.config) for layer in layers)),
            vocabulary=len(input_embedding(model.lang_encoder).weight),
            gated=len(gated),
            latents=len(model.perceiver.latents),
            depth=len(model.perceiver.layers),
        )


def _visited_weights(layer: nn.Module, config: Any) -> float:
    """Of the matrices of a decoder layer, those that a token goes through: of a mixture of experts, only some."""
    config = config.get_text_config()
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    share = config.num_experts_per_tok / experts if experts else 1.0
    matrices = [(name, p) for name, p in layer.named_parameters() if p.ndim > 1]
    return sum(p.numel() * (share if ".experts." in name else 1.0) for name, p in matrices)


class _PatchTokens(nn.Module):
    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, images: Tensor) -> Tensor:
        return patch_tokens(self.tower, images)


def peak_flops(device: torch.device, precision: str) -> float | None:
    """What the device can do per second, None where that is not known."""
    if device.type != "cuda" or precision == "fp32":
        return None
    name = torch.cuda.get_device_name(device)
    if "MIG" in name or ("V100" in name and precision != "fp16"):
        return None
    return next((flops for part, flops in PEAK_FLOPS.items() if re.search(rf"\b{part}\b", name)), None)
