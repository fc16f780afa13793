"""The same model on every rank: gradients averaged once an update."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from open_flamingo.train.distributed import World
from open_flamingo.train.precision import autocast


def parallelise(model: nn.Module, world: World) -> nn.Module:
    """Wraps `model`, already on its device, for `world`. A single process needs no wrapper."""
    if world.world_size == 1:
        return model
    # No device_ids: given them, DDP would move the labels to the GPU, where picking the positions that count waits for it.
    return DistributedDataParallel(
        model,
        broadcast_buffers=False,  # the buffers are constants of frozen models
        gradient_as_bucket_view=True,  # no second copy of the gradients
    )


def rehearse(model: nn.Module, image: Tensor, media_token_id: int, eoc_token_id: int, precision: str = "fp32") -> None:
    """One pass over a made-up sample whose gradients are thrown away: call it once, before the first update.

    After its first backward pass, DDP lays its buckets out anew, in the order in which the gradients came. With more
    than two ranks, the layout decides in which order gradients are added up; so without this, the first update after
    a resume would differ in its last bits from the same update of a run that was not stopped.

    Args:
        image: float32 [3, H, W], as the vision encoder takes them.
    """
    if not isinstance(model, DistributedDataParallel):
        return
    tokens = torch.tensor([[media_token_id, eoc_token_id]])
    device = next(model.parameters()).device
    with autocast(precision, device):
        loss = model(vision_x=image.to(device)[None, None, None], lang_x=tokens.to(device), labels=tokens).loss
    loss.backward()
    model.zero_grad(set_to_none=True)


def gradient_sync(model: nn.Module, synchronise: bool) -> AbstractContextManager:
    """The context of one forward *and* backward pass: whether this backward averages the gradients over the ranks.

    DDP decides in forward, so the context must cover both.
    """
    if synchronise or not isinstance(model, DistributedDataParallel):
        return nullcontext()
    return model.no_sync()
