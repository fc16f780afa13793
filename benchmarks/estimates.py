"""What `--dry_run` and docs/scaling.md estimate, beside what processes then hold and send, on CPU ranks: the table of docs/performance.md.

    python benchmarks/estimates.py            # all cases, some minutes on two cores
    torchrun --nproc-per-node=2 benchmarks/estimates.py small fp32 --fsdp     # one

Measured memory is the most that a rank's process has resident in two updates, less what it had before the model was built. Measured traffic is what
goes through the loopback device in them: as root in a network of its own, or else with all that others send meanwhile.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
from pathlib import Path

if __name__ == "__main__":  # this checkout, installed or not
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    import open_flamingo

    open_flamingo.__path__.append(sys.path[0])

import torch
import torch.distributed as dist

from benchmarks import report, steps
from benchmarks.backbones import build
from benchmarks.ours import Fed, to_batch
from benchmarks.shapes import SHAPES
from open_flamingo.train import estimate
from open_flamingo.train.distributed import detect_launcher, distributed
from open_flamingo.train.estimate import BatchSize, Strategy
from open_flamingo.train.optimizer import build_optimizer
from open_flamingo.train.parallel import Sharding, parallelize
from open_flamingo.train.precision import autocast_dtype, cast_frozen_weights
from open_flamingo.train.step import TrainDataset, Trainer, train_step

CASES = (
    (1, "small", "fp32"),
    (1, "small", "fp32", "--gradient_checkpointing"),
    (1, "mid", "fp32"),
    (2, "small", "fp32"),
    (2, "small", "fp32", "--fsdp"),
    (4, "small", "fp32"),
    (4, "small", "fp32", "--fsdp"),
    (2, "mid", "fp32", "--fsdp", "--gradient_checkpointing"),
)
# glibc gives large blocks back as soon as they are free, as the caching allocator of a GPU has them free for others. By itself it keeps
# blocks of up to 32 MB, in pieces that later ones do not fit into.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def resident(name: str) -> int:
    """Bytes; `name`: VmRSS, now, or VmHWM, the most."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def sent_by_all() -> int:
    """Bytes that have gone through the loopback device."""
    line = next(line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.split()[9])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("precision", choices=["fp32", "amp_bf16"])
    parser.add_argument("--fsdp", action="store_true")
    parser.add_argument("--gradient_checkpointing", action="store_true")
    args = parser.parse_args()
    shape, folder = SHAPES[args.shape], steps.FOLDER / args.shape
    batch = torch.load(folder / "batches.pt")[0]
    paper = build(folder, args.gradient_checkpointing, meta=True)[0]
    cast_frozen_weights(paper, args.precision)
    sizes = [BatchSize(of.rows, of.tokens, of.slots) for of in (shape.laion, shape.mmc4)]
    image_size = (shape.vision["image_size"],) * 2
    with distributed(detect_launcher()) as world:
        strategy = Strategy("", world.world_size, world.world_size if args.fsdp else 1, True)
        units = estimate.unit_pieces(paper, autocast_dtype(args.precision))
        estimated = estimate.peak_memory(
            units, strategy, estimate.measure_passes(paper, args.precision, sizes, image_size, on_gpu=False)
        )
        calls = estimate.collectives(units, strategy, passes=2) if world.world_size > 1 else ()
        estimated_sent = sum(call.sent for call in calls)
        ids = paper.media_token_id, paper.eoc_token_id, 0
        del paper
        gc.collect()
        before = resident("VmRSS")
        model = build(folder, args.gradient_checkpointing, meta=not world.is_main)[0]
        cast_frozen_weights(model, args.precision)
        parallel = parallelize(
            model, world, Sharding(world.world_size, gather_dtype=autocast_dtype(args.precision)) if args.fsdp else None
        ).train()
        datasets = []
        for kind in ("laion", "mmc4"):
            rows = dict(batch[kind])
            if kind == "mmc4":  # as many images in each row as there are slots: what was estimated
                rows["image_counts"] = torch.full_like(rows["image_counts"], shape.mmc4.slots)
            datasets.append(TrainDataset(kind, 1.0, Fed([to_batch(kind, rows, ids, False)]), None, world.device))  # type: ignore[arg-type]
        trainer = Trainer(parallel, build_optimizer(model, 1e-4, 0.1), datasets, args.precision)
        train_step(trainer, 1e-4)
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
        wait_for_all_ranks()
        sent = sent_by_all()
        for _ in range(2):
            train_step(trainer, 1e-4)
        wait_for_all_ranks()
        sent = (sent_by_all() - sent) // 2 // world.world_size
        memory = resident("VmHWM") - before
        if world.is_main:
            print(json.dumps({"memory": [estimated, memory], "sent": [estimated_sent, sent]}), flush=True)
        del parallel, trainer, model


def wait_for_all_ranks() -> None:
    if dist.is_initialized():
        dist.barrier()


def run_all() -> str:
    rows = []
    alone = ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"] if os.geteuid() == 0 else []
    for ranks, shape, *flags in CASES:
        steps.prepare(SHAPES[shape])
        command = [*alone, sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}"]
        command += [
            "--rdzv-backend=c10d",
            "--rdzv-endpoint=127.0.0.1:0",
            "--local-addr=127.0.0.1",
            __file__,
            shape,
            *flags,
        ]
        threads = str(max(1, (os.cpu_count() or 1) // ranks))
        # gloo takes the address of this host's name, which that network does not have
        environment = os.environ | {"OMP_NUM_THREADS": threads, "GLOO_SOCKET_IFNAME": "lo", **MALLOC}
        answer = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
        found = json.loads(answer.splitlines()[-1])
        row = [str(ranks), shape, " ".join(flags)]
        for estimated, measured in found.values():
            row += [
                f"{estimated / 1e9:.2f}",
                f"{measured / 1e9:.2f}",
                f"{estimated / measured:.2f}" if estimated else "",
            ]
        rows.append(row)
        print(row, flush=True)
    columns = [
        f"{what}, GB: {how}" for what in ("memory", "sent per update") for how in ("estimated", "measured", "ratio")
    ]
    return report.table(["ranks", "shape", "flags", *columns], rows)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main()
    else:
        report.write_section(
            "estimates", "what --dry_run estimates of each rank, beside what it holds and sends", run_all()
        )
