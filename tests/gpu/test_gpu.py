"""Whether a GPU computes what the CPU does, and the program runs there: `make test-gpu`, under three minutes."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from open_flamingo.loss import labeled_positions
from open_flamingo.train import loop
from open_flamingo.train.checkpoint import files as checkpoints
from open_flamingo.train.distributed import detect_launcher, distributed
from open_flamingo.train.health import Health
from open_flamingo.train.optimizer import build_optimizer
from open_flamingo.train.parallel import parallelize
from open_flamingo.train.precision import autocast, cast_frozen_weights
from open_flamingo.train.step import train_step
from open_flamingo.train.train import main
from tests import families
from tests.tiny import ROOT, assert_same, torchrun

PRECISIONS = {"fp32": 1e-4, "amp_bf16": 3e-2, "fp16": 2e-2, "bf16": 8e-2}
"""With how far a loss may be from float32's on the CPU; gradients may be five times as far."""


def loss_and_gradient(family: str, device: torch.device, precision: str, **how: Any) -> tuple[float, Tensor]:
    model = families.flamingo(families.language_model(family, tied=True), **how).train()
    cast_frozen_weights(model, precision)
    model.to(device)
    token_ids, _, labels = families.text()
    counts = (token_ids == families.IMAGE).sum(1).tolist()
    images = families.images(len(token_ids), max(counts)).to(device)
    with autocast(precision, device):
        positions = labeled_positions(labels, device)
        loss = model(images, token_ids.to(device), labels=positions, image_counts=counts).loss
    loss.backward()
    gradients = [p.grad.flatten().double().cpu() for p in model.parameters() if p.requires_grad and p.grad is not None]
    return loss.item(), torch.cat(gradients)


@pytest.mark.parametrize("family", families.FAMILIES)
def test_each_family_and_precision_is_as_on_the_cpu(family: str, device: torch.device) -> None:
    loss, gradient = loss_and_gradient(family, torch.device("cpu"), "fp32")
    for precision, bound in PRECISIONS.items():
        for recompute in (False, True):
            found, found_gradient = loss_and_gradient(family, device, precision, gradient_checkpointing=recompute)
            assert abs(found - loss) <= bound * abs(loss), (precision, recompute)
            if (
                family != "zamba2" or precision == "fp32"
            ):  # with these random weights, its gradients magnify any rounding
                assert (found_gradient - gradient).norm() <= 5 * bound * gradient.norm(), (precision, recompute)


def test_one_rank_of_ddp_computes_what_one_process_does(device: torch.device) -> None:
    """Over NCCL, in a group of one."""
    token_ids, _, labels = families.text()
    counts = (token_ids == families.IMAGE).sum(1).tolist()
    losses = []
    for wrapped in (False, True):
        model = families.flamingo(families.language_model("mpt", tied=True)).train()
        with distributed(detect_launcher(), group_of_one=True) as world:
            parallel = parallelize(model, world)
            if wrapped:  # `parallelize` wraps nothing where there is one process
                parallel = DistributedDataParallel(model, gradient_as_bucket_view=True, init_sync=False)
            optimizer = build_optimizer(model, 1e-2, 0.1)
            for _ in range(3):
                images = families.images(len(token_ids), max(counts)).to(world.device)
                positions = labeled_positions(labels, world.device)
                loss = parallel(images, token_ids.to(world.device), labels=positions, image_counts=counts).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=False)
            losses.append(loss.item())
            del parallel
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.fixture(scope="module")
def flags_of_run(backbones: list[str], shards: dict[str, str], device: torch.device) -> list[str]:
    """Two epochs of four updates. With workers, so with pinned batches."""
    return [
        *backbones,
        *(f"--laion_shards={shards['laion']}", f"--mmc4_shards={shards['mmc4']}", "--mmc4_textsim_threshold=0.24"),
        *("--batch_size_laion=4", "--batch_size_mmc4=2", "--train_num_samples_laion=16", "--train_num_samples_mmc4=8"),
        *("--num_epochs=2", "--workers=2", "--learning_rate=1e-2", "--warmup_steps=2", "--logging_steps=1"),
        *("--loss_multiplier_laion=0.2", "--deterministic"),
    ]


@pytest.fixture(scope="module")
def run_of(flags_of_run: list[str], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of an undisturbed run in a precision."""
    runs: dict[str, Path] = {}

    def run(precision: str) -> Path:
        if precision not in runs:
            runs[precision] = tmp_path_factory.mktemp(precision)
            main([*flags_of_run, f"--precision={precision}", f"--run_name={runs[precision]}", "--save_steps=1"])
        return runs[precision]

    return run


def load(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line[f"loss_{kind}"] for line in lines for kind in ("laion", "mmc4")]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_resumed_run_ends_with_the_same_bits(
    precision: str, flags_of_run: list[str], run_of: Callable[[str], Path], tmp_path: Path
) -> None:
    whole = run_of(precision)
    shutil.copy(whole / "epoch_1_step_6.pt", tmp_path)
    main([*flags_of_run, f"--precision={precision}", f"--run_name={tmp_path}", "--save_steps=1"])
    assert_same(load(whole / "checkpoint_1.pt"), load(tmp_path / "checkpoint_1.pt"))


@pytest.mark.parametrize(
    "how", [["--fsdp", "--checkpoint_format=sharded"], ["--gradient_checkpointing"], ["--compile"]], ids=" ".join
)
def test_other_ways_train_the_same(
    how: list[str], flags_of_run: list[str], run_of: Callable[[str], Path], tmp_path: Path
) -> None:
    flags = [*flags_of_run, *how, "--precision=amp_bf16", f"--run_name={tmp_path}"]
    main([*flags, "--num_epochs=1"])
    main(flags)
    assert losses(tmp_path) == pytest.approx(losses(run_of("amp_bf16")), abs=3e-2)


def test_a_checkpoint_is_what_it_was_when_it_was_taken(
    flags_of_run: list[str], run_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is written from pinned memory while the training goes on."""
    save, begin, further = checkpoints.save, Health.begin, []

    def wait_and_save(state: dict[str, Any], path: Path) -> None:
        while not further:
            time.sleep(0.01)
        save(state, path)

    def begin_and_tell(health: Health, update: int) -> None:
        begin(health, update)
        if update == 4:
            further.append(update)

    monkeypatch.setattr(checkpoints, "save", wait_and_save)
    monkeypatch.setattr(Health, "begin", begin_and_tell)
    main([*flags_of_run, "--num_epochs=1", "--precision=amp_bf16", "--save_steps=2", f"--run_name={tmp_path}"])
    main([*flags_of_run, "--precision=amp_bf16", "--save_steps=1", f"--run_name={tmp_path}"])
    assert_same(
        load(run_of("amp_bf16") / "checkpoint_1.pt")["model_state_dict"],
        load(tmp_path / "checkpoint_1.pt")["model_state_dict"],
    )


def test_an_update_waits_for_the_device_only_to_agree(
    flags_of_run: list[str], device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: Counter[str] = Counter()

    def note(message: Any, category: Any, *_: Any) -> None:
        if "called a synchronizing CUDA operation" in str(message):
            files = [(frame.filename, frame.name) for frame in traceback.extract_stack()]
            file, name = [f for f in files if re.search("/transformers/|/(train|open_flamingo)/[^/]*$", f[0])][-1]
            if "/transformers/" not in file:  # its OPT up to 5.17 waits in each pass
                waits[f"{Path(file).name}:{name}"] += 1

    def watched(*args: Any, **kwargs: Any) -> Any:
        torch.cuda.set_sync_debug_mode("warn")
        try:
            return train_step(*args, **kwargs)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    if device.type != "cuda":
        pytest.skip("torch tells where a GPU is waited for, not where a CPU is")
    monkeypatch.setattr(loop, "train_step", watched)
    monkeypatch.setattr(warnings, "showwarning", note)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        flags = [flag for flag in flags_of_run if flag != "--deterministic"]  # a sort in it waits
        main([*flags, "--precision=amp_bf16", f"--run_name={tmp_path}"])
    assert set(waits) == {"health.py:agree"}, waits


def test_kill_9_loses_nothing(flags_of_run: list[str], run_of: Callable[[str], Path], tmp_path: Path) -> None:
    flags = [*flags_of_run, "--precision=amp_bf16", "--save_steps=1", f"--run_name={tmp_path}"]
    command = [sys.executable, str(ROOT / "train" / "train.py"), *flags]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    while not list(tmp_path.glob("epoch_0_step_2.pt")):
        assert process.poll() is None
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    main(flags)
    assert_same(load(run_of("amp_bf16") / "checkpoint_1.pt"), load(tmp_path / "checkpoint_1.pt"))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_dies_or_hangs_under_nccl_is_named(
    number: signal.Signals, gpus: int, flags_of_run: list[str], tmp_path: Path
) -> None:
    if gpus < 2:
        pytest.skip("needs two GPUs")
    flags = [*flags_of_run, "--num_epochs=10000", "--dist_timeout=10", f"--run_name={tmp_path}"]
    process = torchrun(2, ROOT / "train" / "train.py", *flags)
    while not (tmp_path / "checkpoint_0.pt").exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    victim = next(pid for pid in children if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes())
    os.kill(int(victim), number)
    output, _ = process.communicate()
    assert process.returncode != 0
    assert re.search(rf"Rank 1 \(\S+, pid {victim}\) died or hung", output), output
