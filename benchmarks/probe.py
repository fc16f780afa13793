"""What else can be asked of this program's child on a GPU: where the time of an update goes, what a new shape costs, which bits."""

from __future__ import annotations

import re
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

KINDS = (  # of kernels, by a part of their names; the first that fits
    ("attention", r"flash|fmha|attention|sdpa"),
    ("products", r"gemm|nvjet|cutlass|xmma|wgmma|cublas|splitK"),
    ("copies", r"memcpy|memset"),
    ("the rest", r""),
)


def profile_steps(ours: Any, count: int, file: str | None) -> dict[str, Any]:
    """Kernels per update, seconds that they run, of which by kind, and seconds of the clock; all kernels by name go to `file`."""
    on_gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CUDA] if on_gpu else [ProfilerActivity.CPU]
    with profile(activities=activities) as found:
        seconds, _ = ours.steps(count)
    wanted = "CUDA" if on_gpu else "CPU"
    names, times = Counter[str](), Counter[str]()
    for event in found.events() or []:
        if str(event.device_type).endswith(wanted):
            names[event.name] += 1
            times[event.name] += event.self_device_time_total if on_gpu else event.self_cpu_time_total
    kinds = Counter[str]()
    for name, microseconds in times.items():
        kind = next(kind for kind, pattern in KINDS if re.search(pattern, name, re.IGNORECASE))
        kinds[kind] += microseconds / 1e6 / count
    if file is not None:
        lines = [f"{t / 1e3 / count:9.3f} ms {names[n] / count:8.1f} × {n}" for n, t in times.most_common()]
        Path(file).write_text("\n".join(lines) + "\n")
    return {
        "kernels": sum(names.values()) / count,
        "busy": sum(kinds.values()),
        "seconds": seconds / count,
        "kinds": dict(kinds),
    }


def new_shapes(ours: Any) -> list[list[float]]:
    """Seconds of an update on a batch with one image less than ever before, and of the same once more; twice."""
    dataset = next(dataset for dataset in ours.sources if dataset.kind == "mmc4")
    loader, found = dataset.loader, []
    before = list(loader.batches)
    for less in (1, 2):
        batch = before[0]
        counts, input_ids = list(batch.image_counts), batch.input_ids.clone()
        row = max(range(len(counts)), key=counts.__getitem__)
        counts[row] -= less
        places = (input_ids[row] == ours.model.media_token_id).nonzero().flatten()
        input_ids[row, places[-less:]] = 5
        loader.batches = [replace(batch, image_counts=counts, input_ids=input_ids)]
        loader.rewind()
        found.append([ours.steps(1)[0] for _ in range(2)])
    loader.batches = before
    loader.rewind()
    return found


@torch.no_grad()
def tensors_that_differ(ours: Any) -> tuple[int, int]:
    """Of how many trained tensors and moments two runs of two updates give other bits, and how many there are."""
    optimizer = ours.optimizer
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    tensors: list[Tensor] = [*parameters, *(v for p in parameters for v in optimizer.state[p].values())]
    before = [tensor.detach().clone() for tensor in tensors]
    results = []
    for _ in range(2):
        for tensor, old in zip(tensors, before):
            tensor.copy_(old)
        for loader in ours.loaders.values():
            loader.rewind()
        with torch.enable_grad():
            ours.steps(2)
        results.append(
            [tensor.detach().flatten().view(torch.uint8).sum(dtype=torch.int64).item() for tensor in tensors]
        )
    for tensor, old in zip(tensors, before):
        tensor.copy_(old)
    return sum(a != b for a, b in zip(*results)), len(tensors)


def product_rates(ours: Any) -> dict[str, float]:
    """FLOP/s of bfloat16 products of the sizes that an update has: no update is faster than these."""
    device = ours.world.device
    sizes = [(8192, 8192, 2048), (8192, 2048, 8192), (8192, 2048, 2048), (16448, 3072, 1024), (16448, 4096, 1024)]
    sizes += [(16448, 1024, 4096), (2048, 8192, 2048), (2048, 2048, 8192)]
    found = {}
    for rows, out, inner in sizes:
        if device.type == "cpu":
            rows, out, inner = rows // 32, out // 32, inner // 32
        a, b = (torch.randn(n, inner, device=device, dtype=torch.bfloat16) for n in (rows, out))
        for _ in range(3):
            F.linear(a, b)
        ours._wait()
        begin = time.perf_counter()
        for _ in range(20):
            F.linear(a, b)
        ours._wait()
        found[f"{rows} × {out} × {inner}"] = 2 * rows * out * inner * 20 / (time.perf_counter() - begin)
    return found
