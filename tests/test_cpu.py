"""The kernels of train/cpu.py compute what torch's do, forward and backward, and go when they should."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from open_flamingo.train import cpu
from open_flamingo.train.cpu import fast_kernels

CPU = torch.device("cpu")


def gradients(function: Any, *inputs: Tensor) -> list[Tensor]:
    """The output, and the gradient of each input that needs one."""
    output = function(*inputs)
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output.dtype)
    return [output.detach(), *torch.autograd.grad(output, [x for x in inputs if x.requires_grad], weight)]


def named(output: Tensor) -> str:
    return type(output.grad_fn).__name__ + type(output.grad_fn.next_functions[0][0]).__name__


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_linear(bias: bool, frozen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "mkl_is_slow", lambda: True)
    torch.manual_seed(0)
    x = torch.randn(3, 5, 7).transpose(0, 1).requires_grad_()
    parameters = [torch.randn(11, 7), torch.randn(11)][: 1 + bias]
    inputs = [x, *(parameter.requires_grad_(not frozen) for parameter in parameters)]
    expected = gradients(F.linear, *inputs)
    with fast_kernels(CPU, "fp32"):
        assert "OneDNN" in named(F.linear(*inputs))
        found = gradients(F.linear, *inputs)
        assert F.linear(torch.ones(0, 7), *inputs[1:]).shape == (0, 11)
        assert F.linear(x.double(), inputs[1].double()).dtype == torch.float64
    assert "OneDNN" not in named(F.linear(*inputs))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mask", ["none", "causal", "rows", "shared"])
def test_attention(mask: str) -> None:
    torch.manual_seed(0)
    batch, heads, queries, keys, width = 2, 3, 6, 6 if mask == "causal" else 10, 16

    def part(length: int) -> Tensor:
        return torch.randn(batch, length, heads, width).transpose(1, 2)

    exact = [part(queries), part(keys), part(keys)]
    options: dict[str, Any] = {"is_causal": True} if mask == "causal" else {}
    if mask in ("rows", "shared"):
        options["attn_mask"] = torch.rand(batch if mask == "rows" else 1, 1, queries, keys) < 0.6
        options["attn_mask"][..., 0] = True

    def attention(*inputs: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*inputs, **options)

    inputs = [x.bfloat16().requires_grad_() for x in exact]
    expected = gradients(attention, *(x.detach().float().requires_grad_() for x in inputs))
    with fast_kernels(CPU, "amp_bf16"):
        assert "PlainAttention" in named(attention(*inputs))
        found = gradients(attention, *inputs)
        in_float32 = attention(*exact)  # left to torch
    assert "PlainAttention" not in named(attention(*inputs))
    torch.testing.assert_close(in_float32, attention(*exact), rtol=0, atol=0)
    torch.testing.assert_close([x.float() for x in found], expected, rtol=5e-2, atol=5e-2)  # bfloat16 has 8 bits


def test_what_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    query = torch.randn(1, 2, 4, 8, dtype=torch.bfloat16, requires_grad=True)
    fewer = torch.randn(1, 1, 4, 8, dtype=torch.bfloat16)
    added = torch.randn(1, 1, 4, 4, dtype=torch.bfloat16)
    blind = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    blind[0, 0, 2] = False
    expected = [
        F.scaled_dot_product_attention(query, query, query, attn_mask=blind),
        F.scaled_dot_product_attention(query, query, query, attn_mask=added),
        F.scaled_dot_product_attention(query, fewer, fewer, enable_gqa=True),
        F.scaled_dot_product_attention(query, query, query),
    ]
    with fast_kernels(CPU, "amp_bf16"):
        found = [
            F.scaled_dot_product_attention(query, query, query, attn_mask=blind),
            F.scaled_dot_product_attention(query, query, query, attn_mask=added),
            F.scaled_dot_product_attention(query, fewer, fewer, enable_gqa=True),
        ]
        monkeypatch.setattr(cpu, "MAX_ATTENTION_WEIGHTS", 31)  # of 1 x 2 x 4 x 4
        found.append(F.scaled_dot_product_attention(query, query, query))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    with fast_kernels(CPU, "amp_bf16", compiled=True), fast_kernels(torch.device("cuda"), "amp_bf16"):
        assert "PlainAttention" not in named(F.scaled_dot_product_attention(query, query, query))


PASSES = """
import resource, torch
from open_flamingo.train.cpu import fast_kernels

def pages_taken():  # by the tenth pass
    before = 0
    for _ in range(10):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        kept = [torch.ones(1 << 20) for _ in range(30)]  # 4 MiB each, as the activations of a pass
        del kept
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before = pages_taken()
with fast_kernels(torch.device("cpu"), "fp32"):
    print(before, pages_taken())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_memory_of_a_pass_is_kept_for_the_next() -> None:
    gives_back = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
    done = subprocess.run([sys.executable, "-c", PASSES], capture_output=True, text=True, check=True, env=gives_back)
    before, after = map(int, done.stdout.split())
    assert before > 20_000
    assert after < 100
