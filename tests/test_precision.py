"""Every precision, activation checkpointing and compiling: the same training, to the rounding that each stands for."""

from __future__ import annotations

import copy
import itertools
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from open_clip import CLIP
from torch import nn
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from open_flamingo import Flamingo
from open_flamingo.train import precision as precisions
from open_flamingo.train.optimizer import clipping
from open_flamingo.train.parallel import check_compiler, compile_blocks
from open_flamingo.train.precision import _AUTOCAST, LossScaler, autocast, cast_frozen_weights
from open_flamingo.train.train import main
from open_flamingo.train.validation import Validator
from open_flamingo.vision import fuse_quick_gelu, patch_tokens
from tests.conftest import AT_LENGTH
from tests.families import IMAGE, flamingo, images, language_model, text
from tests.precision_ranks import RUNS
from tests.ranks import run_ranks
from tests.tiny import ROOT, VISION_CONFIG, assert_same, finished


def load(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    return [line[name] for line in metrics(folder) for name in ("loss_laion", "loss_mmc4") if name in line]


# ---------------------------------------------------------------------------------------------------------------------
# Precisions


@pytest.fixture(scope="module")
def float32_losses(flags_of_module: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    run = tmp_path_factory.mktemp("float32")
    main([*flags_of_module, f"--run_name={run}"])
    return losses(run)


@pytest.fixture(scope="module")
def flags_of_module(backbones: list[str], shards: dict[str, str]) -> list[str]:
    """Six updates on both datasets."""
    return [
        *backbones,
        f"--laion_shards={shards['laion']}",
        f"--mmc4_shards={shards['mmc4']}",
        "--batch_size_laion=4",
        "--batch_size_mmc4=2",
        "--train_num_samples_laion=12",
        "--train_num_samples_mmc4=6",
        "--mmc4_textsim_threshold=0.24",
        "--num_epochs=2",
        "--workers=0",
        "--learning_rate=1e-2",
        "--warmup_steps=2",
        "--logging_steps=1",
    ]


@pytest.mark.parametrize(
    ("precision", "trained", "tolerance"),
    # Products are rounded to 8 bits (bf16) or 11 (fp16), over updates that move the losses by 0.1.
    [("amp_bf16", torch.float32, 5e-3), ("fp16", torch.float32, 2e-3), ("bf16", torch.bfloat16, 2e-2)],
)
def test_each_precision_trains_as_float32_does(
    precision: str,
    trained: torch.dtype,
    tolerance: float,
    flags_of_module: list[str],
    float32_losses: list[float],
    tmp_path: Path,
) -> None:
    main([*flags_of_module, f"--run_name={tmp_path}", f"--precision={precision}"])
    assert losses(tmp_path) == pytest.approx(float32_losses, abs=tolerance)
    assert losses(tmp_path) != float32_losses
    checkpoint = load(tmp_path / "checkpoint_1.pt")
    kept = [tensor for name, tensor in checkpoint["model_state_dict"].items() if "perceiver" in name]
    moments = [of[key] for of in checkpoint["optimizer_state_dict"]["state"].values() for key in of if key != "step"]
    assert {tensor.dtype for tensor in (*kept, *moments)} == {trained}


@pytest.mark.parametrize("precision", ["amp_bf16", "fp16"])
def test_openclips_vit_is_held_and_runs_in_the_lower_precision_alone(precision: str) -> None:
    """The same numbers as with its matrices alone in it, under autocast, to the rounding of norms."""
    model = flamingo(language_model("opt", True), tower=lambda: CLIP(**VISION_CONFIG).visual, vis_dim=32)
    batch = torch.randn(3, 1, 3, 32, 32)
    with torch.no_grad():
        exact = model._encode(batch)
        cast_frozen_weights(model, precision)
        assert {p.dtype for p in model.vision_encoder.parameters()} == {_AUTOCAST[precision]}
        modes = []
        model.vision_encoder.transformer.resblocks[0].register_forward_pre_hook(
            lambda *_: modes.append(torch.is_autocast_enabled("cpu"))
        )
        with autocast(precision, torch.device("cpu")):
            latents = model._encode(batch)
    assert modes == [False]
    assert (latents - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize("family", ["opt", "gpt_neox", "llama", "gemma3", "gptj", "mpt", "falcon"])
def test_bf16_holds_every_weight_in_bfloat16_and_learns(family: str) -> None:
    model = flamingo(language_model(family, tied=True)).train()
    cast_frozen_weights(model, "bf16")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    token_ids, _, labels = text()
    loss = model(images(3, 2), token_ids, None, labels).loss
    loss.backward()
    assert loss.dtype == torch.float32
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_fp16_skips_what_overflows_and_goes_on_bit_for_bit(
    flags_of_module: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precisions, "INITIAL_SCALE", 2.0**22)
    monkeypatch.setattr(precisions, "GROWTH_INTERVAL", 2)
    flags = [*flags_of_module, "--precision=fp16"]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    main([*flags, f"--run_name={whole}", "--num_epochs=3"])
    lines = metrics(whole)
    assert lines[0]["updates_skipped"] == 1  # the float16 gradients of the loss overflow
    assert lines[0]["grad_scale"] == 2.0**21
    assert lines[0]["grad_norm"] is None  # not finite
    assert 1 < lines[-1]["updates_skipped"] < 9
    scales = [line["grad_scale"] for line in lines]
    assert any(after > before for before, after in itertools.pairwise(scales))
    assert [line["lr"] for line in lines] == pytest.approx([5e-3] + [1e-2] * 8)  # skipped updates count as done
    steps = {float(of["step"]) for of in load(whole / "checkpoint_2.pt")["optimizer_state_dict"]["state"].values()}
    assert steps == {9.0 - lines[-1]["updates_skipped"]}  # but not for Adam, whose moments they did not reach

    main([*flags, f"--run_name={stopped}", "--num_epochs=1"])
    main([*flags, f"--run_name={stopped}", "--num_epochs=3"])
    a, b = (load(folder / "checkpoint_2.pt") for folder in (whole, stopped))
    assert_same(a, b)
    assert a["loss_scaler_state_dict"]["skipped"] == lines[-1]["updates_skipped"]
    assert [line["grad_scale"] for line in metrics(stopped)] == scales


def small_step(scaler: LossScaler | None, factor: float) -> list[torch.Tensor]:
    """Two weights after a first update with gradients of a global norm of 5 × factor, clipped to 1, and a second."""
    weights = [torch.ones(1, requires_grad=True), torch.ones(1, requires_grad=True)]
    optimizer = torch.optim.AdamW(weights, lr=0.1, fused=True)
    for multiple in (factor, 0.3):
        loss = multiple * (3 * weights[0] + 4 * weights[1]).sum()
        (loss if scaler is None else loss * scaler.scale).backward()
        norm = nn.utils.get_total_norm([weight.grad for weight in weights if weight.grad is not None])
        if scaler is None:
            nn.utils.clip_grads_with_norm_(weights, 1.0, norm)
            optimizer.step()
        else:
            norm = norm / scaler.scale
            with clipping(optimizer, norm, 1.0, scaler.scale):
                optimizer.step()
            scaler.update(norm)
        assert norm.item() == pytest.approx(5 * multiple, nan_ok=True)
        optimizer.zero_grad()
    state = optimizer.state[weights[0]]
    return [*(weight.detach() for weight in weights), state["exp_avg"], state["exp_avg_sq"], state["step"]]


def test_the_scaled_step_is_the_plain_one() -> None:
    scaler = LossScaler(torch.device("cpu"))
    torch.testing.assert_close(small_step(scaler, 2.0), small_step(None, 2.0))
    assert scaler.state_dict() == {"scale": 2.0**16, "good_updates": 2, "skipped": 0}
    overflowed = small_step(scaler, float("inf"))
    assert scaler.state_dict() == {"scale": 2.0**15, "good_updates": 1, "skipped": 1}
    once = small_step(None, 0.3)  # of which the second is the only one that an overflow leaves
    assert overflowed[-1] == 1
    assert torch.allclose(overflowed[2] * 1.9, once[2])


def test_two_ranks_skip_and_compile_together(flags_of_module: list[str], tmp_path: Path) -> None:
    """DDP, FSDP and hybrid: an overflow on one rank alone is skipped by both; compiled, checkpointed blocks change nothing."""
    finished(run_ranks(2, ROOT / "tests" / "precision_ranks.py", str(tmp_path), *flags_of_module))
    lines = [json.loads(line) for path in tmp_path.glob("*.jsonl") for line in path.read_text().splitlines()]
    assert len(lines) == 2 * len(RUNS)
    said = {(tuple(line["run"]), line["rank"]): line for line in lines}
    for (run, _), line in said.items():
        assert line["weights"] == said[run, 0]["weights"], run
    bounds = {"fp32": 1e-6, "amp_bf16": 1e-3, "bf16": 1e-3, "fp16": 1e-4}
    for precision, way, compiled in RUNS:
        line, plain = (said[run, 0] for run in ((precision, way, compiled), (precision, "ddp", False)))
        assert line["loss"] == pytest.approx(plain["loss"], rel=bounds[precision]), (precision, way, compiled)
        if precision == "fp16":
            assert line["scaling"] == {"scale": 2.0**15, "good_updates": 1, "skipped": 1}, (way, compiled)
    gathered = (said[("amp_bf16", f"full{how}", False), 0] for how in ("", ", gathered in bfloat16"))
    assert len({line["weights"] for line in gathered}) == 1  # half the bytes, the same update


# ---------------------------------------------------------------------------------------------------------------------
# Activation checkpointing


class PeakMemory(TorchDispatchMode):
    """The most bytes that tensors made within this `with` held at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, (tuple, list)) else (output,):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage not in self._seen:
                    self._seen.add(storage)
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._gone, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return output

    def _gone(self, size: int) -> None:
        self.now -= size


def train_once(model: Flamingo, extra: int = 0, rows: int = 3) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of `text()`, its rows lengthened by `extra` tokens."""
    token_ids, _, labels = text()
    token_ids = torch.cat([token_ids[:rows], torch.full((rows, extra), 5)], dim=1)
    labels = torch.cat([labels[:rows], torch.full((rows, extra), 6)], dim=1)
    counts = [int(count) for count in (token_ids == IMAGE).sum(1)]
    model.zero_grad()
    loss = model(images(rows, max(counts)), token_ids, None, labels, image_counts=counts).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", ["opt", "gpt_neox", "gemma2", "mpt"])
def test_checkpointing_costs_no_accuracy_and_saves_memory(family: str) -> None:
    deep = {"n_layers": 8} if family == "mpt" else {"num_hidden_layers": 8}
    model = flamingo(language_model(family, tied=False, **deep)).train()
    outcomes, peaks = [], []
    for enabled in (False, True):
        model.set_gradient_checkpointing(enabled)
        model.zero_grad(set_to_none=True)
        with PeakMemory() as memory:
            outcomes.append(train_once(model, extra=200))
        peaks.append(memory.peak)
    # Not bit for bit: a gradient with two sources adds them up in another order.
    torch.testing.assert_close(outcomes[0], outcomes[1], rtol=1e-5, atol=1e-6)
    assert peaks[1] < peaks[0] / 2.5


# ---------------------------------------------------------------------------------------------------------------------
# Compiling


@pytest.fixture
def fresh_compiler() -> Any:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
    counters.clear()


@pytest.mark.usefixtures("fresh_compiler")
def test_blocks_are_compiled_once_for_any_length_and_number_of_images(monkeypatch: pytest.MonkeyPatch) -> None:
    compile_module = nn.Module.compile
    # What Dynamo does is the same for any backend, and this one leaves the minutes of a C++ compiler out.
    monkeypatch.setattr(
        nn.Module, "compile", lambda self, **options: compile_module(self, backend="aot_eager", **options)
    )
    model = flamingo(language_model("gemma2", tied=True, num_hidden_layers=3), gradient_checkpointing=True).train()
    model.perceiver.layers = model.perceiver.layers[:2]  # the others are traced as the second is
    shapes = [(0, 3), (5, 2), (9, 3), (30, 2), (1, 3)]
    expected = [train_once(model, *shape) for shape in shapes]
    names = list(model.state_dict())

    compile_blocks(model)
    assert list(model.state_dict()) == names
    compiled = []
    for shape, (loss, gradients) in zip(shapes, expected):
        actual = train_once(model, *shape)
        torch.testing.assert_close(actual, (loss, gradients), rtol=1e-5, atol=1e-6)
        compiled.append(counters["stats"]["unique_graphs"])
    # Attention and feed-forward of the resampler (its first attention sees latents of another layout), gated, decoder.
    assert 4 <= compiled[0] <= 8
    assert set(compiled) == {compiled[0]}
    assert not counters["graph_break"]


@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiled_run_is_the_same_run(
    flags_of_module: list[str],
    float32_losses: list[float],
    shards: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The real program; at length, the real compiler. Otherwise that compiles only what tries whether it can. Validation compiles
    nothing."""
    if not AT_LENGTH:
        compile_module = nn.Module.compile
        quickly = lambda self, **options: compile_module(self, backend="aot_eager", **options)  # noqa: E731
        monkeypatch.setattr(nn.Module, "compile", quickly)
    validation = [f"--val_laion_shards={shards['laion']}", "--val_samples=4", "--val_captions=1", "--val_steps=100"]
    compiled = []
    run_validation = Validator.run

    def run(self: Validator, *args: Any) -> Any:
        compiled.append(counters["stats"]["unique_graphs"])
        result = run_validation(self, *args)
        compiled.append(counters["stats"]["unique_graphs"])
        return result

    monkeypatch.setattr(Validator, "run", run)
    main([*flags_of_module, *validation, f"--run_name={tmp_path}", "--compile"])
    before_first, after_first, before_last, after_last = compiled
    assert before_first == after_first
    assert before_last == after_last > after_first
    assert losses(tmp_path) == pytest.approx(float32_losses, abs=2e-5)
    assert counters["stats"]["unique_graphs"] >= 4
    assert not counters["graph_break"]


@pytest.mark.usefixtures("fresh_compiler")
def test_a_machine_that_cannot_compile_is_told_before_anything_is_built(
    flags_of_module: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", (None, "/no/such/compiler"))
    with pytest.raises(ValueError, match=r"--compile"):
        check_compiler(torch.device("cpu"))
    with pytest.raises(SystemExit) as refused:
        main([*flags_of_module, "--lm_path=no/such-model", f"--run_name={tmp_path}", "--compile"])
    assert refused.value.code == 1
    assert "--compile" in capsys.readouterr().err


def test_quick_gelu_in_one_kernel_is_the_same_and_rounds_no_worse() -> None:
    torch.manual_seed(0)
    config = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 3, "head_width": 32}
    tower = CLIP(32, config, {"width": 32, "heads": 1, "layers": 1}, quick_gelu=True).visual.eval()
    batch = torch.randn(4, 3, 32, 32)
    fused = copy.deepcopy(tower)
    fuse_quick_gelu(fused)
    assert sum(isinstance(module, nn.SiLU) for module in fused.modules()) == 3
    with torch.no_grad():
        expected = patch_tokens(tower, batch)
        torch.testing.assert_close(patch_tokens(fused, batch), expected, rtol=1e-5, atol=1e-5)
        errors = [
            (patch_tokens(low.bfloat16(), batch.bfloat16()).float() - expected).square().mean()
            for low in (fused, tower)
        ]
    assert errors[0] < 1.05 * errors[1]
