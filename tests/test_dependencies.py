"""What of other libraries may go: it is told at the start. And the files of versions agree with each other."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

from open_flamingo.train import libraries
from open_flamingo.train.data import images
from open_flamingo.train.train import main
from tests.tiny import ROOT


def pins(name: str) -> dict[str, str]:
    lines = (ROOT / name).read_text().splitlines()
    return dict(line.lower().replace("-", "_").split("==") for line in lines if not line.startswith("#"))


def test_versions_agree() -> None:
    """Each requirement has its minimum in constraints-oldest.txt, if it has one, and a version in constraints.txt."""
    newest, oldest = pins("constraints.txt"), pins("constraints-oldest.txt")
    minimums = {}
    for file in ("requirements.txt", "requirements-training.txt"):
        for line in (ROOT / file).read_text().split():
            requirement = Requirement(line)
            name = requirement.name.replace("-", "_")
            assert requirement.specifier.contains(newest[name]), name
            for of in requirement.specifier:
                minimums[name] = of.version
    for name, minimum in minimums.items():
        assert re.fullmatch(re.escape(minimum) + r"(\.0)*", oldest[name]), name
    assert {name: (oldest[name], newest[name]) for name in libraries.TESTED} == libraries.TESTED


class WithoutScaling(torch.optim.AdamW):
    """As if torch had renamed what it takes from a GradScaler."""

    def step(self, closure=None):
        del self.grad_scale, self.found_inf
        super().step(closure)
        self.grad_scale = self.found_inf = None


def test_an_optimizer_that_would_not_clip_is_refused(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.optim.AdamW", WithoutScaling)
    with pytest.raises(SystemExit):
        main([*flags, f"--run_name={tmp_path / 'run'}"])
    line = capsys.readouterr().err.splitlines()[-1]
    assert "cannot start: torch's fused AdamW no longer follows `grad_scale`" in line
    assert f"torch {torch.__version__.partition('+')[0]}" in line
    assert "2.11.0 to" in line
    assert not (tmp_path / "run").exists()


def test_an_unknown_image_transform_is_told(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(images, "NEUTRAL", set())
    main([*flags, f"--run_name={tmp_path / 'run'}", "--num_epochs=1"])
    lines = capsys.readouterr().err.splitlines()
    assert sum("OpenCLIP's image transform has other parts" in line for line in lines) == 1
    assert "finished" in lines[-1]


def test_a_missing_import_is_told_with_versions(flags: list[str], tmp_path: Path) -> None:
    program = f"""
import transformers.pytorch_utils
del transformers.pytorch_utils.Conv1D
from open_flamingo.train.train import main
main({[*flags, f"--run_name={tmp_path / 'run'}"]!r})
"""
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1
    line = run.stderr.splitlines()[-1]
    assert line.startswith("cannot start: cannot import name 'Conv1D'")
    assert "5.17.0 to" in line
