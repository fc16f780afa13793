"""A real SLURM cluster of this one machine: munged, slurmctld and slurmd, with all they write in one folder.

    with Slurm(folder) as slurm:
        job = slurm.run("sbatch", "--parsable", "job.sh").strip()

Needs root and Debian's packages slurm-client, slurmctld, slurmd and munge. Nothing outside the folder is read or written, ports
are those that were free, and the daemons end with the `with`, or with this process, however it ends.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from pathlib import Path
from types import TracebackType

PROGRAMS = ("setpriv", "munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue")

# Not how a cluster should be set up: no containment of processes, no accounting, tasks of several GPUs' worth of work on
# what cores there are. All that a container without systemd and cgroups of its own can run.
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld_port}
SlurmdPort={d_port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1
ReturnToService=2
KillWait=5
NodeName={host} NodeAddr=127.0.0.1 CPUs=16 RealMemory=1000 State=UNKNOWN
PartitionName=test Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str | None:
    """What keeps a cluster from being started here, in words."""
    if os.geteuid() != 0:
        return "SLURM's daemons need root"
    absent = [name for name in PROGRAMS if _program(name) is None]
    return f"not installed: {', '.join(absent)}" if absent else None


def _program(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Slurm:
    """The cluster, running for the length of a `with`. `folder` must not exist yet."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._daemons: list[subprocess.Popen[bytes]] = []
        for name in ("", "state", "spool"):
            (folder / name).mkdir()
        (folder / "munge.key").write_bytes(os.urandom(128))
        (folder / "munge.key").chmod(0o600)
        host = socket.gethostname().partition(".")[0]
        config = CONFIG.format(folder=folder, host=host, ctld_port=free_port(), d_port=free_port())
        (folder / "slurm.conf").write_text(config)
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        # Whatever launched the tests themselves is none of the cluster's business.
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
        self.environment["SLURM_CONF"] = str(folder / "slurm.conf")

    def __enter__(self) -> Slurm:
        try:
            files = ("socket", "key", "log", "pid", "seed")
            paths = [f"--{name}{'' if name == 'socket' else '-file'}={self.folder}/munge.{name}" for name in files]
            self._start("munged", "--foreground", "--force", *paths)
            self._wait_for(lambda: (self.folder / "munge.socket").exists())
            self._start("slurmctld", "-D", "-i")
            self._start("slurmd", "-D")
            self._wait_for(lambda: "IDLE" in self.run("scontrol", "show", "nodes", check=False))
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if len(self._daemons) == 3:  # there may be jobs; slurmd must end their processes
            self.run("scancel", "--user=root", check=False)
            deadline = time.monotonic() + 20
            while self.run("squeue", "--noheader", check=False).strip() and time.monotonic() < deadline:
                time.sleep(0.1)
        for daemon in reversed(self._daemons):
            daemon.terminate()
            try:
                daemon.wait(timeout=10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def run(self, program: str, *arguments: str, check: bool = True, **variables: str) -> str:
        """What a command of SLURM prints, stderr included; `variables` are added to its environment."""
        done = subprocess.run(
            [program, *arguments],
            env=self.environment | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert done.returncode == 0 or not check, f"{program} ended with {done.returncode}: {done.stdout}"
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` says of a job: JobState, Restarts, ExitCode, ..."""
        return dict(word.split("=", 1) for word in self.run("scontrol", "show", "job", number).split() if "=" in word)

    def logs(self) -> str:
        """The ends of the daemons' logs."""
        return "\n".join(f"--- {path.name}\n{path.read_text()[-3000:]}" for path in self.folder.glob("*.log"))

    def _start(self, program: str, *arguments: str) -> None:
        path = _program(program)
        assert path is not None
        with (self.folder / f"{program}.log").open("wb") as log:
            self._daemons.append(
                subprocess.Popen(
                    ["setpriv", "--pdeathsig=KILL", path, *arguments],
                    env=self.environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                )
            )

    def _wait_for(self, condition) -> None:
        while not condition():
            assert all(daemon.poll() is None for daemon in self._daemons), self.logs()
            time.sleep(0.05)
