"""Build a Flamingo out of pretrained backbones."""

import hashlib
import json
import logging
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import open_clip
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from .flamingo import Flamingo
from .language_model import input_embedding
from .vision import patch_width, prepare_for_tokens

END_OF_CHUNK = "<|endofchunk|>"
IMAGE = "<image>"
PAD = "<PAD>"


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
    meta: bool = False,
    **flamingo_kwargs: Any,
) -> tuple[Flamingo, Callable[..., Tensor], PreTrainedTokenizerBase]:
    """Load a vision encoder and a language model and join them.

    Args:
        clip_vision_encoder_path: an OpenCLIP model name ("ViT-L-14"), "hf-hub:…", "local-dir:…", or the path of an
            OpenCLIP model config (.json).
        clip_vision_encoder_pretrained: an OpenCLIP weight tag ("openai"), or a file with the weights of the whole CLIP
            or of its vision tower alone (.pt or .safetensors). None: random weights, or what the path brings.
        lang_encoder_path: a Hugging Face decoder-only language model, name or folder.
        tokenizer_path: its tokenizer; `lang_encoder_path` if None.
        cross_attn_every_n_layers: a gated cross-attention block before every n-th decoder layer.
        use_local_files: do not ask the Hugging Face hub.
        decoder_layers_attr_name: where the decoder layers are ("model.layers"); found by structure if None.
        freeze_lm_embeddings: do not train the rows of the new tokens.
        cache_dir: where downloads are kept.
        meta: make all but the vision encoder on the meta device, without reading the language model's weights: for ranks
            that get theirs from another.
        flamingo_kwargs: `gradient_checkpointing`, `train_output_rows`: see `Flamingo`.

    Returns:
        The model in float32, OpenCLIP's validation transform (PIL image → [3, height, width]), and the tokenizer with
        `<|endofchunk|>`, `<image>` and, if it had no padding token, `<PAD>` added.

    Raises:
        ValueError, FileNotFoundError: what was asked for does not exist or does not fit; the message says what.
    """
    vision_encoder, image_processor, image_size = load_vision_encoder(
        clip_vision_encoder_path, clip_vision_encoder_pretrained, cache_dir
    )
    tokenizer = load_tokenizer(tokenizer_path or lang_encoder_path, use_local_files, cache_dir)
    vis_dim = patch_width(vision_encoder, image_size)
    with torch.device("meta") if meta else nullcontext():
        lang_encoder = load_language_model(lang_encoder_path, len(tokenizer), use_local_files, cache_dir, meta)
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
    return model, image_processor, tokenizer


# ---------------------------------------------------------------------------------------------------------------------
# Vision


def load_vision_encoder(
    path: str, pretrained: str | None = None, cache_dir: str | None = None
) -> tuple[nn.Module, Callable[..., Tensor], tuple[int, int]]:
    """An OpenCLIP vision tower in float32 and eval mode, its validation transform, and its image size in pixels.

    See `create_model_and_transforms` for the arguments and errors.
    """
    name = path
    if path.endswith(".json"):
        name = register_config(Path(path))
    elif not path.startswith(("hf-hub:", "local-dir:")) and path not in open_clip.list_models():
        raise ValueError(
            f"{path!r} is neither an OpenCLIP model name (see open_clip.list_models()), nor 'hf-hub:…', 'local-dir:…' "
            "or the path of a model config (.json)"
        )

    file = pretrained if pretrained and is_file_name(pretrained) else None
    if file is not None and not Path(file).is_file():
        raise FileNotFoundError(f"no such file of vision encoder weights: {file}")
    if pretrained and file is None and not path.startswith(("hf-hub:", "local-dir:")):
        tags = open_clip.list_pretrained_tags_by_model(name)
        if pretrained not in tags:
            raise ValueError(
                f"{pretrained!r} is neither a file nor an OpenCLIP weight tag of {path}; "
                f"its tags are: {', '.join(tags) or 'none'}"
            )
    with no_warning_of_random_weights(file is not None):
        try:
            tower_weights = read_tower_weights(file) if file is not None else None
            clip, _, image_processor = open_clip.create_model_and_transforms(
                name, pretrained=pretrained if tower_weights is None else None, cache_dir=cache_dir
            )
            if tower_weights is not None:
                clip.visual.load_state_dict(tower_weights)
        except Exception as error:
            if file is None:
                raise
            raise ValueError(f"the weights in {file} do not fit the vision encoder {path}: {error}") from error
    tower = clip.visual.float().eval()
    prepare_for_tokens(tower)
    size = getattr(tower, "image_size", 224)
    return tower, image_processor, size if isinstance(size, tuple) else (size, size)


@contextmanager
def no_warning_of_random_weights(enabled: bool) -> Iterator[None]:
    """OpenCLIP warns of a tower with random weights before we have had the chance to load them."""

    def other(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("No pretrained weights loaded")

    logger = logging.getLogger()
    if enabled:
        logger.addFilter(other)
    try:
        yield
    finally:
        logger.removeFilter(other)


def is_file_name(pretrained: str) -> bool:
    """Whether `pretrained` means a file, there or not, rather than an OpenCLIP tag."""
    path = Path(pretrained)
    return path.is_file() or len(path.parts) > 1 or path.suffix in (".pt", ".pth", ".bin", ".safetensors", ".npz")


def register_config(path: Path) -> str:
    """Make OpenCLIP know the model config in a file, under a name that no other has; return that name."""
    if not path.is_file():
        raise FileNotFoundError(f"no such OpenCLIP model config: {path}")
    text = path.read_text(encoding="utf-8")
    try:
        config = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    config = config.get("model_cfg", config)
    lacking = [key for key in ("embed_dim", "vision_cfg", "text_cfg") if key not in config]
    if lacking:
        raise ValueError(f"{path} is not an OpenCLIP model config: it has no {', '.join(lacking)}")
    name = f"{path.stem}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
    if name not in open_clip.list_models():
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / f"{name}.json"
            copy.write_text(json.dumps(config), encoding="utf-8")
            open_clip.add_model_config(copy)
    return name


def read_tower_weights(path: str) -> dict[str, Tensor] | None:
    """The state dict of a file that holds a vision tower alone; None for any other, which OpenCLIP reads itself."""
    weights: Any
    if path.endswith(".safetensors"):
        weights = load_file(path)
    else:
        try:
            weights = torch.load(path, map_location="cpu", weights_only=True)
        except Exception:  # a TorchScript archive (OpenAI's own) or NumPy file, which OpenCLIP knows how to read
            return None
    weights = weights.get("state_dict", weights)
    weights = {name.removeprefix("module."): tensor for name, tensor in weights.items()}
    if all(name.startswith("visual.") for name in weights):
        return {name.removeprefix("visual."): tensor for name, tensor in weights.items()}
    if any(name.startswith("visual.") for name in weights) or "logit_scale" in weights:
        return None
    return weights


# ---------------------------------------------------------------------------------------------------------------------
# Language


def load_tokenizer(path: str, use_local_files: bool = False, cache_dir: str | None = None) -> PreTrainedTokenizerBase:
    """A tokenizer with the model's special tokens added to those that it has."""
    tokenizer = AutoTokenizer.from_pretrained(
        path, local_files_only=use_local_files, trust_remote_code=True, cache_dir=cache_dir
    )
    new = [token for token in (END_OF_CHUNK, IMAGE) if token not in tokenizer.get_vocab()]
    tokenizer.add_tokens(new, special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": PAD})
    return tokenizer


def load_language_model(
    path: str, vocabulary: int, use_local_files: bool = False, cache_dir: str | None = None, meta: bool = False
) -> nn.Module:
    """A causal language model in float32 whose matrices have at least `vocabulary` rows; without weights if `meta`.

    New rows are drawn as the reference's version of transformers did, from N(0, initializer_range), not around the mean
    of the old ones as today's default: the gates start shut, so nothing depends on it before training, and it
    spares the covariance of the whole matrix.
    """
    # transformers 5 loads in the checkpoint's type unless told, and has renamed the argument.
    dtype = "dtype" if int(transformers.__version__.split(".")[0]) >= 5 else "torch_dtype"
    where = {"local_files_only": use_local_files, "trust_remote_code": True, "cache_dir": cache_dir}
    model: Any
    if meta:
        config = AutoConfig.from_pretrained(path, **where)
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=True, **{dtype: torch.float32})
    else:
        model = AutoModelForCausalLM.from_pretrained(path, **where, **{dtype: torch.float32})
    if vocabulary > len(input_embedding(model).weight):
        model.resize_token_embeddings(vocabulary, mean_resizing=False)
    return model.eval()
