"""How long training stands still for a checkpoint."""

from __future__ import annotations

import statistics
from contextlib import ExitStack

from benchmarks.child import Child
from benchmarks.reference import install
from benchmarks.report import table
from benchmarks.shapes import Shape
from benchmarks.steps import prepare

CASES = {"reference": {}, "ours, file": {"sharded": False}, "ours, sharded": {"sharded": True}}


def measure(shape: Shape, precision: str, rounds: int, only_ours: bool) -> dict[str, list[dict[str, float]]]:
    """Case → for each round, seconds that the loop stands still, seconds until the checkpoint is on disk, and its bytes."""
    folder = prepare(shape)
    programs = {"ours": ["ours, file", "ours, sharded"]}
    if not only_ours:
        install()
        programs = {"reference": ["reference"]} | programs
    results: dict[str, list[dict[str, float]]] = {case: [] for cases in programs.values() for case in cases}

    def start(program: str) -> Child:
        arguments = [str(folder), f"--precision={precision}", *(["--group"] if program == "ours" else [])]
        child = Child(program, *arguments)
        child.ask("steps", count=1)  # now the optimizer has moments
        return child

    with ExitStack() as stack:
        children = {program: stack.enter_context(start(program)) for program in programs}
        for _ in range(rounds):
            for program, cases in programs.items():
                for case in cases:
                    results[case].append(children[program].ask("save", **CASES[case]))
    return results


def describe(shape: Shape, results: dict[str, list[dict[str, float]]]) -> str:
    rows = []
    for case, rounds in results.items():
        standstill, on_disk = ([each[name] for each in rounds] for name in ("standstill", "on_disk"))
        row = [case, f"{statistics.median(standstill):.3f} ({min(standstill):.3f}–{max(standstill):.3f})"]
        row += [f"{statistics.median(on_disk):.3f}", f"{rounds[0]['bytes'] / 1e9:.2f}"]
        if "reference" in results:
            base = statistics.median(each["standstill"] for each in results["reference"])
            row.append(f"{statistics.median(standstill) / base:.1%}")
        rows.append(row)
    header = [
        "",
        "standstill, s",
        "on disk after, s",
        "GB",
        *(["of the reference's"] if "reference" in results else []),
    ]
    count = len(next(iter(results.values())))
    return f"Shape `{shape.name}`. Medians of {count} rounds, the programs in turns.\n\n" + table(header, rows)
