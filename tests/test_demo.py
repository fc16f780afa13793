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
from open_flamingo.scripts.demo.world import HELD_OUT, SHAPES, TRAINING, Shape, caption, draw_scene, render
from tests.tiny import ROOT


def test_held_out_combinations_are_in_no_training_picture_or_text() -> None:
    assert set(HELD_OUT) | set(TRAINING) == set(SHAPES)
    assert not set(HELD_OUT) & set(TRAINING)
    rng = random.Random(0)
    scenes = [draw_scene(rng) for _ in range(500)]
    scenes += [scene for _ in range(200) for scene in draw_document(rng).pictures]
    assert not {shape for scene in scenes for shape in scene} & set(HELD_OUT)
    # Any two attributes of a held-out shape are seen together in training: what is new is the combination.
    for first, second in itertools.combinations(range(4), 2):
        assert {(s[first], s[second]) for s in HELD_OUT} <= {(s[first], s[second]) for s in TRAINING}


def test_the_same_seed_draws_the_same_picture() -> None:
    scene = draw_scene(random.Random(1))
    one, same, other = (render(random.Random(seed), scene) for seed in (2, 2, 3))
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)


def test_the_score_counts_attributes() -> None:
    scene = [Shape("at the top", "large", "red", "cross"), Shape("at the bottom", "small", "blue", "circle")]
    assert total_score([caption(scene)], [scene])["all"].share == 1
    assert total_score(["at the top a large red square"], [scene])["all"] == (3, 8)
    assert total_score([""], [scene])["all"] == (0, 8)
    rng = random.Random(0)
    guessed, luckiest = chance([draw_scene(rng, HELD_OUT) for _ in range(50)])
    assert 0.1 < guessed < luckiest < 0.5


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
        "when the pictures are blank",
        "is chance",
        "checkpoint_0.pt",
    ):
        assert part in run.stdout
    assert (tmp_path / "run" / "checkpoint_0.pt").exists()
    assert "data:image" in (tmp_path / "captions.html").read_text()
