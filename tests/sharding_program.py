"""Under torchrun: trains the same model on the same samples in every way of spreading it, and writes what came out.

    torchrun --nproc-per-node=4 tests/sharding_program.py OUTPUT_FOLDER [long]

Rank 0 writes {world_size}.pt: for each way, its losses, final weights, and for each rank the bytes it holds.
"""

from __future__ import annotations

import gc
import itertools
import sys
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from open_flamingo import Flamingo
from open_flamingo.resampler import PerceiverResampler
from open_flamingo.train.data.loader import Batch
from open_flamingo.train.distributed import World, detect_launcher, distributed, gather_objects
from open_flamingo.train.optimizer import build_optimizer
from open_flamingo.train.parallel import Sharding, full_tensor, parallelize
from open_flamingo.train.step import TrainDataset, Trainer, train_step
from open_flamingo.weights import trained_tensors
from tests.families import FAMILIES, IMAGE, VIS_DIM, VOCABULARY, flamingo, language_model

UPDATES = {"short": 2, "long": 10}
ROWS = 8  # an update and dataset, all ranks and micro-batches together


class BlockTower(nn.Module):
    """Images [M, 3, 8, 8] → patch tokens [M, 4, VIS_DIM], through blocks that can be sharded one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, VIS_DIM, kernel_size=4, stride=4)
        self.blocks = nn.Sequential(*(nn.Linear(VIS_DIM, VIS_DIM) for _ in range(2)))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.blocks(self.conv(images).flatten(2).transpose(1, 2))


def batches(kind: str, accumulation: int, world: World) -> Any:
    """This rank's part of the same ROWS samples an update, whatever the number of ranks and micro-batches.

    Every row has as many labels as any other, so that the mean over a part of them has the same weight as any other.
    """
    generator = torch.Generator().manual_seed({"laion": 0, "mmc4": 1}[kind])
    length, count = {"laion": (8, 1), "mmc4": (16, 2)}[kind]
    while True:
        input_ids = torch.randint(0, VOCABULARY - 4, (ROWS, length), generator=generator)
        input_ids[:, 0] = IMAGE
        if count == 2:
            input_ids[:, length // 2] = IMAGE
        images = torch.randn(ROWS, count, 3, 8, 8, generator=generator)
        labels = input_ids.masked_fill(input_ids == IMAGE, -100)
        for micro in range(accumulation):
            rows = slice(micro * world.world_size + world.rank, None, accumulation * world.world_size)
            ids = input_ids[rows]
            yield Batch(
                images[rows],
                [count] * len(ids),
                ids,
                labels[rows],
                [""] * len(ids),
                {},
                0,
                Counter(),
                Counter(),
            )


def small_flamingo(family: str, tied: bool, checkpointing: bool = False) -> Flamingo:
    """A Flamingo with a resampler of two layers and four latents, so that hundreds of updates take seconds."""
    model = flamingo(language_model(family, tied), tower=BlockTower)
    torch.manual_seed(2)
    model.perceiver = PerceiverResampler(VIS_DIM, depth=2, num_latents=4)
    model.set_gradient_checkpointing(checkpointing)
    return model


def build(family: str, tied: bool, world: World, checkpointing: bool) -> Flamingo:
    """The model on rank 0; what its structure is on the others, without weights."""
    with nullcontext() if world.is_main else torch.device("meta"):
        return small_flamingo(family, tied, checkpointing)


def held(model: Flamingo, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Bytes on this rank."""

    def local(tensor: torch.Tensor) -> int:
        part = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        return part.numel() * part.element_size()

    parameters = list(model.parameters())
    return {
        "parameters": sum(map(local, parameters)),
        "gradients": sum(local(p.grad) for p in parameters if p.grad is not None),
        "moments": sum(local(m) for state in optimizer.state.values() for m in state.values() if m.ndim > 0),
    }


def run(model: Flamingo, world: World, sharding: Sharding | None, accumulation: int, updates: int) -> dict[str, Any]:
    parallel_model = parallelize(model, world, sharding)
    optimizer = build_optimizer(model, 1e-3, 0.1)
    sources = []
    for kind, weight in (("laion", 0.2), ("mmc4", 1.0)):
        source = TrainDataset(kind, weight, batches(kind, accumulation, world), None, world.device)
        sources.append(source)
    trainer = Trainer(parallel_model, optimizer, sources, accumulation=accumulation)
    losses = []
    for _ in range(updates):
        norm = train_step(trainer, 1e-3)
        losses.append([*(source.loss / source.forwards for source in sources), float(norm)])
        for source in sources:
            source.reset()
    result = {
        "losses": losses,
        "weights": dict(trained_tensors(model, full_tensor)),
        "held": gather_objects(held(model, optimizer)),
    }
    # A process that ends with a live DDP object may abort, and DDP is part of a cycle.
    del parallel_model, trainer
    gc.collect()
    return result


def ways(world_size: int) -> dict[str, Sharding | None]:
    found: dict[str, Sharding | None] = {"ddp" if world_size > 1 else "single": None}
    found["full"] = Sharding(world_size)
    found["full, frozen whole"] = Sharding(world_size, shard_frozen=False)
    if world_size == 4:
        found["hybrid"] = Sharding(2)
        found["hybrid, frozen whole"] = Sharding(2, shard_frozen=False)
    return found


def variants(long: bool) -> list[tuple[bool, int]]:
    """(checkpointing, micro-batches): each with each, or each once."""
    return [*itertools.product((False, True), (1, 2))] if long else [(False, 1), (True, 2)]


def families(long: bool) -> list[tuple[str, bool]]:
    """(family, tied): each with both, or with one in turns."""
    found = [*itertools.product(FAMILIES, (True, False))]
    return found if long else found[::4] + found[3::4]


def main() -> None:
    folder, length = [*sys.argv[1:], "short"][:2]
    long = length == "long"
    with distributed(detect_launcher()) as world:
        results: dict[Any, Any] = {}
        for (way, sharding), (checkpointing, accumulation) in itertools.product(
            ways(world.world_size).items(), variants(long)
        ):
            model = build("llama", False, world, checkpointing)
            results[way, checkpointing, accumulation] = run(model, world, sharding, accumulation, UPDATES[length])
        if world.world_size == 2:
            for family, tied in families(long):
                for way in ("ddp", "full"):
                    model = build(family, tied, world, False)
                    results[family, tied, way] = run(model, world, ways(2)[way], 1, 3 if long else 2)
        if world.is_main:
            torch.save(results, Path(folder) / f"{world.world_size}.pt")


if __name__ == "__main__":
    main()
