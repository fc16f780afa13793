"""One update: what is accumulated, clipped and stepped, and that nothing in it waits for the device."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from packaging.version import Version
from torch import nn

from open_flamingo import create_model_and_transforms
from open_flamingo.train.arguments import parse_args
from open_flamingo.train.data.images import normalization
from open_flamingo.train.data.loader import build_loader
from open_flamingo.train.data.options import data_options
from open_flamingo.train.distributed import World
from open_flamingo.train.optimizer import build_optimizer
from open_flamingo.train.precision import autocast, cast_frozen_weights
from open_flamingo.train.step import TrainDataset, Trainer, compute_loss, train_step
from open_flamingo.vision import patch_tokens
from tests.families import FAMILIES
from tests.ranks import Fork
from tests.tiny import ROOT, finished

OPT_WAITS_NOT = Version(transformers.__version__) >= Version("5.18")  # for its mask, in each forward pass


@pytest.fixture
def parts(flags: list[str]) -> SimpleNamespace:
    args = parse_args(flags)
    torch.manual_seed(0)
    model, image_processor, tokenizer = create_model_and_transforms(
        args.vision_encoder_path, args.vision_encoder_pretrained, args.lm_path
    )
    cpu = torch.device("cpu")

    def sources() -> list[TrainDataset]:
        return [
            TrainDataset(
                kind, weight, build_loader(option, tokenizer, image_processor), normalization(image_processor), cpu
            )
            for weight, (kind, option) in zip((2.0, 10.0), data_options(args, World("test"), None).items(), strict=True)
        ]

    optimizer = build_optimizer(model, 1e-2, 0.1)
    return SimpleNamespace(model=model, optimizer=optimizer, sources=sources)


def test_an_update_is_the_weighted_mean_over_the_batches_clipped_once(parts: SimpleNamespace) -> None:
    trained = [parameter for parameter in parts.model.parameters() if parameter.requires_grad]
    total = torch.zeros(())
    for source in parts.sources():
        for _ in range(3):
            total = total + source.weight * compute_loss(parts.model, source, source.next_batch()) / 3
    gradients = torch.autograd.grad(total, trained)
    norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
    assert norm > 1  # else there is no clipping to be seen

    measured = train_step(Trainer(parts.model, parts.optimizer, parts.sources(), accumulation=3), 1e-2)
    torch.testing.assert_close(measured, norm, rtol=1e-4, atol=0)
    for parameter, gradient in zip(trained, gradients):
        momentum = parts.optimizer.state[parameter]["exp_avg"]  # after one step, 1 - beta1 of what AdamW was given
        torch.testing.assert_close(momentum, 0.1 * gradient / norm, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize(
    "how", [("--precision=amp_bf16", "--gradient_checkpointing"), ("--precision=fp16",), ("--precision=bf16", "--fsdp")]
)
def test_on_a_device_of_its_own_nothing_is_elsewhere_and_little_waits(
    flags: list[str], how: tuple[str, ...], tmp_path: Path
) -> None:
    """As on a GPU: operations find all their tensors on the device, and updates wait for it once a forward pass, where the ranks
    agree on whether the loss is finite. Beside, only the log waits, every second update, and the checkpoint at the end."""
    process = Fork(ROOT / "tests" / "pretended_gpu.py", *flags, *how, "--logging_steps=2", f"--run_name={tmp_path}")
    output = finished(process)
    for words in ("1 x pretended", "resuming from", "finished: 2 epochs"):
        assert words in output
    runs = output.split("end of a run\n")[:2]  # an epoch each: four updates on two datasets
    for run in runs:
        waits = [json.loads(counts) for counts in re.findall(r"waited: (.*)", run)]
        *_, _, second, third, fourth, after = (
            sum(of.values()) for of in waits
        )  # steps that only try AdamW come before
        at_most = 2 if OPT_WAITS_NOT else 8
        assert 2 <= second <= at_most, waits
        assert 2 <= fourth <= at_most, waits
        assert second <= third <= second + 4, waits  # two numbers of the log, and what the loss scaler is at
        assert after <= 10, waits


def test_no_family_of_language_models_waits_for_the_device_while_it_trains() -> None:
    output = finished(Fork(ROOT / "tests" / "pretended_gpu.py"))
    waits = {name: json.loads(counts) for name, counts in re.findall(r"(\w+) waited: (.*)", output)}
    waits.pop("opt")
    assert len(waits) == len(FAMILIES) - 1
    assert {name: counts for name, counts in waits.items() if counts} == {}


def test_amp_holds_frozen_matrices_in_bfloat16_and_computes_the_same(
    parts: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = parts.sources()[1]
    batch = source.next_batch()
    for name, parameter in parts.model.named_parameters():
        if name.endswith("_gate"):  # at 0 hardly anything has a gradient
            parameter.data.fill_(0.5)
    seen: list[torch.Tensor] = []

    def tokens_as_the_first_time(tower: nn.Module, images: torch.Tensor) -> torch.Tensor:
        """Attention of the vision encoder takes another kernel for a bfloat16 matrix than for one that is converted: its tokens
        are some steps of bfloat16 apart, and all that depends on them would be."""
        seen.append(patch_tokens(tower, images))
        torch.testing.assert_close(seen[-1], seen[0], rtol=0, atol=float(seen[0].abs().max()) / 64)
        return seen[0]

    monkeypatch.setattr("open_flamingo.flamingo.patch_tokens", tokens_as_the_first_time)
    with autocast("amp_bf16", source.device):
        before = compute_loss(parts.model, source, batch)
    before.backward()
    gradients = {name: p.grad for name, p in parts.model.named_parameters() if p.requires_grad}
    parts.model.zero_grad()
    cast_frozen_weights(parts.model, "amp_bf16")
    with autocast("amp_bf16", source.device):
        after = compute_loss(parts.model, source, batch)
    after.backward()
    assert len(seen) == 2
    assert torch.equal(before, after)
    for name, parameter in parts.model.named_parameters():
        if parameter.requires_grad:
            assert parameter.dtype == torch.float32
            assert gradients[name].any(), name
            assert torch.equal(parameter.grad, gradients[name]), name
    attention = [m for m in parts.model.vision_encoder.modules() if isinstance(m, nn.MultiheadAttention)]
    assert {m.in_proj_weight.dtype for m in attention} == {torch.bfloat16}
    linears = [m for m in parts.model.lang_encoder.modules() if isinstance(m, nn.Linear)]
    assert sum(m.weight.dtype == torch.bfloat16 for m in linears) >= 12  # the two layers' of the language model
