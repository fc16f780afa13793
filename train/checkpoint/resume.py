"""From a checkpoint to a run that goes on where it stopped, and back."""

import argparse
import logging
import platform
from contextlib import suppress
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from open_flamingo import Flamingo
from open_flamingo.train.arguments import DATA_FLAGS, MODEL_FLAGS
from open_flamingo.train.checkpoint import files, sharded
from open_flamingo.train.data.shards import shards_digest
from open_flamingo.train.data.workers import LoaderState
from open_flamingo.train.distributed import World, gather_objects, run_on_rank0
from open_flamingo.train.flops import ModelFlops
from open_flamingo.train.optimizer import trained_parameters
from open_flamingo.train.precision import LossScaler
from open_flamingo.train.schedule import Plan, Progress
from open_flamingo.train.step import Trainer
from open_flamingo.weights import ROWS

log = logging.getLogger(__name__)

# Where the run happens and what it reports is not part of what it computes.
_NOT_RECORDED = (
    *("run_name", "resume_from_checkpoint", "report_to_wandb", "wandb_project", "wandb_entity", "offline"),
    *("trust_remote_code", "dist_timeout", "startup_timeout", "save_errors"),
    *("val_laion_shards", "val_mmc4_shards", "val_samples", "val_steps", "val_captions"),
)


@dataclass(frozen=True)
class TrainState:
    """What a checkpoint is made of."""

    args: argparse.Namespace
    world: World
    plan: Plan
    model: Flamingo  # not wrapped
    trainer: Trainer
    lanes: int  # see `data.options.resolve_lanes`
    started_from: str | None = None  # the fingerprint of the checkpoint that the run began with, if it began with one
    flops: ModelFlops | None = None


@dataclass
class ResumePoint:
    """Where this run begins."""

    progress: Progress = field(default_factory=Progress)
    data: dict[str, LoaderState] = field(default_factory=dict)
    lanes: int | None = None  # of the run that is continued
    checkpoint: dict[str, Any] | None = None
    path: Path | None = None
    started_from: str | None = None  # see `TrainState`
    is_new_run: bool = True  # it does not go on from a checkpoint of its own


def resume_state(state: TrainState, progress: Progress) -> dict[str, Any] | None:
    """Everything that the run needs to go on, but its weights and moments. Every rank takes part; rank 0 gets it, others None."""
    plan, trainer, scaler = state.plan, state.trainer, state.trainer.scaler
    batches = {dataset.kind: dataset.last for dataset in trainer.datasets if dataset.last is not None}
    cursors = gather_objects({kind: batch.cursors for kind, batch in batches.items()})
    # Samples do not depend on these: their randomness is a function of the seed.
    cuda_state = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    random_states = gather_objects({"cpu": torch.get_rng_state(), "cuda": cuda_state})
    if not state.world.is_main:
        return None
    lanes_read = {kind: {lane: at for rank in cursors for lane, at in rank[kind].items()} for kind in batches}
    versions = {"python": platform.python_version()}
    for package in ("open_flamingo", "torch", "transformers", "open_clip_torch", "webdataset"):
        with suppress(PackageNotFoundError):  # run from a checkout that is not installed
            versions[package] = version(package)
    groups = trainer.optimizer.param_groups
    return {
        "epoch": progress.epoch - 1,
        "optimizer_parameter_names": [*trained_parameters(state.model, trainer.optimizer)],
        # As the reference's LambdaLR reads it. Here the rate is a function of the samples seen.
        "lr_scheduler_state_dict": {
            "last_epoch": progress.step,
            "_step_count": progress.step + 1,
            "_last_lr": [group["lr"] for group in groups],
            "base_lrs": [group["initial_lr"] for group in groups],
            "lr_lambdas": [None] * len(groups),
        },
        "loss_scaler_state_dict": None if scaler is None else scaler.state_dict(),
        "step": progress.step,
        "samples_in_epoch": progress.samples,
        "updates_per_epoch": plan.updates_per_epoch,
        "samples_per_update": plan.samples_per_update,
        "schedule_unit": plan.schedule_unit,
        "data": {kind: LoaderState(batch.samples, lanes_read[kind]).to_json() for kind, batch in batches.items()},
        "data_lanes": state.lanes,
        "shards": {d.kind: shards_digest(d.loader.urls) for d in trainer.datasets if d.loader is not None},
        "random_states": random_states,
        "flags": {name: value for name, value in vars(state.args).items() if name not in _NOT_RECORDED},
        "started_from": state.started_from,
        "versions": versions,
    }


def find_start(args: argparse.Namespace, plan: Plan) -> tuple[ResumePoint, Plan]:
    """Where the run goes on, and its plan on the schedule of the run that is continued.

    That is the newest checkpoint of its folder, or --resume_from_checkpoint: but a run that was started with that flag, and is
    started again with it, goes on from its own newest. Raises ValueError, naming the difference, where the checkpoint is of another
    model or other data.
    """
    path, started_from = run_on_rank0(_select_checkpoint, args)
    if path is None:
        return ResumePoint(), plan
    checkpoint, given = files.load(path), args.resume_from_checkpoint
    is_new_run = given is not None and path.resolve() == Path(given).resolve()
    start = ResumePoint(checkpoint=checkpoint, path=path, started_from=started_from, is_new_run=is_new_run)
    if "flags" not in checkpoint:  # made by the reference, or bare weights
        epoch = checkpoint.get("epoch", -1) + 1
        start.progress = Progress(epoch * plan.updates_per_epoch, epoch)
        log.info("starting from %s: its weights%s", path, f", after {epoch:,} epochs" if epoch else "")
        return start, plan

    saved, now = checkpoint["flags"], vars(args)
    changed = {
        name: f"--{name} was {saved[name]!r} and is now {now[name]!r}"
        for name in MODEL_FLAGS + DATA_FLAGS
        if name in saved and saved[name] != now[name]
    }
    data_changes = [changed[name] for name in DATA_FLAGS if name in changed]
    start.lanes = checkpoint["data_lanes"]
    if args.data_lanes not in (None, start.lanes):
        data_changes.append(f"--data_lanes was {start.lanes} and is now {args.data_lanes}")
    start.data = {kind: LoaderState.from_json(state) for kind, state in checkpoint["data"].items()}
    _reject(args, start, [changed[name] for name in MODEL_FLAGS if name in changed], data_changes)

    # Earlier versions stored neither of the two.
    updates_in_epoch = checkpoint["step"] % checkpoint["updates_per_epoch"]
    saved_size = checkpoint["samples_per_update"]
    counted = {kind: updates_in_epoch * size for kind, size in saved_size.items() if updates_in_epoch}
    samples = checkpoint.get("samples_in_epoch", counted)
    unit = checkpoint.get("schedule_unit", saved_size)
    start.progress = Progress(checkpoint["step"], checkpoint["epoch"] + 1, samples)
    if unit.keys() == plan.schedule_unit.keys():
        plan = replace(plan, schedule_unit=unit)
    if saved_size != plan.samples_per_update:
        message = "an update was %s samples and is now %s: epochs, warm-up and schedule go on from the same samples"
        log.warning(message, saved_size, plan.samples_per_update)
    log.info("resuming from %s after update %d", path, start.progress.step)
    return start, plan


def check_shard_lists(args: argparse.Namespace, start: ResumePoint, shards: dict[str, Any]) -> None:
    """Compares `shards`, the list of URLs of each dataset, with what the checkpoint of `start` was trained on: its cursors count in
    that list. (Where the flags differed already, `start` has no data.) Raises ValueError as `find_start` does."""
    if start.checkpoint is None or not start.data:
        return
    saved = start.checkpoint.get("shards", {})
    advice = "files have come or gone, or a list was edited; put them back as they were"
    changes = [
        f"--{kind}_shards found {saved[kind]} and now finds {digest}: {advice}"
        for kind, urls in shards.items()
        if kind in saved and saved[kind] != (digest := shards_digest(urls))
    ]
    _reject(args, start, [], changes)


def _select_checkpoint(args: argparse.Namespace) -> tuple[Path | None, str | None]:
    """The checkpoint to go on from, and the fingerprint of the one that the run began with."""
    folder, given = Path(args.run_name), args.resume_from_checkpoint
    # Earlier versions stored the path.
    started_from: tuple[str, ...] = () if given is None else (files.fingerprint(Path(given)), given)
    if (found := files.newest_readable(folder, started_from)) is not None:
        return found[0], started_from[0] if started_from else found[1].get("started_from")
    if given is not None:
        files.verify(Path(given))
        return Path(given), started_from[0]
    if files.newest_first(folder):
        raise ValueError(f"none of the checkpoints in {folder} can be read. Move them away to start over")
    return None, None


def _reject(args: argparse.Namespace, start: ResumePoint, model_changes: list[str], data_changes: list[str]) -> None:
    """Raises ValueError where anything has changed, unless --allow_changed_flags: then data that changed start from their beginning."""
    changes = "; ".join(model_changes + data_changes)
    if changes and not args.allow_changed_flags:
        raise ValueError(
            f"{start.path} belongs to another run: {changes}. Give the flags as they were, choose another --run_name, or pass "
            "--allow_changed_flags if this is meant"
        )
    if changes:
        log.warning("going on from %s although %s", start.path, changes)
    if data_changes:
        start.data, start.lanes = {}, None
        log.warning("the data start from their beginning, since they are not those of %s", start.path)


def restore_model(start: ResumePoint, model: Flamingo) -> None:
    """Puts the weights of `start` into the model, before it is spread over the ranks; rank 0 alone needs to. (Those of a sharded
    checkpoint come with the optimizer's state.) Raises ValueError, naming the parameter, where they are of another model."""
    if start.checkpoint is None or "model_state_dict" not in start.checkpoint:
        return
    incompatible = model.load_state_dict(start.checkpoint["model_state_dict"], strict=False)
    if wrong := incompatible.unexpected_keys + incompatible.missing_keys:
        raise ValueError(
            f"{start.path} is of another model: {len(wrong)} parameters do not match, the first {wrong[0]}. Compare "
            "--lm_path, --vision_encoder_path and --cross_attn_every_n_layers"
        )


def restore_optimizer(
    start: ResumePoint, world: World, model: Flamingo, optimizer: Optimizer, scaler: LossScaler | None
) -> None:
    """Puts the state of `start` into the optimizer, the loss scaler and the random generators of this rank; and, of a sharded
    checkpoint, the weights. Raises ValueError, naming the parameter, where the checkpoint's optimizer trains other parameters."""
    checkpoint = start.checkpoint
    if checkpoint is None or start.path is None:
        return
    if "flags" not in checkpoint:
        if "optimizer_state_dict" in checkpoint:
            moments = _moments_of_reference(checkpoint["optimizer_state_dict"], model, optimizer)
            if not moments:
                log.warning("%s: its optimizer state does not fit this model; the optimizer starts over", start.path)
            _load_moments(optimizer, moments)
        return
    saved_names, names = checkpoint["optimizer_parameter_names"], [*trained_parameters(model, optimizer)]
    if saved_names != names:
        changed = sorted(set(saved_names) ^ set(names)) or names
        raise ValueError(f"{start.path}: its optimizer trains other parameters, the first {changed[0]}")
    if "optimizer_state_dict" in checkpoint:
        _load_moments(optimizer, checkpoint["optimizer_state_dict"]["state"])
    else:
        sharded.load(start.path, model, optimizer)
    if scaler is not None and checkpoint.get("loss_scaler_state_dict") is not None:
        scaler.load_state_dict(checkpoint["loss_scaler_state_dict"])
    if len(checkpoint["random_states"]) == world.world_size:
        random_state = checkpoint["random_states"][world.rank]
        torch.set_rng_state(random_state["cpu"])
        if random_state["cuda"] is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(random_state["cuda"])


def _load_moments(optimizer: Optimizer, moments: dict[int, dict[str, Any]]) -> None:
    """Loads copies of whole `moments`, by parameter's index, each sharded as its parameter is. All settings stay those of the flags."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, torch.Tensor]] = {index: {} for index in moments}
    for index, of in moments.items():
        for key, value in of.items():
            parameter = parameters[index]
            # On the CPU a copy of what is mapped from the file; to a GPU it goes straight from there.
            moment = torch.as_tensor(value).to(parameter.device, copy=True)
            if isinstance(parameter, DTensor) and moment.ndim > 0:  # the number of steps is never sharded
                # Every rank has the file, and takes its own part of it: nothing is sent.
                moment = distribute_tensor(moment, parameter.device_mesh, parameter.placements, src_data_rank=None)
            state[index][key] = moment
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _moments_of_reference(theirs: dict, model: Flamingo, optimizer: Optimizer) -> dict[int, dict[str, Any]]:
    """The moments of the reference's AdamW for our parameters, none where they are not of this model. It numbers parameters as
    `build_optimizer` does, and trains the whole embedding matrix, with the gradient of other rows than the new ones set to zero: the
    moments of our rows are rows of its moments."""
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    if sizes != [len(group["params"]) for group in theirs.get("param_groups", ())]:
        return {}
    moments = {}
    for index, (name, parameter) in enumerate(trained_parameters(model, optimizer).items()):
        moments[index] = dict(theirs["state"].get(index, {}))
        for key in ("exp_avg", "exp_avg_sq"):
            moment = moments[index].get(key)
            if moment is not None and name.endswith(ROWS):
                moment = moment[model.get_submodule(name.removesuffix(ROWS)).new_ids.to(moment.device)]
            if moment is None or moment.shape != parameter.shape:
                return {}
            moments[index][key] = moment
    return moments
