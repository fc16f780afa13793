"""What the user sees: console, metrics.jsonl, Weights & Biases, TensorBoard. All of it comes from rank 0 alone."""

from __future__ import annotations

import json
import logging
import math
import os
import secrets
import sys
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from open_flamingo.train.data.loader import DataOptions
from open_flamingo.train.distributed import World, gather_objects
from open_flamingo.train.resume import Plan
from open_flamingo.train.step import Source

log = logging.getLogger(__name__)

# Seconds that W&B and TensorBoard have after an error. torchrun kills ranks 30 s after it has asked them to end.
CLOSE_TIMEOUT = 20.0


class _AboveTheBar(logging.Handler):
    """Writes to stderr without breaking a progress bar that is there."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=sys.stderr)
            sys.stderr.flush()
        except Exception:  # a full disk, a closed terminal: as the handlers of Python take it
            self.handleError(record)


def setup_logging(rank: int) -> None:
    """Log lines on stderr, above the progress bar; other ranks than 0 speak only of errors, and say who they are."""
    handler = _AboveTheBar()
    prefix = "" if rank == 0 else f"[rank {rank}] "
    handler.setFormatter(logging.Formatter(f"{prefix}%(asctime)s %(levelname).1s %(message)s", "%H:%M:%S"))
    root = logging.getLogger("open_flamingo")
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO if rank == 0 else logging.ERROR)
    root.propagate = False


def count_line(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{reason} {count:,}" for reason, count in sorted(counts.items()))


_PARTS = {"vision_encoder": "vision encoder", "perceiver": "resampler", "lang_encoder": "language model"}


def describe(
    world: World,
    model: nn.Module,
    plan: Plan,
    options: dict[str, DataOptions],
    step: int,
    precision: str,
    folder: str,
) -> None:
    """Says at the start what will happen."""
    log.info("%s: %d x %s, %s", world.launcher, world.world_size, world.device.type, precision)
    for title, trained in (("trained", True), ("frozen", False)):
        parts: dict[str, int] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad == trained:
                part = "gated cross-attention" if "gated_cross_attn" in name else _PARTS.get(name.split(".")[0], name)
                part = "new token rows" if trained and part == "language model" else part
                parts[part] = parts.get(part, 0) + parameter.numel()
        each = ", ".join(f"{part} {count:,}" for part, count in parts.items())
        log.info("%s parameters: %s (%s)", title, f"{sum(parts.values()):,}", each)
    for kind, option in options.items():
        log.info(
            "%s: %d shards, %d samples a rank and batch, %d an update, %d loader processes a rank",
            kind,
            len(option.shards),
            option.batch_size,
            plan.samples_per_update[kind],
            option.workers,
        )
    log.info(
        "%d epochs of %d updates, %d done; %d lanes; output in %s",
        plan.num_epochs,
        plan.updates_per_epoch,
        step,
        next(iter(options.values())).lanes,
        folder,
    )


def measure(
    world: World, sources: list[Source], gradient_norm: torch.Tensor | None, learning_rate: float, seconds: float
) -> dict[str, Any]:
    """The values of a log line, of the `seconds` since the last one; None for what is not finite, or was left out."""
    waited = sum(source.seconds_waited for source in sources)
    ranks = gather_objects((waited, {source.kind: (source.dropped, source.errors) for source in sources}))
    values: dict[str, Any] = {
        "lr": learning_rate,
        "grad_norm": None if gradient_norm is None else _finite(gradient_norm.item()),
    }
    values["data_wait"] = max(waited for waited, _ in ranks) / seconds  # all wait for the slowest
    for source in sources:
        values[f"loss_{source.kind}"] = source.loss / source.forwards if source.forwards else None
        values[f"samples_per_second_{source.kind}"] = source.samples * world.world_size / seconds
        values[f"dropped_{source.kind}"] = dict(sum((counts[source.kind][0] for _, counts in ranks), Counter()))
        values[f"errors_{source.kind}"] = dict(sum((counts[source.kind][1] for _, counts in ranks), Counter()))
        source.reset()
    return values


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


class Reporter:
    """Rank 0's voice. Other ranks make one too; it stays silent.

    Args:
        active: whether this is rank 0.
        folder: the run's folder.
        step, total_steps: updates done before and at the end of this run.
        flags: recorded with the run.
    """

    def __init__(
        self,
        active: bool,
        folder: Path,
        step: int,
        total_steps: int,
        flags: Mapping[str, Any],
        tensorboard: bool = False,
        wandb: bool = False,
        wandb_project: str | None = None,
        wandb_entity: str | None = None,
        offline: bool = False,
    ) -> None:
        self._active = active
        self._folder = folder
        self._total_steps = total_steps
        self._metrics = self._tensorboard = self._wandb = None
        self._bar: tqdm | None = None
        if not active:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self._metrics = _metrics_file(folder / "metrics.jsonl", step)
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        if wandb:
            self._wandb = _start_wandb(folder, wandb_project, wandb_entity, offline, flags)
        # A bar only where somebody watches; a log file gets the log lines.
        self._bar = tqdm(
            total=total_steps,
            initial=step,
            disable=None,
            dynamic_ncols=True,
            smoothing=0.05,
            bar_format="{n_fmt}/{total_fmt} |{bar:20}| left {remaining}{postfix}",
        )

    def advance(self) -> None:
        """One update is done."""
        if self._bar is not None:
            self._tell("the progress bar", self._bar.update)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """One log line of `values` (numbers, or counts by reason), and the same to every other place."""
        if not self._active:
            return
        line = {"step": step, **values}
        assert self._metrics is not None
        self._tell("metrics.jsonl", self._metrics.write, json.dumps(line).encode() + b"\n")
        progress, counts = self._describe(line)
        left = f"left {timedelta(seconds=round(line['seconds_left']))}"
        log.info("%s", " | ".join([f"step {step:,}/{self._total_steps:,}", *progress, left, *counts]))
        if self._bar is not None:
            self._bar.set_postfix_str(" | ".join(progress), refresh=False)
        numbers = {name: value for name, value in line.items() if isinstance(value, (int, float))}
        for name, counts in values.items():
            if isinstance(counts, Mapping):
                numbers |= {f"{name}/{reason}": count for reason, count in counts.items()}
        if self._tensorboard is not None:
            for name, value in numbers.items():
                self._tell("TensorBoard", self._tensorboard.add_scalar, name, value, step)
        if self._wandb is not None:
            self._tell("W&B", self._wandb.log, numbers)

    @staticmethod
    def _tell(where: str, tell: Callable[..., Any], *args: Any, **options: Any) -> None:
        """Training matters more than what is told of it: of no room, or a service that died, there is a warning."""
        try:
            tell(*args, **options)
        except Exception as error:
            log.warning("%s cannot be written to: %s: %s", where, type(error).__name__, error)

    @staticmethod
    def _describe(line: Mapping[str, Any]) -> tuple[list[str], list[str]]:
        """The parts of a log line: how training goes, and what was left out of the data."""
        kinds = [name[5:] for name in line if name.startswith("loss_")]
        progress = [f"epoch {line['epoch']:.2f}"]
        progress += [f"{kind} loss {_number(line[f'loss_{kind}'], '.4f')}" for kind in kinds]
        progress += [f"grad {_number(line['grad_norm'], '.3f')}", f"lr {line['lr']:.2e}"]
        if "grad_scale" in line:
            progress += [f"scale {line['grad_scale']:g}, {line['updates_skipped']:,} skipped"]
        progress += [f"{kind} {line[f'samples_per_second_{kind}']:,.3g}/s" for kind in kinds]
        progress += [f"data wait {line['data_wait']:.0%}"]
        counts = []
        for kind in kinds:
            if dropped := line[f"dropped_{kind}"]:
                counts.append(f"{kind} dropped: {count_line(dropped)}")
            if bad := line.get(f"bad_batches_{kind}"):
                counts.append(f"{kind} BATCHES NOT FINITE: {bad:,}")
            if errors := line[f"errors_{kind}"]:
                counts.append(f"{kind} ERRORS: {count_line(errors)}")
        return progress, counts

    def upload(self, path: Path) -> None:
        """Sends the checkpoint at `path` to W&B."""
        if self._wandb is not None:
            self._tell("W&B", self._wandb.save, str(path), base_path=str(path.parent), policy="now")

    def close(self, exit_code: int = 0) -> None:
        """Writes what is still to be written, and waits for it. `exit_code`: of the run, for W&B."""
        if self._bar is not None:
            self._tell("the progress bar", self._bar.close)
        if self._metrics is not None:
            self._tell("metrics.jsonl", self._metrics.close)
        if self._tensorboard is not None:
            self._tell("TensorBoard", self._tensorboard.close)
        if self._wandb is not None:
            self._tell("W&B", self._wandb.finish, exit_code)
        self._active, self._bar, self._metrics, self._tensorboard, self._wandb = False, None, None, None, None

    def close_after_error(self) -> None:
        """`close`, but waits `CLOSE_TIMEOUT` seconds at most."""
        thread = threading.Thread(target=self.close, args=(1,), daemon=True)
        thread.start()
        thread.join(CLOSE_TIMEOUT)


def _metrics_file(path: Path, step: int) -> Any:
    """`path`, open for appending, without the lines of updates after `step`: those are about to be done again."""
    kept = []
    if path.exists():
        for text in path.read_text().splitlines():
            try:
                if json.loads(text)["step"] <= step:
                    kept.append(text)
            except (ValueError, KeyError):
                continue  # a line that a killed run did not finish
    beside = path.with_suffix(".new")
    beside.write_text("".join(f"{text}\n" for text in kept))
    os.replace(beside, path)
    return path.open("ab", buffering=0)  # what cannot be written is lost, not kept for the next attempt


def log_in_to_wandb() -> None:
    """Asks for a key at a terminal, if there is none yet. Raises ValueError where there is no terminal either."""
    import wandb

    try:
        wandb.login(verify=False)
    except wandb.Error as error:
        raise ValueError(f"--report_to_wandb: {error} Or set WANDB_API_KEY, or --offline") from error


def _start_wandb(folder: Path, project: str | None, entity: str | None, offline: bool, flags: Mapping[str, Any]) -> Any:
    import wandb

    # The same W&B run goes on when this one is started again.
    id_file = folder / "wandb_id"
    if not id_file.exists():
        id_file.write_text(secrets.token_hex(4))

    def start(mode: str | None) -> Any:
        return wandb.init(
            project=project,
            entity=entity,
            name=folder.name,
            id=id_file.read_text().strip(),
            resume=None if mode == "offline" else "allow",
            mode=mode,  # type: ignore[arg-type]
            dir=str(folder),
            config=dict(flags),
        )

    try:
        run = start("offline" if offline else None)
    except wandb.errors.AuthenticationError as error:
        raise ValueError(f"--report_to_wandb: {error}") from error
    except wandb.errors.CommError as error:  # what a scheduler starts again must not depend on a service
        log.warning("W&B cannot be reached: %s. `wandb sync` sends it what is kept in %s", error, folder / "wandb")
        # The attempt still holds the id, also in a service that another process has started.
        wandb.teardown()
        os.environ.pop("WANDB_SERVICE", None)
        run = start("offline")
    # By its own count of steps, W&B refuses those that a run does again after it has gone back.
    run.define_metric("*", step_metric="step")
    return run
