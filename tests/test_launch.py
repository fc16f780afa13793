"""One run, however it is launched: torchrun, srun, mpirun, by hand. With the real things, where they are installed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from open_flamingo.train.arguments import parse_args
from open_flamingo.train.distributed import World, detect_launcher, distributed, first_host, init_method
from tests.conftest import only_at_length
from tests.launch import slurm as slurm_cluster
from tests.launch.slurm import Slurm, free_port
from tests.ranks import Fork, held_port
from tests.tiny import ROOT, assert_same, finished, kill

TRAIN, WHERE = ROOT / "train" / "train.py", ROOT / "tests" / "launch" / "where.py"
MPIRUN = ["mpirun", "--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "-np", "2"]


# ---------------------------------------------------------------- told from the environment


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets variables, in an environment that no launcher has touched."""
    for name in list(os.environ):
        if name.startswith(("SLURM_", "OMPI_", "MV2_", "PMI", "MPI_", "HOROVOD_", "TORCHELASTIC_", "MASTER_")):
            monkeypatch.delenv(name)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "ENVIRONMENT"):
        monkeypatch.delenv(name, raising=False)
    return lambda **variables: [monkeypatch.setenv(name, str(value)) for name, value in variables.items()] and None


HAND = {"RANK": 5, "WORLD_SIZE": 16}
TORCHRUN = HAND | {"LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 4, "TORCHELASTIC_RUN_ID": "x"}
OPEN_MPI = {
    f"OMPI_COMM_WORLD_{name}": n for name, n in [("RANK", 6), ("SIZE", 8), ("LOCAL_RANK", 2), ("LOCAL_SIZE", 4)]
}
HYDRA = {"PMI_RANK": 6, "PMI_SIZE": 8, "MPI_LOCALRANKID": 2, "MPI_LOCALNRANKS": 4}
JOB = {
    "SLURM_JOB_ID": 77,
    "SLURM_JOB_NODELIST": "gpu[07-08],a1",
    "SLURM_NTASKS": 12,
    "SLURM_PROCID": 0,
    "SLURM_LOCALID": 0,
}
BATCH_SCRIPT = JOB | {"ENVIRONMENT": "BATCH"}
STEP = {
    "SLURM_PROCID": 3,
    "SLURM_LOCALID": 1,
    "SLURM_STEP_NUM_TASKS": 4,
    "SLURM_STEP_NODELIST": "gpu08,a1",
    "SLURM_STEP_ID": 2,
}
SRUN = BATCH_SCRIPT | STEP
HOROVOD = {f"HOROVOD_{name}": value for name, value in (("RANK", 1), ("SIZE", 2), ("LOCAL_RANK", 1), ("LOCAL_SIZE", 2))}


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        ({}, World("one process")),
        (HAND, World("environment", 5, 16, 0, None)),
        (TORCHRUN, World("torchrun", 5, 16, 1, 4)),
        (OPEN_MPI, World("Open MPI", 6, 8, 2, 4)),
        (HYDRA, World("Intel MPI or MPICH", 6, 8, 2, 4)),
        (SRUN, World("SLURM", 3, 4, 1, None)),
        (SRUN | TORCHRUN, World("torchrun", 5, 16, 1, 4)),
        (SRUN | OPEN_MPI, World("Open MPI", 6, 8, 2, 4)),
        (SRUN | {"PMI_RANK": 3, "PMI_SIZE": 4}, World("SLURM", 3, 4, 1, None)),  # srun --mpi=pmi2
        (BATCH_SCRIPT | HOROVOD, World("Horovod", 1, 2, 1, 2)),
        (BATCH_SCRIPT, World("one process")),  # python without srun, in a job of several tasks
    ],
)
def test_what_launched_this_process(
    variables: dict[str, object], place: World, environment: Callable[..., None]
) -> None:
    environment(**variables)
    assert detect_launcher() == place


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": 2, "WORLD_SIZE": 2}, "RANK=2 is not a rank of WORLD_SIZE=2"),
        ({"RANK": "two", "WORLD_SIZE": 2}, "RANK='two' is not a number"),
        ({"HOROVOD_RANK": 2, "HOROVOD_SIZE": 2}, "HOROVOD_RANK=2 is not a rank of HOROVOD_SIZE=2"),
    ],
)
def test_contradictions_are_named(variables: dict[str, object], message: str, environment: Callable[..., None]) -> None:
    environment(**variables)
    with pytest.raises(ValueError, match=message):
        detect_launcher()


def test_the_ranks_meet_where_the_launcher_says(environment: Callable[..., None]) -> None:
    environment(**SRUN)
    step = init_method(detect_launcher(), "env://")
    assert step.startswith("tcp://gpu08:")  # the step's first node, not the job's
    assert 12_000 <= int(step.rpartition(":")[2]) < 32_000
    environment(SLURM_STEP_ID=3)  # another step of the job may run beside it
    assert init_method(detect_launcher(), "env://") != step
    assert init_method(detect_launcher(), "tcp://other:1") == "tcp://other:1"

    # An mpirun in the job: its ranks have the variables of different steps, or of none, and must agree.
    environment(**OPEN_MPI, PMIX_NAMESPACE="901")
    points = []
    for variables in ({}, {"SLURM_STEP_ID": 9, "SLURM_STEP_NODELIST": "a1"}):
        environment(**variables)
        points.append(init_method(detect_launcher(), "env://"))
    assert points[0] == points[1]
    assert points[0].startswith("tcp://gpu07:")

    environment(MASTER_ADDR="fd00::1")
    assert init_method(detect_launcher(), "env://").startswith("tcp://[fd00::1]:")
    environment(MASTER_PORT="15000")  # both exported, as the reference's sbatch script does
    assert init_method(detect_launcher(), "env://") == "env://"


def test_horovodrun_on_one_node_meets_on_a_port_of_its_own(environment: Callable[..., None]) -> None:
    environment(**HOROVOD, HOROVOD_GLOO_RENDEZVOUS_PORT=40_123)
    point = init_method(detect_launcher(), "env://")
    assert point.startswith("tcp://127.0.0.1:")
    environment(HOROVOD_GLOO_RENDEZVOUS_PORT=40_124)  # another launch on this node
    assert init_method(detect_launcher(), "env://") != point
    environment(HOROVOD_SIZE=4)  # on two nodes
    with pytest.raises(ValueError, match="Horovod: 4 processes, but MASTER_ADDR and MASTER_PORT not set"):
        init_method(detect_launcher(), "env://")


def test_no_meeting_point_says_what_to_export(environment: Callable[..., None]) -> None:
    environment(**OPEN_MPI, MASTER_ADDR="node1")
    with pytest.raises(ValueError, match="Open MPI: 8 processes, but MASTER_PORT not set"):
        init_method(detect_launcher(), "env://")


HOSTS = ["n1", "n1,n2", "gpu[007-009,12],login1", "gpu[3,5]", "r[1-2]n[08-9],z", "a-b-[10-11]"]


def test_first_host_of_a_node_list() -> None:
    assert [first_host(hosts) for hosts in HOSTS] == ["n1", "n1", "gpu007", "gpu3", "r1n08", "a-b-10"]


@pytest.mark.parametrize(
    ("visible", "local_rank", "device"),
    [(8, 3, "cuda:3"), (1, 3, "cuda:0"), (2, 3, None)],  # one: the launcher has given each process its own
)
def test_the_gpu_of_a_process(
    visible: int, local_rank: int, device: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    group = distributed(World("test", 0, 1, local_rank))
    if device is None:
        with pytest.raises(ValueError, match="no GPU: 2 are visible"):
            group.__enter__()
    else:
        with group as world:
            assert str(world.device) == device


# ---------------------------------------------------------------- the sbatch script


@pytest.mark.parametrize("recipe", ["3B", "4B", "9B"])
def test_the_recipes_are_flags_of_this_program(recipe: str, flags: list[str], tmp_path: Path) -> None:
    (tmp_path / "srun").write_text('#!/bin/sh\nfor argument; do echo "$argument"; done\n')
    (tmp_path / "srun").chmod(0o755)
    shards = [flag for flag in flags if "_shards=" in flag]
    script = subprocess.run(
        ["bash", ROOT / "scripts" / "train.sbatch", recipe, *shards, "--num_epochs", "7"],
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
    )
    step = script.stdout.splitlines()
    args = parse_args(step[step.index("train/train.py") + 1 :])
    assert f"OpenFlamingo-{recipe}" in args.run_name
    assert args.num_epochs == 7  # the user's flags win
    assert args.cross_attn_every_n_layers == {"3B": 1, "4B": 2, "9B": 4}[recipe]
    assert args.fsdp == (recipe == "4B")


def test_an_unknown_recipe_is_refused() -> None:
    script = subprocess.run(["bash", ROOT / "scripts" / "train.sbatch", "5B"], capture_output=True, text=True)
    assert script.returncode == 2
    assert "usage:" in script.stderr


# ---------------------------------------------------------------- real launchers, real training


@pytest.fixture(scope="module")
def recipe(backbones: list[str]) -> list[str]:
    """A tiny run of eight updates on two ranks, with the switches of the sbatch script's recipes."""
    return [
        *backbones,
        "--precision=fp32",
        "--gradient_checkpointing",
        "--dataset_resampled",
        "--loss_multiplier_laion=0.2",
        "--batch_size_laion=4",
        "--batch_size_mmc4=2",
        "--train_num_samples_laion=32",
        "--train_num_samples_mmc4=16",
        "--mmc4_textsim_threshold=0.24",
        "--num_epochs=2",
        "--workers=0",
        "--data_lanes=2",
        "--learning_rate=1e-2",
        "--warmup_steps=2",
        "--logging_steps=1",
        "--save_steps=1",
    ]


def start(*command: str | Path, **variables: str) -> subprocess.Popen[str]:
    """Starts a command in the top of the checkout, in a process group of its own."""
    return subprocess.Popen(
        [str(part) for part in command],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | variables,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def torchrun(*arguments: str | Path, nodes: int = 1, node: int = 0, port: int = 0) -> subprocess.Popen[str]:
    """An agent with two ranks in all."""
    options = [f"--nproc-per-node={2 // nodes}", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}"]
    if nodes > 1:
        options += [f"--nnodes={nodes}", f"--node-rank={node}", "--rdzv-id=test", "--local-addr=127.0.0.1"]
    return start(sys.executable, "-m", "torch.distributed.run", *options, *arguments)


@pytest.fixture(scope="module")
def undisturbed(recipe: list[str], shards: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The last checkpoint of the run, launched as the README says."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    patterns = [f"--laion_shards={shards['laion']}", f"--mmc4_shards={shards['mmc4']}"]
    output = finished(torchrun(TRAIN, *recipe, *patterns, f"--run_name={run}"))
    assert "torchrun: 2 x cpu" in output
    return load(run)


def load(run: Path) -> dict[str, Any]:
    checkpoint = torch.load(run / "checkpoint_1.pt", weights_only=True)
    del checkpoint["flags"], checkpoint["shards"]  # how it was launched, and from where its shards came
    return checkpoint


class Gated:
    """Shards that come to a halt in the middle of a run, until `open` is called."""

    def __init__(self, folder: Path, shards: dict[str, str]) -> None:
        self._folder = folder
        shutil.copytree(Path(shards["laion"]).parent, folder)
        gate = f"pipe:sh {ROOT / 'tests' / 'launch' / 'gate.sh'} {folder / Path(shards['laion']).name} 2"
        self.flags = [f"--laion_shards={gate}", f"--mmc4_shards={shards['mmc4']}"]

    def open(self) -> None:
        (self._folder / "go").touch()


@pytest.fixture
def gated(shards: dict[str, str], tmp_path: Path) -> Iterator[Gated]:
    gated = Gated(tmp_path / "gated", shards)
    yield gated
    gated.open()


def wait_for(condition: Callable[[], object], alive: Callable[[], bool], what_it_said: Callable[[], str]) -> None:
    while not condition():
        # Looked at again: it may have come about between the two looks.
        assert alive() or condition(), what_it_said()
        time.sleep(0.05)


def test_two_nodes_of_torchrun(
    recipe: list[str], shards: dict[str, str], undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    patterns = [f"--laion_shards={shards['laion']}", f"--mmc4_shards={shards['mmc4']}"]
    run = [TRAIN, *recipe, *patterns, f"--run_name={tmp_path / 'run'}"]
    with held_port() as port:
        nodes = [torchrun(*run, nodes=2, node=node, port=port) for node in range(2)]
        try:
            for node in nodes:
                finished(node)
        finally:
            for node in nodes:
                if node.poll() is None:
                    kill(node)
    assert_same(undisturbed, load(tmp_path / "run"))


@pytest.fixture
def mpirun() -> list[str]:
    if shutil.which("mpirun") is None:
        pytest.skip("mpirun (Debian's openmpi-bin) is not installed")
    return MPIRUN


def test_mpirun(
    mpirun: list[str], recipe: list[str], shards: dict[str, str], undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    patterns = [f"--laion_shards={shards['laion']}", f"--mmc4_shards={shards['mmc4']}"]
    output = finished(start(*mpirun, sys.executable, TRAIN, *recipe, *patterns, f"--run_name={tmp_path / 'run'}"))
    assert "Open MPI: 2 x cpu" in output
    assert_same(undisturbed, load(tmp_path / "run"))


def test_by_hand() -> None:
    with held_port() as port:
        variables = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        environments = [os.environ | variables | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
        ranks = [Fork(WHERE, environment=environment) for environment in environments]
        found = [json.loads(finished(rank).rpartition("found ")[2] or "null") for rank in ranks]
    assert found[0]["ranks"] == [[0, 0, 2], [1, 1, 2]]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    if (lacking := slurm_cluster.missing()) is not None:
        pytest.skip(f"no SLURM: {lacking}")
    with Slurm(tmp_path_factory.mktemp("slurm") / "cluster") as cluster:
        yield cluster


@pytest.mark.fault(
    "Signals",
    "SLURM's `--signal=B:USR1@…` to `scripts/train.sbatch`",
    "the ranks save, the script puts the job back into the queue, which goes on bit for bit",
    "dies",
)
def test_slurm_runs_and_requeues_the_script_of_the_repository(
    slurm: Slurm, recipe: list[str], gated: Gated, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    """Two tasks on the CPU. In mid-run the script is told that its time is nearly up: it has the ranks save and queues the
    job again, which goes on where it was."""
    run, job_log = tmp_path / "run", tmp_path / "job.log"
    options = [
        "--ntasks-per-node=2",
        "--gpus-per-node=0",
        "--cpus-per-task=1",
        f"--output={job_log}",
        f"--chdir={ROOT}",
    ]
    script = [str(ROOT / "scripts" / "train.sbatch"), "3B"]
    variables = {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    flags = [*recipe, *gated.flags, f"--run_name={run}"]
    job = slurm.run("sbatch", "--parsable", *options, *script, *flags, **variables).strip()

    def state() -> str:
        return slurm.job(job)["JobState"]

    def log() -> str:
        return slurm.logs() + (job_log.read_text() if job_log.exists() else "")

    wait_for(lambda: list(run.glob("epoch_*.pt")), lambda: state() in ("PENDING", "RUNNING"), log)
    slurm.run("scancel", "--batch", "--signal=USR1", job)
    wait_for(lambda: "is to save and stop" in log(), lambda: state() == "RUNNING", log)
    time.sleep(1)  # the signal's way through srun to the ranks, which wait for data
    gated.open()
    wait_for(lambda: slurm.job(job)["Restarts"] == "1", lambda: state() in ("PENDING", "RUNNING", "COMPLETING"), log)
    wait_for(lambda: state() == "PENDING", lambda: state() != "FAILED", log)
    time.sleep(2)  # slurmd takes a job that starts within the second in which it was ended for the ended one
    slurm.run("scontrol", "update", f"JobId={job}", "StartTime=now")  # or it would wait for two minutes
    wait_for(lambda: state() == "COMPLETED", lambda: state() in ("PENDING", "RUNNING", "COMPLETING"), log)

    said = job_log.read_text()
    assert "SLURM: 2 x cpu" in said
    assert "SIGUSR1: saved after update" in said
    assert "resuming from" in said
    assert_same(undisturbed, load(run))


@only_at_length
def test_every_way_to_start_in_a_slurm_job(slurm: Slurm, mpirun: list[str], tmp_path: Path) -> None:
    """srun with the variables that the reference's script exports, srun without, and what must not be mistaken for it."""
    python = f"{sys.executable} {WHERE}"
    (tmp_path / "job.sh").write_text(
        "#!/bin/bash\nset -e\n"
        f"(export MASTER_ADDR=localhost MASTER_PORT={free_port()}; srun {python})\n"
        f"srun {python}\n"
        f"{python}\n"
        f"{' '.join(mpirun)} {python}\n"
        f"srun --ntasks=1 {sys.executable} -m torch.distributed.run --standalone --nproc-per-node=2 {WHERE}\n"
    )
    options = ["--wait", "--ntasks=2", f"--output={tmp_path / 'log'}"]
    slurm.run("sbatch", *options, str(tmp_path / "job.sh"), OMP_NUM_THREADS="1")
    lines = (tmp_path / "log").read_text().splitlines()
    found = [json.loads(line.removeprefix("found ")) for line in lines if line.startswith("found ")]
    assert [(place["launcher"], place["world_size"]) for place in found] == [
        ("SLURM", 2),
        ("SLURM", 2),
        ("one process", 1),
        ("Open MPI", 2),
        ("torchrun", 2),
    ]
    two_ranks = [[0, 0, 2], [1, 1, 2]]
    assert [place["ranks"] for place in found] == [two_ranks, two_ranks, [[0, 0, 1]], two_ranks, two_ranks]


def test_first_host_is_that_of_scontrol(slurm: Slurm) -> None:
    for hosts in HOSTS:
        assert first_host(hosts) == slurm.run("scontrol", "show", "hostnames", hosts).splitlines()[0]
