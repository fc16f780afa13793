"""The reference, open-flamingo 2.0.1, as a child process (see child.py), and all that it takes to run it today.

It is installed by pip into a folder of its own, without its dependencies, of which it asks for versions of 2023. The training loop,
the model, the loaders and `save_checkpoint` are its own. `PATCHES` is all that is changed in it, at run time; besides, this file
does what its `train.py` does around the loop (AdamW groups, DDP, its defaults), as that is one 250-line `main`.
"""

from __future__ import annotations

import argparse
import functools
import importlib.machinery
import importlib.util
import runpy
import shutil
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar
from unittest.mock import patch

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = ROOT / "build" / "reference"
PACKAGES = ("open-flamingo==2.0.1", "einops-exts==0.0.4")

if __name__ == "__main__":
    # Its package comes before ours of the same name, and its training modules import each other as top-level modules.
    sys.path[:1] = [str(REFERENCE), str(REFERENCE / "open_flamingo" / "train"), str(ROOT)]


def install(folder: Path = REFERENCE) -> None:
    """Has pip put the reference into `folder`, unless it is there. Raises RuntimeError with pip's reason."""
    if (folder / "open_flamingo").is_dir() and (folder / "einops_exts").is_dir():
        return
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), *PACKAGES]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"pip cannot install the reference: {result.stderr.strip()[-500:]}")


# ---------------------------------------------------------------------------------------------------------------------
# What is changed in it

Patch = TypeVar("Patch", bound=Callable[..., Any])
PATCHES: dict[str, str] = {}
"""Name → why it is needed."""


def patches(why: str) -> Callable[[Patch], Patch]:
    def register(function: Patch) -> Patch:
        PATCHES[function.__name__] = why
        return function

    return register


@patches("its loop imports wandb, which need not be installed")
def stand_in_for_wandb() -> None:
    if importlib.util.find_spec("wandb") is None:
        stub = sys.modules["wandb"] = types.ModuleType("wandb")
        stub.__spec__ = importlib.machinery.ModuleSpec("wandb", None)  # accelerate looks for it


@patches("transformers 5 has no `additional_special_tokens` any more; without it every MMC4 document is dropped")
def special_tokens_of(tokenizer: Any) -> None:
    if not hasattr(tokenizer, "additional_special_tokens_ids"):
        names = ["<|endofchunk|>", "<image>"]
        tokenizer.additional_special_tokens = names
        tokenizer.additional_special_tokens_ids = tokenizer.convert_tokens_to_ids(names)


@patches("webdataset 1.0 puts `{}` between shards, on which its `group_by_keys_nothrow` fails")
def no_marks_between_shards() -> None:
    import data_utils
    import webdataset.tariterators

    if "eof_value" in webdataset.tariterators.tar_file_expander.__code__.co_varnames:
        data_utils.tar_file_expander = functools.partial(data_utils.tar_file_expander, eof_value=None)


@patches(
    "OpenCLIP 3 gives patch tokens after `ln_post`; with OpenCLIP 2.20, its pin, and here, they come from before it"
)
def tokens_before_ln_post(tower: Any) -> None:
    if hasattr(tower, "final_ln_after_pool"):
        tower.final_ln_after_pool = True


@patches("its `train.py` gives DDP the CPU as a device id, which DDP refuses")
def ddp_on_the_cpu() -> None:
    import torch

    if not torch.cuda.is_available():
        ddp = torch.nn.parallel.DistributedDataParallel
        torch.nn.parallel.DistributedDataParallel = lambda model, device_ids: ddp(model)  # type: ignore[misc,assignment]


@patches(
    "`checkpoint_wrapper(offload_to_cpu=True)` is a TypeError since torch 2.1: here without the offloading, which is faster"
)
def activation_checkpointing(model: Any) -> None:
    from torch.distributed.algorithms._checkpoint import checkpoint_wrapper as wrapper

    wrapper.apply_activation_checkpointing(
        model,
        checkpoint_wrapper_fn=functools.partial(
            wrapper.checkpoint_wrapper, checkpoint_impl=wrapper.CheckpointImpl.NO_REENTRANT
        ),
        check_fn=lambda module: getattr(module, "_use_gradient_checkpointing", False)
        and not isinstance(module, wrapper.CheckpointWrapper),
    )


@patches("it knows vision encoders by OpenCLIP's names only: the config in a file becomes one")
def vision_config_by_name(path: str) -> str:
    import open_clip

    open_clip.add_model_config(path)
    return Path(path).stem


# ---------------------------------------------------------------------------------------------------------------------
# Its training loop, on request


class Batches:
    """In the place of its loaders: a number of batches, in its own formats, with the attribute that its loop asks for."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches
        self.num_batches = 0
        self.next = 0
        self.parts: Any = None  # who marks the time that batches take

    def __iter__(self) -> Iterator[Any]:
        items = self._items()
        return items if self.parts is None else self.parts.data(items)

    def _items(self) -> Iterator[Any]:
        for _ in range(self.num_batches):
            yield self.batches[self.next % len(self.batches)]
            self.next += 1


class Losses:
    """In the place of the module `wandb`: keeps the losses that the loop logs."""

    def __init__(self) -> None:
        self.laion: list[float] = []
        self.mmc4: list[float] = []

    def log(self, values: dict[str, float], commit: bool) -> None:
        for kind in ("laion", "mmc4"):
            if f"loss_{kind}" in values:
                getattr(self, kind).append(values[f"loss_{kind}"])


class Reference:
    def __init__(self, args: argparse.Namespace) -> None:
        import distributed
        import torch
        from torch.nn.parallel import DistributedDataParallel

        from benchmarks.backbones import VISION_CONFIG, set_weights, without_weights
        from benchmarks.shapes import Shape
        from open_flamingo import create_model_and_transforms

        assert Path(create_model_and_transforms.__code__.co_filename).is_relative_to(REFERENCE)
        self.torch = torch
        folder = Path(args.folder)
        shape = Shape.read(folder)
        self.folder = folder / "run-reference"
        on_gpu = torch.cuda.is_available()
        self.args = argparse.Namespace(
            precision=args.precision,
            fsdp=False,
            horovod=False,
            no_set_device_rank=False,
            dist_backend="nccl" if on_gpu else "gloo",
            dist_url=f"file://{tempfile.mkdtemp()}/rendezvous",
            num_epochs=1,
            rank=0,
            world_size=1,
            gradient_accumulation_steps=1,
            batch_size_laion=shape.laion.rows,
            batch_size_mmc4=shape.mmc4.rows,
            loss_multiplier_laion=0.2,
            loss_multiplier_mmc4=1.0,
            freeze_lm_embeddings=False,
            report_to_wandb=False,
            save_checkpoints_to_wandb=False,
            delete_previous_checkpoint=False,
            logging_steps=10**9,
            run_name=str(self.folder),
        )
        self.device = distributed.init_distributed_device(self.args)
        torch.manual_seed(0)
        with without_weights(), self.device:
            model, _, self.tokenizer = create_model_and_transforms(
                vision_config_by_name(str(folder / VISION_CONFIG)),
                None,
                str(folder / "language"),
                str(folder / "language"),
                cross_attn_every_n_layers=shape.cross_attn_every_n_layers,
                use_local_files=True,
                gradient_checkpointing=args.gradient_checkpointing,
            )
        special_tokens_of(self.tokenizer)
        tokens_before_ln_post(model.vision_encoder)
        model.to(self.device)
        set_weights(model, folder)
        self.model = model
        self.ddp = DistributedDataParallel(model, device_ids=[self.device] if on_gpu else None)
        if args.gradient_checkpointing:
            activation_checkpointing(self.ddp)
        trained = [(name, parameter) for name, parameter in self.ddp.named_parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [p for name, p in trained if "gated_cross_attn" in name], "weight_decay": 0.1},
                {"params": [p for name, p in trained if "gated_cross_attn" not in name], "weight_decay": 0.0},
            ],
            lr=args.learning_rate,
        )
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1.0)
        self.loaders = {"laion": Batches([]), "mmc4": Batches([])}
        self.use_batches(folder / args.batches)
        self.losses_seen = Losses()
        self.ddp.train()

    def use_batches(self, file: str | Path) -> None:
        batches = self.torch.load(file)
        self.loaders["laion"].batches = [self._laion(batch["laion"]) for batch in batches]
        self.loaders["mmc4"].batches = [self._mmc4(batch["mmc4"]) for batch in batches]
        for loader in self.loaders.values():
            loader.next = 0

    def _images(self, images: Any, counts: list[int]) -> Any:
        """float32 and normalised, but zeros in slots without an image, as its loader makes them."""
        import open_clip

        mean, std = (
            self.torch.tensor(values).view(3, 1, 1)
            for values in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
        )
        images = (images.float() / 255 - mean) / std
        for row, count in enumerate(counts):
            images[row, count:] = 0
        return images

    def _laion(self, rows: dict[str, Any]) -> Any:
        images = self._images(rows["images"], rows["image_counts"].tolist())
        mask = (rows["input_ids"] != self.tokenizer.pad_token_id).long()
        return images[:, 0].contiguous(), (rows["input_ids"], mask)

    def _mmc4(self, rows: dict[str, Any]) -> Any:
        images = self._images(rows["images"], rows["image_counts"].tolist())
        ids = rows["input_ids"].unsqueeze(1)
        return images, [(row, (row != self.tokenizer.pad_token_id).long()) for row in ids]

    # ---------------------------------------------------------------- what is asked

    def functions(self) -> list[Callable[..., Any]]:
        return [
            self.steps,
            self.losses,
            self.parts,
            self.memory,
            self.reset_memory,
            self.save,
            self.use_batches,
        ]

    def _train(self, count: int, **overrides: Any) -> None:
        import train_utils

        for loader in self.loaders.values():
            loader.num_batches = count
        train_utils.train_one_epoch(
            args=argparse.Namespace(**(vars(self.args) | overrides)),
            model=self.ddp,
            epoch=0,
            laion_loader=self.loaders["laion"],
            mmc4_loader=self.loaders["mmc4"],
            tokenizer=self.tokenizer,
            optimizer=self.optimizer,
            lr_scheduler=self.scheduler,
            device_id=self.device,
            wandb=self.losses_seen,
        )

    def _wait(self) -> None:
        if self.device.type == "cuda":
            self.torch.cuda.synchronize()

    def steps(self, count: int) -> tuple[float, float]:
        self._wait()
        start, cpu = time.perf_counter(), time.process_time()
        self._train(count)
        self._wait()
        return time.perf_counter() - start, time.process_time() - cpu

    def losses(self, count: int, rewind: bool = False) -> list[list[float]]:
        if rewind:
            for loader in self.loaders.values():
                loader.next = 0
        self.losses_seen = Losses()
        with patch("train_utils.wandb", self.losses_seen):
            self._train(count, report_to_wandb=True)
        return [list(pair) for pair in zip(self.losses_seen.laion, self.losses_seen.mmc4, strict=True)]

    def parts(self, count: int) -> dict[str, float]:
        from benchmarks.parts import Parts

        parts = Parts(self.device)
        tower = self.model.vision_encoder
        with ExitStack() as stack:
            stack.enter_context(patch.object(tower, "forward", parts.vision(tower.forward)))
            for loader in self.loaders.values():
                stack.enter_context(patch.object(loader, "parts", parts))
            stack.enter_context(parts.watching(self.model, self.optimizer))
            self._train(count)
        return parts.each(count)

    def memory(self) -> int:
        from benchmarks.parts import peak_memory

        return peak_memory(self.device)

    def reset_memory(self) -> None:
        if self.device.type == "cuda":
            self.torch.cuda.reset_peak_memory_stats()

    def save(self) -> dict[str, float]:
        import train_utils

        shutil.rmtree(self.folder, ignore_errors=True)
        self._wait()
        start = time.perf_counter()
        train_utils.save_checkpoint(self.ddp, self.optimizer, self.scheduler, 0, self.args)
        standstill = time.perf_counter() - start
        size = (self.folder / "checkpoint_0.pt").stat().st_size
        shutil.rmtree(self.folder)
        return {"standstill": standstill, "on_disk": standstill, "bytes": size}


class ReferenceLoaders:
    """Its loaders alone."""

    def __init__(self, folder: Path) -> None:
        from benchmarks.backbones import VISION_CONFIG, without_weights
        from open_flamingo import create_model_and_transforms

        no_marks_between_shards()
        language = str(folder / "language")
        with without_weights():
            _, self.image_processor, self.tokenizer = create_model_and_transforms(
                vision_config_by_name(str(folder / VISION_CONFIG)),
                None,
                language,
                language,
                use_local_files=True,
            )
        special_tokens_of(self.tokenizer)

    def functions(self) -> list[Callable[..., Any]]:
        return [self.rate]

    def rate(self, kind: str, shards: str, batch_size: int, workers: int, seconds: float) -> dict[str, float]:
        import data
        import torch

        from benchmarks.parts import loading_rate
        from benchmarks.shards import THRESHOLD

        args = argparse.Namespace(
            dataset_resampled=False,  # with it, its shuffling would hold 5,000 documents: more than the memory here
            seed=42,
            workers=workers,
            world_size=1,
            mmc4_textsim_threshold=THRESHOLD,
            mmc4_min_num_images=1,
            mmc4_max_num_images=6,
        )
        for name in ("laion", "mmc4"):
            setattr(args, f"{name}_shards", shards)
            setattr(args, f"batch_size_{name}", batch_size)
            setattr(args, f"train_num_samples_{name}", 10**9)
        loader = data.get_data(args, self.image_processor, self.tokenizer, {"laion": "image_text"}.get(kind, kind))

        def batches() -> Iterator[tuple[list[int], Any]]:
            for images, text in loader.dataloader:
                if kind == "laion":
                    yield [1] * len(images), text[1]
                else:
                    yield images.flatten(2).any(-1).sum(1).tolist(), torch.cat([mask for _, mask in text])

        return loading_rate(batches(), skip=3 * workers, seconds=seconds)


def train(argv: list[str]) -> None:
    """Its `train.py`, for one process of this machine. `--vision_encoder_path=` may be the path of an OpenCLIP config."""
    stand_in_for_wandb()
    if "--help" not in argv:
        import open_flamingo

        package: Any = open_flamingo
        ddp_on_the_cpu()
        no_marks_between_shards()
        build = package.create_model_and_transforms

        def build_and_mend(vision_encoder: str, *args: Any, **kwargs: Any) -> Any:
            if vision_encoder.endswith(".json"):
                vision_encoder = vision_config_by_name(vision_encoder)
            model, image_processor, tokenizer = build(vision_encoder, *args, **kwargs)
            special_tokens_of(tokenizer)
            tokens_before_ln_post(model.vision_encoder)
            return model, image_processor, tokenizer

        package.create_model_and_transforms = build_and_mend
        argv = [*argv, f"--dist-url=file://{tempfile.mkdtemp()}/rendezvous"]
    sys.argv = ["train.py", *argv]
    runpy.run_path(str(REFERENCE / "open_flamingo" / "train" / "train.py"), run_name="__main__")


def main() -> None:
    from benchmarks.child import serve

    if sys.argv[1:2] == ["--train"]:
        train(sys.argv[2:])
        return

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", help="backbones and batches")
    parser.add_argument("--loaders", action="store_true", help="its loaders alone")
    parser.add_argument("--batches", default="batches.pt")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--gradient_checkpointing", action="store_true")
    args = parser.parse_args()
    stand_in_for_wandb()
    serve(lambda: (ReferenceLoaders(Path(args.folder)) if args.loaders else Reference(args)).functions())


if __name__ == "__main__":
    main()
