"""All rows of a GPU in one call of under eight minutes."""

from __future__ import annotations

import math
import sys
import time
import traceback
from collections.abc import Callable, Collection
from functools import partial

import torch

from benchmarks import loading, saving, shards, steps
from benchmarks.child import FOLDER, Child, ChildFailed
from benchmarks.loading import SAMPLES
from benchmarks.shapes import SHAPES, Shape
from benchmarks.shards import Size

PRECISION = "amp_bf16"
WORKERS = 12
Write = Callable[[str, str], None]
"""Takes a result's name and its text."""


SMALL_GPU = 90e9
"""Bytes of memory: on less, 9b needs activation checkpointing (81.9 GB without it, by a trace)."""


def ours(shape: Shape, compiled: bool = False) -> str:
    """This program alone, at the recipe's batch."""
    small = torch.cuda.is_available() and torch.cuda.get_device_properties(0).total_memory < SMALL_GPU
    checkpointing = ["ours"] if shape.name == "9b" and small else []
    return steps.describe(compare(shape, True, checkpointing, compiled))


def both(shape: Shape) -> str:
    """Beside the reference, with activation checkpointing for it where it does not fit without."""
    try:
        return steps.describe(compare(shape, False))
    except ChildFailed as error:
        if error.program != "reference" or "out of memory" not in str(error).lower():
            raise
        return steps.describe(compare(shape, False, ["reference"]))


def compare(
    shape: Shape, only_ours: bool, checkpointing: Collection[str] = (), compiled: bool = False
) -> steps.Comparison:
    return steps.compare(
        shape, PRECISION, 1, 4, only_ours, False, checkpointing=checkpointing, compile_ours=compiled, chunks=3
    )


def data_wait(shape: Shape) -> str:
    """How long a step of ours waits for data."""
    folder = steps.prepare(shape)
    size = Size(512, 384)
    patterns = {
        "laion": shards.write_laion(FOLDER / f"laion-{size.width}", size, SAMPLES["laion"]),
        "mmc4": shards.write_mmc4(FOLDER / f"mmc4-{size.width}", size, SAMPLES["mmc4"]),
    }
    with Child("ours", str(folder), f"--precision={PRECISION}") as child:
        result = child.ask("with_loaders", shards=patterns, workers=WORKERS, count=20)
    return (
        f"Shape `{shape.name}`, {size} pictures, --workers {WORKERS} (used: {result['workers']}): {result['seconds']:.3f} s a step, "
        f"of which {result['waited']:.4f} s, {result['waited'] / result['seconds']:.2%}, waiting for data."
    )


def largest(shape: Shape, only_ours: bool) -> str:
    """The largest multiple of the recipe's batch that fits, of each program."""
    lines = []
    for program in ["ours"] if only_ours else ["reference", "ours"]:
        factor, rate = steps.largest(shape, program, PRECISION, (2, 4, 8), checkpointing=False)
        lines.append(
            f"- {program}: {factor or 1} times the recipe's batch" + (f", {rate:.1f} samples/s" if factor else "")
        )
    return f"Shape `{shape.name}`, multiples of 2, 4 and 8:\n\n" + "\n".join(lines)


def parts(only_ours: bool) -> dict[str, tuple[float, Callable[[], str]]]:
    """By name, each part's limit in seconds and what it measures; ours first, the most important first."""
    shapes = {name: SHAPES[name] for name in ("3b", "4b", "9b")}
    found: dict[str, tuple[float, Callable[[], str]]] = {
        f"3b {PRECISION} ours": (120, lambda: ours(shapes["3b"])),
        f"3b {PRECISION} compiled": (150, lambda: ours(shapes["3b"], compiled=True)),
        "data wait 3b": (110, lambda: data_wait(shapes["3b"])),
        f"9b {PRECISION} ours": (90, lambda: ours(shapes["9b"])),
        f"4b {PRECISION} ours": (90, lambda: ours(shapes["4b"])),
        "checkpoint 3b ours": (
            60,
            lambda: saving.describe(shapes["3b"], saving.measure(shapes["3b"], PRECISION, 1, True)),
        ),
    }
    if not only_ours:
        found[f"3b {PRECISION}"] = 240, lambda: both(shapes["3b"])
    return found


def more_parts(only_ours: bool) -> dict[str, tuple[float, Callable[[], str]]]:
    """Those that run only when --parts names them."""
    rates = partial(loading.measure, (1, 4, 8), rounds=1, seconds=3, only_ours=only_ours)
    return {
        "data": (300, lambda: loading.describe(rates())),
        "largest batch 3b": (400, lambda: largest(SHAPES["3b"], only_ours)),
    }


def run(write: Write, only_ours: bool, budget: float, wanted: Collection[str] = ()) -> None:
    """Part after part, each written as soon as it is there. One that fails, or takes longer than its limit or than what is left of
    `budget` seconds, is named and does not stop the others.

    Args:
        wanted: names of parts, or their beginnings; empty: all of `parts`.

    Raises ValueError where a name is of no part.
    """
    known = parts(only_ours) | (more_parts(only_ours) if wanted else {})
    chosen = {name: part for name, part in known.items() if not wanted or any(map(name.startswith, wanted))}
    if not chosen:
        raise ValueError(f"--parts {' '.join(wanted)}: the parts are {', '.join(known)}")
    began = time.monotonic()
    for name, (limit, part) in chosen.items():
        begin = time.monotonic()
        Child.deadline = min(begin + limit, began + budget)
        if begin > began + budget:
            print(f"{name}: left out after {begin - began:.0f} s", file=sys.stderr)
            continue
        try:
            write(name, part())
        except Exception:
            print(f"{name} failed:\n{traceback.format_exc()}", file=sys.stderr)
        print(f"{name}: {time.monotonic() - begin:.0f} s", file=sys.stderr, flush=True)
    Child.deadline = math.inf
