"""Shards in S3: a real endpoint on loopback, read through `aws s3 cp` as in the reference."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from open_flamingo.train.train import main
from tests.tiny import assert_same


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An empty bucket, and the environment in which `aws` finds it."""
    server = pytest.importorskip("moto.server", reason="moto[server], the S3 endpoint, is not installed")
    # pip's awscli lies beside the interpreter, which need not be on the path.
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    if shutil.which("aws") is None:
        pytest.skip("aws (awscli) is not installed")
    endpoint = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    endpoint.start()
    host, port = endpoint.get_host_and_port()
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "anyone",
        "AWS_SECRET_ACCESS_KEY": "anything",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "NO_PROXY": host,
    }.items():
        monkeypatch.setenv(name, value)
    aws("s3", "mb", "s3://shards")
    yield "s3://shards"
    endpoint.stop()


def aws(*arguments: str) -> None:
    subprocess.run(["aws", *arguments], check=True, stdout=subprocess.DEVNULL)


def train(flags: list[str], shards: str, run: Path) -> None:
    # One lane opens one shard after the other; one MMC4 batch does not matter here.
    flags = [flag for flag in flags if not flag.startswith("--mmc4_shards=")]
    main([*flags, f"--laion_shards={shards}", f"--run_name={run}", "--data_lanes=1"])


def test_training_from_s3(flags: list[str], shards: dict[str, str], bucket: str, tmp_path: Path) -> None:
    aws("s3", "cp", "--recursive", str(Path(shards["laion"]).parent), bucket)
    train(flags, f"{bucket}/laion-{{000000..000002}}.tar", tmp_path / "s3")
    train(flags, shards["laion"], tmp_path / "disk")
    s3, disk = (torch.load(tmp_path / name / "checkpoint_1.pt", weights_only=True) for name in ("s3", "disk"))
    assert s3.pop("flags") != disk.pop("flags")
    assert s3.pop("shards") != disk.pop("shards")
    assert_same(s3, disk)


def test_an_object_that_is_not_there_is_counted(
    flags: list[str], shards: dict[str, str], bucket: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in (0, 2):
        aws("s3", "cp", shards["laion"].replace("{000000..000002}", f"{number:06d}"), f"{bucket}/{number:06d}.tar")
    train(flags, f"{bucket}/{{000000..000002}}.tar", tmp_path)
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 8
    assert sum(last["errors_laion"].values()) >= 1
    assert "000001.tar" in capsys.readouterr().err
