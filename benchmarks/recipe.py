"""What `--dry_run` says of a published recipe, on this machine."""

from __future__ import annotations

import subprocess
import sys

from benchmarks import shards
from benchmarks.backbones import write_backbones
from benchmarks.child import FOLDER, ROOT
from benchmarks.shapes import Shape

SIZE = shards.Size(512, 384)
# As OpenFlamingo's scripts/run_train.py had it, for 64 GPUs.
FLAGS = (
    *("--vision_encoder_path", "ViT-L-14", "--vision_encoder_pretrained", "openai", "--dataset_resampled"),
    *("--batch_size_laion", "64", "--batch_size_mmc4", "32"),
    *("--train_num_samples_laion", "250000", "--train_num_samples_mmc4", "125000", "--num_epochs", "480"),
    *("--loss_multiplier_laion", "0.2", "--learning_rate", "1e-4", "--warmup_steps", "1875"),
    *("--mmc4_textsim_threshold", "0.24", "--precision", "amp_bf16", "--workers", "4", "--delete_previous_checkpoint"),
)


def dry_run(shape: Shape, ranks: int, gpu: str) -> str:
    """With made-up shards and a language model of the sizes of `shape`."""
    folder = FOLDER / f"recipe-{shape.name}"
    write_backbones(folder, shape)
    data = {
        "laion": shards.write_laion(FOLDER / "recipe-laion", SIZE, 512),
        "mmc4": shards.write_mmc4(FOLDER / "recipe-mmc4", SIZE, 256),
    }
    command = [
        *(sys.executable, "-m", "open_flamingo.train.train", *FLAGS),
        *("--lm_path", str(folder / "language"), "--run_name", str(folder / "run")),
        *("--cross_attn_every_n_layers", str(shape.cross_attn_every_n_layers)),
        *("--laion_shards", data["laion"], "--mmc4_shards", data["mmc4"]),
        *("--dry_run", "--dry_run_ranks", str(ranks), "--dry_run_gpu", gpu),
    ]
    said = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    text = said.stdout.strip().replace(f"{ROOT}/", "")
    return f"Exit code {said.returncode}:\n\n```\n{text}\n```"
