"""What a log line says: speed, memory, gradients, gates; and what of it should worry somebody."""

import math
import resource
import statistics
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch

from open_flamingo.train.checkpoint.resume import TrainState
from open_flamingo.train.distributed import gather_objects
from open_flamingo.train.flops import Work, peak_flops
from open_flamingo.train.health import Health
from open_flamingo.train.parallel import full_tensor


def measure(state: TrainState, health: Health, gradient_norm: torch.Tensor | None, seconds: float) -> dict[str, Any]:
    """The values of a log line, of the `seconds` since the last one; None for what is not finite, or was left out.

    Rates and sums are of all ranks, times of the slowest; memory is that of the rank that has the most.
    """
    trainer, world = state.trainer, state.world
    datasets = trainer.datasets
    ranks = gather_objects(
        {
            "waited": sum(dataset.seconds_waited for dataset in datasets),
            "memory": _peak_memory(world.device),
            "left out": {dataset.kind: (dataset.dropped, dataset.errors) for dataset in datasets},
            "work": [sum(column) for column in zip(*(dataset.work for dataset in datasets), strict=True)],
            "positions": sum(dataset.positions for dataset in datasets),
            "slowest": max(trainer.seconds),
        }
    )
    values = _read_device(state, gradient_norm)
    values["data_wait"] = max(rank["waited"] for rank in ranks) / seconds
    for dataset in datasets:
        kind = dataset.kind
        values[f"loss_{kind}"] = dataset.loss / dataset.forwards if dataset.forwards else None
        values[f"samples_per_second_{kind}"] = dataset.samples * world.world_size / seconds
        values[f"dropped_{kind}"] = dict(sum((rank["left out"][kind][0] for rank in ranks), Counter()))
        values[f"errors_{kind}"] = dict(sum((rank["left out"][kind][1] for rank in ranks), Counter()))
        values[f"bad_batches_{kind}"] = health.bad_batches[kind]
        dataset.reset()
    work = Work(*(sum(column) for column in zip(*(rank["work"] for rank in ranks), strict=True)))
    values["tokens_per_second"] = work.tokens / seconds
    values["images_per_second"] = work.images / seconds
    values["padding"] = 1 - work.tokens / max(1, sum(rank["positions"] for rank in ranks))
    if state.flops is not None:
        flops = sum(state.flops.needed(work).values()) / seconds / world.world_size
        values["tflops_per_device"] = flops / 1e12
        if peak := peak_flops(world.device, state.args.precision):
            values["mfu"] = flops / peak
    values["memory_gb"] = max(rank["memory"] for rank in ranks) / 1e9
    values["step_seconds_median"] = statistics.median(trainer.seconds)
    values["step_seconds_slowest"] = max(rank["slowest"] for rank in ranks)
    trainer.clipped, trainer.seconds = 0.0, []
    if trainer.scaler is not None:
        scaling = trainer.scaler.state_dict()
        values |= {"grad_scale": scaling["scale"], "updates_skipped": scaling["skipped"]}
    return values


def _read_device(state: TrainState, gradient_norm: torch.Tensor | None) -> dict[str, Any]:
    """Gradient norms, the share of updates that were clipped, and how far the gates are open, from 0 to 1. Waits once."""
    trainer = state.trainer
    blocks: dict[str, Any] = {
        str(i): layer.gated_cross_attn_layer for i, layer in enumerate(state.model.decoder_layers)
    }
    blocks = {i: block for i, block in blocks.items() if block is not None}
    gates = [full_tensor(gate) for block in blocks.values() for gate in (block.attn_gate, block.ff_gate)]
    norms = {} if gradient_norm is None else {"grad_norm": gradient_norm}
    norms |= {f"grad_norm_{part}": norm for part, norm in trainer.part_norms.items()}
    clipped = torch.as_tensor(trainer.clipped, device=gates[0].device).float()
    opened = torch.cat(gates).float().tanh().abs()
    numbers = iter(torch.cat([torch.stack([clipped, *norms.values()]), opened]).tolist())
    values: dict[str, Any] = {"grad_norm": None, "clipped": next(numbers) / len(trainer.seconds)}
    for name in norms:
        norm = next(numbers)
        values[name] = norm if math.isfinite(norm) else None
    by_layer: dict[str, dict[str, float]] = {"attention": {}, "feed_forward": {}}
    for i in blocks:
        for of in by_layer.values():
            of[i] = next(numbers)
    values |= {f"gate_{name}": statistics.fmean(of.values()) for name, of in by_layer.items()}
    return values | {f"gates_{name}": of for name, of in by_layer.items()}


def _peak_memory(device: torch.device) -> int:
    """The most bytes held since the last call: of tensors on a GPU, of this process (since its start) on a CPU."""
    if device.type != "cuda":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return peak


class Concerns:
    """What is off in the figures of a run, in words, with what to try; each is told once. `step`: updates done before this process."""

    def __init__(self, step: int) -> None:
        self._last = step
        self._lines = 0
        self._counted = 0  # updates since the first log line, which has the start in it
        self._shares: Counter[str] = Counter()  # of these, summed
        self._sees = False  # whether a validation has shown that it looks at its images
        self._told: set[str] = set()

    def find(self, step: int, values: Mapping[str, Any]) -> list[str]:
        """`values`: of a log line or a validation after update `step`."""
        found = self._of_log_line(step, values) if "data_wait" in values else {}
        gains = {name: gain for name, gain in values.items() if name.startswith("image_gain_") and gain is not None}
        self._sees = self._sees or max(gains.values(), default=0.0) > 0.1
        for name, gain in gains.items():
            if step >= 1000 and gain < 0.01:
                found[name] = (
                    f"after {step:,} updates the model hardly looks at its images: on {name[11:]} its loss is only {gain:.4f} higher with "
                    "those of other samples. Try a higher --learning_rate, a smaller --cross_attn_every_n_layers, or captions that say "
                    "what is to be seen"
                )
        new = [text for name, text in found.items() if name not in self._told]
        self._told |= found.keys()
        return new

    def _of_log_line(self, step: int, values: Mapping[str, Any]) -> dict[str, str]:
        found: dict[str, str] = {}
        span, self._last, self._lines = step - self._last, step, self._lines + 1
        if self._lines > 1:
            self._counted += span
            self._shares.update({name: values[name] * span for name in ("clipped", "data_wait", "padding")})
        shares = {name: total / max(1, self._counted) for name, total in self._shares.items()}
        if self._counted >= 100 and shares["clipped"] > 0.99:
            found["clipping"] = (
                f"the gradient was clipped in {shares['clipped']:.1%} of {self._counted:,} updates: its norm, not --learning_rate, says "
                "how far they go. Try a longer warm-up, or larger batches"
            )
        if self._counted >= 20 and shares["data_wait"] > 0.1:
            found["data wait"] = (
                f"{shares['data_wait']:.0%} of the time is spent waiting for data: more --workers, or faster storage, would help"
            )
        if self._counted >= 20 and shares["padding"] > 0.5:
            found["padding"] = (
                f"{shares['padding']:.0%} of all tokens are padding: texts differ much in length; smaller batches with more "
                "--gradient_accumulation_steps have less of it"
            )
        if (
            step >= 1000 and values["gate_attention"] < 0.01 and not self._sees
        ):  # small models see through gates of 0.007
            found["gates"] = (
                f"after {step:,} updates the gates of cross-attention are all but shut (mean |tanh| {values['gate_attention']:.4f}): "
                "images change nothing that the language model computes. Try a higher --learning_rate, or a shorter warm-up"
            )
        for name, norm in values.items():
            if self._counted >= 20 and name.startswith("grad_norm_") and norm == 0:
                found[name] = (
                    f"the gradient of the {name[10:].replace('_', ' ')} is 0, so it does not learn: is --learning_rate, or a "
                    "--loss_multiplier, 0?"
                )
        return found
