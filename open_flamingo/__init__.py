"""OpenFlamingo: a frozen vision encoder and a frozen language model, joined by trained cross-attention.

The names below are imported on first use, so that `import open_flamingo` (which every `--help` does) loads no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .factory import create_model_and_transforms
    from .flamingo import Flamingo
    from .pretrained import load

__all__ = ["Flamingo", "create_model_and_transforms", "load"]

_HOME = {"Flamingo": "flamingo", "create_model_and_transforms": "factory", "load": "pretrained"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
