"""Writes tiny backbones and shards to a folder and prints the flags that train on them, one a line.

python -m tests.launch.tiny_world FOLDER             for scripts that launch train.py by themselves
python -m tests.launch.tiny_world --same A.pt B.pt   whether two checkpoints are the same, but for the flags that made them
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from tests.shards import write_laion, write_mmc4
from tests.tiny import assert_same, write_backbones


def write(folder: Path) -> list[str]:
    """Eight updates on two ranks."""
    return [
        *write_backbones(folder / "backbones"),
        f"--laion_shards={write_laion(folder / 'laion', shards=3)}",
        f"--mmc4_shards={write_mmc4(folder / 'mmc4', shards=3)}",
        "--batch_size_laion=4",
        "--batch_size_mmc4=2",
        "--train_num_samples_laion=32",
        "--train_num_samples_mmc4=16",
        "--mmc4_textsim_threshold=0.24",
        "--num_epochs=2",
        "--workers=1",
        "--learning_rate=1e-2",
        "--warmup_steps=2",
        "--logging_steps=4",
    ]


def main() -> None:
    if sys.argv[1] == "--same":
        checkpoints = [torch.load(path, weights_only=True) for path in sys.argv[2:]]
        for checkpoint in checkpoints:
            del checkpoint["flags"]
        assert_same(*checkpoints)
        print("the same checkpoint, bit for bit:", *sys.argv[2:])
    else:
        print(*write(Path(sys.argv[1])), sep="\n")


if __name__ == "__main__":
    main()
