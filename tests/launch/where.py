"""Joins a run as train.py does; rank 0 prints what was found, and the ranks' local places, as one line of JSON."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

from open_flamingo.train.distributed import distributed, find_place, gather_objects


def main() -> None:
    place = find_place(horovod="--horovod" in sys.argv)
    with distributed(place, "env://", "nccl") as world:
        ranks = gather_objects([world.rank, world.local_rank, world.local_world_size])
        if world.is_main:
            print("found", json.dumps({**asdict(place), "ranks": ranks}), flush=True)


if __name__ == "__main__":
    main()
