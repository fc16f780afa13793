"""How long the page of a long run takes: to be written, and to open in a browser."""

from __future__ import annotations

import json
import math
import re
import shutil
import statistics
import subprocess
import time
from pathlib import Path

from benchmarks.child import FOLDER
from open_flamingo.train.page import METRICS, STARTS, write_page

LAYERS = 24


def write_run(folder: Path, lines: int) -> None:
    """The log of a run of both datasets, with the gates of each layer; a validation every hundredth line."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / METRICS).open("w") as file:
        for step in range(1, lines + 1):
            wave = 1 + 0.1 * math.sin(step / 50)
            line = {
                "step": step,
                "epoch": step / 1000,
                "lr": 1e-4,
                "data_wait": 0.01 * wave,
                "padding": 0.2,
                "clipped": 0.5,
            }
            line |= {f"loss_{kind}": 3 * wave + 10 / step for kind in ("laion", "mmc4")}
            line |= dict.fromkeys(("grad_norm", "grad_norm_resampler", "grad_norm_cross_attention"), 0.3 * wave)
            line |= {"tokens_per_second": 20_000 * wave, "images_per_second": 300 * wave, "memory_gb": 44.0}
            line |= {
                "step_seconds_median": 0.45 * wave,
                "step_seconds_slowest": 0.6 * wave,
                "tflops_per_device": 300 * wave,
            }
            gates = {str(layer): min(1.0, step / lines) for layer in range(LAYERS)}
            file.write(json.dumps(line | {"gates_attention": gates, "gates_feed_forward": gates}) + "\n")
            if step % 100 == 0:
                held_out = {f"val_loss_{kind}": 3 * wave for kind in ("laion", "mmc4")} | {
                    "image_gain_laion": 0.5 * wave
                }
                file.write(json.dumps({"step": step, "seconds_validating": 1.0, **held_out}) + "\n")
    (folder / STARTS).write_text(json.dumps({"step": 0, "time": "", "flags": {"precision": "amp_bf16"}}) + "\n")


def measure(lines: int, rounds: int) -> str:
    """Raises RuntimeError where there is no Chromium."""
    browser = shutil.which("chromium")
    if browser is None:
        raise RuntimeError("no chromium: tests/launch/install.sh installs it")
    folder = FOLDER / "page"
    write_run(folder, lines)
    page = folder / "report.html"
    start = time.perf_counter()
    write_page([folder], page)
    writing = time.perf_counter() - start
    script = "<script>addEventListener('load', () => document.body.append(`loaded: ${performance.now()} ms`))</script>"
    page.write_text(page.read_text().replace("</body>", f"{script}</body>"))
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", page.as_uri()]
    opening = []
    for _ in range(rounds):
        shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        opening.append(float(re.findall(r"loaded: ([\d.]+) ms", shown)[0]) / 1e3)
    return (
        f"A log of {lines:,} lines ({(folder / METRICS).stat().st_size / 1e6:.0f} MB): the page is written in {writing:.1f} s, has "
        f"{page.stat().st_size / 1e6:.1f} MB, and is open, all charts drawn, {statistics.median(opening):.2f} s after Chromium begins to load it "
        f"(median of {rounds})."
    )
