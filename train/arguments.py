"""The command line: every flag with its help, and the checks that argparse cannot make.

Nothing heavy is imported here, so `--help` and a wrong flag answer at once. `parse_args` returns a namespace that nothing changes
afterwards; what is derived from it is computed where it is used.
"""

import argparse
import math
import os
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from open_flamingo.backbones import check_language_model, check_tokenizer, check_vision_encoder, check_vision_weights
from open_flamingo.train.checkpoint import SHARDED_STATE
from open_flamingo.train.data.shards import check_shards

# A checkpoint made with another value of one of these describes another model or another order of samples.
MODEL_FLAGS = (
    *("vision_encoder_path", "vision_encoder_pretrained", "lm_path", "tokenizer_path", "cross_attn_every_n_layers"),
    *("freeze_lm_embeddings", "train_output_rows"),
)
DATA_FLAGS = (
    *("laion_shards", "mmc4_shards", "dataset_resampled", "seed", "mmc4_textsim_threshold", "mmc4_max_num_images"),
    *("mmc4_min_num_images", "max_image_pixels", "shuffle_buffer_laion", "shuffle_buffer_mmc4"),
)

# The rank of this process, as launchers say it: see `distributed.LAUNCHERS`.
RANK_VARIABLES = ("RANK", "HOROVOD_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID")

T = TypeVar("T")


def _type(what: str, convert: Callable[[str], T], valid: Callable[[T], object]) -> Callable[[str], T]:
    """A flag's type. argparse puts the flag before the message of an ArgumentTypeError."""

    def parse(text: str) -> T:
        with suppress(ValueError):
            if valid(value := convert(text)):
                return value
        raise argparse.ArgumentTypeError(f"must be {what}, not {text!r}")

    return parse


positive_int = _type("a whole number of at least 1", int, lambda value: value >= 1)
non_negative_int = _type("a whole number of at least 0", int, lambda value: value >= 0)
seed = _type("a whole number from 0 to 4294967295", int, lambda value: 0 <= value < 2**32)  # NumPy's range
finite_float = _type("a finite number", float, math.isfinite)
non_negative_float = _type("a finite number of at least 0", float, lambda value: 0 <= value < math.inf)
# NCCL and gloo count milliseconds, in 64 bits; a year is more than anyone waits.
seconds = _type("seconds, above 0 and at most 31536000", float, lambda value: 0 < value <= 365 * 24 * 3600)
_URL = re.compile(r"env://|tcp://(\[[^\[\]]+\]|[^\s:/\[\]]+):\d{1,5}|file:///.+")
dist_url = _type("env://, tcp://<host of rank 0>:<free port> or file:///<new file all ranks see>", str, _URL.fullmatch)
# As torch takes it: one backend, or one for each kind of device, as in cpu:gloo,cuda:nccl.
_BACKEND = "(nccl|gloo|mpi|ucc)"
_BACKENDS = re.compile(f"{_BACKEND}|(cpu|cuda):{_BACKEND}(,(cpu|cuda):{_BACKEND})*")
dist_backend = _type("nccl, gloo, mpi or ucc", str.lower, _BACKENDS.fullmatch)
wandb_name = _type(
    "at most 128 characters and none of / \\ # ? % :",
    lambda text: text or None,  # scripts pass variables that may not be set
    lambda name: re.fullmatch(r"[^/\\#?%:]{0,128}", name or ""),
)


class _Parser(argparse.ArgumentParser):
    """Answers a mistake with one line, without the usage of sixty flags, and says what to type instead."""

    def error(self, message: str) -> NoReturn:
        message = message.removeprefix("argument ")
        if match := re.fullmatch(r"(\S+): expected one argument", message):
            message = f"{match[1]}: needs a value; one that begins with '-' is written {match[1]}=-value"
        elif match := re.fullmatch(r"(\S+): ignored explicit argument (.*)", message, re.DOTALL):
            message = f"{match[1]}: takes no value, got {match[2]}; give it alone to turn it on, or leave it out"
        line = message.replace("\r", "\\r").replace("\n", "\\n")
        self.exit(2, f"{self.prog}: error: {line}\n")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(self._suggest(unknown))
        return parsed

    def _suggest(self, unknown: list[str]) -> str:
        flag = next((word.split("=")[0] for word in unknown if word.startswith("-")), None)
        if flag is None:
            return f"{unknown[0]!r} belongs to no flag: a flag takes one value at most. Put shard patterns in quotes"
        near = get_close_matches(flag, re.findall(r"--[\w-]+", self.format_help()), n=1)
        return f"unknown flag {flag}: " + (f"did you mean {near[0]}?" if near else "--help lists all flags")


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="open-flamingo-train",
        description="Train an OpenFlamingo-style vision-language model on LAION and MMC4 WebDataset shards.",
    )
    _add_model_and_data_flags(parser)
    _add_training_flags(parser)
    _add_distributed_and_reporting_flags(parser)
    for action in parser._actions:  # `(default: None)` and `(default: False)` would say nothing
        if action.help and action.default not in (None, False, argparse.SUPPRESS):
            action.help += " (default: %(default)s)"
    return parser


# A flag is one line to three, its help among them.
# fmt: off


def _add_model_and_data_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("model").add_argument
    add("--vision_encoder_path", default="ViT-L-14",
        help="OpenCLIP model name, hf-hub:<repo>, local-dir:<folder>, or the path of an OpenCLIP model config (.json)")
    add("--vision_encoder_pretrained", default="openai",
        help="OpenCLIP weight tag, or a local file of weights; not needed where hf-hub: or local-dir: brings them")
    add("--lm_path", default="facebook/opt-1.3b", help="Hugging Face causal language model: name or folder")
    add("--tokenizer_path", help="Hugging Face tokenizer: name or folder. Without it, the one of --lm_path")
    add("--trust_remote_code", action="store_true",
        help="run model code that comes with --lm_path (and its tokenizer); without it such a model is refused")
    add("--cross_attn_every_n_layers", type=positive_int, default=1,
        help="one gated cross-attention block before every n-th decoder layer")
    add("--freeze_lm_embeddings", action="store_true", help="do not train the embeddings of <image> and <|endofchunk|>")
    add("--train_output_rows", action="store_true",
        help="where the output head is not tied to the input embeddings: train its rows of the new tokens too")

    add = parser.add_argument_group(
        "data", "Shards are brace patterns, '*.tar', or '@list.txt' with one of these per line, several joined by '::'; local paths, "
        "http(s)://, s3:// or pipe:<command>.").add_argument
    add("--laion_shards", help="image-caption shards, e.g. /data/laion/{00000..01000}.tar")
    add("--mmc4_shards", help="interleaved-document shards, e.g. s3://bucket/mmc4/{000..999}.tar")
    add("--missing_shards", choices=["warn", "stop"], default="warn",
        help="when local shards of a pattern do not exist: warn and train on the others while at least 90 %% exist, or stop")
    add("--val_laion_shards", help="held-out image-caption shards: validate on the first --val_samples that can be used")
    add("--val_mmc4_shards", help="held-out interleaved-document shards")
    add("--val_samples", type=positive_int, default=512,
        help="how many of each dataset, over all ranks; they stay in host memory")
    add("--val_steps", type=non_negative_int, default=0,
        help="validate every N updates, and before the first and after the last. 0: at each epoch's end instead")
    add("--val_captions", type=non_negative_int, default=8, help="held-out images that are captioned at each validation")
    add("--batch_size_laion", type=positive_int, default=128, help="pairs per rank and forward pass")
    add("--batch_size_mmc4", type=positive_int, default=128, help="documents per rank and forward pass")
    add("--train_num_samples_laion", type=positive_int, default=10000, help="pairs per epoch, all ranks together")
    add("--train_num_samples_mmc4", type=positive_int, default=10000, help="documents per epoch, all ranks together")
    add("--workers", type=non_negative_int, default=1,
        help="loader processes per dataset and rank; 0 loads in the training process")
    add("--dataset_resampled", action="store_true",
        help="draw shards with replacement instead of reading every shard once per pass")
    add("--mmc4_textsim_threshold", type=finite_float, default=30,
        help="drop images whose similarity to their sentence is less; in the unit of the shards' similarity_matrix")
    add("--mmc4_max_num_images", type=positive_int, default=6, help="images used per document, the first in its text")
    add("--mmc4_min_num_images", type=positive_int, default=1, help="documents with fewer usable images are dropped")
    add("--max_image_pixels", type=positive_int, default=100_000_000, help="larger images are dropped and counted, never decoded")
    add("--data_lanes", type=positive_int,
        help="deterministic streams of shards that the samples are dealt from; ranks x workers must divide it. The "
        "order of samples depends on it and on --seed alone. Default: ranks x workers, doubled until it is at "
        "least 16")
    add("--shuffle_buffer_laion", type=positive_int, default=500,
        help="pairs (undecoded) that each lane shuffles among; a lane holds them in memory. 1 turns shuffling off")
    add("--shuffle_buffer_mmc4", type=positive_int, default=32,
        help="documents (undecoded, from 0.3 to many MB each) that each lane shuffles among. 1 turns shuffling off")


def _add_training_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("optimization").add_argument
    add("--num_epochs", type=positive_int, default=1, help="an epoch is --train_num_samples_*, not a pass over shards")
    add("--gradient_accumulation_steps", type=positive_int, default=1, help="batches of each dataset per update")
    add("--learning_rate", type=non_negative_float, default=1e-4, help="at the end of warm-up")
    add("--lr_scheduler", choices=["constant", "linear", "cosine"], default="constant")
    add("--warmup_steps", type=non_negative_int, default=5000, help="updates in which the rate rises from 0")
    add("--weight_decay", type=non_negative_float, default=0.1, help="on the gated cross-attention only")
    add("--loss_multiplier_laion", type=non_negative_float, default=1.0, help="weight of the LAION loss")
    add("--loss_multiplier_mmc4", type=non_negative_float, default=1.0, help="weight of the MMC4 loss")
    add("--max_bad_steps", type=positive_int, default=20,
        help="stop after so many updates in a row whose loss or gradient is not finite")
    add("--seed", type=seed, default=42, help="of new weights and of the order of the data")

    add = parser.add_argument_group("run and checkpoints").add_argument
    add("--run_name", default="openflamingo3B",
        help="output folder and name of the run; starting again with the same one goes on from its newest checkpoint")
    add("--dry_run", action="store_true",
        help="do not train: build the model without memory, read a little of the data, and print the memory, time, disk space and "
        "data of the run; exit code 1 where something will fail or is very likely wrong. Needs no GPU")
    add("--dry_run_ranks", type=positive_int, help="number of ranks to plan for, or whose rank 0 to preview. Default: as launched")
    add("--dry_run_gpu", choices=["A100-40GB", "A100", "H100", "H200", "B200"],
        help="GPU to plan for. Default: the one that is here, if it is one of these")
    add("--preview", type=positive_int, metavar="N",
        help="do not train: write {run_name}/preview.html, a page of the first N samples of each dataset as rank 0 would train on them "
        "(images, tokens, what counts in the loss, what was cut off), and of what is left out and why. Needs no GPU")
    add("--resume_from_checkpoint",
        help="checkpoint to start from, this program's or the reference's, while the run folder has none of its own")
    add("--allow_changed_flags", action="store_true",
        help="resume although flags that matter differ from the checkpoint's; where the data differ they start over")
    add("--save_steps", type=non_negative_int, default=0,
        help="also save every N updates within an epoch, keeping the newest two of those. 0: only at an epoch's end")
    add("--delete_previous_checkpoint", action="store_true",
        help="keep only the newest checkpoint; the one before is deleted once the new one is safe on disk")
    add("--checkpoint_format", choices=["file", "sharded"], default="file",
        help="file: one file, written by rank 0, as the reference. sharded: a folder that every rank writes its part "
        "of; `python -m open_flamingo.train.sharded` makes one file of it. Either is written while training goes on")
    add("--save_errors", choices=["stop", "warn"], default="stop",
        help="when a checkpoint cannot be written: stop, or warn and train on")

    add = parser.add_argument_group("precision and memory").add_argument
    add("--precision", choices=["fp32", "amp_bf16", "amp_bfloat16", "bf16", "fp16"], default="fp32",
        help="amp_bf16 (or amp_bfloat16): matrix products in bfloat16, trained weights and optimizer in float32. "
        "fp16: the same in float16, with a loss scale that adapts; an update whose gradients overflow is skipped but "
        "counts as done. bf16: everything in bfloat16, trained weights and optimizer too: half their memory, but an "
        "update of less than 1/512 of a weight is lost, so training may stall where amp_bf16 would go on")
    add("--gradient_checkpointing", action="store_true",
        help="recompute decoder layers, gated blocks and resampler in the backward pass: less memory, a third slower")
    add("--deterministic", action="store_true",
        help="the same bits on each run on the same number of GPUs; slower. (On CPUs it is always so)")
    add("--compile", action="store_true",
        help="compile decoder layers, gated blocks and resampler layers with torch.compile: fewer, faster kernels after "
        "some minutes of compiling at the start; measure whether it pays on your machine. Needs a C compiler")


def _add_distributed_and_reporting_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("distributed").add_argument
    add("--dist-url", type=dist_url, default="env://",
        help="where the ranks meet, e.g. tcp://<host of rank 0>:<free port>. env://: at MASTER_ADDR and MASTER_PORT; "
        "where these are not set, SLURM tells, and on one node Open MPI and horovodrun")
    add("--dist-backend", type=dist_backend, default="nccl",
        help="torch.distributed backend; gloo is taken where there is no GPU")
    add("--dist_timeout", type=seconds, default=600.0,
        help="seconds without a batch after which a loader counts as hung while training; the other ranks wait a "
        "quarter longer for its rank before they end the job")
    add("--startup_timeout", type=seconds, default=3600.0,
        help="the same before the first update is done: rank 0 may download the model, verify a checkpoint and compile")
    add("--horovod", action="store_true", help="accepted and ignored: horovodrun is known by its variables")
    add("--no-set-device-rank", action="store_true", help="use device 0 in every process")
    add("--fsdp", action="store_true",
        help="shard the model over the ranks (FSDP2). Gradients are whole on every rank until the update")
    add("--fsdp_use_orig_params", action="store_true", help="always so; accepted and ignored")
    add("--fsdp_sharding_strategy", choices=["full", "hybrid"], default="full",
        help="full: over all ranks. hybrid: within a node, with a copy on every node, so that only gradients of "
        "shards cross the network")
    add("--fsdp_shard_size", type=positive_int,
        help="with hybrid: ranks that share one copy of the model. Default: the ranks of a node")
    add("--fsdp_frozen", choices=["shard", "replicate"], default="shard",
        help="replicate: keep the frozen weights whole on every rank. Costs their memory and saves gathering them in "
        "every pass, forward and backward; pays where the frozen model fits beside the rest and links are slow")

    add = parser.add_argument_group("reporting").add_argument
    add("--logging_steps", type=positive_int, default=100, help="a log line every N updates")
    add("--offline", action="store_true", help="no hub downloads, and W&B writes to disk only")
    add("--report_to_wandb", action="store_true", help="log to Weights & Biases")
    add("--wandb_project", type=wandb_name, help="W&B project")
    add("--wandb_entity", type=wandb_name, help="W&B entity")
    add("--save_checkpoints_to_wandb", action="store_true", help="upload checkpoints to W&B")
    add("--report_to_tensorboard", action="store_true", help="write TensorBoard events to {run_name}/tensorboard")


# fmt: on


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses and checks the flags; a mistake ends the program with exit code 2 and a line that says what to type."""
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        check_flags(args)
    except (ValueError, OSError) as error:  # OSError: a name that is too long, say
        parser.error(str(error))
    return args


def check_flags(args: argparse.Namespace) -> None:
    """What must be right beside the flags' types: data, folders and names that go together. Needs no model, GPU or network.

    Raises ValueError or OSError, naming the flag and what to do.
    """
    kinds = [kind for kind in ("laion", "mmc4") if getattr(args, f"{kind}_shards") is not None]
    if not kinds:
        raise ValueError("no data: give --laion_shards, --mmc4_shards or both")
    rank = next((os.environ[name] for name in RANK_VARIABLES if name in os.environ), "0")
    for kind in kinds if rank == "0" else ():  # other ranks get the list from rank 0
        check_shards(f"--{kind}_shards", getattr(args, f"{kind}_shards"), args.missing_shards)
    val_shards = {
        flag: spec for flag in ("val_laion_shards", "val_mmc4_shards") if (spec := getattr(args, flag)) is not None
    }
    for flag, spec in val_shards.items() if rank == "0" else ():
        check_shards(f"--{flag}", spec, "stop")
    if args.val_steps and not val_shards:
        raise ValueError("--val_steps needs --val_laion_shards, --val_mmc4_shards or both")
    if len(kinds) == 2:
        check_epoch_lengths(
            *(args.train_num_samples_laion, args.batch_size_laion, args.train_num_samples_mmc4, args.batch_size_mmc4)
        )
    least, most = args.mmc4_min_num_images, args.mmc4_max_num_images
    if least > most:
        raise ValueError(
            f"--mmc4_min_num_images {least} is more than --mmc4_max_num_images {most}: every document would be dropped"
        )
    if not any(getattr(args, f"loss_multiplier_{kind}") for kind in kinds):
        weights = " and ".join(f"--loss_multiplier_{kind}" for kind in kinds)
        raise ValueError(f"{weights} 0: there is no loss to train on; give a number above 0")
    tokenizer, tokenizer_flag = args.tokenizer_path, "--tokenizer_path"
    if tokenizer is None:
        tokenizer, tokenizer_flag = args.lm_path, "--tokenizer_path (not given, so that of --lm_path)"
    for flag, check, *values in (
        ("--vision_encoder_path", check_vision_encoder, args.vision_encoder_path),
        ("--vision_encoder_pretrained", check_vision_weights, args.vision_encoder_pretrained, args.vision_encoder_path),
        ("--lm_path", check_language_model, args.lm_path),
        (tokenizer_flag, check_tokenizer, tokenizer),
        ("--run_name", check_run_folder, args.run_name),
        ("--resume_from_checkpoint", check_checkpoint, args.resume_from_checkpoint),
    ):
        try:
            check(*values)
        except (ValueError, OSError) as error:  # OSError: a name that is too long, say
            raise ValueError(f"{flag}: {error}") from error
    if args.preview and args.dry_run:
        raise ValueError(f"--preview {args.preview} and --dry_run: give one of them, then the other")
    if args.save_checkpoints_to_wandb and not args.report_to_wandb:
        raise ValueError("--save_checkpoints_to_wandb needs --report_to_wandb")
    if args.save_checkpoints_to_wandb and args.checkpoint_format == "sharded":
        raise ValueError("--save_checkpoints_to_wandb uploads files: it needs --checkpoint_format file")
    if args.fsdp_shard_size and not (args.fsdp and args.fsdp_sharding_strategy == "hybrid"):
        raise ValueError(f"--fsdp_shard_size {args.fsdp_shard_size} needs --fsdp --fsdp_sharding_strategy hybrid")


def check_epoch_lengths(samples_laion: int, batch_laion: int, samples_mmc4: int, batch_mmc4: int) -> None:
    """The reference's rule: one epoch is the same number of batches of both datasets."""
    batches_laion, batches_mmc4 = samples_laion // batch_laion, samples_mmc4 // batch_mmc4
    if batches_laion == batches_mmc4:
        return
    # The nearest to what was given that hold as many whole batches as the other dataset.
    laion = min(max(samples_laion, batches_mmc4 * batch_laion, 1), (batches_mmc4 + 1) * batch_laion - 1)
    mmc4 = min(max(samples_mmc4, batches_laion * batch_mmc4, 1), (batches_laion + 1) * batch_mmc4 - 1)
    raise ValueError(
        f"an epoch must be the same number of batches of both datasets, but --train_num_samples_laion {samples_laion} "
        f"// --batch_size_laion {batch_laion} = {batches_laion} and --train_num_samples_mmc4 {samples_mmc4} "
        f"// --batch_size_mmc4 {batch_mmc4} = {batches_mmc4}. The nearest that agree: --train_num_samples_mmc4 {mmc4}, or "
        f"--train_num_samples_laion {laion}"
    )


def check_run_folder(run_name: str) -> None:
    """Raises ValueError or OSError where the run's folder cannot be made or written to."""
    if not run_name.strip():
        raise ValueError(f"{run_name!r} is empty: it names the output folder")
    folder = Path(run_name).absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir():
        raise ValueError(f"{run_name} would need a folder {existing}, which is a file: choose another")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"{run_name}: the folder {existing} cannot be written to: choose another")


def check_checkpoint(path: str | None) -> None:
    """Raises ValueError where there is no checkpoint at `path`."""
    if path is None:
        return
    if os.path.isdir(path):
        if not os.path.isfile(os.path.join(path, SHARDED_STATE)):
            raise ValueError(f"{path} is no checkpoint: give a file, or a folder with a {SHARDED_STATE} in it")
    elif not os.path.isfile(path):
        raise ValueError(f"no such file: {path!r}; without this flag a run goes on from its own newest checkpoint")
    elif not os.access(path, os.R_OK):
        raise ValueError(f"{path} cannot be read: no permission")
