"""train.py with faults: `faulty.py '{"faults": [...], "seconds_an_update": 0.1}' FLAGS...`.

A fault is {"what": "loss" or "gradient", "kind": "laion" or "mmc4", "rank": 1, "updates": [3]}: the loss of that dataset, or the
gradient that it gives the resampler's latents, becomes NaN on that rank in those updates. {"what": "no weight", ...} makes
that loss count nothing instead, {"what": "error", ...} raises. With {"collective_end": true}, a process group is taken down with
all ranks together or not at all, as NCCL does it. {"seconds_building": 10, "seconds_saving": 10} has
rank 0 take that long to build the model, and to write each checkpoint; {"seconds_loading": 1} rank 1 for each batch.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

import torch
import torch.distributed as dist

from open_flamingo.train import loop, step
from open_flamingo.train.checkpoint import files
from open_flamingo.train.data.loader import Loader
from open_flamingo.train.health import Health
from open_flamingo.train.train import main

load = Loader.__next__
compute_loss, begin, build, save = step.compute_loss, Health.begin, loop.model_from_flags, files.save
destroy_process_group = dist.destroy_process_group
update = 0


def count_updates(health: Health, number: int) -> None:
    global update
    update = number
    time.sleep(plan.get("seconds_an_update", 0))
    begin(health, number)


def faulty_loss(model: Any, dataset: Any, batch: Any) -> torch.Tensor:
    loss = compute_loss(model, dataset, batch)
    for fault in plan.get("faults", []):
        here = fault["kind"] == dataset.kind and update in fault["updates"]
        if not here or int(os.environ.get("RANK", 0)) not in fault["rank"]:
            continue
        if fault["what"] == "loss":
            loss = loss * float("nan")
        elif fault["what"] == "no weight":
            loss = loss * 0
        elif fault["what"] == "error":
            raise RuntimeError("CUDA out of memory")
        elif fault["what"] == "gradient":
            loss = WrongGradient.apply(loss)
    return loss


def load_slowly(loader: Any) -> Any:
    time.sleep(plan["seconds_loading"] * (os.environ["RANK"] == "1"))
    return load(loader)


def build_slowly(*args: Any, **kwargs: Any) -> Any:
    time.sleep(0 if kwargs["meta"] else plan["seconds_building"])
    return build(*args, **kwargs)


def save_slowly(*args: Any) -> None:
    time.sleep(plan["seconds_saving"])
    save(*args)


def end_together() -> None:
    dist.barrier()
    destroy_process_group()


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor) -> torch.Tensor:
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * float("inf")


if __name__ == "__main__":
    plan = json.loads(sys.argv[1])
    step.compute_loss = faulty_loss
    Health.begin = count_updates  # type: ignore[method-assign]
    if "seconds_loading" in plan:
        Loader.__next__ = load_slowly  # type: ignore[method-assign]
    if "seconds_building" in plan:
        loop.model_from_flags = build_slowly  # type: ignore[assignment]
    if "seconds_saving" in plan:
        files.save = save_slowly
    if plan.get("collective_end"):
        dist.destroy_process_group = end_together
    main(sys.argv[2:])
