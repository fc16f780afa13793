"""The command line: every flag, its help, and every check that needs no model, no GPU and no network.

Only the standard library is imported here, so `--help` and a wrong flag answer at once. `parse_args` returns a
namespace that nothing changes afterwards; what is derived from it is computed where it is used.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

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


def positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def non_negative_int(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must not be negative, got {value}")
    return value


def non_negative_float(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number of at least 0, got {text}")
    return value


def positive_float(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text}")
    return value


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Default values in the help, but not `(default: None)` or `(default: False)`, which say nothing."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, False) or action.default is argparse.SUPPRESS:
            return action.help
        return super()._get_help_string(action)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
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
        "--vision_encoder_pretrained", default="openai", help="OpenCLIP weight tag, or a local file of weights"
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
        "data", "Shards are brace patterns, several joined by '::'; local paths, http(s)://, s3:// or pipe:<command>."
    )
    data.add_argument("--laion_shards", help="image-caption shards, e.g. /data/laion/{00000..01000}.tar")
    data.add_argument("--mmc4_shards", help="interleaved-document shards, e.g. s3://bucket/mmc4/{000..999}.tar")
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
        type=float,
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
    optimisation.add_argument("--loss_multiplier_laion", type=float, default=1.0, help="weight of the LAION loss")
    optimisation.add_argument("--loss_multiplier_mmc4", type=float, default=1.0, help="weight of the MMC4 loss")
    optimisation.add_argument(
        "--max_bad_steps",
        type=positive_int,
        default=20,
        help="stop after so many updates in a row whose loss or gradient is not finite",
    )
    optimisation.add_argument("--seed", type=int, default=42, help="of new weights and of the order of the data")

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
        help="file: one file, written by rank 0, as the reference. sharded: a folder that every rank writes its part of "
        "while training goes on; `python -m open_flamingo.train.sharded` makes one file of it",
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
        "--compile",
        action="store_true",
        help="compile decoder layers, gated blocks and resampler layers with torch.compile: faster updates, after some "
        "minutes of compiling at the start. Needs a C compiler",
    )

    distributed = parser.add_argument_group("distributed")
    distributed.add_argument(
        "--dist-url",
        default="env://",
        help="where the ranks meet, e.g. tcp://<host of rank 0>:<free port>. env://: at MASTER_ADDR and MASTER_PORT; where "
        "these are not set, SLURM, Open MPI on one node and Horovod tell",
    )
    distributed.add_argument(
        "--dist-backend", default="nccl", help="torch.distributed backend; gloo is taken where there is no GPU"
    )
    distributed.add_argument(
        "--dist_timeout",
        type=positive_float,
        default=600.0,
        help="seconds that a rank waits for the others, and for its loader, before it ends the job",
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
    report.add_argument("--wandb_project", help="W&B project")
    report.add_argument("--wandb_entity", help="W&B entity")
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
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    return args


def check(args: argparse.Namespace) -> None:
    """Raises ValueError, naming the flag and what to do, for what argparse alone cannot see."""
    if args.laion_shards is None and args.mmc4_shards is None:
        raise ValueError("no data: give --laion_shards, --mmc4_shards or both")
    for flag in ("laion_shards", "mmc4_shards"):
        if (spec := getattr(args, flag)) is not None:
            check_shards(f"--{flag}", spec)

    if args.laion_shards is not None and args.mmc4_shards is not None:
        check_epoch_lengths(
            args.train_num_samples_laion, args.batch_size_laion, args.train_num_samples_mmc4, args.batch_size_mmc4
        )
    if args.mmc4_min_num_images > args.mmc4_max_num_images:
        raise ValueError(
            f"--mmc4_min_num_images {args.mmc4_min_num_images} is more than "
            f"--mmc4_max_num_images {args.mmc4_max_num_images}: every document would be dropped"
        )
    if args.save_checkpoints_to_wandb and not args.report_to_wandb:
        raise ValueError("--save_checkpoints_to_wandb needs --report_to_wandb")
    if args.save_checkpoints_to_wandb and args.checkpoint_format == "sharded":
        raise ValueError("--save_checkpoints_to_wandb uploads files: it needs --checkpoint_format file")

    if args.fsdp_shard_size and not (args.fsdp and args.fsdp_sharding_strategy == "hybrid"):
        raise ValueError("--fsdp_shard_size needs --fsdp --fsdp_sharding_strategy hybrid")
    if not args.run_name.strip():
        raise ValueError("--run_name is empty: it names the output folder")
    folder = Path(args.run_name)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--run_name {args.run_name} is a file, but names the output folder: choose another")
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not os.access(existing, os.W_OK):
        raise ValueError(f"--run_name {args.run_name}: the folder {existing} cannot be written to")
    if args.resume_from_checkpoint is not None and not Path(args.resume_from_checkpoint).is_file():
        raise ValueError(f"--resume_from_checkpoint {args.resume_from_checkpoint}: no such file")


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
