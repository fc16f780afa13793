"""LAION: one image and its caption."""

from typing import Any

from open_flamingo.train.data.images import ImagePreparer
from open_flamingo.train.data.lanes import Counts, Randomness, RawSample
from open_flamingo.train.data.samples import Drop, Sample, SampleError, check_suffixes
from open_flamingo.train.data.text import TextEncoder

MAX_TOKENS = 32
IMAGE_SUFFIXES = ("jpg", "png", "jpeg")  # the first that exists


class LaionPreparer:
    """Raw sample (`jpg`, `png` or `jpeg`, and `txt`) → `<image>{caption}<|endofchunk|>{eos}` and one image.

    Drops `no_caption`, `no_image`, `image_too_large`; errors `unknown_suffix`, `bad_caption` (not UTF-8) and `corrupt_image`.
    """

    def __init__(self, tokenizer: Any, prepare_image: ImagePreparer) -> None:
        self.encode = TextEncoder(tokenizer, MAX_TOKENS)
        self.prepare_image = prepare_image

    def __call__(self, raw: RawSample, randomness: Randomness, counts: Counts) -> Sample:
        image = next((raw[suffix] for suffix in IMAGE_SUFFIXES if suffix in raw), None)
        if image is None or "txt" not in raw:
            check_suffixes(raw, (*IMAGE_SUFFIXES, "txt"))
            raise Drop("no_image" if "txt" in raw else "no_caption")
        if self.prepare_image.exceeds_max_pixels(image):
            raise Drop("image_too_large")
        try:
            caption = raw["txt"].decode("utf-8").strip()
        except UnicodeDecodeError as error:
            raise SampleError("bad_caption", str(error)) from error
        input_ids = self.encode(["", caption])
        pixels = self.prepare_image(image, flip=randomness.flip(0))
        return Sample([pixels], input_ids, f"{raw['__url__']}#{raw['__key__']}")
