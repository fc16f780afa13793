"""One run at a time in a run's folder.

`run.lock` names the host and process that trains there. There is no flock, which NFS may not have, and no clock is compared with
another host's: on the same machine the process itself is asked for; a run elsewhere refreshes its lock, and one that has not
changed for `PATIENCE` seconds is a dead run's.
"""

from __future__ import annotations

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
PATIENCE = 20.0


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Holds the lock of `folder`, which is made if it does not exist.

    Raises ValueError, naming host, process and time, where another run holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    mine = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": datetime.now().astimezone().isoformat(" ", "seconds"),
        "machine": _machine(),
        "process_start": _start_of(os.getpid()),
    }
    try:
        _create(path, mine)
    except FileExistsError:
        _wait_until_dead(path)
        path.unlink(missing_ok=True)
        try:
            _create(path, mine)  # of two runs that find a dead one's lock, one comes first
        except FileExistsError as error:
            raise ValueError(f"another run has just begun in {folder}: see {path}") from error
    over = threading.Event()
    thread = threading.Thread(target=_refresh, args=(path, mine, over), name="run lock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(REFRESH)  # so that it does not write once more
        if _is(_read(path), mine):
            path.unlink(missing_ok=True)


def _create(path: Path, mine: dict[str, Any]) -> None:
    with path.open("x") as file:
        json.dump(mine, file)


def _read(path: Path) -> dict[str, Any] | None:
    with suppress(OSError, ValueError):
        owner = json.loads(path.read_text())
        return owner if isinstance(owner, dict) else None
    return None


def _is(owner: dict[str, Any] | None, other: dict[str, Any]) -> bool:
    return owner is not None and all(owner.get(key) == other[key] for key in ("machine", "pid", "process_start"))


def _refresh(path: Path, mine: dict[str, Any], over: threading.Event) -> None:
    beat = 0
    while not over.wait(REFRESH):
        owner = _read(path)
        if owner is not None and not _is(owner, mine):
            log.error("%s: %s, process %s, has taken this run's folder", path, owner.get("host"), owner.get("pid"))
            return
        beat += 1
        with suppress(OSError):  # a full disk, a folder that is gone: the next checkpoint tells
            path.write_text(json.dumps(mine | {"beat": beat}))


def _wait_until_dead(path: Path) -> None:
    """Returns once the lock is known to be a dead run's. Raises ValueError if that run lives."""
    owner = _read(path)
    if owner is not None and owner.get("machine") == _machine():
        alive = _start_of(owner["pid"]) == owner["process_start"]
    else:
        if owner is not None:
            log.info("waiting for %g s to see whether the run on %s still lives", PATIENCE, owner.get("host"))
        before, deadline = _text(path), time.monotonic() + PATIENCE
        while not (alive := _text(path) != before) and time.monotonic() < deadline:
            time.sleep(min(1.0, PATIENCE / 10))
        owner = _read(path) or owner
    if alive and owner is not None:
        raise ValueError(
            f"{path.parent} is the folder of a run that lives: on {owner.get('host')}, process {owner.get('pid')}, since "
            f"{owner.get('since')}. Stop that one first, or choose another --run_name"
        )


def _text(path: Path) -> str | None:
    with suppress(OSError):
        return path.read_text()
    return None


def _machine() -> str:
    """Of this boot of this machine, and of the container: where process ids mean the same."""
    with suppress(OSError):
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    return socket.gethostname()


def _start_of(pid: int) -> str | None:
    """When a process began, in ticks since boot: another one may have its id by now. None if there is none."""
    with suppress(OSError, IndexError):
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if state in "ZX" else fields[18]
    if not Path("/proc/self/stat").exists():
        with suppress(OSError):
            os.kill(pid, 0)
            return "running"
    return None
