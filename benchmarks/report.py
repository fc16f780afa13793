"""Tables and plots, and their places in docs/performance.md: a new result replaces the old one of its name."""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from benchmarks.child import ROOT

DOCUMENT = ROOT / "docs" / "performance.md"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """In Markdown, as wide as its widest cells, so that it can be read in a terminal as well."""
    cells = [list(header), *map(list, rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in cells]
    lines.insert(1, "| " + " | ".join("-" * width for width in widths) + " |")
    return "\n".join(lines)


def machine() -> str:
    """This machine, in one line."""
    import torch

    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists() and (match := re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text())):
        name = match[1]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpu = f"{torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""
    return f"{gpu}{name}, {cores} cores"


def versions() -> str:
    found = [f"Python {platform.python_version()}"]
    for package in ("torch", "transformers", "open_clip_torch", "webdataset", "torchvision", "pillow"):
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def provenance() -> str:
    """Machine, versions, command and date of the result that is being written."""
    command = shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]])
    return f"{machine()}; {versions()}; {time.strftime('%Y-%m-%d %H:%M')} UTC; `{command}`"


def write_section(name: str, title: str, text: str, document: Path = DOCUMENT) -> None:
    """Puts a result into the document: in the place of the last one of this name, or at its end."""
    put(name, f"### {title}\n\n{text.strip()}\n\n*{provenance()}*\n", document)


def put(name: str, section: str, document: Path) -> None:
    begin, end = f"<!-- begin: {name} -->", f"<!-- end: {name} -->"
    section = f"{begin}\n{section}{end}"
    content = document.read_text(encoding="utf-8") if document.exists() else "# Performance\n"
    if begin in content:
        before, _, rest = content.partition(begin)
        _, _, after = rest.partition(end)
        content = before + section + after
    else:
        content = f"{content.rstrip()}\n\n{section}\n"
    document.parent.mkdir(parents=True, exist_ok=True)
    document.write_text(content, encoding="utf-8")


def merge(other: Path, document: Path = DOCUMENT) -> list[str]:
    """Puts the results of another document, of another machine, into this one. Returns their names."""
    found = re.findall(r"<!-- begin: (.+?) -->\n(.*?)<!-- end: \1 -->", other.read_text(encoding="utf-8"), re.DOTALL)
    for name, section in found:
        put(name, section, document)
    for image in (other.parent / "images").glob("*.svg"):
        shutil.copy(image, plot_path(image.stem, document))
    return [name for name, _ in found]


def plot_path(name: str, document: Path = DOCUMENT) -> Path:
    folder = document.parent / "images"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{name}.svg"
