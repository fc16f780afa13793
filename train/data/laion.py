"""LAION: one image and its caption."""

import json
from typing import Any

from open_flamingo.train.data.images import ImagePreparer
from open_flamingo.train.data.lanes import Counts, Randomness, RawSample
from open_flamingo.train.data.samples import Drop, Sample, SampleError, check_suffixes
from open_flamingo.train.data.text import TextEncoder

MAX_TOKENS = 32
IMAGE_SUFFIXES = ("jpg", "png", "jpeg")  # the first that exists


class LaionPreparer:
    """Raw sample (`jpg`, `png` or `jpeg`, and `txt`; beside a `json`, `webp` too) → `<image>{caption}<|endofchunk|>{eos}` and one image.

    Without a `txt`, the caption is `caption` in the `json` that img2dataset writes. Drops `no_caption`, `no_image`,
    `image_too_large`; errors `unknown_suffix`, `bad_caption` (not UTF-8, no JSON) and `corrupt_image`.
    """

    def __init__(self, tokenizer: Any, prepare_image: ImagePreparer) -> None:
        self.encode = TextEncoder(tokenizer, MAX_TOKENS)
        self.prepare_image = prepare_image

    def __call__(self, raw: RawSample, randomness: Randomness, counts: Counts) -> Sample:
        # The reference drops samples of a webp; those of img2dataset, which have a json, are meant to be trained on.
        suffixes = (*IMAGE_SUFFIXES, "webp") if "json" in raw else IMAGE_SUFFIXES
        image = next((raw[suffix] for suffix in suffixes if suffix in raw), None)
        caption = self._caption(raw)
        if image is None or caption is None:
            check_suffixes(raw, (*IMAGE_SUFFIXES, "txt"))
            raise Drop("no_caption" if caption is None else "no_image")
        if self.prepare_image.exceeds_max_pixels(image):
            raise Drop("image_too_large")
        input_ids = self.encode(["", caption])
        pixels = self.prepare_image(image, flip=randomness.flip(0))
        return Sample([pixels], input_ids, f"{raw['__url__']}#{raw['__key__']}")

    def _caption(self, raw: RawSample) -> str | None:
        try:
            if "txt" in raw:
                return raw["txt"].decode("utf-8").strip()
            if "json" not in raw:
                return None
            # Numbers as floats: one of a million digits takes hours to become an int.
            fields = json.loads(raw["json"], parse_int=float)
            caption = fields.get("caption") if isinstance(fields, dict) else None
            if isinstance(caption, str):
                caption.encode()  # a lone half of a surrogate pair (\ud800): no tokenizer takes it
                return caption.strip()
            return None
        except (ValueError, RecursionError) as error:  # UnicodeError is a ValueError
            raise SampleError("bad_caption", str(error)) from error
