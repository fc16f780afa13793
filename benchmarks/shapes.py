"""What is measured: model and batch shapes, and the floating-point operations that one update of them needs.

Dimensions: R rows, T tokens a row, S image slots a row, V patch tokens an image, L latents an image, E image width, D text
width.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from open_flamingo.train.flops import ModelFlops

SHAPE_FILE = "shape.json"


@dataclass(frozen=True)
class Text:
    """One dataset's batch.

    rows: R.
    tokens: T, all of them real.
    slots: S, of the reference's padded image tensor.
    images: of each row; repeated from its start where there are more rows.
    """

    rows: int
    tokens: int
    slots: int
    images: Sequence[int]

    @property
    def counts(self) -> list[int]:
        return [self.images[row % len(self.images)] for row in range(self.rows)]


@dataclass(frozen=True)
class Shape:
    """A model and its batches.

    vision: OpenCLIP's `vision_cfg` of a ViT.
    quick_gelu: whether the ViT is as OpenAI's, in this too.
    language: Hugging Face config with its `model_type`; its matrices have `vocabulary` rows, new tokens included.
    """

    name: str
    vision: dict[str, Any]
    language: dict[str, Any]
    vocabulary: int = 50_432
    cross_attn_every_n_layers: int = 1
    quick_gelu: bool = False
    laion: Text = Text(8, 32, 1, (1,))
    mmc4: Text = Text(4, 256, 6, (4, 3, 2, 1))

    @property
    def samples(self) -> int:
        """Pairs and documents an update."""
        return self.laion.rows + self.mmc4.rows

    @property
    def tokens(self) -> int:
        return self.laion.rows * self.laion.tokens + self.mmc4.rows * self.mmc4.tokens

    def write(self, folder: Path) -> None:
        (folder / SHAPE_FILE).write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, folder: Path) -> Shape:
        """What `write` wrote."""
        values = json.loads((folder / SHAPE_FILE).read_text())
        texts = {kind: Text(**values[kind]) for kind in ("laion", "mmc4")}
        return cls(**(values | texts))

    def times(self, factor: int) -> Shape:
        """The same with `factor` times as many rows."""
        laion, mmc4 = (replace(text, rows=text.rows * factor) for text in (self.laion, self.mmc4))
        return replace(self, laion=laion, mmc4=mmc4)


def vit(width: int, layers: int, patch: int, size: int = 224, head: int = 64) -> dict[str, Any]:
    return {"image_size": size, "layers": layers, "width": width, "patch_size": patch, "head_width": head}


def gpt_neox(width: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "gpt_neox",
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
        "max_position_embeddings": 2048,
        "use_parallel_residual": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
    }


def mpt(width: int, layers: int, heads: int) -> dict[str, Any]:
    return {"model_type": "mpt", "d_model": width, "n_layers": layers, "n_heads": heads, "max_seq_len": 2048}


# The batch of the published recipes, on each GPU, with 3 images a document.
RECIPE: dict[str, Any] = {
    "quick_gelu": True,
    "laion": Text(64, 32, 1, (1,)),
    "mmc4": Text(32, 256, 6, (1, 2, 3, 4, 5, 3)),
}

TOY_VIT = vit(64, 2, 32, size=64, head=32)
TOY: dict[str, Any] = {"vocabulary": 1000, "laion": Text(2, 16, 1, (1,)), "mmc4": Text(2, 32, 3, (2, 1))}

SHAPES = {
    shape.name: shape
    for shape in (
        Shape("toy", TOY_VIT, gpt_neox(64, 2, 2), **TOY),  # for the tests of this package
        Shape("toy-mpt", TOY_VIT, mpt(64, 2, 2), **TOY),
        Shape("small", vit(384, 6, 32), gpt_neox(512, 8, 8)),
        Shape("mid", vit(768, 12, 32), gpt_neox(512, 8, 8)),
        Shape("3b", vit(1024, 24, 14), mpt(2048, 24, 16), **RECIPE),
        Shape("4b", vit(1024, 24, 14), gpt_neox(2560, 32, 32), cross_attn_every_n_layers=2, **RECIPE),
        Shape("9b", vit(1024, 24, 14), mpt(4096, 32, 32), cross_attn_every_n_layers=4, **RECIPE),
    )
}

# ---------------------------------------------------------------------------------------------------------------------
# Batches


def draw_batches(
    shape: Shape, media_id: int, eoc_id: int, count: int, seed: int = 0
) -> list[dict[str, dict[str, Tensor]]]:
    """Random batches of full rows: `{"laion" | "mmc4": {"images", "input_ids", "image_counts"}}` each.

    images: uint8 [R, S, 3, size, size], zeros in slots without one. input_ids: long[R, T], with `<image>` where the first
    images stand, each followed by its text and `<|endofchunk|>`; a document has some text before its first image.
    image_counts: long[R].
    """
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "laion": _draw(shape, shape.laion, media_id, eoc_id, 0, generator),
            "mmc4": _draw(shape, shape.mmc4, media_id, eoc_id, shape.mmc4.tokens // 8, generator),
        }
        for _ in range(count)
    ]


def _draw(
    shape: Shape, text: Text, media_id: int, eoc_id: int, before: int, generator: torch.Generator
) -> dict[str, Tensor]:
    size = shape.vision["image_size"]
    input_ids = torch.randint(1, shape.vocabulary - 3, (text.rows, text.tokens), generator=generator)
    images = torch.zeros(text.rows, text.slots, 3, size, size, dtype=torch.uint8)
    for row, count in enumerate(text.counts):
        images[row, :count] = torch.randint(0, 256, (count, 3, size, size), generator=generator, dtype=torch.uint8)
        room = (text.tokens - before) // count
        for image in range(count):
            input_ids[row, before + image * room] = media_id
            if image:
                input_ids[row, before + image * room - 1] = eoc_id
        input_ids[row, -1] = eoc_id
    return {"images": images, "input_ids": input_ids, "image_counts": torch.tensor(text.counts)}


# ---------------------------------------------------------------------------------------------------------------------
# The operations that the mathematics needs


def needed_flops(shape: Shape, batch: dict[str, dict[str, Tensor]], media_id: int) -> dict[str, float]:
    """Of one update on `batch`, by part: see `train.flops`."""
    from open_flamingo.train.flops import Work  # not where the reference runs

    totals: Counter[str] = Counter()
    for rows in batch.values():
        input_ids, (count, length) = rows["input_ids"], rows["input_ids"].shape
        with_image = (input_ids == media_id).cumsum(1) > 0
        # Labels are of all tokens from the first <image> on but <image> itself; documents here have no text between
        # <|endofchunk|> and the next <image>. A label at a row's first token has nothing before it that predicts it.
        labeled = (with_image & (input_ids != media_id))[:, 1:]
        work = Work(
            images=int(rows["image_counts"].sum()),
            tokens=input_ids.numel(),
            with_image=int(with_image.sum()),
            labeled=int(labeled.sum()),
            pairs=count * length * (length + 1) // 2,
        )
        totals.update(model_flops(shape).needed(work))
    return dict(totals)


def model_flops(shape: Shape) -> ModelFlops:
    """What the sizes of `shape` need, without making the model."""
    from open_flamingo.train.flops import ModelFlops

    width, patch = shape.vision["width"], shape.vision["patch_size"]
    patches = (shape.vision["image_size"] // patch) ** 2
    positions = patches + 1  # and the class token
    vision = 2 * patches * 3 * patch**2 * width
    vision += shape.vision["layers"] * (2 * positions * 12 * width**2 + 4 * positions**2 * width)
    config = shape.language
    dim = config.get("hidden_size") or config["d_model"]
    layers = config.get("num_hidden_layers") or config["n_layers"]
    return ModelFlops(
        vision=vision,
        patches=patches,
        width=width,
        dim=dim,
        layers=layers,
        decoder=layers * 12 * dim**2,
        vocabulary=shape.vocabulary,
        gated=layers // shape.cross_attn_every_n_layers,
    )
