"""The schedules and the parameter groups are the reference's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from torch import nn

from open_flamingo.train.optimizer import build_optimizer
from open_flamingo.train.schedule import learning_rate

GOLDEN = json.loads((Path(__file__).parent / "golden" / "lr_schedules.json").read_text())


@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
def test_schedules_are_the_reference_s(name: str) -> None:
    golden = GOLDEN["lr_used_at_step"][name]
    base, warmup, total = (GOLDEN[key] for key in ("base_lr", "warmup", "total"))
    rates = [learning_rate(name, base, step, warmup, total) for step in range(len(golden))]
    assert rates == pytest.approx(golden, abs=1e-12)


def test_without_warmup_the_first_update_has_the_full_rate() -> None:
    assert learning_rate("constant", 1e-3, 0, 0, 10) == 1e-3


def test_only_gated_cross_attention_decays() -> None:
    model = nn.ModuleDict(
        {
            "perceiver": nn.Linear(2, 2),
            "gated_cross_attn_layer": nn.Linear(3, 3),
            "frozen": nn.Linear(4, 4).requires_grad_(False),
        }
    )
    decayed, plain = build_optimizer(model, 1e-3, 0.1).param_groups
    assert [p.shape[0] for p in decayed["params"]] == [3, 3]
    assert decayed["weight_decay"] == 0.1
    assert [p.shape[0] for p in plain["params"]] == [2, 2]
    assert plain["weight_decay"] == 0.0
