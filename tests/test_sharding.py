"""However the model is spread over processes, the same training comes out, and each rank holds what a formula says."""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

from open_flamingo.train.distributed import World, detect_launcher, distributed
from open_flamingo.train.parallel import Sharding, parallelize, sharding_from_flags
from open_flamingo.train.sharded import to_file
from open_flamingo.train.train import main
from open_flamingo.weights import embedding_name
from tests.conftest import AT_LENGTH
from tests.families import FAMILIES
from tests.ranks import run_ranks
from tests.sharding_program import families, small_flamingo, variants
from tests.test_train import metrics
from tests.tiny import ROOT, VISION_CONFIG, assert_same, finished

# The ways differ in the order in which float32 numbers are added: a relative 1e-7 per sum. AdamW divides each gradient by its own
# size, so where one is as small as its rounding error (or AdamW's eps of 1e-8), that weight's update is arbitrary: one number in
# some 10,000 comes out up to 4e-5 apart, which number depends on the CPU. So a tensor is compared as a whole: its root mean
# square is at most 3e-7 apart, after ten updates at a rate of 1e-3 that moved weights by up to 1e-2.
LOSS_BOUND = 2e-5
WEIGHT_BOUND = 2e-6


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[Any, Any]]:
    """What tests/sharding_program.py wrote on 1, 2 and 4 processes."""
    folder = tmp_path_factory.mktemp("sharding")
    for processes in (1, 2, 4):
        length = "long" if AT_LENGTH else "short"
        finished(run_ranks(processes, ROOT / "tests" / "sharding_program.py", str(folder), length))
    return {processes: torch.load(folder / f"{processes}.pt", weights_only=True) for processes in (1, 2, 4)}


# The families' weights are random and large (a deviation of 0.3), so rounding shows more in their losses: measured, at most
# 3e-5 (Granite, untied) and 3e-6 elsewhere.
FAMILY_LOSS_BOUND = 2e-4


def same_training(
    one: dict[str, Any],
    other: dict[str, Any],
    where: object,
    bound: float = LOSS_BOUND,
    weight_bound: float = WEIGHT_BOUND,
) -> None:
    losses = torch.tensor(one["losses"]), torch.tensor(other["losses"])
    torch.testing.assert_close(*losses, rtol=bound, atol=0, msg=lambda text: f"{where}: {text}")
    for name, weight in one["weights"].items():
        difference = (weight - other["weights"][name]).square().mean().sqrt()
        assert difference <= weight_bound, (where, name)


def test_every_way_of_spreading_trains_the_same(results: dict[int, dict[Any, Any]]) -> None:
    single = results[1]["single", False, 1]
    assert single["losses"][-1] != single["losses"][0]
    tried = 0
    for processes, of in results.items():
        for way, result in of.items():
            if way[0] in FAMILIES:
                continue
            same_training(result, single, (processes, *way))
            tried += 1
    assert tried == (3 + 3 + 5) * len(variants(AT_LENGTH))


def test_every_family_of_language_models_trains_the_same_sharded(results: dict[int, dict[Any, Any]]) -> None:
    for family, tied in families(AT_LENGTH):
        ddp, full = (results[2][family, tied, way] for way in ("ddp", "full"))
        # Zamba 2's first gradient norm is equal to 1e-7; these weights magnify that by thousands in two updates.
        factor = 10 if family == "zamba2" else 1
        same_training(full, ddp, (family, tied), factor * FAMILY_LOSS_BOUND, factor * WEIGHT_BOUND)
        before = small_flamingo(family, tied)
        embedding = before.lang_encoder.get_input_embeddings()
        after = full["weights"][embedding_name(before)]
        # The reference's never train under FSDP.
        assert not torch.equal(after[embedding.new_ids], embedding.weight[embedding.new_ids])


def test_each_rank_holds_its_share_in_bytes(results: dict[int, dict[Any, Any]]) -> None:
    """A tensor of n rows over s ranks: ceil(n / s) rows each, as long as there are any. Only DDP keeps gradients between updates."""
    parameters = list(small_flamingo("llama", False).parameters())

    def expected(rank: int, shards: int, frozen_whole: bool, keeps_gradients: bool) -> dict[str, int]:
        held = {"parameters": 0, "gradients": 0, "moments": 0}
        for parameter in parameters:
            rows = math.ceil(len(parameter) / shards)
            mine = max(0, min(rows, len(parameter) - rank % shards * rows))
            share = 4 * mine * parameter[0].numel()
            whole = frozen_whole and not parameter.requires_grad
            held["parameters"] += 4 * parameter.numel() if whole else share
            if parameter.requires_grad:
                held["gradients"] += share * keeps_gradients
                held["moments"] += 2 * share
        return held

    for processes, of in results.items():
        shards = {"single": 1, "ddp": 1, "full": processes, "hybrid": 2}
        for way, result in of.items():
            if way[0] in FAMILIES:
                continue
            strategy, _, frozen = way[0].partition(", ")
            for rank, held in enumerate(result["held"]):
                assert held == expected(rank, shards[strategy], bool(frozen), strategy == "ddp"), (processes, way, rank)


def test_only_rank_0_reads_the_backbones(backbones: list[str], tmp_path: Path) -> None:
    """Rank 1 makes them on the meta device. Towers whose positions lie in buffers that no state dict holds are as on rank 0."""
    trunks = {
        "rope": "vit_pe_core_tiny_patch16_384",
        "windows": "swin_tiny_patch4_window7_224",
        "batch norm": "test_efficientnet",
    }
    for name, trunk in trunks.items():
        vision = {"timm_model_name": trunk, "timm_model_pretrained": True, "image_size": 384 if name == "rope" else 224}
        (tmp_path / f"{name}.json").write_text(json.dumps(VISION_CONFIG | {"vision_cfg": vision}))
    lm_path = next(flag.partition("=")[2] for flag in backbones if flag.startswith("--lm_path="))
    configs = [str(tmp_path / f"{name}.json") for name in trunks]
    output = finished(run_ranks(2, ROOT / "tests" / "backbones_program.py", lm_path, *configs))
    assert output.count("the same: ") == 2 * len(trunks), output


def test_a_checkpoint_goes_on_under_any_strategy_and_world_size(flags: list[str], tmp_path: Path) -> None:
    """DDP on 2 ranks, then FSDP on 2 in sharded checkpoints, hybrid on 4, one process; against one process alone."""
    flags = [flag for flag in flags if not flag.startswith(("--mmc4_shards", "--lr_scheduler"))]
    flags += ["--train_num_samples_laion=8"]
    main([*flags, f"--run_name={tmp_path / 'one'}", "--num_epochs=4"])
    run = f"--run_name={tmp_path / 'moved'}"

    def train(processes: int, epochs: int, *more: str) -> None:
        batch = f"--batch_size_laion={4 // processes}"
        finished(run_ranks(processes, ROOT / "train" / "train.py", *flags, run, batch, f"--num_epochs={epochs}", *more))

    train(2, 1)
    train(2, 2, "--fsdp", "--checkpoint_format=sharded")
    train(4, 3, "--fsdp", "--fsdp_sharding_strategy=hybrid", "--fsdp_shard_size=2")
    main([*flags, run, "--num_epochs=4"])
    one, moved = metrics(tmp_path / "one"), metrics(tmp_path / "moved")
    assert [line["step"] for line in moved] == list(range(1, 9))
    for a, b in zip(one, moved):
        assert b["loss_laion"] == pytest.approx(a["loss_laion"], rel=1e-5)
        assert b["lr"] == a["lr"]
    ends = (torch.load(tmp_path / name / "checkpoint_3.pt", weights_only=True) for name in ("one", "moved"))
    first, second = ((end["data"], end["step"]) for end in ends)
    assert first == second


def test_a_sharded_checkpoint_becomes_the_file_that_would_have_been_written(flags: list[str], tmp_path: Path) -> None:
    for checkpoint_format in ("file", "sharded"):
        run = [f"--run_name={tmp_path / checkpoint_format}", f"--checkpoint_format={checkpoint_format}", "--fsdp"]
        finished(run_ranks(2, ROOT / "train" / "train.py", *flags, *run, "--save_steps=1"))
    sharded = tmp_path / "sharded"
    assert sorted(path.name for path in sharded.glob("*_*")) == sorted(
        ["checkpoint_0", "checkpoint_1", "epoch_0_step_1", "epoch_1_step_3"]
    )
    to_file(sharded / "checkpoint_1", tmp_path / "made.pt")
    made, written = (
        torch.load(path, weights_only=True) for path in (tmp_path / "made.pt", tmp_path / "file" / "checkpoint_1.pt")
    )
    for checkpoint in (made, written):
        del checkpoint["flags"]["checkpoint_format"]
    assert_same(made, written)


@pytest.mark.parametrize("shard_frozen", [True, False])
def test_each_weight_is_sent_to_the_other_ranks_once(shard_frozen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[int] = []
    with distributed(detect_launcher(), group_of_one=True) as world:
        model = small_flamingo("llama", False)
        expected = sum(tensor.numel() for tensor in [*model.parameters(), *model.buffers()])
        alone = init_device_mesh("cpu", (1,), mesh_dim_names=("shard",))
        monkeypatch.setattr("open_flamingo.train.parallel.init_device_mesh", lambda *args, **kwargs: alone)
        monkeypatch.setattr("torch.distributed.broadcast", lambda tensor, src: sent.append(tensor.numel()))
        parallelize(model, replace(world, world_size=2), Sharding(2, shard_frozen))
    assert sum(sent) == expected


def test_each_rank_sums_its_own_files(flags: list[str], tmp_path: Path) -> None:
    """As one reader would have to read those of hundreds of ranks over the network."""
    program = tmp_path / "program.py"
    program.write_text(
        "import os, sys\n"
        "from open_flamingo.train import train\n"
        "from open_flamingo.train.checkpoint import files\n"
        "sha256 = files.sha256\n"
        "def told(path):\n"
        "    print('rank', os.environ['RANK'], 'sums', path.name, flush=True)\n"
        "    return sha256(path)\n"
        "files.sha256 = told\n"
        "train.main(sys.argv[1:])\n"
    )
    run = [f"--run_name={tmp_path / 'run'}", "--checkpoint_format=sharded", "--fsdp", "--num_epochs=1"]
    output = finished(run_ranks(2, program, *flags, *run))
    found = re.findall(r"rank (\d) sums (\S+)", output)
    files = [path.name for path in (tmp_path / "run" / "checkpoint_0").iterdir() if path.name != "SHA256SUMS"]
    assert sorted(name for _, name in found) == sorted(files)
    assert {name[:4]: rank for rank, name in found if name.endswith(".distcp")} == {"__0_": "0", "__1_": "1"}
    check = ["sha256sum", "--check", "--quiet", "--strict", "SHA256SUMS"]
    subprocess.run(check, cwd=tmp_path / "run" / "checkpoint_0", check=True)


def test_shapes_that_do_not_fit_are_refused() -> None:
    def shard_size(strategy: str, given: int | None, ranks: int, ranks_of_node: int) -> int:
        args = argparse.Namespace(
            fsdp=True,
            fsdp_use_orig_params=False,
            fsdp_sharding_strategy=strategy,
            fsdp_shard_size=given,
            fsdp_frozen=None,
            compile=False,
            precision="amp_bf16",
        )
        sharding = sharding_from_flags(args, World(world_size=ranks, local_world_size=ranks_of_node))
        assert sharding is not None
        return sharding.shard_size

    assert shard_size("full", None, 16, 8) == 16
    assert shard_size("hybrid", None, 16, 8) == 8
    with pytest.raises(ValueError, match=r"use one of \[1, 2, 3, 6\]"):
        shard_size("hybrid", 4, 6, 3)
