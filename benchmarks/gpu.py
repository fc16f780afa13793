"""All rows of a GPU in one call of under ten minutes."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable, Collection

from benchmarks import loading, saving, shards, steps
from benchmarks.child import FOLDER, Child, ChildFailed
from benchmarks.loading import SAMPLES
from benchmarks.shapes import SHAPES, Shape
from benchmarks.shards import Size

PRECISION = "amp_bf16"
WORKERS = 12
Write = Callable[[str, str], None]
"""Takes a result's name and its text."""


def is_out_of_memory(error: ChildFailed) -> bool:
    return "out of memory" in str(error).lower()


def compare(shape: Shape, turns: int, only_ours: bool) -> steps.Comparison:
    """The recipe's batch; with activation checkpointing for a program that does not fit without it."""
    checkpointing: Collection[str] = ()
    while True:
        try:
            return steps.compare(
                shape, PRECISION, turns, 4, only_ours, resident=False, checkpointing=checkpointing, chunks=3
            )
        except ChildFailed as error:
            if not is_out_of_memory(error) or error.program in checkpointing:
                raise
            checkpointing = [*checkpointing, error.program]


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


def run(write: Write, only_ours: bool, budget: float) -> None:
    """Everything, the most important first; what would begin after `budget` seconds is left out. A part that fails is named
    and does not stop the others."""

    def describe_data() -> str:
        return loading.describe(loading.measure((1, 4, 8), rounds=1, seconds=3, only_ours=only_ours))

    parts: list[tuple[str, Callable[[], str]]] = [
        (f"3b {PRECISION}", lambda: steps.describe(compare(SHAPES["3b"], 2, only_ours))),
        ("data wait 3b", lambda: data_wait(SHAPES["3b"])),
        (f"4b {PRECISION}", lambda: steps.describe(compare(SHAPES["4b"], 1, only_ours))),
        (f"9b {PRECISION}", lambda: steps.describe(compare(SHAPES["9b"], 1, only_ours))),
        ("checkpoint 3b", lambda: saved(SHAPES["3b"], only_ours)),
        ("data, many cores", describe_data),
        ("largest batch 3b", lambda: largest(SHAPES["3b"], only_ours)),
    ]
    began = time.perf_counter()
    for name, part in parts:
        elapsed = time.perf_counter() - began
        if elapsed > budget:
            print(f"{name}: left out after {elapsed:.0f} s", file=sys.stderr)
            continue
        try:
            write(name, part())
        except Exception:
            print(f"{name} failed:\n{traceback.format_exc()}", file=sys.stderr)
        print(f"{name}: {time.perf_counter() - began - elapsed:.0f} s", file=sys.stderr, flush=True)


def saved(shape: Shape, only_ours: bool) -> str:
    return saving.describe(shape, saving.measure(shape, PRECISION, 1, only_ours, resident=False))
