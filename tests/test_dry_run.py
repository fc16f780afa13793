"""`--dry_run`: says what a run would be, and whether it can be."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from open_flamingo.loss import labeled_positions
from open_flamingo.train import estimate
from open_flamingo.train.estimate import BatchSize
from open_flamingo.train.precision import autocast, cast_frozen_weights
from open_flamingo.train.train import main
from tests.families import IMAGE, flamingo, language_model


def said(flags: list[str], capsys: pytest.CaptureFixture[str], code: int = 0) -> str:
    if code:
        with pytest.raises(SystemExit) as ended:
            main([*flags, "--dry_run"])
        assert ended.value.code == code
    else:
        main([*flags, "--dry_run"])
    return capsys.readouterr().out


def test_it_says_what_a_good_run_would_be(flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    screen = said([*flags, f"--run_name={run}", "--dry_run_ranks=2", "--dry_run_gpu=H100"], capsys)
    assert not run.exists()
    assert re.fullmatch(r"problems +none found", screen.splitlines()[-1])
    assert re.search(r"model +0\.6 M parameters trained: resampler 0\.4", screen)
    shards = r"3 shards, some [\d.]+ kB and \d+ usable samples: the run reads each [\d.]+ times"
    assert len(re.findall(shards, screen)) == 2
    assert re.search(r"mmc4 .*\n.*left out: .*single_image", screen)
    spread = r": [\d.]+ \(10 %\), [\d.]+ \(median\), [\d.]+ \(90 %\)"
    assert re.search(
        rf"similarity of images to sentences \(threshold [\d.]+\){spread}; shorter side of images, pixels{spread}",
        screen,
    )
    assert re.search(r"memory +0\.0 GB of H100's 80 per rank, DDP on 2", screen)
    assert re.search(r"TFLOP per update and rank: [\d.e-]+ s at 40%", screen)
    assert "2 epochs of 2 updates (8 laion, 4 mmc4 samples each): the learning rate rises to 0.01 over 2 of 4" in screen


def test_what_will_go_wrong_is_named_and_the_code_is_1(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = estimate.Accelerator("H100", 989e12, 450e9, 50e9, memory=4e6)
    monkeypatch.setattr("open_flamingo.train.dry_run.ACCELERATORS", (tiny,))
    monkeypatch.setattr("open_flamingo.train.dry_run.shutil.disk_usage", lambda path: type("Free", (), {"free": 1e6}))
    changes = ["--warmup_steps=100", "--num_epochs=20", "--dry_run_gpu=H100"]
    screen = said([*flags, *changes, f"--run_name={tmp_path}"], capsys, code=1)
    wrong = screen[screen.index("problems") :]
    for words in ("do not fit in 90%", "--delete_previous_checkpoint", "--warmup_steps"):
        assert words in wrong, screen
    dropped = said([*flags, "--mmc4_textsim_threshold=100"], capsys, code=1)
    assert re.search(r"problems .*mmc4.*no_match", dropped), dropped


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "amp_bf16"])
def test_an_update_without_memory_counts_what_a_real_one_holds_and_computes(precision: str, recompute: bool) -> None:
    def build() -> torch.nn.Module:
        model = flamingo(language_model("mpt", True), gradient_checkpointing=recompute).train()
        cast_frozen_weights(model, precision)
        return model

    size = BatchSize(rows=4, tokens=24, images=2)
    model = build().to("meta")
    estimated = estimate.measure_passes(model, precision, [size, size], (8, 8), on_gpu=False)
    assert {p.device.type for p in model.parameters()} == {"meta"}  # as it was

    model = build()
    token_ids = torch.randint(1, 50, (4, 24))
    token_ids[:, [0, 12]] = IMAGE
    labels = token_ids.masked_fill(token_ids == IMAGE, -100)
    with estimate.Meter() as meter:
        for _ in range(2):
            images = torch.randn(4, 2, 1, 3, 8, 8)
            with autocast(precision, torch.device("cpu")):
                positions = labeled_positions(labels, images.device)
                loss = model(images, token_ids, labels=positions, image_counts=[2] * 4).loss
            loss.backward()
            del loss, images
    assert estimated.forward + estimated.backward == pytest.approx(
        meter.flops, rel=0.05
    )  # one more label per row there
    assert estimated.peak == pytest.approx(meter.peak, rel=0.05)
    assert estimated.gradients == sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
