"""The command line: the reference's, and answers before anything heavy is imported. Wrong values are in test_flags.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from open_flamingo.train.arguments import build_parser, check_epoch_lengths
from tests.tiny import ROOT

# name: default, of open-flamingo 2.0.1. --tokenizer_path differs on purpose: facebook/opt-30b there, --lm_path's here.
REFERENCE_FLAGS = {
    "--vision_encoder_path": "ViT-L-14",
    "--vision_encoder_pretrained": "openai",
    "--lm_path": "facebook/opt-1.3b",
    "--tokenizer_path": None,
    "--cross_attn_every_n_layers": 1,
    "--run_name": "openflamingo3B",
    "--resume_from_checkpoint": None,
    "--delete_previous_checkpoint": False,
    "--batch_size_mmc4": 128,
    "--batch_size_laion": 128,
    "--gradient_accumulation_steps": 1,
    "--seed": 42,
    "--learning_rate": 1e-4,
    "--lr_scheduler": "constant",
    "--loss_multiplier_mmc4": 1.0,
    "--loss_multiplier_laion": 1.0,
    "--warmup_steps": 5000,
    "--weight_decay": 0.1,
    "--precision": "fp32",
    "--gradient_checkpointing": False,
    "--num_epochs": 1,
    "--offline": False,
    "--freeze_lm_embeddings": False,
    "--logging_steps": 100,
    "--laion_shards": None,
    "--mmc4_shards": None,
    "--workers": 1,
    "--train_num_samples_mmc4": 10000,
    "--train_num_samples_laion": 10000,
    "--dataset_resampled": False,
    "--mmc4_textsim_threshold": 30,
    "--mmc4_max_num_images": 6,
    "--mmc4_min_num_images": 1,
    "--dist-url": "env://",
    "--dist-backend": "nccl",
    "--horovod": False,
    "--no-set-device-rank": False,
    "--fsdp": False,
    "--fsdp_use_orig_params": False,
    "--fsdp_sharding_strategy": "full",
    "--report_to_wandb": False,
    "--wandb_project": None,
    "--wandb_entity": None,
    "--save_checkpoints_to_wandb": False,
}


@pytest.mark.fault(
    "Flags that do not go together (all loss weights 0, unequal epochs, minimum of images above the maximum, ...)"
)
def test_every_flag_of_the_reference_with_its_default() -> None:
    parser = build_parser()
    defaults = {option: action.default for action in parser._actions for option in action.option_strings}
    assert {name: defaults[name] for name in REFERENCE_FLAGS} == REFERENCE_FLAGS


@pytest.mark.fault(
    "Flags that do not go together (all loss weights 0, unequal epochs, minimum of images above the maximum, ...)"
)
@pytest.mark.parametrize(
    "command", [["train/train.py"], ["-m", "open_flamingo.train.train"]], ids=["as a file", "as a module"]
)
def test_help_and_mistakes_answer_without_the_heavy_imports(command: list[str], tmp_path: Path) -> None:
    # A torch that cannot be imported: whoever needs it before the flags are read fails.
    (tmp_path / "torch.py").write_text("raise ImportError('torch was imported before the flags were read')")
    run = [sys.executable, *command]
    environment = {"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin"}
    asked = subprocess.run([*run, "--help"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert asked.returncode == 0, asked.stderr
    assert "--cross_attn_every_n_layers" in asked.stdout
    wrong = subprocess.run([*run, "--laion_shards="], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert wrong.returncode == 2
    assert "--laion_shards" in wrong.stderr
    assert "Traceback" not in wrong.stderr


@pytest.mark.fault(
    "Flags that do not go together (all loss weights 0, unequal epochs, minimum of images above the maximum, ...)"
)
def test_epochs_of_different_length_are_refused_with_the_nearest_that_agree() -> None:
    check_epoch_lengths(250_000, 64, 125_000, 32)  # the reference's 3B recipe
    with pytest.raises(ValueError, match=r"= 100 and .* = 99") as refused:
        check_epoch_lengths(1000, 10, 499, 5)
    for flag, samples in (("mmc4", 500), ("laion", 999)):
        assert f"--train_num_samples_{flag} {samples}" in str(refused.value)
    check_epoch_lengths(1000, 10, 500, 5)
    check_epoch_lengths(999, 10, 499, 5)
