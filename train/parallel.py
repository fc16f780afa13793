"""The model on many ranks, whole (DDP) or sharded (FSDP2): gradients averaged once per update."""

import argparse
import inspect
import logging
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from open_flamingo import Flamingo
from open_flamingo.language_model import heads_are_tied, input_embedding
from open_flamingo.train.distributed import World
from open_flamingo.train.precision import autocast, autocast_dtype

log = logging.getLogger(__name__)

# torch 2.13 renamed the argument.
_DDP_OPTIONS = inspect.signature(DistributedDataParallel).parameters
_SYNC_BUFFERS = "forward_sync_buffers" if "forward_sync_buffers" in _DDP_OPTIONS else "broadcast_buffers"


@dataclass(frozen=True)
class Sharding:
    """How FSDP spreads the model."""

    shard_size: int  # ranks that share one copy; fewer than all: `hybrid`, replicated between such groups
    shard_frozen: bool = True  # frozen parameters too; else they are whole on every rank
    gather_dtype: torch.dtype | None = None  # in which trained matrices are gathered, if not their own: see `units`


def sharding_from_flags(args: argparse.Namespace, world: World) -> Sharding | None:
    """How FSDP spreads the model, None without --fsdp. Raises ValueError if the ranks cannot be divided so."""
    if not args.fsdp:
        return None
    if args.fsdp_use_orig_params:
        log.info("--fsdp_use_orig_params: always so")
    ranks = world.world_size
    assert world.local_world_size is not None
    size = args.fsdp_shard_size or (ranks if args.fsdp_sharding_strategy == "full" else world.local_world_size)
    if ranks % size:
        fitting = [number for number in range(1, ranks + 1) if ranks % number == 0]
        raise ValueError(
            f"--fsdp_shard_size: {size} ranks cannot share the model evenly among {ranks}: use one of {fitting}"
        )
    return Sharding(size, args.fsdp_frozen == "shard", gather_dtype(args))


def gather_dtype(args: argparse.Namespace) -> torch.dtype | None:
    """See `Sharding`. Compiled blocks are units as a whole: within one, what FSDP does around each matrix would break its graph."""
    return None if args.compile else autocast_dtype(args.precision)


def parallelize(model: Flamingo, world: World, sharding: Sharding | None = None) -> nn.Module:
    """Put `model` on the device and wrap it: DDP, FSDP if there is a `sharding`, nothing for a single process without.

    Weights come from rank 0; those of other ranks may be on the meta device. With FSDP they are sent, and sharded, unit by unit, so no
    rank holds more than one whole unit beside its shards.
    """
    placed: set[int] = set()
    if sharding is None:
        broadcast_from_rank0(model, model, world, placed)
        if world.world_size == 1:
            return model
        # Nothing is sent but gradients, as buffers are constants. Gradients are views of DDP's buckets, not copies; the size of those stays
        # at torch's 25 MB, as others made no difference (benchmarks/buckets.py).
        options: dict[str, Any] = {"gradient_as_bucket_view": True, "init_sync": False, _SYNC_BUFFERS: False}
        return DistributedDataParallel(model, **options)

    groups = world.world_size // sharding.shard_size
    dims = {"replicate": groups, "shard": sharding.shard_size} if groups > 1 else {"shard": sharding.shard_size}
    mesh = init_device_mesh(world.device.type, tuple(dims.values()), mesh_dim_names=tuple(dims))
    # FSDP warns where a unit returns a view, since writing into it would lose its gradient. Nothing here does.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    *inner, root = units(model, sharding.gather_dtype)
    # Zamba 2 has one block in several layers: its parameters are the root's. By name, as they are about to be replaced.
    uses = Counter(parameter for unit in inner for parameter in unit.parameters())
    shared = [[name for name, parameter in unit.named_parameters() if uses[parameter] > 1] for unit in inner]
    for unit, names in zip((*inner, root), (*shared, [])):
        broadcast_from_rank0(unit, model, world, placed)
        ignored = {p for p in unit.parameters() if not (sharding.shard_frozen or p.requires_grad)}
        ignored |= {unit.get_parameter(name) for name in names}
        if any(parameter not in ignored for parameter in unit.parameters()):
            modules, policy = [unit], MixedPrecisionPolicy()
            if isinstance(unit, nn.ModuleList):
                modules = [*unit]
                policy = MixedPrecisionPolicy(sharding.gather_dtype, torch.float32, cast_forward_inputs=False)
            fully_shard(modules, mesh=mesh, mp_policy=policy, ignored_params=ignored)
    return model


def units(model: Flamingo, gather_dtype: torch.dtype | None = None) -> Iterator[nn.Module]:
    """The parts that FSDP gathers one at a time, inner ones first; the last is the model itself, for what is left: a tied embedding too,
    as the head that shares it is needed at the end of forward.

    With a `gather_dtype`, of the trained parts only their matrices, which autocast computes in it anyway: a ModuleList, by which
    `parallelize` and `estimate.unit_pieces` know them. Their norms and gates, which stay as they are, are small, and left to the last.
    """

    def part(module: nn.Module) -> nn.Module:
        matrices = (child for child in module.modules() if isinstance(child, nn.Linear))
        return module if gather_dtype is None else nn.ModuleList(matrices)

    yield from _repeated_blocks(model.vision_encoder)
    yield part(model.perceiver)
    for layer in model.decoder_layers:
        if layer.gated_cross_attn_layer is not None:
            yield part(layer.gated_cross_attn_layer)  # type: ignore[arg-type]
        yield layer.decoder_layer  # type: ignore[misc]
    if not heads_are_tied(model.lang_encoder):
        yield input_embedding(model.lang_encoder)
    yield model


def _repeated_blocks(tower: nn.Module) -> Iterator[nn.Module]:
    """The outermost runs of two or more layers of one class in a vision tower."""
    for child in tower.children():
        layers = list(child.children())
        if isinstance(child, (nn.ModuleList, nn.Sequential)) and len(layers) > 1 and len({*map(type, layers)}) == 1:
            yield from layers
        else:
            yield from _repeated_blocks(child)


@torch.no_grad()
def broadcast_from_rank0(unit: nn.Module, model: nn.Module, world: World, done: set[int]) -> None:
    """Put the parameters and buffers of `unit` on the device, as they are on rank 0, wherever `model` uses them: what is tied stays
    tied. What is sharded, or whose id is in `done` (which is added to), is in place already."""
    placed: dict[int, Tensor] = {}
    for tensor in [*unit.parameters(), *unit.buffers()]:
        if isinstance(tensor, DTensor) or id(tensor) in done:
            continue
        value = tensor.detach().to(world.device) if world.is_main else torch.empty_like(tensor, device=world.device)
        if world.world_size > 1:
            dist.broadcast(value, src=0)
        if isinstance(tensor, nn.Parameter):
            value = nn.Parameter(value, requires_grad=tensor.requires_grad)
        placed[id(tensor)] = value
        done.add(id(value))
    for module in model.modules():
        owners: list[dict[str, Any]] = [module._parameters, module._buffers]
        for owned in owners:
            for name in owned:
                if id(owned[name]) in placed:
                    owned[name] = placed[id(owned[name])]


def dummy_batch(image: Tensor, media_token_id: int, eoc_token_id: int) -> dict[str, Tensor]:
    """The smallest batch that reaches every trained parameter. `image`: float32 [3, H, W], as the vision encoder takes them."""
    tokens = torch.tensor([[media_token_id, eoc_token_id]])
    return {"vision_x": image[None, None, None], "lang_x": tokens, "labels": tokens}


def reduce_gradients(model: nn.Module, batch: dict[str, Tensor], precision: str = "fp32") -> None:
    """Average the gradients over the ranks, if the pass that should have done it was left out: DDP and FSDP do it within backward
    passes only, so this is one over a dummy batch whose own gradients are 0."""
    if not isinstance(model, (DistributedDataParallel, FSDPModule)):
        return
    device = next(model.parameters()).device
    with gradient_sync(model, enabled=True):
        with autocast(precision, device):
            inputs = {name: value if name == "labels" else value.to(device) for name, value in batch.items()}
            loss = model(**inputs).loss
        (0 * loss).backward()


def warm_up_ddp(model: nn.Module, batch: dict[str, Tensor], precision: str = "fp32") -> None:
    """A backward pass whose gradients are thrown away. After its first one DDP lays its buckets out again, in the order in which gradients
    came, which decides the order of their sums: without this, the first update after a resume would differ in its last bits."""
    if isinstance(model, DistributedDataParallel):
        reduce_gradients(model, batch, precision)
        model.zero_grad(set_to_none=True)


@contextmanager
def gradient_sync(model: nn.Module, enabled: bool) -> Iterator[None]:
    """The context of one forward *and* backward pass (DDP decides in forward): whether it averages the gradients over the ranks."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(enabled)
    with model.no_sync() if isinstance(model, DistributedDataParallel) and not enabled else nullcontext():
        yield


def full_tensor(tensor: Tensor) -> Tensor:
    """`tensor`, detached; gathered from all ranks if it is sharded over them, in which case every rank must call this."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def check_compiler(device: torch.device) -> None:
    """Compile and run a small function. Raises ValueError, saying what is missing, if this machine cannot."""
    try:
        # Without caches, else what was compiled before would hide that the compiler is gone.
        with torch.compiler.config.patch(force_disable_caches=True):  # type: ignore[attr-defined]
            torch.compile(torch.sin)(torch.ones(2, device=device))
    except Exception as error:  # a compiler's, a file system's, Triton's
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(
            f"torch.compile does not work on this machine: {lines[0]}. Install a C and C++ compiler (gcc and g++; another "
            "one is named in CC and CXX), or run without --compile"
        ) from error


def compile_blocks(model: Flamingo) -> None:
    """Have each decoder layer, gated block and resampler layer compiled when it is first called: what is compiled for the first of a kind
    serves all of them. Call it after `warm_up_ddp`: sizes of one, as of its one row, are compiled for separately.

    Not OpenCLIP's ViT: there torch's own kernel of a whole attention is faster (0.064 s of an update compared with 0.089, on an H200).
    """
    # By default graphs within DDP's forward are split where its buckets end; blocks are smaller than that.
    torch._dynamo.config.optimize_ddp = False
    # Sizes that are equal by chance (as many rows as latents) would be taken for one size, and compiled again where they are not.
    torch.fx.experimental._config.use_duck_shape = False
    # Counted over all kinds of blocks together; beyond it torch goes on without compiling.
    torch.compiler.config.recompile_limit = max(torch.compiler.config.recompile_limit, 64)
    for layer in (*model.decoder_layers, *model.perceiver.layers):
        for block in layer.children():
            block.compile(dynamic=True)
