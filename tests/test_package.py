"""`pip install .` (not editable) gives the package, with the program inside it, and the two commands."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import ROOT


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package, installed from a copy of this checkout as a stranger would, but for what it depends on."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    for name in ("open_flamingo", "train", "scripts"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "requirements.txt", "requirements-training.txt"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*pip, "--target", str(target), str(source)], check=True)
    return target


@pytest.mark.parametrize(
    "command", ["open-flamingo-train", "open-flamingo-convert", "open-flamingo-convert-mmc4", "open-flamingo-caption"]
)
def test_commands(command: str, installed: Path, tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(installed)}
    run = subprocess.run(
        [sys.executable, str(installed / "bin" / command), "--help"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert "usage:" in run.stdout


def test_the_installed_package_is_whole(installed: Path, tmp_path: Path) -> None:
    """Every module of the checkout is in it, and the program's are the installed ones."""
    wanted = {path.relative_to(ROOT / "train") for path in (ROOT / "train").rglob("*.py")}
    found = installed / "open_flamingo" / "train"
    assert wanted == {path.relative_to(found) for path in found.rglob("*.py")}
    program = "import open_flamingo.train.train as t; print(t.__file__)"
    run = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.startswith(str(installed))
