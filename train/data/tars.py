"""A shard → its raw samples: tar members, grouped by key; and reading it once more where a network fails.

No member is ever written to disk, so names mean nothing but keys; links, devices and folders are passed over.
"""

from __future__ import annotations

import logging
import re
import tarfile
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import IO, Any

from open_flamingo.train.data.samples import Counts, RawSample, SampleError
from open_flamingo.train.data.shards import local_path
from open_flamingo.train.data.streams import CHUNK, ShardStream, decompressed

logger = logging.getLogger(__name__)

# Bytes of all files of one sample; larger ones are left out. MMC4 documents are a few hundred KB, the largest some 20 MB. It bounds a
# worker's memory: json takes up to twenty times its length once it is parsed.
MAX_SAMPLE = 64 << 20
# Bytes of an extended header (a long name, say), and characters of a name.
MAX_HEADER, MAX_NAME = 1 << 16, 4096
# Bytes of one file: tarfile looks for the end of what a damaged header says for as long as it takes.
MAX_FILE = 1 << 32
# Keys of samples of a single file that are remembered per shard, to tell where the other files of a sample come later.
MAX_ALONE = 4096
METADATA = re.compile(r"(^|/)(__MACOSX|PaxHeaders?(\.\d+)?)(/|$)")
EXTENDED = (*tarfile.GNU_TYPES[:2], tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
# Seconds before each further try at a shard that is not on this machine.
RETRY_DELAYS = (1.0, 4.0)


class Header(tarfile.TarInfo):
    """A tar header; where it is damaged, an error: tarfile itself would take that for the archive's end."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> Any:
        try:
            header = super().fromtarfile(tar)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise  # the mark of the end
        except tarfile.EmptyHeaderError:  # type: ignore[attr-defined]
            tar.is_cut_off = True  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"not a tar header: {error}") from error
        return header._checked()

    @classmethod
    def frombuf(cls, block: bytes, encoding: str, errors: str) -> Any:
        try:
            header = super().frombuf(block, encoding, errors)
        except tarfile.InvalidHeaderError as error:  # type: ignore[attr-defined]
            raise tarfile.ReadError(f"not a tar header: {error}; it begins with {bytes(block[:40])!r}") from error
        return header._checked()

    def _checked(self) -> Header:
        if not 0 <= self.size <= (MAX_HEADER if self.type in EXTENDED else MAX_FILE):
            raise tarfile.ReadError(f"{self.name!r} has a size of {self.size}")
        if self.issparse():
            raise tarfile.ReadError(f"{self.name!r} is a sparse file")
        return self


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
            yield from _samples(file, url)
        except (tarfile.TarError, EOFError) as error:
            if status := stream.status():  # which says why
                raise OSError(f"the command ended with exit status {status} ({error})") from error
            raise
        file.read(1 << 20)  # past the padding: gzip's checksum comes after it
        stream.finish()


def _samples(file: IO[bytes], url: str) -> Iterator[RawSample | SampleError]:
    """The files of a tar stream by key, and what is wrong with some of them."""
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
                    f"{key}.{suffix} is apart from {key}.{alone[key]}: the files of a sample must follow each other. Make the tar again "
                    "with `tar --sort=name`",
                )
            if len(alone) < MAX_ALONE:
                alone[key] = suffix
        return sample or None

    options: dict[str, Any] = {"bufsize": CHUNK, "tarinfo": Header, "encoding": "utf-8", "errors": "backslashreplace"}
    # What there is of a block, rather than an error for all of it where the stream breaks.
    blocks: Any = SimpleNamespace(read=file.read1)  # type: ignore[attr-defined]
    with tarfile.open(fileobj=blocks, mode="r|", **options) as tar:
        while (header := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined]  # it would remember all of them
            if not header.isreg():
                continue
            name = (
                header.name if header.name.isprintable() else repr(header.name)[1:-1]
            )  # keys are logged, also to terminals
            key, suffix = _split(name)
            if key is None:
                continue
            if key != sample.get("__key__"):
                if (last := finished()) is not None:
                    yield last
                sample, size, files = {"__key__": key, "__url__": url}, 0, 0
            size += header.size + tarfile.BLOCKSIZE
            files += 1
            if size > MAX_SAMPLE:
                sample = {"__key__": key, "__url__": url}  # lets go of what it holds
            elif suffix in sample:  # the first one stays
                yield SampleError("duplicate_member", f"a second {name}")
            else:
                contents = tar.extractfile(header)
                assert contents is not None
                sample[suffix] = contents.read()
    if (last := finished()) is not None:
        yield last
    if hasattr(tar, "is_cut_off"):
        raise tarfile.ReadError("cut off: the archive's end is not marked")


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
