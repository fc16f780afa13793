"""A device that there is not. `python tests/pretended_gpu.py FLAG ...` trains on it, one epoch and then, resumed, a second, and
prints what waited for it between one optimizer step and the next; without flags, what waits in a forward and backward pass
of each family of language models.

Its tensors say that they are on a device of their own, and keep their values on the CPU, where all is computed. What a GPU would
refuse is refused: an operation on tensors of both devices. What would make a program wait for a GPU is counted: reading a
number, sizing a tensor by numbers, copying to the host. So this shows on any machine what would fail, or stand still, on a GPU;
it does not show what its kernels compute.

torch lets a device be written in Python (`_setup_privateuseone_for_python_backend`), but for whatever C++ does with the memory
itself: DDP's buckets, and FSDP's freeing of what it has gathered.
"""

from __future__ import annotations

import contextlib
import json
import sys
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils import backend_registration
from torch.utils._pytree import tree_leaves, tree_map_only

ROOT = Path(__file__).parent.parent
NAME = "pretended"
aten = torch.ops.aten

SIZED_BY_NUMBERS = (
    aten.nonzero,
    aten.masked_select,
    aten._unique2,
    aten.unique_dim,
    aten.unique_consecutive,
    aten.bincount,
)
READING = (aten._local_scalar_dense, aten.equal, *SIZED_BY_NUMBERS)
INDEXING = (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_)
COPYING = (aten._to_copy, aten.copy_, aten._copy_from)
PRODUCTS = ("linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "conv2d", "scaled_dot_product_attention")
"""What autocast computes in the lower precision."""

waits: Counter[str] = Counter()
"""By the function of ours that waited."""


class OnDevice(Tensor):
    """A tensor on the pretended device. Its values are a tensor on the CPU."""

    values: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> OnDevice:
        return Tensor._make_wrapper_subclass(
            cls,
            values.shape,
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=torch.device(NAME, 0),
        )

    def __init__(self, values: Tensor) -> None:
        self.values = values

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["values"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], meta: None, size: Any, stride: Any) -> OnDevice:
        return OnDevice(inner["values"])

    def __repr__(self, **_: Any) -> str:
        return f"{type(self).__name__}({self.values!r})"

    def tolist(self) -> Any:  # torch's refuses subclasses
        return self.detach().cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(function, args, kwargs or {})


def compute(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What `function` gives, on the device it would give it on."""
    operator = function.overloadpacket
    if operator is aten._fused_sdp_choice:
        return 0  # the one that is written out
    if operator is aten._copy_from:
        return compute(aten.copy_.default, (args[1], args[0]), {})
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    here = [tensor for tensor in tensors if isinstance(tensor, OnDevice)]
    elsewhere = [tensor for tensor in tensors if not isinstance(tensor, OnDevice) and tensor.ndim]
    device = kwargs.get("device")
    result_here = bool(here) if device is None else torch.device(device).type == NAME
    if here and elsewhere and operator not in (*COPYING, *INDEXING):
        shapes = [(str(tensor.device), tuple(tensor.shape)) for tensor in tensors]
        raise RuntimeError(f"{function}: tensors on two devices: {shapes}")

    to_host = (
        (operator is aten._to_copy and bool(here) and not result_here and not kwargs.get("non_blocking"))
        or (operator is aten.copy_ and not isinstance(args[0], OnDevice) and not (args[2:] and args[2]))
        or (operator in READING and bool(here))
        or (operator in INDEXING and any(tensor.dtype == torch.bool for tensor in tensors[1:]))
        or (operator is aten.repeat_interleave and kwargs.get("output_size") is None)
    )
    if to_host:
        waits[_caller()] += 1

    values, options = tree_map_only(OnDevice, lambda tensor: tensor.values, (args, kwargs))
    if device is not None:
        options["device"] = torch.device("cpu")
    result = function(*values, **options)
    if operator is aten.copy_:
        return args[0]
    if not result_here:
        return result
    same = {id(tensor.values): tensor for tensor in here}  # what is changed in place stays the tensor that it was
    return tree_map_only(Tensor, lambda x: same[id(x)] if id(x) in same else OnDevice(x), result)


def _caller() -> str:
    """The innermost function of ours that is being called, as file:function."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if path.parent.name in ("train", "open_flamingo", "data") and ROOT in path.parents and frame.name[0] != "<":
            return f"{path.name}:{frame.name}"
    return "?"


class Stream:
    """A stream, or an event, in which everything has happened already."""

    stream_id = device_index = device_type = 0

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: self


class DeviceModule(backend_registration._DummyBackendModule):
    """What `torch.cuda` is for a GPU."""

    Stream = Event = staticmethod(lambda *args, **kwargs: Stream())
    current_stream = default_stream = staticmethod(lambda device=None: Stream())
    stream = device = staticmethod(lambda _: contextlib.nullcontext())
    set_device = set_stream = synchronize = staticmethod(lambda _=None: None)

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


def _lowered(operator: Any) -> Any:
    """`operator` as autocast calls it."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

    def lowered(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(keys):
            dtype = torch.get_autocast_dtype(NAME)
            convert = lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor  # noqa: E731
            args, kwargs = tree_map_only(Tensor, convert, (args, kwargs))
            return operator(*args, **kwargs)

    return lowered


def register() -> list[torch.library.Library]:
    """Makes the device known to torch, for as long as the result is kept."""
    backend_registration._setup_privateuseone_for_python_backend(NAME, DeviceModule())
    for_all, for_aten = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    # Tensors that do not come by way of `OnDevice`: empty ones, and those that `torch.tensor` fills.
    for kernel in (aten.empty.memory_format, aten.empty_strided.default, aten.copy_.default, aten._copy_from.default):
        name = kernel.name().removesuffix(".default")
        for_aten.impl(name, lambda *args, kernel=kernel, **kwargs: compute(kernel, args, kwargs), "PrivateUse1")
    for_all.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    for name in PRODUCTS:
        operator = getattr(aten, name)
        for_aten.impl(name, _lowered(getattr(operator, operator.overloads()[0])), "AutocastPrivateUse1")

    from torch.distributed.fsdp._fully_shard import _fsdp_param

    _fsdp_param.free_storage = _fsdp_param.alloc_storage = lambda tensor: None  # there is none
    return [for_all, for_aten]


def train_twice(flags: list[str]) -> None:
    from open_flamingo.train import distributed
    from open_flamingo.train.train import main as train

    distributed._device = lambda place, set_device: torch.device(NAME, 0)

    def tell(*_: Any) -> None:
        print("waited:", json.dumps(waits))
        waits.clear()

    register_optimizer_step_post_hook(tell)
    for epochs in (1, 2):
        train([*flags, f"--num_epochs={epochs}"])
        tell()
        print("end of a run")


def pass_through_families() -> None:
    from open_flamingo.loss import labeled_positions
    from tests import families

    device = torch.device(NAME, 0)
    for family in families.FAMILIES:
        model = families.flamingo(families.language_model(family, tied=True)).to(device)
        model.lang_encoder.config.pad_token_id = None  # else GPT-2 looks for it, to warn
        token_ids = families.text()[0]
        counts = (token_ids == families.IMAGE).sum(1).tolist()
        pictures = families.images(len(token_ids), max(counts)).to(device)
        waits.clear()
        labels = labeled_positions(token_ids, device)
        model(pictures, token_ids.to(device), labels=labels, image_counts=counts).loss.backward()
        print(f"{family} waited:", json.dumps(waits))


def main() -> None:
    libraries = register()
    if sys.argv[1:]:
        train_twice(sys.argv[1:])
    else:
        pass_through_families()
    del libraries


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
