"""The loader's lanes at the size of a large run: who reads which shard, and what it costs to know.

    python benchmarks/loader_scale.py                            # 512 ranks × 4 workers, LAION-2B's and MMC4's shard lists
    python benchmarks/loader_scale.py --write docs/scaling.md    # and into the document

The program's own `expand_shards`, `ShardOrder`, `Lane` and `LoaderState` run here, for all ranks in one process, over shard names with no
files behind them: shards are made up in memory (`read_made_up_shard`), small ones, so that a whole pass takes seconds. Times and
memory are of this machine; all else is exact and the same everywhere.
"""

from __future__ import annotations

import argparse
import io
import json
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from open_flamingo.train.data import lanes as lanes_module
from open_flamingo.train.data.lanes import Counts, Cursor, Lane, Randomness, RawSample, ShardOrder
from open_flamingo.train.data.options import resolve_lanes
from open_flamingo.train.data.samples import Drop, Sample
from open_flamingo.train.data.shards import expand_shards
from open_flamingo.train.data.workers import LoaderState

BEGIN, END = "<!-- tables: benchmarks/loader_scale.py -->", "<!-- end of tables -->"
SEED = 42
SHARD_SIZE = 16  # samples of a made-up shard; real ones hold 1,000 to 10,000, so real lanes differ less from each other
DROPPED = 0.3  # the share of samples left out; of MMC4 documents, about as many have too few images

T = TypeVar("T")


def read_made_up_shard(url: str, counts: Counts) -> Iterator[RawSample]:
    """In the place of `read_shard`: as many samples as ever, with nothing in them."""
    for sample in range(SHARD_SIZE):
        yield {"__key__": str(sample), "__url__": url}


@dataclass
class Reader:
    """In the place of a preparer: leaves some samples out, and counts how often each shard was opened and each sample read."""

    opened: Counter[str]
    read: int = 0

    def __call__(self, raw: RawSample, randomness: Randomness, counts: Counts) -> Sample:
        self.read += 1
        if raw["__key__"] == "0":
            self.opened[raw["__url__"]] += 1
        if randomness.coin() < DROPPED:
            raise Drop("made up")
        return Sample([], [], f"{raw['__url__']}#{raw['__key__']}")


@dataclass(frozen=True)
class Simulated:
    """One dataset's lanes in one run.

    Attributes:
        shards, lanes: how many.
        expand_s: seconds to expand the pattern of the shard list.
        list_mb: of the list, in memory, once a process (workers share it until they touch it).
        lane_ms: to build one process's lanes and know their first shards. Most of it is the pass's permutation.
        lane_mb: what that adds to the process's memory.
        next_pass_ms: to know a first shard of the next pass: a new permutation.
        covered: whether each of the first three passes has every shard exactly once.
        shards_a_lane, shards_a_rank: least and most, of the first pass.
        shards_twice: opened more than once, when every lane has yielded as many samples as a pass holds on average.
        shards_unread: not opened by then.
        read_a_rank: least and most samples that a rank has read for its equal share, as a share of the mean.
        state_json, state_file: bytes of the state of all lanes, as JSON and as `torch.save` writes it into a checkpoint.
        resumed: whether lanes built from the state went on with the samples that those of the run did.
    """

    shards: int
    lanes: int
    expand_s: float
    list_mb: float
    lane_ms: float
    lane_mb: float
    next_pass_ms: float
    covered: bool
    shards_a_lane: tuple[int, int]
    shards_a_rank: tuple[int, int]
    shards_twice: int
    shards_unread: int
    read_a_rank: tuple[float, float]
    state_json: int
    state_file: int
    resumed: bool


def timed(function: Callable[[], T]) -> tuple[T, float]:
    start = time.perf_counter()
    result = function()
    return result, time.perf_counter() - start


def measured(function: Callable[[], T]) -> tuple[T, float]:
    """What `function` returns, and the megabytes that it leaves allocated."""
    tracemalloc.start()
    try:
        result = function()
        return result, tracemalloc.get_traced_memory()[0] / 1e6
    finally:
        tracemalloc.stop()


def simulate(kind: str, pattern: str, ranks: int, workers: int) -> Simulated:
    """Runs the lanes of all `ranks` × `workers` processes for about one pass over `pattern`."""
    urls, expand_s = timed(lambda: expand_shards(pattern))
    _, list_mb = measured(lambda: tuple(expand_shards(pattern)))
    lanes = resolve_lanes(None, ranks, workers)
    processes = ranks * workers
    order = ShardOrder(tuple(urls), lanes, SEED, kind)

    def lanes_of_one_process() -> list[str]:
        """As `LaneDataset` builds them in each process; and the first shard of each."""
        lanes_module._permutation.cache_clear()  # what another process would not have
        its_lanes = [build_lane(index, order, Reader(Counter())) for index in range(0, lanes, processes)]
        return [order.url(lane.index, 0) for lane in its_lanes]

    _, lane_s = timed(lanes_of_one_process)
    _, lane_mb = measured(lanes_of_one_process)
    _, next_pass_s = timed(lambda: order.url(0, len(urls) // lanes + 1))

    shards_of_lane = [sum(1 for _ in range(lane, len(urls), lanes)) for lane in range(lanes)]
    # Lane l is read by process l mod (ranks × workers), which is of rank l mod ranks.
    shards_of_rank = np.array(shards_of_lane).reshape(-1, ranks).sum(0)

    run, readers = whole_run(order, ranks, samples=round(len(urls) * SHARD_SIZE * (1 - DROPPED)))
    opened: Counter[str] = sum((reader.opened for reader in readers), Counter())
    read = np.array([reader.read for reader in readers])

    state = LoaderState(samples=0, cursors={lane.index: lane.cursor for lane in run})
    text = json.dumps(state.to_json())
    file = io.BytesIO()
    torch.save(state.to_json(), file)
    return Simulated(
        shards=len(urls),
        lanes=lanes,
        expand_s=expand_s,
        list_mb=list_mb,
        lane_ms=1e3 * lane_s,
        lane_mb=lane_mb,
        next_pass_ms=1e3 * next_pass_s,
        covered=covers_every_pass(order, passes=3),
        shards_a_lane=(min(shards_of_lane), max(shards_of_lane)),
        shards_a_rank=(int(shards_of_rank.min()), int(shards_of_rank.max())),
        shards_twice=sum(1 for times in opened.values() if times > 1),
        shards_unread=len(urls) - len(opened),
        read_a_rank=(float(read.min() / read.mean()), float(read.max() / read.mean())),
        state_json=len(text),
        state_file=file.getbuffer().nbytes,
        resumed=goes_on(run, order, LoaderState.from_json(json.loads(text))),
    )


def build_lane(index: int, order: ShardOrder, reader: Reader, cursor: Cursor = (0, 0)) -> Lane:
    return Lane(index, order, reader, buffer_size=8, cursor=cursor, counts=Counts())


def covers_every_pass(order: ShardOrder, passes: int) -> bool:
    """Whether entries 0 … length - 1 of all lanes laid side by side are all shards, and the next `length` again, and so on."""
    entries = [order.url(entry % order.lanes, entry // order.lanes) for entry in range(passes * len(order.urls))]
    every, length = set(order.urls), len(order.urls)
    return all(set(entries[start : start + length]) == every for start in range(0, len(entries), length))


def whole_run(order: ShardOrder, ranks: int, samples: int) -> tuple[list[Lane], list[Reader]]:
    """All lanes, after each has yielded its part of `samples`; and a reader for each rank."""
    readers = [Reader(Counter()) for _ in range(ranks)]
    run = [build_lane(index, order, readers[index % ranks]) for index in range(order.lanes)]
    for lane in run:
        for _ in range(max(1, samples // order.lanes)):
            next(lane)
    return run, readers


def goes_on(run: list[Lane], order: ShardOrder, state: LoaderState) -> bool:
    again = [build_lane(lane.index, order, Reader(Counter()), state.cursors[lane.index]) for lane in run]
    return all(
        [next(lane).key for _ in range(5)] == [next(other).key for _ in range(5)] for lane, other in zip(run, again)
    )


def table(results: dict[str, Simulated]) -> str:
    def between(pair: tuple[float, float]) -> str:
        return f"{pair[0]:.3f}–{pair[1]:.3f}" if isinstance(pair[0], float) else f"{pair[0]}–{pair[1]}"

    def yes(value: bool) -> str:
        return "yes" if value else "**NO**"

    rows: list[tuple[str, Callable[[Simulated], str]]] = [
        ("shards", lambda r: f"{r.shards:,}"),
        ("lanes", lambda r: f"{r.lanes:,}"),
        ("shard list: to expand, s", lambda r: f"{r.expand_s:.2f}"),
        ("shard list: in memory, MB", lambda r: f"{r.list_mb:.1f}"),
        ("a process's lanes, to their first shard: ms", lambda r: f"{r.lane_ms:.1f}"),
        ("… and MB", lambda r: f"{r.lane_mb:.2f}"),
        ("the next pass's order: ms", lambda r: f"{r.next_pass_ms:.1f}"),
        ("every shard exactly once in each of three passes", lambda r: yes(r.covered)),
        ("shards of a lane in a pass", lambda r: between(r.shards_a_lane)),
        ("shards of a rank in a pass", lambda r: between(r.shards_a_rank)),
        ("after a pass's worth of samples: shards not opened yet", lambda r: f"{r.shards_unread:,}"),
        ("… and opened for the second time", lambda r: f"{r.shards_twice:,}"),
        ("… samples that a rank has read, of the mean", lambda r: between(r.read_a_rank)),
        ("state of all lanes: bytes as JSON", lambda r: f"{r.state_json:,}"),
        ("… in a checkpoint", lambda r: f"{r.state_file:,}"),
        ("lanes built from that state go on the same", lambda r: yes(r.resumed)),
    ]
    lines = ["| | " + " | ".join(results) + " |", "| --- |" + " --- |" * len(results)]
    lines += ["| " + " | ".join([label, *(cell(result) for result in results.values())]) + " |" for label, cell in rows]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="The loader's lanes at the size of a large run.")
    parser.add_argument("--ranks", type=int, default=512)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--laion_shards", default="/data/laion/{000000..099999}.tar")
    parser.add_argument("--mmc4_shards", default="/data/mmc4/shard_{0..23097}.tar")
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the table into this document")
    options = parser.parse_args(argv)

    lanes_module.read_shard = read_made_up_shard
    patterns = {"LAION": options.laion_shards, "MMC4": options.mmc4_shards}
    results = {
        name: simulate(name.lower(), pattern, options.ranks, options.workers) for name, pattern in patterns.items()
    }
    text = table(results)
    if options.write is None:
        print(text)
        return
    before, begin, rest = options.write.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        parser.error(f"{options.write} lacks the marks {BEGIN!r} and {END!r}")
    options.write.write_text(f"{before}{BEGIN}\n\n{text}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
