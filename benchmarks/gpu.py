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
from benchmarks.reference import install
from benchmarks.shapes import SHAPES, Shape, needed_flops
from benchmarks.shards import Size

PRECISION = "amp_bf16"
WORKERS = 12
Write = Callable[[str, str], None]
"""Takes a result's name and its text."""

SMALL_GPU = 90e9
"""Bytes of memory: on less, 9b gets activation checkpointing (71 GB without it, on paper)."""
ROOM_FOR_BOTH = 135e9
"""Bytes that ours (44 GB) and the reference (some 70 GB, on paper) of 3b need side by side."""


class Ours:
    """This program alone, at the recipe's batch of one shape: one process, built when first asked, answers everything."""

    def __init__(self, shape: Shape, write: Write) -> None:
        self.shape, self.write = shape, write
        small = torch.cuda.is_available() and torch.cuda.get_device_properties(0).total_memory < SMALL_GPU
        self.checkpointing = shape.name == "9b" and small
        self.is_compiled = False
        self.comparison: steps.Comparison | None = None
        self._child: Child | None = None

    @property
    def child(self) -> Child:
        if self._child is None:
            folder = steps.prepare(self.shape)
            arguments = ["--gradient_checkpointing"] if self.checkpointing else []
            self._child = Child("ours", str(folder), f"--precision={PRECISION}", *arguments)
        return self._child

    def close(self) -> None:
        if self._child is not None:
            self._child.close()
        self._child, self.is_compiled = None, False

    def _put(self, name: str, text: str) -> None:
        self.write(f"{self.shape.name} {name}", text)

    def measured(self) -> steps.Comparison:
        batch = torch.load(steps.prepare(self.shape) / "batches.pt")[0]
        flops = needed_flops(self.shape, batch, media_id=self.shape.vocabulary - 2)
        program = steps.Program("ours", PRECISION, self.checkpointing)
        program.losses = self.child.ask("losses", count=steps.CHECKED)
        comparison = steps.Comparison(self.shape, flops, {}, {"ours": program})
        measure(self.child, program)
        comparison.rates[PRECISION] = self.child.ask("rate", dtype="bfloat16")
        return comparison

    def updates(self) -> None:
        self.comparison = self.measured()
        self._put(f"{PRECISION} ours", steps.describe(self.comparison))

    def kernels(self) -> None:
        """What runs on the device during an update; by name in build/benchmarks/profile-….txt."""
        name = f"{self.shape.name}-{'compiled' if self.is_compiled else 'eager'}"
        found = self.child.ask("profile_steps", count=2, file=str(FOLDER / f"profile-{name}.txt"))
        kinds = ", ".join(f"{kind} {seconds * 1e3:.1f}" for kind, seconds in found["kinds"].items())
        share = found["busy"] / found["seconds"]
        text = (
            f"{found['kernels']:.0f} kernels an update, which run {found['busy'] * 1e3:.1f} ms ({kinds}) of "
            f"{found['seconds'] * 1e3:.1f} ms: busy {share:.1%}, while a profiler looks."
        )
        self._put("kernels compiled" if self.is_compiled else "kernels", text)

    def products(self) -> None:
        cells = [f"{size}: {rate / 1e12:.0f}" for size, rate in self.child.ask("product_rates").items()]
        self._put("rates of its own products", f"TFLOP/s: {', '.join(cells)}.")

    def new_shapes(self) -> None:
        found = "; ".join(f"{first:.3f} s, again {again:.3f} s" for first, again in self.child.ask("new_shapes"))
        self._put("new shapes", f"An update on a batch of a size never seen before: {found}.")

    def bits(self) -> None:
        lines = []
        for deterministic in (False, True):
            self.child.ask("be_deterministic", enabled=deterministic)
            seconds = self.child.ask("steps", count=4)[0] / 4
            differ, total = self.child.ask("tensors_that_differ")
            how = "with --deterministic" if deterministic else "as it is"
            lines.append(f"- {how}: {differ} of {total} tensors have other bits; {seconds:.4f} s a step")
        self.child.ask("be_deterministic", enabled=False)
        self._put("bits", "Two runs of two updates, all trained tensors and moments:\n\n" + "\n".join(lines))

    def data_wait(self) -> None:
        """How long a step waits for data."""
        child = self.child  # which builds its model meanwhile
        size = Size(512, 384)
        patterns = {
            "laion": shards.write_laion(FOLDER / f"laion-{size.width}", size, SAMPLES["laion"]),
            "mmc4": shards.write_mmc4(FOLDER / f"mmc4-{size.width}", size, SAMPLES["mmc4"]),
        }
        result = child.ask("with_loaders", shards=patterns, workers=WORKERS, count=20)
        text = (
            f"{size} images, --workers {WORKERS} (used: {result['workers']}){', compiled' * self.is_compiled}: "
            f"{result['seconds']:.3f} s a step, of which {result['waited']:.4f} s, {result['waited'] / result['seconds']:.2%}, "
            "waiting for data."
        )
        self._put("data wait", text)

    def checkpoint(self) -> None:
        self.child.ask("steps", count=1)  # now the optimizer has moments
        results: dict[str, list[dict[str, float]]] = {}
        for save in ("ours, file, first", "… later"):
            results[save] = [self.child.ask("save", sharded=False)]
            self._put("checkpoint ours", saving.describe(self.shape, results))

    def compiling(self) -> None:
        """From here on, everything is compiled."""
        self.child.ask("compile")
        self.is_compiled = True
        seconds = [self.child.ask("steps", count=1)[0] for _ in range(2)]
        text = f"{seconds[0]:.1f} s for the first compiled update, {seconds[1]:.1f} s for the second."
        self._put("compiling", text)

    def compiled(self) -> None:
        self.compiling()
        self._put(f"{PRECISION} compiled", steps.describe(self.measured()))
        self.kernels()

    def beside_reference(self) -> None:
        """The reference after ours, in the same run; with activation checkpointing where it does not fit without."""
        if self.comparison is None:
            self.updates()
        assert self.comparison is not None
        install()
        programs = {"reference": steps.Program("reference", PRECISION), "ours": self.comparison.programs["ours"]}
        if torch.cuda.is_available() and torch.cuda.get_device_properties(0).total_memory < ROOM_FOR_BOTH:
            self.close()
        try:
            measure_reference(self.shape, programs["reference"])
        except ChildFailed as error:
            if "out of memory" not in str(error).lower():
                raise
            programs["reference"] = steps.Program("reference", PRECISION, checkpointing=True)
            measure_reference(self.shape, programs["reference"])
        both = steps.Comparison(self.shape, self.comparison.flops, self.comparison.rates, programs)
        both.check()
        self._put(PRECISION, steps.describe(both))


def measure_reference(shape: Shape, program: steps.Program) -> None:
    arguments = ["--gradient_checkpointing"] if program.checkpointing else []
    with Child("reference", str(steps.prepare(shape)), f"--precision={program.precision}", *arguments) as child:
        program.losses = child.ask("losses", count=steps.CHECKED)
        measure(child, program)


def measure(child: Child, program: steps.Program) -> None:
    """Seconds, memory and parts of the child's updates."""
    for _ in range(3):
        steps.measure_turn(child, program, 4)
    program.parts = child.ask("parts", count=2)


def largest(shape: Shape, only_ours: bool) -> str:
    """The largest multiple of the recipe's batch that fits, of each program."""
    lines = []
    for program in ["ours"] if only_ours else ["reference", "ours"]:
        factor, rate = steps.largest(shape, program, PRECISION, (2, 4, 8), checkpointing=False)
        lines.append(
            f"- {program}: {factor or 1} times the recipe's batch" + (f", {rate:.1f} samples/s" if factor else "")
        )
    return f"Shape `{shape.name}`, multiples of 2, 4 and 8:\n\n" + "\n".join(lines)


def parts(shapes: dict[str, Ours], only_ours: bool) -> dict[str, tuple[float, Callable[[], None]]]:
    """By name, each part's limit in seconds and what it measures; the most important first."""
    main = shapes["3b"]
    found: dict[str, tuple[float, Callable[[], None]]] = {
        "3b updates": (120, main.updates),
        "3b kernels": (40, main.kernels),
        "3b products": (20, main.products),
        "3b new shapes": (20, main.new_shapes),
        "3b bits": (40, main.bits),
        "3b data wait": (60, main.data_wait),
        "3b checkpoint": (80, main.checkpoint),
        "3b reference": (120, main.beside_reference),
        "3b compiled": (200, main.compiled),
        "9b updates": (90, shapes["9b"].updates),
        "4b updates": (90, shapes["4b"].updates),
    }
    if only_ours:
        del found["3b reference"]
    return found


def more_parts(shapes: dict[str, Ours], write: Write, only_ours: bool) -> dict[str, tuple[float, Callable[[], None]]]:
    """Those that run only when --parts names them."""
    loaders = partial(loading.measure, (1, 4, 8), rounds=1, seconds=3, only_ours=only_ours)
    return {
        "compiling 3b": (200, shapes["3b"].compiling),
        "data": (300, lambda: write("data", loading.describe(loaders()))),
        "largest batch 3b": (400, lambda: write("largest batch 3b", largest(SHAPES["3b"], only_ours))),
    }


def run(write: Write, only_ours: bool, budget: float, wanted: Collection[str] = ()) -> None:
    """Part after part, each written as soon as it is there. One that fails, or takes longer than its limit or than what is left of
    `budget` seconds, is named and does not stop the others.

    Args:
        wanted: names of parts, or their beginnings, in the order in which they run; empty: all of `parts`.

    Raises ValueError where a name is of no part.
    """
    shapes = {name: Ours(SHAPES[name], write) for name in ("3b", "4b", "9b")}
    known = parts(shapes, only_ours) | (more_parts(shapes, write, only_ours) if wanted else {})
    chosen = {name: known[name] for start in wanted or [""] for name in known if name.startswith(start)}
    if not chosen:
        raise ValueError(f"--parts {' '.join(wanted)}: the parts are {', '.join(known)}")
    began = time.monotonic()
    for name, (limit, part) in chosen.items():
        begin = time.monotonic()
        Child.deadline = min(begin + limit, began + budget)
        if begin > began + budget:
            print(f"{name}: left out after {begin - began:.0f} s", file=sys.stderr)
            continue
        for other, ours in shapes.items():
            if other not in name:
                ours.close()
        try:
            part()
        except Exception:
            print(f"{name} failed:\n{traceback.format_exc()}", file=sys.stderr)
            for ours in shapes.values():
                ours.close()
        print(f"{name}: {time.monotonic() - begin:.0f} s", file=sys.stderr, flush=True)
    for ours in shapes.values():
        ours.close()
    Child.deadline = math.inf
