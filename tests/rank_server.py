"""The server that tests.ranks starts: a process of one thread that has imported what takes seconds, and forks itself.

The first argument is the number of a socket on which requests arrive. Each is a message of json with four descriptors: the
standard input, output and error of what is to be run, and a socket on which is told what becomes of it.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import random
import selectors
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

# What a training run has imported by its end.
MODULES = (
    "torch._dynamo",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.utils.tensorboard",
    "transformers.models.opt.modeling_opt",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "open_clip",
    "open_flamingo.train.train",
    "open_flamingo.train.sharded",
    "open_flamingo.train.loop",
    "open_flamingo.train.data.loader",
)


def serve(requests: socket.socket) -> dict[str, Any]:
    """Returns in processes that are to run a program, with what they are to run; ends when the tests do."""
    selector = selectors.DefaultSelector()
    selector.register(requests, selectors.EVENT_READ)
    running: dict[int, tuple[int, socket.socket]] = {}  # by the descriptor of a process, its id and whom to tell
    while True:
        for key, _ in selector.select():
            if key.fileobj is not requests:
                selector.unregister(key.fd)
                pid, told = running.pop(key.fd)
                tell(told, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
                told.close()
                os.close(key.fd)
                continue
            message, descriptors, _, _ = socket.recv_fds(requests, 1 << 20, 4)
            if not message:
                for pid, _ in running.values():
                    kill_group(pid)
                os._exit(0)
            told = socket.socket(fileno=descriptors[3])
            pid = os.fork()
            if pid == 0:
                for descriptor, (_, other) in running.items():
                    os.close(descriptor)
                    other.close()
                selector.close()
                requests.close()
                return start(json.loads(message), descriptors[:3], told)
            for descriptor in descriptors[:3]:
                os.close(descriptor)
            tell(told, pid)
            descriptor = os.pidfd_open(pid)
            running[descriptor] = pid, told
            selector.register(descriptor, selectors.EVENT_READ)


def tell(told: socket.socket, what: Any) -> None:
    with contextlib.suppress(OSError):  # nobody wants to know any more
        told.send(json.dumps(what).encode())


def kill_group(pid: int) -> None:
    with contextlib.suppress(OSError):
        os.killpg(pid, signal.SIGKILL)


def start(request: dict[str, Any], descriptors: list[int], told: socket.socket) -> dict[str, Any]:
    """In the new process, which is the program, or starts the ranks that are."""
    os.setsid()
    for target, descriptor in enumerate(descriptors):
        os.dup2(descriptor, target)
        os.close(descriptor)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    ranks = request["ranks"]
    if ranks is None:
        told.close()
        return request

    reading, writing = os.pipe()
    pids = []
    for rank in range(ranks):
        pid = os.fork()
        if pid == 0:
            told.close()
            os.close(writing)
            os.environ.update(place(rank, ranks, port=os.read(reading, 5).decode()))
            os.close(reading)
            return request
        pids.append(pid)
    os.close(reading)
    tell(told, pids)
    told.close()
    os._exit(watch(pids, writing, request["patience"]))


def place(rank: int, ranks: int, port: str) -> dict[str, str]:
    """What torchrun tells its ranks."""
    variables = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": ranks, "GROUP_RANK": 0}
    variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "tests"}
    variables |= {"TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": 0}
    return {name: str(value) for name, value in variables.items()}


def watch(pids: list[int], port: int, patience: float) -> int:
    """Where the ranks meet, and torchrun's part when one fails: the others are ended, and the exit code is 1."""
    from torch.distributed import TCPStore

    # Only now, as it has threads. It has the port from the moment on at which it is chosen.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    os.write(port, f"{store.port:05}".encode() * len(pids))
    os.close(port)
    living = dict(enumerate(pids))
    signal.signal(signal.SIGTERM, lambda *_: [os.kill(pid, signal.SIGTERM) for pid in living.values()])
    deadline = None
    while living:
        for rank, pid in list(living.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if not ended:
                continue
            del living[rank]
            code = os.waitstatus_to_exitcode(status)
            if code != 0 and deadline is None:
                print(f"rank {rank} (pid {pid}): exitcode : {code}", file=sys.stderr, flush=True)
                deadline = time.monotonic() + patience
                for other in living.values():
                    os.kill(other, signal.SIGTERM)
        if deadline is not None and time.monotonic() > deadline:
            for pid in living.values():
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    return 0 if deadline is None else 1


def run(request: dict[str, Any]) -> None:
    """Runs the program as a Python that has just started would, with its own arguments and random numbers."""
    import numpy as np

    random.seed()
    np.random.seed()
    tempfile.tempdir = None
    sys.path[1:1] = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path not in sys.path]
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(write_through=request["ranks"] is not None)  # type: ignore[union-attr]  # torchrun's ranks
    main = types.ModuleType("__main__")
    sys.modules["__main__"] = main
    program, *arguments = request["command"]
    if program == "-c":
        code, *arguments = arguments
        compiled = compile(code, "<string>", "exec", dont_inherit=True)
    else:
        main.__file__ = program
        compiled = compile(Path(program).read_bytes(), program, "exec", dont_inherit=True)
    sys.argv = [program, *arguments]
    exec(compiled, main.__dict__)


def end(function: Callable[[], None]) -> NoReturn:
    """Calls `function` and ends as Python does, but for destroying each of its objects, which takes half a second."""
    code: Any = 0
    try:
        function()
    except SystemExit as exit:
        code = exit.code
    except KeyboardInterrupt:
        traceback.print_exc()
        code = -signal.SIGINT
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        code = 1
    if code is not None and not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]  # waits for those that are no daemons
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:
        code = 120
    if code == -signal.SIGINT:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit((code or 0) & 0xFF)


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parent.parent)
    for module in MODULES:
        importlib.import_module(module)
    assert threading.active_count() == len(os.listdir("/proc/self/task")) == 1, "a process with threads cannot fork"
    gc.collect()
    gc.freeze()  # what the collector never looks at stays in memory that all share
    request = serve(socket.socket(fileno=int(sys.argv[1])))
    end(lambda: run(request))
