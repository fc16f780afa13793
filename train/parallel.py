"""The same model on every rank: gradients averaged once an update."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from open_flamingo.train.distributed import World


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


def unwrapped(model: nn.Module) -> nn.Module:
    return model.module if isinstance(model, DistributedDataParallel) else model


def gradient_sync(model: nn.Module, synchronise: bool) -> AbstractContextManager:
    """The context of one forward *and* backward pass: whether this backward averages the gradients over the ranks.

    DDP decides in forward, so the context must cover both.
    """
    if synchronise or not isinstance(model, DistributedDataParallel):
        return nullcontext()
    return model.no_sync()
