"""`open-flamingo-caption`: files in, lines out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from open_flamingo import load
from open_flamingo.scripts import caption
from open_flamingo.train.train import main as train
from tests.conftest import only_at_length
from tests.shards import COLORS, picture
from tests.tiny import ROOT


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, backbones: list[str], shards: dict[str, str]) -> Path:
    """The folder of a run of a few updates, after which the model sees."""
    folder = tmp_path_factory.mktemp("run")
    size = [
        "--batch_size_laion=8",
        "--train_num_samples_laion=64",
        "--learning_rate=3e-3",
        "--warmup_steps=1",
        "--num_epochs=4",
    ]
    train([*backbones, f"--laion_shards={shards['laion']}", *size, "--workers=0", f"--run_name={folder}"])
    return folder


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Images of several kinds, in a folder in a folder too, and what is no image."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i, color in enumerate(COLORS):
        (folder / f"{i}.jpg").write_bytes(picture(rng, color))
    Image.new("RGBA", (40, 30), (200, 0, 0, 100)).save(folder / "more/a.png")
    Image.new("L", (30, 2000), 200).save(folder / "more/long.webp")
    (folder / "notes.txt").write_text("no image")
    return folder


@pytest.fixture
def say(run: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[list[str], str]]:
    """Runs the command; returns the lines of stdout, and stderr."""

    def say(*arguments: str | Path) -> tuple[list[str], str]:
        caption.main([str(run), *map(str, arguments), "--max_new_tokens=6"])
        captured = capsys.readouterr()
        return captured.out.splitlines(), captured.err

    return say


def test_a_line_for_each_image_in_their_order(say: Callable[..., tuple[list[str], str]], photos: Path) -> None:
    lines, err = say(photos)
    names = ["0.jpg", "1.jpg", "2.jpg", "3.jpg", "more/a.png", "more/long.webp"]
    assert [line.split("\t")[0] for line in lines] == [str(photos / name) for name in names]
    captions = [line.split("\t")[1] for line in lines]
    assert all(captions)
    assert len(set(captions)) > 1  # or a caption of another image would not show
    assert "skipped" not in err
    assert "<image>" not in "".join(captions)

    one_by_one, _ = say(photos, "--batch_size=1")
    assert one_by_one == lines
    mixed, _ = say(photos / "2.jpg", photos / "more", photos / "[01].jpg", "--batch_size=3", "--num_beams=3")
    assert mixed == [lines[i] for i in (2, 4, 5, 0, 1)]


def test_the_caption_is_what_the_model_generates(
    run: Path, say: Callable[..., tuple[list[str], str]], photos: Path
) -> None:
    model, image_processor, tokenizer = load(run, "cpu")
    shot, image = (image_processor(Image.open(photos / f"{i}.jpg").convert("RGB")) for i in (1, 0))
    shots = photos.parent / "shots.jsonl"
    shots.write_text(json.dumps({"image": "photos/1.jpg", "caption": "a green fox"}) + "\n\n")
    for more, prompt, images in (
        ([], "<image>", [image]),
        (["--prompt=It shows"], "<image>It shows", [image]),
        ([f"--shots={shots}"], "<image>a green fox<|endofchunk|><image>", [shot, image]),
        (
            [f"--shots={shots}", "--prompt=It is"],
            "<image>It is a green fox<|endofchunk|><image>It is",
            [shot, image],
        ),
    ):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        vision_x = image.new_zeros(1, len(images), 1, *image.shape)
        for i, of in enumerate(images):
            vision_x[0, i, 0] = of
        options = {"suppress_tokens": [model.media_token_id], "num_beams": 2, "max_new_tokens": 6}
        out = model.generate(vision_x, ids, eos_token_id=[model.eoc_token_id, tokenizer.eos_token_id], **options)
        expected = " ".join(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).split())
        lines, _ = say(photos / "0.jpg", "--json", "--num_beams=2", *more)
        assert [json.loads(line) for line in lines] == [{"image": str(photos / "0.jpg"), "caption": expected}]


def test_what_is_broken_is_named_and_skipped(say: Callable[..., tuple[list[str], str]], photos: Path) -> None:
    whole = (photos / "0.jpg").read_bytes()
    (photos / "1.jpg").write_bytes(whole[: len(whole) // 2])
    (photos / "2.jpg").write_bytes(b"")
    (photos / "empty").mkdir()
    images = [photos / f"{i}.jpg" for i in range(4)]
    lines, err = say(*images, photos / "notes.txt", photos / "gone.jpg", photos / "empty", photos / "*.bmp")
    assert [line.split("\t")[0] for line in lines] == [str(images[0]), str(images[3])]
    for name, reason in (
        ("1.jpg", "image file is truncated"),
        ("2.jpg", "not an image, or of a kind that is not read"),
        ("notes.txt", "not an image, or of a kind that is not read"),
        ("gone.jpg", "No such file or directory"),
        ("empty", "no image there"),
        ("*.bmp", "no image there"),
    ):
        assert f"skipped {photos / name}: {reason}" in err
    with pytest.raises(SystemExit) as exit:
        say(photos / "notes.txt")
    assert exit.value.code == 1


def test_the_page_is_whole_and_escaped(say: Callable[..., tuple[list[str], str]], photos: Path) -> None:
    (photos / "0.jpg").rename(photos / "<b>&.jpg")
    out = photos / "page.html"
    lines, _ = say(photos / "<b>&.jpg", photos / "notes.txt", f"--html={out}", "--prompt=<script>")
    text = out.read_text()
    assert text.count("<figure>") == 1
    assert "data:image/jpeg;base64,/9j/" in text
    assert "&lt;b&gt;&amp;.jpg" in text
    assert "&lt;script&gt;" in text
    assert "<b>" not in text
    assert "<script>" not in text
    assert "http" not in text
    assert len(lines) == 1


@only_at_length
def test_each_device_has_a_process_and_the_order_stays(
    run: Path, say: Callable[..., tuple[list[str], str]], photos: Path
) -> None:
    lines, _ = say(photos, "--batch_size=2")
    command = [sys.executable, "-m", "open_flamingo.scripts.caption", str(run), str(photos), "--max_new_tokens=6"]
    command += ["--batch_size=2", "--devices", "cpu", "cpu"]
    result = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == lines
    assert "images" not in result.stderr  # the bar is for terminals

    command[3] = str(photos)
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith(f"error: {photos} holds no checkpoint that can be read")


def test_a_line_ends_at_a_new_line_alone(tmp_path: Path) -> None:
    """JSON may hold U+2028, U+2029 and U+0085 as they are."""
    (tmp_path / "shots.jsonl").write_text('{"image": "a.jpg", "caption": "a\u2028b\u2029c\u0085d"}\n', encoding="utf-8")
    (shot,) = caption.read_shots(tmp_path / "shots.jsonl")
    assert shot.text == "a\u2028b\u2029c\u0085d"


def test_mistakes_are_told_in_a_line(say: Callable[..., tuple[list[str], str]], photos: Path) -> None:
    shots = photos.parent / "shots.jsonl"
    good = json.dumps({"image": "photos/0.jpg", "text": "red"})
    for lines, message in (
        ("[1]\n", "shots.jsonl, line 1 is not {"),
        (f'{good}\n{{"image": "a.jpg"}}\n', "shots.jsonl, line 2 is not {"),
        ('{"image": "gone.jpg", "text": "a"}\n', "gone.jpg: No such file or directory"),
        (f"{good}\n" * 40, "tokens, and the language model takes 250 beside --max_new_tokens 6: give fewer --shots"),
    ):
        shots.write_text(lines)
        with pytest.raises(SystemExit, match=r"^error: ") as exit:
            say(photos, f"--shots={shots}", "--prompt=a prompt of some words:")
        assert message in str(exit.value)
    with pytest.raises(SystemExit, match=r"^error: --shots .*gone\.jsonl: No such file"):
        say(photos, f"--shots={photos / 'gone.jsonl'}")
