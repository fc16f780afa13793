"""This program, as a child process: see child.py."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # this checkout, installed or not
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    import open_flamingo

    open_flamingo.__path__.append(sys.path[0])

import argparse
import functools
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import open_flamingo.flamingo
from benchmarks.backbones import build, set_weights
from benchmarks.child import serve
from benchmarks.parts import Parts, loading_rate, matrix_rate, peak_memory
from benchmarks.probe import new_shapes, product_rates, profile_steps, tensors_that_differ
from benchmarks.shards import THRESHOLD
from open_flamingo.train.arguments import build_parser
from open_flamingo.train.checkpoint import files as checkpoints
from open_flamingo.train.checkpoint.resume import TrainState, resume_state
from open_flamingo.train.checkpoint.saving import HostCopies, start_file
from open_flamingo.train.checkpoint.sharded import host_copies, start_sharded
from open_flamingo.train.data.images import normalization
from open_flamingo.train.data.labels import laion_labels, mmc4_labels
from open_flamingo.train.data.loader import Batch, build_loader
from open_flamingo.train.data.options import DataOptions, resolve_lanes, resolve_workers
from open_flamingo.train.distributed import detect_launcher, distributed
from open_flamingo.train.optimizer import build_optimizer
from open_flamingo.train.parallel import compile_blocks, parallelize
from open_flamingo.train.precision import LossScaler, cast_frozen_weights, choose_kernels
from open_flamingo.train.schedule import Plan, Progress
from open_flamingo.train.step import TrainDataset, Trainer, train_step
from open_flamingo.train.train import set_allocator

PROBES = (profile_steps, new_shapes, tensors_that_differ, product_rates)


class Fed:
    """In the place of a `Loader`: gives the same batches again and again."""

    def __init__(self, batches: list[Batch]) -> None:
        self.batches = batches
        self.urls: tuple[str, ...] = ()
        self.rewind()

    def rewind(self) -> None:
        self._iterator = self._endless()

    def _endless(self) -> Iterator[Batch]:
        while True:
            yield from self.batches

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return next(self._iterator)


def to_batch(kind: str, rows: dict[str, Tensor], ids: tuple[int, int, int], pin: bool) -> Batch:
    """As the loader's workers make one. `ids`: of `<image>`, `<|endofchunk|>` and padding."""
    media_id, eoc_id, pad_id = ids
    input_ids, counts = rows["input_ids"], rows["image_counts"].tolist()
    if kind == "laion":
        labels = laion_labels(input_ids, media_id, pad_id)
    else:
        labels = mmc4_labels(input_ids, media_id, eoc_id, pad_id)
    images = rows["images"][:, : max(counts)].contiguous()
    return Batch(
        images=images.pin_memory() if pin else images,
        image_counts=counts,
        input_ids=input_ids.pin_memory() if pin else input_ids,
        labels=labels.pin_memory() if pin else labels,
        keys=["made up"] * len(input_ids),
        cursors={},
        samples=0,
        dropped=Counter(),
        errors=Counter(),
    )


def named(function: Callable[..., Any], ours: Ours) -> Callable[..., Any]:
    """`function` of `ours`, under its own name."""
    return functools.update_wrapper(functools.partial(function, ours), function)


class Ours:
    """The model, the optimizer and the sources, as `train.train` builds them."""

    def __init__(self, args: argparse.Namespace, stack: ExitStack) -> None:
        folder = Path(args.folder)
        flags = [f"--precision={args.precision}", "--run_name", str(folder / "run-ours")]
        flags += ["--loss_multiplier_laion=0.2", "--warmup_steps=0"]
        self.args = build_parser().parse_args(flags)
        self.folder = folder / "run-ours"
        self.world = stack.enter_context(distributed(detect_launcher(), group_of_one=args.group))
        device = self.world.device
        choose_kernels(deterministic=False)
        torch.manual_seed(0)
        with device:
            self.model, image_processor, tokenizer = build(folder, args.gradient_checkpointing)
        self.model.to(device)
        set_weights(self.model, folder)
        cast_frozen_weights(self.model, args.precision)
        self.step_model = parallelize(self.model, self.world)
        self.step_model.train()
        if args.compile:
            compile_blocks(self.model)
        self.optimizer = build_optimizer(self.model, args.learning_rate, weight_decay=0.1)
        self.scaler = LossScaler(device) if args.precision == "fp16" else None
        ids = self.model.media_token_id, self.model.eoc_token_id, tokenizer.pad_token_id
        self._to_batch = functools.partial(to_batch, ids=ids, pin=device.type == "cuda")
        self.loaders = {kind: Fed([]) for kind in ("laion", "mmc4")}
        self.use_batches(folder / args.batches)
        self.sources = [
            TrainDataset(kind, weight, self.loaders[kind], normalization(image_processor), device)  # type: ignore[arg-type]
            for kind, weight in (("laion", 0.2), ("mmc4", 1.0))
        ]
        self.trainer = Trainer(self.step_model, self.optimizer, self.sources, self.args.precision, scaler=self.scaler)
        self.tokenizer, self.image_processor = tokenizer, image_processor
        self._savers: dict[bool, Any] = {
            False: functools.partial(start_file, HostCopies(self._checkpoint_bytes(), device))
        }
        if args.group:
            self._savers[True] = functools.partial(
                start_sharded, torch.distributed.new_group(backend="gloo"), host_copies(self.world.device)
            )

    # ---------------------------------------------------------------- what is asked

    def functions(self) -> list[Callable[..., Any]]:
        return [
            self.steps,
            self.losses,
            self.parts,
            self.memory,
            self.reset_memory,
            self.rate,
            self.save,
            self.with_loaders,
            self.use_batches,
            self.compile,
            self.be_deterministic,
            *(named(function, self) for function in PROBES),
        ]

    def _checkpoint_bytes(self) -> int:
        return 3 * sum(4 * p.numel() for p in self.model.parameters() if p.requires_grad)

    def compile(self) -> None:
        """From here on, as with --compile."""
        compile_blocks(self.model)

    def be_deterministic(self, enabled: bool) -> None:
        choose_kernels(deterministic=enabled)

    def _update(self) -> None:
        train_step(self.trainer, self.args.learning_rate)

    def use_batches(self, file: str | Path) -> None:
        batches = torch.load(file)
        for kind, loader in self.loaders.items():
            loader.batches = [self._to_batch(kind, batch[kind]) for batch in batches]
            loader.rewind()

    def _wait(self) -> None:
        if self.world.device.type == "cuda":
            torch.cuda.synchronize()

    def steps(self, count: int) -> tuple[float, float]:
        """Seconds for `count` updates, on the clock and of CPU time."""
        self._wait()
        start, cpu = time.perf_counter(), time.process_time()
        for _ in range(count):
            self._update()
        self._wait()
        return time.perf_counter() - start, time.process_time() - cpu

    def losses(self, count: int, rewind: bool = False) -> list[list[float]]:
        """LAION's and MMC4's unweighted loss of each of `count` updates."""
        if rewind:
            for loader in self.loaders.values():
                loader.rewind()
        result = []
        for _ in range(count):
            for source in self.sources:
                source.reset()
            self._update()
            result.append([source.loss for source in self.sources])
        return result

    def parts(self, count: int) -> dict[str, float]:
        """Seconds of an update, by part."""
        parts = Parts(self.world.device)
        with ExitStack() as stack:
            stack.enter_context(
                patch("open_flamingo.flamingo.patch_tokens", parts.vision(open_flamingo.flamingo.patch_tokens))
            )
            for source in self.sources:
                stack.enter_context(patch.object(source, "loader", parts.data(source.loader)))
            stack.enter_context(parts.watching(self.model, self.optimizer))
            for _ in range(count):
                self._update()
        return parts.each(count)

    def memory(self) -> int:
        return peak_memory(self.world.device)

    def reset_memory(self) -> None:
        if self.world.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def rate(self, dtype: str) -> float:
        return matrix_rate(self.world.device, getattr(torch, dtype))

    def with_loaders(self, shards: dict[str, str], workers: int, count: int) -> dict[str, Any]:
        """Updates on real data: seconds of one, seconds of it that were waited for data, and the workers of each dataset."""
        used = {}
        with ExitStack() as stack:
            for source in self.sources:
                rows = len(self.loaders[source.kind].batches[0].keys)
                used[source.kind] = resolve_workers(workers, rows, 1)
                options = DataOptions(
                    source.kind,
                    shards[source.kind],
                    rows,
                    used[source.kind],
                    lanes=resolve_lanes(None, 1, used[source.kind]),
                    resampled=True,
                    mmc4_textsim_threshold=THRESHOLD,
                )
                loader = stack.enter_context(build_loader(options, self.tokenizer, self.image_processor))
                stack.enter_context(patch.object(source, "loader", loader))
            self.steps(3 * max(used.values()))  # until the workers' batches of the start are used up
            for source in self.sources:
                source.reset()
            seconds, _ = self.steps(count)
            waited = sum(source.seconds_waited for source in self.sources)
        return {"seconds": seconds / count, "waited": waited / count, "workers": used}

    def save(self, sharded: bool) -> dict[str, float]:
        """Seconds that the loop stands still for a checkpoint, seconds until it is on disk, and its bytes."""
        shutil.rmtree(self.folder, ignore_errors=True)
        plan = Plan({"laion": 1}, {"laion": 10**6}, 1, {"laion": 1})
        path = checkpoints.checkpoint_path(self.folder, Progress(1, 1), sharded)
        self._wait()
        start = time.perf_counter()
        state = resume_state(TrainState(self.args, self.world, plan, self.model, self.trainer, 16), Progress(1, 1))
        write = self._savers[sharded](self.model, self.optimizer, state, path)
        self._wait()
        standstill = time.perf_counter() - start
        write()
        done = time.perf_counter() - start
        files = path.rglob("*") if path.is_dir() else [path]
        size = sum(file.stat().st_size for file in files)
        shutil.rmtree(self.folder)
        return {"standstill": standstill, "on_disk": done, "bytes": size}


class OurLoaders:
    """The loaders alone."""

    def __init__(self, folder: Path) -> None:
        _, self.image_processor, self.tokenizer = build(folder, gradient_checkpointing=False, meta=True)

    def functions(self) -> list[Callable[..., Any]]:
        return [self.rate]

    def rate(self, kind: str, shards: str, batch_size: int, workers: int, seconds: float) -> dict[str, float]:
        """Samples a second, and images and tokens of a sample."""
        options = DataOptions(
            kind, shards, batch_size, workers, resampled=True, mmc4_textsim_threshold=THRESHOLD,
            lanes=resolve_lanes(None, 1, workers),
        )  # fmt: skip

        with build_loader(options, self.tokenizer, self.image_processor) as loader:
            return loading_rate(
                ((batch.image_counts, batch.input_ids != self.tokenizer.pad_token_id) for batch in loader),
                skip=3 * workers,
                seconds=seconds,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", help="backbones and batches")
    parser.add_argument("--loaders", action="store_true", help="the loaders alone")
    parser.add_argument("--batches", default="batches.pt")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--group", action="store_true", help="make a process group of one: sharded checkpoints need it")
    args = parser.parse_args()
    set_allocator()
    with ExitStack() as stack:
        serve(lambda: (OurLoaders(Path(args.folder)) if args.loaders else Ours(args, stack)).functions())


if __name__ == "__main__":
    main()
