from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from open_flamingo.train.data.shards import check_shards, expand_shards


def test_patterns_expand_in_order() -> None:
    assert expand_shards("a-{08..11}.tar::b/{x,y}.tar::pipe:cat {1..2}.tar") == [
        "a-08.tar",
        "a-09.tar",
        "a-10.tar",
        "a-11.tar",
        "b/x.tar",
        "b/y.tar",
        "pipe:cat 1.tar",
        "pipe:cat 2.tar",
    ]


def test_s3_becomes_a_pipe_and_home_is_known() -> None:
    assert expand_shards("s3://bucket/{0..1}.tar") == [
        "pipe:aws s3 cp s3://bucket/0.tar -",
        "pipe:aws s3 cp s3://bucket/1.tar -",
    ]
    assert expand_shards("~/a.tar") == [os.path.expanduser("~/a.tar")]
    assert expand_shards("https://host/~me/{0..1}.tar") == ["https://host/~me/0.tar", "https://host/~me/1.tar"]


def test_existing_shards_pass_and_remote_ones_are_not_probed(tmp_path: Path) -> None:
    (tmp_path / "0.tar").touch()
    spec = (
        f"{tmp_path}/0.tar::s3://bucket/{{0..1}}.tar::file:{tmp_path}/0.tar::pipe:false::http://nowhere.invalid/a.tar"
    )
    assert check_shards("--laion_shards", spec) == expand_shards(spec)


@pytest.mark.parametrize("spec", ["", "  ", "::"])
def test_an_empty_list_is_refused(spec: str) -> None:
    with pytest.raises(ValueError, match="--laion_shards names no shard"):
        check_shards("--laion_shards", spec)


def test_missing_shards_are_named(tmp_path: Path) -> None:
    spec = f"{tmp_path}/{{0..9}}.tar"
    with pytest.raises(ValueError, match=r"--mmc4_shards: .*matches no file.*0\.tar"):
        check_shards("--mmc4_shards", spec)
    with pytest.raises(ValueError, match="matches no file"):
        check_shards("--mmc4_shards", f"{tmp_path}/no/such/folder/{{0..9}}.tar")
    (tmp_path / "3.tar").touch()
    with pytest.raises(ValueError, match=r"--mmc4_shards: 9 of the 10 shards.*0\.tar.* and 6 more"):
        check_shards("--mmc4_shards", spec)


def test_what_is_not_a_readable_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "folder.tar").mkdir()
    with pytest.raises(ValueError, match=r"not readable, or not a file: .*folder\.tar"):
        check_shards("--laion_shards", f"{tmp_path}/folder.tar")
    with pytest.raises(ValueError, match="--laion_shards: unbalanced braces"):
        check_shards("--laion_shards", f"{tmp_path}/{{0..1.tar")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_forbidden_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.tar").touch(mode=0o000)
    with pytest.raises(ValueError, match="not readable"):
        check_shards("--laion_shards", f"{tmp_path}/a.tar")


def test_checking_shards_imports_nothing_heavy() -> None:
    code = "import sys; import open_flamingo.train.data.shards; print(*{'torch', 'webdataset', 'numpy', 'PIL'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == ""
