from __future__ import annotations

import os
from pathlib import Path

import pytest

# Tiny models on few cores: threads only get in each other's way. Set before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"


def pytest_configure(config: pytest.Config) -> None:
    if not any("tests/gpu" in argument for argument in config.args):  # not sys.argv: pytest's workers have none
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the suite's numbers are the CPU's, those of tests/gpu apart


# `make faults` sets it to "long": as many cases, updates and combinations as it takes to meet what is rare.
AT_LENGTH = os.environ.get("OPEN_FLAMINGO_TEST_LENGTH") == "long"

only_at_length = pytest.mark.skipif(not AT_LENGTH, reason="only at length: OPEN_FLAMINGO_TEST_LENGTH=long")


# Fixtures that take half a minute: the tests of a module that use one go to the same pytest worker (`--dist loadgroup`).
SLOW_FIXTURES = {"results", "undisturbed", "slurm"}


@pytest.hookimpl(tryfirst=True)  # xdist reads the mark in the same hook
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if isinstance(item, pytest.Function) and SLOW_FIXTURES & set(item.fixturenames):
            item.add_marker(pytest.mark.xdist_group(item.module.__name__))


def cases(number: int) -> int:
    """So many cases of a test that tries many at length, and an eighth of them otherwise."""
    return number if AT_LENGTH else number // 8


@pytest.fixture(scope="session")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The flags that name a tiny vision tower and a tiny language model."""
    from tests.tiny import write_backbones

    return write_backbones(tmp_path_factory.mktemp("backbones"))


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Brace patterns of small shards: {"laion": ..., "mmc4": ...}."""
    from tests.shards import write_laion, write_mmc4

    folder: Path = tmp_path_factory.mktemp("shards")
    return {"laion": write_laion(folder / "laion", shards=3), "mmc4": write_mmc4(folder / "mmc4", shards=3)}


@pytest.fixture
def flags(backbones: list[str], shards: dict[str, str]) -> list[str]:
    """Two epochs of four updates on both datasets."""
    return [
        *backbones,
        f"--laion_shards={shards['laion']}",
        f"--mmc4_shards={shards['mmc4']}",
        "--batch_size_laion=4",
        "--batch_size_mmc4=2",
        "--train_num_samples_laion=16",
        "--train_num_samples_mmc4=8",
        "--mmc4_textsim_threshold=0.24",
        "--num_epochs=2",
        "--workers=0",
        "--learning_rate=1e-2",
        "--warmup_steps=2",
        "--lr_scheduler=cosine",
        "--loss_multiplier_laion=0.2",
        "--logging_steps=1",
    ]
