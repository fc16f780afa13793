"""Launcher detection (`LAUNCHERS`), the ranks' meeting point (`init_method`), the process group, small collectives."""

import json
import logging
import os
import re
import socket
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among those of the run."""

    launcher: str = "one process"
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0  # on this node
    local_world_size: int | None = 1  # None until `distributed` has counted, if the launcher does not tell
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    store: dist.Store | None = None  # where the ranks have met; None for one process

    @property
    def is_main(self) -> bool:
        return self.rank == 0


ENVIRONMENT, TORCHRUN, OPEN_MPI, SLURM, HOROVOD = "environment", "torchrun", "Open MPI", "SLURM", "Horovod"

# The variables of rank, world size, local rank, local world size. The first launcher that fits counts: torchrun and mpirun also run
# inside SLURM jobs, where an mpirun starts its helpers with srun and the ranks inherit the SLURM variables of the helpers.
LAUNCHERS = {
    ENVIRONMENT: ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    HOROVOD: ("HOROVOD_RANK", "HOROVOD_SIZE", "HOROVOD_LOCAL_RANK", "HOROVOD_LOCAL_SIZE"),
    OPEN_MPI: tuple(f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")),
    "MVAPICH": tuple(f"MV2_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")),
    # `srun --mpi=pmi2` sets PMI_RANK too; only Hydra adds the local rank.
    "Intel MPI or MPICH": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    SLURM: ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", None),
}


def detect_launcher() -> World:
    """This process's ranks, read from the launcher's variables. Raises ValueError if those contradict each other."""
    for launcher, (rank_name, size_name, local_rank_name, local_size_name) in LAUNCHERS.items():
        rank, world_size, local_rank = map(_integer, (rank_name, size_name, local_rank_name))
        if launcher == SLURM and world_size is None and os.environ.get("ENVIRONMENT") != "BATCH":
            # The number of tasks of the job. In the batch script itself they are not running: it is one process.
            world_size = _integer("SLURM_NTASKS")
        if rank is None or world_size is None or (local_rank is None and rank_name == "PMI_RANK"):
            continue
        if not 0 <= rank < world_size:
            raise ValueError(f"{rank_name}={rank} is not a rank of {size_name}={world_size} processes")
        local_world_size = 1 if world_size == 1 else _integer(local_size_name)
        if launcher == ENVIRONMENT and "TORCHELASTIC_RUN_ID" in os.environ:
            launcher = TORCHRUN
        return World(launcher, rank, world_size, local_rank or 0, local_world_size)
    return World()


def _integer(name: str | None) -> int | None:
    text = os.environ.get(name or "")
    try:
        return None if text is None else int(text)
    except ValueError:
        raise ValueError(f"{name}={text!r} is not a number") from None


def init_method(world: World, dist_url: str) -> str:
    """`dist_url`, as torch.distributed takes it. If it is `env://` and MASTER_ADDR or MASTER_PORT is not set, that one comes from

    - SLURM, for its steps and an mpirun inside one of its jobs: the first host of the node list, a port made from the ids of job and step;
    - Open MPI and horovodrun on a single node: this node, a port made from what all processes of this launch share.

    Raises ValueError, saying what to export, if neither applies.
    """
    env = os.environ
    address, port = env.get("MASTER_ADDR"), env.get("MASTER_PORT")
    if dist_url != "env://" or (address and port):
        return dist_url
    by_mpi = world.launcher not in (ENVIRONMENT, HOROVOD, SLURM)
    if world.launcher == SLURM or (by_mpi and "SLURM_JOB_NODELIST" in env):
        # The ranks of an mpirun have inherited SLURM's variables of its helpers' steps, which are not the same for all.
        step = {} if by_mpi else env
        address = address or first_host(step.get("SLURM_STEP_NODELIST") or env["SLURM_JOB_NODELIST"])
        within_job = step.get("SLURM_STEP_ID") or env.get("PMIX_NAMESPACE")  # there may be several at once
        launch = f"{env.get('SLURM_JOB_ID')}.{within_job}"
    elif world.launcher in (OPEN_MPI, HOROVOD) and world.local_world_size == world.world_size:
        address = address or "127.0.0.1"
        launch = env.get("PMIX_NAMESPACE", env.get("HOROVOD_GLOO_RENDEZVOUS_PORT", ""))
    else:
        missing = " and ".join(name for name in ("MASTER_ADDR", "MASTER_PORT") if not env.get(name))
        raise ValueError(
            f"{world.launcher}: {world.world_size} processes, but {missing} not set. Export the address of rank 0's node "
            "and a free port to all processes (mpirun: -x MASTER_ADDR -x MASTER_PORT), or pass "
            "--dist-url tcp://<address>:<port>"
        )
    # The same on all ranks of a launch, from 12000 to 31999; Linux hands out ports from 32768 on.
    port = port or str(12_000 + zlib.crc32(launch.encode()) % 20_000)
    return f"tcp://[{address}]:{port}" if ":" in address else f"tcp://{address}:{port}"


def first_host(node_list: str) -> str:
    """ "gpu[007-009,12],login1" → "gpu007", as `scontrol show hostnames`, which containers often lack."""
    first = re.split(r",(?![^\[]*\])", node_list)[0]  # at the commas outside of brackets
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first)


def _torchrun_store(world: World, timeout: timedelta) -> dist.Store:
    """A store on a free port of rank 0, which torchrun's own store tells to the other ranks: torchrun's outlives a restart of the ranks,
    with the addresses of those before, and ranks that find these fail to connect, or wait forever."""
    agent_store, _, _ = next(dist.rendezvous("env://", world.rank, world.world_size, timeout=timeout))
    key = "open_flamingo/store"
    if world.rank == 0:
        host = os.environ["MASTER_ADDR"]
        store = dist.TCPStore(host, 0, world.world_size, is_master=True, wait_for_workers=False)
        agent_store.set(key, json.dumps([host, store.port]))
        log.info("torchrun: %d processes meet at %s:%d", world.world_size, host, store.port)
        return store
    deadline = time.monotonic() + timeout.total_seconds()
    while True:
        host, port = json.loads(agent_store.get(key))
        try:
            store = dist.TCPStore(host, port, world.world_size, is_master=False, timeout=timedelta(seconds=3))
            store.set_timeout(timeout)
            return store
        except dist.DistError:  # written before a restart; rank 0 is about to write the new address
            if time.monotonic() > deadline:
                raise


def _store(world: World, url: str, timeout: timedelta) -> dist.Store:
    if world.world_size == 1:
        return dist.HashStore()
    if world.launcher == TORCHRUN and url == "env://":
        return _torchrun_store(world, timeout)
    url = init_method(world, url)
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}" if url == "env://" else url
    log.info("%s: %d processes meet at %s", world.launcher, world.world_size, address)
    return next(dist.rendezvous(url, world.rank, world.world_size, timeout=timeout))[0]


def _device(world: World, set_device: bool) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    visible = torch.cuda.device_count()
    # A launcher that gives each process one GPU (`srun --gpus-per-task=1`) shows it as number 0.
    index = world.local_rank if set_device and visible > 1 else 0
    if index >= visible:
        host = socket.gethostname()
        raise ValueError(
            f"process {index} of {host} has no GPU: {visible} are visible. Start at most {visible} processes per node"
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


@contextmanager
def distributed(
    world: World,
    url: str = "env://",
    backend: str = "nccl",  # on GPUs; on the CPU it is gloo
    set_device: bool = True,  # take the GPU of the local rank; else the first
    group_of_one: bool = False,  # a single process gets a group, which sharding needs
    startup_timeout: float = 3600.0,  # seconds that a rank waits for the others to come
    timeout: float = 7200.0,  # seconds that it waits for them in every collective
) -> Iterator[World]:
    """Within this `with`, this process is in the process group of the run; gives `world` with its device and store. Raises ValueError if
    there is no meeting point, or no GPU for this process."""
    world = replace(world, device=_device(world, set_device))
    if world.world_size == 1 and not group_of_one:
        yield world
        return
    store = _store(world, url, timedelta(seconds=startup_timeout))
    on_gpu = world.device.type == "cuda"
    dist.init_process_group(
        backend=backend if on_gpu else "gloo",
        rank=world.rank,
        world_size=world.world_size,
        timeout=timedelta(seconds=timeout),
        device_id=world.device if on_gpu and backend == "nccl" else None,
        store=dist.PrefixStore("process group", store),
    )
    try:
        ranks_of_node = world.local_world_size or gather_objects(socket.gethostname()).count(socket.gethostname())
        yield replace(world, local_world_size=ranks_of_node, store=store)
    finally:
        dist.destroy_process_group()


def gather_objects(value: Any) -> list[Any]:
    """The `value` of every rank, in rank order, on every rank."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def run_on_rank0(function: Callable[..., T], *args: Any) -> T:
    """What `function(*args)` returns on rank 0, on every rank; a ValueError or OSError there is raised on every rank."""
    result: list[Any] = [None]
    with raise_on_all_ranks():
        if not dist.is_initialized() or dist.get_rank() == 0:
            result[0] = function(*args)
    if dist.is_initialized():
        dist.broadcast_object_list(result, src=0)
    return result[0]


@contextmanager
def raise_on_all_ranks() -> Iterator[None]:
    """Raise a ValueError or OSError of any rank on all ranks, so that none is left waiting for it."""
    try:
        yield
    except (ValueError, OSError) as error:
        gather_objects(str(error))
        raise
    for rank, message in enumerate(gather_objects(None)):
        if message is not None:
            raise ValueError(f"rank {rank}: {message}")
