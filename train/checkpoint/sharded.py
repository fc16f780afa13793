"""Checkpoints in many files: every rank writes its part, while the training goes on (torch.distributed.checkpoint).

    {run_name}/checkpoint_{epoch}/
        state.pt                    all but the tensors, as in a checkpoint of one file
        .metadata, __0_0.distcp …   the tensors: trained weights, what else a checkpoint of one file holds, moments

The folder is written beside its place and renamed once every rank has finished. `python -m open_flamingo.train.sharded` makes one
file of it.
"""

from __future__ import annotations

import logging
import os
import pickle
import shutil
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import SavePlan, SavePlanner
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.storage import WriteResult

from open_flamingo import Flamingo
from open_flamingo.language_model import heads_are_tied, input_embedding
from open_flamingo.train.checkpoint import SHARDED_STATE, files
from open_flamingo.train.distributed import raise_on_all_ranks, run_on_rank0
from open_flamingo.train.optimizer import parameter_names
from open_flamingo.weights import embedding_name, head_name, saved_parameters

log = logging.getLogger(__name__)

MOMENTS = ("exp_avg", "exp_avg_sq", "step")


def _tensors(model: Flamingo, optimizer: torch.optim.Optimizer, only_trained: bool) -> dict[str, Tensor]:
    """Name in the checkpoint → tensor, or this rank's part of it."""
    tensors = {
        f"model/{name}": parameter.detach()
        for name, parameter in saved_parameters(model)
        if parameter.requires_grad or not only_trained
    }
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for name, parameter in zip(parameter_names(model, optimizer), parameters, strict=True):
        tensors |= {f"optimizer/{name}/{key}": optimizer.state[parameter][key] for key in MOMENTS}
    return tensors


def layout(model: Flamingo, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What making one file needs to know beside the tensors."""
    embedding = input_embedding(model.lang_encoder)
    return {
        "embedding": embedding_name(model),
        "head": head_name(model),
        "tied": heads_are_tied(model.lang_encoder),
        "new_ids": embedding.new_ids.tolist(),  # type: ignore[operator]
        "param_groups": optimizer.state_dict()["param_groups"],
    }


class ShardedSaver:
    """Writes sharded checkpoints in the background, one at a time. Every rank makes one, and makes the same calls.

    Args:
        failed: called at once, on rank 0, when a checkpoint could not be written; `finish` says why.
    """

    def __init__(self, only_newest: bool, failed: Callable[[], None] | None = None) -> None:
        self._group: Any = dist.new_group(backend="gloo")  # the training goes on using its own
        self._only_newest = only_newest
        self._failed = failed
        self._written: Future[Any] | None = None
        self._in_place: Future[None] = Future()  # rank 0's part, which ends after every other's

    def save(self, model: Flamingo, optimizer: torch.optim.Optimizer, state: dict[str, Any] | None, path: Path) -> None:
        """Starts to write; returns once the tensors are copied to host memory. Call `finish` before.

        Args:
            state: what is not a tensor, on rank 0; None on others.

        Raises OSError, on every rank, where the folder cannot be made.
        """
        beside = path.with_name(f".{path.name}.saving")
        with raise_on_all_ranks():  # also a barrier
            if state is not None:
                shutil.rmtree(beside, ignore_errors=True)
                beside.mkdir(parents=True)
                files.save(state | {"layout": layout(model, optimizer)}, beside / SHARDED_STATE)
        tensors = _tensors(model, optimizer, only_trained=False)
        written = dcp.async_save(tensors, storage_writer=ChecksumWriter(beside), process_group=self._group)
        assert isinstance(written, Future)
        self._written = written
        if state is not None:
            self._in_place = Future()
            written.add_done_callback(lambda done: self._put_in_place(done, beside, path))

    def _put_in_place(self, done: Future[Any], beside: Path, path: Path) -> None:
        failure = done.exception()
        try:
            if failure is None:
                files.write_sums(beside)
                shutil.rmtree(path, ignore_errors=True)  # of a run that was told to start from an earlier one
                os.replace(beside, path)
                files.prune(path.parent, path, self._only_newest)
                log.info("saved %s", path)
        except Exception as error:
            failure = error
        if failure is None:
            self._in_place.set_result(None)
        else:
            self._in_place.set_exception(failure)
            if self._failed is not None:
                self._failed()

    def finish(self) -> None:
        """Waits for the last checkpoint. Raises OSError where it could not be written."""
        written, self._written = self._written, None
        if written is None:
            return
        try:
            written.result()
            if dist.get_rank() == 0:
                self._in_place.result()
        except (CheckpointException, OSError, RuntimeError) as error:
            raise OSError(first_line(error)) from error

    def close(self) -> None:
        """Nothing: what is still being written when the run ends with an error cannot be finished without the other ranks."""


class ChecksumWriter(dcp.FileSystemWriter):
    """Each rank also writes the checksums of its own files: rank 0 would have to read those of all, over the network."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> torch.futures.Future[list[WriteResult]]:
        written = super().write_data(plan, planner)
        names = sorted({result.storage_data.relative_path for result in written.wait()})
        files.write_part_of_sums(Path(self.path), names, dist.get_rank())
        return written


def first_line(error: BaseException) -> str:
    """What went wrong, in one line: of a failure on several ranks, the first one's."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def load(path: Path, model: Flamingo, optimizer: torch.optim.Optimizer) -> None:
    """Loads trained weights and moments in place, each rank its part, however many ranks wrote them.

    Raises ValueError, naming the folder, where it cannot be read or is of another model.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.zeros((), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
    run_on_rank0(check, path)  # before torch tries, which reports what it cannot read at length
    try:
        dcp.load(_tensors(model, optimizer, only_trained=True), storage_reader=TensorReader(path))
    except (Exception, CheckpointException) as error:  # broken bytes make torch raise almost anything
        raise ValueError(f"{path} cannot be read, or is of another model: {first_line(error)}") from error


def check(folder: Path) -> None:
    """Raises ValueError, naming the folder, where it does not hold tensors that are described as they should."""
    try:
        TensorReader(folder).read_metadata()
    except Exception as error:
        raise ValueError(f"{folder} cannot be read: {first_line(error)}") from error


class TensorReader(dcp.FileSystemReader):
    """Reads a folder of tensors, and executes nothing in it.

    torch's own reader unpickles `.metadata` without restraint, and entries that are not tensors too. Here only the classes of
    such a file are made, and there are only tensors, each in a file of the folder.
    """

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = Path(self.path) / ".metadata"
        with path.open("rb") as file:
            metadata = _MetadataUnpickler(file).load()
        if not isinstance(metadata, Metadata):
            raise ValueError(f"{path} holds a {type(metadata).__name__}, not a description of tensors")
        for key, entry in metadata.state_dict_metadata.items():
            if not isinstance(entry, TensorStorageMetadata):
                raise ValueError(f"{path}: {key} is not a tensor")
        for stored in metadata.storage_data.values():
            name = stored.relative_path
            if name != Path(name).name or stored.transform_descriptors or not (Path(self.path) / name).is_file():
                raise ValueError(f"{path}: {name!r} is not a file of tensors of this folder")
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _MetadataUnpickler(pickle.Unpickler):
    """Makes what torch's FileSystemWriter puts into `.metadata`, and nothing else."""

    _DESCRIPTIONS = "Metadata MetadataIndex StorageMeta TensorStorageMetadata ChunkStorageMetadata TensorProperties _MEM_FORMAT_ENCODING"
    _CLASSES = (
        *(("torch.distributed.checkpoint.metadata", name) for name in _DESCRIPTIONS.split()),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("torch.serialization", "_get_layout"),
        ("torch", "Size"),
        ("pathlib", "PosixPath"),
        ("pathlib._local", "PosixPath"),  # Python 3.13
    )

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or (module, name) in self._CLASSES:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no checkpoint needs: it may be hostile")
