"""The demo: what it holds out is held out, its score counts what is right, and all of it runs."""

from __future__ import annotations

import itertools
import random
import subprocess
import sys
from pathlib import Path

import numpy as np

from open_flamingo.scripts.demo.documents import draw_document
from open_flamingo.scripts.demo.score import chance, total_score
from open_flamingo.scripts.demo.world import HELD_OUT, SCENES, TRAINING, Scene, caption, render
from tests.tiny import ROOT


def test_held_out_combinations_are_in_no_training_image_or_text() -> None:
    assert set(HELD_OUT) | set(TRAINING) == set(SCENES)
    assert not set(HELD_OUT) & set(TRAINING)
    rng = random.Random(0)
    documents = [draw_document(rng) for _ in range(200)]
    assert not {scene for document in documents for scene in document.images} & set(HELD_OUT)
    assert not {sentence for document in documents for sentence in document.sentences} & {
        f"{caption(s)}." for s in HELD_OUT
    }
    # Any two attributes of a held-out shape are seen together in training: what is new is the combination.
    for first, second in itertools.combinations(range(5), 2):
        assert {(s[first], s[second]) for s in HELD_OUT} <= {(s[first], s[second]) for s in TRAINING}


def test_the_same_seed_draws_the_same_image() -> None:
    scene = TRAINING[7]
    one, same, other = (render(random.Random(seed), scene) for seed in (2, 2, 3))
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)


def test_the_score_counts_attributes() -> None:
    scene = Scene("two", "large", "red", "cross", "at the top")
    assert caption(scene) == "two large red crosses at the top"
    assert total_score([caption(scene)], [scene])["all"] == (5, 5)
    assert total_score(["one large red square at the top"], [scene])["all"] == (3, 5)
    assert total_score(["two large red blue crosses at the top"], [scene])["all"] == (4, 5)
    assert total_score([""], [scene])["all"] == (0, 5)
    guessed, luckiest = chance(random.Random(0).choices(HELD_OUT, k=50))
    assert 0.2 < guessed < luckiest < 0.5


def test_the_whole_demo_runs(tmp_path: Path) -> None:
    """A few steps of everything: backbones, shards, the converter, the program on two processes, captions, the sheet."""
    run = subprocess.run(
        [sys.executable, "-m", "open_flamingo.scripts.demo", "--smoke", "--output", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    for part in (
        "model",
        "truth",
        "of attributes right",
        "when the images are blank",
        "is chance",
        "checkpoint_0.pt",
    ):
        assert part in run.stdout
    assert (tmp_path / "run" / "checkpoint_0.pt").exists()
    assert "data:image" in (tmp_path / "captions.html").read_text()
