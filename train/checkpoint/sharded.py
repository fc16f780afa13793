"""Checkpoints in many files: every rank writes its part, while the training goes on (torch.distributed.checkpoint).

    {run_name}/checkpoint_{epoch}/
        state.pt                    all but the tensors, as in a checkpoint of one file
        .metadata, __0_0.distcp …   the tensors: trained weights, what else a checkpoint of one file holds, moments
        SHA256SUMS                  of all others

The folder is written beside its place and renamed once every rank has finished. train/sharded.py makes one file of it.
"""

import pickle
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.optim import Optimizer

from open_flamingo import Flamingo
from open_flamingo.language_model import heads_are_tied, input_embedding
from open_flamingo.train.atomic import atomic_write, move
from open_flamingo.train.checkpoint import SHARDED_STATE, files
from open_flamingo.train.distributed import raise_on_all_ranks
from open_flamingo.train.optimizer import trained_parameters
from open_flamingo.weights import embedding_name, head_name, saved_parameters

MOMENTS = ("exp_avg", "exp_avg_sq", "step")


def _tensors(model: Flamingo, optimizer: Optimizer, only_trained: bool) -> dict[str, Tensor]:
    """Name in the checkpoint → tensor, or this rank's part of it."""
    tensors = {
        f"model/{name}": parameter.detach()
        for name, parameter in saved_parameters(model)
        if parameter.requires_grad or not only_trained
    }
    for name, parameter in trained_parameters(model, optimizer).items():
        tensors |= {f"optimizer/{name}/{key}": optimizer.state[parameter][key] for key in MOMENTS}
    return tensors


def host_copies(device: torch.device) -> DefaultStager:
    """Where tensors of `device` are copied to, each checkpoint's in the place of the last one's. For a GPU's the memory is page-locked, when
    it is first used: copying would take ten times as long."""
    on_gpu = device.type == "cuda"
    return DefaultStager(
        StagingOptions(on_gpu, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=on_gpu)
    )


def start_sharded(
    group: Any, copies: DefaultStager, model: Flamingo, optimizer: Optimizer, state: dict[str, Any] | None, path: Path
) -> Callable[[], None]:
    """Copies this rank's part of the tensors to host memory, `copies`, and starts to write it: see `saving.start_file`. Raises OSError or
    ValueError, on every rank, where the folder cannot be made."""
    beside = path.with_name(f".{path.name}.saving")
    with raise_on_all_ranks():  # also a barrier
        if state is not None:
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir(parents=True)  # fails where something is left: its checksums would be taken for this one's
            layout = {  # what making one file needs to know
                "embedding": embedding_name(model),
                "head": head_name(model),
                "tied": heads_are_tied(model.lang_encoder),
                "new_ids": input_embedding(model.lang_encoder).new_ids.tolist(),  # type: ignore[operator]
                "param_groups": optimizer.state_dict()["param_groups"],
            }
            files.save(state | {"layout": layout}, beside / SHARDED_STATE)
    tensors = _tensors(model, optimizer, only_trained=False)
    writer: Any = ChecksumWriter(beside)
    try:
        written: Any = dcp.async_save(tensors, storage_writer=writer, process_group=group, async_stager=copies)
    except RuntimeError as error:  # the machine has a limit of page-locked memory
        raise OSError(files.first_line(error)) from error

    def finish() -> None:
        try:
            written.result()
        except (CheckpointException, OSError, RuntimeError) as error:
            raise OSError(files.first_line(error)) from error
        if state is not None:
            parts = sorted(beside.glob(f"{files.SUMS}.*"))
            lines = [*(part.read_text() for part in parts), files.sums(beside, (".metadata", SHARDED_STATE))]
            with atomic_write(beside / files.SUMS) as file:
                file.write("".join(lines).encode())
            for part in parts:
                part.unlink()
            shutil.rmtree(path, ignore_errors=True)  # of a run that was told to start from an earlier one
            move(beside, path)

    return finish


class ChecksumWriter(dcp.FileSystemWriter):
    """Each rank also writes the checksums of its own files: rank 0 would have to read those of all, over the network."""

    def write_data(self, *args: Any, **kwargs: Any) -> Any:
        written = super().write_data(*args, **kwargs)
        names = sorted({result.storage_data.relative_path for result in written.wait()})
        part = Path(self.path) / f"{files.SUMS}.{dist.get_rank()}"
        part.write_text(files.sums(part.parent, names))
        return written


def load(path: Path, model: Flamingo, optimizer: Optimizer) -> None:
    """Loads trained weights and moments in place, each rank its part, however many ranks wrote them. Raises ValueError, naming the
    folder, where it cannot be read or is of another model."""
    for parameter in trained_parameters(model, optimizer).values():
        moments = {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": torch.zeros((), device=parameter.device), **moments}
    with raise_on_all_ranks(), reading(path):  # before torch tries, which reports what it cannot read at length
        TensorReader(path).read_metadata()
    with reading(path):
        dcp.load(_tensors(model, optimizer, only_trained=True), storage_reader=TensorReader(path))


@contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Raises ValueError, naming the folder, where what is within cannot read it."""
    try:
        yield
    except (Exception, CheckpointException) as error:  # broken bytes make torch raise almost anything
        raise ValueError(f"{folder} cannot be read, or is of another model: {files.first_line(error)}") from error


class TensorReader(dcp.FileSystemReader):
    """Reads a folder of tensors, and executes nothing in it. torch's own reader unpickles `.metadata` without restraint, and entries
    that are not tensors too. Here only the classes of such a file are made, and there are only tensors, each in a file of the folder."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        folder = Path(self.path)
        with (folder / ".metadata").open("rb") as file:
            metadata = _MetadataUnpickler(file).load()
        if not isinstance(metadata, Metadata):
            raise ValueError(f".metadata holds a {type(metadata).__name__}, not a description of tensors")
        for key, entry in metadata.state_dict_metadata.items():
            if not isinstance(entry, TensorStorageMetadata):
                raise ValueError(f"{key} is not a tensor")
        for stored in metadata.storage_data.values():
            name = stored.relative_path
            if name != Path(name).name or stored.transform_descriptors or not (folder / name).is_file():
                raise ValueError(f"{name!r} is not a file of tensors of this folder")
        return metadata


class _MetadataUnpickler(pickle.Unpickler):
    """Makes what torch's FileSystemWriter puts into `.metadata`, and nothing else."""

    _DESCRIPTIONS = "Metadata MetadataIndex StorageMeta TensorStorageMetadata ChunkStorageMetadata TensorProperties _MEM_FORMAT_ENCODING"
    _CLASSES = (
        *(("torch.distributed.checkpoint.metadata", name) for name in _DESCRIPTIONS.split()),
        *(("torch.distributed.checkpoint.filesystem", "_StorageInfo"), ("torch.serialization", "_get_layout")),
        *(("torch", "Size"), ("pathlib", "PosixPath"), ("pathlib._local", "PosixPath")),  # the last one: Python 3.13
    )

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or (module, name) in self._CLASSES:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no checkpoint needs: it may be hostile")
