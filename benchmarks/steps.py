"""One update of either program, on the same weights and batches: `small`, `mid`, and on a GPU `3b`, `4b`, `9b`."""

from __future__ import annotations

import statistics
from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.backbones import ADDED_TOKENS, write_backbones
from benchmarks.child import FOLDER, Child, ChildFailed
from benchmarks.parts import PARTS
from benchmarks.reference import install
from benchmarks.report import table
from benchmarks.shapes import Shape, draw_batches, needed_flops

BATCHES = 3
LOSS_BOUND = {"fp32": 2e-4, "amp_bf16": 5e-2}
"""How far the programs' losses (of about 11 nats) may lie apart in the first updates: float32 rounding that updates amplify; and
that of bfloat16, where one program computes in it or both do, but not the same sums in the same order."""
CHECKED = 4  # updates


@dataclass
class Program:
    """What was measured of one of the programs.

    precision: that it ran in. seconds: of an update, for each round; cpu_seconds: of all
    its threads together. parts: seconds of an update, by part. memory: bytes.
    """

    name: str
    precision: str
    checkpointing: bool = False
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    losses: list[list[float]] = field(default_factory=list)
    parts: dict[str, float] = field(default_factory=dict)
    memory: int = 0

    @property
    def step(self) -> float:
        return statistics.median(self.seconds)


@dataclass
class Comparison:
    shape: Shape
    flops: dict[str, float]
    rates: dict[str, float]  # FLOP/s by precision
    programs: dict[str, Program]

    @property
    def loss_difference(self) -> float:
        """Not a number where a loss is none."""
        ours, reference = (torch.tensor(self.programs[name].losses) for name in ("ours", "reference"))
        return (ours - reference).abs().max().item()

    def check(self) -> None:
        """Raises ValueError where the programs do not compute the same losses."""
        if not self.loss_difference <= LOSS_BOUND[self.programs["ours"].precision]:  # not a number is no equality
            losses = {name: program.losses for name, program in self.programs.items()}
            raise ValueError(f"the programs do not compute the same: losses {losses}")


def prepare(shape: Shape, factor: int = 1) -> Path:
    """Writes backbones and batches of `shape`; returns their folder. With a factor, a file of larger batches."""
    folder = FOLDER / shape.name
    if not (folder / "batches.pt").exists() or factor == 1:
        write_backbones(folder, shape)
    eoc_id = shape.vocabulary - ADDED_TOKENS
    batches = draw_batches(shape.times(factor), media_id=eoc_id + 1, eoc_id=eoc_id, count=BATCHES if factor == 1 else 1)
    torch.save(batches, folder / ("batches.pt" if factor == 1 else f"batches-{factor}.pt"))
    return folder


def compare(
    shape: Shape,
    precision: str,
    rounds: int,
    steps: int,
    only_ours: bool = False,
    checkpointing: Collection[str] = (),
    compile_ours: bool = False,
) -> Comparison:
    """Measures both programs in turns: A B A B …

    Args:
        rounds: turns of each.
        steps: updates a turn.
        checkpointing: which of "reference" and "ours" run with activation checkpointing.

    Raises ValueError where the programs do not compute the same losses.
    """
    folder = prepare(shape)
    batch = torch.load(folder / "batches.pt")[0]
    on_gpu = torch.cuda.is_available()
    # Its autocast is CUDA's: on a CPU it does nothing, so float32 is what it computes in whatever it is told.
    programs = {"reference": Program("reference", precision if on_gpu else "fp32")}
    programs["ours"] = Program("ours", precision)
    for name, program in programs.items():
        program.checkpointing = name in checkpointing
    if only_ours:
        del programs["reference"]
    else:
        install()
    comparison = Comparison(shape, needed_flops(shape, batch, media_id=shape.vocabulary - 2), {}, programs)

    def start(program: Program) -> Child:
        arguments = [str(folder), f"--precision={program.precision}"]
        if program.checkpointing:
            arguments.append("--gradient_checkpointing")
        if compile_ours and program.name == "ours":
            arguments.append("--compile")
        return Child(program.name, *arguments)

    with ExitStack() as stack:
        children = {name: stack.enter_context(start(program)) for name, program in programs.items()}
        for turn in range(rounds):
            for name, program in programs.items():
                child = children[name]
                if turn == 0:
                    program.losses = child.ask("losses", count=CHECKED)
                measure_turn(child, program, steps)
                if (
                    name == "ours"
                ):  # the rate varies with the machine's load, as the steps do: the best of the run counts
                    for kind in {program.precision for program in programs.values()}:
                        dtype = "float32" if kind == "fp32" else "bfloat16"
                        rate = child.ask("rate", dtype=dtype)
                        comparison.rates[kind] = max(rate, comparison.rates.get(kind, 0.0))
                if turn == rounds - 1:
                    program.parts = child.ask("parts", count=max(2, steps // 2))
            if turn == 0 and not only_ours:
                comparison.check()
    return comparison


def measure_turn(child: Child, program: Program, steps: int) -> None:
    """Seconds and memory of `steps` more updates."""
    child.ask("reset_memory")
    seconds, cpu = child.ask("steps", count=steps)
    program.seconds.append(seconds / steps)
    program.cpu_seconds.append(cpu / steps)
    program.memory = max(program.memory, child.ask("memory"))


def largest(
    shape: Shape, name: str, precision: str, factors: tuple[int, ...], checkpointing: bool
) -> tuple[int, float]:
    """The largest multiple of the batch that fits, and its samples a second."""
    folder = prepare(shape)
    best = (0, 0.0)
    for factor in factors:
        prepare(shape, factor)
        arguments = [str(folder), f"--precision={precision}", f"--batches=batches-{factor}.pt"]
        arguments += ["--gradient_checkpointing"] * checkpointing
        try:
            with Child(name, *arguments) as child:
                child.ask("steps", count=2)
                best = (factor, 3 * shape.samples * factor / child.ask("steps", count=3)[0])
        except ChildFailed as error:
            if "out of memory" not in str(error).lower():
                raise
            break
    return best


# ---------------------------------------------------------------------------------------------------------------------


def in_words(shape: Shape) -> str:
    laion, mmc4 = shape.laion, shape.mmc4
    return (
        f"LAION {laion.rows} × {laion.tokens} tokens, MMC4 {mmc4.rows} × {mmc4.tokens} tokens with {mmc4.slots} slots, "
        f"{sum(mmc4.counts)} of {mmc4.rows * mmc4.slots} with an image"
    )


def comparison_table(comparison: Comparison) -> str:
    shape, programs = comparison.shape, comparison.programs
    names = [name for name in ("reference", "ours") if name in programs]
    flops = sum(comparison.flops.values())

    def row(label: str, values: list[float], form: str, ratio: str = "") -> list[str]:
        if ratio and len(values) == 2 and min(values) > 0:
            share = values[1] / values[0] if ratio == "ours ÷ reference" else values[0] / values[1]
            return [label, *(format(value, form) for value in values), f"{share:.2f}"]
        return [label, *(format(value, form) for value in values), *([""] if len(values) == 2 else [])]

    def each(function: Any) -> list[float]:
        return [function(programs[name]) for name in names]

    up, down = "ours ÷ reference", "reference ÷ ours"
    rows = [
        ["precision", *(programs[name].precision for name in names), *([""] if len(names) == 2 else [])],
        row("samples/s", each(lambda p: shape.samples / p.step), ".2f", up),
        row("tokens/s", each(lambda p: shape.tokens / p.step), ".0f", up),
        row("seconds a step, median", each(lambda p: p.step), ".3f", down),
        row("… least", each(lambda p: min(p.seconds)), ".3f", down),
        row("… most", each(lambda p: max(p.seconds)), ".3f", down),
        row("… of CPU time, median", each(lambda p: statistics.median(p.cpu_seconds)), ".3f", down),
        *(row(f"… {part} *", each(lambda p, part=part: p.parts[part]), ".3f", down) for part in PARTS),
        row("peak memory, GB", each(lambda p: p.memory / 1e9), ".2f", up),
        row("matrix rate, TFLOP/s", each(lambda p: comparison.rates[p.precision] / 1e12), ".3f"),
        row("utilization", each(lambda p: flops / p.step / comparison.rates[p.precision]), ".1%", up),
        row("step ÷ floor", each(lambda p: p.step * comparison.rates[p.precision] / flops), ".2f", down),
    ]
    header = ["", *names, *(["ratio"] if len(names) == 2 else [])]
    return table(header, rows)


def describe(comparison: Comparison) -> str:
    """The whole section of one comparison."""
    shape, programs = comparison.shape, comparison.programs
    measured = len(programs["ours"].seconds)
    needed = ", ".join(f"{part} {flops / 1e12:.3f}" for part, flops in comparison.flops.items())
    lines = [
        f"{in_words(shape)}. Medians of {measured} measurements, the programs in turns.",
        "",
        comparison_table(comparison),
        "",
        "\\* From a pass of its own, in which looking costs time. Ratios above 1 are in our favor, but for memory.",
        "",
        f"Needed: {sum(comparison.flops.values()) / 1e12:.3f} TFLOP a step ({needed}).",
    ]
    if "reference" in programs:
        bound = LOSS_BOUND[programs["ours"].precision]
        lines.append(
            f"Losses of the first {CHECKED} updates: at most {comparison.loss_difference:.1e} apart (bound {bound:.0e})."
        )
    if checkpointed := [name for name, program in programs.items() if program.checkpointing]:
        lines.append(f"With activation checkpointing: {' and '.join(checkpointed)}.")
    return "\n".join(lines)
