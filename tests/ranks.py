"""Programs in processes of their own, which need not import torch and transformers anew: a server that has done so forks.

Where the start of Python, what is imported, or torchrun itself is the subject, subprocess and tests.tiny.torchrun start them.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

SERVER = Path(__file__).parent / "rank_server.py"


class Server:
    """Started when it is first needed; ends with the process that started it, and all that it runs with it."""

    def __init__(self) -> None:
        self._requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, str(SERVER), str(theirs.fileno())]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            command, pass_fds=[theirs.fileno()], env=environment, stdin=subprocess.DEVNULL, start_new_session=True
        )
        theirs.close()
        atexit.register(self.close)

    def close(self) -> None:
        self._requests.close()
        self._process.wait()

    def send(self, request: Mapping[str, Any], descriptors: list[int]) -> None:
        socket.send_fds(self._requests, [json.dumps(request).encode()], descriptors)


_server: Server | None = None


class Fork:
    """A program that the server runs, with what is used of subprocess.Popen.

    Args:
        command: as after `python`: a file, or `-c` and code; then arguments.
        ranks: how many processes of it, which know each other as under torchrun; None for one that knows of no others.
        patience: seconds that the other ranks get to end when one has failed, before they are killed; torchrun's by default.
        environment, cwd: this process's by default.
        stdin, stdout, stderr: files. By default nothing, a pipe, and as stdout.

    It is a process group of its own. With ranks, `pid` is that of a process which stands for torchrun: it ends the others
    when one has failed, and then its exit code is 1. `ranks` are their process ids.
    """

    def __init__(
        self,
        *command: str | Path,
        ranks: int | None = None,
        patience: float = 30,
        environment: Mapping[str, str] | None = None,
        cwd: str | Path | None = None,
        stdin: IO[Any] | None = None,
        stdout: IO[Any] | None = None,
        stderr: IO[Any] | None = None,
    ) -> None:
        global _server
        if _server is None:
            _server = Server()
        self.args = list(map(str, command))
        self.returncode: int | None = None
        self.stdout: IO[str] | None = None
        self._told, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        opened = [os.open(os.devnull, os.O_RDONLY)]
        if stdout is None:
            reading, writing = os.pipe()
            self.stdout = os.fdopen(reading)
            opened.append(writing)
        output = stdout.fileno() if stdout is not None else opened[1]
        descriptors = [
            stdin.fileno() if stdin is not None else opened[0],
            output,
            stderr.fileno() if stderr is not None else output,
            theirs.fileno(),
        ]
        request = {
            "command": self.args,
            "ranks": ranks,
            "patience": patience,
            "environment": dict(os.environ if environment is None else environment),
            "cwd": str(Path.cwd() if cwd is None else cwd),
        }
        _server.send(request, descriptors)
        theirs.close()
        for descriptor in opened:
            os.close(descriptor)
        self.pid: int = self._hear()
        self.ranks: list[int] = self._hear() if ranks is not None else []

    def _hear(self) -> Any:
        message = self._told.recv(1 << 16)
        assert message, "the server of tests/ranks.py has ended: what it said is on the standard error of the tests"
        return json.loads(message)

    def poll(self) -> int | None:
        if self.returncode is None:
            self._told.setblocking(False)
            try:
                self.returncode = self._hear()
            except BlockingIOError:
                pass
            finally:
                self._told.setblocking(True)
        return self.returncode

    def wait(self) -> int:
        if self.returncode is None:
            self.returncode = self._hear()
        return self.returncode  # type: ignore[return-value]

    def communicate(self) -> tuple[str, None]:
        """What it and its children have said, when all of them have ended."""
        output = ""
        if self.stdout is not None and not self.stdout.closed:
            with self.stdout:
                output = self.stdout.read()
        self.wait()
        return output, None

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def run_ranks(ranks: int, program: str | Path, *arguments: str, patience: float = 30) -> Fork:
    """Starts `program` on so many ranks, as `torchrun` of tests.tiny does, in a fraction of its time."""
    return Fork(program, *arguments, ranks=ranks, patience=patience)


@contextmanager
def held_port() -> Iterator[int]:
    """A port of this machine that, within the `with`, nobody gets who does not ask for this one.

    Linux lets another socket have it too, as long as neither of the two listens before; torch's store and torchrun ask so.
    """
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]
