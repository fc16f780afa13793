"""Does the model look at its images? Held-out losses with each sample's own images, another's and blank ones; and captions.

Losses are means over labeled tokens, in nats per token. The samples are the first that training would accept, in file order and
without anything random, dealt to the ranks in groups that exchange images: so the figures are the same on any number of ranks.
"""

import logging
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import takewhile
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

from open_flamingo.loss import labeled_positions
from open_flamingo.train.checkpoint.resume import TrainState
from open_flamingo.train.data.images import normalization
from open_flamingo.train.data.laion import LaionPreparer
from open_flamingo.train.data.lanes import Randomness
from open_flamingo.train.data.loader import Batch, build_preparer, collate
from open_flamingo.train.data.mmc4 import Mmc4Preparer
from open_flamingo.train.data.options import DataOptions, sample_options
from open_flamingo.train.data.samples import Counts, Drop, Sample, SampleError
from open_flamingo.train.data.shards import resolve_shards
from open_flamingo.train.data.tars import read_shard
from open_flamingo.train.distributed import World, gather_objects, run_on_rank0
from open_flamingo.train.health import Health
from open_flamingo.train.precision import autocast
from open_flamingo.train.step import TrainDataset, compute_loss

log = logging.getLogger(__name__)

GROUP = 8  # samples of one forward pass, among which images are exchanged
GRAY = 128  # of blank images, where the vision encoder's input is made of bytes
MAX_CAPTION_TOKENS = 30


class NothingRandom(Randomness):
    """Every document of one image is kept, and no image is mirrored."""

    def coin(self) -> float:
        return 1.0

    def flip(self, image: int) -> bool:
        return False


def read_samples(kind: str, shards: Sequence[str], prepare: LaionPreparer | Mmc4Preparer, limit: int) -> list[Sample]:
    """The first `limit` samples of `shards` that training would accept; what is broken is logged and left out."""
    samples: list[Sample] = []
    counts = Counts()
    for url in shards:
        try:
            for raw in read_shard(url, counts):
                try:
                    samples.append(prepare(raw, NothingRandom(()), counts))
                except SampleError as error:
                    counts.error(error.reason, f"{url}#{raw['__key__']}", str(error))
                except Drop as reason:
                    counts.dropped[str(reason)] += 1
                except Exception as error:  # as while training: nothing that stands in one sample ends a run
                    counts.error("unexpected_error", f"{url}#{raw['__key__']}", f"{type(error).__name__}: {error}")
                if len(samples) == limit:
                    return samples
        except SampleError as error:
            counts.error(error.reason, url, str(error))
    if not samples:
        log.warning(
            "no sample of --val_%s_shards can be used, so there are no figures of it. %s", kind, counts.summary()
        )
    return samples


def groups_of(samples: list[Sample]) -> list[list[Sample]]:
    """Groups of `GROUP`. A last one of a single sample joins the one before it."""
    starts = list(range(0, len(samples), GROUP))
    if len(starts) > 1 and len(samples) % GROUP == 1:
        starts.pop()
    return [samples[start:end] for start, end in zip(starts, [*starts[1:], len(samples)], strict=True)]


def with_images_of_next(group: list[Sample]) -> list[Sample]:
    """Each sample with the images of the next one of the group, from their start again where those are fewer."""
    others = [*group[1:], group[0]]
    return [
        replace(sample, images=[other.images[i % len(other.images)] for i in range(len(sample.images))])
        for sample, other in zip(group, others, strict=True)
    ]


def with_blank_images(group: list[Sample]) -> list[Sample]:
    """Each sample with gray images."""
    gray = GRAY if group[0].images[0].dtype == np.uint8 else 0  # of floats, which are normalized, the mean
    return [replace(sample, images=[np.full_like(image, gray) for image in sample.images]) for sample in group]


class ValidationSet:
    """One dataset's held-out samples; all of them, the same on every rank, of which each validates on its groups."""

    def __init__(
        self,
        dataset: TrainDataset,
        samples: list[Sample],
        prepare: LaionPreparer | Mmc4Preparer,
        world: World,
        num_captions: int,
    ) -> None:
        groups = groups_of(samples)
        self.dataset = dataset
        self.images = max(len(sample.images) for sample in samples)  # the most of a sample
        self.can_exchange = len(samples) > 1
        self.first = samples[: max(1, num_captions)]
        self.groups = groups[world.rank :: world.world_size]
        self.rounds = -(-len(groups) // world.world_size)  # a sharded model needs all ranks in each forward pass
        self._encode = prepare.encode
        self.prompt = _until(prepare.encode(["", ""]), {prepare.encode.eoc_token_id})  # of captions

    def batch(self, group: list[Sample]) -> Batch:
        return collate(group, self.dataset.kind, self._encode)


class Caption(NamedTuple):
    """What the model says of an image, and what the data say."""

    key: str
    image: np.ndarray  # [3, H, W], as in `Sample.images`
    model: str
    data: str


class Validator:
    """Losses and captions of a model as it is. Training is not touched: no gradient, no random number, none of its samples."""

    def __init__(self, state: TrainState, sets: Sequence[ValidationSet], tokenizer: Any) -> None:
        self._model = state.model
        self._sets = sets
        self._tokenizer = tokenizer
        self._precision = state.args.precision
        self._is_compiled = state.args.compile
        self._num_captions = state.args.val_captions

    @torch.no_grad()
    def run(self, health: Health) -> tuple[dict[str, float | None], list[Caption]] | None:
        """Figures, None for what is not finite, and captions; None if a signal asks for a stop. Every rank must call this."""
        # Blocks are compiled for training, and would be once more for this.
        with torch.compiler.set_stance("force_eager") if self._is_compiled else nullcontext():
            result = self._run(health)
        if isinstance(self._model, FSDPModule):
            self._model.reshard()  # some parameters stay whole for a backward pass
        return result

    def _run(self, health: Health) -> tuple[dict[str, float | None], list[Caption]] | None:
        figures: dict[str, float | None] = {}
        for data in self._sets:
            means = self._losses(data, health)
            if means is None:
                return None
            figures |= means
        captions: list[Caption] = []
        captioned = self._sets[0].first[: self._num_captions]
        for start in range(0, len(captioned), GROUP):
            health.set_phase(f"captioning validation images from number {start + 1}")
            captions += self._caption(self._sets[0], captioned[start : start + GROUP])
        return figures, captions

    def _losses(self, data: ValidationSet, health: Health) -> dict[str, float | None] | None:
        kind, device, cpu = data.dataset.kind, data.dataset.device, torch.device("cpu")
        # Rows: the summed loss with own, exchanged and blank images, and the labeled tokens. Columns: images before the token.
        sums = torch.zeros(4, data.images + 1, dtype=torch.float64)
        for i in range(data.rounds):
            health.set_phase(f"validating on {kind}, {i + 1} of {data.rounds}")
            if health.asked_to_stop():
                return None
            mine = i < len(data.groups)
            group = data.groups[i] if mine else data.first[:1]
            for row, variant in enumerate((group, with_images_of_next(group), with_blank_images(group))):
                batch = data.batch(variant)
                with autocast(self._precision, device):
                    losses = compute_loss(self._model, data.dataset, batch, per_token=True)
                if not mine:
                    continue
                labeled = labeled_positions(batch.labels, cpu).positions
                before = (batch.input_ids == self._model.media_token_id).cumsum(1)[:, 1:].flatten()[labeled]
                sums[row].index_add_(0, before, losses.double().to(cpu))
                if row == 0:
                    sums[3] += torch.bincount(before, minlength=data.images + 1)
        if dist.is_initialized():
            sums = sums.to(device)
            dist.all_reduce(sums)
        own, exchanged, blank, tokens = sums.sum(1).tolist()
        figures = {f"val_loss_{kind}": own, f"image_gain_{kind}": exchanged - own, f"blank_gain_{kind}": blank - own}
        if not data.can_exchange:
            del figures[f"image_gain_{kind}"]
        means = {name: value / tokens if tokens else math.nan for name, value in figures.items()}
        if data.images > 1:
            by_image = zip(sums[0].tolist(), sums[3].tolist(), strict=True)
            means |= {f"val_loss_{kind}_image_{k}": loss / n for k, (loss, n) in enumerate(by_image) if k and n}
        return {name: value if math.isfinite(value) else None for name, value in means.items()}

    def _caption(self, data: ValidationSet, samples: list[Sample]) -> list[Caption]:
        """The likeliest token at a time, after `<image>`. Every rank captions the same images: a sharded model needs all of them."""
        media, ends = self._model.media_token_id, {self._model.eoc_token_id, self._tokenizer.eos_token_id}
        samples = [replace(sample, images=sample.images[:1]) for sample in samples]
        places = [sample.input_ids.index(media) + 1 for sample in samples]
        images = data.dataset.images(data.batch(samples)).unsqueeze(2)
        tokens = torch.tensor([data.prompt] * len(samples), device=images.device)
        for _ in range(MAX_CAPTION_TOKENS):
            with autocast(self._precision, images.device):
                logits = self._model(images, tokens, image_counts=[1] * len(samples)).logits
            tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], 1)
            said = [_until(row, ends) for row in tokens[:, len(data.prompt) :].tolist()]
            longest = len(data.prompt) + max(map(len, said))
            unfinished = torch.tensor(float(longest == tokens.shape[1]), device=images.device)
            if dist.is_initialized():
                dist.all_reduce(unfinished)
            if not unfinished:
                break
        written = [
            _until(sample.input_ids[place:], {media, *ends}) for sample, place in zip(samples, places, strict=True)
        ]
        return [
            Caption(sample.key, sample.images[0], *(self._tokenizer.decode(ids).strip() for ids in texts))
            for sample, *texts in zip(samples, said, written, strict=True)
        ]


def _until(ids: list[int], ends: set[int]) -> list[int]:
    """The ids before the first of `ends`."""
    return list(takewhile(lambda number: number not in ends, ids))


def build_validator(state: TrainState, tokenizer: Any, image_processor: Callable[..., Any]) -> Validator | None:
    """None without --val_laion_shards and --val_mmc4_shards. Every rank must call this, and reads all samples: some seconds.

    Raises ValueError, naming the flag, where a shard does not exist.
    """
    args, world = state.args, state.world
    sets = []
    for kind in ("laion", "mmc4"):
        if (spec := getattr(args, f"val_{kind}_shards")) is None:
            continue
        shards = tuple(run_on_rank0(resolve_shards, f"--val_{kind}_shards", spec, "stop"))
        options = DataOptions(kind, shards, batch_size=GROUP, **sample_options(args))
        prepare = build_preparer(options, tokenizer, image_processor)
        samples = read_samples(kind, shards, prepare, args.val_samples)
        if len({tuple(keys) for keys in gather_objects([sample.key for sample in samples])}) > 1:
            log.warning(
                "--val_%s_shards: the ranks have not read the same samples, so there are no figures of them", kind
            )
        elif samples:
            dataset = TrainDataset(kind, 1.0, None, normalization(image_processor), world.device)
            sets.append(ValidationSet(dataset, samples, prepare, world, args.val_captions))
            if len(samples) < args.val_samples:
                log.warning(
                    "--val_%s_shards have %d samples, not --val_samples %d", kind, len(samples), args.val_samples
                )
            else:
                log.info("validation: the first %d samples of --val_%s_shards", len(samples), kind)
    return Validator(state, sets, tokenizer) if sets else None
