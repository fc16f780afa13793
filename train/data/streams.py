"""A shard's URL → its bytes, decompressed. What stalls or fails is an OSError or EOFError."""

import bz2
import gzip
import io
import os
import signal
from contextlib import suppress
from multiprocessing.connection import wait
from subprocess import PIPE, Popen, TimeoutExpired
from typing import IO, Any

import webdataset as wds

# Seconds without a byte after which a pipe has stalled. All tries on a dead host take less than the loader's own time-out.
STALL = 120.0
MAX_REST = 64 << 20  # bytes that may follow a tar's end in a pipe: one that never ends must not be read forever
CHUNK = 1 << 16
MAGIC = 6  # bytes at the beginning that tell how it is compressed; a pipe may give them one by one


class ShardStream(io.RawIOBase):
    """The bytes of a shard as they are stored: a file's, or those that a command writes (`pipe:`, and curl for `http(s)://`)."""

    _process: Popen[bytes] | None = None
    _stream: Any = None
    _begun = False

    def __init__(self, url: str) -> None:
        # Unbuffered: a buffer would hide from `wait` that there is something to read.
        if url.startswith("pipe:"):
            # A session of its own, to be killed with all that the command starts; and Ctrl-C is meant for the training process.
            command = url.removeprefix("pipe:")
            self._process = Popen(command, shell=True, stdout=PIPE, bufsize=0, start_new_session=True)
            self._stream = self._process.stdout
        else:
            self._stream = wds.gopen(url, bufsize=0)
            self._process = getattr(self._stream, "proc", None)
        # webdataset's own `read` looks at the command's status each time, and raises even if there is more to read: how much
        # would be seen of a shard depended on who is faster. Here it is asked once, at the end.
        self._file: IO[bytes] = getattr(self._stream, "stream", self._stream)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        length = self._read(buffer)
        while not self._begun and 0 < length < MAGIC and (more := self._read(memoryview(buffer)[length:])):
            length += more
        self._begun = True
        return length

    def _read(self, buffer: Any) -> int:
        if self._process is not None and not wait([self._file], STALL):  # type: ignore[list-item]
            raise OSError(f"nothing came for {STALL:g} seconds")
        return self._file.readinto(buffer)  # type: ignore[attr-defined]

    def status(self, seconds: float = 1.0) -> int | None:
        """The exit status of the command, if there is one and it ends by itself in so many seconds."""
        try:
            return None if self._process is None else self._process.wait(seconds)
        except TimeoutExpired:
            return None

    def finish(self) -> None:
        """Reads on until the command ends: one that we leave while it writes fails for that alone. Raises OSError if it fails."""
        if self._process is None:
            return
        rest = 0
        while data := self.read(CHUNK):
            rest += len(data)
            if rest > MAX_REST:
                raise OSError(f"more than {MAX_REST >> 20} MiB follow the archive")
        if (status := self.status(STALL)) is None:
            raise OSError(f"the command closed its output and did not end in {STALL:g} seconds")
        if status != 0:
            raise OSError(f"the command ended with exit status {status}")

    def close(self) -> None:
        if self.closed:
            return
        super().close()
        # Closing the stream waits for the command, and it may have stalled.
        if self._process is not None and self._process.poll() is None:
            if os.getpgid(self._process.pid) == self._process.pid:
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.kill()
            self._process.wait()
        with suppress(Exception):  # that says nothing about what was read
            self._stream.close()


def decompressed(stream: ShardStream) -> IO[bytes]:
    """`stream`, buffered, and decompressed if it begins as gzip, bzip2 or xz do."""
    buffered = io.BufferedReader(stream, CHUNK)
    begin = buffered.peek(MAGIC)
    if begin.startswith(b"\x1f\x8b"):
        return gzip.GzipFile(fileobj=buffered)  # type: ignore[return-value]
    if begin.startswith(b"BZh"):
        return bz2.BZ2File(buffered)
    if begin.startswith((b"\xfd7zXZ\x00", b"\x5d\x00\x00\x80")):
        import lzma  # some builds of Python lack it

        return lzma.LZMAFile(buffered)
    return buffered
