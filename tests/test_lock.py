"""One run at a time in a folder."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path

import pytest

from open_flamingo.train import lock
from open_flamingo.train.lock import LOCK, run_lock
from open_flamingo.train.train import main
from tests.ranks import Fork
from tests.tiny import ROOT


def elsewhere(path: Path, beat: int = 0) -> None:
    path.write_text(
        json.dumps({"host": "node7", "pid": 42, "since": "2026-11-26 10:00:00", "machine": "other", "beat": beat})
    )


@pytest.mark.fault(
    "Two runs",
    "A run is started in the folder of a living one",
    "refused, naming host, process and since when; `run.lock` of a dead run on this machine does not stop the next, one of another machine for 20 s",
    "writes over it",
)
def test_a_second_run_in_the_folder_of_a_living_one_is_refused(flags: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [ROOT / "train" / "train.py", *flags, f"--run_name={run}"]
    first = Fork(*command, "--num_epochs=1000")
    while not (run / "checkpoint_0.pt").exists():
        assert first.poll() is None
        time.sleep(0.05)
    second = Fork(*command)
    said, _ = second.communicate()
    assert second.returncode == 1
    assert "is the folder of a run that lives: on " in said
    assert f"process {first.pid}, since 20" in said
    assert "Traceback" not in said

    first.kill()
    first.communicate()
    assert (run / LOCK).exists()
    main([*flags, f"--run_name={run}", "--num_epochs=1"])  # a dead one's lock holds nobody up
    assert not (run / LOCK).exists()


@pytest.mark.fault("A run is started in the folder of a living one")
def test_a_lock_of_another_host_holds_as_long_as_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "PATIENCE", 1.0)
    elsewhere(tmp_path / LOCK)
    with run_lock(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()

    elsewhere(tmp_path / LOCK)
    timer = threading.Timer(0.3, elsewhere, (tmp_path / LOCK, 1))
    timer.start()
    with pytest.raises(ValueError, match="on node7, process 42, since 2026-11-26 10:00:00"), run_lock(tmp_path):
        pass
    timer.join()
    assert json.loads((tmp_path / LOCK).read_text())["host"] == "node7"  # as it was


@pytest.mark.fault("A run is started in the folder of a living one")
def test_a_lock_is_refreshed_and_left_alone_once_it_is_another_run_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "REFRESH", 0.05)
    with run_lock(tmp_path):
        while "beat" not in (tmp_path / LOCK).read_text():
            time.sleep(0.01)
        elsewhere(tmp_path / LOCK)
        time.sleep(0.3)
    assert json.loads((tmp_path / LOCK).read_text())["host"] == "node7"


@pytest.mark.fault("A run is started in the folder of a living one")
@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": 1}'])
def test_a_broken_lock_is_a_dead_run_s(content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "PATIENCE", 0.2)
    (tmp_path / LOCK).write_text(content)
    with run_lock(tmp_path):
        pass
    assert not (tmp_path / LOCK).exists()
