"""What a run holds, sends and takes on 8 to 512 GPUs, on paper: prints the tables of docs/scaling.md.

    python benchmarks/scaling.py                            # to the terminal
    python benchmarks/scaling.py --write docs/scaling.md    # into the document, in the place of the old tables

Nothing runs on a GPU here, and no time is measured. What is counted and what is assumed:

- Counted, from the program's own classes on tensors without memory: parameters and their types (`cast_frozen_weights`), the units
  that FSDP gathers (`parallel.units`), the matrix FLOPs of one update and its activations (`train/estimate.py`).
- Derived: bytes held and sent, by the formulas in `held` and `collectives`.
- Assumed: the rates of `ACCELERATORS`, and the share of them that is reached. Flags change them.

GB is 10⁹ bytes. W is the number of ranks, P that of trained parameters.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import open_clip
import torch
from torch import nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, MptConfig, MptForCausalLM

from open_flamingo import Flamingo
from open_flamingo.train import estimate
from open_flamingo.train.estimate import (
    GPUS_OF_NODE,
    MEMORY_USED,
    Accelerator,
    BatchSize,
    Passes,
    Strategy,
    Unit,
    collectives,
    held,
    measure_passes,
    peak_memory,
    unit_pieces,
)
from open_flamingo.train.precision import cast_frozen_weights

GPUS = (8, 64, 512)
BEGIN, END = "<!-- tables: benchmarks/scaling.py -->", "<!-- end of tables -->"

# The published recipe, on each GPU: MMC4 documents of 256 tokens, about 3 images each; LAION pairs of 32 tokens.
BATCHES = {"laion": BatchSize(64, 32, 1), "mmc4": BatchSize(32, 256, 3)}
ACCELERATORS = tuple(of for of in estimate.ACCELERATORS if of.name in ("A100", "H100"))
EQUAL = 0.02  # two step times that differ by less are not told apart


# ---------------------------------------------------------------------------------------------------------------------
# What is compared


@dataclass(frozen=True)
class Recipe:
    """A published OpenFlamingo: its language model, and how often it has a gated block. The vision encoder is ViT-L-14."""

    name: str
    language_model: Callable[[], nn.Module]
    cross_attn_every_n_layers: int


def mpt_1b() -> nn.Module:
    config = MptConfig(d_model=2048, n_heads=16, n_layers=24, vocab_size=50432, max_seq_len=2048)
    return MptForCausalLM(config)


def redpajama_3b() -> nn.Module:
    config = GPTNeoXConfig(
        hidden_size=2560,
        num_hidden_layers=32,
        num_attention_heads=32,
        intermediate_size=10240,
        vocab_size=50432,
        max_position_embeddings=2048,
        rotary_pct=1.0,
        use_parallel_residual=False,
        tie_word_embeddings=False,
    )
    return GPTNeoXForCausalLM(config)


def mpt_7b() -> nn.Module:
    config = MptConfig(d_model=4096, n_heads=32, n_layers=32, vocab_size=50432, max_seq_len=2048)
    return MptForCausalLM(config)


RECIPES = (Recipe("3B", mpt_1b, 1), Recipe("4B", redpajama_3b, 2), Recipe("9B", mpt_7b, 4))
END_OF_CHUNK, IMAGE = 50277, 50278  # ids after the 50277 of the GPT-NeoX tokenizer; the matrices have room for them


MEMORIES = (("A100", 40e9), ("A100", 80e9), ("H100", 80e9))


def strategies(ranks: int) -> Iterator[Strategy]:
    """The simplest first. On one node, hybrid is full."""
    yield Strategy("DDP", ranks, 1, False)
    for frozen in (False, True):
        if ranks > GPUS_OF_NODE:
            yield Strategy("FSDP hybrid", ranks, GPUS_OF_NODE, frozen)
    for frozen in (False, True):
        yield Strategy("FSDP full", ranks, ranks, frozen)


# ---------------------------------------------------------------------------------------------------------------------
# What is counted, on the meta device


@dataclass(frozen=True)
class Counted:
    """What a recipe's model is made of and costs.

    parameters: by part; the trained ones in `trained`.
    units: with the frozen weights in bfloat16 where `--precision amp_bf16` holds them so.
    units_fp32: with all in float32.
    passes: of an update on one rank with `--precision amp_bf16`, without accumulation.
    """

    parameters: dict[str, int]
    trained: int
    units: tuple[Unit, ...]
    units_fp32: tuple[Unit, ...]
    passes: Passes

    @property
    def flops(self) -> int:
        return self.passes.forward + self.passes.backward


def build(recipe: Recipe, gradient_checkpointing: bool) -> Flamingo:
    """The model, without memory."""
    with torch.device("meta"):
        vision = open_clip.CLIP(**open_clip.get_model_config("ViT-L-14")).visual
        return Flamingo(
            vision,
            recipe.language_model(),
            END_OF_CHUNK,
            IMAGE,
            vis_dim=1024,
            cross_attn_every_n_layers=recipe.cross_attn_every_n_layers,
            gradient_checkpointing=gradient_checkpointing,
        )


@functools.cache
def count(recipe: Recipe, gradient_checkpointing: bool) -> Counted:
    """Builds the model of `recipe`, runs an update's passes on it and counts."""
    model = build(recipe, gradient_checkpointing)
    parts = {
        "vision encoder": model.vision_encoder,
        "language model": model.lang_encoder,
        "resampler": model.perceiver,
    }
    parameters = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    gated = [p for name, p in model.named_parameters() if "gated_cross_attn_layer" in name]
    rows = [p for name, p in model.named_parameters() if name.endswith("new_rows")]
    parameters["gated blocks"] = sum(p.numel() for p in gated)
    parameters["new rows"] = sum(p.numel() for p in rows)
    parameters["language model"] -= parameters["gated blocks"] + parameters["new rows"]

    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    units_fp32 = unit_pieces(model, None)
    cast_frozen_weights(model, "amp_bf16")
    units = unit_pieces(model, torch.bfloat16)
    return Counted(
        parameters, trained, units, units_fp32, measure_passes(model, "amp_bf16", BATCHES.values(), on_gpu=True)
    )


# ---------------------------------------------------------------------------------------------------------------------
# What follows from it


class Step(NamedTuple):
    """Seconds of one update."""

    compute: float
    communication: float

    @property
    def best(self) -> float:
        """All communication behind compute, or all compute behind communication."""
        return max(self)

    @property
    def worst(self) -> float:
        """One after the other."""
        return sum(self)


def step(counted: Counted, strategy: Strategy, accelerator: Accelerator, options: argparse.Namespace) -> Step:
    compute = counted.flops * options.accumulation / (accelerator.flops * options.matrix_share)
    calls = collectives(counted.units, strategy, len(BATCHES) * options.accumulation)
    return Step(compute, sum(call.seconds(accelerator, options.link_share) for call in calls))


def pick(
    counted: Counted, ranks: int, accelerator: Accelerator, memory: float, options: argparse.Namespace
) -> tuple[Strategy, Step] | None:
    """Of what fits, the fastest if nothing overlapped; the simplest of those as fast. None if nothing fits."""
    fitting = [
        (strategy, step(counted, strategy, accelerator, options))
        for strategy in strategies(ranks)
        if peak_memory(counted.units, strategy, counted.passes) <= MEMORY_USED * memory
    ]
    if not fitting:
        return None
    fastest = min(taken.worst for _, taken in fitting)
    return next(choice for choice in fitting if choice[1].worst <= fastest * (1 + EQUAL))


# ---------------------------------------------------------------------------------------------------------------------
# The tables


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.2f}" if size < 9.995e9 else f"{size / 1e9:.1f}"


def parameter_table(counted: dict[str, Counted]) -> str:
    parts = list(next(iter(counted.values())).parameters)
    head = ["millions of parameters", *parts, "**trained**", "**frozen**"]
    rows = []
    for name, model in counted.items():
        total = sum(model.parameters.values())
        numbers = [*model.parameters.values(), model.trained, total - model.trained]
        rows.append([name, *(f"{number / 1e6:,.3g}" if number < 1e6 else f"{number / 1e6:,.1f}" for number in numbers)])
    return table(head, rows)


def compute_table(counted: dict[str, Counted], options: argparse.Namespace) -> str:
    head = ["one update on one GPU", "TFLOP forward", "TFLOP backward", "activations, GB"]
    for accelerator in options.accelerators:
        head += [f"{accelerator.name}: s", f"{accelerator.name}: pairs/s", f"{accelerator.name}: documents/s"]
    rows = []
    for name, model in counted.items():
        cells = [
            name,
            f"{model.passes.forward * options.accumulation / 1e12:.1f}",
            f"{model.passes.backward * options.accumulation / 1e12:.1f}",
            gigabytes(model.passes.peak - model.passes.gradients),
        ]
        for accelerator in options.accelerators:
            alone = Strategy("DDP", 1, 1, False)
            seconds = step(model, alone, accelerator, options).compute
            cells.append(f"{seconds:.2f}")
            cells += [f"{BATCHES[kind][0] * options.accumulation / seconds:.0f}" for kind in ("laion", "mmc4")]
        rows.append(cells)
    return table(head, rows)


def memory_table(counted: dict[str, Counted], options: argparse.Namespace) -> str:
    head = [
        "GPUs",
        "strategy",
        "frozen",
        "parameters",
        "gradients",
        "optimizer",
        "**at rest**",
        "at rest, fp32",
        "peak, at most",
    ]
    rows = []
    for name, model in counted.items():
        rows.append([f"**{name}**", *[""] * (len(head) - 1)])
        for ranks in options.gpus:
            for strategy in strategies(ranks):
                holds = held(model.units, strategy)
                sizes = [*holds, holds.at_rest, held(model.units_fp32, strategy).at_rest]
                sizes.append(peak_memory(model.units, strategy, model.passes))
                rows.append([str(ranks), strategy.name, strategy.frozen_name, *map(gigabytes, sizes)])
    return table(head, rows)


def time_table(counted: dict[str, Counted], options: argparse.Namespace) -> str:
    head = ["GPUs", "strategy", "frozen", "calls", "sent, GB", "to other nodes, GB"]
    for accelerator in options.accelerators:
        head += [f"{accelerator.name}: sending, s", f"{accelerator.name}: **step, s**"]
    rows = []
    for name, model in counted.items():
        rows.append([f"**{name}**", *[""] * (len(head) - 1)])
        for ranks in options.gpus:
            for strategy in strategies(ranks):
                calls = list(collectives(model.units, strategy, len(BATCHES) * options.accumulation))
                sent, network = sum(call.sent for call in calls), sum(call.network for call in calls)
                cells = [
                    str(ranks),
                    strategy.name,
                    strategy.frozen_name,
                    str(len(calls)),
                    gigabytes(sent),
                    gigabytes(network),
                ]
                for accelerator in options.accelerators:
                    taken = step(model, strategy, accelerator, options)
                    cells += [f"{taken.communication:.2f}", f"{taken.best:.2f}–{taken.worst:.2f}"]
                rows.append(cells)
    return table(head, rows)


def pick_table(counted: dict[str, Counted], options: argparse.Namespace) -> str:
    by_name = {accelerator.name: accelerator for accelerator in options.accelerators}
    columns = [(by_name[name], memory) for name, memory in MEMORIES if name in by_name]
    head = ["", "GPUs", *(f"{accelerator.name}, {memory / 1e9:.0f} GB" for accelerator, memory in columns)]
    rows = []
    for name, model in counted.items():
        for ranks in options.gpus:
            cells = [name, str(ranks)]
            for accelerator, memory in columns:
                choice = pick(model, ranks, accelerator, memory, options)
                if choice is None:
                    cells.append("nothing fits")
                    continue
                strategy, taken = choice
                frozen = "" if strategy.shard == 1 else f", frozen {strategy.frozen_name}"
                cells.append(f"{strategy.name}{frozen} ({taken.best:.2f} s)")
            rows.append(cells)
    return table(head, rows)


def report(options: argparse.Namespace) -> str:
    """All tables, as Markdown."""
    counted = {recipe.name: count(recipe, options.gradient_checkpointing) for recipe in RECIPES}
    sections = {
        "Which to pick": pick_table(counted, options),
        "Parameters": parameter_table(counted),
        "Compute": compute_table(counted, options),
        "Memory": memory_table(counted, options),
        "Communication and time": time_table(counted, options),
    }
    return "\n".join(f"### {title}\n\n{text}" for title, text in sections.items())


def replace_tables(document: str, tables: str) -> str:
    """`document` with `tables` between its two marks. Raises ValueError if they are not there."""
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the document lacks the marks {BEGIN!r} and {END!r}")
    return f"{before}{BEGIN}\n\n{tables}\n{END}{after}"


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What training costs on many GPUs, on paper.")
    parser.add_argument("--gpus", type=int, nargs="+", default=list(GPUS), help="numbers of GPUs, multiples of 8")
    parser.add_argument("--accumulation", type=int, default=1, help="batches of each dataset an update")
    parser.add_argument(
        "--gradient_checkpointing",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="as in the published recipe",
    )
    parser.add_argument("--matrix_share", type=float, default=0.4, help="of the GPU's matrix rate that is reached")
    parser.add_argument("--link_share", type=float, default=0.8, help="of the links' rates that is reached")
    for accelerator in ACCELERATORS:
        name = accelerator.name.lower()
        parser.add_argument(f"--{name}_tflops", type=float, default=accelerator.flops / 1e12, help="bf16, dense")
        parser.add_argument(
            f"--{name}_nvlink", type=float, default=accelerator.nvlink / 1e9, help="GB/s a GPU, one way"
        )
        parser.add_argument(f"--{name}_nic", type=float, default=accelerator.nic / 1e9, help="GB/s a GPU, one way")
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the tables into this document")
    options = parser.parse_args(argv)
    if any(gpus < GPUS_OF_NODE or gpus % GPUS_OF_NODE for gpus in options.gpus):
        parser.error(f"--gpus must be multiples of {GPUS_OF_NODE}, the GPUs of a node")
    values = vars(options)
    options.accelerators = [
        replace(
            accelerator,
            flops=values[f"{accelerator.name.lower()}_tflops"] * 1e12,
            nvlink=values[f"{accelerator.name.lower()}_nvlink"] * 1e9,
            nic=values[f"{accelerator.name.lower()}_nic"] * 1e9,
        )
        for accelerator in ACCELERATORS
    ]
    return options


def main(argv: Sequence[str] | None = None) -> None:
    options = parse_args(argv)
    tables = report(options)
    if options.write is None:
        print(tables)
    else:
        options.write.write_text(replace_tables(options.write.read_text(encoding="utf-8"), tables), encoding="utf-8")


if __name__ == "__main__":
    main()
