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
from benchmarks.shapes import SHAPES, Shape, needed_flops
from benchmarks.shards import Size

PRECISION = "amp_bf16"
WORKERS = 12
Write = Callable[[str, str], None]
"""Takes a result's name and its text."""
Part = Callable[[Write], None]
"""Writes its results, each as soon as it is there."""


SMALL_GPU = 90e9
"""Bytes of memory: on less, 9b needs activation checkpointing (81.9 GB without it, by a trace)."""


def ours(shape: Shape, write: Write, probes: bool) -> None:
    """This program alone, at the recipe's batch: all that is asked of one shape, of one process. What is there is written at once."""
    small = torch.cuda.is_available() and torch.cuda.get_device_properties(0).total_memory < SMALL_GPU
    program = steps.Program("ours", PRECISION, checkpointing=shape.name == "9b" and small)
    folder = steps.prepare(shape)
    flops = needed_flops(shape, torch.load(folder / "batches.pt")[0], media_id=shape.vocabulary - 2)
    arguments = [str(folder), f"--precision={PRECISION}", *["--gradient_checkpointing"] * program.checkpointing]
    with Child("ours", *arguments) as child:
        patterns = write_shards() if probes else {}  # while the child builds the model
        comparison = steps.Comparison(shape, flops, {}, {"ours": program})
        program.losses = child.ask("losses", count=steps.CHECKED)
        measure(child, comparison)
        write(f"{shape.name} {PRECISION} ours", steps.describe(comparison))
        if not probes:
            return
        write(f"{shape.name} kernels", kernels(child, f"{shape.name}-eager"))
        write(f"{shape.name} rates of its own products", rates(child.ask("product_rates"), comparison.rates[PRECISION]))
        write(f"{shape.name} new shapes", seconds_of_new_shapes(child))
        write(f"{shape.name} bits", bits(child, "as it is"))
        write(f"data wait {shape.name}", data_wait(child, shape, patterns))
        saves = [child.ask("save", sharded=False) for _ in range(2)]
        write(
            f"checkpoint {shape.name} ours",
            saving.describe(shape, {"ours, file, first": saves[:1], "… later": saves[1:]}),
        )
        child.ask("be_deterministic", enabled=True)
        text = (
            f"{child.ask('steps', count=4)[0] / 4:.4f} s a step with --deterministic. {bits(child, '--deterministic')}"
        )
        write(f"{shape.name} deterministic", text)
        child.ask("be_deterministic", enabled=False)
        child.ask("compile")
        seconds = child.ask("steps", count=1)[0]
        compiled = steps.Comparison(shape, flops, {}, {"ours": steps.Program("ours", PRECISION, program.checkpointing)})
        measure(child, compiled)
        text = f"{seconds:.1f} s for the first compiled update.\n\n{steps.describe(compiled)}\n\n"
        text += f"{kernels(child, f'{shape.name}-compiled')}\n\n{seconds_of_new_shapes(child)}"
        write(f"{shape.name} {PRECISION} compiled", text)


def measure(child: Child, comparison: steps.Comparison, chunks: int = 3, count: int = 4) -> None:
    """Seconds, memory, rate and parts of the child's updates."""
    program = comparison.programs["ours"]
    child.ask("steps", count=2)
    child.ask("reset_memory")
    for _ in range(chunks):
        seconds, cpu = child.ask("steps", count=count)
        program.seconds.append(seconds / count)
        program.cpu_seconds.append(cpu / count)
    program.memory = child.ask("memory")
    comparison.rates[PRECISION] = child.ask("rate", dtype="bfloat16")
    program.parts = child.ask("parts", count=2)


def kernels(child: Child, name: str) -> str:
    """What runs on the device during an update; by name in build/benchmarks/profile-….txt."""
    found = child.ask("profile_steps", count=2, file=str(FOLDER / f"profile-{name}.txt"))
    kinds = ", ".join(f"{kind} {seconds * 1e3:.1f}" for kind, seconds in found["kinds"].items())
    share = found["busy"] / found["seconds"]
    return (
        f"{found['kernels']:.0f} kernels an update, which run {found['busy'] * 1e3:.1f} ms ({kinds}) of "
        f"{found['seconds'] * 1e3:.1f} ms: busy {share:.1%}, while a profiler looks."
    )


def rates(of_products: dict[str, float], square: float) -> str:
    cells = [f"{size}: {rate / 1e12:.0f}" for size, rate in of_products.items()]
    return f"TFLOP/s, beside {square / 1e12:.0f} of 8192 × 8192 × 8192: {', '.join(cells)}."


def seconds_of_new_shapes(child: Child) -> str:
    found = "; ".join(f"{first:.3f} s, again {again:.3f} s" for first, again in child.ask("new_shapes"))
    return f"An update on a batch of a size never seen before: {found}."


def bits(child: Child, how: str) -> str:
    differ, total = child.ask("tensors_that_differ")
    return f"Two runs of two updates, {how}: {differ} of {total} trained tensors and moments have other bits."


def write_shards() -> dict[str, str]:
    size = Size(512, 384)
    return {
        "laion": shards.write_laion(FOLDER / f"laion-{size.width}", size, SAMPLES["laion"]),
        "mmc4": shards.write_mmc4(FOLDER / f"mmc4-{size.width}", size, SAMPLES["mmc4"]),
    }


def compare(shape: Shape, checkpointing: Collection[str] = ()) -> steps.Comparison:
    return steps.compare(shape, PRECISION, 1, 4, resident=False, checkpointing=checkpointing, chunks=3)


def both(shape: Shape) -> str:
    """Beside the reference, with activation checkpointing for it where it does not fit without."""
    try:
        return steps.describe(compare(shape))
    except ChildFailed as error:
        if error.program != "reference" or "out of memory" not in str(error).lower():
            raise
        return steps.describe(compare(shape, ["reference"]))


def data_wait(child: Child, shape: Shape, patterns: dict[str, str]) -> str:
    """How long a step of ours waits for data."""
    result = child.ask("with_loaders", shards=patterns, workers=WORKERS, count=20)
    return (
        f"Shape `{shape.name}`, images of 512 × 384, --workers {WORKERS} (used: {result['workers']}): {result['seconds']:.3f} s a step, "
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


def parts(only_ours: bool) -> dict[str, tuple[float, Part]]:
    """By name, each part's limit in seconds and what it measures; ours first, the most important first."""
    found: dict[str, tuple[float, Part]] = {
        "3b ours": (240, lambda write: ours(SHAPES["3b"], write, probes=True)),
        "9b ours": (90, lambda write: ours(SHAPES["9b"], write, probes=False)),
        "4b ours": (90, lambda write: ours(SHAPES["4b"], write, probes=False)),
    }
    if not only_ours:
        found["3b beside the reference"] = 240, lambda write: write(f"3b {PRECISION}", both(SHAPES["3b"]))
    return found


def more_parts(only_ours: bool) -> dict[str, tuple[float, Part]]:
    """Those that run only when --parts names them."""
    loaders = partial(loading.measure, (1, 4, 8), rounds=1, seconds=3, only_ours=only_ours)

    def save(write: Write) -> None:
        results = saving.measure(SHAPES["3b"], PRECISION, 2, only_ours, resident=False)
        write("checkpoint 3b", saving.describe(SHAPES["3b"], results))

    return {
        "data": (300, lambda write: write("data", loading.describe(loaders()))),
        "largest batch 3b": (400, lambda write: write("largest batch 3b", largest(SHAPES["3b"], only_ours))),
        "checkpoint": (90, save),
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
            part(write)
        except Exception:
            print(f"{name} failed:\n{traceback.format_exc()}", file=sys.stderr)
        print(f"{name}: {time.monotonic() - begin:.0f} s", file=sys.stderr, flush=True)
    Child.deadline = math.inf
