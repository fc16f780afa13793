"""From a checkpoint to a model that can be used: `load`.

A checkpoint is data: weights are read as tensors alone, settings as JSON or plain values, and nothing in it is executed.
"""

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download, snapshot_download
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .factory import END_OF_CHUNK, IMAGE, create_model_and_transforms, load_tokenizer
from .flamingo import Flamingo
from .saving import CONFIG, KIND, TOKENIZER, WEIGHTS, made_of_weights
from .weights import cast_weights

# Of each released model, its language model and the spacing of its gated blocks. Their checkpoints record neither.
RELEASED = {
    "openflamingo/OpenFlamingo-3B-vitl-mpt1b": ("anas-awadalla/mpt-1b-redpajama-200b", 1),
    "openflamingo/OpenFlamingo-3B-vitl-mpt1b-langinstruct": ("anas-awadalla/mpt-1b-redpajama-200b-dolly", 1),
    "openflamingo/OpenFlamingo-4B-vitl-rpj3b": ("togethercomputer/RedPajama-INCITE-Base-3B-v1", 2),
    "openflamingo/OpenFlamingo-4B-vitl-rpj3b-langinstruct": ("togethercomputer/RedPajama-INCITE-Instruct-3B-v1", 2),
    "openflamingo/OpenFlamingo-9B-vitl-mpt7b": ("anas-awadalla/mpt-7b", 4),
}
RELEASED_VISION = {"vision_encoder_path": "ViT-L-14", "vision_encoder_pretrained": "openai"}
RELEASED_FILE = "checkpoint.pt"
_HUB_NAME = re.compile(r"(?![.-])[\w.-]{1,96}/[\w.-]{1,96}", re.ASCII)

# What of a checkpoint's flags or config builds the model; the first five are arguments of `load`.
SETTINGS = {
    **dict.fromkeys(("vision_encoder_path", "vision_encoder_pretrained", "lm_path", "tokenizer_path"), str),
    **{"cross_attn_every_n_layers": int, "decoder_layers_attr_name": str},
    **{"freeze_lm_embeddings": bool, "train_output_rows": bool},
}
# Argument of `create_model_and_transforms`, which its errors name → argument here.
_ARGUMENTS = {
    "clip_vision_encoder_path": "vision_encoder_path",
    "clip_vision_encoder_pretrained": "vision_encoder_pretrained",
    "lang_encoder_path": "lm_path",
    "tokenizer_path": "tokenizer_path",
}


@dataclass
class _Found:
    """What a checkpoint holds."""

    place: str  # for messages: the file, folder or name
    weights: Mapping[str, Tensor]
    settings: dict[str, Any] = field(default_factory=dict)  # some of `SETTINGS`
    tokens: dict[str, int] = field(default_factory=dict)
    tokenizer: Path | None = None  # a folder that was saved with it
    training: dict[str, Any] = field(default_factory=dict)  # see `saving.Origin`


def load(
    checkpoint: str | os.PathLike[str],
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    *,
    vision_encoder_path: str | None = None,
    vision_encoder_pretrained: str | None = None,
    lm_path: str | None = None,
    tokenizer_path: str | None = None,
    cross_attn_every_n_layers: int | None = None,
    use_local_files: bool = False,
    cache_dir: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[Flamingo, Callable[..., Tensor], PreTrainedTokenizerBase]:
    """A trained model, ready to be used, from what its checkpoint records; arguments that are given override that.

    Nothing in a checkpoint is executed. Raises ValueError or FileNotFoundError, in one line that names the path or argument and says what
    to do.

    Args:
        checkpoint: a checkpoint of a run, a file or (sharded) a folder; the folder of a run, for its newest; a folder that
            `Flamingo.save_pretrained` wrote; or, on the Hugging Face hub, the name of such a one or of a released model
            ("openflamingo/OpenFlamingo-3B-vitl-mpt1b"). Files of the reference, or of weights alone, need the arguments below.
        device: where the model is put; by default a GPU if there is one.
        dtype: of its parameters; float32 by default.
        vision_encoder_path: an OpenCLIP model, as for `create_model_and_transforms`.
        vision_encoder_pretrained: its weights: an OpenCLIP tag or a file.
        lm_path: the Hugging Face language model, name or folder.
        tokenizer_path: its tokenizer; `lm_path` if neither this is given nor the checkpoint records one.
        cross_attn_every_n_layers: a gated block stands before every n-th decoder layer.
        use_local_files: do not ask the Hugging Face hub.
        cache_dir: where downloads are kept.
        trust_remote_code: run the Python code that the language model or its tokenizer brings (MPT-1B and MPT-7B do). It is never recorded.

    Returns:
        The model in eval mode, OpenCLIP's validation transform (PIL image → float32 [3, height, width]), and the tokenizer, padding on
        the left as `Flamingo.generate` needs.
    """
    found = _find(os.fspath(checkpoint), cache_dir, use_local_files)
    values = (vision_encoder_path, vision_encoder_pretrained, lm_path, tokenizer_path, cross_attn_every_n_layers)
    given = {name: value for name, value in zip(SETTINGS, values) if value is not None}
    settings = found.settings | given
    _check_complete(found, settings)
    if trust_remote_code:
        _refuse_own_code(found, given)
    saved = found.tokenizer if "tokenizer_path" not in given else None
    with _naming(found, given):
        # A folder that came with the checkpoint may not bring code, whatever of the language model's is trusted.
        tokenizer = None if saved is None else load_tokenizer(str(saved), True)
        model, image_processor, tokenizer = create_model_and_transforms(
            settings["vision_encoder_path"],
            settings.get("vision_encoder_pretrained"),
            settings["lm_path"],
            settings.get("tokenizer_path"),
            cross_attn_every_n_layers=settings["cross_attn_every_n_layers"],
            use_local_files=use_local_files,
            decoder_layers_attr_name=settings.get("decoder_layers_attr_name"),
            freeze_lm_embeddings=bool(settings.get("freeze_lm_embeddings")),
            cache_dir=cache_dir,
            tokenizer=tokenizer,
            trust_remote_code=trust_remote_code,
            train_output_rows=bool(settings.get("train_output_rows")),
        )
    _load_weights(model, found, tokenizer)
    assert model.origin is not None
    model.origin.training = found.training
    if dtype is not None:
        cast_weights(model, dtype)
    tokenizer.padding_side = "left"
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return model.to(device).eval(), image_processor, tokenizer


def _check_complete(found: _Found, settings: dict[str, Any]) -> None:
    """Raises ValueError, naming the arguments to pass, where neither they nor the checkpoint say what the model is made of."""
    lacking = [name for name in ("vision_encoder_path", "lm_path", "cross_attn_every_n_layers") if name not in settings]
    if not made_of_weights(settings):
        lacking.append("vision_encoder_pretrained")
    if lacking:
        raise ValueError(f"{found.place} does not record what the model is made of: pass {', '.join(sorted(lacking))}")


def _refuse_own_code(found: _Found, given: dict[str, Any]) -> None:
    """Raises ValueError where a checkpoint names itself as its language model or tokenizer, whose code would be trusted."""
    for name in ("lm_path", "tokenizer_path"):
        value = found.settings.get(name)
        if name in given or value is None:
            continue
        inside = os.path.exists(found.place) and Path(value).resolve().is_relative_to(Path(found.place).resolve())
        if inside or value == found.place:
            raise ValueError(
                f"{found.place} names itself as {name}, and code of a checkpoint is not run: pass {name}=… if you trust it"
            )


def _load_weights(model: Flamingo, found: _Found, tokenizer: Any) -> None:
    """Raises ValueError, naming what does not fit, where they are of another model."""
    advice = f"{found.place} is of another model. Compare lm_path, vision_encoder_path and cross_attn_every_n_layers"
    for token, index in found.tokens.items():
        if tokenizer.convert_tokens_to_ids(token) != index:
            raise ValueError(
                f"{found.place} was trained with {token} as token {index}, which this tokenizer has not: leave out "
                "tokenizer_path, or pass the tokenizer of the training"
            )
    try:
        incompatible = model.load_state_dict(found.weights, strict=False)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{advice}: {' '.join(str(error).split())}") from error
    if wrong := incompatible.unexpected_keys + incompatible.missing_keys:
        raise ValueError(f"{advice}: {len(wrong)} parameters do not match, the first {wrong[0]}")


@contextmanager
def _naming(found: _Found, given: dict[str, Any]) -> Iterator[None]:
    """Errors of the factory name the arguments of `load`, and say where what is not there was recorded."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        text = str(error)
        argument = next((name for name in _ARGUMENTS if text.startswith(name)), None)
        if argument is None:
            raise
        ours = _ARGUMENTS[argument]
        if ours == "tokenizer_path" and not (found.settings | given).get(ours) and found.tokenizer is None:
            ours = "lm_path"  # whose tokenizer it is
        text = text.replace(argument, ours, 1)
        if ours not in given and "trust_remote_code" not in text:
            text += f". {found.place} records it: pass {ours}=… if it is elsewhere now"
        raise type(error)(text) from error


def _find(checkpoint: str, cache_dir: str | None, local: bool) -> _Found:
    """What is at a path or has a name. Raises ValueError or FileNotFoundError, naming it, where there is nothing that can be used."""
    path = Path(checkpoint)
    if path.is_dir():
        return _saved(path, checkpoint) if (path / CONFIG).is_file() else _of_run(path)
    if path.exists():
        return _of_run(path)
    if not _HUB_NAME.fullmatch(checkpoint):
        raise FileNotFoundError(
            f"there is no checkpoint {checkpoint!r}: give a file, a folder, or a name on the Hugging Face hub"
        )
    try:
        if checkpoint in RELEASED:
            file = hf_hub_download(checkpoint, RELEASED_FILE, cache_dir=cache_dir, local_files_only=local)
        else:
            patterns = [CONFIG, WEIGHTS, f"{TOKENIZER}/*"]
            folder = snapshot_download(checkpoint, cache_dir=cache_dir, local_files_only=local, allow_patterns=patterns)
    except Exception as error:  # of the network, the hub or its cache: almost anything
        reason = " ".join(str(error).split())[:500]
        raise FileNotFoundError(
            f"there is no file or folder {checkpoint!r} here, and the Hugging Face hub does not give it: {reason}"
        ) from error
    if checkpoint not in RELEASED:
        return _saved(Path(folder), checkpoint)
    found = _of_run(Path(file))
    found.place = checkpoint
    language_model, spacing = RELEASED[checkpoint]
    found.settings = RELEASED_VISION | {"lm_path": language_model, "cross_attn_every_n_layers": spacing}
    return found


def _saved(folder: Path, place: str) -> _Found:
    """A folder that `Flamingo.save_pretrained` wrote."""
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if config["model_type"] != KIND:
            raise ValueError(f"{config['model_type']!r} is not {KIND!r}")
        tokens = {token: config["tokens"][token] for token in (END_OF_CHUNK, IMAGE)}
        tokenizer = folder / TOKENIZER if (folder / TOKENIZER).is_dir() else None
        training = config.get("training") or {}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{place}: its {CONFIG} is not one that save_pretrained wrote: {error}") from error
    try:
        weights = load_file(folder / WEIGHTS)
    except Exception as error:  # broken bytes make safetensors raise errors of its own
        raise ValueError(f"{place}: its {WEIGHTS} cannot be read: {error}") from error
    return _Found(place, weights, _settings(config, place), tokens, tokenizer, training)


def _settings(recorded: dict[str, Any], place: str) -> dict[str, Any]:
    """Raises ValueError where one is of another type than it must be."""
    settings = {name: recorded[name] for name in SETTINGS if recorded.get(name) is not None}
    for name, value in settings.items():
        if type(value) is not SETTINGS[name]:
            raise ValueError(f"{place}: {name} is recorded as {value!r}")
    return settings


def _of_run(path: Path) -> _Found:
    """A checkpoint that the training program wrote, or the newest in the folder of a run; or a file of the reference or bare weights."""
    # Only these are the program's: the model does not need it otherwise.
    from open_flamingo.train.checkpoint import SHARDED_STATE, files
    from open_flamingo.train.sharded import read_weights

    if path.is_dir() and not (path / SHARDED_STATE).is_file():
        if (newest := files.newest_readable(path)) is None:
            raise ValueError(
                f"{path} holds no checkpoint that can be read: give one, the folder of a run, or one of save_pretrained"
            )
        path, checkpoint = newest
    else:
        files.verify(path)
        checkpoint = files.load(path)
    weights = read_weights(path, checkpoint) if path.is_dir() else checkpoint["model_state_dict"]
    flags = checkpoint.get("flags", {})
    settings = _settings(flags, str(path))
    training: dict[str, Any] = {}
    if flags:
        updates, epochs = checkpoint.get("step", 0), checkpoint.get("epoch", -1) + 1
        training = {"updates": updates, "epochs": epochs, "flags": flags, "versions": checkpoint.get("versions", {})}
        if (figures := _last_validation(path.parent / "metrics.jsonl", updates)) is not None:
            training["validation"] = figures
    return _Found(str(path), weights, settings, training=training)


def _last_validation(metrics: Path, updates: int) -> dict[str, Any] | None:
    """The figures of a run's last validation until `updates`, if its log is there."""
    if not metrics.is_file():
        return None
    last = None
    with metrics.open("rb") as lines:
        for line in lines:
            if b'"seconds_validating"' in line:
                try:
                    figures = json.loads(line)
                except ValueError:  # of a run that was killed
                    continue
                if figures.get("step", 0) <= updates:
                    last = figures
    return last
