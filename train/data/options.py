"""Which data, how it is read, and how it is divided among ranks and loader processes."""

import argparse
import logging
from dataclasses import dataclass
from typing import Any

from open_flamingo.train.data.shards import resolve_shards
from open_flamingo.train.distributed import World, run_on_rank0

logger = logging.getLogger(__name__)

MIN_LANES = 16


@dataclass(frozen=True)
class DataOptions:
    """Which data, and how it is read."""

    kind: str  # "laion" or "mmc4"
    shards: str | tuple[str, ...]  # a pattern (see `shards.expand_shards`) or URLs
    batch_size: int  # samples per batch on each rank
    workers: int = 1  # loader processes on each rank; 0 loads in the training process
    seed: int = 42  # of everything random here
    lanes: int = MIN_LANES  # see `resolve_lanes`; ranks × workers must divide it
    resampled: bool = False  # draw shards with replacement
    max_image_pixels: int | None = None  # larger images are left out; None for no limit
    mmc4_textsim_threshold: float = 30
    mmc4_max_num_images: int = 6
    mmc4_min_num_images: int = 1
    shuffle_buffer: int | None = (
        None  # undecoded samples held for shuffling in each lane; None for `workers.SHUFFLE_BUFFER`
    )
    # Seconds that a batch may take before its worker counts as hung: three times `streams.STALL` and more, as reads are tried again.
    timeout: float = 450.0
    startup_timeout: float = 3600.0  # the same for the first batch, for which the workers fill their shuffle buffers
    rank: int = 0
    world_size: int = 1


def resolve_workers(workers: int, batch_size: int, world_size: int, lanes: int = 0) -> int:
    """The most workers, up to `workers`, that share a batch equally, and the lanes if given; says so if it is fewer. 0 stays 0."""
    fitting = (n for n in range(workers, 0, -1) if batch_size % n == 0 and lanes % (world_size * n) == 0)
    best = next(fitting, 0)
    if best != workers:
        reason = f"a batch of {batch_size}" if batch_size % workers else f"{lanes} lanes on {world_size} ranks"
        logger.warning("%d loader workers per rank instead of %d: %s cannot be shared equally", best, workers, reason)
    return best


def resolve_lanes(lanes: int | None, world_size: int, workers: int) -> int:
    """`lanes` if given; else ranks × workers, doubled until it is at least 16: enough shards open at once to mix well, few enough to hold open.

    Raises ValueError if ranks × workers does not divide `lanes`, with the numbers that do.
    """
    processes = world_size * max(1, workers)
    if lanes is None:
        lanes = processes
        while lanes < MIN_LANES:
            lanes *= 2
    if lanes < 1 or lanes % world_size:
        fitting = [ranks for ranks in range(1, lanes + 1) if lanes % ranks == 0]
        raise ValueError(
            f"{lanes} data lanes cannot be shared by {world_size} ranks: use one of {fitting} ranks "
            f"(or, for a new run, a --data_lanes that {world_size} divides)"
        )
    if lanes % processes:
        fitting = [n for n in range(1, lanes // world_size + 1) if lanes % (world_size * n) == 0]
        raise ValueError(
            f"{lanes} data lanes cannot be shared by {world_size} ranks × {max(1, workers)} workers: "
            f"with {world_size} ranks, use one of {fitting} workers"
        )
    return lanes


def sample_options(args: argparse.Namespace) -> dict[str, Any]:
    """What decides which samples are accepted, and what becomes of them."""
    names = ("max_image_pixels", "mmc4_textsim_threshold", "mmc4_max_num_images", "mmc4_min_num_images")
    return {name: getattr(args, name) for name in names}


def data_options(args: argparse.Namespace, world: World, saved_lanes: int | None) -> dict[str, DataOptions]:
    """What each dataset's loader needs to know; `saved_lanes` are those of the run that is continued. Every rank must call this.

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
            **sample_options(args),
            shuffle_buffer=getattr(args, f"shuffle_buffer_{kind}"),
            timeout=args.dist_timeout,
            startup_timeout=args.startup_timeout,
            rank=world.rank,
            world_size=world.world_size,
        )
    return options
