"""What a model says of the last image of a prompt: over shots, and where the demonstrations lie or there is nothing to see."""

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..demo.progress import Tracker, silent
from ..demo.world import render
from .documents import MAX_SHOTS, Pair, draw_pairs, draw_scene, sentence

SHOTS = (1, 2, 4, MAX_SHOTS)
CONDITIONS = ("images", "shuffled demonstrations", "blank images")
Accuracies = dict[str, list[float]]  # by condition, one for each of `SHOTS`


class Episode(NamedTuple):
    """A prompt: demonstrations, with images and words, and an image of one of their things."""

    demonstrations: list[Pair]
    query: Pair
    shuffled: list[str]  # the words of the demonstrations, none in its place

    def prompt(self, words: Sequence[str]) -> str:
        """`<image>is a dax.<|endofchunk|><image>is a`: as training has it."""
        shown = "".join(f"<image>{sentence(word)}<|endofchunk|>" for word in words)
        return f"{shown}<image>{sentence('').removesuffix(' .')}"


def draw_episode(rng: random.Random, shots: int) -> Episode:
    pairs = draw_pairs(rng, shots, held_out=True)
    words = [pair.word for pair in pairs]
    turn = rng.randrange(1, shots) if shots > 1 else 0
    return Episode(pairs, rng.choice(pairs), words[turn:] + words[:turn])


class Namer:
    """The trained model, used as anyone uses it: prompts with images → the next word, the likeliest of all tokens.

    Args:
        checkpoint: a checkpoint of the training program.
    """

    def __init__(self, checkpoint: Path) -> None:
        from open_flamingo import load

        self.model, self.image_processor, self.tokenizer = load(checkpoint, "cpu", use_local_files=True)

    @torch.inference_mode()
    def __call__(self, prompts: Sequence[Sequence[str]], images: Sequence[Sequence[np.ndarray]]) -> list[list[str]]:
        """Of each list of prompts, whose i-th has the i-th of the lists of images, the words. All prompts are equally long."""
        vision_x = torch.stack([torch.stack([self._prepare(image) for image in row]) for row in images])
        ids = [self.tokenizer(list(texts), return_tensors="pt")["input_ids"] for texts in prompts]
        self.model.cache_media(ids[0], vision_x.unsqueeze(2))  # (B, images, frames, C, H, W), encoded once
        answers = [self.model(None, row).logits[:, -1].argmax(-1) for row in ids]
        self.model.uncache_media()
        return [[text.strip() for text in self.tokenizer.batch_decode(row[:, None])] for row in answers]

    def _prepare(self, image: np.ndarray) -> Tensor:
        prepared: Any = self.image_processor(Image.fromarray(image))
        return prepared


NamesAll = Callable[[Sequence[Sequence[str]], Sequence[Sequence[np.ndarray]]], list[list[str]]]


def accuracies(namer: NamesAll, episodes: int, track: Tracker | None = None, batch_size: int = 10) -> Accuracies:
    """The share of `episodes`, by shots, in which the next word is that of the query's thing. Chance is 1 of `shots`."""
    track = track or silent()
    right = {condition: [0] * len(SHOTS) for condition in CONDITIONS}
    batches = [
        (i, min(batch_size, episodes - done)) for i in range(len(SHOTS)) for done in range(0, episodes, batch_size)
    ]
    rng = random.Random("episodes")
    for place, size in track(batches, len(batches), "held-out pairs"):
        batch = [draw_episode(rng, SHOTS[place]) for _ in range(size)]
        true = [episode.prompt([pair.word for pair in episode.demonstrations]) for episode in batch]
        shuffled = [episode.prompt(episode.shuffled) for episode in batch]
        shown = [[*episode.demonstrations, episode.query] for episode in batch]
        images = [[render(rng, draw_scene(rng, pair.thing)) for pair in row] for row in shown]
        blanks = [[render(rng, None) for _ in row] for row in shown]
        answers = [*namer([true, shuffled], images), *namer([true], blanks)]
        for condition, words in zip(CONDITIONS, answers, strict=True):
            right[condition][place] += sum(w == episode.query.word for w, episode in zip(words, batch, strict=True))
    return {condition: [count / episodes for count in counts] for condition, counts in right.items()}
