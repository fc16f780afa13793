"""What the user typed → the list of shard URLs, checked.

Only the standard library and braceexpand are imported: this runs before anything heavy is loaded.
"""

from __future__ import annotations

import os
import shlex
import stat
from collections import defaultdict

from braceexpand import UnbalancedBracesError, braceexpand  # type: ignore[attr-defined]

# How many missing files an error names; the rest are counted.
NAMED_IN_ERRORS = 3


def expand_shards(spec: str) -> list[str]:
    """The shard URLs of `spec`, in order; nothing is opened.

    `spec` is one pattern or several joined by `::`. Braces are expanded (`{000000..000041}`, `{a,b}`). `s3://` becomes a pipe
    of `aws s3 cp`, as in the reference; `http(s)://`, `gs://` and `pipe:` are left to webdataset; `~` in a local path is
    the home directory.

    Raises ValueError where a brace is not closed.
    """
    urls = []
    for pattern in spec.split("::"):
        pattern = pattern.strip()
        if not pattern:
            continue
        try:
            urls += [_url(one) for one in braceexpand(pattern)]
        except UnbalancedBracesError as error:
            raise ValueError(f"unbalanced braces in {pattern!r}") from error
    return urls


def _url(url: str) -> str:
    if url.startswith("s3://"):
        return f"pipe:aws s3 cp {shlex.quote(url)} -"
    return os.path.expanduser(url) if local_path(url) == url else url


def local_path(url: str) -> str | None:
    """The path of a shard on this machine; None for a pipe or a remote one."""
    if url.startswith("file:"):
        return url.removeprefix("file:").removeprefix("//")
    return None if url.startswith("pipe:") or "://" in url else url


def check_shards(flag: str, spec: str) -> list[str]:
    """The shard URLs of `spec`, once every local one is known to be there and readable. Remote ones are not probed.

    Raises ValueError, naming `flag`, where the list is empty or a local shard is missing, not a file, or not readable.
    """
    try:
        urls = expand_shards(spec)
    except ValueError as error:
        raise ValueError(f"{flag}: {error}") from None
    if not urls:
        raise ValueError(f"{flag} names no shard: give a pattern such as 'shards/{{000000..000041}}.tar', not {spec!r}")
    paths = [path for path in map(local_path, urls) if path is not None]
    missing = _missing(paths)
    if len(missing) == len(urls):
        raise ValueError(f"{flag}: {spec!r} matches no file; the first one looked for is {missing[0]}")
    if missing:
        raise ValueError(
            f"{flag}: {len(missing)} of the {len(urls)} shards of {spec!r} do not exist: {_some(missing)}; "
            "name only those that do (patterns can be joined by '::')"
        )
    unreadable = [path for path in paths if not _readable(path)]
    if unreadable:
        raise ValueError(f"{flag}: not readable, or not a file: {_some(unreadable)}")
    return urls


def _missing(paths: list[str]) -> list[str]:
    """Those of `paths` that do not exist. One listing a folder: asking for each of LAION's 200,000 files takes minutes on NFS."""
    wanted: dict[str, list[str]] = defaultdict(list)
    for path in paths:
        wanted[os.path.dirname(path)].append(path)
    missing: set[str] = set()
    for folder, its_paths in wanted.items():
        try:
            there = set(os.listdir(folder or "."))
        except PermissionError:  # may be entered though not listed
            missing.update(path for path in its_paths if not os.path.exists(path))
            continue
        except OSError:
            there = set()
        missing.update(path for path in its_paths if os.path.basename(path) not in there)
    return [path for path in paths if path in missing]


def _readable(path: str) -> bool:
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return False
    # A named pipe is as good as a file.
    return (stat.S_ISREG(mode) or stat.S_ISFIFO(mode)) and os.access(path, os.R_OK)


def _some(paths: list[str]) -> str:
    rest = len(paths) - NAMED_IN_ERRORS
    return ", ".join(paths[:NAMED_IN_ERRORS]) + (f" and {rest} more" if rest > 0 else "")
