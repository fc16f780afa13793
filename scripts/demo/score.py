"""How much of a caption is right."""

import random
from collections.abc import Sequence
from typing import NamedTuple

from .world import ATTRIBUTES, COLOURS, FORMS, PLACES, SIZES, Shape, caption, draw_scene

VOCABULARY = {"place": PLACES, "size": tuple(SIZES), "colour": tuple(COLOURS), "form": FORMS}


class Score(NamedTuple):
    right: int
    total: int

    @property
    def share(self) -> float:
        return self.right / self.total if self.total else 0.0


def parse(text: str) -> list[dict[str, str]]:
    """The attributes that each phrase of a caption names: what is not said is not there."""
    shapes = []
    for phrase in text.strip().removesuffix(".").split(" and "):
        words = phrase.split()
        shape = {name: value for name in ("size", "colour", "form") for value in VOCABULARY[name] if value in words}
        shape.update(("place", place) for place in PLACES if place in phrase)
        if shape:
            shapes.append(shape)
    return shapes


def score(text: str, scene: Sequence[Shape]) -> dict[str, Score]:
    """By attribute: how many the caption has right, its first phrase against the first shape and so on.

    A shape without a phrase, or a phrase without a shape, is four wrong attributes.
    """
    said = parse(text)
    total = max(len(said), len(scene))
    right = {
        name: sum(phrase.get(name) == getattr(shape, name) for phrase, shape in zip(said, scene, strict=False))
        for name in ATTRIBUTES
    }
    return {name: Score(right[name], total) for name in ATTRIBUTES}


def total_score(texts: Sequence[str], scenes: Sequence[Sequence[Shape]]) -> dict[str, Score]:
    """By attribute, and "all", over many pictures."""
    scores = [score(text, scene) for text, scene in zip(texts, scenes, strict=True)]
    totals = {name: Score(*map(sum, zip(*(each[name] for each in scores), strict=True))) for name in ATTRIBUTES}
    return {**totals, "all": Score(*map(sum, zip(*totals.values(), strict=True)))}


def chance(scenes: Sequence[Sequence[Shape]], guesses: int = 200, seed: int = 0) -> tuple[float, float]:
    """The shares of attributes right for who sees no picture, but knows how often training says what.

    Returns the mean over captions drawn as training draws them, each given as the answer for every scene; and that of the
    luckiest of them.
    """
    rng = random.Random(f"chance {seed}")
    shares = [total_score([caption(draw_scene(rng))] * len(scenes), scenes)["all"].share for _ in range(guesses)]
    return sum(shares) / len(shares), max(shares)
