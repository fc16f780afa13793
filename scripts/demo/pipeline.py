"""`make demo`, or `python -m open_flamingo.scripts.demo`: from nothing to a model that describes images, in about five minutes.

Everything is made here, and nothing downloaded: a small world (`world.py`, `documents.py`), the two backbones that know it
(`backbones.py`), and its shards (`shards.py`). What joins the backbones is the ordinary training program with ordinary flags.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .progress import Tracker

# Before torch is imported: two processes on two cores, tiny matrices.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Scale:
    """How much of everything."""

    vision_images: int
    vision_steps: int
    language_steps: int
    pairs: int
    documents: int
    updates: int
    held_out_images: int
    batch_size_laion: int = 6  # a process
    batch_size_mmc4: int = 2


FULL = Scale(
    vision_images=12_000,
    vision_steps=1500,
    language_steps=600,
    pairs=6000,
    documents=2000,
    updates=500,
    held_out_images=200,
)
SMOKE = Scale(vision_images=64, vision_steps=4, language_steps=4, pairs=48, documents=24, updates=2, held_out_images=8)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    scale = SMOKE if args.smoke else FULL
    folder: Path = args.output.resolve()
    started = time.monotonic()
    for stale in ("backbones", "shards", "mmc4-download", "run"):
        shutil.rmtree(folder / stale, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)

    say("1/4  Two small backbones, and a world to train them on: images of colored shapes, captions, documents")
    shards = prepare(folder, scale)
    say("2/4  MMC4 documents and downloaded images → shards, as for the real ones")
    shards["mmc4"] = convert(folder, shards["mmc4 download"])
    say("3/4  The training program joins the frozen backbones: two processes, LAION and MMC4 shards")
    checkpoint = train(folder, scale, shards)
    say("4/4  Captions of held-out images: of combinations in no image and no text of any stage before")
    report(folder, scale, checkpoint)
    minutes, seconds = divmod(round(time.monotonic() - started), 60)
    print(f"\nAll of it took {minutes} min {seconds:02d} s.")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="demo", description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="folder for all that is made")
    parser.add_argument(
        "--smoke", action="store_true", help="a few steps of everything: shows that it runs, learns nothing"
    )
    return parser.parse_args(argv)


def say(line: str) -> None:
    print(f"\n\033[1m{line}\033[0m" if sys.stdout.isatty() else f"\n{line}", flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# The stages


def prepare(folder: Path, scale: Scale) -> dict[str, str]:
    """Backbones and raw data, in two processes side by side. Returns where the data lie."""
    from .progress import side_by_side

    (folder / "backbones").mkdir()
    _, shards = side_by_side((prepare_vision, (folder, scale)), (prepare_text_and_data, (folder, scale)))
    return shards


def prepare_vision(folder: Path, scale: Any, track: Tracker) -> None:
    """`scale`: with `vision_steps` and `vision_images`."""
    import torch

    from .backbones import pretrain_vision_tower

    torch.set_num_threads(1)
    backbones = folder / "backbones"
    pretrain_vision_tower(
        backbones / "vision.json", backbones / "vision.pt", scale.vision_steps, scale.vision_images, track
    )


def prepare_text_and_data(folder: Path, scale: Scale, track: Tracker) -> dict[str, str]:
    import torch

    from .backbones import pretrain_language_model
    from .shards import write_laion, write_mmc4_download
    from .world import HELD_OUT

    torch.set_num_threads(1)
    pretrain_language_model(folder / "backbones" / "language", scale.language_steps, track)
    laion = write_laion(folder / "shards" / "laion", scale.pairs, max(1, scale.pairs // 16), track)
    held_out = write_laion(folder / "shards" / "held-out", scale.held_out_images, scale.held_out_images, None, HELD_OUT)
    write_mmc4_download(folder / "mmc4-download", scale.documents, track)
    return {"laion": laion, "held out": held_out, "mmc4 download": str(folder / "mmc4-download")}


def convert(folder: Path, download: str) -> str:
    """MMC4 shards out of the download, by the converter that users have. Returns their brace pattern."""
    from .shards import braces

    shards = folder / "shards" / "mmc4"
    run(
        [
            sys.executable,
            "scripts/convert_mmc4_to_wds.py",
            *("--output_dir", str(shards)),
            *("--zip_files", f"{download}/docs_shard_{{0..0}}.zip"),
            *("--image_dir", f"{download}/images"),
            *("--num_files_per_shard", "125"),
            *("--workers", "2"),
        ]
    )
    shutil.rmtree(download)
    return braces(shards, len(list(shards.glob("*.tar"))), 9)


def train(folder: Path, scale: Scale, shards: dict[str, str]) -> Path:
    """The ordinary program under torchrun. Returns the checkpoint."""
    from .documents import THRESHOLD

    batches = 2 * scale.updates  # of two processes
    run(
        [
            *training_program(folder / "backbones"),
            *("--laion_shards", shards["laion"]),
            *("--mmc4_shards", shards["mmc4"]),
            *("--mmc4_textsim_threshold", str(THRESHOLD)),
            *("--val_laion_shards", shards["held out"]),
            *("--val_steps", str(max(1, scale.updates // 4))),
            *("--batch_size_laion", str(scale.batch_size_laion)),
            *("--batch_size_mmc4", str(scale.batch_size_mmc4)),
            *("--train_num_samples_laion", str(batches * scale.batch_size_laion)),
            *("--train_num_samples_mmc4", str(batches * scale.batch_size_mmc4)),
            *("--learning_rate", "2e-3"),
            *("--lr_scheduler", "cosine"),
            *("--warmup_steps", str(min(50, scale.updates // 2))),
            *("--workers", "0"),
            *("--logging_steps", "100"),
            *("--run_name", str(folder / "run")),
            "--offline",
        ]
    )
    return folder / "run" / "checkpoint_0.pt"


def training_program(backbones: Path) -> list[str]:
    """The beginning of a command: the program under torchrun on two processes, and what it joins."""
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train/train.py"),
        *("--vision_encoder_path", str(backbones / "vision.json")),
        *("--vision_encoder_pretrained", str(backbones / "vision.pt")),
        *("--lm_path", str(backbones / "language")),
    ]


def run(command: list[str]) -> None:
    """Show a command as one would type it, and run it."""
    print("$ " + " ".join(shlex.quote(show(word)) for word in command), flush=True)
    result = subprocess.run(command, cwd=ROOT)
    if result.returncode != 0:
        sys.exit(f"this command failed with exit code {result.returncode}")


def show(word: str) -> str:
    """A word of a command, short: paths from where we are, the interpreter by its name."""
    if word == sys.executable:
        return "python"
    return word.replace(f"{Path.cwd()}{os.sep}", "")


def report(folder: Path, scale: Scale, checkpoint: Path) -> None:
    """Caption held-out images and blank ones; print what is right, and write the sheet."""
    from .captioner import Captioner
    from .score import chance, total_score
    from .sheet import write_sheet
    from .world import HELD_OUT, caption, render

    rng = random.Random("held out")
    scenes = [rng.choice(HELD_OUT) for _ in range(scale.held_out_images)]
    images = [render(rng, scene) for scene in scenes]
    blanks = [render(rng, None) for _ in scenes]

    captioner = Captioner(checkpoint)
    texts = captioner(images, "captions")
    seen = total_score(texts, scenes)
    blind = total_score(captioner(blanks, "captions of blank images"), scenes)
    guess, luckiest = chance(scenes)
    lines = [json.loads(line) for line in (checkpoint.parent / "metrics.jsonl").read_text().splitlines()]
    gain = [line["image_gain_laion"] for line in lines if "image_gain_laion" in line][-1]

    print()
    for text, scene in list(zip(texts, scenes, strict=True))[:6]:
        print(f"  model  {text}\n  truth  {caption(scene)}\n")
    by_attribute = ", ".join(f"{name} {seen[name].share:.0%}" for name in seen if name != "all")
    numbers = [
        (f"{seen['all'].share:.1%}", f"of attributes right in {len(scenes)} held-out images ({by_attribute})"),
        (f"{blind['all'].share:.1%}", "right when the images are blank"),
        (f"{guess:.1%}", f"is chance: a caption of training for all images (the luckiest of 200: {luckiest:.1%})"),
        (f"{gain:.2f}", "nats per token: what the right image is worth to it, beside another one (image gain)"),
    ]
    for value, what in numbers:
        print(f"{value:>7} {what}")
    sheet = folder / "captions.html"
    write_sheet(sheet, "Held-out images, captioned", numbers, list(zip(images, scenes, texts, strict=True))[:48])
    print(f"\nCheckpoint  {show(str(checkpoint))}\nImages      {show(str(sheet))}  (open it in a browser)")
    print(
        f"Report      {show(str(checkpoint.parent / 'report.html'))}  (losses, the worth of the image, captions over time)"
    )


if __name__ == "__main__":
    main()
