"""Tiny backbones on disk, and the flags that train on them: what an end-to-end test needs, made in a second."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import torch

from tests.ranks import Fork

ROOT = Path(__file__).parent.parent
TOKENIZER = Path(__file__).parent / "golden" / "common" / "tokenizer_base"
SAME_TRAINING = 2e-5
VISION_CONFIG = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1},
}


def write_backbones(folder: Path) -> list[str]:
    """A random vision tower (32 px, 4 patches) and a random OPT (2 layers) in `folder`. Returns the flags that use
    them."""
    import open_clip
    from transformers import AutoTokenizer, OPTConfig, OPTForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    config = folder / "tiny-vision.json"
    config.write_text(json.dumps(VISION_CONFIG))
    tower = open_clip.CLIP(**VISION_CONFIG).visual
    torch.save(tower.state_dict(), folder / "vision.pt")

    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    language_model = OPTForCausalLM(
        OPTConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            num_hidden_layers=2,
            ffn_dim=64,
            num_attention_heads=2,
            word_embed_proj_dim=32,
            max_position_embeddings=256,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=1,
        )
    )
    language_model.save_pretrained(folder / "lm")
    tokenizer.save_pretrained(folder / "lm")
    return [
        f"--vision_encoder_path={config}",
        f"--vision_encoder_pretrained={folder / 'vision.pt'}",
        f"--lm_path={folder / 'lm'}",
        "--offline",
    ]


def torchrun(processes: int, program: str | Path, *arguments: str, restarts: int = 0) -> subprocess.Popen[str]:
    """Starts `program` under torchrun, in a process group of its own, meeting on a port that was free.

    For what torchrun does itself; `tests.ranks.run_ranks` starts ranks in a fraction of the time.
    """
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
    command += [f"--max-restarts={restarts}"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", str(program), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command,
        env=environment,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finished(process: subprocess.Popen[str] | Fork) -> str:
    """Waits for `process` and returns what it said; fails the test, showing it, if the exit code was not 0."""
    output, _ = process.communicate()
    assert process.returncode == 0, output
    return output


def kill(process: subprocess.Popen[str] | Fork) -> None:
    """kill -9 for `process` and everything that it has started, all at the same moment as far as Linux can."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:  # gone meanwhile
            continue
        children.setdefault(parent, []).append(int(stat.parent.name))
    family = [process.pid]
    for pid in family:
        family += children.get(pid, [])
    for pid in family:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.communicate()


def assert_same(a: object, b: object, where: str = "") -> None:
    """Equal bit for bit, through dicts and lists."""
    if isinstance(a, torch.Tensor):
        assert isinstance(b, torch.Tensor), where
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert isinstance(b, dict), where
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert isinstance(b, (list, tuple)), where
        assert len(a) == len(b), where
        for index, (x, y) in enumerate(zip(a, b)):
            assert_same(x, y, f"{where}[{index}]")
    else:
        assert a == b, where
