"""What a log line says of speed, gradients and gates, and the words for what is off."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from benchmarks.backbones import VISION_CONFIG, without_weights, write_backbones
from benchmarks.shapes import SHAPES, model_flops
from open_flamingo import create_model_and_transforms
from open_flamingo.train.flops import ModelFlops, Work, peak_flops
from open_flamingo.train.metrics import Concerns
from open_flamingo.train.train import main
from tests.families import flamingo
from tests.test_train import metrics


def test_a_log_line_says_how_fast_training_is_and_what_moves(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([*flags, f"--run_name={tmp_path}"])
    for line in metrics(tmp_path):
        # 4 captions of one image, and 2 documents, whose images are counted one by one.
        samples = line["samples_per_second_laion"] + line["samples_per_second_mmc4"]
        assert line["images_per_second"] >= samples * (1 - 1e-9)
        assert line["tokens_per_second"] > 5 * line["images_per_second"]
        assert 0 <= line["padding"] < 0.9
        assert line["tflops_per_device"] > 0
        assert "mfu" not in line  # nobody knows what this CPU could do
        assert 0.1 < line["memory_gb"] < 10
        assert 0 < line["step_seconds_median"] <= line["step_seconds_slowest"]
        parts = [line[f"grad_norm_{part}"] for part in ("resampler", "cross_attention", "new_rows")]
        assert sum(norm**2 for norm in parts) ** 0.5 == pytest.approx(line["grad_norm"], rel=1e-5)
        assert line["clipped"] == float(line["grad_norm"] > 1)
        assert line["gates_attention"].keys() == {"0", "1"}
        assert line["gate_attention"] == pytest.approx(sum(line["gates_attention"].values()) / 2)
    first, last = metrics(tmp_path)[0], metrics(tmp_path)[-1]
    assert first["grad_norm_resampler"] == 0  # behind gates that are shut
    assert last["grad_norm_resampler"] > 0
    assert last["gate_attention"] > first["gate_attention"] == 0
    assert "TFLOP/s | gates" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["toy", "toy-mpt"])
def test_operations_are_those_of_the_shape(name: str, tmp_path: Path) -> None:
    """Counted of the model, with any vision tower, as the benchmarks do of their shapes' sizes."""
    shape = SHAPES[name]
    write_backbones(tmp_path, shape)
    with without_weights():
        model, _, _ = create_model_and_transforms(
            str(tmp_path / VISION_CONFIG), None, str(tmp_path / "language"), use_local_files=True
        )
    work = Work(images=10, tokens=1000, with_image=900, labeled=800, pairs=30_000)
    counted = ModelFlops.of(model, torch.zeros(3, 64, 64)).needed(work)
    for part, flops in model_flops(shape).needed(work).items():
        assert counted[part] == pytest.approx(flops, rel=0.01), part


def test_of_a_mixture_of_experts_only_those_that_a_token_visits_are_counted() -> None:
    def decoder(experts: int, visited: int) -> int:
        config = MixtralConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            num_local_experts=experts, num_experts_per_tok=visited, vocab_size=61,
        )  # fmt: skip
        return ModelFlops.of(flamingo(MixtralForCausalLM(config)), torch.zeros(3, 8, 8)).decoder

    router = 2 * 32  # of one expert, in two layers
    assert decoder(4, 2) - 4 * router == decoder(2, 2) - 2 * router
    assert decoder(4, 2) - decoder(4, 1) == 2 * 3 * 32 * 64


def test_the_peak_of_a_device_is_known_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda", 0)
    for name, flops in (
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA RTX A1000", None),
        ("A card of tomorrow", None),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_flops(cuda, "amp_bf16") == flops
        assert peak_flops(cuda, "fp32") is None


WELL = {
    "clipped": 0.2,
    "gate_attention": 0.2,
    "data_wait": 0.01,
    "padding": 0.2,
    "grad_norm_resampler": 0.1,
    "grad_norm": 1.0,
}


@pytest.mark.parametrize(
    ("step", "off", "said"),
    [
        (1200, {"image_gain_laion": 0.003, "image_gain_mmc4": None}, "on laion its loss is only 0.0030 higher"),
        (1200, WELL | {"gate_attention": 0.002}, "gates of cross-attention are all but shut"),
        (150, WELL | {"clipped": 1.0}, "clipped in 100.0% of 140 updates"),
        (100, WELL | {"data_wait": 0.3}, "30% of the time is spent waiting for data"),
        (100, WELL | {"padding": 0.6}, "60% of all tokens are padding"),
        (100, WELL | {"grad_norm_resampler": 0.0}, "gradient of the resampler is 0"),
    ],
)
def test_what_is_off_is_told_once(step: int, off: dict[str, Any], said: str) -> None:
    concerns = Concerns(0)
    assert concerns.find(10, WELL) == []
    (text,) = concerns.find(step, off)
    assert said in text
    assert concerns.find(step + 10, off) == []


def test_what_is_well_or_new_is_not_told() -> None:
    assert Concerns(0).find(5000, WELL) == []
    assert Concerns(0).find(5000, {"image_gain_laion": 0.5, "image_gain_mmc4": None}) == []
    seeing = Concerns(0)
    assert seeing.find(900, {"image_gain_laion": 0.55}) == []
    assert seeing.find(1200, WELL | {"gate_attention": 0.007}) == [], "it sees, whatever its gates"
    early = WELL | {"gate_attention": 0.0, "data_wait": 0.9, "padding": 0.9, "grad_norm_resampler": 0.0, "clipped": 1.0}
    assert Concerns(0).find(500, early) == [], "the first line has the start in it"
    slow = Concerns(0)
    for step in range(1, 100):  # one slow update among many
        assert slow.find(step, WELL | {"data_wait": 0.9 * (step == 50)}) == []
    assert Concerns(0).find(999, {"image_gain_laion": 0.0}) == []
