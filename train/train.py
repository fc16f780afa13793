"""Trains an OpenFlamingo-style model on LAION and MMC4 shards. `main` is the whole story, top to bottom.

Runs as a file (`torchrun ... train/train.py`), as a module (`python -m open_flamingo.train.train`) and as the command
`open-flamingo-train`.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a file: use this checkout, installed or not, and keep this folder off the path
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    import open_flamingo

    open_flamingo.__path__.append(sys.path[0])

import argparse
import gc
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from typing import TYPE_CHECKING

from open_flamingo.train.arguments import parse_args
from open_flamingo.train.libraries import check_libraries, in_versions

if TYPE_CHECKING:
    from open_flamingo.train.data.loader import DataOptions
    from open_flamingo.train.distributed import World
    from open_flamingo.train.health import Watchdog
    from open_flamingo.train.parallel import Sharding

log = logging.getLogger("open_flamingo.train")


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    # What CUDA reads when it starts. Batches differ in their numbers of images and tokens, which fragments memory.
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if args.offline:
        os.environ["HF_HUB_OFFLINE"] = "1"
    # Wrong flags have been refused. Only now what takes seconds to import.
    try:
        import open_flamingo.train.sharded  # noqa: F401  with those below, all that imports what may be gone
        from open_flamingo.train.cpu import fast_kernels
        from open_flamingo.train.data.samples import DataError
        from open_flamingo.train.distributed import distributed, find_place, together
        from open_flamingo.train.health import EXIT_STOPPED, Watchdog
        from open_flamingo.train.lock import run_lock
        from open_flamingo.train.precision import choose_kernels
        from open_flamingo.train.report import setup_logging
    except ImportError as error:
        raise SystemExit(f"cannot start: {in_versions(error)}") from error

    setup_logging(rank=0)
    choose_kernels(args.deterministic)
    try:
        with ExitStack() as stack:
            with refusing("cannot start"):
                place = find_place(args.horovod)
                setup_logging(place.rank)
                group = distributed(
                    place,
                    args.dist_url,
                    args.dist_backend,
                    not args.no_set_device_rank,
                    group_of_one=args.fsdp or args.checkpoint_format == "sharded",
                    startup_timeout=args.startup_timeout,
                    timeout=process_group_timeout(args),
                )
                world = stack.enter_context(group)
            stack.enter_context(fast_kernels(world.device, args.precision, args.compile))
            watchdog = stack.enter_context(Watchdog(world, *watchdog_limits(args)))
            with exit_on_error(world, watchdog), ExitStack() as while_training:
                with refusing("cannot start"), together():
                    check_libraries(world.device, args.compile)
                    if world.is_main:
                        while_training.enter_context(run_lock(Path(args.run_name)))
                stopped_by = train(args, world, watchdog)
    except (Refused, DataError) as error:
        log.error("%s", error)
        raise SystemExit(1) from error
    if stopped_by is not None:
        raise SystemExit(EXIT_STOPPED)


# Of several limits that fall together, the one with the most to say must come first: a loader that hangs (which worker, which shard)
# before the ranks that wait for its rank (which rank, in which phase), and these before torch (nothing).


def watchdog_limits(args: argparse.Namespace) -> tuple[float, float]:
    """Seconds that a phase may take: of the training, and before its first update is done."""
    return 1.25 * args.dist_timeout + 5, 1.25 * args.startup_timeout + 5


def process_group_timeout(args: argparse.Namespace) -> float:
    return 2 * max(watchdog_limits(args)) + 60


class Refused(RuntimeError):
    """The run cannot be what the user asked for; the message says why and what to do."""


@contextmanager
def refusing(what: str) -> Iterator[None]:
    """Turns errors that the user's input causes into one line that says at what."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise Refused(f"{what}: {error}") from error


@contextmanager
def exit_on_error(world: World, watchdog: Watchdog) -> Iterator[None]:
    """After an error the last log lines are written; a rank of several says why, or which rank is to blame, and ends here and now.

    NCCL takes a process group down with all ranks together, and they may be waiting for this one, as what this one's GPU has
    begun may be waiting for them: nobody would ever read of the error, or see the exit code.
    """
    from open_flamingo.train.data.samples import DataError
    from open_flamingo.train.health import is_of_communication

    try:
        yield
    except BaseException as error:
        watchdog.set_phase("ending after an error", limited=False)
        if world.world_size > 1:
            # torchrun ends all ranks as soon as the first has ended: let this one finish.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            blamed = watchdog.diagnose() if is_of_communication(error) else None
            log.error("%s", blamed or error, exc_info=not (blamed or isinstance(error, (Refused, DataError))))
        watchdog.before_exit()
        if world.world_size == 1:
            raise
        sys.stdout.flush()
        os._exit(1)


def train(args: argparse.Namespace, world: World, watchdog: Watchdog) -> str | None:
    """Trains to the end, or until a signal asks for a stop: then returns its name."""
    import torch
    from PIL import Image
    from transformers.utils import logging as transformers_logging

    from open_flamingo import create_model_and_transforms
    from open_flamingo.train import checkpoint
    from open_flamingo.train.data.images import normalization
    from open_flamingo.train.data.loader import build_loader
    from open_flamingo.train.distributed import gather_objects, together
    from open_flamingo.train.health import Health, Signals, check_finite
    from open_flamingo.train.optimizer import build_optimizer, learning_rate
    from open_flamingo.train.parallel import (
        check_compiler,
        compile_blocks,
        made_up_sample,
        parallelise,
        rehearse,
        synchronise,
    )
    from open_flamingo.train.precision import build_loss_scaler, hold_weights
    from open_flamingo.train.report import Reporter, describe, log_in_to_wandb, measure
    from open_flamingo.train.resume import (
        Plan,
        Progress,
        check_shard_lists,
        find_start,
        restore_model,
        restore_optimizer,
        snapshot,
    )
    from open_flamingo.train.sharded import ShardedSaver
    from open_flamingo.train.step import Source, train_update

    folder = Path(args.run_name)
    transformers_logging.disable_progress_bar()

    # ---------------------------------------------------------------- where to start, and how far to go
    if args.compile:
        with refusing("cannot compile"):
            check_compiler(world.device)
    plan = Plan.from_flags(args, world.world_size)
    with refusing("cannot resume"):
        start, plan = find_start(args, plan)
        options = data_options(args, world, start.lanes)
        check_shard_lists(args, start, {kind: option.shards for kind, option in options.items()})
        sharding = sharding_of(args, world)
    progress = start.progress
    updates_left = plan.updates_left(progress)
    total_steps = progress.step + updates_left
    if not updates_left:
        log.info(
            "nothing left to do: %s has finished its %d epochs (%d updates). Raise --num_epochs to train on",
            args.run_name,
            args.num_epochs,
            total_steps,
        )
        return None

    if args.report_to_wandb and not args.offline:
        with refusing("cannot start"), together():
            if world.is_main:
                log_in_to_wandb()

    # ---------------------------------------------------------------- model
    watchdog.set_phase("building the model")
    torch.manual_seed(args.seed)
    with refusing("cannot build the model"), together():
        # Rank 0 reads the weights; the others get theirs from it.
        model, image_processor, tokenizer = create_model_and_transforms(
            args.vision_encoder_path,
            args.vision_encoder_pretrained,
            args.lm_path,
            args.tokenizer_path or args.lm_path,
            cross_attn_every_n_layers=args.cross_attn_every_n_layers,
            use_local_files=args.offline,
            freeze_lm_embeddings=args.freeze_lm_embeddings,
            gradient_checkpointing=args.gradient_checkpointing,
            trust_remote_code=args.trust_remote_code,
            train_output_rows=args.train_output_rows,
            meta=not world.is_main,
        )
        # From here on, only the ranks that still build are behind.
        watchdog.set_phase("waiting for the models of the other ranks")
    with refusing("cannot resume"), together():
        if world.is_main:
            restore_model(start, model)
    watchdog.set_phase("broadcasting the model")
    hold_weights(model, args.precision)
    parallel_model = parallelise(model, world, sharding)
    parallel_model.train()
    optimizer = build_optimizer(model, args.learning_rate, args.weight_decay)
    scaler = build_loss_scaler(args.precision, world.device)
    with refusing("cannot resume"):
        restore_optimizer(start, world, model, optimizer, scaler)
    start.checkpoint = None  # the memory

    # ---------------------------------------------------------------- data
    watchdog.set_phase("opening the data")
    with refusing("cannot load the data"):
        sources = [
            Source(
                kind,
                weight=getattr(args, f"loss_multiplier_{kind}"),
                loader=build_loader(option, tokenizer, image_processor, start.data.get(kind)),
                normalization=normalization(image_processor),
                device=world.device,
            )
            for kind, option in options.items()
        ]

    describe(world, model, plan, options, start.progress.step, args.precision, args.run_name)
    with refusing("cannot start"), together():
        if world.is_main and start.is_new_run:
            checkpoint.set_aside(folder, start.path)
        reporter = Reporter(
            world.is_main,
            folder,
            start.progress.step,
            total_steps,
            flags=vars(args),
            tensorboard=args.report_to_tensorboard,
            wandb=args.report_to_wandb,
            wandb_project=args.wandb_project,
            wandb_entity=args.wandb_entity,
            offline=args.offline,
        )

    watchdog.before_exit = reporter.close_after_error

    # ---------------------------------------------------------------- loop
    sample = made_up_sample(image_processor(Image.new("RGB", (64, 64))), model.media_token_id, model.eoc_token_id)
    rehearse(parallel_model, sample, args.precision)
    average = partial(synchronise, parallel_model, sample, args.precision)
    if args.compile:
        compile_blocks(model)

    signals = Signals()
    is_sharded = args.checkpoint_format == "sharded"
    # Else a run that cannot save would know it only at the next save.
    failed = signals.ask_to_stop if args.save_errors == "stop" else None
    saved = reporter.upload if args.save_checkpoints_to_wandb else None
    saver: ShardedSaver | checkpoint.FileSaver
    if is_sharded:
        saver = ShardedSaver(args.delete_previous_checkpoint, failed)
    else:
        saver = checkpoint.FileSaver(args.delete_previous_checkpoint, failed, saved)
    unsaved: str | None = None  # why the last checkpoint could not be written

    def write(function: Callable[[], None]) -> None:
        """Calls `function` on every rank; where it fails on any, ends the run or only tells, as --save_errors says."""
        nonlocal unsaved
        try:
            with together():
                function()
            unsaved = None
        except (ValueError, OSError) as error:
            unsaved = f"a checkpoint could not be written: {error}. The ones before it are whole"
            if args.save_errors == "stop":
                raise Refused(f"{unsaved}. Start again when there is room (--save_errors warn trains on)") from error
            log.warning("%s; training goes on (--save_errors warn)", unsaved)

    def rate_after(progress: Progress) -> float:
        position = plan.schedule_position(progress)
        return learning_rate(args.lr_scheduler, args.learning_rate, position, args.warmup_steps, plan.schedule_length)

    def save(progress: Progress) -> None:
        if progress.samples:
            path = checkpoint.within_epoch_path(folder, progress.epoch, progress.step, is_sharded)
        else:
            path = checkpoint.epoch_end_path(folder, progress.epoch - 1, is_sharded)
        watchdog.set_phase(f"update {progress.step}, saving {path}", limited=False)
        with refusing("nothing is saved, and training ends"), together():
            check_finite(model, optimizer)
        lanes = next(iter(options.values())).lanes
        write(saver.finish)  # the one before
        for group in optimizer.param_groups:
            group["lr"] = rate_after(progress)  # of the next update, as the reference saves it
        state = snapshot(
            args, world, plan, lanes, progress, model, optimizer, sources, scaler, started_from=start.started_from
        )
        write(partial(saver.save, model, optimizer, state, path))

    health = Health(world, folder, signals, watchdog)
    began = span_began = time.perf_counter()
    with signals, closing(saver):
        while progress.step < total_steps:
            rate = rate_after(progress)
            progress = plan.after_update(progress)
            step = progress.step
            health.begin(step)
            gradient_norm = train_update(
                parallel_model,
                optimizer,
                rate,
                sources,
                args.gradient_accumulation_steps,
                args.precision,
                scaler,
                health,
                average,
            )
            watchdog.startup_is_over()
            reporter.advance()

            if step % args.logging_steps == 0 or step == total_steps:
                now = time.perf_counter()
                values = {"epoch": plan.epochs_done(progress)}
                values |= measure(world, sources, gradient_norm, rate_after(progress), now - span_began)
                values |= {f"bad_batches_{source.kind}": health.bad_batches[source.kind] for source in sources}
                if scaler is not None:
                    scaling = scaler.state_dict()
                    values |= {"grad_scale": scaling["scale"], "updates_skipped": scaling["skipped"]}
                values["seconds_left"] = (now - began) / (step - start.progress.step) * (total_steps - step)
                reporter.log(step, values)
                span_began = now

            ends = step == total_steps or health.stop is not None or health.bad_in_a_row >= args.max_bad_steps
            if ends:
                health.settle()
            due = args.save_steps and step % args.save_steps == 0
            if ends or due or not progress.samples:
                save(progress)
            if ends:
                break
        watchdog.set_phase("finishing the last checkpoint and the log", limited=False)
        write(saver.finish)

    reporter.close()
    for source in sources:
        source.loader.close()
    # Before the process group goes: a process that ends with a live DDP object, which is part of a cycle, may abort.
    del parallel_model, average
    gc.collect()
    watchdog.set_phase("the end", limited=False)
    gather_objects(None)  # launchers end all ranks when the first has ended with a code: let rank 0 finish its writing
    if unsaved is not None:
        raise Refused(f"after update {step}, {unsaved}")
    if health.bad_in_a_row >= args.max_bad_steps:
        raise Refused(
            f"{health.bad_in_a_row} updates in a row had a loss or gradient that is not finite (--max_bad_steps): saved "
            f"after update {step}, and stopped. Look at the samples in {folder / 'bad_batches.jsonl'}; try a lower "
            "--learning_rate, or --precision amp_bf16 where it is fp16"
        )
    if step < total_steps:
        log.info("%s: saved after update %d, and stopped. The same command goes on from there", health.stop, step)
        return health.stop
    log.info("finished: %d epochs, %d updates", args.num_epochs, total_steps)
    return None


def sharding_of(args: argparse.Namespace, world: World) -> Sharding | None:
    """How FSDP spreads the model, None without --fsdp."""
    from open_flamingo.train.parallel import Sharding, shard_size

    if not args.fsdp:
        return None
    if args.fsdp_use_orig_params:
        log.info("--fsdp_use_orig_params: always so")
    size = shard_size(args.fsdp_sharding_strategy, args.fsdp_shard_size, world.world_size, world.local_world_size)
    return Sharding(size, shard_frozen=args.fsdp_frozen == "shard")


def data_options(args: argparse.Namespace, world: World, saved_lanes: int | None) -> dict[str, DataOptions]:
    """What each dataset's loader needs to know. `saved_lanes`: those of the run that is continued."""
    from open_flamingo.train.data.loader import DataOptions, resolve_lanes, resolve_workers
    from open_flamingo.train.data.shards import resolve_shards
    from open_flamingo.train.distributed import on_main

    lanes = resolve_lanes(args.data_lanes or saved_lanes, world.world_size, args.workers)
    options = {}
    for kind in ("laion", "mmc4"):
        if (spec := getattr(args, f"{kind}_shards")) is None:
            continue
        batch_size = getattr(args, f"batch_size_{kind}")
        options[kind] = DataOptions(
            kind=kind,
            shards=tuple(on_main(resolve_shards, f"--{kind}_shards", spec, args.missing_shards)),
            batch_size=batch_size,
            workers=resolve_workers(args.workers, batch_size, world.world_size, lanes),
            seed=args.seed,
            lanes=lanes,
            resampled=args.dataset_resampled,
            max_image_pixels=args.max_image_pixels,
            mmc4_textsim_threshold=args.mmc4_textsim_threshold,
            mmc4_max_num_images=args.mmc4_max_num_images,
            mmc4_min_num_images=args.mmc4_min_num_images,
            shuffle_buffer=getattr(args, f"shuffle_buffer_{kind}"),
            timeout=args.dist_timeout,
            startup_timeout=args.startup_timeout,
            rank=world.rank,
            world_size=world.world_size,
        )
    return options


if __name__ == "__main__":
    main()
