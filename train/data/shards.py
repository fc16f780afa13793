"""What the user typed → the list of shard URLs, checked.

Only the standard library and braceexpand are imported: this runs before anything heavy is loaded.
"""

import functools
import glob
import hashlib
import logging
import os
import shlex
from collections.abc import Callable, Iterable, Iterator

from braceexpand import UnbalancedBracesError, braceexpand  # type: ignore[attr-defined]

logger = logging.getLogger(__name__)

NAMED_IN_ERRORS = 3  # missing files; the rest are counted
MAX_MISSING = 0.1  # img2dataset leaves gaps where a shard failed; a larger share is a wrong pattern or a lost disk


def expand_shards(spec: str) -> list[str]:
    """The shard URLs of `spec`, in order; no shard is opened or looked for.

    `spec` is one pattern or several joined by `::`. Braces are expanded (`{000000..000041}`, `{a,b}`), then stars in local paths,
    to the files that exist, sorted; `@list.txt` is a file with one pattern per line, and `#` comments. `s3://` becomes a pipe of
    `aws s3 cp`, as in the reference; `http(s)://`, `gs://` and `pipe:` are left to webdataset.

    Raises ValueError where a brace is not closed, a star matches nothing, or a list cannot be read.
    """
    return [url for part in _parts(spec) for url in _expand(part)]


def _parts(spec: str) -> list[str]:
    return [part for part in map(str.strip, spec.split("::")) if part]


def _expand(part: str) -> Iterator[str]:
    patterns = [part]
    if part.startswith("@"):
        try:
            with open(os.path.expanduser(part[1:]), encoding="utf-8-sig") as file:
                patterns = [line for line in map(str.strip, file) if line and not line.startswith("#")]
        except (OSError, ValueError) as error:
            raise ValueError(f"{part!r}: the list of shards cannot be read ({error})") from error
    for pattern in patterns:
        try:
            names = list(braceexpand(pattern))
        except UnbalancedBracesError as error:
            raise ValueError(f"unbalanced braces in {pattern!r}") from error
        for name in names:
            path = local_path(name)
            if name.startswith("s3://"):
                yield f"pipe:aws s3 cp {shlex.quote(name)} -"
            elif path is None or "*" not in path:
                yield os.path.expanduser(name) if path == name else name
            elif files := sorted(glob.glob(os.path.expanduser(path))):
                yield from files
            else:
                raise ValueError(f"{name!r} matches no file")


def local_path(url: str) -> str | None:
    """The path of a shard on this machine; None for a pipe or a remote one."""
    if url.startswith("file:"):
        return url.removeprefix("file:").removeprefix("//")
    return None if url.startswith("pipe:") or "://" in url else url


def check_shards(flag: str, spec: str, missing_shards: str = "warn") -> tuple[list[str], list[str]]:
    """The shard URLs of `spec` that exist, in order, and those that do not. Remote ones are not looked for.

    Folders are listed; single files are not asked about, which takes minutes on NFS for LAION's 200,000. Of each part of `spec` (see
    `expand_shards`) the first file alone is looked at. `missing_shards`: "warn" allows that a tenth of a part is missing, "stop" none.

    Raises ValueError, naming `flag`, where the list is empty, more is missing than allowed, or a first file cannot be read.
    """
    found: list[str] = []
    missing: list[str] = []
    list_folder = functools.cache(_list_folder)
    for part in _parts(spec):
        try:
            urls = list(_expand(part))
        except ValueError as error:
            raise ValueError(f"{flag}: {error}") from None
        exists = {url: _exists(url, list_folder) for url in urls}
        existing, gone = ([url for url in urls if exists[url] is there] for there in (True, False))
        if urls and not existing:
            raise ValueError(f"{flag}: {part!r} matches no file; the first one looked for is {urls[0]}")
        if len(gone) > (0 if missing_shards == "stop" else MAX_MISSING * len(urls)):
            allowed = "--missing_shards is stop" if missing_shards == "stop" else "more than a tenth"
            raise ValueError(
                f"{flag}: {len(gone)} of the {len(urls)} shards of {part!r} do not exist ({allowed}): {_examples(gone)}; name only "
                "those that do ('*.tar', '@list.txt', and several patterns joined by '::' work too)"
            )
        first = next((path for path in map(local_path, existing) if path is not None), None)
        if first is not None and os.path.isdir(first):
            raise ValueError(f"{flag}: {first} is a folder: name its shards, as in '{first.rstrip('/')}/*.tar'")
        if first is not None and not os.access(first, os.R_OK):
            raise ValueError(f"{flag}: {first} is not readable: no permission")
        found += existing
        missing += gone
    if not found:
        raise ValueError(f"{flag} names no shard: give a pattern such as 'shards/{{000000..000041}}.tar', not {spec!r}")
    return found, missing


def resolve_shards(flag: str, spec: str, missing_shards: str) -> list[str]:
    """`check_shards`, with a warning where some are missing. For one rank to call: two listings could differ."""
    urls, missing = check_shards(flag, spec, missing_shards)
    if missing:
        counts = (len(missing), len(urls) + len(missing))
        logger.warning("%s: %d of %d shards do not exist and are left out: %s", flag, *counts, _examples(missing))
    return urls


def shards_digest(urls: Iterable[str]) -> str:
    """The number and a hash of `urls`: the order of samples depends on which shards there are, and in which order."""
    urls = list(urls)
    return f"{len(urls)} shards ({hashlib.sha256(repr(urls).encode()).hexdigest()[:12]})"


def _exists(url: str, list_folder: Callable[[str], set[str] | None]) -> bool:
    path = local_path(url)
    if path is None:
        return True
    folder, name = os.path.split(path.rstrip("/"))
    names = list_folder(folder or ".")
    return os.path.exists(path) if names is None else name in names


def _list_folder(folder: str) -> set[str] | None:
    """None for one that may be entered but not listed."""
    try:
        return set(os.listdir(folder))
    except PermissionError:
        return None
    except OSError:
        return set()


def _examples(paths: list[str]) -> str:
    rest = len(paths) - NAMED_IN_ERRORS
    return ", ".join(paths[:NAMED_IN_ERRORS]) + (f" and {rest} more" if rest > 0 else "")
