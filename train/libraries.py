"""Checks, at the start, of what is used of other libraries without their promise (docs/dependencies.md): a new version of one is an error
of one line, not a crash hours later or a wrong update."""

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
    libraries = []
    for name, (old, new) in TESTED.items():
        try:
            installed = version(name)
        except PackageNotFoundError:
            installed = "missing"
        libraries.append(f"{name} {installed} ({old} to {new} are tested)")
    advice = "`pip install -c constraints.txt '.[training]'` installs tested versions"
    return f"{problem}. This is {', '.join(libraries)}. {advice}"


def check_libraries(device: "torch.device", compiled: bool) -> None:
    """Raise ValueError if training on `device` would be wrong or could not begin; warn of what only makes it slower."""
    import open_clip
    import torch

    from open_flamingo.train.data.images import image_spec
    from open_flamingo.train.optimizer import build_optimizer, clipping

    # Within `clipping`, AdamW must skip the step whose norm is not finite, and divide the gradient of the other.
    model = torch.nn.Linear(1, 1, bias=False, device=device)
    optimizer = build_optimizer(model, learning_rate=1.0, weight_decay=0.0)
    before = model.weight.item()
    model.weight.grad = torch.full_like(model.weight, 8.0)
    for norm in (torch.inf, 2.0):
        with clipping(optimizer, torch.tensor(norm, device=device), max_norm=1.0, scale=2.0):
            optimizer.step()
    state = optimizer.state[model.weight]
    values = (state["step"].item(), state["exp_avg"].item(), before - model.weight.item())
    # One step, (1 - β1) · gradient / (scale · clipping), the learning rate.
    if not all(abs(value - right) < 1e-4 for value, right in zip(values, (1.0, 0.1 * 8.0 / (2.0 * 2.0), 1.0))):
        problem = "torch's fused AdamW no longer follows `grad_scale` and `found_inf`: gradients would not be clipped"
        raise ValueError(with_versions(problem))
    settings = (
        (torch._dynamo.config, "optimize_ddp"),  # imports the next but one
        (torch.compiler.config, "recompile_limit"),
        (torch.fx.experimental._config, "use_duck_shape"),
    )
    if compiled and not all(hasattr(config, name) for config, name in settings):
        raise ValueError(with_versions("torch's compiler has other settings: train without --compile"))
    if image_spec(open_clip.image_transform(224, is_train=False)) is None:
        problem = "OpenCLIP's image transform has other parts: it prepares images itself, at half the speed or less"
        log.warning("%s", with_versions(problem))
