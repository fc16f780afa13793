"""Backbones of any shape without a download: configs and a tokenizer on disk, weights that follow from their names.

Both programs build their model from the same folder, and then each sets every parameter to a function of the parameter's name.
Their names are the same, so their weights are, and nothing the size of a model is written or read.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from benchmarks.shapes import Shape

VISION_CONFIG = "benchmark-vision.json"
WEIGHTS = "weights.pt"
END_OF_TEXT = "<|endoftext|>"
ADDED_TOKENS = 3  # <|endofchunk|>, <image> and <PAD>, by either program
GATE = 0.5
"""Value of the gates. At their usual start, 0, nothing of an image would reach the loss, and a difference would not show."""


def write_backbones(folder: Path, shape: Shape) -> None:
    """Writes the shape, `benchmark-vision.json` (an OpenCLIP config) and `language/` (config and tokenizer)."""
    language = folder / "language"
    language.mkdir(parents=True, exist_ok=True)
    write_configs(folder, shape)
    save_file({}, language / "model.safetensors")  # programs look whether there is one
    write_tokenizer(language, shape.vocabulary - ADDED_TOKENS)


def write_configs(folder: Path, shape: Shape) -> None:
    shape.write(folder)
    text = {"width": 64, "heads": 1, "layers": 1}
    config = {"embed_dim": 64, "vision_cfg": shape.vision, "text_cfg": text, "quick_gelu": shape.quick_gelu}
    (folder / VISION_CONFIG).write_text(json.dumps(config))
    sizes = {"vocab_size": shape.vocabulary, "bos_token_id": 0, "eos_token_id": 0}
    (folder / "language" / "config.json").write_text(json.dumps(shape.language | sizes))


def read_merges() -> list[tuple[str, str]]:
    """CLIP's byte-pair merges, most frequent first: OpenCLIP's package has 262,000 of them."""
    path = Path(open_clip.__file__).parent / "bpe_simple_vocab_16e6.txt.gz"
    with gzip.open(path, "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")[1:]  # the first is its version
    return [(pair[0], pair[1]) for line in lines if len(pair := line.split()) == 2]


def write_tokenizer(folder: Path, size: int) -> None:
    """A tokenizer of English of exactly `size` tokens, with `END_OF_TEXT` for its end of sequence."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [END_OF_TEXT, *alphabet, *(f"{letter}</w>" for letter in alphabet)]
    merges = read_merges()[: size - len(tokens)]
    tokens += [first + second for first, second in merges]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if len(vocabulary) != size:
        raise ValueError(f"a tokenizer has from {2 * len(alphabet) + 1} tokens to those of CLIP's merges, not {size}")
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    words = Regex(r"""'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+""")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, behavior="removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT)
    fast.save_pretrained(folder)


@contextmanager
def without_weights() -> Iterator[None]:
    """Within it, `AutoModelForCausalLM.from_pretrained` needs no weights: it makes a model of the folder's config."""
    original = AutoModelForCausalLM.from_pretrained

    def from_config(path: str, **_: Any) -> nn.Module:
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path)).float().eval()

    AutoModelForCausalLM.from_pretrained = from_config
    try:
        yield
    finally:
        AutoModelForCausalLM.from_pretrained = original


def build(folder: Path, gradient_checkpointing: bool, meta: bool = False) -> tuple[Any, Any, Any]:
    """This program's model, image processor and tokenizer of what `write_backbones` wrote, with random weights or (`meta`) none."""
    from open_flamingo import create_model_and_transforms  # not where the reference runs

    with without_weights():
        return create_model_and_transforms(
            str(folder / VISION_CONFIG),
            None,
            str(folder / "language"),
            cross_attn_every_n_layers=Shape.read(folder).cross_attn_every_n_layers,
            use_local_files=True,
            gradient_checkpointing=gradient_checkpointing,
            meta=meta,
        )


@torch.no_grad()
def set_weights(model: nn.Module, folder: Path) -> None:
    """Sets each parameter to a function of its name, shape and device, but those that `folder` has a value for. `.new_rows` are
    rows of the matrix beside them."""
    for name, parameter in model.named_parameters():
        if name.endswith(".new_rows"):
            continue
        parameter.copy_(weight_of(name, parameter))
        module = model.get_submodule(name.rpartition(".")[0])
        if name.endswith(".weight") and "new_rows" in module._parameters:
            new_rows, new_ids = (getattr(module, name) for name in ("new_rows", "new_ids"))
            new_rows.copy_(parameter[new_ids])
    if (folder / WEIGHTS).exists():
        model.load_state_dict(torch.load(folder / WEIGHTS), strict=False)


def weight_of(name: str, like: Tensor) -> Tensor:
    generator = torch.Generator(like.device).manual_seed(zlib.crc32(name.encode()))
    noise = torch.empty_like(like).normal_(generator=generator)
    if name.endswith("_gate"):
        return noise.fill_(GATE)
    if like.ndim == 1 and name.endswith(".weight"):  # of a norm
        return 1 + 0.1 * noise
    if name.endswith("perceiver.latents"):
        return noise
    return 0.02 * noise
