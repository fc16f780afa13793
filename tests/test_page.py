"""The page about a run, in a real browser where there is one."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from open_flamingo.train.page import MAX_LINES, MAX_POINTS, Run, main, thinned
from open_flamingo.train.train import main as train
from tests.shards import write_laion, write_mmc4

CHROMIUM = shutil.which("chromium")
CHARTS = (
    "Training loss",
    "Held-out loss",
    "The worth of the image: loss with another one less that with its own",
    "Held-out loss of text by the number of images before it",
    "Gates of cross-attention, |tanh|",
    "Gates of feed-forward, |tanh|",
    "Gradient norm",
    "Learning rate",
    "Throughput",
    "Operations",
    "Seconds per update",
    "Shares",
    "Memory of the fullest rank",
    "Left out of the data",
)


@pytest.fixture
def run(flags: list[str], tmp_path: Path) -> Path:
    """A run that was started twice, with its own page."""
    held_out = [
        f"--val_laion_shards={write_laion(tmp_path / 'laion', shards=1, seed=5)}",
        f"--val_mmc4_shards={write_mmc4(tmp_path / 'mmc4', shards=1, seed=5)}",
        *("--val_captions=2", f"--run_name={tmp_path / 'run'}"),
    ]
    train([*flags, *held_out, "--num_epochs=1"])
    train([*flags, *held_out, "--num_epochs=2"])
    return tmp_path / "run"


def charts(page: Path) -> list[str]:
    return re.findall("<figcaption>(.*?)</figcaption>", page.read_text())


def test_a_run_that_validates_writes_its_page(run: Path) -> None:
    page = run / "report.html"
    assert tuple(charts(page)) == CHARTS
    text = page.read_text()
    assert "8 updates, epoch 2.00, restarts: 1" in text
    assert text.count("data:image/jpeg") == 2
    assert "a blue tree, number 0" in text
    assert "--learning_rate" in text
    without_scripts = re.sub("<script.*?</script>", "", text, flags=re.DOTALL)
    assert "http" not in without_scripts, "nothing comes from a network"
    assert "<script src" not in text


def test_several_runs_share_axes_and_their_differences_come_first(run: Path, tmp_path: Path) -> None:
    other = shutil.copytree(run, tmp_path / "other")
    starts = [json.loads(line) for line in (other / "starts.jsonl").read_text().splitlines()]
    starts[-1]["flags"]["learning_rate"] = 0.5
    (other / "starts.jsonl").write_text("\n".join(map(json.dumps, starts)))
    main([str(run), str(other), "-o", str(tmp_path / "both.html")])
    text = (tmp_path / "both.html").read_text()
    assert "run: laion" in text
    assert "other: laion" in text
    assert text.index("<th>--learning_rate</th>") < text.index("<th>--batch_size_laion</th>")
    assert len(charts(tmp_path / "both.html")) == len(CHARTS) + 2  # gates of each
    with pytest.raises(SystemExit, match=r"is not the folder of a run"):
        main([str(tmp_path), "-o", str(tmp_path / "none.html")])


def test_long_logs_are_thinned(tmp_path: Path) -> None:
    with (tmp_path / "metrics.jsonl").open("w") as file:
        for step in range(1, 3 * MAX_LINES):
            file.write(json.dumps({"step": step, "epoch": 0.0}) + "\n")
        file.write(json.dumps({"step": 7, "seconds_validating": 1.0}) + '\n{"step": 9, "epo')
    run = Run.read(tmp_path)
    assert MAX_LINES / 2 < len(run.lines) <= MAX_LINES + 1
    assert [line["step"] for line in run.validations] == [7]
    points = thinned([(float(x), float(x % 2)) for x in range(10 * MAX_POINTS)])
    assert len(points) == MAX_POINTS
    assert {y for _, y in points} == {0.5}


def browse(page: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    shown = subprocess.run(
        [*command, "--virtual-time-budget=10000", *flags, page.as_uri()], capture_output=True, text=True
    )
    assert "CONSOLE" not in shown.stderr, shown.stderr
    return shown


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium: tests/launch/install.sh installs it")
def test_a_browser_draws_every_chart_on_a_phone_and_in_print(run: Path) -> None:
    """OPEN_FLAMINGO_TEST_OUTPUT: a folder that keeps screenshots."""
    page = run / "report.html"
    output = Path(os.environ.get("OPEN_FLAMINGO_TEST_OUTPUT", run)).absolute()
    output.mkdir(parents=True, exist_ok=True)
    measuring = run / "measuring.html"
    script = "<script>addEventListener('load', () => setTimeout(() => document.body.append(`widths: ${document.scrollingElement.scrollWidth} ${innerWidth}`), 5000))</script>"
    measuring.write_text(page.read_text().replace("</body>", f"{script}</body>"))
    for width in (1280, 500):  # no window of Chromium is narrower
        shown = browse(measuring, f"--window-size={width},900", "--dump-dom").stdout
        for figure in re.findall("<figure>.*?</figure>", shown, re.DOTALL):
            assert 'class="main-svg"' in figure
        assert shown.count("<figure>") == len(CHARTS)
        whole, window = map(int, re.findall(r"widths: (\d+) (\d+)<", shown)[0])
        assert whole <= window <= width
        browse(page, f"--window-size={width},6000", f"--screenshot={output}/report-{width}.png")
        assert (output / f"report-{width}.png").stat().st_size > 50_000
    browse(page, f"--print-to-pdf={output}/report.pdf")
    assert len(re.findall(rb"/Type ?/Page\b", (output / "report.pdf").read_bytes())) > 2
