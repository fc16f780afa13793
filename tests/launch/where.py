"""Joins a run as train.py does; rank 0 prints what was found, and the ranks' local places, as one line of JSON."""

from __future__ import annotations

import json

from open_flamingo.train.distributed import detect_launcher, distributed, gather_objects


def main() -> None:
    found = detect_launcher()
    with distributed(found) as world:
        ranks = gather_objects([world.rank, world.local_rank, world.local_world_size])
        if world.is_main:
            ours = (found.launcher, found.rank, found.world_size, found.local_rank, found.local_world_size)
            names = ("launcher", "rank", "world_size", "local_rank", "local_world_size")
            print("found", json.dumps({**dict(zip(names, ours)), "ranks": ranks}), flush=True)


if __name__ == "__main__":
    main()
