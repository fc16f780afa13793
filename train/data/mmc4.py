"""MMC4: documents of sentences and images; and the synthetic (`is_gpt`) kind, where markers in the text name images.

Everything that can reject a document or an image is decided before any pixel is decoded.
"""

import json
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pybase64
from scipy.optimize import linear_sum_assignment

from open_flamingo.train.data.images import ImagePreparer
from open_flamingo.train.data.lanes import Counts, Randomness, RawSample
from open_flamingo.train.data.samples import Drop, Sample, SampleError, check_suffixes
from open_flamingo.train.data.text import TextEncoder

MAX_TOKENS = 256
MIN_KILOBYTES = 10  # images of fewer than 11,000 bytes are icons and buttons
SINGLE_IMAGE_DROPPED = 0.5  # of the documents of one image
MARKER = re.compile(r"_!_IMAGE\d+_!_")


class Matches(NamedTuple):
    """Images and sentences, one to one: three arrays of the same length."""

    images: np.ndarray  # numbers in the document's `image_info`
    sentences: np.ndarray  # numbers in its `text_list`
    similarities: np.ndarray


def match_images(similarity: Any, usable: list[int]) -> Matches:
    """Matches the images that are `usable` to sentences so that the sum of similarities is the greatest. Raises SampleError."""
    try:
        scores = np.array(similarity, dtype=float)[usable]
        # Negated rather than `maximize=True`: so that ties fall as in the reference.
        rows, places = linear_sum_assignment(-scores)
    except (IndexError, ValueError, TypeError) as error:  # a row too few, ragged, NaN
        raise SampleError("bad_similarity", str(error)) from error
    return Matches(np.array(usable)[rows], places, scores[rows, places])


@dataclass
class Mmc4Preparer:
    """Raw sample (`json`) → text with `<image>` before each image's sentence, and the images in that order.

    Images are matched to sentences one to one, so that the sum of similarities is the greatest; matches under
    `textsim_threshold` are dropped; of more than `max_num_images` the first in the text stay.

    Drops `no_image` (none that exists, over 10 KB, and not too large), `no_match` (none similar enough), `few_images` (fewer than
    `min_num_images` within 256 tokens), `single_image` (by the coin), `image_last` (nothing follows the only `<image>`); counts
    images that are `image_too_large`. Errors `no_json`, `unknown_suffix`, `bad_json`, `bad_document`, `bad_similarity`,
    `bad_base64`, `corrupt_image`.
    """

    tokenizer: Any
    prepare_image: ImagePreparer
    textsim_threshold: float = 30
    min_num_images: int = 1
    max_num_images: int = 6
    match: Callable[[Any, list[int]], Matches] = match_images

    def __post_init__(self) -> None:
        self.encode = TextEncoder(self.tokenizer, MAX_TOKENS)

    def __call__(self, raw: RawSample, randomness: Randomness, counts: Counts) -> Sample:
        synthetic, parts, images = self._read(raw, counts)
        input_ids = self.encode(parts)
        count = input_ids.count(self.encode.media_token_id)
        if count < max(1, self.min_num_images):  # without an image nothing is learned
            raise Drop("few_images")
        if count == 1 and not synthetic and randomness.coin() <= SINGLE_IMAGE_DROPPED:
            raise Drop("single_image")
        if count == 1 and input_ids[-1] == self.encode.media_token_id:
            raise Drop("image_last")
        # Images whose <image> was cut off are not decoded.
        pixels = [self.prepare_image(image, flip=randomness.flip(i)) for i, image in enumerate(images[:count])]
        return Sample(pixels, input_ids, f"{raw['__url__']}#{raw['__key__']}")

    def _read(self, raw: RawSample, counts: Counts) -> tuple[bool, list[str], list[bytes]]:
        """Whether it is of the synthetic kind, the parts of its text (see `text`), and an image for each part but the first."""
        if "json" not in raw:
            check_suffixes(raw, ("json",))
            raise SampleError("no_json", "a document is one json file")
        try:
            # All numbers as floats: a number of a million digits takes hours to become an int.
            document = json.loads(raw["json"], parse_int=float)
        except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, or a thousand brackets deep
            raise SampleError("bad_json", str(error)) from error
        try:
            synthetic = "is_gpt" in document
            parts, images = self._read_synthetic(document) if synthetic else self._read_interleaved(document, counts)
            # One space after <image> goes, as in the reference.
            parts = [parts[0], *(part.removeprefix(" ") for part in parts[1:])]
            for part in parts:
                part.encode()  # a lone half of a surrogate pair (\ud800): no tokenizer takes it
            return synthetic, parts, images
        except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
            raise SampleError("bad_document", f"{type(error).__name__}: {error}") from error

    def _read_interleaved(self, document: dict[str, Any], counts: Counts) -> tuple[list[str], list[bytes]]:
        sentences, similarity, infos = document["text_list"], document["similarity_matrix"], document["image_info"]
        if not isinstance(sentences, list):
            raise TypeError("text_list is no list")
        usable = {}
        for i, info in enumerate(infos):
            image = decode_base64(info.get("image_base64") or "")  # none: it could not be downloaded
            if len(image) // 1000 <= MIN_KILOBYTES:
                continue
            if self.prepare_image.exceeds_max_pixels(image):
                counts.dropped["image_too_large"] += 1
            else:
                usable[i] = image
        if not usable:
            raise Drop("no_image")
        matches = self.match(similarity, list(usable))
        is_similar = matches.similarities >= self.textsim_threshold
        images = dict(zip(matches.sentences[is_similar].tolist(), matches.images[is_similar]))  # by sentence
        if not images:
            raise Drop("no_match")
        chosen = sorted(images)[: self.max_num_images]
        if chosen[-1] >= len(sentences):
            raise IndexError("the similarity matrix has more columns than there are sentences")
        # No space before <image> either: the parts are joined one by one.
        parts = [" ".join(sentences[start:end]) for start, end in pairwise([0, *chosen, len(sentences)])]
        return parts, [usable[images[place]] for place in chosen]

    def _read_synthetic(self, document: dict[str, Any]) -> tuple[list[str], list[bytes]]:
        text, image_map = document["example"], document["image_map"]
        markers = MARKER.findall(text)[: self.max_num_images]
        parts = MARKER.split(text)
        parts = [part.removesuffix(" ") for part in parts[:-1]] + parts[-1:]  # no space before <image>
        images = [decode_base64(image_map[marker]["base64_image"]) for marker in markers]
        if any(self.prepare_image.exceeds_max_pixels(image) for image in images):
            raise Drop("image_too_large")  # the text speaks of it: there is no document without it
        return parts[: len(markers) + 1], images


def decode_base64(text: str) -> bytes:
    """Skips characters outside the alphabet, as the standard library does. Raises SampleError if the padding is wrong."""
    if text.startswith("b'"):  # the reference's converter wrote `str(bytes)`
        text = text[2:].removesuffix("'")
    with suppress(ValueError):
        return pybase64.b64decode(text, validate=True)
    try:
        return pybase64.b64decode(text)
    except ValueError as error:
        raise SampleError("bad_base64", str(error)) from error
