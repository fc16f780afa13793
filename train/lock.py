"""One run at a time in a run's folder.

`run.lock` names the host and process that trains there. There is no flock, which NFS may not have, and no clock is compared with
another host's: on the same machine the process itself is looked for; a lock of another machine is refreshed as long as its run lives.
"""

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

LOCK = "run.lock"
REFRESH = 5.0  # seconds
PATIENCE = 20.0  # seconds after which a lock of another machine that has not changed is a dead run's


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Holds the lock of `folder`, which is made if need be. Raises ValueError, naming host, process and time, where another run does."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    process = {"machine": _machine(), "pid": os.getpid(), "process_start": _start_time(os.getpid())}
    lock = process | {"host": socket.gethostname(), "since": datetime.now().astimezone().isoformat(" ", "seconds")}
    if path.exists():
        _wait_until_dead(path)
        path.unlink(missing_ok=True)
    try:
        with path.open("x") as file:
            json.dump(lock, file)
    except FileExistsError as error:  # of two runs that find a dead one's lock, one comes first
        raise ValueError(f"another run has just begun in {folder}: see {path}") from error

    def refresh() -> None:
        while not over.wait(REFRESH):
            owner = _read(path)
            if path.exists() and not process.items() <= owner.items():
                log.error("%s: %s, process %s, has taken this run's folder", path, owner.get("host"), owner.get("pid"))
                return
            with suppress(OSError):  # a full disk, a folder that is gone: the next checkpoint tells
                path.write_text(json.dumps(lock | {"beat": time.monotonic()}))

    over = threading.Event()
    thread = threading.Thread(target=refresh, name="run lock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(REFRESH)  # so that it does not write once more
        if process.items() <= _read(path).items():
            path.unlink(missing_ok=True)


def _read(path: Path) -> dict[str, Any]:
    """What the lock says; nothing where it is broken or gone."""
    with suppress(OSError, ValueError, TypeError):
        return dict(json.loads(path.read_text()))
    return {}


def _wait_until_dead(path: Path) -> None:
    """Returns once the lock is known to be a dead run's. Raises ValueError if that run lives."""
    owner = _read(path)
    if owner.get("machine") == _machine():
        alive = owner.get("process_start") is not None and owner["process_start"] == _start_time(owner["pid"])
    else:
        log.info("waiting for %g s to see whether the run on %s still lives", PATIENCE, owner.get("host"))
        alive, deadline = False, time.monotonic() + PATIENCE
        while not alive and time.monotonic() < deadline:
            time.sleep(min(1.0, PATIENCE / 10))
            alive = _read(path) != owner  # its content, and not its time, which NFS may keep for a while
    if alive and path.exists():
        raise ValueError(
            f"{path.parent} is the folder of a run that lives: on {owner.get('host')}, process {owner.get('pid')}, since "
            f"{owner.get('since')}. Stop that one first, or choose another folder"
        )


def _machine() -> str:
    """Of this boot of this machine, and of the container: where process ids mean the same."""
    with suppress(OSError):
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    return socket.gethostname()


def _start_time(pid: int) -> str | None:
    """When a process began, in ticks since boot: another one may have its id by now. None if there is none."""
    with suppress(OSError, IndexError):
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if state in "ZX" else fields[18]
    return None
