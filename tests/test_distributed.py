"""Several real processes: the same training, synchronized once per update, and nothing lost by kill -9."""

from __future__ import annotations

import json
import math
import os
import random
import re
import time
from pathlib import Path

import pytest
import torch

from open_flamingo.train.train import main
from tests.conftest import AT_LENGTH
from tests.ranks import Fork, run_ranks
from tests.tiny import ROOT, assert_same, finished, kill

TRAIN = ROOT / "train" / "train.py"


def test_one_two_and_four_ranks_train_the_same_at_one_global_batch(flags: list[str], tmp_path: Path) -> None:
    """Captions and documents have different numbers of labeled tokens, so a mean of the ranks' means would not do."""
    flags = [*flags, "--batch_size_mmc4=4", "--train_num_samples_mmc4=16"]
    runs = {ranks: tmp_path / str(ranks) for ranks in (1, 2, 4)}
    main([*flags, f"--run_name={runs[1]}"])
    for ranks in (2, 4):
        shares = [f"--batch_size_{kind}={4 // ranks}" for kind in ("laion", "mmc4")]
        finished(run_ranks(ranks, TRAIN, *flags, *shares, f"--run_name={runs[ranks]}"))
    one, *others = (
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in runs.values()
    )
    for other in others:
        for a, b in zip(one, other, strict=True):
            assert a["lr"] == b["lr"]
            for name in ("loss_laion", "loss_mmc4", "grad_norm"):
                # The first update differs by the order of additions alone. AdamW makes more of that in the later ones: it divides
                # by moments that are 0 but for rounding where a gradient is.
                assert b[name] == pytest.approx(a[name], rel=1e-6 if a["step"] == 1 else 1e-4), (a["step"], name)


def test_on_other_ranks_a_run_goes_on_at_the_same_samples(flags: list[str], tmp_path: Path) -> None:
    """One process stops within an epoch. Two go on with the same batch per rank, so with twice the samples per update."""
    flags = [*flags, "--train_num_samples_laion=80", "--train_num_samples_mmc4=40", "--warmup_steps=30"]
    run = tmp_path / "run"
    main([*flags, f"--run_name={run}", "--save_steps=5", "--num_epochs=1"])
    (run / "checkpoint_0.pt").unlink()
    assert sorted(path.name for path in run.glob("*.pt")) == ["epoch_0_step_10.pt", "epoch_0_step_15.pt"]

    finished(run_ranks(2, TRAIN, *flags, f"--run_name={run}", "--save_steps=2"))
    # 15 updates of 4 pairs; then 2 of 8 in what is left of the first epoch (80 pairs), and 10 in the second.
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 28))
    assert sorted(path.name for path in run.glob("*.pt")) == [
        "checkpoint_0.pt", "checkpoint_1.pt", "epoch_1_step_24.pt", "epoch_1_step_26.pt"
    ]  # fmt: skip
    # Warm-up over the first 120 pairs, then half a cosine up to the 160th.
    peak = 1e-2
    assert [line["lr"] for line in lines[13:17]] == pytest.approx([peak * n / 30 for n in (14, 15, 17, 20)])
    assert lines[-2]["lr"] == pytest.approx(peak * 0.5 * (1 + math.cos(math.pi * 8 / 10)))
    assert torch.load(run / "checkpoint_1.pt", weights_only=True)["data"]["laion"]["samples"] == 60 + 2 * 8 + 10 * 8


def test_the_slowest_rank_s_wait_for_data_is_logged(flags: list[str], tmp_path: Path) -> None:
    program = ROOT / "tests" / "faulty.py"
    finished(run_ranks(2, program, '{"seconds_loading": 0.5}', *flags, f"--run_name={tmp_path}", "--num_epochs=1"))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["data_wait"] > 0.3  # rank 0's own is next to nothing


def test_gradients_are_synchronized_once_an_update_in_the_same_buckets_from_the_first_on(flags: list[str]) -> None:
    """With three or more ranks, other buckets mean another order of additions: a resumed run would not be the same."""
    output = finished(run_ranks(2, ROOT / "tests" / "count_reductions.py", *flags, "--gradient_accumulation_steps=3"))
    first, second = (list(map(int, line.split())) for line in re.findall(r"^buckets (.*)$", output, re.MULTILINE))
    assert first == second
    assert len(first) > 1  # else there is only one way to lay them out
    assert sum(first) == int(re.findall(r"^trained (\d+)$", output, re.MULTILINE)[0])


def test_a_run_goes_on_on_another_number_of_processes(flags: list[str], tmp_path: Path) -> None:
    """Two ranks stop within an epoch; one process goes on with the samples that were to follow."""
    halved = ["--batch_size_laion=2", "--batch_size_mmc4=1", "--workers=2"]  # the same samples an update
    main([*flags, f"--run_name={tmp_path / 'one'}"])
    finished(
        run_ranks(2, TRAIN, *flags, *halved, f"--run_name={tmp_path / 'moved'}", "--save_steps=3", "--num_epochs=1")
    )
    (tmp_path / "moved" / "checkpoint_0.pt").unlink()
    assert (tmp_path / "moved" / "epoch_0_step_3.pt").exists()
    main([*flags, f"--run_name={tmp_path / 'moved'}"])
    one, moved = (torch.load(tmp_path / name / "checkpoint_1.pt", weights_only=True) for name in ("one", "moved"))
    assert moved["data"] == one["data"]
    assert moved["step"] == one["step"] == 8


LISTS_SHARDS = """
import sys
from open_flamingo.train.arguments import parse_args
from open_flamingo.train.distributed import distributed, detect_launcher
from open_flamingo.train.data.options import data_options

args = parse_args(sys.argv[1:])
with distributed(detect_launcher(), args.dist_url) as world:
    print(data_options(args, world, None)["laion"].shards)
"""


@pytest.mark.fault("Data", "Ranks whose file systems list different shards", "all train on the list that rank 0 found")
def test_ranks_train_on_the_list_of_shards_that_rank_0_found(tmp_path: Path) -> None:
    """A listing of NFS may be older on another node; here the second rank would find no shard at all."""
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
    for name in ("1.tar", "0.tar"):
        (tmp_path / "0" / name).touch()
    command = ["-c", LISTS_SHARDS, "--laion_shards=*.tar", f"--dist-url=file://{tmp_path}/meet"]
    ranks = [
        Fork(
            *command,
            cwd=tmp_path / str(rank),
            environment=os.environ | {"RANK": str(rank), "WORLD_SIZE": "2"},
        )
        for rank in range(2)
    ]
    assert [rank.communicate()[0] for rank in ranks] == ["('0.tar', '1.tar')\n"] * 2


def wait_for(condition, process) -> None:
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.002)


@pytest.mark.fault(
    "Deaths",
    "kill -9 of everything, at any moment, also while a checkpoint is being written",
    "nothing is lost: the run goes on bit for bit",
    "epoch repeated; no data position, no random state",
)
def test_kill_9_at_any_moment_loses_nothing(flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed at random moments, and once while a checkpoint is being written; started again each time with the same
    command. The final checkpoint is that of the run never killed, bit for bit."""
    program = ROOT / "tests" / "slow_disk.py"
    flags = [*flags, "--workers=1", "--save_steps=1", "--train_num_samples_laion=64", "--train_num_samples_mmc4=32"]
    finished(run_ranks(2, program, *flags, f"--run_name={tmp_path / 'whole'}"))

    run = tmp_path / "killed"
    lines = run / "metrics.jsonl"
    moments = random.Random()

    def updates_done() -> int:
        return len(lines.read_text().splitlines()) if lines.exists() else 0

    for moment in ("saving", "training", "training") if AT_LENGTH else ("saving", "training"):
        # So long that it cannot have ended before everything is killed.
        monkeypatch.setenv("OPEN_FLAMINGO_TEST_FSYNC", "600" if moment == "saving" else "0.2")
        process = run_ranks(2, program, *flags, f"--run_name={run}")
        before = updates_done()
        wait_for(lambda before=before: updates_done() > before, process)
        if moment == "saving":
            wait_for(lambda: list(run.glob(".*.pt.*")), process)
            kill(process)
            assert list(run.glob(".*.pt.*"))  # half a checkpoint lies there
        else:
            time.sleep(moments.uniform(0, 1.0))
            kill(process)
    finished(run_ranks(2, program, *flags, f"--run_name={run}"))

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
