"""A shard → its raw samples: tar members, grouped by key; and reading it once more where a network fails.

A shard is a stranger's file. Whatever is in it, reading takes time in proportion to its length, and memory in proportion to
`MAX_SAMPLE`. (Python's `tarfile` takes as much of both as a header asks for: sparse files, long names, extended headers; only
its parser of a single header is used here.) No member is ever written to disk, so names mean nothing but keys; links,
devices and folders are passed over.
"""

from __future__ import annotations

import logging
import re
import tarfile
import time
from collections.abc import Iterator
from typing import IO

from open_flamingo.train.data.samples import Counts, RawSample, SampleError
from open_flamingo.train.data.shards import local_path
from open_flamingo.train.data.streams import CHUNK, ShardStream, decompressed

logger = logging.getLogger(__name__)

# Bytes of all files of one sample; larger ones are left out. MMC4 documents are a few hundred KB, the largest some 20 MB. It bounds a
# worker's memory: json takes up to twenty times its length once it is parsed.
MAX_SAMPLE = 64 << 20
# Bytes of an extended header (a long name, say), and characters of a name.
MAX_HEADER, MAX_NAME = 1 << 16, 4096
# Keys of samples of a single file that are remembered of a shard, to tell where the other files of a sample come later.
MAX_ALONE = 4096
METADATA = re.compile(r"(^|/)(__MACOSX|PaxHeaders?(\.\d+)?)(/|$)")
# Seconds before each further try at a shard that is not on this machine.
RETRY_DELAYS = (1.0, 4.0)

REGULAR = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
DATALESS = (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE)
PAX = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)


def read_shard(url: str, counts: Counts) -> Iterator[RawSample]:
    """The samples of a shard: consecutive files of one key, by lower-case suffix, undecoded.

    Samples of more than `MAX_SAMPLE` bytes (`sample_too_large`), second files of one name (`duplicate_member`) and files that come
    apart from the others of their sample (`not_adjacent`) are left out and counted. A shard that is not on this machine is read
    again, after each of `RETRY_DELAYS`, from where it failed.

    Raises SampleError at the end of what can be read: the shard cannot be opened, is cut off or damaged, or the command that
    pipes it failed.
    """
    delays = RETRY_DELAYS if local_path(url) is None else ()
    done = 0  # samples, and what was counted
    for delay in (*delays, None):
        try:
            for i, item in enumerate(_read_once(url)):
                if i < done:  # known from an earlier try
                    continue
                done += 1
                if isinstance(item, SampleError):
                    counts.error(item.reason, url, str(item))
                else:
                    yield item
            return
        # webdataset's openers, decompressors and tar: what they raise has nothing in common.
        except Exception as error:
            message = str(error) or type(error).__name__
            if delay is None:
                raise SampleError("damaged_shard" if done else "unreadable_shard", f"{url}: {message}") from error
            logger.warning("%s failed after %d samples: %s; trying again in %g s", url, done, message, delay)
            time.sleep(delay)


def _read_once(url: str) -> Iterator[RawSample | SampleError]:
    """Samples, and in their places the errors that leave the rest of the shard as it is."""
    with ShardStream(url) as stream:
        try:
            file = decompressed(stream)
            tar = TarReader(file)
            yield from _samples(tar, url)
            if not tar.complete:
                raise tarfile.ReadError("cut off: the archive's end is not marked")
        except (tarfile.TarError, EOFError) as error:
            if status := stream.status():  # which says why
                raise OSError(f"the command ended with exit status {status} ({error})") from error
            raise
        file.read(1 << 20)  # past the padding: gzip's checksum comes after it
        stream.finish()


class TarReader:
    """The regular files of a tar stream: iterating gives (name, size), then `read` gives the contents, or they are passed over.

    Understands POSIX (pax) and GNU names. Raises tarfile.TarError where the archive is damaged, ends within a file, or holds sparse
    files.

    Attributes:
        complete: whether the mark of the archive's end was seen.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self.complete = False
        self._file = file
        self._unread = self._padding = 0

    def read(self) -> bytes:
        """The contents of the file that was last given."""
        size, self._unread = self._unread, 0
        return self._exactly(size)

    def __iter__(self) -> Iterator[tuple[str, int]]:
        name: str | None = None  # what extended headers say of the next file
        size: int | None = None
        first = True
        while True:
            block = self._file.read(tarfile.BLOCKSIZE)
            if not block and not first:
                return
            if block.count(0) == tarfile.BLOCKSIZE:
                self.complete = True
                return
            info = self._header(block, first)
            first = False
            if info.type in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK):
                data = self._extended(info)
                if info.type == tarfile.GNUTYPE_LONGNAME:
                    name = data.partition(b"\0")[0].decode("utf-8", "backslashreplace")
                continue
            if info.type in PAX:
                records = _pax_records(self._extended(info))
                if info.type != tarfile.XGLTYPE:  # what is said of all files is no name and no size
                    name = records.get("path", name)
                    size = _number(records["size"]) if "size" in records else size
                continue
            self._unread = 0 if info.type in DATALESS else info.size if size is None else size
            self._padding = -self._unread % tarfile.BLOCKSIZE
            if info.type in REGULAR:
                yield _printable(info.name if name is None else name), self._unread
            self._skip(self._unread + self._padding)
            name = size = None

    def _header(self, block: bytes, first: bool) -> tarfile.TarInfo:
        if not block:
            raise tarfile.ReadError("empty file")
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "backslashreplace")
        except tarfile.TarError as error:
            begins = f", it begins with {block[:40]!r}" if first else ""
            raise tarfile.ReadError(f"not a tar header: {error}{begins}") from error
        if info.size < 0:
            raise tarfile.ReadError(f"{info.name!r} has a size of {info.size}")
        if info.type == tarfile.GNUTYPE_SPARSE:
            raise tarfile.ReadError(f"{info.name!r} is a sparse file")
        return info

    def _extended(self, info: tarfile.TarInfo) -> bytes:
        if info.size > MAX_HEADER:
            raise tarfile.ReadError(f"an extended header of {info.size} bytes")
        data = self._exactly(info.size)
        self._skip(-info.size % tarfile.BLOCKSIZE)
        return data

    def _exactly(self, size: int) -> bytes:
        data = self._file.read(size)
        if len(data) < size:
            raise tarfile.ReadError("unexpected end of data")
        return data

    def _skip(self, size: int) -> None:
        while size > 0:
            size -= len(self._exactly(min(size, CHUNK)))


def _pax_records(data: bytes) -> dict[str, str]:
    """Keyword → value of a pax header, which is lines of "length keyword=value"."""
    records = {}
    start = 0
    while start < len(data) and data[start]:
        space = data.find(b" ", start, start + 8)
        end = start + _number(data[start : max(space, start)].decode("ascii", "replace"))
        keyword, equals, value = data[space + 1 : end - 1].partition(b"=")
        if not equals or data[end - 1 : end] != b"\n":
            raise tarfile.ReadError("a damaged pax header")
        records[keyword.decode("utf-8", "backslashreplace")] = value.decode("utf-8", "backslashreplace")
        start = end
    if any(keyword.startswith("GNU.sparse.") for keyword in records):
        raise tarfile.ReadError("a sparse file")
    return records


def _number(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise tarfile.ReadError(f"a damaged pax header: {text[:20]!r} is no size")
    return int(text)


def _printable(name: str) -> str:
    # Keys are logged, and nobody's terminal is to be steered by them.
    return name if name.isprintable() else repr(name)[1:-1]


def _samples(tar: TarReader, url: str) -> Iterator[RawSample | SampleError]:
    """The files of `tar` by key, and what is wrong with some of them."""
    sample: RawSample = {}
    size = files = 0  # of the sample; bytes with headers
    alone: dict[str, str] = {}  # samples of a single file: key -> suffix

    def finished() -> RawSample | SampleError | None:
        if size > MAX_SAMPLE:
            return SampleError(
                "sample_too_large",
                f"{sample['__key__']}: {files} files of more than {MAX_SAMPLE >> 20} MiB. All files whose names are the same up to "
                "the first dot, and follow each other, are one sample",
            )
        if files == 1:
            key, suffix = sample["__key__"], next(reversed(sample))
            if alone.get(key, suffix) != suffix:
                return SampleError(
                    "not_adjacent",
                    f"{key}.{suffix} is apart from {key}.{alone[key]}: the files of a sample must follow each other. Make the tar "
                    "anew with `tar --sort=name`",
                )
            if len(alone) < MAX_ALONE:
                alone[key] = suffix
        return sample or None

    for name, file_size in tar:
        key, suffix = _split(name)
        if key is None:
            continue
        if key != sample.get("__key__"):
            if (last := finished()) is not None:
                yield last
            sample, size, files = {"__key__": key, "__url__": url}, 0, 0
        size += file_size + tarfile.BLOCKSIZE
        files += 1
        if size > MAX_SAMPLE:
            sample = {"__key__": key, "__url__": url}  # lets go of what it holds
        elif suffix in sample:  # the first one stays
            yield SampleError("duplicate_member", f"a second {name}")
        else:
            sample[suffix] = tar.read()
    if (last := finished()) is not None:
        yield last


def _split(name: str) -> tuple[str | None, str]:
    """Key and lower-case suffix: before and after the first dot of the file's name; no key where there is no such thing.

    Hidden files have none: a Mac puts a `._a.jpg` beside each `a.jpg`, and .DS_Store. Nor has metadata of tar programs
    (PaxHeaders.1/a.jpg) and webdataset (__info__.json).
    """
    folder, slash, file = name.rpartition("/")
    stem, dot, suffix = file.partition(".")
    if not dot or not stem or len(name) > MAX_NAME or name.startswith("__") or METADATA.search(folder):
        return None, ""
    return f"{folder}{slash}{stem}", suffix.lower()
