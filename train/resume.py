"""From a checkpoint to a run that goes on where it stopped, and back."""

from __future__ import annotations

import argparse
import logging
import platform
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor, distribute_tensor

from open_flamingo import Flamingo
from open_flamingo.train import checkpoint as checkpoints
from open_flamingo.train import sharded
from open_flamingo.train.arguments import DATA_FLAGS, MODEL_FLAGS
from open_flamingo.train.data.loader import LoaderState
from open_flamingo.train.data.shards import shards_digest
from open_flamingo.train.distributed import World, gather_objects, on_main
from open_flamingo.train.optimizer import parameter_names
from open_flamingo.train.precision import LossScaler
from open_flamingo.train.step import Source
from open_flamingo.weights import ROWS

log = logging.getLogger(__name__)

# Where the run happens and what it reports is not part of what it computes.
_NOT_RECORDED = (
    *("run_name", "resume_from_checkpoint", "report_to_wandb", "wandb_project", "wandb_entity", "offline"),
    *("trust_remote_code", "dist_timeout", "startup_timeout", "save_errors"),
)


@dataclass(frozen=True)
class Plan:
    """How long the run is, counted in samples: their number per update may change when it is resumed on other ranks.

    Attributes:
        samples_per_update: of each dataset, all ranks together.
        samples_per_epoch: of each dataset, as the flags say; an epoch is as many whole updates as fit, at least one.
        schedule_unit: the samples per update with which the run began. Warm-up and schedule are counted in updates of
            this size, so that they stay where they were in the data.
    """

    samples_per_update: dict[str, int]
    samples_per_epoch: dict[str, int]
    num_epochs: int
    schedule_unit: dict[str, int]

    @classmethod
    def from_flags(cls, args: argparse.Namespace, world_size: int) -> Plan:
        kinds = [kind for kind in ("laion", "mmc4") if getattr(args, f"{kind}_shards") is not None]
        ranks_and_steps = world_size * args.gradient_accumulation_steps
        sizes = {kind: getattr(args, f"batch_size_{kind}") * ranks_and_steps for kind in kinds}
        samples = {kind: getattr(args, f"train_num_samples_{kind}") for kind in kinds}
        return cls(sizes, samples, args.num_epochs, sizes)

    def _updates_per_epoch(self, size: dict[str, int]) -> int:
        return max(1, min(self.samples_per_epoch[kind] // size[kind] for kind in size))

    @property
    def updates_per_epoch(self) -> int:
        return self._updates_per_epoch(self.samples_per_update)

    def updates_left_in_epoch(self, progress: Progress) -> int:
        kind = next(iter(self.samples_per_update))
        size = self.samples_per_update[kind]
        return max(1, self.updates_per_epoch - -(-progress.samples.get(kind, 0) // size))

    def updates_left(self, progress: Progress) -> int:
        """Of the whole run; 0 once it has finished."""
        epochs = self.num_epochs - progress.epoch
        return 0 if epochs <= 0 else (epochs - 1) * self.updates_per_epoch + self.updates_left_in_epoch(progress)

    def after_update(self, progress: Progress) -> Progress:
        step, epoch = progress.step + 1, progress.epoch
        if self.updates_left_in_epoch(progress) == 1:
            return Progress(step, epoch + 1)
        return Progress(step, epoch, {k: progress.samples.get(k, 0) + n for k, n in self.samples_per_update.items()})

    def epochs_done(self, progress: Progress) -> float:
        left = self.updates_left_in_epoch(progress) / self.updates_per_epoch if progress.samples else 1.0
        return round(progress.epoch + 1 - left, 4)

    def schedule_position(self, progress: Progress) -> float:
        """In updates of `schedule_unit`: on an unchanged number of ranks, the number of updates done."""
        kind = next(iter(self.schedule_unit))
        within = progress.samples.get(kind, 0) / self.schedule_unit[kind]
        return progress.epoch * self._updates_per_epoch(self.schedule_unit) + within

    @property
    def schedule_length(self) -> int:
        return self.num_epochs * self._updates_per_epoch(self.schedule_unit)


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    Attributes:
        step: updates done, of whatever size; it never goes back.
        epoch: epochs finished.
        samples: of each dataset, all ranks together, since then.
    """

    step: int = 0
    epoch: int = 0
    samples: dict[str, int] = field(default_factory=dict)


@dataclass
class Start:
    """Where this run begins."""

    progress: Progress = field(default_factory=Progress)
    data: dict[str, LoaderState] = field(default_factory=dict)
    lanes: int | None = None  # of the run that is continued
    checkpoint: dict[str, Any] | None = None
    path: Path | None = None
    started_from: str | None = None  # the fingerprint of the checkpoint that the run began with, if it began with one
    is_new_run: bool = True  # it does not go on from a checkpoint of its own

    @property
    def is_sharded(self) -> bool:
        return self.path is not None and self.path.is_dir()


def snapshot(
    args: argparse.Namespace,
    world: World,
    plan: Plan,
    lanes: int,
    progress: Progress,
    model: Flamingo,
    optimizer: torch.optim.Optimizer,
    sources: list[Source],
    scaler: LossScaler | None = None,
    started_from: str | None = None,
) -> dict[str, Any] | None:
    """Everything that the run needs to go on, but its weights and moments. Every rank takes part; rank 0
    gets it, others None."""
    cursors = gather_objects({source.kind: source.last.cursors for source in sources if source.last is not None})
    random_states = gather_objects(checkpoints.random_state())
    if not world.is_main:
        return None
    data = {}
    for source in sources:
        assert source.last is not None
        lanes_read = {lane: cursor for rank in cursors for lane, cursor in rank[source.kind].items()}
        data[source.kind] = LoaderState(source.last.samples, lanes_read).to_json()
    rates = [group["lr"] for group in optimizer.param_groups]
    return {
        "epoch": progress.epoch - 1,
        "optimizer_parameter_names": parameter_names(model, optimizer),
        # As the reference's LambdaLR reads it. Here the rate is a function of the samples seen.
        "lr_scheduler_state_dict": {
            "last_epoch": progress.step,
            "_step_count": progress.step + 1,
            "_last_lr": rates,
            "base_lrs": [group["initial_lr"] for group in optimizer.param_groups],
            "lr_lambdas": [None] * len(rates),
        },
        "loss_scaler_state_dict": None if scaler is None else scaler.state_dict(),
        "step": progress.step,
        "samples_in_epoch": progress.samples,
        "updates_per_epoch": plan.updates_per_epoch,
        "samples_per_update": plan.samples_per_update,
        "schedule_unit": plan.schedule_unit,
        "data": data,
        "data_lanes": lanes,
        "shards": {source.kind: shards_digest(source.loader.urls) for source in sources},
        "random_states": random_states,
        "flags": {name: value for name, value in vars(args).items() if name not in _NOT_RECORDED},
        "started_from": started_from,
        "versions": _versions(),
    }


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("open_flamingo", "torch", "transformers", "open_clip_torch", "webdataset"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # run from a checkout that is not installed
            continue
    return found


def find_start(args: argparse.Namespace, plan: Plan) -> tuple[Start, Plan]:
    """Finds the checkpoint to go on from, if there is one, and checks that this run can; and the plan, on the schedule of the run
    that goes on.

    The newest of the run's folder, or --resume_from_checkpoint: but a run that was started with that flag, and is
    started again with it, goes on from its own newest checkpoint.

    Raises ValueError, naming the difference, where the checkpoint is of another model or other data.
    """
    path, started_from = on_main(_choose, args)
    if path is None:
        return Start(), plan
    checkpoint = checkpoints.load(path)
    given = args.resume_from_checkpoint
    is_new_run = given is not None and path.resolve() == Path(given).resolve()
    start = Start(checkpoint=checkpoint, path=path, started_from=started_from, is_new_run=is_new_run)
    if "flags" not in checkpoint:  # made by the reference, or bare weights
        epoch = checkpoint.get("epoch", -1) + 1
        start.progress = Progress(epoch * plan.updates_per_epoch, epoch)
        log.info("starting from %s: its weights%s", path, f", after {epoch:,} epochs" if epoch else "")
        return start, plan

    flags = vars(args)
    _check(args, path, checkpoints.changed_flags(checkpoint["flags"], flags, MODEL_FLAGS))
    data_changes = list(checkpoints.changed_flags(checkpoint["flags"], flags, DATA_FLAGS))
    if args.data_lanes not in (None, checkpoint["data_lanes"]):
        data_changes.append(f"--data_lanes was {checkpoint['data_lanes']} and is now {args.data_lanes}")
    _check(args, path, data_changes)
    if data_changes:
        log.warning("the data start from their beginning, since they are not those of %s", path)
    else:
        start.lanes = checkpoint["data_lanes"]
        start.data = {kind: LoaderState.from_json(state) for kind, state in checkpoint["data"].items()}

    # Earlier versions stored neither of the two.
    updates_in_epoch = checkpoint["step"] % checkpoint["updates_per_epoch"]
    counted = {
        kind: updates_in_epoch * size for kind, size in checkpoint["samples_per_update"].items() if updates_in_epoch
    }
    samples = checkpoint.get("samples_in_epoch", counted)
    unit = checkpoint.get("schedule_unit", checkpoint["samples_per_update"])
    start.progress = Progress(checkpoint["step"], checkpoint["epoch"] + 1, samples)
    if unit.keys() == plan.schedule_unit.keys():
        plan = replace(plan, schedule_unit=unit)
    if checkpoint["samples_per_update"] != plan.samples_per_update:
        log.warning(
            "an update was %s samples and is now %s: epochs, warm-up and schedule go on from the same samples",
            checkpoint["samples_per_update"],
            plan.samples_per_update,
        )
    log.info("resuming from %s after update %d", path, start.progress.step)
    return start, plan


def check_shard_lists(args: argparse.Namespace, start: Start, shards: dict[str, Any]) -> None:
    """Compares `shards`, the list of URLs of each dataset, with what the checkpoint of `start` was trained on: its cursors count in
    that list. Where the flags were found to differ already, there is nothing to compare.

    Raises ValueError where shards have come or gone since, unless --allow_changed_flags: then the data start from the beginning.
    """
    if not start.data:
        return
    assert start.checkpoint is not None
    assert start.path is not None
    saved = start.checkpoint.get("shards", {})
    changes = [
        f"--{kind}_shards found {saved[kind]} and now finds {digest}: files have come or gone, or a list was edited; put them back "
        "as they were"
        for kind, urls in shards.items()
        if kind in saved and saved[kind] != (digest := shards_digest(urls))
    ]
    _check(args, start.path, changes)
    if changes:
        start.data = {}
        log.warning("the data start from their beginning, since they are not those of %s", start.path)


def _choose(args: argparse.Namespace) -> tuple[Path | None, str | None]:
    """The checkpoint to go on from, and the fingerprint of the one of --resume_from_checkpoint."""
    folder = Path(args.run_name)
    if args.resume_from_checkpoint is None:
        found = checkpoints.newest_readable(folder)
        if found is None and checkpoints.newest_first(folder):
            raise ValueError(f"none of the checkpoints in {folder} can be read. Move them away to start over")
        return (found[0], found[1].get("started_from")) if found else (None, None)
    path = Path(args.resume_from_checkpoint)
    started_from = checkpoints.fingerprint(path)
    for own in checkpoints.newest_first(folder):
        try:
            # Earlier versions stored the path.
            if checkpoints.load(own).get("started_from") in (started_from, args.resume_from_checkpoint):
                checkpoints.verify(own)
                return own, started_from
        except ValueError as error:
            log.warning("%s; going back to the one before it", error)
    checkpoints.verify(path)
    return path, started_from


def _check(args: argparse.Namespace, path: Path, changes: Any) -> None:
    changes = list(changes)
    if not changes:
        return
    if not args.allow_changed_flags:
        raise ValueError(
            f"{path} belongs to another run: {'; '.join(changes)}. Give the flags as they were, choose another "
            "--run_name, or pass --allow_changed_flags if this is meant"
        )
    log.warning("going on from %s although %s", path, "; ".join(changes))


def restore_model(start: Start, model: Flamingo) -> None:
    """Puts the weights of `start` into the model, before it is spread over the ranks; rank 0 alone needs to.

    Raises ValueError, naming the parameter, where the checkpoint is of another model.
    """
    checkpoint = start.checkpoint
    if checkpoint is None or start.is_sharded:
        return
    incompatible = model.load_state_dict(checkpoint["model_state_dict"], strict=False)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if wrong := [*incompatible.unexpected_keys, *(name for name in incompatible.missing_keys if name in trained)]:
        raise ValueError(
            f"{start.path} is of another model: {len(wrong)} parameters do not match, the first {wrong[0]}. Compare "
            "--lm_path, --vision_encoder_path and --cross_attn_every_n_layers"
        )


def restore_optimizer(
    start: Start,
    world: World,
    model: Flamingo,
    optimizer: torch.optim.Optimizer,
    scaler: LossScaler | None = None,
) -> None:
    """Puts the state of `start` into the optimiser, the loss scaler and the random generators of this rank; and, of a
    sharded checkpoint, the weights.

    Raises ValueError, naming the parameter, where the checkpoint's optimiser trains other parameters.
    """
    checkpoint = start.checkpoint
    if checkpoint is None:
        return
    if "flags" in checkpoint:
        saved_names, names = checkpoint["optimizer_parameter_names"], parameter_names(model, optimizer)
        if saved_names != names:
            changed = sorted(set(saved_names) ^ set(names)) or names
            raise ValueError(f"{start.path}: its optimiser trains other parameters, the first {changed[0]}")
        if start.is_sharded:
            assert start.path is not None
            sharded.load(start.path, model, optimizer)
        else:
            _load_optimizer(optimizer, checkpoint["optimizer_state_dict"])
        if scaler is not None and checkpoint.get("loss_scaler_state_dict") is not None:
            scaler.load_state_dict(checkpoint["loss_scaler_state_dict"])
        if len(checkpoint["random_states"]) == world.world_size:
            checkpoints.restore_random_state(checkpoint["random_states"][world.rank])
    elif "optimizer_state_dict" in checkpoint:
        state = _optimizer_state_of_reference(checkpoint, model, optimizer)
        if state is None:
            log.warning("%s: its optimiser state does not fit this model; the optimiser starts anew", start.path)
        else:
            _load_optimizer(optimizer, state)


def _load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Loads copies of the moments, or of this rank's part of them; learning rate and weight decay stay those of the
    flags."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments = {
        index: {key: _like(torch.as_tensor(value), parameters[index]) for key, value in of.items()}
        for index, of in state["state"].items()
    }
    settings = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict({"state": moments, "param_groups": state["param_groups"]})
    for group, setting in zip(optimizer.param_groups, settings, strict=True):
        group.update(setting)


def _like(moment: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """A copy of a whole `moment`, sharded as its parameter is. (The number of steps, a scalar, never is.)"""
    if not isinstance(parameter, DTensor) or moment.ndim == 0:
        # On the CPU a copy of what is mapped from the file; to a GPU it goes straight from there.
        return moment.to(parameter.device, copy=True)
    # Every rank has the file, and takes its own part of it: nothing is sent.
    moment = moment.to(parameter.device)
    return distribute_tensor(moment, parameter.device_mesh, parameter.placements, src_data_rank=None)


def _optimizer_state_of_reference(
    checkpoint: dict[str, Any], model: Flamingo, optimizer: torch.optim.Optimizer
) -> dict[str, Any] | None:
    """The reference's AdamW state for our parameters, or None where it is not of this model.

    The reference numbers parameters as `build_optimizer` does. It trains the whole embedding matrix with the gradient
    of other rows than the new ones set to zero, so the moments of our rows are rows of its moments.
    """
    ours = optimizer.state_dict()
    theirs = checkpoint["optimizer_state_dict"]
    sizes = [len(group["params"]) for group in ours["param_groups"]]
    if sizes != [len(group["params"]) for group in theirs.get("param_groups", ())]:
        return None
    names = parameter_names(model, optimizer)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = {}
    for index, (name, parameter) in enumerate(zip(names, parameters, strict=True)):
        moments = dict(theirs["state"].get(index, {}))
        for key in ("exp_avg", "exp_avg_sq"):
            if key not in moments:
                return None
            if name.endswith(ROWS):
                moments[key] = moments[key][model.get_submodule(name.removesuffix(ROWS)).new_ids]
            if moments[key].shape != parameter.shape:
                return None
        state[index] = moments
    return {"state": state, "param_groups": ours["param_groups"]}
