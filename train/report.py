"""Console, metrics.jsonl, Weights & Biases and TensorBoard, all from rank 0."""

import argparse
import json
import logging
import os
import secrets
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from open_flamingo.train.atomic import atomic_write
from open_flamingo.train.checkpoint.resume import TrainState
from open_flamingo.train.data.options import DataOptions
from open_flamingo.train.estimate import checkpoint_size
from open_flamingo.train.metrics import Concerns
from open_flamingo.train.page import CAPTIONS, IMAGES, METRICS, PAGE, STARTS, image_path, write_page
from open_flamingo.train.step import part_sizes
from open_flamingo.train.validation import Caption

log = logging.getLogger(__name__)

# Seconds that W&B and TensorBoard have after an error. torchrun kills ranks 30 s after it has asked them to end.
CLOSE_TIMEOUT = 20.0


class _AboveBar:
    """Stderr, above a progress bar."""

    def write(self, text: str) -> None:
        tqdm.write(text, file=sys.stderr, end="")

    def flush(self) -> None:
        sys.stderr.flush()


def setup_logging(rank: int) -> None:
    """Log lines on stderr, above the progress bar; other ranks than 0 log only errors, with their number."""
    handler = logging.StreamHandler(_AboveBar())
    prefix = "" if rank == 0 else f"[rank {rank}] "
    handler.setFormatter(logging.Formatter(f"{prefix}%(asctime)s %(levelname).1s %(message)s", "%H:%M:%S"))
    root = logging.getLogger("open_flamingo")
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO if rank == 0 else logging.ERROR)
    root.propagate = False


def describe(state: TrainState, options: dict[str, DataOptions], step: int) -> None:
    """Logs at the start what will happen. `step`: updates done."""
    world, plan = state.world, state.plan
    log.info("%s: %d x %s, %s", world.launcher, world.world_size, world.device.type, state.args.precision)
    for title, parts in part_sizes(state.model):
        each = ", ".join(f"{part} {count:,}" for part, count in parts.items())
        log.info("%s parameters: %s (%s)", title, f"{sum(parts.values()):,}", each)
    local = [p.to_local() if isinstance(p, DTensor) else p for p in state.model.parameters()]
    trained = sum(p.nbytes for p in local if p.requires_grad) / 1e9
    log.info(
        "memory of rank 0: weights %.2f GB, gradients %.2f GB, optimizer %.2f GB (--dry_run estimates what an update adds)",
        *(sum(p.nbytes for p in local) / 1e9, trained, 2 * trained),
    )
    log.info("a checkpoint is %.2f GB", checkpoint_size(state.model) / 1e9)
    for kind, option in options.items():
        log.info(
            "%s: %d shards, %d samples per rank and batch, %d per update, %d loader processes per rank",
            *(kind, len(option.shards), option.batch_size, plan.samples_per_update[kind], option.workers),
        )
    log.info(
        "%d epochs of %d updates, %d done; %d lanes; output in %s",
        *(plan.num_epochs, plan.updates_per_epoch, step, state.lanes, state.args.run_name),
    )


class Reporter:
    """Logs to console, metrics.jsonl, W&B and TensorBoard, from update `step` to `total_steps`. No-op unless `active`: on rank 0."""

    def __init__(self, args: argparse.Namespace, active: bool, step: int, total_steps: int) -> None:
        self._total_steps = total_steps
        self._concerns = Concerns(step)
        self._uploads = args.save_checkpoints_to_wandb
        self._places: dict[str, Any] = {}  # what is reported to, by the name that warnings have for it
        if not active:
            return
        folder = Path(args.run_name)
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        # A run that begins anew in this folder has nothing of one that ended before its first checkpoint.
        kept = step if step > 0 else -1
        self._places["metrics.jsonl"] = _lines_file(folder / METRICS, kept)
        self._places["captions.jsonl"] = _lines_file(folder / CAPTIONS, kept)
        with (folder / STARTS).open("a", encoding="utf-8") as file:
            time = datetime.now().astimezone().isoformat(" ", "seconds")
            file.write(json.dumps({"step": step, "time": time, "flags": vars(args)}) + "\n")
        self._lines_logged = 0
        self._peak_memory = 0.0  # GB
        self._has_page = (folder / PAGE).exists()
        if args.report_to_tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._places["TensorBoard"] = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        if args.report_to_wandb:
            self._places["W&B"] = _start_wandb(args, folder)
        # `disable=None`: a bar only where somebody watches; a log file gets the log lines.
        form = "{n_fmt}/{total_fmt} |{bar:20}| left {remaining}{postfix}"
        bar = tqdm(total=total_steps, initial=step, disable=None, dynamic_ncols=True, smoothing=0.05, bar_format=form)
        self._places["the progress bar"] = bar

    def _call(self, place: str, method: str, *args: Any, **options: Any) -> None:
        """Calls a method of a place, where it is reported to."""
        if place in self._places:
            self._try(place, getattr(self._places[place], method), *args, **options)

    @staticmethod
    def _try(place: str, write: Callable[..., Any], *args: Any, **options: Any) -> None:
        """Failures of reporting are logged, never raised."""
        try:
            write(*args, **options)
        except Exception as error:
            log.warning("%s cannot be written to: %s: %s", place, type(error).__name__, error)

    def advance(self) -> None:
        """One update is done."""
        self._call("the progress bar", "update")

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """One log line of `values` (numbers, or counts by reason), and the same to every other place."""
        if not self._places:
            return
        self._lines_logged += 1
        self._peak_memory = max(self._peak_memory, values.get("memory_gb", 0.0))
        line = {"step": step, **values}
        self._call("metrics.jsonl", "write", json.dumps(line).encode() + b"\n")
        progress, left_out = _describe(values)
        left = f"left {timedelta(seconds=round(values['seconds_left']))}"
        log.info("%s", " | ".join([f"step {step:,}/{self._total_steps:,}", *progress, left, *left_out]))
        for concern in self._concerns.find(step, values):
            log.warning("%s", concern)
        self._call("the progress bar", "set_postfix_str", " | ".join(progress), refresh=False)
        numbers = {name: value for name, value in line.items() if isinstance(value, (int, float))}
        for name, counts in values.items():
            if isinstance(counts, Mapping):
                numbers |= {f"{name}/{reason}": count for reason, count in counts.items()}
        for name, value in numbers.items():
            self._call("TensorBoard", "add_scalar", name, value, step)
        self._call("W&B", "log", numbers)

    def has_validated(self, step: int | None) -> bool:
        """Whether the lines of `METRICS` have a validation: any, or the one after update `step`. On rank 0 alone."""
        lines = [line for line in (self._folder / METRICS).read_bytes().splitlines() if b'"seconds_validating"' in line]
        return any(step is None or json.loads(line)["step"] == step for line in lines)

    def log_validation(self, step: int, figures: Mapping[str, float | None], captions: Sequence[Caption]) -> None:
        """Figures as any others; captions to `CAPTIONS`, and with their images to W&B and TensorBoard."""
        if not self._places:
            return
        self._call("metrics.jsonl", "write", json.dumps({"step": step, **figures}).encode() + b"\n")
        log.info("validation after update %d: %s", step, _describe_validation(figures))
        numbers = {name: value for name, value in figures.items() if value is not None}
        if bad := sorted(figures.keys() - numbers.keys()):
            log.warning("validation after update %d: not finite: %s", step, ", ".join(bad))
        for concern in self._concerns.find(step, figures):
            log.warning("%s", concern)
        for name, value in numbers.items():
            self._call("TensorBoard", "add_scalar", name, value, step)
        self._call("W&B", "log", {"step": step, **numbers})
        self._has_page = True
        self._try("captions", self._log_captions, step, captions)
        self._try(PAGE, write_page, [self._folder], self._folder / PAGE)

    def _log_captions(self, step: int, captions: Sequence[Caption]) -> None:
        images = []
        (self._folder / IMAGES).mkdir(exist_ok=True)
        for caption in captions:
            line = {"step": step, "key": caption.key, "model": caption.model, "data": caption.data}
            self._call("captions.jsonl", "write", json.dumps(line, ensure_ascii=False).encode() + b"\n")
            log.info("caption: %r (data: %r)", caption.model, caption.data)
            images.append(_displayable(caption.image))
            if not (path := image_path(self._folder, caption.key)).exists():
                Image.fromarray(images[-1].transpose(1, 2, 0)).save(path, quality=90)
        if not images:
            return
        text = "\n\n".join(f"{i}. **{c.model}** (data: {c.data})" for i, c in enumerate(captions, start=1))
        self._call("TensorBoard", "add_images", "captioned", np.stack(images), step)
        self._call("TensorBoard", "add_text", "captions", text, step)
        if "W&B" in self._places:
            import wandb

            shown = [
                wandb.Image(i.transpose(1, 2, 0), caption=f"{c.model} (data: {c.data})")
                for i, c in zip(images, captions)
            ]
            self._call("W&B", "log", {"step": step, "captions": shown})

    def upload(self, path: Path) -> None:
        """Sends the checkpoint at `path` to W&B, if --save_checkpoints_to_wandb asks for it."""
        if self._uploads:
            self._call("W&B", "save", str(path), base_path=str(path.parent), policy="now")

    def close(self, exit_code: int = 0) -> None:
        """Writes what is still to be written, and waits for it. `exit_code`: of the run, for W&B."""
        if self._places and self._lines_logged:
            log.info("peak memory of the fullest rank: %.2f GB", self._peak_memory)
        for place in ("the progress bar", "metrics.jsonl", "captions.jsonl", "TensorBoard"):
            self._call(place, "close")
        # A run of a few log lines has nothing to show.
        if self._places and (self._has_page or self._lines_logged >= 10) and not exit_code:
            self._try(PAGE, write_page, [self._folder], self._folder / PAGE)
        self._call("W&B", "finish", exit_code)
        self._places = {}

    def close_after_error(self) -> None:
        """`close`, but waits `CLOSE_TIMEOUT` seconds at most."""
        thread = threading.Thread(target=self.close, args=(1,), daemon=True)
        thread.start()
        thread.join(CLOSE_TIMEOUT)


def _describe(values: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """The parts of a log line: how training goes, and what was left out of the data."""

    def number(name: str, form: str) -> str:
        return "-" if values[name] is None else format(values[name], form)

    kinds = [name[5:] for name in values if name.startswith("loss_")]
    progress = [f"epoch {values['epoch']:.2f}"]
    progress += [f"{kind} loss {number(f'loss_{kind}', '.4f')}" for kind in kinds]
    progress += [f"grad {number('grad_norm', '.3f')}", f"lr {values['lr']:.2e}"]
    if "grad_scale" in values:
        progress += [f"scale {values['grad_scale']:g}, {values['updates_skipped']:,} skipped"]
    progress += [f"{kind} {values[f'samples_per_second_{kind}']:,.3g}/s" for kind in kinds]
    progress += [f"{values['tokens_per_second']:,.0f} tok/s", f"{values['images_per_second']:,.0f} img/s"]
    if "tflops_per_device" in values:
        mfu = f" ({values['mfu']:.0%} MFU)" if "mfu" in values else ""
        progress += [f"{values['tflops_per_device']:.3g} TFLOP/s{mfu}"]
    progress += [
        f"gates {values['gate_attention']:.3f} {values['gate_feed_forward']:.3f}",
        f"{values['memory_gb']:.1f} GB",
    ]
    progress += [f"data wait {values['data_wait']:.0%}"]
    left_out = []
    for kind in kinds:
        for name, title in (("dropped", "dropped"), ("bad_batches", "BATCHES NOT FINITE"), ("errors", "ERRORS")):
            if counts := values[f"{name}_{kind}"]:
                by_reason = sorted(counts.items()) if isinstance(counts, Mapping) else [("", counts)]
                reasons = ", ".join(f"{reason} {count:,}".lstrip() for reason, count in by_reason)
                left_out.append(f"{kind} {title}: {reasons}")
    return progress, left_out


def _describe_validation(figures: Mapping[str, float | None]) -> str:
    def number(name: str) -> str:
        value = figures.get(name)
        return "-" if value is None else f"{value:.4f}"

    parts = []
    for kind in (name[9:] for name in figures if name in ("val_loss_laion", "val_loss_mmc4")):
        gains = f"image gain {number(f'image_gain_{kind}')}, blank gain {number(f'blank_gain_{kind}')}"
        parts.append(f"{kind} loss {number(f'val_loss_{kind}')}, {gains}")
        if by_image := [number(name) for name in figures if name.startswith(f"val_loss_{kind}_image_")]:
            parts.append(f"{kind} loss by image {' '.join(by_image)}")
    return " | ".join([*parts, f"{figures['seconds_validating']:.1f} s"])


def _displayable(image: np.ndarray) -> np.ndarray:
    """Bytes of an image, of which a custom image processor may have made normalized floats."""
    if image.dtype == np.uint8:
        return image
    low, high = float(image.min()), float(image.max())
    return ((image - low) / max(high - low, 1e-6) * 255).astype(np.uint8)


def _lines_file(path: Path, step: int) -> Any:
    """`path`, open for appending, without the lines of updates after `step`: those will be logged again."""
    kept = []
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else ():
        with suppress(ValueError, KeyError):  # a partial line of a killed run
            if json.loads(line)["step"] <= step:
                kept.append(line)
    with atomic_write(path) as file:
        file.write(b"".join(kept))
    return path.open("ab", buffering=0)  # what cannot be written is lost, not kept for the next attempt


def log_in_to_wandb() -> None:
    """Asks for a key at a terminal, if there is none yet. Raises ValueError where there is no terminal either."""
    import wandb

    try:
        wandb.login(verify=False)
    except wandb.Error as error:
        raise ValueError(f"--report_to_wandb: {error} Or set WANDB_API_KEY, or --offline") from error


def _start_wandb(args: argparse.Namespace, folder: Path) -> Any:
    import wandb

    # The same W&B run goes on when this one is started again.
    id_file = folder / "wandb_id"
    if not id_file.exists():
        id_file.write_text(secrets.token_hex(4))
    options: dict[str, Any] = {"project": args.wandb_project, "entity": args.wandb_entity, "name": folder.name}
    options |= {"id": id_file.read_text().strip(), "dir": str(folder), "config": vars(args)}
    try:
        run = wandb.init(mode="offline", **options) if args.offline else wandb.init(resume="allow", **options)
    except wandb.errors.AuthenticationError as error:
        raise ValueError(f"--report_to_wandb: {error}") from error
    except wandb.errors.CommError as error:  # what a scheduler starts again must not depend on a service
        log.warning("W&B cannot be reached: %s. `wandb sync` sends it what is kept in %s", error, folder / "wandb")
        # The attempt still holds the id, also in a service that another process has started.
        wandb.teardown()
        os.environ.pop("WANDB_SERVICE", None)
        run = wandb.init(mode="offline", **options)
    # By its own count of steps, W&B refuses those that a run does again after it has gone back.
    run.define_metric("*", step_metric="step")
    return run
