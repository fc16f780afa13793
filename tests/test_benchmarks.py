"""The measuring stick: that it runs, compares like with like, and counts right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks import child as child_module
from benchmarks import gpu, learn, loading, real, reference, report, saving, scoring, shards, steps, trace
from benchmarks.backbones import VISION_CONFIG, set_weights, without_weights, write_backbones
from benchmarks.child import ROOT, Child
from benchmarks.shapes import SHAPES, Shape, Text, draw_batches, gpt_neox, needed_flops, vit
from open_flamingo import create_model_and_transforms
from tests import tiny
from tests.conftest import only_at_length


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In the place of build/benchmarks; and one thread for each child."""
    for module in (child_module, steps, loading):
        monkeypatch.setattr(module, "FOLDER", tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return tmp_path


@pytest.fixture(scope="session")
def the_reference() -> None:
    try:
        reference.install()
    except RuntimeError as error:
        pytest.skip(str(error))


@only_at_length
@pytest.mark.usefixtures("folder", "the_reference")
def test_both_programs_compute_the_same_losses() -> None:
    comparison = steps.compare(SHAPES["toy-mpt"], "fp32", rounds=1, steps=1)
    losses = comparison.programs["ours"].losses
    assert comparison.loss_difference < 1e-5
    assert losses[0] != losses[-1]  # something is trained
    text = steps.describe(comparison)
    for row in ("samples/s", "language model backward", "peak memory", "step ÷ floor"):
        assert row in text


@only_at_length
@pytest.mark.usefixtures("folder")
def test_without_the_reference() -> None:
    comparison = steps.compare(SHAPES["toy"], "fp32", 2, 1, only_ours=True)
    ours = comparison.programs["ours"]
    assert len(ours.seconds) == 2
    assert all(ours.parts[part] > 0 for part in ("vision", "resampler", "language model backward", "optimizer"))


@only_at_length
def test_a_day_on_a_gpu_keeps_what_it_has(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a toy in the place of each shape: ours comes first, what fails or takes too long stops nothing, answers are kept."""
    monkeypatch.setattr(gpu, "SHAPES", SHAPES | dict.fromkeys(("3b", "4b", "9b"), SHAPES["toy"]))
    parts = gpu.parts
    hangs = 3, lambda: Child("sleeps").ask("anything")
    monkeypatch.setattr(gpu, "parts", lambda shapes, only_ours: {"hangs": hangs} | parts(shapes, only_ours))
    monkeypatch.setattr(child_module, "ROOT", folder)
    (folder / "benchmarks").mkdir()
    (folder / "benchmarks" / "sleeps.py").write_text("import time; time.sleep(600)")
    ours = (
        f"import runpy, sys; sys.path[:0] = [{str(ROOT)!r}]; runpy.run_module('benchmarks.ours', run_name='__main__')"
    )
    (folder / "benchmarks" / "ours.py").write_text(ours)
    written: dict[str, str] = {}
    wanted = ["hangs", "3b updates", "3b kernels", "3b bits", "3b checkpoint", "9b"]
    gpu.run(written.__setitem__, only_ours=True, budget=400, wanted=wanted)
    toy = ["toy amp_bf16 ours", "toy kernels", "toy bits", "toy checkpoint ours"]
    assert list(written) == toy
    assert "as it is: 0 of" in written["toy bits"]
    assert "sleeps, asked for anything:\nout of time" in capsys.readouterr().err
    answers = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    assert {"losses", "steps", "memory", "save", "profile_steps"} <= {answer["asked"][0] for answer in answers}
    with pytest.raises(ValueError, match="the parts are hangs, 3b"):
        gpu.run(written.__setitem__, only_ours=True, budget=400, wanted=["5b"])


@pytest.mark.parametrize("other", [[[1.0, 2.0], [3.0, 4.001]], [[1.0, 2.0], [float("nan"), 4.0]]])
def test_a_difference_is_not_overlooked(other: list[list[float]]) -> None:
    ours = steps.Program("ours", "fp32", losses=[[1.0, 2.0], [3.0, 4.0]])
    reference = steps.Program("reference", "fp32", losses=other)
    with pytest.raises(ValueError, match="do not compute the same"):
        steps.Comparison(SHAPES["toy"], {}, {}, {"reference": reference, "ours": ours}).check()


@only_at_length
@pytest.mark.usefixtures("folder", "the_reference")
def test_saving() -> None:
    results = saving.measure(SHAPES["toy"], "fp32", rounds=1, only_ours=False)
    assert set(results) == {"reference", "ours, file", "ours, sharded"}
    for (each,) in results.values():
        # The resampler and its moments, at the least.
        assert each["bytes"] > 3 * 4 * 64 * 64 * 8 * 6
        assert 0 < each["standstill"] <= each["on_disk"]


@only_at_length
@pytest.mark.usefixtures("folder", "the_reference")
def test_both_loaders_read_the_same_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "SIZES", (shards.Size(160, 120),))
    monkeypatch.setattr(loading, "SAMPLES", {"laion": 64, "mmc4": 64})
    monkeypatch.setattr(shards, "QUALITY", 100)  # or they would be too small for MMC4
    results = {(r.program, r.kind): r for r in loading.measure((1,), rounds=1, seconds=0.2, only_ours=False)}
    assert results["ours", "laion"].tokens == pytest.approx(results["reference", "laion"].tokens, rel=0.3)
    # The same documents, but images whose token was cut off are in the reference's batches.
    assert 1.5 < results["ours", "mmc4"].images <= 1.2 * results["reference", "mmc4"].images
    assert "MMC4" in loading.describe(list(results.values()))
    more_than_rows = 2 * loading.BATCH_SIZE["mmc4"]
    assert all(result.rate > 0 for result in loading.measure((more_than_rows,), 1, 0.2, only_ours=True))


@only_at_length
@pytest.mark.usefixtures("folder", "the_reference")
def test_both_programs_evaluate_the_same_questions() -> None:
    rates = scoring.compare("toy", [0, 1], rounds=1)
    assert rates.keys() == {"open-flamingo 2.0.1", "here"}
    assert all(rate > 0 for turns in rates.values() for turn in turns for rate in turn)
    assert "times as fast" in scoring.describe("toy", [0, 1], rates)


def test_the_same_name_means_the_same_weights() -> None:
    shape = SHAPES["toy"]
    first, second = torch.nn.Linear(8, 4), torch.nn.Linear(8, 4)
    for layer in (first, second):
        set_weights(layer, Path())
    assert torch.equal(first.weight, second.weight)
    assert shape.samples == 4


def test_needed_flops_are_those_of_an_update(tmp_path: Path) -> None:
    """Of documents without anything to leave out, torch counts the same: no padding, no chunks, and attention to one image."""
    shape = Shape(
        "counted",
        vit(64, 2, 32, size=64, head=32),
        gpt_neox(64, 2, 2),
        vocabulary=1000,
        laion=Text(2, 16, 1, (1,)),
        mmc4=Text(2, 32, 1, (1,)),
    )
    write_backbones(tmp_path, shape)
    with without_weights():
        model, _, _ = create_model_and_transforms(
            str(tmp_path / VISION_CONFIG), None, str(tmp_path / "language"), use_local_files=True
        )
    batch = draw_batches(shape, media_id=998, eoc_id=997, count=1)[0]
    needed = needed_flops(shape, batch, media_id=998)
    counted = 0
    for rows in batch.values():
        seen = (rows["input_ids"] == 998).cumsum(1) > 0
        labels = rows["input_ids"].masked_fill(~seen | (rows["input_ids"] == 998), -100)
        # Attention that is written out: that some of torch's kernels compute, older versions do not count.
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            loss = model(
                vision_x=rows["images"].float().unsqueeze(2) / 255, lang_x=rows["input_ids"], labels=labels
            ).loss
            loss.backward()
        counted += counter.get_total_flops()
    # torch counts all of causal attention, of which half is needed, and the new tokens' rows.
    assert counted == pytest.approx(sum(needed.values()), rel=0.05)
    assert needed["vision"] > 0
    assert counted > sum(needed.values())


def test_a_trace_has_the_operations_of_each_part_and_the_conversions_of_a_gpu() -> None:
    shape = SHAPES["toy-mpt"]
    batch = draw_batches(shape, media_id=shape.vocabulary - 2, eoc_id=shape.vocabulary - 3, count=1)[0]
    needed = needed_flops(shape, batch, media_id=shape.vocabulary - 2)
    plain, mixed = (trace.trace(shape, precision, trace.GPUS["H100"]) for precision in ("fp32", "amp_bf16"))
    for part, least in needed.items():
        for found in (plain, mixed):
            flops = found.parts["head and loss" if part == "head" else part].flops
            # Gated blocks attend to the slots of rows with fewer images, too.
            assert least <= flops <= (1.35 if part == "gated cross-attention" else 1.1) * least, part
    casts = {part: mixed.operations[part, "_to_copy"].kernels for part in ("resampler", "gated cross-attention")}
    # Of each of two passes and 6 + 2 layers: five matrices there and their gradients back, and what norms gave in float32.
    assert casts["resampler"] >= 2 * 6 * 12
    assert casts["gated cross-attention"] >= 2 * 2 * 12
    assert ("gated cross-attention", "_to_copy") not in plain.operations
    assert mixed.peak < plain.peak


def test_large_language_models_have_the_layers_that_are_counted() -> None:
    """12 · width² weights a layer, in either family."""
    for name in ("toy", "toy-mpt"):
        config: dict[str, Any] = dict(SHAPES[name].language)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                AutoConfig.for_model(config.pop("model_type"), vocab_size=1000, **config)
            )
        matrices = sum(
            p.numel() for n, p in model.named_parameters() if p.ndim == 2 and "emb" not in n and "wte" not in n
        )
        matrices -= 64 * 1000 * (name == "toy")  # an untied head
        assert matrices == 2 * 12 * 64**2


def test_pictures_are_like_photographs() -> None:
    import numpy as np

    data = shards.picture(np.random.default_rng(0), shards.Size(512, 384))
    assert 1 < 8 * len(data) / (512 * 384) < 4  # bits a pixel


def test_a_result_replaces_the_last_one(tmp_path: Path) -> None:
    document, other = tmp_path / "performance.md", tmp_path / "there" / "performance.md"
    document.write_text("# Performance\n\nWords.\n")
    for text in ("slow", "fast"):
        report.write_section("one", "One", text, document)
    report.write_section("two", "Two", "2", document)
    content = document.read_text()
    assert content.startswith("# Performance\n\nWords.\n")
    assert "fast" in content
    assert "slow" not in content

    report.write_section("one", "One", "from there", other)
    assert report.merge(other, document) == ["one"]
    assert "from there" in document.read_text()
    assert "fast" not in document.read_text()
    assert document.read_text().count("begin: two") == 1


@only_at_length
def test_learn_says_what_each_validation_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On toys: twelve pictures, tiny backbones."""
    monkeypatch.setattr(real, "HELD_OUT", 3)
    monkeypatch.setattr(real, "SHARDS", 1)
    pictures = folder / "package" / "img" / "google" / "64"
    pictures.mkdir(parents=True)
    emoji = []
    for number in range(12):
        Image.effect_noise((64, 64), 20 * number).convert("RGBA").save(pictures / f"{number}.png")
        emoji.append({"short_name": f"thing_{number}", "image": f"{number}.png", "category": "Objects"})
    (folder / "package" / "emoji.json").write_text(json.dumps(emoji))
    real.write_shards(folder)

    flags = ["--cross_attn_every_n_layers=1", "--val_samples=3", "--val_captions=1"]
    rows = learn.measure(folder, 3, flags, backbones=tiny.write_backbones(folder))
    assert [row.update for row in rows] == [0, 1, 2, 3]
    assert rows[0].gain_seen != 0  # the gates are open
    assert rows[-1].loss_seen != rows[0].loss_seen
    assert f"{rows[-1].loss_held_out:.2f}" in learn.describe(rows, learn.tokens_per_caption(folder, "lm"))
    assert (folder / learn.RUN / "report.html").exists()
