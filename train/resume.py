"""From a checkpoint to a run that goes on where it stopped, and back."""

from __future__ import annotations

import argparse
import logging
import platform
from dataclasses import dataclass, field
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
    *("trust_remote_code", "dist_timeout", "save_errors"),
)


@dataclass(frozen=True)
class Plan:
    """How long the run is. Progress is counted in samples; an update is a fixed number of them."""

    samples_per_update: dict[str, int]  # of each dataset, all ranks together
    updates_per_epoch: int
    num_epochs: int

    @classmethod
    def from_flags(cls, args: argparse.Namespace, world_size: int) -> Plan:
        kinds = [kind for kind in ("laion", "mmc4") if getattr(args, f"{kind}_shards") is not None]
        ranks_and_steps = world_size * args.gradient_accumulation_steps
        sizes = {kind: getattr(args, f"batch_size_{kind}") * ranks_and_steps for kind in kinds}
        updates = min(getattr(args, f"train_num_samples_{kind}") // size for kind, size in sizes.items())
        return cls(sizes, max(1, updates), args.num_epochs)

    @property
    def total_updates(self) -> int:
        return self.updates_per_epoch * self.num_epochs


@dataclass
class Start:
    """Where this run begins."""

    step: int = 0  # updates done
    data: dict[str, LoaderState] = field(default_factory=dict)
    lanes: int | None = None  # of the run that is continued
    checkpoint: dict[str, Any] | None = None
    path: Path | None = None

    @property
    def is_sharded(self) -> bool:
        return self.path is not None and self.path.is_dir()


def snapshot(
    args: argparse.Namespace,
    world: World,
    plan: Plan,
    lanes: int,
    step: int,
    model: Flamingo,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    sources: list[Source],
    scaler: LossScaler | None = None,
) -> dict[str, Any] | None:
    """Everything that the run needs to go on after update `step`, but its weights and moments. Every rank takes part; rank 0
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
    return {
        "epoch": step // plan.updates_per_epoch - 1,
        "optimizer_parameter_names": parameter_names(model, optimizer),
        "lr_scheduler_state_dict": {"last_epoch": step, "_last_lr": scheduler.get_last_lr()},
        "loss_scaler_state_dict": None if scaler is None else scaler.state_dict(),
        "step": step,
        "updates_per_epoch": plan.updates_per_epoch,
        "samples_per_update": plan.samples_per_update,
        "data": data,
        "data_lanes": lanes,
        "shards": {source.kind: shards_digest(source.loader.dataset.order.urls) for source in sources},
        "random_states": random_states,
        "flags": {name: value for name, value in vars(args).items() if name not in _NOT_RECORDED},
        "started_from": args.resume_from_checkpoint,
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


def find_start(args: argparse.Namespace, plan: Plan) -> Start:
    """Finds the checkpoint to go on from, if there is one, and checks that this run can.

    The newest of the run's folder, or --resume_from_checkpoint: but a run that was started with that flag, and is
    started again with it, goes on from its own newest checkpoint.

    Raises ValueError, naming the difference, where the checkpoint is of another model or other data.
    """
    path = on_main(_choose, args)
    if path is None:
        return Start()
    checkpoint = checkpoints.load(path)
    start = Start(checkpoint=checkpoint, path=path)
    if "flags" not in checkpoint:  # made by the reference, or bare weights
        if "epoch" in checkpoint:
            start.step = (checkpoint["epoch"] + 1) * plan.updates_per_epoch
        log.info("starting from %s: its weights%s", path, f", after {start.step:,} updates" if start.step else "")
        return start

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

    start.step = checkpoint["step"]
    if (checkpoint["updates_per_epoch"], checkpoint["samples_per_update"]) != (
        plan.updates_per_epoch,
        plan.samples_per_update,
    ):
        start.step = _rescaled_step(checkpoint, plan)
        log.warning(
            "an update was %s samples and is now %s: update %d of the checkpoint counts as update %d",
            checkpoint["samples_per_update"],
            plan.samples_per_update,
            checkpoint["step"],
            start.step,
        )
    log.info("resuming from %s after update %d", path, start.step)
    return start


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


def _choose(args: argparse.Namespace) -> Path | None:
    folder = Path(args.run_name)
    if args.resume_from_checkpoint is None:
        found = checkpoints.newest_readable(folder)
        if found is None and checkpoints.newest_first(folder):
            raise ValueError(f"none of the checkpoints in {folder} can be read. Move them away to start anew")
        return found[0] if found else None
    for path in checkpoints.newest_first(folder):
        try:
            if checkpoints.load(path).get("started_from") == args.resume_from_checkpoint:
                checkpoints.verify(path)
                return path
        except ValueError as error:
            log.warning("%s; going back to the one before it", error)
    path = Path(args.resume_from_checkpoint)
    checkpoints.verify(path)
    return path


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


def _rescaled_step(checkpoint: dict[str, Any], plan: Plan) -> int:
    """The number of updates of this plan that have seen as many samples as the checkpoint's run."""
    epochs, within = divmod(checkpoint["step"], checkpoint["updates_per_epoch"])
    kind = next((kind for kind in plan.samples_per_update if kind in checkpoint["samples_per_update"]), None)
    if kind is not None:
        within = within * checkpoint["samples_per_update"][kind] // plan.samples_per_update[kind]
    return epochs * plan.updates_per_epoch + min(within, plan.updates_per_epoch - 1)


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
        return moment.clone()
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
