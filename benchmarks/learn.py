"""Does a model of real backbones come to see? The program as a user runs it, on the pictures of real.py, with both validations.

Gains are in nats per token, as the program logs them, and per name: all labeled tokens of a caption together, as no other words of a
caption depend on the image.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.child import ROOT
from benchmarks.report import table

RUN = "learn"
VALIDATIONS = 3  # and one before the first update
BATCH = 8  # pairs

# What the comparison of docs/learning.md recommends. A later flag replaces an earlier one.
BACKBONES = ("--vision_encoder_path=local-dir:clip", "--lm_path=lm-mean", "--offline")
DATA = (
    "--laion_shards=laion-00000.tar",
    "--val_laion_shards=val-held-out.tar",
    "--val_mmc4_shards=val-seen.tar",
    "--mmc4_textsim_threshold=0.24",
    "--val_samples=60",
    "--val_captions=6",
)
SETTINGS = (
    "--cross_attn_every_n_layers=3",
    "--learning_rate=1e-3",
    "--lr_scheduler=cosine",
    "--warmup_steps=15",
    "--workers=0",
    "--logging_steps=10",
)


def write_start(folder: Path, flags: Sequence[str], gate: float) -> str:
    """A start for the program in which every gate of attention is tanh(`gate`) open, and all else is as new. Returns the flag that
    takes it. `flags`: of the model."""
    import torch

    from benchmarks import lite0  # noqa: F401  # a vision tower that the flags may name
    from open_flamingo import create_model_and_transforms
    from open_flamingo.train.arguments import build_parser

    args = build_parser().parse_args(list(flags))
    torch.manual_seed(args.seed)
    with contextlib.chdir(folder):
        model, _, _ = create_model_and_transforms(
            args.vision_encoder_path,
            args.vision_encoder_pretrained,
            args.lm_path,
            cross_attn_every_n_layers=args.cross_attn_every_n_layers,
            use_local_files=True,
        )
    trained = {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}
    for name, value in trained.items():
        if name.endswith("attn_gate"):
            value.fill_(gate)
    torch.save(trained, folder / "start.pt")
    return "--resume_from_checkpoint=start.pt"


class Row(NamedTuple):
    """Of one validation: losses and image gains in nats per token; of the things of training, and of those held out."""

    update: int
    loss_seen: float
    gain_seen: float
    loss_held_out: float
    gain_held_out: float


def measure(
    folder: Path, updates: int, flags: Sequence[str] = (), gate: float = 1.0, backbones: Sequence[str] = BACKBONES
) -> list[Row]:
    """Trains in `folder`, which has the shards of real.py, and returns what each validation said. The run's folder, with its report,
    is folder/learn; one that is there is replaced.

    Args:
        flags: of the program, beside or in place of the recommended ones.
        gate: where the gates of attention start; the program's own start is 0, shut.
    """
    shutil.rmtree(folder / RUN, ignore_errors=True)
    length = (
        f"--batch_size_laion={BATCH}",
        f"--train_num_samples_laion={updates * BATCH}",
        f"--val_steps={max(1, updates // VALIDATIONS)}",
        f"--run_name={RUN}",
    )
    flags = [*backbones, *DATA, *SETTINGS, *length, *flags]
    command = [sys.executable, "-m", "benchmarks.lite0", write_start(folder, flags, gate), *flags]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    subprocess.run(command, cwd=folder, env=os.environ | {"PYTHONPATH": path}, check=True)
    return read_rows(folder / RUN)


def read_rows(run: Path) -> list[Row]:
    rows = {}
    for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        values: dict[str, Any] = json.loads(line)
        if "val_loss_laion" in values:
            names = ("val_loss_mmc4", "image_gain_mmc4", "val_loss_laion", "image_gain_laion")
            rows[values["step"]] = Row(values["step"], *(values[name] for name in names))
    return list(rows.values())


def tokens_per_caption(folder: Path, language_model: str = "lm-mean") -> float:
    """Labeled tokens of a caption of the held-out things, on average: its text and `<|endofchunk|>`."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / language_model)
    with tarfile.open(folder / "val-held-out.tar") as tar:
        texts = [tar.extractfile(member).read().decode() for member in tar if member.name.endswith(".txt")]
    return sum(len(tokenizer(text).input_ids) + 1 for text in texts) / len(texts)


def describe(rows: Sequence[Row], tokens: float) -> str:
    header = ["update", "loss, seen", "gain, seen", "… per name", "loss, held out", "gain, held out", "… per name"]
    lines = [
        [
            str(row.update),
            f"{row.loss_seen:.2f}",
            f"{row.gain_seen:.3f}",
            f"{row.gain_seen * tokens:.2f}",
            f"{row.loss_held_out:.2f}",
            f"{row.gain_held_out:.3f}",
            f"{row.gain_held_out * tokens:.2f}",
        ]
        for row in rows
    ]
    return (
        f"Things of training, on new grounds, and things held out. Losses and image gains in nats per token; a caption has "
        f"{tokens:.1f} labeled tokens.\n\n{table(header, lines)}"
    )
