"""The MMC4 converter: its shards train, and a kill costs nothing."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import zipfile
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from open_flamingo.scripts.convert_mmc4_to_wds import main
from tests.data_tools import loader, rows
from tests.shards import picture

ROOT = Path(__file__).parents[1]


def write_mmc4_download(
    folder: Path, zips: int = 2, documents: int = 6, size: tuple[int, int] = (240, 200)
) -> list[str]:
    """What a user has before converting: zips of documents and folders of pictures. Returns the converter's flags."""
    rng = np.random.default_rng(0)
    for index in range(zips):
        (folder / "images" / str(index)).mkdir(parents=True)
        for name in range(3):
            color = ["red", "green", "blue"][name]
            (folder / "images" / str(index) / f"{name}.png").write_bytes(picture(rng, color, size, noise=120))
        lines = []
        for number in range(documents):
            document = {
                "text_list": ["A red fox.", f"Words {index}.", f"A green tree {number}."],
                "similarity_matrix": [[40, 1, 2], [1, 2, 41]],
                "image_info": [{"image_name": "0.png", "raw_url": "http://x"}, {"image_name": "1.png"}],
            }
            lines.append(json.dumps(document))
        with zipfile.ZipFile(folder / f"shard_{index}.zip", "w") as archive:
            archive.writestr(f"docs_shard_{index}.jsonl", "\n".join(lines) + "\n")
    return [
        f"--zip_files={folder}/shard_{{0..{zips - 1}}}.zip",
        f"--image_dir={folder}/images",
    ]


@pytest.mark.parametrize("name", ["../secret.png", "/{folder}/secret.png", "a/../../secret.png", "image.pcx"])
def test_a_document_reaches_no_file_but_images_of_its_folder(name: str, tmp_path: Path) -> None:
    flags = write_mmc4_download(tmp_path, zips=1, documents=1)
    folder = tmp_path / "images" / "0"
    Image.new("RGB", (200, 200)).save(tmp_path / "images" / "secret.png")
    Image.new("RGB", (200, 200)).save(folder / "image.pcx")  # a format that training does not open either
    (folder / "a").mkdir()
    document = {"text_list": ["A"], "similarity_matrix": [[1]]}
    document |= {"image_info": [{"image_name": name.format(folder=tmp_path / "images")}, {"image_name": "a/../0.png"}]}
    with zipfile.ZipFile(tmp_path / "shard_0.zip", "w") as archive:
        archive.writestr("docs.jsonl", json.dumps(document))
    main([*flags, f"--output_dir={tmp_path / 'shards'}"])
    ((_, converted),) = documents(tmp_path / "shards").items()
    assert ["image_base64" in info for info in converted["image_info"]] == [False, True]


def contents(folder: Path) -> dict[str, str]:
    """Hash of each shard."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.tar"))}


def documents(folder: Path) -> dict[str, dict]:
    """All documents by key; fails if one is there twice."""
    found: dict[str, dict] = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                assert member.name not in found
                file = tar.extractfile(member)
                assert file is not None
                found[member.name] = json.loads(file.read())
    return found


def test_its_shards_train(tmp_path: Path) -> None:
    flags = write_mmc4_download(tmp_path)
    main([*flags, f"--output_dir={tmp_path}/out", "--num_files_per_shard=5"])
    assert sorted(contents(tmp_path / "out")) == ["000000000.tar", "000000001.tar", "000000002.tar"]
    with loader(
        "mmc4", f"{tmp_path}/out/{{000000000..000000002}}.tar", lanes=1, shuffle_buffer=1, batch_size=6
    ) as batches:
        taken = [row for batch in islice(batches, 2) for row in rows(batch)]
    assert len({key for key, *_ in taken}) == 12
    assert all(len(images) == 2 for *_, images in taken)


def test_documents_keep_what_they_had_and_gain_their_own_pictures(tmp_path: Path) -> None:
    flags = write_mmc4_download(tmp_path)
    main([*flags, f"--output_dir={tmp_path}/out"])
    converted = documents(tmp_path / "out")
    assert len(converted) == 12
    for name, document in converted.items():
        zip_index, number = (int(part) for part in name.removesuffix(".json").split("_"))
        assert document["text_list"][1:] == [f"Words {zip_index}.", f"A green tree {number}."]
        assert document["image_info"][0]["raw_url"] == "http://x"
        for info in document["image_info"]:
            original = Image.open(tmp_path / "images" / str(zip_index) / info["image_name"]).convert("RGB")
            image = Image.open(io.BytesIO(base64.b64decode(info["image_base64"], validate=True)))
            assert image.format == "JPEG"
            assert image.size == original.size
            assert np.abs(np.asarray(image).mean((0, 1)) - np.asarray(original).mean((0, 1))).max() < 3


def test_the_number_of_workers_changes_nothing(tmp_path: Path) -> None:
    flags = write_mmc4_download(tmp_path, zips=3)
    main([*flags, f"--output_dir={tmp_path}/one", "--num_files_per_shard=4"])
    main([*flags, f"--output_dir={tmp_path}/two", "--num_files_per_shard=4", "--workers=2"])
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert len(contents(tmp_path / "one")) == 5


def test_what_is_missing_or_broken_is_left_out_and_summed_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = write_mmc4_download(tmp_path, zips=4, documents=3)
    (tmp_path / "shard_2.zip").unlink()
    (tmp_path / "images" / "0" / "0.png").unlink()
    (tmp_path / "images" / "1" / "1.png").write_bytes(b"no picture")
    with zipfile.ZipFile(tmp_path / "shard_3.zip", "w") as archive:
        deep = "[" * 100_000
        archive.writestr("docs.jsonl", f'{{"text_list": []}}\n\n{deep}\n{{"image_info": [], "text_list": []}}')
    main([*flags, f"--output_dir={tmp_path}/out", "--num_files_per_shard=4"])
    output = capsys.readouterr().out
    assert "7 documents in 3 shards, 6 images" in output
    assert "missing: 3 images, 1 zips; unreadable: 3 images, 2 documents" in output
    assert f"no such zip: {tmp_path}/shard_2.zip" in output
    assert f"--mmc4_shards '{tmp_path}/out/{{000000000..000000002}}.tar'" in output
    first = documents(tmp_path / "out")["000000_000000.json"]
    assert ["image_base64" in info for info in first["image_info"]] == [False, True]
    main([*flags, f"--output_dir={tmp_path}/out", "--num_files_per_shard=4"])
    assert capsys.readouterr().out == output, "a second run sums up all shards, not only its own"


def test_unusable_input_is_refused(tmp_path: Path) -> None:
    flags = write_mmc4_download(tmp_path)
    with pytest.raises(SystemExit, match="matches no file"):
        main([f"--zip_files={tmp_path}/no_{{0..3}}.zip", flags[1], f"--output_dir={tmp_path}/out"])
    with pytest.raises(SystemExit, match="is not a folder"):
        main([flags[0], f"--image_dir={tmp_path}/none", f"--output_dir={tmp_path}/out"])
    (tmp_path / "bad.zip").write_bytes(b"no zip")
    with zipfile.ZipFile(tmp_path / "damaged.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("docs.jsonl", random.Random(0).randbytes(1000))
    data = bytearray((tmp_path / "damaged.zip").read_bytes())
    data[45] ^= 255  # of the deflated bytes
    (tmp_path / "damaged.zip").write_bytes(data)
    for name in ("bad", "damaged"):
        with pytest.raises(SystemExit, match=rf"{name}\.zip is not a readable zip"):
            main([f"--zip_files={tmp_path}/{name}.zip", flags[1], f"--output_dir={tmp_path}/{name}"])


def test_a_killed_worker_ends_the_run_and_the_next_goes_on(tmp_path: Path) -> None:
    flags = write_mmc4_download(tmp_path, zips=2, documents=40, size=(700, 700))
    flags += [f"--output_dir={tmp_path / 'out'}", "--num_files_per_shard=1", "--workers=2"]
    command = [sys.executable, "scripts/convert_mmc4_to_wds.py", *flags]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        while len(contents_so_far(tmp_path / "out")) < 3:
            assert process.poll() is None, "it ended before its worker could be killed"
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[0]), signal.SIGKILL)
        _, error = process.communicate()
    assert process.returncode == 1
    assert "a worker was killed" in error
    main(flags)
    assert len(contents_so_far(tmp_path / "out")) == 80


def test_shards_of_another_input_are_not_mixed(tmp_path: Path) -> None:
    flags = write_mmc4_download(tmp_path)
    main([*flags, f"--output_dir={tmp_path}/out", "--num_files_per_shard=5"])
    before = contents(tmp_path / "out")
    for zips, per_shard, difference in (
        ("shard_{0..1}.zip", 4, "num_files_per_shard 5, now num_files_per_shard 4"),
        ("shard_0.zip", 5, r"shard_1\.zip: \d+ bytes, now nothing"),
        ("shard_{1..0}.zip", 5, r"shard_0\.zip: \d+ bytes, now .*shard_1\.zip: "),  # another order
    ):
        again = [f"--zip_files={tmp_path}/{zips}", flags[1], f"--num_files_per_shard={per_shard}"]
        with pytest.raises(SystemExit, match=f"another input: .*{difference}"):
            main([*again, f"--output_dir={tmp_path}/out"])
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("workers", [1, 2])
def test_a_kill_loses_nothing_and_writes_nothing_twice(tmp_path: Path, workers: int) -> None:
    flags = write_mmc4_download(tmp_path, zips=2, documents=40, size=(700, 700))
    flags += ["--num_files_per_shard=1", f"--workers={workers}"]
    main([*flags, f"--output_dir={tmp_path}/whole"])
    out = tmp_path / "out"
    command = [sys.executable, "scripts/convert_mmc4_to_wds.py", *flags, f"--output_dir={out}"]
    for enough in (3, 20):
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            while len(contents_so_far(out)) < enough:
                assert process.poll() is None, "it ended before it could be killed"
            process.send_signal(signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
    listing = out / "convert.shards.jsonl"
    with open(listing, "a") as file:
        file.write('{"shard": "0000')  # as if killed in the middle of this line
    finished = {json.loads(line)["shard"] for line in listing.read_text().splitlines()[:-1]}
    assert 2 <= len(finished) < 80
    written = {name: (out / name).stat().st_mtime_ns for name in finished}
    main([*flags, f"--output_dir={out}"])
    assert contents(out) == contents(tmp_path / "whole")
    assert {name: (out / name).stat().st_mtime_ns for name in finished} == written, (
        "what was finished is not written again"
    )
    assert sorted(path.name for path in out.iterdir() if not path.name.endswith(".tar")) == [
        "convert.json",
        "convert.shards.jsonl",
    ]


def contents_so_far(folder: Path) -> list[Path]:
    return list(folder.glob("*.tar"))


def test_help_answers_without_heavy_imports() -> None:
    code = "import sys; import open_flamingo.scripts.convert_mmc4_to_wds; print(*{'torch', 'PIL', 'numpy'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == ""
