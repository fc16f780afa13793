"""`open-flamingo-convert`: what people have becomes shards, and the program's own loader gives their images and text in order."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import sys
import tarfile
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from open_flamingo.scripts.convert.__main__ import main
from open_flamingo.scripts.convert.video import evenly
from tests.data_tools import loader, rows, tokenizer
from tests.shards import COLORS, picture, write_tar

NAMES = list(COLORS)


def write_images(folder: Path, count: int = 4) -> list[str]:
    """0.jpg, 1.jpg, …: red, green, blue, yellow. Small: under the size at which MMC4 takes images for icons."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        (folder / f"{i}.jpg").write_bytes(picture(rng, NAMES[i % 4]))
    return [f"{i}.jpg" for i in range(count)]


def loaded(kind: str, out: Path, samples: int, **options: Any) -> list[tuple[str, list[str]]]:
    """(text, colors of the images) of each sample that the loader makes of the shards of `out`, sorted."""
    taken = []
    with loader(kind, f"{out}/*.tar", lanes=1, shuffle_buffer=1, batch_size=samples, **options) as batches:
        for batch in islice(batches, 1):
            for _, ids, _, images in rows(batch):
                means = images.float().mean((-1, -2))
                nearest = [min(NAMES, key=lambda n: sum(abs(m - c) for m, c in zip(mean, COLORS[n]))) for mean in means]
                taken.append((tokenizer().decode(ids).replace("<|endoftext|>", ""), nearest))
    return sorted(taken)


def lines(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def write_table(folder: Path, kind: str, records: list[dict[str, Any]]) -> Path:
    path = folder / f"table.{kind}"
    if kind in ("csv", "tsv"):
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, list(records[0]), delimiter="\t" if kind == "tsv" else ",")
            writer.writeheader()
            writer.writerows(records)
    elif kind == "jsonl":
        lines(path, records)
    else:
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist(records), path, row_group_size=3)
    return path


CAPTIONED = [(f"<image>a {color}\nthing<|endofchunk|>", [color]) for color in NAMES]


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_pairs_of_tables(kind: str, tmp_path: Path) -> None:
    names = write_images(tmp_path)
    records = [{"file": name, "title": f"a {color}\nthing"} for name, color in zip(names, NAMES)]
    table = write_table(tmp_path, kind, records)
    flags = ["--image_field=file", "--caption_field=title", "--num_files_per_shard=3", "--workers=2"]
    main(["pairs", str(table), f"--output_dir={tmp_path}/out", *flags])
    assert loaded("laion", tmp_path / "out", 4) == sorted(CAPTIONED)
    with tarfile.open(tmp_path / "out" / "000000000.tar") as tar:  # as they were
        assert tar.extractfile("000000_000000.jpg").read() == (tmp_path / "0.jpg").read_bytes()  # type: ignore[union-attr]


def test_pairs_of_bytes(tmp_path: Path) -> None:
    write_images(tmp_path / "images")
    data = [(tmp_path / "images" / f"{i}.jpg").read_bytes() for i in range(4)]
    records = [{"image": {"bytes": d, "path": None}, "text": f"a {c}\nthing"} for d, c in zip(data, NAMES)]
    table = write_table(tmp_path, "parquet", records)  # as `datasets` writes images
    main(["pairs", str(table), f"--output_dir={tmp_path}/out"])
    assert loaded("laion", tmp_path / "out", 4) == sorted(CAPTIONED)


@pytest.mark.parametrize("beside", ["txt", "json", "metadata.csv", "metadata.jsonl"])
def test_pairs_of_folders(beside: str, tmp_path: Path) -> None:
    folder = tmp_path / "data" / "train"
    names = write_images(folder)
    Image.open(folder / "0.jpg").save(folder / "0.webp", quality=95)
    Image.open(folder / "1.jpg").save(folder / "1.bmp")  # the loader has no suffix for it
    for name in ("0.jpg", "1.jpg"):
        (folder / name).unlink()
    names[:2] = ["0.webp", "1.bmp"]
    captions = [f"a {color}\nthing" for color in NAMES]
    records = [{"file_name": name, "text": caption} for name, caption in zip(names, captions)]
    if beside.startswith("metadata"):
        write_table(folder, beside.rpartition(".")[2], records).rename(folder / beside)
    else:
        for name, caption in zip(names, captions):
            text = caption if beside == "txt" else json.dumps({"caption": caption})
            (folder / name).with_suffix(f".{beside}").write_text(text)
    main(["pairs", str(tmp_path / "data"), f"--output_dir={tmp_path}/out"])
    assert loaded("laion", tmp_path / "out", 4) == sorted(CAPTIONED)


def test_img2dataset_shards_train_as_they_are(tmp_path: Path) -> None:
    files = []
    write_images(tmp_path / "images")
    for i, color in enumerate(NAMES):
        buffer = io.BytesIO()
        Image.open(tmp_path / "images" / f"{i}.jpg").save(buffer, format="WEBP", quality=95)
        fields = {"caption": f"a {color}\nthing", "url": f"http://x/{i}", "key": f"{i:09d}", "status": "success"}
        files += [(f"{i:09d}.json", json.dumps(fields).encode()), (f"{i:09d}.webp", buffer.getvalue())]
    write_tar(tmp_path / "out" / "00000.tar", files)
    assert loaded("laion", tmp_path / "out", 4) == sorted(CAPTIONED)


def test_interleaved_keeps_its_order(tmp_path: Path) -> None:
    write_images(tmp_path)
    encoded = base64.b64encode((tmp_path / "3.jpg").read_bytes()).decode()

    def image(i: int) -> dict[str, str]:
        return {"type": "image", "path": f"{i}.jpg"} if i != 3 else {"type": "image", "base64": encoded}

    def text(words: str) -> dict[str, str]:
        return {"type": "text", "text": words}

    path = lines(
        tmp_path / "documents.jsonl",
        [
            # Text before the first image, two images before one text, two texts, a marker that is written out, an image last.
            {"content": [text("First."), image(2), image(0), text("Two _!_IMAGE9_!_"), text("more."), image(3)]},
            {"content": [image(1), text("One.")]},  # a single image: no coin
            {"content": [image(1), {"type": "image", "path": "none.jpg"}, text("Stays.")]},
            {"content": [{"type": "image", "path": "none.jpg"}, text("Nothing.")]},
        ],
    )
    main(["interleaved", str(path), f"--output_dir={tmp_path}/out", "--workers=2", "--num_files_per_shard=2"])
    assert loaded("mmc4", tmp_path / "out", 3) == sorted(
        [
            (
                "First.<image><|endofchunk|><image>Two IMAGE9 more.<|endofchunk|><image><|endofchunk|>",
                ["blue", "red", "yellow"],
            ),
            ("<image>One.<|endofchunk|>", ["green"]),
            ("<image>Stays.<|endofchunk|>", ["green"]),
        ]
    )


def test_obelics_finds_images_by_url(tmp_path: Path) -> None:
    write_images(tmp_path / "images")
    folder = tmp_path / "images"
    urls = ["http://x/a/0.jpg?w=3", "http://x/hashed", "http://x/listed.jpg", "http://x/gone.jpg"]
    (folder / "1.jpg").rename(folder / f"{hashlib.sha256(urls[1].encode()).hexdigest()}.jpg")
    (folder / "00000").mkdir()  # img2dataset --output_format files
    (folder / "2.jpg").rename(folder / "00000" / "000000007.jpg")
    (folder / "00000" / "000000007.json").write_text(json.dumps({"url": urls[2], "key": "000000007"}))
    record = {
        "images": [None, urls[2], None, urls[0], urls[3], None, urls[1], None],
        "texts": ["Title", None, "blue one", None, None, "red one", None, "green one"],
        "metadata": json.dumps([None] * 8),
    }
    table = write_table(tmp_path, "parquet", [record])
    main(["obelics", str(table), f"--image_dir={folder}", f"--output_dir={tmp_path}/out"])
    text = "Title<image>blue one<|endofchunk|><image>red one<|endofchunk|><image>green one<|endofchunk|>"
    assert loaded("mmc4", tmp_path / "out", 1) == [(text, ["blue", "red", "green"])]


def test_llava(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_images(tmp_path)

    def talk(*turns: str) -> list[dict[str, str]]:
        return [{"from": ("human", "gpt")[i % 2], "value": turn} for i, turn in enumerate(turns)]

    records = [
        {"id": "1", "image": "0.jpg", "conversations": talk("<image>\nWhat color?", "Red.", "Sure?", "Yes.")},
        {"id": "2", "image": ["2.jpg", "1.jpg"], "conversations": talk("<image> or\n<image>?", "Both.")},
        {"id": "3", "conversations": talk("No image.", "None.")},
        {"id": "4", "image": "0.jpg", "conversations": talk("<image><image>", "Two.")},
    ]
    (tmp_path / "llava.json").write_text(json.dumps(records, indent=1))
    main(["llava", str(tmp_path / "llava.json"), f"--output_dir={tmp_path}/out"])
    assert loaded("mmc4", tmp_path / "out", 2) == sorted(
        [
            ("<image>User: What color? Assistant: Red. User: Sure? Assistant: Yes.<|endofchunk|>", ["red"]),
            ("<image>User: or<|endofchunk|><image>? Assistant: Both.<|endofchunk|>", ["blue", "green"]),
        ]
    )
    said = capsys.readouterr().out
    assert "no_image: 1" in said
    assert "the text has more <image> than there are images" in said


def test_video_of_frames(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b", "c"):
        write_images(tmp_path / "videos" / name, 9)
    (tmp_path / "videos" / "a.txt").write_text("Colors change.\n")
    (tmp_path / "videos" / "b.txt").write_text("They do.")
    flags = ["video", str(tmp_path / "videos"), f"--output_dir={tmp_path}/out"]
    main([*flags, "--frames=8"])
    said = capsys.readouterr().out
    assert "no_caption: 1" in said
    assert "--mmc4_max_num_images 8" in said
    colors = [NAMES[i % 4] for i in evenly(9, 8)]
    got = loaded("mmc4", tmp_path / "out", 2, mmc4_max_num_images=8)
    frames = "<image><|endofchunk|>" * 7
    assert got == [(f"{frames}<image>{text}<|endofchunk|>", colors) for text in ("Colors change.", "They do.")]
    assert evenly(10, 2) == [2, 7]
    assert evenly(2, 5) == [0, 1]
    with pytest.raises(SystemExit, match=r"another input: .*frames 8, now frames 6"):
        main(flags)


def test_a_video_file_needs_pyav(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "a.mp4").write_bytes(b"no video")
    (tmp_path / "videos" / "a.txt").write_text("Something.")
    with pytest.raises(SystemExit, match=r"a\.mp4: reading video files needs PyAV: pip install av"):
        main(["video", str(tmp_path / "videos"), f"--output_dir={tmp_path}/out"])


def test_what_is_left_out_is_counted_by_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_images(tmp_path / "images")
    (tmp_path / "secret.jpg").write_bytes((tmp_path / "images" / "0.jpg").read_bytes())
    (tmp_path / "images" / "1.jpg").write_bytes(b"no picture")
    records: list[Any] = [{"path": name, "caption": "c"} for name in ("0.jpg", "1.jpg", "9.jpg", "../secret.jpg")]
    table = lines(tmp_path / "table.jsonl", [*records, {"path": "2.jpg"}, [1]])
    with open(table, "a") as file:
        file.write("{broken\n")
    flags = ["pairs", str(table), f"--output_dir={tmp_path}/out", f"--image_dir={tmp_path}/images"]
    main([*flags, "--num_files_per_shard=3"])
    said = capsys.readouterr().out
    assert "1 pairs in 3 shards, 1 images" in said
    for reason in ("bad_image: 1", "missing_image: 1", "outside_image_dir: 1", "no_caption: 1", "bad_row: 2"):
        assert f"left out, {reason}" in said
    assert "name it with --caption_field" in said
    assert "--laion_shards" in said
    main([*flags, "--num_files_per_shard=3"])
    assert capsys.readouterr().out == said, "a second run sums up all shards, not only its own"


def test_unusable_input_is_refused(tmp_path: Path) -> None:
    out = f"--output_dir={tmp_path}/out"
    (tmp_path / "a.xlsx").write_bytes(b"")
    (tmp_path / "a.parquet").write_bytes(b"nothing")
    (tmp_path / "a.json").write_text("[1, 2")
    (tmp_path / "empty").mkdir()
    for name, message in {
        "none.csv": "does not exist",
        "a.xlsx": "is none of",
        "a.parquet": "is not a readable Parquet file",
        "a.json": "is not JSON",
        "empty": "no image is in",
    }.items():
        with pytest.raises(SystemExit, match=message):
            main(["pairs", str(tmp_path / name), out])
    table = lines(tmp_path / "table.jsonl", [{"a": 1}])
    with pytest.raises(SystemExit, match="nothing could be converted"):
        main(["pairs", str(table), out])


def test_converted_documents_train(tmp_path: Path, backbones: list[str]) -> None:
    from open_flamingo.train.train import main as train

    write_images(tmp_path)
    content = [
        [{"type": "image", "path": f"{i % 4}.jpg"}, {"type": "text", "text": f"a {NAMES[i % 4]}"}] for i in range(16)
    ]
    path = lines(tmp_path / "documents.jsonl", [{"content": items} for items in content])
    main(["interleaved", str(path), f"--output_dir={tmp_path}/out"])
    flags = [f"--mmc4_shards={tmp_path}/out/000000000.tar", "--batch_size_mmc4=4", "--train_num_samples_mmc4=16"]
    flags += ["--num_epochs=3", "--workers=0", "--learning_rate=1e-2", "--warmup_steps=1", "--logging_steps=1"]
    train([*backbones, *flags, f"--run_name={tmp_path}/run"])
    entries = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [entry["loss_mmc4"] for entry in entries if "loss_mmc4" in entry]
    assert len(losses) == 12
    assert np.mean(losses[-3:]) < np.mean(losses[:3]) - 0.1, losses
