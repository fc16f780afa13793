"""`--dry_run`: what the run that these flags describe would hold, take and read, on one screen, without a GPU and without training."""

import math
import os
import shutil
import tarfile
import time
from argparse import Namespace
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import reduce
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.utils import logging as transformers_logging

from open_flamingo import Flamingo
from open_flamingo.train import estimate, parallel
from open_flamingo.train.checkpoint import files
from open_flamingo.train.data import laion, mmc4
from open_flamingo.train.data.loader import Batch, build_loader, collate
from open_flamingo.train.data.options import DataOptions, data_options
from open_flamingo.train.data.samples import DataError
from open_flamingo.train.data.shards import local_path
from open_flamingo.train.data.watched import Enough, Figures, WatchedPreparer
from open_flamingo.train.distributed import World, detect_launcher
from open_flamingo.train.errors import UserError, user_error
from open_flamingo.train.estimate import ACCELERATORS, MEMORY_USED, Accelerator, BatchSize, Passes, Strategy
from open_flamingo.train.flops import ModelFlops, Work
from open_flamingo.train.model import FLAG_OF_ARGUMENT, model_from_flags
from open_flamingo.train.precision import cast_frozen_weights
from open_flamingo.train.report import log_in_to_wandb, setup_logging
from open_flamingo.train.schedule import Plan
from open_flamingo.train.step import part_sizes

UTILIZATION = 0.4  # of a GPU's matrix rate; an H200 reached 43 % with 3B
LINK_SHARE = 0.8  # of its links' rates
SAMPLES, SECONDS = 256, 15.0  # of each dataset that are read, at most
LANES = 8  # shards that are read side by side
MAX_TOKENS = {"laion": laion.MAX_TOKENS, "mmc4": mmc4.MAX_TOKENS}
GB = 1e9


def with_unit(number: float) -> str:
    """1.2 k, 3.4 M, …"""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:,.1f} {unit}"
    return f"{number:,.0f}"


@dataclass
class Screen:
    """What is said, in lines under titles, and what will go wrong."""

    problems: list[str] = field(default_factory=list)
    _title: str = ""

    def say(self, title: str, *lines: str) -> None:
        for line in lines:
            print(f"{title if title != self._title else '':10s}{line}", flush=True)
            self._title = title


@dataclass
class PlannedRun:
    """What the flags describe."""

    args: Namespace
    plan: Plan
    options: dict[str, DataOptions]
    strategy: Strategy
    gpu: Accelerator | None
    screen: Screen
    surveys: dict[str, "Survey"] = field(default_factory=dict)
    units: tuple[estimate.Unit, ...] = ()
    checkpoint: int = 0  # bytes


def dry_run(args: Namespace) -> int:
    """Says what the run would be. Returns 0, or 1 where something will fail or is very likely wrong."""
    setup_logging(rank=0)
    transformers_logging.disable_progress_bar()
    screen = Screen()
    try:
        if not detect_launcher().is_main:
            return 0
        examine(args, screen)
    except (UserError, DataError) as error:
        screen.problems.append(str(error))
    screen.say("problems", *(screen.problems or ["none found"]))
    return 1 if screen.problems else 0


def examine(args: Namespace, screen: Screen) -> None:
    """Raises UserError where the run could not begin, and DataError where its data cannot be read."""
    with user_error("cannot start"):
        launched = detect_launcher()
        ranks = args.dry_run_ranks or launched.world_size
        on_node = None if args.dry_run_ranks else launched.local_world_size
        world = World("dry run", world_size=ranks, local_world_size=on_node or min(ranks, estimate.GPUS_OF_NODE))
        plan = Plan.from_flags(args, ranks)
        sharding = parallel.sharding_from_flags(args, world)
        strategy = Strategy("DDP", ranks, 1, False)
        if sharding is not None:
            strategy = Strategy(
                f"FSDP {args.fsdp_sharding_strategy}", ranks, sharding.shard_size, sharding.shard_frozen
            )
        planned = PlannedRun(args, plan, data_options(args, world, None), strategy, find_gpu(args.dry_run_gpu), screen)
    with user_error("cannot build the model", FLAG_OF_ARGUMENT):
        model, image_processor, tokenizer = model_from_flags(args, meta=True)
    check_weights(args, screen)
    for title, parts in part_sizes(model):
        each = ", ".join(f"{part} {count / 1e6:,.1f}" for part, count in parts.items())
        screen.say("model", f"{sum(parts.values()) / 1e6:,.1f} M parameters {title}: {each}")

    for kind, option in planned.options.items():
        planned.surveys[kind] = survey(option, tokenizer, image_processor)
        say_data(kind, planned)

    image = image_processor(Image.new("RGB", (64, 64)))
    flops = None
    with suppress(Exception):  # of a tower that cannot be counted there is no figure
        flops = ModelFlops.of(model, image)
    cast_frozen_weights(model, args.precision)
    planned.checkpoint = estimate.checkpoint_size(model)
    planned.units = estimate.unit_pieces(model, parallel.gather_dtype(args))
    say_memory(planned, model, image.shape[-2:])
    if flops is not None:
        say_time(planned, flops)
    say_disk(planned)
    say_schedule(planned)
    if args.report_to_wandb and not args.offline:
        with user_error("cannot start"):
            log_in_to_wandb()


def find_gpu(name: str | None) -> Accelerator | None:
    """That of --dry_run_gpu, else the one that is here, if it is known."""
    if name is None and torch.cuda.is_available():
        here = torch.cuda.get_device_name()
        found = next((gpu for gpu in reversed(ACCELERATORS) if gpu.name in here), None)
        return found and replace(found, memory=torch.cuda.get_device_properties(0).total_memory)
    return next((gpu for gpu in ACCELERATORS if gpu.name == name), None)


def check_weights(args: Namespace, screen: Screen) -> None:
    """The model was made without reading weights: whether those of a folder are there."""
    folder = Path(args.lm_path)
    if folder.is_dir() and not [*folder.glob("*.safetensors*"), *folder.glob("*.bin*")]:
        screen.problems.append(f"--lm_path: {folder} holds no weights (*.safetensors or *.bin)")


# ---------------------------------------------------------------------------------------------------------------------
# Data


@dataclass
class Survey:
    """What was read of a dataset."""

    tokens: list[int] = field(default_factory=list)  # of each sample
    images: list[int] = field(default_factory=list)
    positions: int = 0  # tokens and padding
    work: Work = field(default_factory=Work)
    dropped: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    figures: Figures = field(default_factory=Figures)


def survey(option: DataOptions, tokenizer: Any, image_processor: Any) -> Survey:
    """The first samples of some shards, through the ordinary loader. Raises DataError where they cannot be read."""
    found = Survey()
    rows = min(option.batch_size, SAMPLES // 4)
    changes = {"batch_size": rows, "workers": 0, "lanes": LANES, "shuffle_buffer": 1, "rank": 0, "world_size": 1}
    watched = WatchedPreparer(option, tokenizer, image_processor, number=rows)

    def add(batch: Batch) -> None:
        found.tokens += (batch.input_ids != tokenizer.pad_token_id).sum(1).tolist()
        found.images += batch.image_counts
        found.positions += batch.input_ids.numel()
        found.work = found.work.plus(batch.work)

    began = time.monotonic()
    loader = build_loader(replace(option, **changes), tokenizer, image_processor, prepare=watched)  # type: ignore[arg-type]
    with loader, suppress(Enough):
        while len(found.tokens) < SAMPLES and time.monotonic() - began < SECONDS:
            batch = next(loader)
            add(batch)
            found.dropped.update(batch.dropped)
            found.errors.update(batch.errors)
    if not watched.used:
        raise DataError(
            f"--{option.kind}_shards: none of {watched.read:,} samples can be used. {watched.counts.summary()}"
        )
    if not found.tokens:  # fewer than a batch
        add(collate([seen.sample for seen in watched.used if seen.sample], option.kind, watched.encode))
        found.dropped, found.errors = watched.counts.dropped, watched.counts.errors
    found.seconds, found.figures = time.monotonic() - began, watched.figures
    return found


def say_data(kind: str, planned: PlannedRun) -> None:
    option, found, plan, screen = planned.options[kind], planned.surveys[kind], planned.plan, planned.screen
    kept, left_out = len(found.tokens), found.dropped.total() + found.errors.total()
    paths = [path for url in option.shards if (path := local_path(url)) is not None]
    shards = f"{len(option.shards):,} shards"
    asked = plan.samples_per_epoch[kind] * plan.num_epochs
    if len(paths) == len(option.shards):
        some = paths[:: max(1, len(paths) // 4)][:4]
        samples = len(paths) * mean(count_samples(path) for path in some) * kept / max(1, kept + left_out)
        size = len(paths) * mean(os.path.getsize(path) for path in some)
        shards += f", some {with_unit(size)}B and {samples:,.0f} usable samples: the run reads each {asked / max(1.0, samples):,.2f} times"
    screen.say(kind, shards)
    reasons = ", ".join(f"{reason} {count}" for reason, count in (found.dropped + found.errors).most_common())
    screen.say(
        kind, f"of {kept + left_out} samples read, {kept} are used" + (f"; left out: {reasons}" if reasons else "")
    )
    most = sorted(found.tokens)[int(0.95 * kept)]
    cut = sum(count >= MAX_TOKENS[kind] for count in found.tokens) / max(1, kept)
    padding = 1 - found.work.tokens / max(1, found.positions)
    screen.say(
        kind,
        f"tokens {median(found.tokens):.0f} (median), {most} (95 %), {cut:.0%} reach {MAX_TOKENS[kind]} and may be cut off; "
        f"padding {padding:.0%}; images per sample {mean(found.images):.2f}; one worker here gives {kept / found.seconds:,.0f} samples/s",
    )
    quantities = {
        f"similarity of images to sentences (threshold {option.mmc4_textsim_threshold:g})": found.figures.similarities
    }
    quantities["shorter side of images, pixels"] = [min(size) for size in found.figures.sizes]
    spread = []
    for name, values in quantities.items():
        if values:
            low, middle, high = (f"{x:.3g}" if x < 100 else f"{x:.0f}" for x in np.quantile(values, (0.1, 0.5, 0.9)))
            spread.append(f"{name}: {low} (10 %), {middle} (median), {high} (90 %)")
    screen.say(kind, "; ".join(spread))
    if kept < 0.1 * (kept + left_out):
        worst = (found.dropped + found.errors).most_common(1)[0][0]
        advice = "; see --mmc4_textsim_threshold and --mmc4_min_num_images" if kind == "mmc4" else ""
        screen.problems.append(
            f"--{kind}_shards: {left_out} of {kept + left_out} samples are left out, most for {worst}{advice}"
        )


def count_samples(path: str) -> int:
    """Keys of a shard. Raises DataError where it is no tar file."""
    try:
        with tarfile.open(path, "r:*") as tar:
            return len({member.name.split(".")[0] for member in tar if member.isfile()})
    except (tarfile.TarError, OSError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


# ---------------------------------------------------------------------------------------------------------------------
# Memory, time, disk


def say_memory(planned: PlannedRun, model: Flamingo, image_size: Any) -> None:
    args, units, strategy, gpu, screen = planned.args, planned.units, planned.strategy, planned.gpu, planned.screen
    batches = [
        BatchSize(option.batch_size, MAX_TOKENS[kind], math.ceil(mean(planned.surveys[kind].images)))
        for kind, option in planned.options.items()
    ]

    def measured(recompute: bool, divisor: int = 1) -> Passes:
        model.set_gradient_checkpointing(recompute)
        sizes = [size._replace(rows=max(1, size.rows // divisor)) for size in batches]
        return estimate.measure_passes(model, args.precision, sizes, image_size, on_gpu=True)

    passes = measured(args.gradient_checkpointing)
    held, total = estimate.held(units, strategy), estimate.peak_memory(units, strategy, passes)
    limit = f" of {gpu.name}'s {gpu.memory / GB:.0f}" if gpu else ""
    screen.say(
        "memory",
        f"{total / GB:.1f} GB{limit} per rank, {strategy.name} on {strategy.ranks}: weights {held.parameters / GB:.1f}, gradients {held.gradients / GB:.1f}, "
        f"optimizer {held.optimizer / GB:.1f}, activations and buffers {(total - held.at_rest) / GB:.1f}",
    )
    other = "no --gradient_checkpointing" if args.gradient_checkpointing else "--gradient_checkpointing"
    others = {other: (strategy, measured(not args.gradient_checkpointing))}
    if strategy.shard == 1 and strategy.ranks > 1:
        others["--fsdp"] = replace(strategy, name="FSDP full", shard=strategy.ranks, frozen=True), passes
    others["half the batch (and twice --gradient_accumulation_steps)"] = (
        strategy,
        measured(args.gradient_checkpointing, 2),
    )
    totals = {name: estimate.peak_memory(units, *other) for name, other in others.items()}
    screen.say("memory", "with " + "; with ".join(f"{name} {size / GB:.1f} GB" for name, size in totals.items()))
    kept, where = planned.checkpoint, "of rank 0"
    if args.checkpoint_format == "sharded":
        kept, where = planned.checkpoint // strategy.shard, "of each rank"
    screen.say("memory", f"host memory {where} for checkpoints {kept / GB:.1f} GB")
    if gpu is not None and total > MEMORY_USED * gpu.memory:
        fitting = [name for name, size in totals.items() if size <= MEMORY_USED * gpu.memory]
        advice = f"try {' or '.join(fitting)}" if fitting else "several of the changes above together may help"
        screen.problems.append(
            f"{total / GB:.1f} GB do not fit in {MEMORY_USED:.0%} of {gpu.memory / GB:.0f} GB: {advice}"
        )


def say_time(planned: PlannedRun, flops: ModelFlops) -> None:
    args, strategy, plan, gpu, screen = planned.args, planned.strategy, planned.plan, planned.gpu, planned.screen
    options, surveys = planned.options, planned.surveys
    batches = args.gradient_accumulation_steps
    work = {
        kind: Work(*(value * option.batch_size * batches / len(surveys[kind].tokens) for value in surveys[kind].work))
        for kind, option in options.items()
    }
    whole = reduce(Work.plus, work.values())
    needed = sum(flops.needed(whole).values())
    updates = plan.num_epochs * plan.updates_per_epoch
    all_ranks = updates * strategy.ranks
    totals = f"{with_unit(whole.tokens * all_ranks)} tokens and {with_unit(whole.images * all_ranks)} images in {updates:,} updates"
    if gpu is None:
        screen.say("time", f"{needed / 1e12:,.1f} TFLOP per update and rank; {totals} (for hours, give --dry_run_gpu)")
        return
    computing = needed / (gpu.flops * UTILIZATION)
    calls = estimate.collectives(planned.units, strategy, len(options) * batches)
    sending = sum(call.seconds(gpu, LINK_SHARE) for call in calls) if strategy.ranks > 1 else 0.0
    hours = updates * (computing + sending) / 3600
    screen.say(
        "time",
        f"{needed / 1e12:,.1f} TFLOP per update and rank: {computing:.3g} s at {UTILIZATION:.0%} of {gpu.name}'s {gpu.flops / 1e12:,.0f} TFLOP/s, "
        f"and {sending:.2g} s sending, which overlaps with computing",
        f"{hours:,.2f} hours, {hours * strategy.ranks:,.1f} GPU hours for {totals}",
    )
    for kind, option in options.items():
        wanted = option.batch_size * batches / computing  # samples per second and rank
        rate = len(surveys[kind].tokens) / surveys[kind].seconds
        workers = math.ceil(wanted / rate)
        enough = "enough" if workers <= max(1, args.workers) else f"too few: {workers} on cores like these"
        screen.say("time", f"{kind}: each rank needs {wanted:,.0f} samples/s; --workers {args.workers} is {enough}")


def say_disk(planned: PlannedRun) -> None:
    args, checkpoint, screen = planned.args, planned.checkpoint, planned.screen
    folder = Path(args.run_name).absolute()
    existing = next(path for path in (folder, *folder.parents) if path.is_dir())
    free = shutil.disk_usage(existing).free
    count = 2 if args.delete_previous_checkpoint else args.num_epochs + (3 if args.save_steps else 1)
    stay = f"{count} at once" if args.delete_previous_checkpoint else f"up to {count} of them"
    screen.say(
        "disk",
        f"{checkpoint / GB:.2f} GB per checkpoint, {stay}: {count * checkpoint / GB:,.1f} GB; {free / GB:,.1f} GB are free in {existing}",
    )
    if newest := files.newest_first(folder)[:1] if folder.is_dir() else []:
        screen.say("disk", f"the run goes on from {newest[0]}")
    if count * checkpoint > free:
        screen.problems.append(
            f"the checkpoints do not fit on the disk of {existing}: --delete_previous_checkpoint keeps the newest alone"
        )


def say_schedule(planned: PlannedRun) -> None:
    args, plan, screen = planned.args, planned.plan, planned.screen
    updates = plan.num_epochs * plan.updates_per_epoch
    then = {"constant": "stays there", "linear": "falls in a line to 0", "cosine": "falls along a cosine to 0"}[
        args.lr_scheduler
    ]
    sizes = ", ".join(f"{size:,} {kind}" for kind, size in plan.samples_per_update.items())
    screen.say(
        "schedule",
        f"{plan.num_epochs} epochs of {plan.updates_per_epoch:,} updates ({sizes} samples each): the learning rate rises to {args.learning_rate:g} over "
        f"{args.warmup_steps:,} of {updates:,} and {then}",
    )
    if args.warmup_steps >= updates:
        screen.problems.append(f"--warmup_steps {args.warmup_steps} is no less than the {updates:,} updates of the run")
