"""Tiny random language models of many families, and a tiny vision tower, for the model's tests."""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from open_flamingo import Flamingo

VOCABULARY = 61
END_OF_CHUNK, IMAGE, PAD = 58, 59, 60
HIDDEN, LAYERS, HEADS = 32, 2, 4
PATCHES = 4
VIS_DIM = 24

LLAMA_LIKE = {
    "hidden_size": HIDDEN,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
}
# Of state space layers.
MAMBA_LIKE = LLAMA_LIKE | {"mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 4, "mamba_d_head": 8}
GPT2_LIKE = {"n_embd": HIDDEN, "n_layer": LAYERS, "n_head": HEADS}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "opt": (
        "OPT",
        {
            "hidden_size": HIDDEN,
            "ffn_dim": 64,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "word_embed_proj_dim": 16,
            "dropout": 0.1,
        },
    ),
    "gpt_neox": ("GPTNeoX", {k: v for k, v in LLAMA_LIKE.items() if k != "num_key_value_heads"}),
    "llama": ("Llama", LLAMA_LIKE),
    "mistral": ("Mistral", LLAMA_LIKE | {"sliding_window": 4}),
    "qwen2": ("Qwen2", LLAMA_LIKE),
    "qwen3": ("Qwen3", LLAMA_LIKE | {"head_dim": 8}),
    "gemma2": ("Gemma2", LLAMA_LIKE | {"head_dim": 8, "sliding_window": 4}),
    # Its embedding is a subclass that scales what it looks up.
    "gemma3": ("Gemma3", LLAMA_LIKE | {"head_dim": 8, "sliding_window": 4}),
    # Its head divides the logits by a constant.
    "granite": ("Granite", LLAMA_LIKE | {"logits_scaling": 4.0}),
    "phi": ("Phi", {k: v for k, v in LLAMA_LIKE.items() if k != "num_key_value_heads"}),
    "gpt2": ("GPT2", GPT2_LIKE),
    "gptj": ("GPTJ", GPT2_LIKE | {"rotary_dim": 4}),
    "mpt": ("Mpt", {"d_model": HIDDEN, "n_layers": LAYERS, "n_heads": HEADS}),
    "falcon": ("Falcon", {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}),
    # Its head multiplies by a constant of the base model; each layer has attention and a state space side by side.
    "falcon_h1": (
        "FalconH1",
        MAMBA_LIKE | {"head_dim": 8, "mamba_d_ssm": HIDDEN, "mamba_n_heads": HEADS, "lm_head_multiplier": 0.5},
    ),
    # One block of attention, shared by several layers.
    "zamba2": (
        "Zamba2",
        {k: v for k, v in LLAMA_LIKE.items() if k != "num_key_value_heads"}
        | {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2, "num_mem_blocks": 1}
        | {"mamba_d_state": 8, "mamba_ngroups": 1, "n_mamba_heads": HEADS, "chunk_size": 4, "adapter_rank": 4},
    ),
    "granite_hybrid": (
        "GraniteMoeHybrid",
        MAMBA_LIKE
        | {"mamba_n_heads": 8, "layer_types": ["mamba", "attention"], "logits_scaling": 4.0}
        | {"shared_intermediate_size": 64, "num_local_experts": 0, "num_experts_per_tok": 0},
    ),
}
CLASS_NAMES = {"gpt2": "GPT2LMHeadModel"}
CONFIG_NAMES = {"gemma3": "Gemma3TextConfig"}


def language_model(family: str, tied: bool, **overrides: Any) -> nn.Module:
    """A random model whose weights are large enough for every token to matter."""
    prefix, settings = FAMILIES[family]
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": PAD}
    settings = {"vocab_size": VOCABULARY, "tie_word_embeddings": tied} | settings | ids | overrides
    config = getattr(transformers, CONFIG_NAMES.get(family, f"{prefix}Config"))(**settings)
    torch.manual_seed(0)
    model = getattr(transformers, CLASS_NAMES.get(family, f"{prefix}ForCausalLM"))(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    return model


class TinyTower(nn.Module):
    """Images [M, 3, 8, 8] → 4 patch tokens [M, 4, VIS_DIM]. Counts the images that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, VIS_DIM, kernel_size=4, stride=4)
        self.images_seen = 0

    def forward(self, images: Tensor) -> Tensor:
        self.images_seen += len(images)
        return self.conv(images)


def flamingo(
    lang_encoder: nn.Module, gates: float = 0.5, tower: Callable[[], nn.Module] = TinyTower, **kwargs: Any
) -> Flamingo:
    """A Flamingo whose gates stand at `gates`."""
    torch.manual_seed(1)
    kwargs = {"pad_token_id": PAD} | kwargs
    kwargs = {"vis_dim": VIS_DIM} | kwargs
    model = Flamingo(tower(), lang_encoder, END_OF_CHUNK, IMAGE, **kwargs)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("_gate"):
                parameter.fill_(gates)
    return model


def images(rows: int, slots: int) -> Tensor:
    return torch.randn(rows, slots, 1, 3, 8, 8, generator=torch.Generator().manual_seed(2))


def text() -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, attention mask and labels of three rows: with two images, one and none; the later two are padded."""
    token_ids = torch.tensor(
        [
            [3, IMAGE, 5, 6, 7, END_OF_CHUNK, IMAGE, 8, 9, END_OF_CHUNK],
            [10, 11, IMAGE, 12, 13, 14, END_OF_CHUNK, PAD, PAD, PAD],
            [15, 16, 17, 18, 19, PAD, PAD, PAD, PAD, PAD],
        ]
    )
    labels = token_ids.clone()
    labels[(token_ids == PAD) | (token_ids == IMAGE)] = -100
    labels[:, 0] = -100
    return token_ids, (token_ids != PAD).long(), labels
