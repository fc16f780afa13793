"""Validation: the same figures on any number of ranks, nothing of training touched, and nothing that ends a run."""

from __future__ import annotations

import json
import math
import os
import signal
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

from open_flamingo.train.checkpoint.files import load
from open_flamingo.train.data.samples import Sample
from open_flamingo.train.loop import seconds_left
from open_flamingo.train.schedule import Progress
from open_flamingo.train.train import main
from open_flamingo.train.validation import Validator, groups_of, with_blank_images, with_images_of_next
from tests.ranks import run_ranks
from tests.shards import write_laion, write_mmc4, write_tar
from tests.test_train import metrics
from tests.tiny import ROOT, assert_same, finished


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("held-out")
    return [
        f"--val_laion_shards={write_laion(folder / 'laion', shards=2, seed=5)}",
        f"--val_mmc4_shards={write_mmc4(folder / 'mmc4', shards=2, seed=5)}",
        "--val_samples=13",  # a group of eight, and one of five
        "--val_captions=3",
    ]


def validations(run: Path) -> list[dict[str, Any]]:
    return [line for line in metrics(run) if "seconds_validating" in line]


def figures(run: Path) -> list[dict[str, Any]]:
    return [
        {name: value for name, value in line.items() if not name.startswith("seconds")} for line in validations(run)
    ]


def captions(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "captions.jsonl").read_text().splitlines()]


def test_figures_are_the_same_on_any_number_of_ranks_and_strategy(
    flags: list[str], held_out: list[str], tmp_path: Path
) -> None:
    flags = [*flags, "--lr_scheduler=constant"]
    one = tmp_path / "one"
    main([*flags, *held_out, f"--run_name={one}", "--workers=1"])
    expected = figures(one)
    assert [line["step"] for line in expected] == [0, 4, 8]
    names = {f"{name}_{kind}" for name in ("val_loss", "image_gain", "blank_gain") for kind in ("laion", "mmc4")}
    assert names | {"step"} < expected[0].keys()
    assert {"val_loss_mmc4_image_1", "val_loss_mmc4_image_2"} < expected[0].keys()
    assert expected[-1]["val_loss_laion"] < expected[0]["val_loss_laion"]
    # The gates start shut: nothing that is seen changes anything.
    assert expected[0]["image_gain_laion"] == expected[0]["blank_gain_mmc4"] == 0
    assert expected[-1]["image_gain_laion"] != 0
    assert expected[-1]["blank_gain_mmc4"] != 0
    said = captions(one)
    assert [line["step"] for line in said] == [0, 0, 0, 4, 4, 4, 8, 8, 8]
    assert said[0]["data"] == "a blue tree, number 0"

    for more in ([], ["--fsdp"]):
        run = tmp_path / f"2{''.join(more)}"
        command = [*flags, *held_out, f"--run_name={run}", "--num_epochs=1", *more]
        finished(run_ranks(2, ROOT / "train" / "train.py", *command, "--batch_size_laion=2", "--batch_size_mmc4=1"))
        for line, reference in zip(figures(run), expected[:2], strict=True):
            assert line == pytest.approx(reference, rel=1e-6, abs=1e-6), more
        assert captions(run)[:3] == said[:3]

    # On four ranks an update sees more documents: what is the same is the validation of the model that they begin with.
    for more in ([], ["--fsdp", "--fsdp_sharding_strategy=hybrid", "--fsdp_shard_size=2"]):
        run = tmp_path / f"4{''.join(more)}"
        command = [*flags, *held_out, f"--run_name={run}", f"--resume_from_checkpoint={one / 'checkpoint_0.pt'}", *more]
        command += [
            "--batch_size_laion=1",
            "--batch_size_mmc4=1",
            "--train_num_samples_laion=4",
            "--train_num_samples_mmc4=4",
        ]
        finished(run_ranks(4, ROOT / "train" / "train.py", *command))
        assert figures(run)[0] == pytest.approx(expected[1], rel=1e-6, abs=1e-6), more
        assert captions(run)[:3] == said[3:6]


def test_training_is_not_touched(flags: list[str], held_out: list[str], tmp_path: Path) -> None:
    main([*flags, f"--run_name={tmp_path / 'without'}"])
    main([*flags, *held_out, "--val_steps=1", f"--run_name={tmp_path / 'with'}"])
    assert [line["step"] for line in validations(tmp_path / "with")] == list(range(9))
    without, with_ = (load(tmp_path / run / "checkpoint_1.pt") for run in ("without", "with"))
    assert_same(without, with_)


def test_a_resumed_run_validates_what_it_has_not(flags: list[str], held_out: list[str], tmp_path: Path) -> None:
    main([*flags, *held_out, f"--run_name={tmp_path}", "--num_epochs=1"])
    main([*flags, *held_out, f"--run_name={tmp_path}", "--num_epochs=2"])
    assert [line["step"] for line in validations(tmp_path)] == [0, 4, 8]
    assert [line["step"] for line in captions(tmp_path)] == [0, 0, 0, 4, 4, 4, 8, 8, 8]


@pytest.mark.parametrize("how", ["signal", "error"])
def test_a_run_that_ends_while_validating_has_saved_and_validates_when_it_goes_on(
    how: str, flags: list[str], held_out: list[str], tmp_path: Path
) -> None:
    losses = Validator._losses

    def disturbed(self: Validator, *args: Any) -> Any:
        if (tmp_path / "checkpoint_0.pt").exists() or len(validations(tmp_path)) == 1:
            if how == "error":
                raise RuntimeError("out of memory, say")
            os.kill(os.getpid(), signal.SIGTERM)
        return losses(self, *args)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(Validator, "_losses", disturbed)
        with pytest.raises((SystemExit, RuntimeError)) as ended:
            main([*flags, *held_out, f"--run_name={tmp_path}"])
    assert how == "error" or ended.value.code == 75
    assert [line["step"] for line in validations(tmp_path)] == [0]
    main([*flags, *held_out, f"--run_name={tmp_path}"])
    assert [line["step"] for line in validations(tmp_path)] == [0, 4, 8]
    assert [line["step"] for line in metrics(tmp_path) if "epoch" in line] == list(range(1, 9))


def test_a_run_that_begins_anew_validates_anew(flags: list[str], held_out: list[str], tmp_path: Path) -> None:
    main([*flags, *held_out, f"--run_name={tmp_path}", "--num_epochs=1"])
    (tmp_path / "checkpoint_0.pt").unlink()
    main([*flags, *held_out, f"--run_name={tmp_path}", "--num_epochs=1", "--val_captions=2"])
    assert [line["step"] for line in validations(tmp_path)] == [0, 4]
    assert [line["step"] for line in captions(tmp_path)] == [0, 0, 4, 4]


def test_sharded_training_is_not_touched(flags: list[str], held_out: list[str], tmp_path: Path) -> None:
    for run, more in (("without", []), ("with", [*held_out, "--val_steps=1"])):
        command = [
            *flags,
            *more,
            "--fsdp",
            "--num_epochs=1",
            "--gradient_accumulation_steps=2",
            f"--run_name={tmp_path / run}",
        ]
        finished(run_ranks(2, ROOT / "train" / "train.py", *command, "--batch_size_laion=2", "--batch_size_mmc4=1"))
    assert_same(*(load(tmp_path / run / "checkpoint_0.pt") for run in ("without", "with")))


def test_a_broken_validation_set_is_told_and_ends_nothing(
    flags: list[str], held_out: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tar(tmp_path / "broken.tar", [(f"{i}.{suffix}", b"?") for i in range(3) for suffix in ("jpg", "txt")])
    (tmp_path / "cut.tar").write_bytes((tmp_path / "broken.tar").read_bytes()[:700])
    broken = f"--val_laion_shards={tmp_path / 'broken.tar'}::{tmp_path / 'cut.tar'}"
    main([*flags, held_out[1], broken, f"--run_name={tmp_path / 'run'}", "--num_epochs=1"])
    assert "no sample of --val_laion_shards can be used" in capsys.readouterr().err
    assert "val_loss_mmc4" in validations(tmp_path / "run")[-1]
    assert "val_loss_laion" not in validations(tmp_path / "run")[-1]

    main([*flags, broken, f"--run_name={tmp_path / 'none'}", "--num_epochs=1"])
    assert len(metrics(tmp_path / "none")) == 4
    with pytest.raises(SystemExit) as refused:
        main(
            [
                *flags,
                f"--val_laion_shards={tmp_path / 'broken.tar'}::{tmp_path}/gone.tar",
                f"--run_name={tmp_path / 'x'}",
            ]
        )
    assert refused.value.code == 2
    assert "--val_laion_shards" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_is_told(
    flags: list[str],
    held_out: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compute = "open_flamingo.train.validation.compute_loss"
    monkeypatch.setattr(compute, lambda model, dataset, batch, per_token: torch.full((batch.num_labels,), math.nan))
    main([*flags, *held_out, f"--run_name={tmp_path}", "--num_epochs=1"])
    assert validations(tmp_path)[0]["val_loss_laion"] is None
    assert "not finite: blank_gain_laion" in capsys.readouterr().err


def test_figures_are_means_over_labeled_tokens(flags: list[str], held_out: list[str], tmp_path: Path) -> None:
    """By hand: each sample alone, its loss out of the model's logits."""
    from open_flamingo import create_model_and_transforms
    from open_flamingo.train.arguments import parse_args
    from open_flamingo.train.data.loader import build_preparer, collate
    from open_flamingo.train.data.options import DataOptions
    from open_flamingo.train.data.shards import expand_shards
    from open_flamingo.train.validation import read_samples

    main([*flags, *held_out, f"--run_name={tmp_path}"])
    args = parse_args([*flags, *held_out])
    model, image_processor, tokenizer = create_model_and_transforms(
        args.vision_encoder_path, args.vision_encoder_pretrained, args.lm_path, use_local_files=True
    )
    model.load_state_dict(load(tmp_path / "checkpoint_1.pt")["model_state_dict"], strict=False)
    for kind in ("laion", "mmc4"):
        shards = expand_shards(getattr(args, f"val_{kind}_shards"))
        prepare = build_preparer(
            DataOptions(kind, tuple(shards), 1, mmc4_textsim_threshold=0.24), tokenizer, image_processor
        )
        samples = read_samples(kind, shards, prepare, 13)
        assert len(samples) == 13
        others = [sample for group in groups_of(samples) for sample in with_images_of_next(group)]
        means = []
        for variant in (samples, others):
            losses, images = [], []
            for sample in variant:
                batch = collate([sample], kind, prepare.encode)
                pixels = batch.images.float() / 255
                mean, std = (
                    torch.tensor(image_processor.transforms[-1].__dict__[name]).view(3, 1, 1)
                    for name in ("mean", "std")
                )
                with torch.no_grad():
                    logits = model(((pixels - mean) / std).unsqueeze(2), batch.input_ids).logits[0]
                counted = (batch.labels[0, 1:] != -100).nonzero().flatten()
                losses.append(
                    torch.nn.functional.cross_entropy(
                        logits[:-1][counted], batch.labels[0, 1:][counted], reduction="none"
                    )
                )
                images.append(
                    (batch.input_ids[0, 1:] == model.media_token_id).cumsum(0)[counted]
                    + (batch.input_ids[0, 0] == model.media_token_id)
                )
            means.append(torch.cat(losses).double())
        line = validations(tmp_path)[-1]
        assert line[f"val_loss_{kind}"] == pytest.approx(means[0].mean().item(), rel=1e-5)
        assert line[f"image_gain_{kind}"] == pytest.approx((means[1].mean() - means[0].mean()).item(), abs=1e-5)
        if kind == "mmc4":
            numbers = torch.cat(images)
            for k in (1, 2):
                assert line[f"val_loss_mmc4_image_{k}"] == pytest.approx(means[0][numbers == k].mean().item(), rel=1e-5)


def test_images_are_exchanged_within_groups_and_blanked() -> None:
    import numpy as np

    def sample(number: int, images: int) -> Sample:
        return Sample([np.full((3, 2, 2), 10 * number + i, np.uint8) for i in range(images)], [], str(number))

    samples = [sample(number, 1 + number % 3) for number in range(17)]
    groups = groups_of(samples)
    assert [len(group) for group in groups] == [8, 9]  # nobody is alone
    assert [len(group) for group in groups_of(samples[:1])] == [1]
    exchanged = with_images_of_next(groups[0])
    assert [int(image[0, 0, 0]) for image in exchanged[1].images] == [20, 21]
    assert [int(image[0, 0, 0]) for image in exchanged[2].images] == [30, 30, 30]
    assert int(exchanged[7].images[0][0, 0, 0]) == 0
    assert {int(image.max()) for blank in with_blank_images(groups[0]) for image in blank.images} == {128}
    assert samples[2].images[0].max() == 20


@pytest.mark.parametrize(
    ("val_steps", "progress", "left"),
    [
        (0, Progress(3, 0, {"laion": 12}), 2),
        (0, Progress(4, 1), 2),  # the one of the epoch that has just ended is still to come
        (3, Progress(1, 0, {"laion": 4}), 3),  # after 3, 6 and, at the end, 8
        (3, Progress(3, 0, {"laion": 12}), 3),
        (3, Progress(4, 1), 2),
        (4, Progress(5, 1, {"laion": 4}), 1),
    ],
)
def test_what_is_left_foresees_validations(val_steps: int, progress: Progress, left: int) -> None:
    """Of two epochs of four updates."""
    flags = Namespace(val_steps=val_steps, num_epochs=2)
    seconds = seconds_left(flags, progress, last_step=8, update=1.0, validation=100.0)
    assert seconds == 8 - progress.step + 100 * left
