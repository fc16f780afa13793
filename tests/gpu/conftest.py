from __future__ import annotations

import os

import pytest
import torch

ON_CPU = os.environ.get("OPEN_FLAMINGO_TEST_DEVICE") == "cpu"


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where these tests compute: a GPU. OPEN_FLAMINGO_TEST_DEVICE=cpu has the CPU stand in for it, to try the tests themselves."""
    if ON_CPU:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("no GPU is seen: run `make test-gpu` on a machine with one")
    return torch.device("cuda", 0)


@pytest.fixture(scope="session")
def gpus(device: torch.device) -> int:
    return torch.cuda.device_count() if device.type == "cuda" else 0
