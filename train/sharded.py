"""Makes a checkpoint of one file of a sharded one."""

import argparse
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from open_flamingo.train.checkpoint import files
from open_flamingo.train.checkpoint.sharded import MOMENTS, TensorReader, reading
from open_flamingo.weights import ROWS


def to_file(folder: Path, file: Path) -> None:
    """Writes to `file` what --checkpoint_format file would have written. Needs neither the model nor more than one process. Raises
    ValueError, naming the folder, where it is damaged or cannot be read."""
    checkpoint = files.load(folder)
    with reading(folder):
        TensorReader(folder).read_metadata()
    files.verify(folder)
    tensors = _read(folder, "")
    layout = checkpoint.pop("layout")
    names = checkpoint["optimizer_parameter_names"]
    moments = {index: {key: tensors[f"optimizer/{name}/{key}"] for key in MOMENTS} for index, name in enumerate(names)}
    optimizer = {"state": moments, "param_groups": layout["param_groups"]}
    weights = _weights(tensors, layout)
    files.save(checkpoint | {"model_state_dict": weights, "optimizer_state_dict": optimizer}, file)


def read_weights(folder: Path, checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    """The `model_state_dict` that `to_file` would write, in memory; `checkpoint` is what `files.load` gives of `folder`. Raises ValueError,
    naming the folder, where it cannot be read."""
    tensors = _read(folder, "model/")
    with reading(folder):
        return _weights(tensors, checkpoint["layout"])


def _read(folder: Path, prefix: str) -> dict[str, Tensor]:
    """The tensors of a sharded checkpoint whose names begin with `prefix`."""
    with reading(folder):
        entries = TensorReader(folder).read_metadata().state_dict_metadata
        tensors = {
            key: torch.empty(entry.size, dtype=entry.properties.dtype)  # type: ignore[union-attr]
            for key, entry in entries.items()
            if key.startswith(prefix)
        }
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # one process is enough
            dcp.load(tensors, storage_reader=TensorReader(folder), no_dist=True)
    return tensors


def _weights(tensors: dict[str, Tensor], layout: dict[str, Any]) -> dict[str, Tensor]:
    """The weights among `tensors`, under the reference's names."""
    weights = {key.removeprefix("model/"): value for key, value in tensors.items() if key.startswith("model/")}
    for matrix in (layout["embedding"], layout["head"]):
        if matrix is not None and (rows := weights.pop(matrix.removesuffix(".weight") + ROWS, None)) is not None:
            weights[matrix][layout["new_ids"]] = rows.to(weights[matrix].dtype)
    if layout["tied"] and layout["head"] is not None:
        weights[layout["head"]] = weights[layout["embedding"]]
    return weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="{run_name}/checkpoint_{epoch}")
    parser.add_argument("file", type=Path, help="the file to write")
    args = parser.parse_args()
    try:
        to_file(args.folder, args.file)
    except ValueError as error:
        parser.exit(2, f"error: {error}\n")
    print(f"wrote {args.file}")


if __name__ == "__main__":
    main()
