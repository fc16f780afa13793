"""Files that are written whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


@contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """A file that takes the place of `path` once it is on disk; if that fails, `path` is as before."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(beside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        move(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def move(beside: Path, path: Path) -> None:
    """Gives a file or folder its name, which survives a loss of power."""
    os.replace(beside, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
