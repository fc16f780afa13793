"""`make in-context`, or `python -m open_flamingo.scripts.in_context`: a model that learns words from the images of its prompt.

Everything is made here, and nothing downloaded: two tiny backbones (`language.py`, and the demo's vision tower) and documents in which
words name things, anew in each (`documents.py`). The ordinary training program joins the backbones twice: on documents and on pairs of an
image and its description, and on the pairs alone.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..demo.progress import Tracker
    from .score import Accuracies

from ..demo.pipeline import prepare_vision, run, say, show, training_program  # before torch: sets one thread a process

RUNS = ("documents", "pairs")  # the first has pairs too


@dataclass(frozen=True)
class Scale:
    """How much of everything."""

    vision_images: int
    vision_steps: int
    language_steps: int
    documents: int
    updates: int
    episodes: int  # by number of shots
    batch_size_laion: int = 4  # a process
    batch_size_mmc4: int = 1


FULL = Scale(vision_images=6000, vision_steps=1000, language_steps=1000, documents=500, updates=600, episodes=100)
SMOKE = Scale(vision_images=64, vision_steps=4, language_steps=4, documents=16, updates=2, episodes=4)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    scale = SMOKE if args.smoke else FULL
    folder: Path = args.output.resolve()
    started = time.monotonic()
    for stale in ("backbones", "shards", *RUNS):
        shutil.rmtree(folder / stale, ignore_errors=True)
    (folder / "backbones").mkdir(parents=True)

    from ..demo.progress import side_by_side

    say("1/3  Two small backbones; documents in which words name things by their images, anew in each")
    _, shards = side_by_side((prepare_vision, (folder, scale)), (prepare_text_and_data, (folder, scale)))
    say("2/3  The training program joins the frozen backbones: on pairs and documents, and on pairs alone")
    checkpoints = train(folder, scale, shards)
    say("3/3  New images, and pairs of a word and a thing that were in no image and no text of any stage before")
    results = dict(zip(RUNS, side_by_side(*((score, (path, scale)) for path in checkpoints)), strict=True))
    report(folder, scale, results)
    minutes, seconds = divmod(round(time.monotonic() - started), 60)
    print(f"\nAll of it took {minutes} min {seconds:02d} s.")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="in_context", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--output", type=Path, default=Path("demo-output/in-context"), help="folder for all that is made"
    )
    parser.add_argument(
        "--smoke", action="store_true", help="a few steps of everything: shows that it runs, learns nothing"
    )
    return parser.parse_args(argv)


# ---------------------------------------------------------------------------------------------------------------------
# The stages


def prepare_text_and_data(folder: Path, scale: Scale, track: Tracker) -> tuple[str, str]:
    import torch

    from .documents import write_documents
    from .language import pretrain_language_model

    torch.set_num_threads(1)
    pretrain_language_model(folder / "backbones" / "language", scale.language_steps, track)
    return write_documents(folder / "shards", scale.documents, track)


def train(folder: Path, scale: Scale, shards: tuple[str, str]) -> list[Path]:
    """The ordinary program under torchrun, on pairs and documents and then on pairs alone. Returns the checkpoints."""
    from .documents import LENGTH

    batches = 2 * scale.updates  # of two processes
    pairs = (
        *("--laion_shards", shards[1]),
        *("--batch_size_laion", str(scale.batch_size_laion)),
        *("--train_num_samples_laion", str(batches * scale.batch_size_laion)),
    )
    documents = (
        *("--mmc4_shards", shards[0]),
        *("--mmc4_max_num_images", str(LENGTH)),
        *("--batch_size_mmc4", str(scale.batch_size_mmc4)),
        *("--train_num_samples_mmc4", str(batches * scale.batch_size_mmc4)),
    )
    for name, data in zip(RUNS, ((*pairs, *documents), pairs), strict=True):
        run(
            [
                *training_program(folder / "backbones"),
                *data,
                *("--learning_rate", "2e-3"),
                *("--lr_scheduler", "cosine"),
                *("--warmup_steps", str(min(30, scale.updates // 2))),
                *("--workers", "0"),
                *("--logging_steps", "50"),
                *("--run_name", str(folder / name)),
                "--offline",
            ]
        )
    return [folder / name / "checkpoint_0.pt" for name in RUNS]


def score(checkpoint: Path, scale: Scale, track: Tracker) -> Accuracies:
    import torch

    from .score import Namer, accuracies

    torch.set_num_threads(1)
    return accuracies(Namer(checkpoint), scale.episodes, track)


def report(folder: Path, scale: Scale, results: dict[str, Accuracies]) -> None:
    """Print the table; write the figures and the plot."""
    from .plot import write_plot
    from .score import SHOTS

    rows: list[tuple[str, list[float]]] = [
        (f"trained on {name}, {condition}", values)
        for name, by_condition in results.items()
        for condition, values in by_condition.items()
    ]
    rows.append(("chance among the words shown", [1 / shots for shots in SHOTS]))
    print(f"\n{'accuracy, by demonstrations in the prompt':46}" + "".join(f"{shots:>8}" for shots in SHOTS))
    for label, values in rows:
        print(f"  {label:44}" + "".join(f"{value:>8.0%}" for value in values))
    print(f"  ({scale.episodes} prompts each)")
    figures: dict[str, Any] = {"shots": SHOTS, "episodes": scale.episodes, "accuracy": results}
    (folder / "in-context.json").write_text(json.dumps(figures, indent=2), encoding="utf-8")
    plot = folder / "in-context.svg"
    write_plot(plot, SHOTS, results)
    print(f"\nPlot        {show(str(plot))}\nCheckpoint  {show(str(folder / RUNS[0] / 'checkpoint_0.pt'))}")


if __name__ == "__main__":
    main()
