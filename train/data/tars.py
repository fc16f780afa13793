"""A shard → its raw samples: tar members, grouped by key; and reading it once more where a network fails.

No member is ever written to disk, so names mean nothing but keys; links, devices and folders are passed over.
"""

import logging
import re
import tarfile
import time
from collections.abc import Iterator
from itertools import groupby, islice
from operator import itemgetter
from types import SimpleNamespace
from typing import IO, Any, Self

from open_flamingo.train.data.samples import Counts, RawSample, SampleError
from open_flamingo.train.data.shards import local_path
from open_flamingo.train.data.streams import CHUNK, ShardStream, decompressed

logger = logging.getLogger(__name__)

# Bytes of all files of one sample; larger ones are left out. MMC4's largest documents have some 20 MB. It bounds a worker's memory:
# json takes up to twenty times its length once it is parsed.
MAX_SAMPLE = 64 << 20
MAX_HEADER = 1 << 16  # bytes of an extended header (a long name, say)
MAX_NAME = 4096  # characters
MAX_FILE = 1 << 32  # bytes: tarfile looks for the end of what a damaged header says for as long as it takes
# Keys of samples of a single file that are remembered per shard, to tell where the other files of a sample come later.
MAX_ALONE = 4096
METADATA = re.compile(r"(^|/)(__MACOSX|PaxHeaders?(\.\d+)?)(/|$)")
EXTENDED = (*tarfile.GNU_TYPES[:2], tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
RETRY_DELAYS = (1.0, 4.0)  # seconds before each further try at a shard that is not on this machine


class Header(tarfile.TarInfo):
    """A tar header; where it is damaged, an error: tarfile itself would take that for the archive's end."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> Any:
        try:
            return super().fromtarfile(tar)._checked()
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise  # the mark of the end
        except tarfile.EmptyHeaderError:  # type: ignore[attr-defined]
            tar.is_cut_off = True  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"not a tar header: {error}") from error

    @classmethod
    def frombuf(cls, block: bytes, encoding: str, errors: str) -> Any:
        try:
            return super().frombuf(block, encoding, errors)._checked()
        except tarfile.InvalidHeaderError as error:  # type: ignore[attr-defined]
            raise tarfile.ReadError(f"not a tar header: {error}; it begins with {bytes(block[:40])!r}") from error

    def _checked(self) -> Self:
        if not 0 <= self.size <= (MAX_HEADER if self.type in EXTENDED else MAX_FILE):
            raise tarfile.ReadError(f"{self.name!r} has a size of {self.size}")
        if self.issparse():
            raise tarfile.ReadError(f"{self.name!r} is a sparse file")
        return self


def read_shard(url: str, counts: Counts) -> Iterator[RawSample]:
    """The samples of a shard: consecutive files of one key, by lower-case suffix, undecoded.

    Counts what is left out: `sample_too_large`, `duplicate_member` (a second file of one name) and `not_adjacent` (to the other
    files of its sample). A shard that is not on this machine is read again, after each of `RETRY_DELAYS`, from where it failed.

    Raises SampleError at the end of what can be read: the shard cannot be opened, is damaged, or the command that pipes it failed.
    """
    done = 0  # samples, and what was counted
    for delay in (*(RETRY_DELAYS if local_path(url) is None else ()), None):
        try:
            for item in islice(_read_once(url), done, None):
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
            yield from _samples(file, url)
        except (tarfile.TarError, EOFError) as error:
            if status := stream.status():  # which says why
                raise OSError(f"the command ended with exit status {status} ({error})") from error
            raise
        file.read(1 << 20)  # past the padding: gzip's checksum comes after it
        stream.finish()


def _samples(file: IO[bytes], url: str) -> Iterator[RawSample | SampleError]:
    """The files of a tar stream by key, and what is wrong with some of them."""
    options: dict[str, Any] = {"bufsize": CHUNK, "tarinfo": Header, "encoding": "utf-8", "errors": "backslashreplace"}
    # What there is of a block, rather than an error for all of it where the stream breaks.
    blocks: Any = SimpleNamespace(read=file.read1)  # type: ignore[attr-defined]
    alone: dict[str, str] = {}  # samples of a single file: key → suffix
    with tarfile.open(fileobj=blocks, mode="r|", **options) as tar:
        for key, members in groupby(_members(tar), key=itemgetter(0)):
            sample: RawSample = {"__key__": key, "__url__": url}
            size = files = 0  # bytes with headers
            for _, suffix, header in members:
                size += header.size + tarfile.BLOCKSIZE
                files += 1
                if size > MAX_SAMPLE:
                    sample.clear()
                elif suffix in sample:  # the first one stays
                    yield SampleError("duplicate_member", f"a second {key}.{suffix}")
                else:
                    sample[suffix] = tar.extractfile(header).read()  # type: ignore[union-attr]
            if size > MAX_SAMPLE:
                yield SampleError(
                    "sample_too_large",
                    f"{key}: {files} files of more than {MAX_SAMPLE >> 20} MiB. All files whose names are the same up to the first "
                    "dot, and follow each other, are one sample",
                )
            elif files == 1 and alone.get(key, suffix) != suffix:
                yield SampleError(
                    "not_adjacent",
                    f"{key}.{suffix} is apart from {key}.{alone[key]}: the files of a sample must follow each other. Make the tar again "
                    "with `tar --sort=name`",
                )
            else:
                if files == 1 and len(alone) < MAX_ALONE:
                    alone[key] = suffix
                yield sample
    if hasattr(tar, "is_cut_off"):
        raise tarfile.ReadError("cut off: the archive's end is not marked")


def _members(tar: tarfile.TarFile) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    """Key, lower-case suffix (before and after the first dot of the file's name) and header of each file that belongs to a sample.

    Hidden files do not (a Mac puts a `._a.jpg` beside each `a.jpg`), nor does metadata of tar programs (PaxHeaders.1/a.jpg) and
    webdataset (__info__.json).
    """
    while (header := tar.next()) is not None:
        tar.members = []  # type: ignore[attr-defined]  # it would remember all of them
        name = header.name
        if not name.isprintable():  # keys are logged, also to terminals
            name = repr(name)[1:-1]
        folder, slash, file = name.rpartition("/")
        stem, dot, suffix = file.partition(".")
        is_named = dot and stem and len(name) <= MAX_NAME and not name.startswith("__")
        if header.isreg() and is_named and not METADATA.search(folder):
            yield f"{folder}{slash}{stem}", suffix.lower(), header
