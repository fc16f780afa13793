"""The run, from top to bottom: `run` is the process around it, `train` the training itself."""

import gc
import logging
import time
from argparse import Namespace
from contextlib import ExitStack, closing, suppress
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from transformers.utils import logging as transformers_logging

from open_flamingo.train import parallel
from open_flamingo.train.checkpoint import files, resume
from open_flamingo.train.checkpoint.resume import ResumePoint, TrainState
from open_flamingo.train.checkpoint.saving import Checkpoints
from open_flamingo.train.data.images import normalization
from open_flamingo.train.data.loader import build_loader
from open_flamingo.train.data.options import DataOptions, data_options
from open_flamingo.train.data.samples import DataError
from open_flamingo.train.distributed import World, detect_launcher, distributed, raise_on_all_ranks, run_on_rank0
from open_flamingo.train.errors import UserError, user_error
from open_flamingo.train.flops import ModelFlops
from open_flamingo.train.health import BAD_BATCHES, EXIT_STOPPED, Health, Signals
from open_flamingo.train.libraries import check_libraries
from open_flamingo.train.lock import run_lock
from open_flamingo.train.metrics import measure
from open_flamingo.train.model import FLAG_OF_ARGUMENT, model_from_flags
from open_flamingo.train.optimizer import build_optimizer
from open_flamingo.train.precision import LossScaler, cast_frozen_weights, choose_kernels
from open_flamingo.train.report import Reporter, describe, log_in_to_wandb, setup_logging
from open_flamingo.train.schedule import Plan, Progress
from open_flamingo.train.step import TrainDataset, Trainer, model_parts, train_step
from open_flamingo.train.validation import Validator, build_validator
from open_flamingo.train.watchdog import Watchdog

log = logging.getLogger("open_flamingo.train")


def run(args: Namespace) -> int:
    """The process around the training. Returns its exit code."""
    setup_logging(rank=0)
    choose_kernels(args.deterministic)
    transformers_logging.disable_progress_bar()
    # Of several limits that fall together, the one with the most to say must come first: a loader that hangs (which worker, which
    # shard), then the ranks that wait for its rank (which rank, in which phase), then torch (nothing).
    limits = 1.25 * args.dist_timeout + 5, 1.25 * args.startup_timeout + 5
    try:
        with ExitStack() as stack:
            with user_error("cannot start"):
                world = detect_launcher()
                setup_logging(world.rank)
                group = distributed(
                    world,
                    args.dist_url,
                    args.dist_backend,
                    set_device=not args.no_set_device_rank,
                    group_of_one=args.fsdp or args.checkpoint_format == "sharded",
                    startup_timeout=args.startup_timeout,
                    timeout=2 * max(limits) + 60,
                )
                world = stack.enter_context(group)
            with Watchdog(world, *limits) as watchdog, ExitStack() as while_training:
                with user_error("cannot start"), raise_on_all_ranks():
                    check_libraries(world.device, args.compile)
                    if args.compile:
                        parallel.check_compiler(world.device)
                    if world.is_main:
                        while_training.enter_context(run_lock(Path(args.run_name)))
                stopped_by = train(args, world, watchdog)
                # A process whose group goes before its DDP object may abort, and DDP is part of a cycle.
                gc.collect()
    except (UserError, DataError) as error:
        log.error("%s", error)
        return 1
    return 0 if stopped_by is None else EXIT_STOPPED


def train(args: Namespace, world: World, watchdog: Watchdog) -> str | None:
    """Train to the end, or until a signal asks for a stop: then returns its name."""
    # ---------------------------------------------------------------- where to start, and how far to go
    with user_error("cannot resume"):
        start, plan = resume.find_start(args, Plan.from_flags(args, world.world_size))
        options = data_options(args, world, start.lanes)
        resume.check_shard_lists(args, start, {kind: option.shards for kind, option in options.items()})
    progress = start.progress
    first_step, last_step = progress.step, progress.step + plan.updates_left(progress)
    if first_step == last_step:
        log.info(
            "nothing left to do: %s has finished its %d epochs (%d updates). Raise --num_epochs to train on",
            *(args.run_name, args.num_epochs, last_step),
        )
        return None

    # ---------------------------------------------------------------- model, optimizer, data, reporting
    if args.report_to_wandb and not args.offline:
        with user_error("cannot start"), raise_on_all_ranks():
            if world.is_main:
                log_in_to_wandb()
    state, validator = build(args, world, watchdog, start, plan, options)
    trainer = state.trainer
    describe(state, options, first_step)
    with user_error("cannot start"), raise_on_all_ranks():
        if world.is_main and start.is_new_run:
            files.set_aside(Path(args.run_name), start.path)
        reporter = Reporter(args, world.is_main, first_step, last_step)
    watchdog.before_exit = reporter.close_after_error
    signals = Signals()
    health = Health(Path(args.run_name), signals, watchdog)
    checkpoints = Checkpoints(state, watchdog, signals.ask_to_stop, reporter.upload)

    # ---------------------------------------------------------------- loop
    began = logged = time.perf_counter()
    validating: list[float] = []  # seconds of each
    with signals, closing(checkpoints):
        # Also where a run was stopped after the save that it goes on from, and before the validation that was due there.
        due_at = first_step if validation_is_due(args, progress, last_step) else None
        if validator is not None and not run_on_rank0(reporter.has_validated, due_at):
            validating.append(validate(validator, health, reporter, first_step))
        while progress.step < last_step:
            learning_rate = plan.rate_after(progress)
            progress = plan.after_update(progress)
            step = progress.step
            health.begin(step)
            is_logged = itstime(step, args.logging_steps) or step == last_step
            gradient_norm = train_step(trainer, learning_rate, health, is_logged)
            watchdog.end_startup()
            reporter.advance()
            if is_logged:
                now = time.perf_counter() - sum(validating)
                values = {"epoch": plan.epochs_done(progress)} | measure(state, health, gradient_norm, now - logged)
                values["lr"] = plan.rate_after(progress)
                update = (now - began) / (step - first_step)  # seconds
                values["seconds_left"] = seconds_left(args, progress, last_step, update, max(validating, default=0.0))
                reporter.log(step, values)
                logged = now

            ends = step == last_step or health.stop is not None or health.consecutive_bad_steps >= args.max_bad_steps
            if ends:
                health.flush()
            if ends or itstime(step, args.save_steps) or not progress.samples:  # no samples: an epoch's end
                checkpoints.save(progress)
            if validation_is_due(args, progress, last_step) and (health.stop is None or step == last_step):
                validating.append(validate(validator, health, reporter, step))
            if ends or health.stop is not None:
                if not ends:  # a signal that came while validating
                    checkpoints.save(progress)
                break
        watchdog.set_phase("finishing the last checkpoint and the log", limited=False)
        checkpoints.finish()

    # ---------------------------------------------------------------- the end
    watchdog.set_phase("the end", limited=False)
    with raise_on_all_ranks():  # launchers end all ranks when the first has ended: let rank 0 finish its writing
        reporter.close()
        for dataset in trainer.datasets:
            dataset.close()
    return outcome(args, health, checkpoints, step, last_step)


def outcome(args: Namespace, health: Health, checkpoints: Checkpoints, step: int, last_step: int) -> str | None:
    """The name of the signal that stopped the run after `step`, None at its end. Raises UserError where it failed."""
    if checkpoints.problem is not None:
        raise UserError(f"after update {step}, {checkpoints.problem}")
    if health.consecutive_bad_steps >= args.max_bad_steps:
        raise UserError(
            f"{health.consecutive_bad_steps} updates in a row had a loss or gradient that is not finite (--max_bad_steps): saved "
            f"after update {step}, and stopped. Look at the samples in {Path(args.run_name) / BAD_BATCHES}; try a lower "
            "--learning_rate, or --precision amp_bf16 where it is fp16"
        )
    if step < last_step:
        log.info("%s: saved after update %d, and stopped. The same command goes on from there", health.stop, step)
        return health.stop
    log.info("finished: %d epochs, %d updates", args.num_epochs, last_step)
    return None


def validation_is_due(args: Namespace, progress: Progress, last_step: int) -> bool:
    if progress.step == last_step:
        return True
    # No samples: an epoch's end.
    return itstime(progress.step, args.val_steps) if args.val_steps else not progress.samples


def seconds_left(args: Namespace, progress: Progress, last_step: int, update: float, validation: float) -> float:
    """Of the run after the update that led to `progress`; a validation that is due right after it is still to come. `update` and
    `validation`: seconds of one."""
    if args.val_steps:
        begun = (progress.step - 1) // args.val_steps
        validations = last_step // args.val_steps - begun + (last_step % args.val_steps > 0)
    else:
        validations = args.num_epochs - progress.epoch + (not progress.samples)
    return (last_step - progress.step) * update + validations * validation


def validate(validator: Validator | None, health: Health, reporter: Reporter, step: int) -> float:
    """Validate and report it, unless a signal asks for a stop. Returns the seconds that it took, which are no part of training's."""
    if validator is None:
        return 0.0
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # the last update is training's
    began = time.perf_counter()
    health.begin(step)
    result = validator.run(health)
    if result is not None:
        figures, captions = result
        reporter.log_validation(step, figures | {"seconds_validating": time.perf_counter() - began}, captions)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    return time.perf_counter() - began


def itstime(step: int, every: int) -> bool:
    """Whether it is time for what happens every so many updates; 0: never."""
    return every > 0 and step % every == 0


def build(
    args: Namespace, world: World, watchdog: Watchdog, start: ResumePoint, plan: Plan, options: dict[str, DataOptions]
) -> tuple[TrainState, Validator | None]:
    """Model, optimizer and loaders, as they were when the checkpoint of `start` was made; and what validates the model. Every rank
    must call this."""
    with user_error("cannot start"):
        sharding = parallel.sharding_from_flags(args, world)
    watchdog.set_phase("building the model")
    torch.manual_seed(args.seed)
    with user_error("cannot build the model", FLAG_OF_ARGUMENT), raise_on_all_ranks():
        # Rank 0 reads the weights; the others get theirs from it.
        model, image_processor, tokenizer = model_from_flags(args, meta=not world.is_main)
        # From here on, only the ranks that still build are behind.
        watchdog.set_phase("waiting for the models of the other ranks")
    with user_error("cannot resume"), raise_on_all_ranks():
        if world.is_main:
            resume.restore_model(start, model)
    flops = None
    with suppress(Exception):  # of a tower that cannot be counted there is no figure
        flops = ModelFlops.of(model, image_processor(Image.new("RGB", (64, 64))))
    watchdog.set_phase("broadcasting weights")
    cast_frozen_weights(model, args.precision)
    parallel_model = parallel.parallelize(model, world, sharding).train()
    optimizer = build_optimizer(model, args.learning_rate, args.weight_decay)
    scaler = LossScaler(world.device) if args.precision == "fp16" else None
    with user_error("cannot resume"):
        resume.restore_optimizer(start, world, model, optimizer, scaler)
    start.checkpoint = None  # free the memory

    watchdog.set_phase("opening the data")
    with user_error("cannot load the data"):
        datasets = [
            TrainDataset(
                kind,
                weight=getattr(args, f"loss_multiplier_{kind}"),
                loader=build_loader(option, tokenizer, image_processor, start.data.get(kind)),
                normalization=normalization(image_processor),
                device=world.device,
            )
            for kind, option in options.items()
        ]

    image = image_processor(Image.new("RGB", (64, 64)))
    dummy = parallel.dummy_batch(image, model.media_token_id, model.eoc_token_id)
    parallel.warm_up_ddp(parallel_model, dummy, args.precision)
    if args.compile:
        parallel.compile_blocks(model)
    trainer = Trainer(
        model=parallel_model,
        optimizer=optimizer,
        datasets=datasets,
        precision=args.precision,
        accumulation=args.gradient_accumulation_steps,
        scaler=scaler,
        reduce_gradients=partial(parallel.reduce_gradients, parallel_model, dummy, args.precision),
        parts=model_parts(model, trained=True),
    )
    lanes = next(iter(options.values())).lanes
    state = TrainState(args, world, plan, model, trainer, lanes, start.started_from, flops)
    watchdog.set_phase("reading the validation samples")
    with user_error("cannot load the data"):
        return state, build_validator(state, tokenizer, image_processor)
