"""The schedules and the parameter groups are the reference's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from open_flamingo.train.optimizer import build_optimizer, build_scheduler

GOLDEN = json.loads((Path(__file__).parent / "golden" / "lr_schedules.json").read_text())


def rates(name: str, warmup: int, total: int, steps: int, start: int = 0) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=GOLDEN["base_lr"])
    scheduler = build_scheduler(optimizer, name, warmup, total, updates_done=start)
    used = []
    for _ in range(start, steps):
        used.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return used


@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
def test_schedules_are_the_reference_s(name: str) -> None:
    golden = GOLDEN["lr_used_at_step"][name]
    assert rates(name, GOLDEN["warmup"], GOLDEN["total"], len(golden)) == pytest.approx(golden, abs=1e-12)


@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
def test_a_resumed_schedule_goes_on_exactly(name: str) -> None:
    assert rates(name, 3, 10, 10, start=4) == rates(name, 3, 10, 10)[4:]


def test_without_warmup_the_first_update_has_the_full_rate() -> None:
    assert rates("constant", 0, 10, 1) == [GOLDEN["base_lr"]]


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
