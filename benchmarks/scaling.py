"""What a run holds, sends and takes on 8 to 512 GPUs, on paper: prints the tables of docs/scaling.md.

    python benchmarks/scaling.py                            # to the terminal
    python benchmarks/scaling.py --write docs/scaling.md    # into the document, in the place of the old tables

Nothing runs on a GPU here, and no time is measured. What is counted and what is assumed:

- Counted, from the program's own classes on the meta device (shapes without memory): parameters and their types
  (`cast_frozen_weights`), the units that FSDP gathers (`parallel.units`), the matrix FLOPs of one update and its activations.
- Derived: bytes held and sent, by the formulas in `held` and `collectives`.
- Assumed: the rates of `ACCELERATORS`, and the share of them that is reached. Flags change them.

GB is 10⁹ bytes. W is the number of ranks, P that of trained parameters.
"""

from __future__ import annotations

import argparse
import functools
import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, MptConfig, MptForCausalLM

from open_flamingo import Flamingo
from open_flamingo.train.parallel import units
from open_flamingo.train.precision import cast_frozen_weights

GPUS = (8, 64, 512)
GPUS_OF_NODE = 8
BEGIN, END = "<!-- tables: benchmarks/scaling.py -->", "<!-- end of tables -->"

# The published recipe, on each GPU: MMC4 documents of 256 tokens, about 3 images each; LAION pairs of 32 tokens.
BATCHES = {"laion": (64, 32, 1), "mmc4": (32, 256, 3)}  # rows, tokens a row, images a row

ADAM_BYTES = 8  # of a trained parameter: two moments in float32
BUCKET = 25 * 2**20  # of DDP, in bytes: its default
# Latency of one hop of a collective, in seconds, as NCCL assumes when it chooses an algorithm (its src/graph/tuning.cc, protocol
# "Simple"): over NVLink, over a network, and of the call itself.
HOP_NVLINK, HOP_NETWORK, CALL = 3.4e-6, 14.0e-6, 8.4e-6
MEMORY_USED = 0.9  # of a GPU's memory; the rest is CUDA's, NCCL's and what fragmentation costs
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


@dataclass(frozen=True)
class Accelerator:
    """A GPU and its links. Rates as the data sheets give them, one direction.

    flops: of bfloat16 matrix products, dense, a second.
    nvlink: bytes a second that a GPU sends to those of its node.
    nic: bytes a second that it sends to other nodes, through a network card of its own.
    """

    name: str
    flops: float
    nvlink: float
    nic: float


ACCELERATORS = (
    Accelerator("A100", 312e12, 300e9, 25e9),  # NVLink 3, HDR InfiniBand (200 Gb/s)
    Accelerator("H100", 989e12, 450e9, 50e9),  # NVLink 4, NDR InfiniBand (400 Gb/s)
)
MEMORIES = (("A100", 40e9), ("A100", 80e9), ("H100", 80e9))


@dataclass(frozen=True)
class Strategy:
    """How the model lies on `ranks` GPUs.

    shard: ranks that share one copy of what is sharded; 1 for DDP.
    frozen: whether frozen parameters are sharded too.
    """

    name: str
    ranks: int
    shard: int
    frozen: bool

    @property
    def frozen_name(self) -> str:
        return "sharded" if self.frozen else "replicated"


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


class Piece(NamedTuple):
    """A parameter. FSDP splits its rows."""

    rows: int
    numel: int
    itemsize: int
    trained: bool

    def shard(self, ranks: int) -> int:
        """Elements of the largest shard. All are padded to it: a parameter of fewer rows than ranks takes a row of each."""
        return math.ceil(self.rows / ranks) * (self.numel // self.rows)


class Unit(NamedTuple):
    """What FSDP gathers at once.

    gathers: how often, for a forward and its backward: twice; once in the vision encoder, which has no backward, and of
        the root, which is kept in between.
    """

    pieces: tuple[Piece, ...]
    gathers: int


@dataclass(frozen=True)
class Counted:
    """What a recipe's model is made of and costs.

    parameters: by part; the trained ones in `trained`.
    units: with the frozen weights in bfloat16 where `--precision amp_bf16` holds them so.
    units_fp32: with all in float32.
    forward, backward: matrix FLOPs of an update on one rank, without accumulation. With gradient checkpointing, backward
        holds a second forward of what is recomputed.
    activations: the most bytes alive at once beside parameters and gradients, all computed in float32.
    """

    parameters: dict[str, int]
    trained: int
    units: tuple[Unit, ...]
    units_fp32: tuple[Unit, ...]
    forward: float
    backward: float
    activations: int

    @property
    def flops(self) -> float:
        return self.forward + self.backward


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

    forward = backward = 0.0
    activations = 0
    for batch in BATCHES.values():
        forward_flops, backward_flops, peak = run_pass(model, *batch)
        forward, backward, activations = forward + forward_flops, backward + backward_flops, max(activations, peak)

    units_fp32 = unit_pieces(model)
    cast_frozen_weights(model, "amp_bf16")
    return Counted(
        parameters,
        sum(p.numel() for p in model.parameters() if p.requires_grad),
        unit_pieces(model),
        units_fp32,
        forward,
        backward,
        activations,
    )


def unit_pieces(model: Flamingo) -> tuple[Unit, ...]:
    """The units of `parallel.units` and the parameters that each gathers: those that no unit before it has."""
    found: list[Unit] = []
    seen: set[int] = set()
    vision = {id(module) for module in model.vision_encoder.modules()}
    for module in units(model):
        own = [parameter for parameter in module.parameters() if id(parameter) not in seen]
        seen.update(map(id, own))
        pieces = tuple(Piece(p.shape[0], p.numel(), p.element_size(), p.requires_grad) for p in own)
        found.append(Unit(pieces, gathers=1 if module is model or id(module) in vision else 2))
    return tuple(found)


def run_pass(model: Flamingo, rows: int, tokens: int, images: int) -> tuple[int, int, int]:
    """FLOPs of forward and of backward, and the most bytes alive, of one batch on the meta device."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.empty_like(parameter)  # held from update to update, so not among the activations
    # Every token counts but the images': the most that the head can have to do.
    labels = torch.ones(rows, tokens, dtype=torch.long, device="cpu")
    labels[:, :images] = -100
    vision_x = torch.empty(rows, images, 1, 3, 224, 224, device="meta")
    lang_x = torch.empty(rows, tokens, dtype=torch.long, device="meta")
    with Meter() as meter:
        loss = model(vision_x, lang_x, labels=labels, image_counts=[images] * rows).loss
        forward = meter.flops
        loss.backward()
    return forward, meter.flops - forward, meter.peak


class Meter(TorchDispatchMode):
    """Counts, while it is active, the matrix FLOPs of operations on the meta device and the bytes of what they make, until it
    is freed.

    (torch's `FlopCounterMode` keeps the tensors of recomputed regions alive, so it cannot be active where bytes are counted.)
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.peak = self._now = 0
        self._alive: set[int] = set()  # storages

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            # Hugging Face asks whether all positions are of one text, and leaves the mask out if so. There are no values here
            # to look at, and in training the answer is yes.
            return True
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=result)
        if func.is_view or func._schema.is_mutable:
            return result
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if not isinstance(tensor, Tensor) or tensor.device.type != "meta":
                continue
            storage = tensor.untyped_storage()
            if storage._cdata not in self._alive:  # a reshape may give what it was given
                self._alive.add(storage._cdata)
                self._now += storage.nbytes()
                weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self._now)
        return result

    def _freed(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self._now -= size


# ---------------------------------------------------------------------------------------------------------------------
# What follows from it


class Held(NamedTuple):
    """Bytes on one rank (on the fullest, where shards are uneven)."""

    parameters: int
    gradients: int
    optimizer: int

    @property
    def at_rest(self) -> int:
        return sum(self)


def held(units: Iterable[Unit], strategy: Strategy) -> Held:
    """What a rank holds between two updates. Gradients are zeroed, not freed, and are of the parameters' type."""
    parameters = gradients = optimizer = 0
    for piece in pieces(units):
        elements = piece.shard(strategy.shard) if is_sharded(piece, strategy) else piece.numel
        parameters += elements * piece.itemsize
        if piece.trained:
            gradients += elements * piece.itemsize
            optimizer += elements * ADAM_BYTES
    return Held(parameters, gradients, optimizer)


def pieces(units: Iterable[Unit]) -> Iterator[Piece]:
    for unit in units:
        yield from unit.pieces


def is_sharded(piece: Piece, strategy: Strategy) -> bool:
    return strategy.shard > 1 and (piece.trained or strategy.frozen)


def working(counted: Counted, strategy: Strategy) -> int:
    """What an update needs beside what is held at rest, in bytes: an upper bound, no more.

    The activations, and the copies of trained weights in bfloat16 that autocast keeps through a forward pass. Under FSDP
    also the whole gradients of trained parameters (they are scattered at the last backward only: the price of one
    synchronization an update), the root, and three times the largest other unit (in use, being gathered, and the buffer
    of that gather).
    """
    needed = counted.activations + 2 * counted.trained
    if strategy.shard == 1:
        return needed
    gathered = [
        sum(piece.numel * piece.itemsize for piece in unit.pieces if is_sharded(piece, strategy))
        for unit in counted.units
    ]
    return needed + 4 * counted.trained + gathered[-1] + 3 * max(gathered[:-1])


class Collective(NamedTuple):
    """One call, as one rank sees it. In a ring, what a rank sends it also receives.

    sent: bytes that the rank sends.
    network: how many of them, on average over the ranks of a node, go to another node.
    latency: seconds until the first byte is through.
    """

    sent: float
    network: float
    latency: float

    def seconds(self, accelerator: Accelerator, link_share: float) -> float:
        """All GPUs of a node send at once, through rings that use every network card."""
        local = (self.sent - self.network) / accelerator.nvlink
        return max(local, self.network / accelerator.nic) / link_share + self.latency


def collectives(units: Iterable[Unit], strategy: Strategy, passes: int) -> Iterator[Collective]:
    """Everything that a rank sends for one update of `passes` forwards and backwards.

    DDP: an all-reduce of the gradients, 2·P·(W - 1)/W elements. FSDP, with shards over S ranks: for each gather of a
    unit of n elements n·(S - 1)/S; for the gradients, scattered once, P·(S - 1)/S; and hybrid, the all-reduce of the
    shards between the W/S groups, 2·P/S·(W/S - 1)/(W/S).
    """
    units = list(units)
    if strategy.shard == 1:
        gradients = sum(piece.numel * piece.itemsize for piece in pieces(units) if piece.trained)
        buckets = math.ceil(gradients / BUCKET)
        for _ in range(buckets):
            yield all_reduce(gradients / buckets, strategy.ranks, in_node=min(strategy.ranks, GPUS_OF_NODE))
        return
    shard, groups = strategy.shard, strategy.ranks // strategy.shard
    for unit in units:
        sharded = [piece for piece in unit.pieces if is_sharded(piece, strategy)]
        if sharded:
            bytes_of_shard = sum(piece.shard(shard) * piece.itemsize for piece in sharded)
            yield from [ring(bytes_of_shard, shard)] * (unit.gathers * passes)
        if trained := [piece for piece in sharded if piece.trained]:
            bytes_of_shard = sum(piece.shard(shard) * piece.itemsize for piece in trained)
            yield ring(bytes_of_shard, shard)
            if groups > 1:
                yield all_reduce(bytes_of_shard, groups, in_node=1)


def ring(bytes_of_shard: float, ranks: int) -> Collective:
    """An all-gather or a reduce-scatter: every shard visits every rank."""
    sent = bytes_of_shard * (ranks - 1)
    nodes = math.ceil(ranks / GPUS_OF_NODE)
    between = nodes - 1  # of the ranks - 1 steps
    latency = CALL + (ranks - 1 - between) * HOP_NVLINK + between * HOP_NETWORK
    # Of the hops of a ring, one a node leaves it.
    return Collective(sent, sent / GPUS_OF_NODE if nodes > 1 else 0.0, latency)


def all_reduce(size: float, ranks: int, in_node: int) -> Collective:
    """Of `size` bytes over `ranks`, `in_node` of them in each node. Bytes of a ring, latency of a tree: NCCL has both."""
    sent = 2 * size * (ranks - 1) / ranks
    nodes = ranks // in_node
    latency = CALL + 2 * ((in_node - 1) * HOP_NVLINK + math.ceil(math.log2(nodes)) * HOP_NETWORK)
    return Collective(sent, sent / in_node if nodes > 1 else 0.0, latency)


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
        if held(counted.units, strategy).at_rest + working(counted, strategy) <= MEMORY_USED * memory
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
            f"{model.forward * options.accumulation / 1e12:.1f}",
            f"{model.backward * options.accumulation / 1e12:.1f}",
            gigabytes(model.activations),
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
                sizes.append(holds.at_rest + working(model, strategy))
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
        Accelerator(
            accelerator.name,
            values[f"{accelerator.name.lower()}_tflops"] * 1e12,
            values[f"{accelerator.name.lower()}_nvlink"] * 1e9,
            values[f"{accelerator.name.lower()}_nic"] * 1e9,
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
