"""Who am I among the processes of this run, and talking to the others.

What launched this process is read from its environment; the first of these that fits counts:

1. `--horovod`: Horovod itself is asked.
2. RANK and WORLD_SIZE: torchrun, or set by hand. First, as torchrun also runs inside SLURM jobs.
3. The variables of an `mpirun`: Open MPI's, MVAPICH's, Hydra's (Intel MPI, MPICH). Before SLURM, as in a SLURM job an
   mpirun starts its helpers with srun, and the ranks inherit the SLURM variables of the helpers.
4. The variables of a SLURM job step (`srun`).
5. None of them: one process.

The ranks meet at `--dist-url`, and if that is `env://`, at MASTER_ADDR and MASTER_PORT. What of these is not set is
derived from the launcher: see `meeting_point`.
"""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process's place in the run."""

    rank: int
    world_size: int
    local_rank: int  # among the ranks of this node
    device: torch.device
    launcher: str  # what told us, in words
    local_world_size: int = 1  # ranks of this node
    store: dist.Store | None = None  # in which the ranks have met; None for one process

    @property
    def is_main(self) -> bool:
        return self.rank == 0


@dataclass(frozen=True)
class Place:
    """What the launcher says. `local_world_size` is None where it does not say how many ranks this node has."""

    launcher: str
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int | None = 1


ENVIRONMENT, TORCHRUN, OPEN_MPI, SLURM, HOROVOD = "environment", "torchrun", "Open MPI", "SLURM", "Horovod"

# In the order in which they are asked. Of a launcher: the variables of rank, world size, local rank, local world size.
_VARIABLES = {
    ENVIRONMENT: ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    OPEN_MPI: tuple(f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")),
    "MVAPICH": tuple(f"MV2_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")),
    # `srun --mpi=pmi2` sets PMI_RANK too; only Hydra adds the local rank.
    "Intel MPI or MPICH": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    SLURM: ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", None),
}


def find_place(horovod: bool = False) -> Place:
    """This process's place among those of the run. `horovod`: it was started by `horovodrun`.

    Raises ValueError where the launcher's variables contradict each other, where Horovod is asked for but not installed,
    and where `horovodrun` started this process but was not named.
    """
    if horovod:
        return _ask_horovod()
    for launcher, (rank_name, size_name, local_rank_name, local_size_name) in _VARIABLES.items():
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
        return Place(launcher, rank, world_size, local_rank or 0, local_world_size)
    if "HOROVOD_RANK" in os.environ:
        raise ValueError("horovodrun started this process, but --horovod is missing: each process would train alone")
    return Place("one process")


def _integer(name: str | None) -> int | None:
    text = os.environ.get(name or "")
    if text is None:
        return None
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{name}={text!r} is not a number") from None


def _horovod() -> Any:
    try:
        import horovod.torch as hvd
    except ImportError as error:
        raise ValueError(
            f"--horovod: Horovod cannot be imported ({error}). Install it (tests/launch/horovod.sh shows how it builds "
            "against today's PyTorch), or start with torchrun, srun or mpirun, without --horovod"
        ) from error
    return hvd


def _ask_horovod() -> Place:
    hvd = _horovod()
    hvd.init()
    return Place(HOROVOD, hvd.rank(), hvd.size(), hvd.local_rank(), hvd.local_size())


def meeting_point(place: Place, dist_url: str) -> str:
    """Where the ranks of `place` meet, as the `init_method` of torch.distributed.

    That is `dist_url`, unless it is `env://` and MASTER_ADDR or MASTER_PORT is not set. The one that is missing is taken from

    - SLURM, for its steps and for an mpirun inside one of its jobs: the first host of the node list, and a port made from
      the ids of job and step;
    - Open MPI on a single node: this node, and a port made from the id of this mpirun.

    Raises ValueError, saying what to export, where neither applies. Horovod's ranks agree by themselves.
    """
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if dist_url != "env://" or (address and port):
        return dist_url

    environment = os.environ
    by_mpi = place.launcher not in (ENVIRONMENT, SLURM)
    if place.launcher == SLURM or (by_mpi and "SLURM_JOB_NODELIST" in environment):
        # The ranks of an mpirun have inherited SLURM's variables of its helpers' steps, which are not the same for all.
        step = {} if by_mpi else environment
        address = address or first_host(step.get("SLURM_STEP_NODELIST") or environment["SLURM_JOB_NODELIST"])
        within_job = step.get("SLURM_STEP_ID") or environment.get("PMIX_NAMESPACE")  # there may be several at once
        port = port or _port(f"{environment['SLURM_JOB_ID']}.{within_job}")
    elif place.launcher == OPEN_MPI and place.local_world_size == place.world_size:
        address = address or "127.0.0.1"
        port = port or _port(environment.get("PMIX_NAMESPACE", ""))
    else:
        missing = " and ".join(name for name in ("MASTER_ADDR", "MASTER_PORT") if not environment.get(name))
        raise ValueError(
            f"{place.launcher}: {place.world_size} processes, but {missing} not set. Export the address of rank 0's node "
            "and a free port to all processes (mpirun: -x MASTER_ADDR -x MASTER_PORT), or pass "
            "--dist-url tcp://<address>:<port>"
        )
    return f"tcp://[{address}]:{port}" if ":" in address else f"tcp://{address}:{port}"


def first_host(node_list: str) -> str:
    """The first host of a SLURM node list: "gpu[007-009,12],login1" → "gpu007".

    As `scontrol show hostnames` has it, which containers often lack.
    """
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", node_list)
    assert first is not None
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first.group())


def _port(name: str) -> str:
    """The same port for the same name, from 12000 to 31999; Linux hands out those from 32768 on."""
    return str(12_000 + zlib.crc32(name.encode()) % 20_000)


def _meet_through_horovod(place: Place) -> dist.Store:
    """A store on rank 0, on a port that was free there, which Horovod's broadcast tells to the other ranks."""
    hvd = _horovod()
    one_node = place.local_world_size == place.world_size
    # The name under which horovodrun itself has reached this node.
    host = "127.0.0.1" if one_node else os.environ.get("HOROVOD_HOSTNAME", socket.gethostname())
    store = _open_store(host, place) if place.rank == 0 else None
    host, port = hvd.broadcast_object((host, store.port) if store else None, root_rank=0, name="meeting point")
    log.info("Horovod: %d processes meet at %s:%d", place.world_size, host, port)
    return store or dist.TCPStore(host, port, place.world_size, is_master=False)


def _open_store(host: str, place: Place) -> dist.TCPStore:
    return dist.TCPStore(host, 0, place.world_size, is_master=True, wait_for_workers=False)


def _meet_through_torchrun(place: Place, timeout: timedelta) -> dist.Store:
    """A store on rank 0, on a port that was free there, which torchrun's store tells to the other ranks.

    Torchrun's own store outlives a restart of the ranks, and with it the addresses at which those before listened; ranks
    that find these first fail to connect, or wait for ever (seen with gloo and torch 2.15).
    """
    theirs, _, _ = next(dist.rendezvous("env://", place.rank, place.world_size, timeout=timeout))
    if place.rank == 0:
        store = _open_store(os.environ["MASTER_ADDR"], place)
        theirs.set(_MEETING_POINT, json.dumps([store.host, store.port]))
        log.info("torchrun: %d processes meet at %s:%d", place.world_size, store.host, store.port)
        return store
    deadline = time.monotonic() + timeout.total_seconds()
    while True:
        host, port = json.loads(theirs.get(_MEETING_POINT))
        try:
            store = dist.TCPStore(host, port, place.world_size, is_master=False, timeout=timedelta(seconds=3))
            store.set_timeout(timeout)
            return store
        except dist.DistError:  # of before a restart, whose rank 0 is gone: that of now will tell its own
            if time.monotonic() > deadline:
                raise


_MEETING_POINT = "open_flamingo/meeting_point"


def _device(place: Place, set_device: bool) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    visible = torch.cuda.device_count()
    # A launcher that gives each process one GPU (`srun --gpus-per-task=1`) shows it as number 0.
    index = place.local_rank if set_device and visible > 1 else 0
    if index >= visible:
        raise ValueError(
            f"process {index} of {socket.gethostname()} has no GPU: {visible} are visible. Start at most {visible} "
            "processes a node"
        )
    return torch.device("cuda", index)


def _in_words(url: str) -> str:
    return f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}" if url == "env://" else url


@contextmanager
def distributed(
    place: Place,
    dist_url: str,
    backend: str,
    set_device: bool = True,
    group_of_one: bool = False,
    startup_timeout: float = 3600,
    timeout: float = 7200,
) -> Iterator[World]:
    """Joins the process group of the run for the length of the `with`.

    Args:
        place: see `find_place`.
        dist_url: where the ranks meet; `env://` is completed: see `meeting_point`.
        backend: of the process group on GPUs; on the CPU it is gloo.
        set_device: whether a process takes the GPU of its local rank, or the first.
        group_of_one: whether a single process gets a group, which sharding needs. Otherwise it has none.
        startup_timeout: seconds that a rank waits here for the others to come.
        timeout: seconds that it waits for them in every collective.

    Raises ValueError where there is no meeting point, or no GPU for this process.
    """
    device = _device(place, set_device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if place.world_size == 1 and not group_of_one:
        yield World(0, 1, place.local_rank, device, place.launcher)
        return

    store: dist.Store
    if place.world_size == 1:
        store = dist.HashStore()
    elif place.launcher == HOROVOD and dist_url == "env://":
        store = _meet_through_horovod(place)
    elif place.launcher == TORCHRUN and dist_url == "env://":
        store = _meet_through_torchrun(place, timedelta(seconds=startup_timeout))
    else:
        url = meeting_point(place, dist_url)
        log.info("%s: %d processes meet at %s", place.launcher, place.world_size, _in_words(url))
        patience = timedelta(seconds=startup_timeout)
        store, _, _ = next(dist.rendezvous(url, place.rank, place.world_size, timeout=patience))
    dist.init_process_group(
        backend=backend if device.type == "cuda" else "gloo",
        rank=place.rank,
        world_size=place.world_size,
        timeout=timedelta(seconds=timeout),
        device_id=device if device.type == "cuda" and backend == "nccl" else None,
        store=dist.PrefixStore("process group", store),
    )
    if place.launcher == HOROVOD:
        _horovod().shutdown()  # from here on torch.distributed does what its threads would wait for
    try:
        local_world_size = place.local_world_size or ranks_of_node()
        yield World(place.rank, place.world_size, place.local_rank, device, place.launcher, local_world_size, store)
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


def ranks_of_node() -> int:
    """How many ranks this machine runs. Every rank must call this."""
    return gather_objects(socket.gethostname()).count(socket.gethostname())


@contextmanager
def together() -> Iterator[None]:
    """Ends on every rank as on each: a ValueError or OSError of one rank is raised on all, so that none waits for it."""
    error: ValueError | OSError | None = None
    try:
        yield
    except (ValueError, OSError) as caught:
        error = caught
    messages = gather_objects(None if error is None else str(error))
    if error is not None:
        raise error
    for rank, message in enumerate(messages):
        if message is not None:
            raise ValueError(f"rank {rank}: {message}")
