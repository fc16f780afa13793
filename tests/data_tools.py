"""What the data tests share: the goldens' tokenizer, a standard image processor, and batches taken apart into rows."""

from __future__ import annotations

import functools
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from open_clip.transform import image_transform
from transformers import AutoTokenizer

from open_flamingo.train.data.lanes import Counts, Randomness
from open_flamingo.train.data.loader import Batch, Loader, build_loader
from open_flamingo.train.data.options import DataOptions
from open_flamingo.train.data.workers import LoaderState

GOLDEN = Path(__file__).parent / "golden"
EOC, MEDIA, PAD, EOS = 1000, 1001, 1002, 0


@functools.cache
def tokenizer() -> Any:
    result = AutoTokenizer.from_pretrained(GOLDEN / "common" / "tokenizer_base")
    result.add_special_tokens({"additional_special_tokens": ["<|endofchunk|>", "<image>"]})
    result.add_special_tokens({"pad_token": "<PAD>"})
    return result


@functools.cache
def image_processor(size: int = 224) -> Any:
    return image_transform(size, is_train=False)


def raw_samples(path: Path) -> dict[str, dict[str, Any]]:
    """The files of a tar by key, as webdataset groups them."""
    samples: dict[str, dict[str, Any]] = {}
    with tarfile.open(path) as tar:
        for member in tar:
            key, suffix = member.name.split(".", 1)
            sample = samples.setdefault(key, {"__key__": key, "__url__": str(path)})
            file = tar.extractfile(member)
            assert file is not None
            sample[suffix.lower()] = file.read()
    return samples


@dataclass(frozen=True)
class Fixed(Randomness):
    """No flip, and a coin that always falls the same way."""

    key: tuple[object, ...] = ()
    value: float = 0.6

    def coin(self) -> float:
        return self.value

    def flip(self, image: int) -> bool:
        return False


NO_COUNTS = Counts()


def loader(kind: str, shards: Any, state: LoaderState | None = None, size: int = 32, **options: Any) -> Loader:
    """A loader of small pictures, 4 samples a batch unless told."""
    chosen = DataOptions(kind, shards, **{"batch_size": 4, "workers": 0, **options})
    return build_loader(chosen, tokenizer(), image_processor(size), state)


def rows(batch: Batch) -> list[tuple[str, list[int], list[int], torch.Tensor]]:
    """(key, ids, labels, images) of each row, without padding."""
    result = []
    for row, key in enumerate(batch.keys):
        length, count = int((batch.input_ids[row] != PAD).sum()), batch.image_counts[row]
        assert int((batch.input_ids[row] == MEDIA).sum()) == count
        assert not batch.images[row, count:].any()
        assert (batch.input_ids[row, length:] == PAD).all()
        assert (batch.labels[row, length:] == -100).all()
        images = batch.images[row, :count].clone()
        result.append((key, batch.input_ids[row, :length].tolist(), batch.labels[row, :length].tolist(), images))
    return result


def same(a: list[Any], b: list[Any]) -> bool:
    """Whether two lists of `rows` are equal, images included."""
    return len(a) == len(b) and all(x[:3] == y[:3] and torch.equal(x[3], y[3]) for x, y in zip(a, b, strict=True))
