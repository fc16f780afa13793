"""Which data, how it is read, and how it is divided among ranks and loader processes."""

from __future__ import annotations

import argparse
import logging
import math
from dataclasses import dataclass

from open_flamingo.train.data.shards import resolve_shards
from open_flamingo.train.distributed import World, run_on_rank0

logger = logging.getLogger(__name__)

MIN_LANES = 16


@dataclass(frozen=True)
class DataOptions:
    """Which data, and how it is read.

    Attributes:
        kind: "laion" or "mmc4".
        shards: a pattern (see `shards.expand_shards`) or a list of URLs.
        batch_size: samples per batch on each rank.
        workers: loader processes on each rank; 0 loads in the training process.
        seed: of everything random here.
        lanes: see `resolve_lanes`; ranks × workers must divide it.
        resampled: draw shards with replacement.
        max_image_pixels: larger images are left out; None for no limit.
        shuffle_buffer: undecoded samples held for shuffling, in each lane; None for 500 (LAION) or 32 (MMC4). Memory is
            lanes ÷ (ranks × workers) of these in each process.
        prefetch: batches that the workers are ahead.
        timeout: seconds that a batch may take before the worker waited for counts as hung. More than three times
            `streams.STALL`, so that a read that stalls is first tried again.
        startup_timeout: the same for the first batch, for which the workers fill their shuffle buffers.
    """

    kind: str
    shards: str | tuple[str, ...]
    batch_size: int
    workers: int = 1
    seed: int = 42
    lanes: int = MIN_LANES
    resampled: bool = False
    max_image_pixels: int | None = None
    mmc4_textsim_threshold: float = 30
    mmc4_max_num_images: int = 6
    mmc4_min_num_images: int = 1
    shuffle_buffer: int | None = None
    prefetch: int = 2
    timeout: float = 450.0
    startup_timeout: float = 3600.0
    rank: int = 0
    world_size: int = 1


def resolve_workers(workers: int, batch_size: int, world_size: int, lanes: int | None = None) -> int:
    """The largest number of workers up to `workers` that gives each an equal part of a batch, and whole lanes if `lanes` is given.

    0 stays 0. Says so, as a warning, if it is fewer than asked for.

    Raises ValueError if `lanes` cannot be divided among `world_size` ranks at all.
    """
    if lanes is not None:
        _check_ranks(lanes, world_size)
    best = workers
    while best > 1 and (batch_size % best or (lanes is not None and lanes % (world_size * best))):
        best -= 1
    if best != workers:
        reason = f"a batch of {batch_size}" if batch_size % workers else f"{lanes} lanes on {world_size} ranks"
        logger.warning("%d loader workers per rank instead of %d: %s cannot be shared equally", best, workers, reason)
    return best


def resolve_lanes(data_lanes: int | None, world_size: int, workers: int) -> int:
    """`data_lanes` if given; else the least number ≥ 16 that ranks × workers divides, by a power of two.

    For a power of two of processes that is the smallest power of two ≥ max(16, ranks × workers): enough shards open at
    once to mix well, few enough to hold open.

    Raises ValueError if ranks × workers does not divide `data_lanes`, with the numbers that do.
    """
    processes = world_size * max(1, workers)
    if data_lanes is None:
        odd = processes // (processes & -processes)
        return odd * 2 ** math.ceil(math.log2(max(MIN_LANES, processes) / odd))
    _check_ranks(data_lanes, world_size)
    if data_lanes % processes:
        fitting = [w for w in range(1, data_lanes // world_size + 1) if data_lanes % (world_size * w) == 0]
        raise ValueError(
            f"{data_lanes} data lanes cannot be shared by {world_size} ranks × {max(1, workers)} workers: "
            f"with {world_size} ranks, use one of {fitting} workers"
        )
    return data_lanes


def _check_ranks(lanes: int, world_size: int) -> None:
    if lanes < 1 or lanes % world_size:
        fitting = [ranks for ranks in range(1, max(lanes, 0) + 1) if lanes % ranks == 0]
        raise ValueError(
            f"{lanes} data lanes cannot be shared by {world_size} ranks: use one of {fitting} ranks "
            f"(or, for a new run, a --data_lanes that {world_size} divides)"
        )


def data_options(args: argparse.Namespace, world: World, saved_lanes: int | None) -> dict[str, DataOptions]:
    """What each dataset's loader needs to know. Every rank must call this.

    Args:
        saved_lanes: those of the run that is continued.

    Raises ValueError where there are no shards, or lanes, ranks and workers do not fit together.
    """
    lanes = resolve_lanes(args.data_lanes or saved_lanes, world.world_size, args.workers)
    options = {}
    for kind in ("laion", "mmc4"):
        if (spec := getattr(args, f"{kind}_shards")) is None:
            continue
        batch_size = getattr(args, f"batch_size_{kind}")
        options[kind] = DataOptions(
            kind=kind,
            # Rank 0 looks for them: two listings could differ.
            shards=tuple(run_on_rank0(resolve_shards, f"--{kind}_shards", spec, args.missing_shards)),
            batch_size=batch_size,
            workers=resolve_workers(args.workers, batch_size, world.world_size, lanes),
            seed=args.seed,
            lanes=lanes,
            resampled=args.dataset_resampled,
            max_image_pixels=args.max_image_pixels,
            mmc4_textsim_threshold=args.mmc4_textsim_threshold,
            mmc4_max_num_images=args.mmc4_max_num_images,
            mmc4_min_num_images=args.mmc4_min_num_images,
            shuffle_buffer=getattr(args, f"shuffle_buffer_{kind}"),
            timeout=args.dist_timeout,
            startup_timeout=args.startup_timeout,
            rank=world.rank,
            world_size=world.world_size,
        )
    return options
