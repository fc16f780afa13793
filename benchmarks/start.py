"""How long until something happens: `--help`, and from launch to the first update."""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks import shards
from benchmarks.backbones import VISION_CONFIG, write_backbones
from benchmarks.child import FOLDER, ROOT
from benchmarks.reference import install
from benchmarks.report import table
from benchmarks.shapes import Shape
from benchmarks.shards import Size

BATCHES = {"laion": 8, "mmc4": 4}

# What no program that trains can do without: Python, its libraries, the weights.
LOADING = """
import sys
import open_clip, torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
config, weights, language = sys.argv[1:]
open_clip.add_model_config(config)
clip = open_clip.create_model("benchmark-vision", pretrained=weights)
model = AutoModelForCausalLM.from_pretrained(language)
tokenizer = AutoTokenizer.from_pretrained(language)
"""


def prepare(shape: Shape) -> tuple[Path, list[str]]:
    """Backbones with weights on disk, and shards. Returns their folder, and the flags of a run of one update of both programs."""
    import open_clip
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = FOLDER / f"start-{shape.name}"
    if not (folder / "vision.pt").exists():
        write_backbones(folder, shape)
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder / "language")).save_pretrained(
            folder / "language"
        )
        open_clip.add_model_config(folder / VISION_CONFIG)
        torch.save(open_clip.create_model(Path(VISION_CONFIG).stem).state_dict(), folder / "vision.pt")
    size = Size(512, 384)
    laion = shards.write_laion(FOLDER / "laion-512", size, 1024)
    mmc4 = shards.write_mmc4(FOLDER / "mmc4-512", size, 192)
    flags = [f"--vision_encoder_pretrained={folder / 'vision.pt'}", f"--lm_path={folder / 'language'}"]
    flags += [f"--tokenizer_path={folder / 'language'}", f"--laion_shards={laion}", f"--mmc4_shards={mmc4}"]
    flags += [f"--cross_attn_every_n_layers={shape.cross_attn_every_n_layers}"]
    flags += [f"--mmc4_textsim_threshold={shards.THRESHOLD}", "--workers=1", "--logging_steps=1", "--offline"]
    for kind, rows in BATCHES.items():
        flags += [f"--batch_size_{kind}={rows}", f"--train_num_samples_{kind}={rows}"]
    return folder, flags


def commands(folder: Path, flags: list[str]) -> dict[str, tuple[list[str], list[str]]]:
    """Program → the command of its help, and of a run of one update."""
    ours = [sys.executable, str(ROOT / "train" / "train.py")]
    reference = [sys.executable, str(ROOT / "benchmarks" / "reference.py"), "--train"]
    config, run = folder / VISION_CONFIG, folder / "run"
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    return {
        "reference": (
            [*reference, "--help"],
            [*reference, *flags, f"--vision_encoder_path={config}", f"--run_name={run}", f"--dist-backend={backend}"],
        ),
        "ours": ([*ours, "--help"], [*ours, *flags, f"--vision_encoder_path={config}", f"--run_name={run}"]),
    }


def environment() -> dict[str, str]:
    return os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def seconds_of(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(
        command, check=True, env=environment(), cwd=FOLDER, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    return time.perf_counter() - start


def seconds_to_first_update(command: list[str]) -> float:
    """From launch to the line that reports the first update. Raises RuntimeError with the output if none comes."""
    start = time.perf_counter()
    process = subprocess.Popen(
        command, env=environment(), cwd=FOLDER, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert process.stdout is not None
    lines, seconds = [], None
    for line in process.stdout:
        lines.append(line)
        if seconds is None and "step 1/" in line.lower():
            seconds = time.perf_counter() - start
    process.wait()
    if seconds is None:
        raise RuntimeError(f"no update: {''.join(lines[-30:])}")
    return seconds


def measure(shape: Shape, rounds: int, only_ours: bool) -> dict[str, dict[str, list[float]]]:
    """What → program → seconds of each round, the programs in turns."""
    folder, flags = prepare(shape)
    programs = commands(folder, flags)
    if only_ours:
        del programs["reference"]
    else:
        install()
    names = ("--help", "first update", "libraries and weights alone")
    results: dict[str, dict[str, list[float]]] = {name: {program: [] for program in programs} for name in names}
    loading = [str(folder / VISION_CONFIG), str(folder / "vision.pt"), str(folder / "language")]
    for _ in range(rounds + 1):
        for program, (of_help, of_run) in programs.items():
            shutil.rmtree(folder / "run", ignore_errors=True)
            results["--help"][program].append(seconds_of(of_help))
            results["first update"][program].append(seconds_to_first_update(of_run))
        alone = seconds_of([sys.executable, "-c", LOADING, *loading])
        for program in programs:
            results["libraries and weights alone"][program].append(alone)
    shutil.rmtree(folder / "run", ignore_errors=True)
    for by_program in results.values():
        for values in by_program.values():
            del values[0]  # read from disk; the others from memory
    return results


def describe(shape: Shape, results: dict[str, dict[str, list[float]]]) -> str:
    programs = list(results["--help"])
    rows = []
    for name, by_program in results.items():
        medians = [statistics.median(values) for values in by_program.values()]
        cells = [f"{m:.2f} ({min(v):.2f}–{max(v):.2f})" for m, v in zip(medians, by_program.values())]
        rows.append([name, *cells, *([f"{medians[0] / medians[1]:.2f}"] if len(programs) == 2 else [])])
    header = ["seconds from launch", *programs, *(["ratio"] if len(programs) == 2 else [])]
    rounds = len(results["--help"]["ours"])
    return (
        f"Shape `{shape.name}`, weights on disk and in the page cache, {BATCHES['laion']} pairs and {BATCHES['mmc4']} documents, one "
        f"worker a dataset. Medians of {rounds} rounds, the programs in turns; least and most. The last line is a program that "
        "only imports torch, transformers and OpenCLIP and loads both backbones.\n\n" + table(header, rows)
    )
