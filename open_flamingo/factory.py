"""Build a Flamingo out of pretrained backbones."""

import io
import json
import logging
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import open_clip
import torch
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from . import backbones
from .flamingo import Flamingo
from .language_model import input_embedding, replaced
from .saving import Origin
from .vision import patch_width

logger = logging.getLogger(__name__)

END_OF_CHUNK, IMAGE, PAD = "<|endofchunk|>", "<image>", "<PAD>"
LONGEST_REASON = 500  # longer messages of the libraries below, such as lists of all parameters, are cut
# Of an OpenCLIP config, what describes the image transform beside the tower's image size.
PREPROCESSING = ("mean", "std", "interpolation", "resize_mode", "fill_color")
# CLIP's other half is not needed; OpenCLIP builds no tower without one.
NO_TEXT = {"context_length": 1, "vocab_size": 1, "width": 1, "heads": 1, "layers": 1}


def create_model_and_transforms(
    clip_vision_encoder_path: str,
    clip_vision_encoder_pretrained: str | None,
    lang_encoder_path: str,
    tokenizer_path: str | None = None,
    cross_attn_every_n_layers: int = 1,
    use_local_files: bool = False,
    decoder_layers_attr_name: str | None = None,
    freeze_lm_embeddings: bool = False,
    cache_dir: str | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    meta: bool = False,
    trust_remote_code: bool = False,
    **flamingo_kwargs: Any,
) -> tuple[Flamingo, Callable[..., Tensor], PreTrainedTokenizerBase]:
    """Load a vision encoder and a language model and join them.

    Raises ValueError or FileNotFoundError, in one line that names the argument, where something does not exist or does not fit.

    Args:
        clip_vision_encoder_path: an OpenCLIP model name ("ViT-L-14"), "hf-hub:…", "local-dir:…", or the path of an OpenCLIP model
            config (.json).
        clip_vision_encoder_pretrained: an OpenCLIP weight tag ("openai"), or a file with the weights of the whole CLIP or of its
            vision tower alone (.pt or .safetensors). None or "": random weights, or those that an "hf-hub:…" or "local-dir:…"
            brings, for which a tag means nothing.
        lang_encoder_path: a Hugging Face decoder-only language model, name or folder.
        tokenizer_path: its tokenizer; `lang_encoder_path` if None.
        use_local_files: do not ask the Hugging Face hub.
        cache_dir: where downloads are kept.
        tokenizer: one that `load_tokenizer` made, instead of that of `tokenizer_path`.
        meta: make the model on the meta device, without reading any weights: for ranks that get theirs from another.
        trust_remote_code: run the Python code that a language model or tokenizer brings along. Without it, such a model is refused
            unless transformers has the code itself. Files of weights never run code.
        others: see `Flamingo`.

    Returns:
        The model in float32, OpenCLIP's validation transform (PIL image → [3, height, width]), and the tokenizer with
        `<|endofchunk|>`, `<image>` and, if it had no padding token, `<PAD>` added.
    """
    vision_encoder, image_processor, image_size = load_vision_encoder(
        clip_vision_encoder_path, clip_vision_encoder_pretrained, cache_dir, meta
    )
    if tokenizer is None:
        path = tokenizer_path or lang_encoder_path
        tokenizer = load_tokenizer(path, use_local_files, cache_dir, trust_remote_code)
    vis_dim = patch_width(vision_encoder, image_size)
    with torch.device("meta") if meta else nullcontext():
        lang_encoder = load_language_model(
            lang_encoder_path, len(tokenizer), use_local_files, cache_dir, meta, trust_remote_code
        )
        eoc, media = tokenizer.convert_tokens_to_ids([END_OF_CHUNK, IMAGE])
        model = Flamingo(
            vision_encoder,
            lang_encoder,
            eoc,
            media,
            vis_dim,
            cross_attn_every_n_layers=cross_attn_every_n_layers,
            decoder_layers_attr_name=decoder_layers_attr_name,
            freeze_lm_embeddings=freeze_lm_embeddings,
            pad_token_id=tokenizer.pad_token_id,
            **flamingo_kwargs,
        )
    settings = {
        "vision_encoder_path": clip_vision_encoder_path,
        "vision_encoder_pretrained": clip_vision_encoder_pretrained,
        "lm_path": lang_encoder_path,
        "tokenizer_path": None if tokenizer_path == lang_encoder_path else tokenizer_path,
        "cross_attn_every_n_layers": cross_attn_every_n_layers,
        "decoder_layers_attr_name": decoder_layers_attr_name,
        "freeze_lm_embeddings": freeze_lm_embeddings,
        "train_output_rows": flamingo_kwargs.get("train_output_rows", False),
    }
    model.origin = Origin(settings, tokenizer)
    return model, image_processor, tokenizer


@contextmanager
def loading(argument: str, value: str, trust_remote_code: bool = True) -> Iterator[None]:
    """Errors within this `with`, of almost any kind, become one line, which begins with the argument and has its value."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, ValueError) and "trust_remote_code" in reason and not trust_remote_code:
            reason = (
                "it brings Python code of its own, which could do anything. Read it, and if you trust it pass "
                "trust_remote_code=True"
            )
        if len(reason) > LONGEST_REASON:
            reason = f"{reason[:LONGEST_REASON]} …"
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        raise kind(f"{argument}{'' if value in reason else f' {value!r}'}: {reason}") from error


def load_vision_encoder(
    path: str, pretrained: str | None = None, cache_dir: str | None = None, meta: bool = False
) -> tuple[nn.Module, Callable[..., Tensor], tuple[int, int]]:
    """An OpenCLIP vision tower in float32 and eval mode, its validation transform, and its image size (height, width)."""
    with loading("clip_vision_encoder_path", path):
        backbones.check_vision_encoder(path, open_clip.list_models())
        name, preprocessing = find_config(path, cache_dir)
    brings_weights = path.startswith(backbones.OPEN_CLIP_SCHEMES)
    pretrained = pretrained or ""
    with loading("clip_vision_encoder_pretrained", pretrained):
        is_file = backbones.is_file_name(pretrained)
    if brings_weights and pretrained and not is_file:
        logger.info("%s brings its own weights: %r is not used", path, pretrained)
        pretrained = ""

    tower: Any
    given = ("clip_vision_encoder_pretrained", pretrained) if pretrained else ("clip_vision_encoder_path", path)
    with loading(*given):
        if is_file:
            backbones.check_vision_weights(pretrained, path)
        elif pretrained:
            tags = open_clip.list_pretrained_tags_by_model(name)
            if pretrained not in tags:
                raise ValueError(
                    f"{pretrained!r} is neither a file nor an OpenCLIP weight tag of {path}; its tags are: "
                    f"{', '.join(tags) or 'none'}"
                )
            preprocessing = open_clip.get_pretrained_cfg(name, pretrained)
        if meta or not (pretrained or brings_weights):
            tower = build_tower(name, meta)
        elif is_file:
            tower = load_tower(name, path, pretrained)
        else:
            tower = load_clip(name if pretrained else path, pretrained or None, cache_dir).visual
    size = tower.image_size
    options = {key: preprocessing[key] for key in PREPROCESSING if preprocessing.get(key) is not None}
    image_processor = open_clip.image_transform(size, is_train=False, **options)
    return tower.float().eval(), image_processor, size if isinstance(size, tuple) else (size, size)


def find_config(path: str, cache_dir: str | None) -> tuple[str, dict[str, Any]]:
    """The name under which OpenCLIP finds the config of the model at `path`, and the preprocessing that comes with it."""
    if path.startswith("hf-hub:"):
        file = Path(hf_hub_download(path.removeprefix("hf-hub:"), backbones.OPEN_CLIP_CONFIG, cache_dir=cache_dir))
    elif path.startswith("local-dir:"):
        file = Path(path.removeprefix("local-dir:")) / backbones.OPEN_CLIP_CONFIG
    elif path.endswith(".json"):
        file = Path(path)
    else:
        return path.replace("/", "-"), {}
    config, preprocessing = backbones.read_vision_config(file)
    name = f"{file.stem}-custom-{len(open_clip.list_models())}"  # which no other model has
    with tempfile.TemporaryDirectory() as folder:
        named = Path(folder) / f"{name}.json"
        named.write_text(json.dumps(config), encoding="utf-8")
        open_clip.add_model_config(named)
    return name, preprocessing


def build_tower(name: str, meta: bool = False) -> nn.Module:
    """The vision tower of OpenCLIP's model `name`, random or on the meta device."""
    config = open_clip.get_model_config(name)
    vision = config["vision_cfg"] | {"timm_model_pretrained": False}
    with torch.device("meta") if meta else nullcontext():
        return open_clip.CLIP(config["embed_dim"], vision, NO_TEXT, config.get("quick_gelu", False)).visual


def load_clip(name: str, pretrained: str | None, cache_dir: str | None = None) -> Any:
    """A whole CLIP with weights: those of a tag or file, or those that a `name` with a scheme brings."""
    # For a text tower that brings code of its own, transformers would ask on the terminal whether to run it: refused at once.
    with replaced(vars(sys), "stdin", io.StringIO()):
        return open_clip.create_model(name, pretrained, cache_dir=cache_dir, require_pretrained=True)


def load_tower(name: str, path: str, file: str) -> nn.Module:
    """The vision tower of `name`, which the user calls `path`, with the weights in `file`: its own, or of a whole CLIP."""
    try:
        weights = read_tower_weights(file)
        if weights is None:
            return load_clip(name, file).visual
        tower = build_tower(name)
        tower.load_state_dict(weights)
    except Exception as error:
        raise ValueError(f"the weights in {file} do not fit the vision encoder {path}: {error}") from error
    return tower


def read_tower_weights(path: str) -> dict[str, Tensor] | None:
    """The state dict of a file that holds a vision tower alone; None for any other, which OpenCLIP reads itself.

    Nothing in the file is executed, here or (torch ≥ 2.6) by OpenCLIP: ValueError if it cannot be read without that.
    """
    weights: Any
    if path.endswith((".npz", ".npy")):
        return None
    if path.endswith(".safetensors"):
        weights = load_file(path)
    else:
        members = zipfile.ZipFile(path).namelist() if zipfile.is_zipfile(path) else []
        if any(name.endswith("/constants.pkl") for name in members):
            raise ValueError(
                "it is a TorchScript program, as OpenAI publishes them, not a file of weights. If you trust it: "
                "torch.save(torch.jit.load(file).state_dict(), another_file)"
            )
        weights = torch.load(path, map_location="cpu", weights_only=True)
    weights = weights.get("state_dict", weights)
    weights = {name.removeprefix("module."): tensor for name, tensor in weights.items()}
    visual = {name.removeprefix("visual."): tensor for name, tensor in weights.items() if name.startswith("visual.")}
    is_whole = "logit_scale" in weights or 0 < len(visual) < len(weights)
    return None if is_whole else visual or weights


def load_tokenizer(
    path: str, use_local_files: bool = False, cache_dir: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """A tokenizer with the model's special tokens added to those that it has."""
    with loading("tokenizer_path", path, trust_remote_code):
        backbones.check_tokenizer(path)
        tokenizer = AutoTokenizer.from_pretrained(
            path, local_files_only=use_local_files, trust_remote_code=trust_remote_code, cache_dir=cache_dir
        )
        if tokenizer.eos_token is None:
            raise ValueError("the tokenizer has no eos_token, which ends every text: set it in tokenizer_config.json")
    new = [token for token in (END_OF_CHUNK, IMAGE) if token not in tokenizer.get_vocab()]
    tokenizer.add_tokens(new, special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": PAD})
    return tokenizer


def load_language_model(
    path: str,
    vocabulary: int,
    use_local_files: bool = False,
    cache_dir: str | None = None,
    meta: bool = False,
    trust_remote_code: bool = False,
) -> nn.Module:
    """A causal language model in float32 whose matrices have at least `vocabulary` rows; without weights if `meta`."""
    # trust_remote_code is never None: transformers would ask on the terminal.
    where = {"local_files_only": use_local_files, "trust_remote_code": trust_remote_code, "cache_dir": cache_dir}
    model: Any
    with loading("lang_encoder_path", path, trust_remote_code):
        backbones.check_language_model(path)
        if meta:
            config = AutoConfig.from_pretrained(path, **where)
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code, dtype=torch.float32)
        else:
            model = AutoModelForCausalLM.from_pretrained(path, **where, dtype=torch.float32)
    if vocabulary > len(input_embedding(model).weight):
        # New rows are from N(0, initializer_range), as the reference's, not around the mean of the old ones: the gates start shut, so
        # nothing depends on it before training, and it spares the covariance of the whole matrix.
        model.resize_token_embeddings(vocabulary, mean_resizing=False)
    return model.eval()
