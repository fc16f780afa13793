"""What names a backbone, checked as far as the standard library can without the network, so that a mistake shows at once.

The functions raise ValueError or FileNotFoundError, saying what is wrong and what to give instead; the caller names the flag.
"""

import json
import re
from collections.abc import Collection
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Any

OPEN_CLIP_SCHEMES = ("hf-hub:", "local-dir:")  # of paths to a folder with a config and weights
OPEN_CLIP_CONFIG = "open_clip_config.json"
_HUB_NAME = re.compile(r"(?![.-])[\w.-]{1,96}(/[\w.-]{1,96})?", re.ASCII)
_WEIGHT_SUFFIXES = (".pt", ".pth", ".bin", ".safetensors", ".npz")


def check_vision_encoder(path: str, names: Collection[str] | None = None) -> None:
    """`path` is an OpenCLIP model name, "hf-hub:…", "local-dir:…", or a model config (.json) that can be read.

    `names` are those that OpenCLIP knows; by default, what its package holds, found without importing it.
    """
    if path == "hf-hub:":
        raise ValueError("'hf-hub:' must be followed by a name, such as 'hf-hub:laion/CLIP-ViT-B-32-laion2B-s34B-b79K'")
    if path.startswith("hf-hub:"):
        return
    if path.startswith("local-dir:"):
        config = Path(path.removeprefix("local-dir:")) / OPEN_CLIP_CONFIG
        if not config.is_file():
            raise FileNotFoundError(f"there is no file {config}: give a folder that OpenCLIP's push_to_hub made")
    elif path.endswith(".json"):
        read_vision_config(Path(path))
    elif (names := names or _open_clip_names()) and path.replace("/", "-") not in names:  # as OpenCLIP does
        near = ", ".join(get_close_matches(path, names, n=3))
        raise ValueError(
            f"{path!r} is neither an OpenCLIP model name{near and f' (near it: {near})'}, nor 'hf-hub:…', 'local-dir:…' or "
            "the path of a model config (.json); open_clip.list_models() lists the names"
        )


def _open_clip_names() -> list[str]:
    """The model names that the installed OpenCLIP knows, found without importing it; none if it is laid out otherwise."""
    package = find_spec("open_clip")
    folders = package and package.submodule_search_locations
    return sorted(file.stem for folder in folders or () for file in Path(folder).glob("model_configs/*.json"))


def read_vision_config(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The model config in a file, OpenCLIP's own kind or one of a hub folder, and what it says of preprocessing."""
    if not path.is_file():
        raise FileNotFoundError(f"no such OpenCLIP model config: {path}")
    whole = _read_json(path)
    config = whole.get("model_cfg", whole)
    lacking = [key for key in ("embed_dim", "vision_cfg", "text_cfg") if key not in config]
    if lacking:
        raise ValueError(f"{path} is not an OpenCLIP model config: it has no {', '.join(lacking)}")
    return config, whole.get("preprocess_cfg", {})


def check_vision_weights(pretrained: str, path: str) -> None:
    """`pretrained` is a file that exists, or can be a tag (OpenCLIP knows which), or is empty where `path` brings weights."""
    if not pretrained and not path.startswith(OPEN_CLIP_SCHEMES):
        raise ValueError("it is empty: give an OpenCLIP weight tag, such as 'openai', or a file")
    if is_file_name(pretrained) and not Path(pretrained).is_file():
        raise FileNotFoundError(f"no such file of vision encoder weights: {pretrained}")


def is_file_name(pretrained: str) -> bool:
    """Whether `pretrained` means a file, there or not, rather than an OpenCLIP tag."""
    path = Path(pretrained)
    return path.is_file() or len(path.parts) > 1 or pretrained.startswith(".") or path.suffix in _WEIGHT_SUFFIXES


def check_language_model(path: str) -> None:
    """`path` is a folder with a model, or can be a name on the Hugging Face hub."""
    if not _is_folder(path):
        return
    config = Path(path) / "config.json"
    if not config.is_file():
        raise FileNotFoundError(f"the folder {path} has no config.json: give one that save_pretrained made")
    _read_json(config)
    if not _has(path, "*.safetensors", "*.bin"):
        raise FileNotFoundError(f"the folder {path} has no weights (*.safetensors or *.bin)")


def check_tokenizer(path: str) -> None:
    """`path` is a folder with a tokenizer, or can be a name on the Hugging Face hub."""
    if _is_folder(path) and not _has(path, "*token*", "vocab*", "*.model", "spiece*"):
        raise FileNotFoundError(f"the folder {path} has no tokenizer (tokenizer.json, or the older vocabulary files)")


def _has(folder: str, *patterns: str) -> bool:
    return any(any(Path(folder).glob(pattern)) for pattern in patterns)


def _is_folder(path: str) -> bool:
    """Whether `path` is a folder here; if not, it must be able to be a name on the hub."""
    if not path:
        raise ValueError("it is empty: give a folder, or a name on the Hugging Face hub")
    if Path(path).is_dir():
        return True
    if not _HUB_NAME.fullmatch(path):
        home = "; '~' is your home folder only to the shell: write it out" if path.startswith("~") else ""
        raise FileNotFoundError(f"there is no folder {path!r}, and it cannot be a name on the Hugging Face hub{home}")
    return False


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, not a {type(value).__name__}")
    return value
