"""Documents in which unknown words name things, anew in each: "<image> is a dax. <image> is a wug. <image> is a dax."

A *thing* is a color and a form of the demo's world. Size, place and shades of an image vary and mean nothing. No word means anything
outside its document: only the images before it tell what it stands for there.

The *held-out* pairs of a word and a thing are in no document and no text of any training stage; evaluation shows nothing else.
"""

import base64
import json
import random
import zlib
from pathlib import Path
from typing import NamedTuple

import webdataset

from ..demo.progress import Tracker, silent
from ..demo.shards import braces, encode
from ..demo.world import COLORS, FORMS, TRAINING, Scene, render

THINGS = tuple((color, form) for color in COLORS for form in FORMS)
NONSENSE = """
dax wug blick fep toma zib gorp lorn kiv mup pell quof rasp snib teff vash yort brill clon drim flep glim hask jand
"""
WORDS = tuple(NONSENSE.split())
END_OF_CHUNK = "<|endofchunk|>"
MAX_SHOTS = 8
MOST = 4  # things in a training document: the fewer, the more often what is known comes again, which is what there is to learn
LENGTH = 9  # images of a training document
SHARDS = 8


class Pair(NamedTuple):
    """A thing, and the word for it in one document."""

    thing: tuple[str, str]
    word: str

    @property
    def is_held_out(self) -> bool:
        """One pair in four, by a hash: who knows which pairs training had still cannot tell a word from a thing."""
        return zlib.crc32(f"{' '.join(self.thing)} {self.word}".encode()) % 4 == 0


def draw_pairs(rng: random.Random, count: int, held_out: bool) -> list[Pair]:
    """Different things with different words, all of them held out, or none."""
    while True:
        things, words, pairs = rng.sample(THINGS, count), list(WORDS), []
        rng.shuffle(words)
        for thing in things:
            word = next((word for word in words if Pair(thing, word).is_held_out == held_out), None)
            if word is None:
                break  # all words that this thing may have are taken
            words.remove(word)
            pairs.append(Pair(thing, word))
        if len(pairs) == count:
            return pairs


def draw_document(rng: random.Random, length: int = LENGTH, most: int = MOST) -> list[Pair]:
    """A training document: two to `most` things, brought in one after the other, and those that are known again and again."""
    pairs = draw_pairs(rng, rng.randint(2, most), held_out=False)
    document = [pairs[0]]
    known = 1
    while len(document) < length:
        if known < len(pairs) and rng.random() < 0.5:
            document.append(pairs[known])
            known += 1
        else:
            document.append(rng.choice(pairs[:known]))
    return document


def sentence(word: str) -> str:
    return f"is a {word}."


def in_words(document: list[Pair]) -> str:
    """A document whose things are described rather than shown: `red circle is a dax.<|endofchunk|>blue square is a …`"""
    return "".join(f"{' '.join(pair.thing)} {sentence(pair.word)}{END_OF_CHUNK}" for pair in document)


def draw_scene(rng: random.Random, thing: tuple[str, str]) -> Scene:
    """One such thing, small or large, anywhere."""
    color, form = thing
    return rng.choice([s for s in TRAINING if s.count == "one" and s.color == color and s.form == form])


def write_documents(folder: Path, documents: int, track: Tracker | None = None, seed: int = 0) -> tuple[str, str]:
    """Write the training documents as MMC4 shards, and their images with descriptions ("red circle") as LAION shards.

    The documents are of MMC4's generated kind, whose images stand where the text says. Returns the patterns of both.
    """
    rng = random.Random(f"in context {seed}")
    mmc4_folder, laion_folder = folder / "documents", folder / "pairs"
    for kind in (mmc4_folder, laion_folder):
        kind.mkdir(parents=True)
    per_shard = -(-documents // SHARDS)
    with (
        webdataset.ShardWriter(str(mmc4_folder / "%05d.tar"), maxcount=per_shard, verbose=0) as mmc4,
        webdataset.ShardWriter(str(laion_folder / "%05d.tar"), maxcount=per_shard * LENGTH, verbose=0) as laion,
    ):
        for number in (track or silent())(range(documents), documents, "documents"):
            document = draw_document(rng)
            images = [encode(render(rng, draw_scene(rng, pair.thing))) for pair in document]
            for i, (pair, image) in enumerate(zip(document, images, strict=True)):
                laion.write({"__key__": f"{number * LENGTH + i:08d}", "jpg": image, "txt": " ".join(pair.thing)})
            mmc4.write({"__key__": f"{number:06d}", "json": json.dumps(generated(document, images)).encode()})
    shards = -(-documents // per_shard)
    return braces(mmc4_folder, shards, 5), braces(laion_folder, shards, 5)


def generated(document: list[Pair], images: list[bytes]) -> dict[str, object]:
    """A document of MMC4's generated kind, before it is written as json."""
    markers = [f"_!_IMAGE{i}_!_" for i in range(len(document))]
    return {
        "is_gpt": True,
        "example": " ".join(f"{m} {sentence(pair.word)}" for m, pair in zip(markers, document, strict=True)),
        "image_map": {
            m: {"base64_image": base64.b64encode(image).decode()} for m, image in zip(markers, images, strict=True)
        },
    }
