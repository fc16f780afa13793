"""DDP's options, measured: `torchrun --nproc-per-node=2 benchmarks/buckets.py`. What `train/parallel.py` says of them is from here."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # this checkout, installed or not
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    import open_flamingo

    open_flamingo.__path__.append(sys.path[0])

import argparse
import gc
import statistics
import time
from contextlib import ExitStack
from typing import Any

import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from benchmarks.child import FOLDER
from benchmarks.ours import Ours
from benchmarks.report import table
from benchmarks.shapes import SHAPES
from benchmarks.steps import prepare
from open_flamingo.train.parallel import _SYNC_BUFFERS

OPTIONS: dict[str, dict[str, Any]] = {
    "as in train/parallel.py": {},
    "buckets of 1 MB": {"bucket_cap_mb": 1},
    "buckets of 5 MB": {"bucket_cap_mb": 5},
    "buckets of 100 MB": {"bucket_cap_mb": 100},
    "one bucket": {"bucket_cap_mb": 100_000},
    "gradients beside the buckets": {"gradient_as_bucket_view": False},
    "buffers sent in each forward pass": {_SYNC_BUFFERS: True},
}


def resident() -> float:
    """GB of this process in memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--precision", default="amp_bf16")
    parser.add_argument("--rounds", type=int, default=4)
    args = parser.parse_args()
    prepare(SHAPES[args.shape])
    settings = argparse.Namespace(
        folder=str(FOLDER / args.shape), precision=args.precision, group=True, gradient_checkpointing=False,
        compile=False, learning_rate=1e-4, batches="batches.pt",
    )  # fmt: skip
    seconds: dict[str, list[float]] = {name: [] for name in OPTIONS}
    memory: dict[str, float] = {}
    with ExitStack() as stack:
        ours = Ours(settings, stack)
        ours.step_model = ours.model
        for _ in range(args.rounds):
            for name, options in OPTIONS.items():
                defaults = {"gradient_as_bucket_view": True, "init_sync": False, _SYNC_BUFFERS: False}
                ours.step_model = DistributedDataParallel(ours.model, **(defaults | options))
                ours.steps(2)  # after the first, DDP lays its buckets out anew
                dist.barrier()
                start = time.perf_counter()
                ours.steps(1)
                dist.barrier()
                seconds[name].append(time.perf_counter() - start)
                memory[name] = resident()
                ours.step_model = ours.model
                ours.optimizer.zero_grad(set_to_none=True)
                gc.collect()
        if ours.world.is_main:
            trained = sum(p.numel() for p in ours.model.parameters() if p.requires_grad)
            print(
                f"{args.shape}, {args.precision}, {ours.world.world_size} ranks, {4 * trained / 1e6:.0f} MB of gradients"
            )
            rows = [
                [name, f"{statistics.median(of):.3f}", f"{min(of):.3f}", f"{memory[name]:.2f}"]
                for name, of in seconds.items()
            ]
            print(table(["", "seconds an update, median", "least", "GB in memory"], rows))


if __name__ == "__main__":
    main()
