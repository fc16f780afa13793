from __future__ import annotations

import json
from pathlib import Path

import torch

from open_flamingo.train.data.labels import laion_labels, mmc4_labels

GOLDEN = json.loads((Path(__file__).parent / "golden" / "labels.json").read_text())
IDS = GOLDEN["token_ids"]


def test_labels_equal_the_references() -> None:
    input_ids = torch.tensor([case["input_ids"] for case in GOLDEN["cases"]])
    laion = torch.tensor([case["laion_labels"] for case in GOLDEN["cases"]])
    mmc4 = torch.tensor([case["mmc4_labels"] for case in GOLDEN["cases"]])
    assert torch.equal(laion_labels(input_ids, IDS["image"], IDS["pad"]), laion)
    assert torch.equal(mmc4_labels(input_ids, IDS["image"], IDS["eoc"], IDS["pad"]), mmc4)


def test_a_row_depends_on_itself_alone() -> None:
    input_ids = torch.tensor([case["input_ids"] for case in GOLDEN["cases"]])
    together = mmc4_labels(input_ids, IDS["image"], IDS["eoc"], IDS["pad"])
    for row, labels in zip(input_ids, together, strict=True):
        assert torch.equal(mmc4_labels(row[None], IDS["image"], IDS["eoc"], IDS["pad"])[0], labels)


def test_the_input_is_not_changed_and_may_be_empty() -> None:
    input_ids = torch.tensor([[1001, 5, 1000, 0, 1002]])
    before = input_ids.clone()
    laion_labels(input_ids, 1001, 1002)
    mmc4_labels(input_ids, 1001, 1000, 1002)
    assert torch.equal(input_ids, before)
    empty = torch.zeros((2, 0), dtype=torch.int64)
    assert mmc4_labels(empty, 1001, 1000, 1002).shape == (2, 0)
