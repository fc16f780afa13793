"""The loaders alone: samples a second of one worker, and of more."""

from __future__ import annotations

import statistics
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import shards
from benchmarks.backbones import write_backbones
from benchmarks.child import FOLDER, Child
from benchmarks.reference import install
from benchmarks.report import plot_path, table
from benchmarks.shapes import SHAPES
from benchmarks.shards import Size

SIZES = (Size(512, 384), Size(1600, 1200))
SAMPLES = {"laion": 1024, "mmc4": 192}  # in all shards together
BATCH_SIZE = {"laion": 16, "mmc4": 4}


@dataclass
class Loading:
    """One dataset with pictures of one size, read by one program with a number of workers."""

    program: str
    kind: str
    size: Size
    workers: int
    rates: list[float] = field(default_factory=list)
    images: float = 0.0
    tokens: float = 0.0

    @property
    def rate(self) -> float:
        return statistics.median(self.rates)


def measure(workers: tuple[int, ...], rounds: int, seconds: float, only_ours: bool) -> list[Loading]:
    """Both programs in turns, in processes of their own.

    Args:
        workers: numbers of them to try.
        seconds: of each measurement.
    """
    folder = FOLDER / "small"
    write_backbones(folder, SHAPES["small"])
    programs = ["ours"]
    if not only_ours:
        install()
        programs.insert(0, "reference")
    results: list[Loading] = []
    with ExitStack() as stack:
        children = {name: stack.enter_context(Child(name, str(folder), "--loaders")) for name in programs}
        for kind in ("laion", "mmc4"):
            for size in SIZES:
                write = shards.write_laion if kind == "laion" else shards.write_mmc4
                pattern = write(FOLDER / f"{kind}-{size.width}", size, SAMPLES[kind])
                for number in workers:
                    cells = {name: Loading(name, kind, size, number) for name in children}
                    batch_size = max(BATCH_SIZE[kind], number)  # something for each worker
                    for _ in range(rounds):
                        for name, child in children.items():
                            answer = child.ask(
                                "rate",
                                kind=kind,
                                shards=pattern,
                                batch_size=batch_size,
                                workers=number,
                                seconds=seconds,
                            )
                            cells[name].rates.append(answer["samples_per_second"])
                            cells[name].images, cells[name].tokens = answer["images"], answer["tokens"]
                    results += cells.values()
    return results


def describe(results: list[Loading]) -> str:
    names = list(dict.fromkeys(result.program for result in results))
    compared = names[0] == "reference"
    rows = []
    for ours in (result for result in results if result.program == "ours"):
        key = (ours.kind, ours.size, ours.workers)
        cells = [next(r for r in results if (r.kind, r.size, r.workers) == key and r.program == name) for name in names]
        unit = "pairs/s" if ours.kind == "laion" else "documents/s"
        row = [f"{ours.kind.upper()}, {ours.size}", str(ours.workers), unit]
        row += [f"{cell.rate:.1f} ({min(cell.rates):.1f}–{max(cell.rates):.1f})" for cell in cells]
        row += [f"{cell.rate / cells[0].rate:.2f}" for cell in cells[1:] if compared]
        row += [" / ".join(f"{cell.images:.1f}" for cell in cells), " / ".join(f"{cell.tokens:.0f}" for cell in cells)]
        rows.append(row)
    header = [
        "data",
        "workers",
        "",
        *names,
        *(f"ratio, {name}" for name in names[1:] if compared),
        "images each",
        "tokens each",
    ]
    return (
        f"Medians of {len(results[0].rates)} rounds, the programs in turns; least and most. Shards in the page cache. "
        "Documents have 2 to 8 pictures, 10 to 25 sentences.\n\n" + table(header, rows)
    )


def plot(results: list[Loading], name: str, document: Path) -> str | None:
    """Rates over workers, as an image beside `document`; None where there is one number of workers, or no matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    if len({result.workers for result in results}) < 2:
        return None
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    axes = figure.subplots(1, 4)
    cases = sorted({(result.kind, result.size) for result in results})
    for axis, (kind, size) in zip(axes, cases):
        for program in dict.fromkeys(result.program for result in results):
            points = sorted(
                (r.workers, r.rate) for r in results if (r.kind, r.size, r.program) == (kind, size, program)
            )
            if points:
                axis.plot(*zip(*points), marker="o", label=program)
        axis.set_title(f"{kind.upper()}, {size}", fontsize=9)
        axis.set_xlabel("workers")
        axis.set_ylim(bottom=0)
    axes[0].set_ylabel("samples/s")
    axes[0].legend(fontsize=8)
    path = plot_path(name, document)
    figure.savefig(path)
    return path.name
