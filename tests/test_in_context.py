"""`make in-context`: what it holds out is held out, words mean nothing outside their document, and all of it runs."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from open_flamingo.scripts.in_context.documents import (
    LENGTH,
    MOST,
    THINGS,
    WORDS,
    Pair,
    draw_document,
    draw_scene,
    generated,
    in_words,
)
from open_flamingo.scripts.in_context.language import TOKENS, known_words
from open_flamingo.scripts.in_context.plot import write_plot
from open_flamingo.scripts.in_context.score import SHOTS, accuracies, draw_episode
from tests.conftest import only_at_length
from tests.tiny import ROOT


def test_held_out_pairs_are_in_no_training_document() -> None:
    rng = random.Random(0)
    documents = [draw_document(rng) for _ in range(500)]
    seen = {pair for document in documents for pair in document}
    held_out = {pair for thing in THINGS for word in WORDS if (pair := Pair(thing, word)).is_held_out}
    assert not seen & held_out
    assert 0.2 < len(held_out) / (len(THINGS) * len(WORDS)) < 0.3
    # What is new is the pair: every thing and every word of it is common in training.
    assert {pair.thing for pair in seen} == set(THINGS)
    assert {pair.word for pair in seen} == set(WORDS)
    for shots in SHOTS:
        episode = draw_episode(rng, shots)
        assert {*episode.demonstrations, episode.query} <= held_out


def test_words_and_things_are_paired_anew_in_each_document() -> None:
    rng = random.Random(1)
    documents = [draw_document(rng) for _ in range(300)]
    for document in documents:
        assert len(document) == LENGTH
        pairs = set(document)
        assert 2 <= len(pairs) <= MOST or len(pairs) == 1
        assert len({pair.word for pair in pairs}) == len({pair.thing for pair in pairs}) == len(pairs)
    meanings = {pair.thing for document in documents for pair in document if pair.word == "dax"}
    assert len(meanings) > 12


def test_a_document_shows_each_image_before_its_sentence() -> None:
    document = [Pair(("red", "circle"), "dax"), Pair(("blue", "square"), "wug"), Pair(("red", "circle"), "dax")]
    assert in_words(document[:2]) == "red circle is a dax.<|endofchunk|>blue square is a wug.<|endofchunk|>"
    written = generated(document, [b"a", b"b", b"c"])
    assert written["example"] == "_!_IMAGE0_!_ is a dax. _!_IMAGE1_!_ is a wug. _!_IMAGE2_!_ is a dax."
    assert [i for i, is_known in enumerate(known_words(document)) if is_known] == [2 * TOKENS + 4]
    rng = random.Random(2)
    scenes = [draw_scene(rng, ("red", "circle")) for _ in range(30)]
    assert {(s.count, s.color, s.form) for s in scenes} == {("one", "red", "circle")}
    assert len({(s.size, s.place) for s in scenes}) > 3  # that which means nothing


def test_episodes_end_with_one_of_their_things() -> None:
    rng = random.Random(3)
    for shots in SHOTS:
        episode = draw_episode(rng, shots)
        assert len(episode.demonstrations) == shots
        assert episode.query in episode.demonstrations
        words = [pair.word for pair in episode.demonstrations]
        assert sorted(episode.shuffled) == sorted(words)
        assert shots == 1 or not any(a == b for a, b in zip(words, episode.shuffled))
        assert episode.prompt(words).startswith(f"<image>is a {words[0]}.<|endofchunk|><image>is a")
        assert episode.prompt(words).endswith("<image>is a")


def test_the_score_of_a_model_that_looks_and_of_one_that_does_not() -> None:
    def words_of(prompt: str) -> list[str]:
        return re.findall(r"is a (\w+)\.", prompt)

    def color_of(image: np.ndarray) -> np.ndarray:
        """Of the thing, on the dark ground."""
        bright = image[image.max(-1) > 140]
        return bright.mean(0) if len(bright) else np.zeros(3)

    def looks(
        prompts: Sequence[Sequence[str]], images: Sequence[Sequence[np.ndarray]]
    ) -> list[list[str]]:  # the word of the image of the nearest color
        answers = []
        for texts in prompts:
            row = []
            for text, shown in zip(texts, images, strict=True):
                *colors, query = (color_of(image) for image in shown)
                row.append(words_of(text)[int(np.argmin([np.abs(color - query).sum() for color in colors]))])
            answers.append(row)
        return answers

    def first(prompts: Sequence[Sequence[str]], images: Sequence[Sequence[np.ndarray]]) -> list[list[str]]:
        return [[words_of(text)[0] for text in texts] for texts in prompts]

    seeing, blind = accuracies(looks, 20), accuracies(first, 20)
    assert seeing["images"][0] == blind["images"][0] == 1.0
    assert seeing["images"][1] > 0.8 > blind["images"][1]
    assert seeing["shuffled demonstrations"][1] < 0.2
    assert seeing["blank images"][3] < 0.5


def test_the_plot_is_drawn(tmp_path: Path) -> None:
    write_plot(tmp_path / "plot.svg", SHOTS, {"documents": {"images": [1, 0.9, 0.8, 0.7]}})
    text = (tmp_path / "plot.svg").read_text()
    assert text.startswith("<svg")
    assert "trained on documents, images" in text


@only_at_length
def test_the_whole_of_it_runs(tmp_path: Path) -> None:
    """A few steps of everything: backbones, documents, the program on both of them, the table, the plot."""
    run = subprocess.run(
        [sys.executable, "-m", "open_flamingo.scripts.in_context", "--smoke", "--output", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    for part in ("trained on documents, images", "trained on pairs, blank images", "chance among the words shown"):
        assert part in run.stdout
    figures = json.loads((tmp_path / "in-context.json").read_text())
    assert set(figures["accuracy"]) == {"documents", "pairs"}
    assert (tmp_path / "in-context.svg").exists()
