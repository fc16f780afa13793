"""Who am I among the processes of this run, and talking to the others."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process's place in the run."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    launcher: str  # what told us: "torchrun or environment", "SLURM", "Open MPI" or "one process"

    @property
    def is_main(self) -> bool:
        return self.rank == 0


# (launcher, rank, world size, local rank), in the order in which they are asked. torchrun sets the first set itself,
# also inside a SLURM job, so it comes first.
_LAUNCHERS = (
    ("torchrun or environment", "RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("SLURM", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
    ("Open MPI", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
)


def _find_place() -> tuple[str, int, int, int]:
    for launcher, rank, world_size, local_rank in _LAUNCHERS:
        if rank in os.environ and world_size in os.environ:
            # A SLURM allocation sets SLURM_NTASKS for a plain `python` in the batch script too; only srun makes a step.
            if launcher == "SLURM" and "SLURM_STEP_ID" not in os.environ:
                continue
            place = int(os.environ[rank]), int(os.environ[world_size]), int(os.environ.get(local_rank, "0"))
            if not 0 <= place[0] < place[1]:
                raise ValueError(f"{rank}={place[0]} is not a rank of {world_size}={place[1]} processes")
            return launcher, *place
    return "one process", 0, 1, 0


@contextmanager
def distributed(dist_url: str, backend: str, set_device: bool = True) -> Iterator[World]:
    """Finds this process's place and joins the process group of the run for the length of the `with`.

    A single process needs no group and makes none. Raises ValueError where the launcher's variables contradict each
    other or the meeting point is missing.
    """
    launcher, rank, world_size, local_rank = _find_place()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank if set_device else 0)
        torch.cuda.set_device(device)
    world = World(rank, world_size, local_rank, device, launcher)
    if world_size == 1:
        yield world
        return

    if dist_url == "env://":
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if missing:
            raise ValueError(
                f"{launcher}: {world_size} processes, but {' and '.join(missing)} not set. Export the address of the "
                "first node and a free port before starting, or pass --dist-url tcp://<address>:<port>"
            )
    dist.init_process_group(
        backend=backend if device.type == "cuda" else "gloo",
        init_method=dist_url,
        rank=rank,
        world_size=world_size,
        device_id=device if device.type == "cuda" and backend == "nccl" else None,
    )
    try:
        yield world
    finally:
        dist.destroy_process_group()


def gather_objects(value: Any) -> list[Any]:
    """The `value` of every rank, in rank order, on every rank."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def on_main(function: Callable[..., T], *args: Any) -> T:
    """What `function(*args)` returns on rank 0, on every rank. A ValueError there is raised on every rank."""
    if not dist.is_initialized():
        return function(*args)
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = function(*args)
        except ValueError as error:
            outcome[1] = str(error)
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise ValueError(outcome[1])
    return outcome[0]


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """Sums `tensor` over the ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor
