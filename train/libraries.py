"""Checks, at the start, what this program uses of other libraries without their promise: docs/dependencies.md.

So a new version of a library is an error of one line, not a crash hours later or a wrong update.
"""

from __future__ import annotations

import logging
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

# The oldest and the newest version with which the tests have passed: those of constraints-oldest.txt and constraints.txt.
TESTED = {
    "torch": ("2.11.0", "2.14.1"),
    "transformers": ("5.17.0", "5.24.0"),
    "open_clip_torch": ("3.0.0", "3.3.0"),
}


def with_versions(problem: object) -> str:
    """`problem`, and what is installed beside what was tested."""
    libraries = ", ".join(f"{name} {_version(name)} ({old} to {new} are tested)" for name, (old, new) in TESTED.items())
    return f"{problem}. This is {libraries}. `pip install -c constraints.txt '.[training]'` installs tested versions"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "missing"


def check_libraries(device: torch.device, compiled: bool) -> None:
    """Raises ValueError where training would be wrong or could not begin; warns of what only makes it slower.

    Args:
        device: of the training.
        compiled: whether the model will be.
    """
    if not adamw_scales_and_skips(device):
        problem = "torch's fused AdamW no longer follows `grad_scale` and `found_inf`: gradients would not be clipped"
        raise ValueError(with_versions(problem))
    if compiled and not has_compiler_settings():
        raise ValueError(with_versions("torch's compiler has other settings: train without --compile"))
    if not knows_image_transform():
        problem = "OpenCLIP's image transform has other parts: it prepares images itself, at half the speed or less"
        log.warning("%s", with_versions(problem))


def adamw_scales_and_skips(device: torch.device) -> bool:
    """Whether AdamW within `optimizer.clipping` divides gradients by what it should, and skips a step whose norm is not finite."""
    import torch
    from torch import nn

    from open_flamingo.train.optimizer import build_optimizer, clipping

    model = nn.Linear(1, 1, bias=False, device=device)
    optimizer = build_optimizer(model, learning_rate=1.0, weight_decay=0.0)
    before = model.weight.detach().clone()
    model.weight.grad = torch.full_like(before, 8.0)
    with clipping(optimizer, torch.tensor(float("inf"), device=device), max_norm=1.0, scale=1.0):
        optimizer.step()
    skipped = torch.equal(model.weight, before)
    with clipping(optimizer, torch.tensor(2.0, device=device), max_norm=1.0, scale=2.0):
        optimizer.step()
    state = optimizer.state[model.weight]
    first_moment = 0.1 * 8.0 / (2.0 * 2.0)  # (1 - β1) · gradient / (scale · clipping)
    return skipped and bool(((state["exp_avg"] - first_moment).abs() < 1e-4).all()) and int(state["step"]) == 1


def has_compiler_settings() -> bool:
    import torch

    settings = ((torch._dynamo.config, "optimize_ddp"), (torch.compiler.config, "recompile_limit"))
    return all(hasattr(config, name) for config, name in settings)


def knows_image_transform() -> bool:
    import open_clip

    from open_flamingo.train.data.images import image_spec

    return image_spec(open_clip.image_transform(224, is_train=False)) is not None
