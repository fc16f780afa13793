"""What must be right of the flags beside their types: data, folders and names that go together. Needs no model, GPU or network.

Only the standard library is imported. All raise ValueError or OSError, naming the flag and what to do.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from open_flamingo.backbones import check_language_model, check_tokenizer, check_vision_encoder, check_vision_weights
from open_flamingo.train.checkpoint import SHARDED_STATE
from open_flamingo.train.data.shards import check_shards

# The rank of this process, as launchers say it: see `distributed.LAUNCHERS`.
RANK_VARIABLES = ("RANK", "HOROVOD_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID")


def check_flags(args: argparse.Namespace) -> None:
    kinds = [kind for kind in ("laion", "mmc4") if getattr(args, f"{kind}_shards") is not None]
    if not kinds:
        raise ValueError("no data: give --laion_shards, --mmc4_shards or both")
    for kind in kinds:
        if is_first_process():  # others get the list from rank 0
            check_shards(f"--{kind}_shards", getattr(args, f"{kind}_shards"), args.missing_shards)
    check_numbers(args, kinds)
    check_backbones(args)
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


def check_numbers(args: argparse.Namespace, kinds: list[str]) -> None:
    """Numbers that are right by themselves go together. `kinds`: the datasets that are given."""
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
    tokenizer_flag = "--tokenizer_path"
    if args.tokenizer_path is None:
        tokenizer_flag = "--tokenizer_path (not given, so that of --lm_path)"
    tokenizer_path = args.lm_path if args.tokenizer_path is None else args.tokenizer_path
    checks = (
        ("--vision_encoder_path", check_vision_encoder, (args.vision_encoder_path,)),
        (
            "--vision_encoder_pretrained",
            check_vision_weights,
            (args.vision_encoder_pretrained, args.vision_encoder_path),
        ),
        ("--lm_path", check_language_model, (args.lm_path,)),
        (tokenizer_flag, check_tokenizer, (tokenizer_path,)),
    )
    for flag, check, values in checks:
        try:
            check(*values)
        except (ValueError, OSError) as error:
            raise ValueError(f"{flag}: {error}") from error


def check_run_folder(run_name: str) -> None:
    """The run's folder can be made and written to."""
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
    """There is a checkpoint at `path`."""
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
    """The reference's rule: one epoch is the same number of batches of both datasets."""
    batches_laion, batches_mmc4 = samples_laion // batch_laion, samples_mmc4 // batch_mmc4
    if batches_laion == batches_mmc4:
        return
    raise ValueError(
        f"an epoch must be the same number of batches of both datasets, but --train_num_samples_laion {samples_laion} "
        f"// --batch_size_laion {batch_laion} = {batches_laion} and --train_num_samples_mmc4 {samples_mmc4} "
        f"// --batch_size_mmc4 {batch_mmc4} = {batches_mmc4}. The nearest that agree: "
        f"--train_num_samples_mmc4 {nearest_samples(samples_mmc4, batches_laion, batch_mmc4)}, or "
        f"--train_num_samples_laion {nearest_samples(samples_laion, batches_mmc4, batch_laion)}"
    )


def nearest_samples(samples: int, batches: int, batch_size: int) -> int:
    """The number nearest to `samples` that holds `batches` whole batches."""
    least = max(1, batches * batch_size)
    return min(max(samples, least), batches * batch_size + batch_size - 1)
