"""Interleaved documents of the small world: images, a caption sentence for each, and sentences about nothing one can see."""

import random
from dataclasses import dataclass

from .world import TRAINING, Scene, caption

FILLERS = (
    "We left the house early and took the long way round.",
    "Nobody had expected so many visitors.",
    "It rained a little in the afternoon.",
    "The next one hangs by the window.",
    "My sister made tea for everyone.",
    "There was a good deal of laughter.",
    "He told the story of how he found it.",
    "The guide walked on without a word.",
    "After lunch we went back to look again.",
    "That evening I wrote all of it down.",
    "She had kept it in a drawer for years.",
    "Some of us liked it better than others did.",
)
THRESHOLD = (
    0.24  # of similarity; the published recipe's, and what CLIP gives an image and a sentence that belong together
)


@dataclass(frozen=True)
class Document:
    """A text with images, in no order: `similarity[i][s]` tells how well image i and sentence s go together."""

    sentences: list[str]
    images: list[Scene]
    similarity: list[list[float]]


def draw_document(rng: random.Random) -> Document:
    """Two or three images with their captions among as many fillers; now and then an image that no sentence is about."""
    scenes = [rng.choice(TRAINING) for _ in range(rng.randint(2, 3))]
    sentences: list[tuple[int | None, str]] = []
    for number, scene in enumerate(scenes):
        sentences += [(None, rng.choice(FILLERS))] * (rng.random() < 0.7)
        sentences.append((number, caption(scene) + "."))
    sentences += [(None, rng.choice(FILLERS))] * (rng.random() < 0.5)

    images = list(enumerate(scenes))
    if rng.random() < 0.1:
        images.append((-1, rng.choice(TRAINING)))
    rng.shuffle(images)  # MMC4's are in no order either
    similarity = [
        [round(rng.uniform(0.28, 0.36) if about == number else rng.uniform(0.05, 0.2), 4) for about, _ in sentences]
        for number, _ in images
    ]
    return Document([text for _, text in sentences], [scene for _, scene in images], similarity)
