"""What an update of a model holds, computes and sends, from its shapes alone: nothing is computed and no memory is taken.

GB is 10⁹ bytes. W is the number of ranks, P that of trained parameters.
"""

import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from open_flamingo import Flamingo, loss
from open_flamingo.language_model import replaced
from open_flamingo.loss import LabeledPositions
from open_flamingo.train.distributed import World
from open_flamingo.train.flops import PEAK_FLOPS
from open_flamingo.train.parallel import broadcast_from_rank0, units
from open_flamingo.train.precision import autocast, autocast_dtype
from open_flamingo.weights import ROWS, saved_parameters

GPUS_OF_NODE = 8
BUCKET = 25 * 2**20  # of DDP, in bytes: its default
# Latency of one hop of a collective, in seconds, as NCCL assumes when it chooses an algorithm (its src/graph/tuning.cc, protocol
# "Simple"): over NVLink, over a network, and of the call itself.
HOP_NVLINK, HOP_NETWORK, CALL = 3.4e-6, 14.0e-6, 8.4e-6
MEMORY_USED = 0.9  # of a GPU's memory; the rest is CUDA's, NCCL's and what fragmentation costs


@dataclass(frozen=True)
class Accelerator:
    """A GPU and its links. Rates as the data sheets give them, one direction.

    flops: of bfloat16 matrix products, dense, a second.
    nvlink: bytes a second that a GPU sends to those of its node.
    nic: bytes a second that it sends to other nodes, through a network card of its own.
    memory: bytes.
    """

    name: str
    flops: float
    nvlink: float
    nic: float
    memory: float


ACCELERATORS = (
    Accelerator("A100-40GB", PEAK_FLOPS["A100"], 300e9, 25e9, 40e9),  # NVLink 3, HDR InfiniBand (200 Gb/s)
    Accelerator("A100", PEAK_FLOPS["A100"], 300e9, 25e9, 80e9),
    Accelerator("H100", PEAK_FLOPS["H100"], 450e9, 50e9, 80e9),  # NVLink 4, NDR InfiniBand (400 Gb/s)
    Accelerator("H200", PEAK_FLOPS["H200"], 450e9, 50e9, 141e9),
    Accelerator("B200", PEAK_FLOPS["B200"], 900e9, 50e9, 180e9),
)


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


class Piece(NamedTuple):
    """A parameter. FSDP splits its rows."""

    rows: int
    numel: int
    itemsize: int  # of an element, in bytes
    trained: bool
    gathered_itemsize: int  # of an element as FSDP gathers it

    def shard(self, ranks: int) -> int:
        """Elements of the largest shard. All are padded to it: a parameter of fewer rows than ranks takes a row of each."""
        return math.ceil(self.rows / ranks) * (self.numel // self.rows)


class Unit(NamedTuple):
    """What FSDP gathers at once.

    gathers: how often, for a forward and its backward: twice; once in the vision encoder, which has no backward, and of
        the root, which is kept in between.
    in_decoder: whether it is of the language model's layers, where memory is at its peak.
    """

    pieces: tuple[Piece, ...]
    gathers: int
    in_decoder: bool


def unit_pieces(model: Flamingo, gather_dtype: torch.dtype | None) -> tuple[Unit, ...]:
    """The units of `parallel.units` and the parameters that each gathers: its own, and of the last, what is left."""
    found: list[Unit] = []
    seen: set[int] = set()
    uses = Counter(id(p) for module in units(model, gather_dtype) if module is not model for p in module.parameters())
    vision = {id(module) for module in model.vision_encoder.modules()}
    blocks = {id(parameter) for parameter in model.decoder_layers.parameters()}
    for module in units(model, gather_dtype):
        # Of several, as Zamba 2's block in several layers, it is the last one's.
        own = [p for p in module.parameters() if id(p) not in seen and (uses[id(p)] == 1 or module is model)]
        seen.update(map(id, own))
        low = gather_dtype.itemsize if gather_dtype is not None and isinstance(module, nn.ModuleList) else None
        pieces = tuple(
            Piece(p.shape[0], p.numel(), p.element_size(), p.requires_grad, low or p.element_size()) for p in own
        )
        gathers = 1 if module is model or id(module) in vision else 2
        found.append(Unit(pieces, gathers, in_decoder=module is not model and any(id(p) in blocks for p in own)))
    return tuple(found)


class BatchSize(NamedTuple):
    """Of one rank and forward pass."""

    rows: int
    tokens: int  # of a row
    images: int  # of a row


class Passes(NamedTuple):
    """Forward and backward passes on one rank, on a batch of each dataset.

    forward, backward: FLOPs of matrix products. With gradient checkpointing, backward holds a second forward of what is recomputed.
    peak: the most bytes alive at once beside weights and optimizer: activations, and the gradients, which are `gradients` bytes.
        Without checkpointing, autocast's copies of trained matrices are among it, `autocast_copies` bytes.
    """

    forward: int
    backward: int
    peak: int
    gradients: int
    autocast_copies: int


def measure_passes(
    model: Flamingo,
    precision: str,
    batches: Iterable[BatchSize],
    image_size: tuple[int, int] = (224, 224),
    *,
    on_gpu: bool,
) -> Passes:
    """Of `model`, which is on the meta device and holds its weights as `cast_frozen_weights` casts them: the very code of an update
    runs, on tensors without memory. They are the CPU's, whose autocast differs from a GPU's in norms alone; the loss is a GPU's where
    `on_gpu`."""
    device, forward = torch.device("cpu"), 0
    tables: list[dict[str, Any]] = [table for m in model.modules() for table in (m._parameters, m._buffers)]
    before = [dict(table) for table in tables]
    gradients = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    dtype = None if model.gradient_checkpointing else autocast_dtype(precision)
    matrices = sum(p.numel() for p in model.parameters() if p.requires_grad and p.ndim == 2)
    with as_on_gpu() if on_gpu else nullcontext(), FakeTensorMode(allow_non_fake_inputs=True), Meter() as meter:
        broadcast_from_rank0(model, model, World(rank=1, device=device), set())
        meter.reset()
        for rows, tokens, images in batches:
            # Every token counts but the images': the most that the head can have to do.
            counted = torch.zeros(rows * (tokens - max(1, images)), dtype=torch.long, device=device)
            vision_x = torch.zeros(rows, images, 1, 3, *image_size, device=device)
            lang_x = torch.zeros(rows, tokens, dtype=torch.long, device=device)
            done = meter.flops
            with autocast(precision, device):
                labels = LabeledPositions(counted, counted)
                result = model(vision_x, lang_x, labels=labels, image_counts=[images] * rows).loss
            forward += meter.flops - done
            result.backward()
            del result, vision_x, lang_x, counted, labels
    for table, entries in zip(tables, before):
        table.update(entries)
    return Passes(forward, meter.flops - forward, meter.peak, gradients, matrices * dtype.itemsize if dtype else 0)


@contextmanager
def as_on_gpu() -> Iterator[None]:
    """Within this `with`, the loss of tensors on the CPU is computed as a GPU's."""
    with (
        replaced(vars(loss), "MAX_LOGITS", loss.MAX_LOGITS_ON_GPU),
        replaced(vars(loss), "_in_passes", loss._by_softmax),
    ):
        yield


def _attention_flops(query: Tensor, key: Tensor, *_: Any, **__: Any) -> int:
    """Of two products; [B, H, T, K], [B, H, S, K]."""
    return 4 * query.numel() * key.shape[2]


def _attention_backward_flops(gradient: Tensor, query: Tensor, key: Tensor, *_: Any, **__: Any) -> int:
    return 10 * query.numel() * key.shape[2]  # five: one is made again


def _whole_attention_flops(query: Tensor, *_: Any, **__: Any) -> int:
    """With the products into queries, keys and values and the way out; [M, V, D]."""
    return 8 * query.numel() * query.shape[2] + 4 * query.numel() * query.shape[1]


# What torch's own registry lacks, as it counts the kernels of GPUs.
CPU_FORMULAS: dict[Any, Callable[..., int]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
    torch.ops.aten._native_multi_head_attention: _whole_attention_flops,
}


class Meter(TorchDispatchMode):
    """Counts, while it is active, the matrix FLOPs of operations and the bytes of what they make, until it is freed.

    (torch's `FlopCounterMode` keeps the tensors of recomputed regions alive, so it cannot be active where bytes are counted.)
    """

    def __init__(self) -> None:
        super().__init__()
        self._alive: set[int] = set()  # storages
        self.reset()

    def reset(self) -> None:
        """Forget what is alive now."""
        self.flops = self.peak = self._now = 0
        self._alive.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            # Hugging Face asks whether all positions are of one text, and leaves the mask out if so. There are no values here
            # to look at, and in training the answer is yes.
            return True
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        formula = flop_registry.get(func._overloadpacket) or CPU_FORMULAS.get(func._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=result)
        if func.is_view or func._schema.is_mutable:
            return result
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            if storage._cdata not in self._alive:  # a reshape may give what it was given
                self._alive.add(storage._cdata)
                self._now += storage.nbytes()
                weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self._now)
        return result

    def _freed(self, key: int, size: int) -> None:
        if key in self._alive:
            self._alive.discard(key)
            self._now -= size


class Held(NamedTuple):
    """Bytes on one rank (on the fullest, where shards are uneven)."""

    parameters: int
    gradients: int
    optimizer: int

    @property
    def at_rest(self) -> int:
        return sum(self)


def held(units: Iterable[Unit], strategy: Strategy) -> Held:
    """What a rank holds between two updates. Gradients, of the parameters' type, are among it: DDP keeps
    them, and elsewhere an update begins with them."""
    parameters = gradients = optimizer = 0
    for piece in pieces(units):
        elements = piece.shard(strategy.shard) if is_sharded(piece, strategy) else piece.numel
        parameters += elements * piece.itemsize
        if piece.trained:
            gradients += elements * piece.itemsize
            optimizer += 2 * elements * piece.itemsize
    return Held(parameters, gradients, optimizer)


def checkpoint_size(model: Flamingo) -> int:
    """Bytes of a checkpoint: what is trained and its two moments, the embedding matrix, and a head of its own."""
    saved = {
        id(p): p for name, p in saved_parameters(model) if not name.endswith(ROWS)
    }  # rows are written into their matrix
    moments = 2 * sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    return moments + sum(p.numel() * p.element_size() for p in saved.values())


def pieces(units: Iterable[Unit]) -> Iterator[Piece]:
    for unit in units:
        yield from unit.pieces


def is_sharded(piece: Piece, strategy: Strategy) -> bool:
    return strategy.shard > 1 and (piece.trained or strategy.frozen)


def peak_memory(units: Iterable[Unit], strategy: Strategy, passes: Passes) -> int:
    """The most bytes on one rank in an update.

    What is held at rest, and the activations. Under FSDP also the whole gradients of trained parameters (they are scattered at the
    last backward only: the price of one synchronization an update), the root, and three times the largest block of the language
    model (in use, being gathered, and the buffer of that gather). What FSDP gathers in a lower precision, autocast need not convert.
    """
    *inner, root = units
    needed = held((*inner, root), strategy).at_rest + passes.peak - passes.gradients
    if strategy.shard == 1:
        return needed

    def gathered(unit: Unit) -> int:
        return sum(p.numel * p.gathered_itemsize for p in unit.pieces if is_sharded(p, strategy))

    copies = passes.autocast_copies if any(p.gathered_itemsize < p.itemsize for p in pieces(inner)) else 0
    return (
        needed
        + passes.gradients
        - copies
        + gathered(root)
        + 3 * max(gathered(unit) for unit in inner if unit.in_decoder)
    )


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
            bytes_of_shard = sum(piece.shard(shard) * piece.gathered_itemsize for piece in sharded)
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
