"""Two real processes under torchrun: the same training, synchronised once an update, and nothing lost by kill -9."""

from __future__ import annotations

import itertools
import random
import re
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from open_flamingo import create_model_and_transforms
from open_flamingo.train.arguments import parse_args
from open_flamingo.train.cpu import fast_kernels
from open_flamingo.train.data.images import normalization
from open_flamingo.train.data.loader import build_loader
from open_flamingo.train.distributed import World
from open_flamingo.train.optimizer import build_optimizer, build_scheduler
from open_flamingo.train.step import Source, train_update
from open_flamingo.train.train import data_options, main
from open_flamingo.weights import trained_state_dict
from tests.tiny import ROOT, assert_same, assert_same_training, finished, kill, torchrun

TRAIN = ROOT / "train" / "train.py"


def test_two_ranks_compute_the_mean_of_their_gradients(flags: list[str], tmp_path: Path) -> None:
    """Two ranks, against one process that accumulates the two ranks' batches by hand."""
    finished(torchrun(2, TRAIN, *flags, f"--run_name={tmp_path / 'two'}"))
    two = torch.load(tmp_path / "two" / "checkpoint_1.pt", weights_only=True)

    args = parse_args(flags)
    world = World(0, 2, 0, torch.device("cpu"), "test")
    torch.manual_seed(args.seed)
    model, image_processor, tokenizer = create_model_and_transforms(
        args.vision_encoder_path, args.vision_encoder_pretrained, args.lm_path
    )
    optimizer = build_optimizer(model, args.learning_rate, args.weight_decay)
    updates = two["step"]
    assert updates == 4  # 16 samples an epoch, 4 a rank and batch, 2 ranks, 2 epochs
    scheduler = build_scheduler(optimizer, args.lr_scheduler, args.warmup_steps, updates)
    sources = []
    for kind, option in data_options(args, world, None).items():
        ranks = [build_loader(replace(option, rank=rank), tokenizer, image_processor) for rank in range(2)]
        source = Source(
            kind, getattr(args, f"loss_multiplier_{kind}"), ranks[0], normalization(image_processor), world.device
        )
        source.loader = itertools.chain.from_iterable(zip(*ranks))  # type: ignore[assignment]
        sources.append(source)
    with fast_kernels(world.device, "fp32"):  # as the program's; what others round otherwise, AdamW amplifies
        for _ in range(updates):
            train_update(model, optimizer, scheduler, sources, 2, "fp32")
    assert_same_training(two["model_state_dict"], trained_state_dict(model))


def test_gradients_are_synchronised_once_an_update_in_the_same_buckets_from_the_first_on(flags: list[str]) -> None:
    """With three or more ranks, other buckets mean another order of additions: a resumed run would not be the same."""
    output = finished(torchrun(2, ROOT / "tests" / "count_reductions.py", *flags, "--gradient_accumulation_steps=3"))
    first, second = (list(map(int, line.split())) for line in re.findall(r"^buckets (.*)$", output, re.MULTILINE))
    assert first == second
    assert len(first) > 1  # else there is only one way to lay them out
    assert sum(first) == int(re.findall(r"^trained (\d+)$", output, re.MULTILINE)[0])


def test_a_run_goes_on_on_another_number_of_processes(flags: list[str], tmp_path: Path) -> None:
    """Two ranks stop within an epoch; one process goes on with the samples that were to follow."""
    halved = ["--batch_size_laion=2", "--batch_size_mmc4=1", "--workers=2"]  # the same samples an update
    main([*flags, f"--run_name={tmp_path / 'one'}"])
    finished(
        torchrun(2, TRAIN, *flags, *halved, f"--run_name={tmp_path / 'moved'}", "--save_steps=3", "--num_epochs=1")
    )
    (tmp_path / "moved" / "checkpoint_0.pt").unlink()
    assert (tmp_path / "moved" / "epoch_0_step_3.pt").exists()
    main([*flags, f"--run_name={tmp_path / 'moved'}"])
    one, moved = (torch.load(tmp_path / name / "checkpoint_1.pt", weights_only=True) for name in ("one", "moved"))
    assert moved["data"] == one["data"]
    assert moved["step"] == one["step"] == 8


def wait_for(condition, process) -> None:
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.002)


def test_kill_9_at_any_moment_loses_nothing(flags: list[str], tmp_path: Path) -> None:
    """Killed at random moments, and once while a checkpoint is being written; started again each time with the same
    command. The final checkpoint is that of the run never killed, bit for bit."""
    program = ROOT / "tests" / "slow_disk.py"
    flags = [*flags, "--workers=1", "--save_steps=1", "--train_num_samples_laion=64", "--train_num_samples_mmc4=32"]
    finished(torchrun(2, program, *flags, f"--run_name={tmp_path / 'whole'}"))

    run = tmp_path / "killed"
    lines = run / "metrics.jsonl"
    moments = random.Random()

    def updates_done() -> int:
        return len(lines.read_text().splitlines()) if lines.exists() else 0

    for moment in ("training", "saving", "training"):
        process = torchrun(2, program, *flags, f"--run_name={run}")
        before = updates_done()
        wait_for(lambda before=before: updates_done() > before, process)
        if moment == "saving":
            wait_for(lambda: list(run.glob(".*.pt.*")), process)
            kill(process)
            assert list(run.glob(".*.pt.*"))  # half a checkpoint lies there
        else:
            time.sleep(moments.uniform(0, 1.0))
            kill(process)
    finished(torchrun(2, program, *flags, f"--run_name={run}"))

    name = "checkpoint_1.pt"
    assert_same(*(torch.load(folder / name, weights_only=True) for folder in (tmp_path / "whole", run)))
    assert not list(run.glob(".*.pt.*"))


@pytest.mark.parametrize("environment", [{"RANK": "5", "WORLD_SIZE": "2"}, {"RANK": "0", "WORLD_SIZE": "2"}])
def test_a_wrong_environment_is_named(
    environment: dict[str, str], flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as refused:
        main([*flags, f"--run_name={tmp_path}"])
    assert refused.value.code == 1
