"""The command line: every flag, its help, and every check that needs no model, no GPU and no network.

Only the standard library is imported here, so `--help` and a wrong flag answer at once. `parse_args` returns a
namespace that nothing changes afterwards; what is derived from it is computed where it is used.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import tempfile
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from open_flamingo.backbones import check_language_model, check_tokenizer, check_vision_encoder, check_vision_weights
from open_flamingo.train.data.shards import check_shards

# A checkpoint made with another value of one of these describes another model or another order of samples.
MODEL_FLAGS = (
    "vision_encoder_path",
    "vision_encoder_pretrained",
    "lm_path",
    "tokenizer_path",
    "cross_attn_every_n_layers",
    "freeze_lm_embeddings",
    "train_output_rows",
)
DATA_FLAGS = (
    "laion_shards",
    "mmc4_shards",
    "dataset_resampled",
    "seed",
    "mmc4_textsim_threshold",
    "mmc4_max_num_images",
    "mmc4_min_num_images",
    "max_image_pixels",
    "shuffle_buffer_laion",
    "shuffle_buffer_mmc4",
)

LARGEST_SEED = 2**32 - 1  # NumPy's, and so the reference's
YEAR = 365 * 24 * 3600
BACKENDS = ("nccl", "gloo", "mpi", "ucc")
WANDB_FORBIDS = "/\\#?%:"
WANDB_LONGEST = 128
# Of a sharded checkpoint's folder, the file that holds all but the tensors.
SHARDED_STATE = "state.pt"

# Loader processes hand over their batches through sockets in the folder for temporary files: Linux allows 108 bytes
# for the name of one, of which multiprocessing takes 32.
MAX_TEMPORARY_FOLDER = 75

# The rank of this process, as launchers say it: see `distributed.find_place`.
RANK_VARIABLES = ("RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID", "HOROVOD_RANK")

T = TypeVar("T", int, float)


def _number(convert: Callable[[str], T], what: str, text: str, valid: Callable[[T], bool]) -> T:
    """`text` as a number that is `valid`; argparse.ArgumentTypeError, which argparse prefixes with the flag, otherwise."""
    try:
        value = convert(text)
        if valid(value):
            return value
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"must be {what}, not {text!r}")


def positive_int(text: str) -> int:
    return _number(int, "a whole number of at least 1", text, lambda value: value >= 1)


def non_negative_int(text: str) -> int:
    return _number(int, "a whole number of at least 0", text, lambda value: value >= 0)


def seed(text: str) -> int:
    return _number(int, f"a whole number from 0 to {LARGEST_SEED}", text, lambda value: 0 <= value <= LARGEST_SEED)


def finite_float(text: str) -> float:
    return _number(float, "a finite number", text, math.isfinite)


def non_negative_float(text: str) -> float:
    return _number(float, "a finite number of at least 0", text, lambda value: 0 <= value < math.inf)


def seconds(text: str) -> float:
    # NCCL and gloo count in milliseconds, in 64 bits; a year is more than anyone waits.
    return _number(float, f"seconds, above 0 and at most {YEAR}", text, lambda value: 0 < value <= YEAR)


def dist_url(text: str) -> str:
    if text != "env://" and not re.fullmatch(r"tcp://(\[[^\[\]]+\]|[^\s:/\[\]]+):\d{1,5}|file:///.+", text):
        raise argparse.ArgumentTypeError(
            f"must be env://, tcp://<host of rank 0>:<free port> or file:///<a new file that all ranks see>, not {text!r}"
        )
    return text


def dist_backend(text: str) -> str:
    """One of BACKENDS; or, as torch takes it, one for each kind of device: cpu:gloo,cuda:nccl."""
    known = "|".join(BACKENDS)
    if not re.fullmatch(f"({known})|(cpu|cuda):({known})(,(cpu|cuda):({known}))*", text.lower()):
        raise argparse.ArgumentTypeError(f"must be {', '.join(BACKENDS[:-1])} or {BACKENDS[-1]}, not {text!r}")
    return text.lower()


def wandb_name(text: str) -> str | None:
    """Empty is none: scripts pass variables that may not be set."""
    if any(character in text for character in WANDB_FORBIDS) or len(text) > WANDB_LONGEST:
        raise argparse.ArgumentTypeError(
            f"must have at most {WANDB_LONGEST} characters and none of {' '.join(WANDB_FORBIDS)}, is {text!r}"
        )
    return text or None


class _Parser(argparse.ArgumentParser):
    """Answers a mistake with one line, without the usage of sixty flags, and says what to type instead."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {_in_one_line(_plainly(message))}\n")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(self._about(unknown))
        return parsed

    def _about(self, unknown: list[str]) -> str:
        flag = next((word.split("=")[0] for word in unknown if word.startswith("-")), None)
        if flag is not None:
            near = get_close_matches(flag, re.findall(r"--[\w-]+", self.format_help()), n=1)
            return f"unknown flag {flag}: " + (f"did you mean {near[0]}?" if near else "--help lists all flags")
        return (
            f"{unknown[0]!r} belongs to no flag: a flag takes one value or none. Shard patterns must be in quotes, so that "
            "the shell leaves their braces and stars alone"
        )


def _plainly(message: str) -> str:
    """argparse's messages, where they do not say what to type."""
    message = message.removeprefix("argument ")
    if match := re.fullmatch(r"(\S+): expected one argument", message):
        return f"{match[1]}: needs a value; one that begins with '-' is written {match[1]}=-value"
    if match := re.fullmatch(r"(\S+): ignored explicit argument (.*)", message, re.DOTALL):
        return f"{match[1]}: takes no value, got {match[2]}; the flag alone turns it on, and without it it is off"
    return message


def _in_one_line(message: str) -> str:
    return message.replace("\r", "\\r").replace("\n", "\\n")


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Default values in the help, but not `(default: None)` or `(default: False)`, which say nothing."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, False) or action.default is argparse.SUPPRESS:
            return action.help
        return super()._get_help_string(action)


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="open-flamingo-train",
        description="Train an OpenFlamingo-style vision-language model on LAION and MMC4 WebDataset shards.",
        formatter_class=_Formatter,
    )

    model = parser.add_argument_group("model")
    model.add_argument(
        "--vision_encoder_path",
        default="ViT-L-14",
        help="OpenCLIP model name, hf-hub:<repo>, local-dir:<folder>, or the path of an OpenCLIP model config (.json)",
    )
    model.add_argument(
        "--vision_encoder_pretrained",
        default="openai",
        help="OpenCLIP weight tag, or a local file of weights; not needed where hf-hub: or local-dir: brings them",
    )
    model.add_argument(
        "--lm_path", default="facebook/opt-1.3b", help="Hugging Face causal language model: name or folder"
    )
    model.add_argument(
        "--tokenizer_path", help="Hugging Face tokenizer: name or folder. Without it, the one of --lm_path"
    )
    model.add_argument(
        "--trust_remote_code",
        action="store_true",
        help="run model code that comes with --lm_path (and its tokenizer); without it such a model is refused",
    )
    model.add_argument(
        "--cross_attn_every_n_layers",
        type=positive_int,
        default=1,
        help="one gated cross-attention block before every n-th decoder layer",
    )
    model.add_argument(
        "--freeze_lm_embeddings",
        action="store_true",
        help="do not train the embeddings of <image> and <|endofchunk|>",
    )
    model.add_argument(
        "--train_output_rows",
        action="store_true",
        help="where the output head is not tied to the input embeddings: train its rows of the new tokens too",
    )

    data = parser.add_argument_group(
        "data",
        "Shards are brace patterns, '*.tar', or '@list.txt' with one of these per line, several joined by '::'; local paths, "
        "http(s)://, s3:// or pipe:<command>.",
    )
    data.add_argument("--laion_shards", help="image-caption shards, e.g. /data/laion/{00000..01000}.tar")
    data.add_argument("--mmc4_shards", help="interleaved-document shards, e.g. s3://bucket/mmc4/{000..999}.tar")
    data.add_argument(
        "--missing_shards",
        choices=["warn", "stop"],
        default="warn",
        help="when local shards of a pattern do not exist: warn and train on the others while at least 90 %% exist, or stop",
    )
    data.add_argument("--batch_size_laion", type=positive_int, default=128, help="pairs a rank and forward pass")
    data.add_argument("--batch_size_mmc4", type=positive_int, default=128, help="documents a rank and forward pass")
    data.add_argument(
        "--train_num_samples_laion", type=positive_int, default=10000, help="pairs an epoch, all ranks together"
    )
    data.add_argument(
        "--train_num_samples_mmc4", type=positive_int, default=10000, help="documents an epoch, all ranks together"
    )
    data.add_argument(
        "--workers",
        type=non_negative_int,
        default=1,
        help="loader processes per dataset and rank; 0 loads in the training process",
    )
    data.add_argument(
        "--dataset_resampled",
        action="store_true",
        help="draw shards with replacement instead of reading every shard once a pass",
    )
    data.add_argument(
        "--mmc4_textsim_threshold",
        type=finite_float,
        default=30,
        help="drop images whose similarity to their sentence is less; in the unit of the shards' similarity_matrix",
    )
    data.add_argument(
        "--mmc4_max_num_images", type=positive_int, default=6, help="images used of a document, the first in its text"
    )
    data.add_argument(
        "--mmc4_min_num_images", type=positive_int, default=1, help="documents with fewer usable images are dropped"
    )
    data.add_argument(
        "--max_image_pixels",
        type=positive_int,
        default=100_000_000,
        help="larger images are dropped and counted, never decoded",
    )
    data.add_argument(
        "--data_lanes",
        type=positive_int,
        help="deterministic streams of shards that the samples are dealt from; ranks x workers must divide it. "
        "The order of samples depends on it and on --seed alone. Default: the smallest power of two that is at "
        "least 16 and at least ranks x workers",
    )
    data.add_argument(
        "--shuffle_buffer_laion",
        type=positive_int,
        default=500,
        help="pairs (undecoded) that each lane shuffles among; a lane holds them in memory. 1 turns shuffling off",
    )
    data.add_argument(
        "--shuffle_buffer_mmc4",
        type=positive_int,
        default=32,
        help="documents (undecoded, from 0.3 to many MB each) that each lane shuffles among. 1 turns shuffling off",
    )

    optimisation = parser.add_argument_group("optimisation")
    optimisation.add_argument(
        "--num_epochs", type=positive_int, default=1, help="an epoch is --train_num_samples_*, not a pass over shards"
    )
    optimisation.add_argument(
        "--gradient_accumulation_steps", type=positive_int, default=1, help="batches of each dataset an update"
    )
    optimisation.add_argument("--learning_rate", type=non_negative_float, default=1e-4, help="at the end of warm-up")
    optimisation.add_argument("--lr_scheduler", choices=["constant", "linear", "cosine"], default="constant")
    optimisation.add_argument(
        "--warmup_steps", type=non_negative_int, default=5000, help="updates in which the rate rises from 0"
    )
    optimisation.add_argument(
        "--weight_decay", type=non_negative_float, default=0.1, help="on the gated cross-attention only"
    )
    optimisation.add_argument(
        "--loss_multiplier_laion", type=non_negative_float, default=1.0, help="weight of the LAION loss"
    )
    optimisation.add_argument(
        "--loss_multiplier_mmc4", type=non_negative_float, default=1.0, help="weight of the MMC4 loss"
    )
    optimisation.add_argument(
        "--max_bad_steps",
        type=positive_int,
        default=20,
        help="stop after so many updates in a row whose loss or gradient is not finite",
    )
    optimisation.add_argument("--seed", type=seed, default=42, help="of new weights and of the order of the data")

    run = parser.add_argument_group("run and checkpoints")
    run.add_argument(
        "--run_name",
        default="openflamingo3B",
        help="output folder and name of the run; starting again with the same one goes on from its newest checkpoint",
    )
    run.add_argument(
        "--resume_from_checkpoint",
        help="checkpoint to start from, this program's or the reference's, while the run folder has none of its own",
    )
    run.add_argument(
        "--allow_changed_flags",
        action="store_true",
        help="resume although flags that matter differ from the checkpoint's; where the data differ they start anew",
    )
    run.add_argument(
        "--save_steps",
        type=non_negative_int,
        default=0,
        help="also save every N updates within an epoch, keeping the newest two of those. 0: only at an epoch's end",
    )
    run.add_argument(
        "--delete_previous_checkpoint",
        action="store_true",
        help="keep only the newest checkpoint; the one before is deleted once the new one is safe on disk",
    )
    run.add_argument(
        "--checkpoint_format",
        choices=["file", "sharded"],
        default="file",
        help="file: one file, written by rank 0, as the reference. sharded: a folder that every rank writes its part of; "
        "`python -m open_flamingo.train.sharded` makes one file of it. Either is written while training goes on",
    )

    run.add_argument(
        "--save_errors",
        choices=["stop", "warn"],
        default="stop",
        help="when a checkpoint cannot be written: stop, or warn and train on",
    )

    precision = parser.add_argument_group("precision and memory")
    precision.add_argument(
        "--precision",
        choices=["fp32", "amp_bf16", "amp_bfloat16", "bf16", "fp16"],
        default="fp32",
        help="amp_bf16 (or amp_bfloat16): matrix products in bfloat16, trained weights and optimiser in float32. "
        "fp16: the same in float16, with a loss scale that adapts; an update whose gradients overflow is skipped but "
        "counts as done. bf16: everything in bfloat16, trained weights and optimiser too: half their memory, but an "
        "update of less than 1/512 of a weight is lost, so training may stall where amp_bf16 would go on",
    )
    precision.add_argument(
        "--gradient_checkpointing",
        action="store_true",
        help="recompute decoder layers, gated blocks and resampler in the backward pass: less memory, a third slower",
    )
    precision.add_argument(
        "--deterministic",
        action="store_true",
        help="the same bits on each run on the same number of GPUs; slower. (On CPUs it is always so)",
    )
    precision.add_argument(
        "--compile",
        action="store_true",
        help="compile decoder layers, gated blocks and resampler layers with torch.compile: faster updates, after some "
        "minutes of compiling at the start. Needs a C compiler",
    )

    distributed = parser.add_argument_group("distributed")
    distributed.add_argument(
        "--dist-url",
        type=dist_url,
        default="env://",
        help="where the ranks meet, e.g. tcp://<host of rank 0>:<free port>. env://: at MASTER_ADDR and MASTER_PORT; where "
        "these are not set, SLURM, Open MPI on one node and Horovod tell",
    )
    distributed.add_argument(
        "--dist-backend",
        type=dist_backend,
        default="nccl",
        help="torch.distributed backend; gloo is taken where there is no GPU",
    )
    distributed.add_argument(
        "--dist_timeout",
        type=seconds,
        default=600.0,
        help="seconds without a batch after which a loader counts as hung while training; the other ranks wait a quarter "
        "longer for its rank before they end the job",
    )
    distributed.add_argument(
        "--startup_timeout",
        type=seconds,
        default=3600.0,
        help="the same before the first update is done: rank 0 may download the model, verify a checkpoint and compile",
    )
    distributed.add_argument("--horovod", action="store_true", help="started by horovodrun: ask Horovod for the rank")
    distributed.add_argument("--no-set-device-rank", action="store_true", help="use device 0 in every process")
    distributed.add_argument(
        "--fsdp",
        action="store_true",
        help="shard the model over the ranks (FSDP2). Gradients are whole on every rank until the update",
    )
    distributed.add_argument("--fsdp_use_orig_params", action="store_true", help="always so; accepted and ignored")
    distributed.add_argument(
        "--fsdp_sharding_strategy",
        choices=["full", "hybrid"],
        default="full",
        help="full: over all ranks. hybrid: within a node, with a copy on every node, so that only gradients of shards "
        "cross the network",
    )
    distributed.add_argument(
        "--fsdp_shard_size",
        type=positive_int,
        help="with hybrid: ranks that share one copy of the model. Default: the ranks of a node",
    )
    distributed.add_argument(
        "--fsdp_frozen",
        choices=["shard", "replicate"],
        default="shard",
        help="replicate: keep the frozen weights whole on every rank. Costs their memory and saves gathering them in "
        "every pass, forward and backward; pays where the frozen model fits beside the rest and links are slow",
    )

    report = parser.add_argument_group("reporting")
    report.add_argument("--logging_steps", type=positive_int, default=100, help="a log line every N updates")
    report.add_argument("--offline", action="store_true", help="no hub downloads, and W&B writes to disk only")
    report.add_argument("--report_to_wandb", action="store_true", help="log to Weights & Biases")
    report.add_argument("--wandb_project", type=wandb_name, help="W&B project")
    report.add_argument("--wandb_entity", type=wandb_name, help="W&B entity")
    report.add_argument("--save_checkpoints_to_wandb", action="store_true", help="upload checkpoints to W&B")
    report.add_argument(
        "--report_to_tensorboard", action="store_true", help="write TensorBoard events to {run_name}/tensorboard"
    )
    return parser


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses and checks the flags; a mistake ends the program with exit code 2 and a line that says what to type."""
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        check(args)
    except (ValueError, OSError) as error:  # OSError: a name that is too long, say
        parser.error(str(error))
    return args


def check(args: argparse.Namespace) -> None:
    """Raises ValueError or OSError, naming the flag and what to do, for what argparse alone cannot see."""
    kinds = [kind for kind in ("laion", "mmc4") if getattr(args, f"{kind}_shards") is not None]
    if not kinds:
        raise ValueError("no data: give --laion_shards, --mmc4_shards or both")
    for kind in kinds:
        if is_first_process():  # others get the list from rank 0
            check_shards(f"--{kind}_shards", getattr(args, f"{kind}_shards"), args.missing_shards)
    check_numbers(args, kinds)
    check_backbones(args)
    check_temporary_folder(args)
    check_run_folder(args.run_name)
    if args.resume_from_checkpoint is not None:
        check_checkpoint(args.resume_from_checkpoint)

    if args.save_checkpoints_to_wandb and not args.report_to_wandb:
        raise ValueError("--save_checkpoints_to_wandb needs --report_to_wandb")
    if args.save_checkpoints_to_wandb and args.checkpoint_format == "sharded":
        raise ValueError("--save_checkpoints_to_wandb uploads files: it needs --checkpoint_format file")
    if args.fsdp_shard_size and not (args.fsdp and args.fsdp_sharding_strategy == "hybrid"):
        raise ValueError(f"--fsdp_shard_size {args.fsdp_shard_size} needs --fsdp --fsdp_sharding_strategy hybrid")


def is_first_process() -> bool:
    """Whether this is rank 0 by its launcher's variables, as far as they tell before torch is imported."""
    return next((os.environ[name] for name in RANK_VARIABLES if name in os.environ), "0") == "0"


def check_temporary_folder(args: argparse.Namespace) -> None:
    """ValueError where loader processes could not hand over their batches."""
    folder = tempfile.gettempdir()
    if args.workers and len(os.fsencode(folder)) > MAX_TEMPORARY_FOLDER:
        raise ValueError(
            f"--workers {args.workers}: the folder for temporary files, {folder}, has too long a name for the sockets between "
            f"processes: set TMPDIR to one of at most {MAX_TEMPORARY_FOLDER} characters, such as /tmp, or use --workers 0"
        )


def check_numbers(args: argparse.Namespace, kinds: list[str]) -> None:
    """ValueError where numbers, each right by itself, do not go together. `kinds`: the datasets that are given."""
    if len(kinds) == 2:
        check_epoch_lengths(
            args.train_num_samples_laion, args.batch_size_laion, args.train_num_samples_mmc4, args.batch_size_mmc4
        )
    if args.mmc4_min_num_images > args.mmc4_max_num_images:
        raise ValueError(
            f"--mmc4_min_num_images {args.mmc4_min_num_images} is more than "
            f"--mmc4_max_num_images {args.mmc4_max_num_images}: every document would be dropped"
        )
    if not any(getattr(args, f"loss_multiplier_{kind}") for kind in kinds):
        weights = " and ".join(f"--loss_multiplier_{kind}" for kind in kinds)
        raise ValueError(f"{weights} 0: there is no loss to train on; give a number above 0")


def check_backbones(args: argparse.Namespace) -> None:
    """ValueError or FileNotFoundError, naming the flag, for a backbone that cannot be one."""
    values: list[tuple[str, str, Callable[[str], None]]] = [
        ("--vision_encoder_path", args.vision_encoder_path, check_vision_encoder),
        (
            "--vision_encoder_pretrained",
            args.vision_encoder_pretrained,
            lambda value: check_vision_weights(value, args.vision_encoder_path),
        ),
        ("--lm_path", args.lm_path, check_language_model),
    ]
    if args.tokenizer_path is not None:
        values.append(("--tokenizer_path", args.tokenizer_path, check_tokenizer))
    else:
        values.append(("--tokenizer_path (not given, so that of --lm_path)", args.lm_path, check_tokenizer))
    for flag, value, check_value in values:
        try:
            check_value(value)
        except (ValueError, OSError) as error:
            raise ValueError(f"{flag}: {error}") from error


def check_run_folder(run_name: str) -> None:
    """ValueError, naming --run_name, where the run's folder cannot be made or written to."""
    if not run_name.strip():
        raise ValueError(f"--run_name: {run_name!r} is empty: it names the output folder")
    folder = Path(run_name)
    try:
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"--run_name: {run_name} is a file, but names the output folder: choose another")
        existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    except OSError as error:
        raise ValueError(f"--run_name: {run_name} cannot be a folder ({error.strerror}): choose another") from error
    if not existing.is_dir():
        raise ValueError(f"--run_name: {run_name} lies in {existing}, which is a file: choose another")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"--run_name: {run_name}: the folder {existing} cannot be written to: choose another")


def check_checkpoint(path: str) -> None:
    """ValueError, naming --resume_from_checkpoint, where there is no checkpoint at `path`."""
    flag = "--resume_from_checkpoint"
    if path and Path(path).is_dir():
        if not (Path(path) / SHARDED_STATE).is_file():
            raise ValueError(
                f"{flag}: the folder {path} is not a checkpoint: give a file, or a folder with a {SHARDED_STATE} in it"
            )
    elif not Path(path).is_file():
        raise ValueError(
            f"{flag}: no such file: {path!r}; without this flag a run goes on from its own newest checkpoint"
        )
    elif not os.access(path, os.R_OK):
        raise ValueError(f"{flag}: {path} cannot be read: no permission")


def check_epoch_lengths(samples_laion: int, batch_laion: int, samples_mmc4: int, batch_mmc4: int) -> None:
    """The reference's rule: one epoch is the same number of batches of both datasets. ValueError otherwise."""
    batches_laion, batches_mmc4 = samples_laion // batch_laion, samples_mmc4 // batch_mmc4
    if batches_laion == batches_mmc4:
        return
    raise ValueError(
        f"an epoch must be the same number of batches of both datasets, but --train_num_samples_laion {samples_laion} "
        f"// --batch_size_laion {batch_laion} = {batches_laion} and --train_num_samples_mmc4 {samples_mmc4} "
        f"// --batch_size_mmc4 {batch_mmc4} = {batches_mmc4}. The nearest that agree: "
        f"--train_num_samples_mmc4 {_nearest(samples_mmc4, batches_laion, batch_mmc4)}, or "
        f"--train_num_samples_laion {_nearest(samples_laion, batches_mmc4, batch_laion)}"
    )


def _nearest(samples: int, batches: int, batch_size: int) -> int:
    """The number nearest to `samples` that holds `batches` whole batches."""
    least = max(1, batches * batch_size)
    return min(max(samples, least), batches * batch_size + batch_size - 1)
