"""What one update of a shape would have a GPU do, operation by operation: on any machine, on tensors without memory.

`python -m benchmarks trace 3b`. The program's own code runs forward, backward, clipping and AdamW; each operation is counted with its
kernels, the bytes that it reads and writes, and its FLOPs; a model of a GPU gives its time. Not traced: `--compile`, whose kernels
are not these.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

import open_flamingo.flamingo
from benchmarks.backbones import build, write_backbones
from benchmarks.report import table
from benchmarks.shapes import Shape, Text
from open_flamingo import Flamingo
from open_flamingo.loss import LabeledPositions
from open_flamingo.train.distributed import World
from open_flamingo.train.estimate import Meter, as_on_gpu
from open_flamingo.train.optimizer import build_optimizer, clipping
from open_flamingo.train.parallel import broadcast_from_rank0
from open_flamingo.train.precision import autocast, cast_frozen_weights
from open_flamingo.train.step import MAX_GRADIENT_NORM

aten = torch.ops.aten
PARTS = ("vision", "resampler", "gated cross-attention", "language model", "head and loss", "optimizer", "rest")


class Gpu(NamedTuple):
    """What a GPU reaches, not what its data sheet says.

    flops: of large bfloat16 matrix products, per second.
    bandwidth: bytes per second that elementwise kernels read and write.
    """

    flops: float
    bandwidth: float


# H200: 707 TFLOP/s were measured in the run of docs/performance.md; bandwidth: 85 % of the data sheets'.
GPUS = {"H100": Gpu(700e12, 2.85e12), "H200": Gpu(707e12, 4.1e12)}
LAUNCH = 2.5e-6  # seconds that even the smallest kernel takes
ATTENTION_SHARE = 0.25  # of the rate of products that fused attention reaches

# Kernels of operations that launch more than one; 0 for what only makes a tensor, or stays on the host.
KERNELS: dict[Any, int] = {
    aten.native_layer_norm_backward: 2,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: 3,
    aten._native_multi_head_attention: 6,
    aten.embedding_dense_backward: 4,
    aten._foreach_norm: 8,
    aten.index_put: 2,
    aten.index_put_: 2,
    aten.slice_backward: 2,
    aten.select_backward: 2,
    **dict.fromkeys(
        (aten.empty, aten.empty_like, aten.new_empty, aten.empty_strided, aten._unsafe_view, aten._local_scalar_dense),
        0,
    ),
}
WRITE_ONLY = (aten.copy_, aten.fill_, aten.zero_)
# Of the functions that autocast computes in float32 on a GPU and not on a CPU, those that models here use.
FLOAT32_FUNCTIONS = (
    *(F.layer_norm, F.rms_norm, F.softmax, torch.softmax, Tensor.softmax, torch.rsqrt, Tensor.rsqrt),
    *(torch.pow, Tensor.pow, Tensor.__pow__, torch.sum, Tensor.sum, torch.exp, Tensor.exp, torch.cumsum, Tensor.cumsum),
)


@dataclass
class Totals:
    """Of some operations."""

    kernels: int = 0
    bytes: float = 0.0
    flops: float = 0.0
    seconds: float = 0.0

    def add(self, other: Totals) -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


class GpuAutocast(TorchFunctionMode):
    """Converts to float32 where autocast does so on a GPU alone."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given_dtype = (kwargs or {}).get("dtype") is not None
        if func is torch.addcmul and torch.is_autocast_enabled("cpu"):  # which takes the widest type of its arguments
            args = tuple(x.float() for x in args)
        if func in FLOAT32_FUNCTIONS and not given_dtype and torch.is_autocast_enabled("cpu"):
            low = torch.get_autocast_dtype("cpu")
            args, kwargs = tree_map(
                lambda x: x.float() if isinstance(x, Tensor) and x.dtype == low else x, (args, kwargs or {})
            )
        return func(*args, **(kwargs or {}))


@dataclass
class Trace:
    """What an update did, by part and by operation, and its peak."""

    gpu: Gpu
    parts: dict[str, Totals] = field(default_factory=lambda: {part: Totals() for part in PARTS})
    operations: dict[tuple[str, str], Totals] = field(default_factory=dict)  # by part and name
    peak: int = 0  # bytes of tensors: weights, optimizer's state, activations


class Tracer(Meter):
    """A `Meter` that also writes down each operation, under the part of the model that it is of."""

    def __init__(self, trace: Trace) -> None:
        super().__init__()
        self.trace = trace
        self.within = ["rest"]  # the parts that have begun and not ended

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self.within.append(name)
        yield
        self.within.pop()

    def watch(self, module: nn.Module, part: str) -> None:
        """What `module` does is of `part`: in forward, and in backward from the gradient of its output on."""

        def begin(*_: Any) -> None:
            self.within.append(part)

        def end(module: nn.Module, args: Any, output: Any) -> None:
            self.within.pop()
            output = output[0] if isinstance(output, tuple) else output
            if isinstance(output, Tensor) and output.requires_grad:
                output.register_hook(in_backward)

        def in_backward(gradient: Tensor) -> None:
            self.within[-1] = part

        module.register_forward_pre_hook(begin)
        # Also where a recomputation stops as soon as it has what it needs: by an exception.
        module.register_forward_hook(end, always_call=True)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, flops = kwargs or {}, self.flops
        result = super().__torch_dispatch__(func, types, args, kwargs)
        kernels = 0 if func.is_view or func.namespace == "prim" else KERNELS.get(func._overloadpacket, 1)
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, FakeTensor)]
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, FakeTensor)]
        if not kernels or not (given or made):
            return result
        if func._overloadpacket in WRITE_ONLY:
            moved = [given[0], *given[1:]]
        elif func._schema.is_mutable:  # what is written was also read
            written = [a for a, of in zip(args, func._schema.arguments) if of.alias_info and of.alias_info.is_write]
            moved = given + [leaf for leaf in tree_leaves(written) if isinstance(leaf, FakeTensor)]
        else:
            moved = given + made
        size = sum(min(t.numel() * t.element_size(), t.untyped_storage().nbytes()) for t in moved)
        found = Totals(kernels, size, self.flops - flops)
        rate = self.trace.gpu.flops * (ATTENTION_SHARE if "scaled_dot_product" in str(func) else 1.0)
        found.seconds = max(found.flops / rate, found.bytes / self.trace.gpu.bandwidth) + LAUNCH * kernels
        part = self.within[-1]
        self.trace.parts[part].add(found)
        self.trace.operations.setdefault((part, func._overloadpacket.__name__), Totals()).add(found)
        return result


def trace(shape: Shape, precision: str, gpu: Gpu, gradient_checkpointing: bool = False) -> Trace:
    """One update on full rows, as `shapes.draw_batches` makes them."""
    device, found = torch.device("cpu"), Trace(gpu)
    with TemporaryDirectory() as folder:
        write_backbones(Path(folder), shape)
        model = build(Path(folder), gradient_checkpointing, meta=True)[0].train()
    cast_frozen_weights(model, precision)
    tracer = Tracer(found)
    watch_parts(tracer, model)
    labeled_loss, patch_tokens = open_flamingo.flamingo.labeled_loss, open_flamingo.flamingo.patch_tokens

    def traced_loss(*args: Any, **kwargs: Any) -> Tensor:
        with tracer.part("head and loss"):
            return labeled_loss(*args, **kwargs)

    def traced_tower(*args: Any) -> Tensor:
        # Beside another mode, torch does not take its one kernel for an attention. The tower needs none: it runs without autocast.
        with tracer.part("vision"), torch._C.DisableTorchFunction():
            return patch_tokens(*args)

    with ExitStack() as stack:
        stack.enter_context(patch.object(open_flamingo.flamingo, "labeled_loss", traced_loss))
        stack.enter_context(patch.object(open_flamingo.flamingo, "patch_tokens", traced_tower))
        stack.enter_context(as_on_gpu())
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        broadcast_from_rank0(model, model, World(rank=1, device=device), set())
        optimizer = build_optimizer(model, 1e-4, 0.1)
        for parameter in model.parameters():
            if parameter.requires_grad:
                moments = {key: torch.empty_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
                optimizer.state[parameter] = {"step": torch.zeros(()), **moments}
        held = sum(p.nbytes for p in model.parameters()) + 2 * sum(p.nbytes for p in optimizer.state)
        stack.enter_context(GpuAutocast())
        stack.enter_context(tracer)
        for text in (shape.laion, shape.mmc4):
            images, tokens, labels = draw(shape, text)
            with autocast(precision, device):
                loss = model(images, tokens, labels=labels, image_counts=text.counts).loss
            with tracer.part("head and loss"):
                loss.backward()
            del loss, images, tokens, labels
        with tracer.part("optimizer"):
            trained = [p for p in model.parameters() if p.requires_grad]
            norm = torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None], foreach=True)
            with clipping(optimizer, norm, MAX_GRADIENT_NORM, 1.0):
                optimizer.step()
    found.peak = tracer.peak + held
    return found


def watch_parts(tracer: Tracer, model: Flamingo) -> None:
    tracer.watch(model.perceiver, "resampler")
    tracer.watch(model.lang_encoder.base_model, "language model")  # type: ignore[arg-type]
    for layer in model.decoder_layers:
        for name, block in layer.named_children():
            tracer.watch(block, "language model" if name == "decoder_layer" else "gated cross-attention")


def draw(shape: Shape, text: Text) -> tuple[Tensor, Tensor, LabeledPositions]:
    """Images as the program normalizes them, token ids, and labels of all tokens but `<image>`."""
    size = shape.vision["image_size"]
    images = torch.empty(text.rows, max(text.counts), 3, size, size, dtype=torch.uint8)
    mean, std = torch.empty(3, 1, 1), torch.empty(3, 1, 1)
    images = (images.float() / 255 - mean) / std
    counted = torch.zeros(text.rows * (text.tokens - 1) - sum(text.counts), dtype=torch.long)
    tokens = torch.zeros(text.rows, text.tokens, dtype=torch.long)
    return images.unsqueeze(2), tokens, LabeledPositions(counted, counted)


def describe(name: str, precision: str, gpu: str, found: Trace, top: int = 12) -> str:
    total = Totals()
    for part in found.parts.values():
        total.add(part)

    def cells(of: Totals) -> list[str]:
        return [
            f"{of.kernels:,}",
            f"{of.bytes / 1e9:,.1f}",
            f"{of.flops / 1e12:,.1f}",
            f"{of.seconds * 1e3:,.1f}",
        ]

    head = ["kernels", "GB", "TFLOP", f"ms on a {gpu}, modelled"]
    rows = [[part, *cells(of)] for part, of in found.parts.items()] + [["all", *cells(total)]]
    slowest = sorted(found.operations.items(), key=lambda item: -item[1].seconds)[:top]
    more = [[part, operation, *cells(of)] for (part, operation), of in slowest]
    return (
        f"`{name}`, {precision}, one update; {found.peak / 1e9:.1f} GB of tensors at most:\n\n{table(['part', *head], rows)}\n\n"
        f"What takes longest:\n\n{table(['part', 'operation', *head], more)}"
    )
