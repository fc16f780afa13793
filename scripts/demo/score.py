"""How much of a caption is right."""

import random
from collections.abc import Sequence
from typing import NamedTuple

from .world import ATTRIBUTES, FORMS, TRAINING, VOCABULARY, Scene, caption


class Score(NamedTuple):
    right: int
    total: int

    @property
    def share(self) -> float:
        return self.right / self.total if self.total else 0.0


def parse(text: str) -> dict[str, str]:
    """The attributes that a caption names: what is not said, or is said twice, is not there."""
    singular = {plural: form for form, plural in FORMS.items()}
    words = [singular.get(word, word) for word in text.strip().removesuffix(".").split()]
    text = " ".join(words)
    named = {
        name: [value for value in values if (value in words if name != "place" else value in text)]
        for name, values in VOCABULARY.items()
    }
    return {name: values[0] for name, values in named.items() if len(values) == 1}


def total_score(texts: Sequence[str], scenes: Sequence[Scene]) -> dict[str, Score]:
    """By attribute, and "all": how many of the captions name it as it is."""
    said = [parse(text) for text in texts]
    right = {
        name: sum(words.get(name) == getattr(scene, name) for words, scene in zip(said, scenes, strict=True))
        for name in ATTRIBUTES
    }
    totals = {name: Score(right[name], len(scenes)) for name in ATTRIBUTES}
    return {**totals, "all": Score(sum(right.values()), len(scenes) * len(ATTRIBUTES))}


def chance(scenes: Sequence[Scene], guesses: int = 200, seed: int = 0) -> tuple[float, float]:
    """The shares of attributes right for who sees no image, but knows what training says.

    Returns the mean over captions of training, each given as the answer for every scene; and that of the luckiest of them.
    """
    rng = random.Random(f"chance {seed}")
    captions = [caption(rng.choice(TRAINING)) for _ in range(guesses)]
    shares = [total_score([text] * len(scenes), scenes)["all"].share for text in captions]
    return sum(shares) / len(shares), max(shares)
