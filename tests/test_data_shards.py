from __future__ import annotations

import os
from pathlib import Path

import pytest

from open_flamingo.train.data.shards import check_shards, expand_shards, resolve_shards, shards_digest


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
    assert check_shards("--laion_shards", spec) == (expand_shards(spec), [])


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


@pytest.mark.fault(
    "Data",
    "Up to a tenth of the local shards of a pattern missing",
    "a warning with the count and examples, and the others are trained on; more, or any with `--missing_shards stop`: refused",
)
def test_gaps_in_the_numbers_are_left_out_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    there = [f"{tmp_path}/{number:02}.tar" for number in range(20) if number not in (3, 11)]
    for path in there:
        Path(path).touch()
    spec = f"{tmp_path}/{{00..19}}.tar"
    assert resolve_shards("--laion_shards", spec, "warn") == there
    assert (
        f"--laion_shards: 2 of 20 shards do not exist and are left out: {tmp_path}/03.tar, {tmp_path}/11.tar"
        in caplog.text
    )
    with pytest.raises(ValueError, match=r"2 of the 20 shards .* \(--missing_shards is stop\): .*03\.tar"):
        resolve_shards("--laion_shards", spec, "stop")
    Path(there[0]).unlink()
    with pytest.raises(ValueError, match=r"3 of the 20 shards .* \(more than a tenth\): .*00\.tar"):
        resolve_shards("--laion_shards", spec, "warn")
    with pytest.raises(ValueError, match=r"'.*/gone/\{0\.\.1\}\.tar' matches no file"):
        resolve_shards("--laion_shards", f"{tmp_path}/*.tar::{tmp_path}/gone/{{0..1}}.tar", "warn")


def test_stars_and_lists(tmp_path: Path) -> None:
    for name in ("b-1.tar", "b-0.tar", "a.tar", "._a.tar", "a.txt"):
        (tmp_path / name).touch()
    a, b_0, b_1 = (f"{tmp_path}/{name}.tar" for name in ("a", "b-0", "b-1"))
    listing = tmp_path / "list.txt"
    listing.write_text(f"# mine\n\n{b_1}\r\n  {tmp_path}/{{a,b-0}}.tar\ns3://bucket/{{0..1}}.tar\n")
    s3 = [f"pipe:aws s3 cp s3://bucket/{i}.tar -" for i in range(2)]
    for spec, expected in {
        f"{tmp_path}/*.tar": [a, b_0, b_1],
        f"file:{tmp_path}/{{b,a}}*.tar": [b_0, b_1, a],
        f"@{listing}::{a}": [b_1, a, b_0, *s3, a],
        "pipe:cat /data/*.tar": ["pipe:cat /data/*.tar"],
    }.items():
        assert expand_shards(spec) == expected
        assert check_shards("--laion_shards", spec) == (expected, [])
    listing.write_text("# nothing\n")
    for spec, message in {
        f"{tmp_path}/*.tgz": r"\*\.tgz' matches no file",
        f"@{tmp_path}/gone.txt": r"gone\.txt': the list of shards cannot be read",
        f"@{listing}": "names no shard",
    }.items():
        with pytest.raises(ValueError, match=f"--mmc4_shards.*{message}"):
            check_shards("--mmc4_shards", spec)


def test_folders_are_listed_and_files_not_asked_about(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """LAION has 200,000 shards, and a question to NFS takes milliseconds."""
    for number in range(100):
        (tmp_path / f"{number}.tar").touch()
    asked: list[str] = []
    for name in ("stat", "access"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda path, *rest, real=real: asked.append(str(path)) or real(path, *rest))
    assert len(check_shards("--laion_shards", f"{tmp_path}/{{0..99}}.tar")[0]) == 100
    assert set(asked) == {f"{tmp_path}/0.tar"}


def test_the_digest_tells_which_shards_in_which_order() -> None:
    one = shards_digest(["a.tar", "b.tar"])
    assert one.startswith("2 shards (")
    assert one == shards_digest(("a.tar", "b.tar"))
    assert len({one, shards_digest(["b.tar", "a.tar"]), shards_digest(["a.tar", "c.tar"])}) == 3


def test_what_is_not_a_readable_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for name in ("folder", "folder/"):
        with pytest.raises(ValueError, match=r"/folder/? is a folder: name its shards, as in '.*/folder/\*\.tar'"):
            check_shards("--laion_shards", f"{tmp_path}/{name}")
    with pytest.raises(ValueError, match="--laion_shards: unbalanced braces"):
        check_shards("--laion_shards", f"{tmp_path}/{{0..1.tar")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_forbidden_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.tar").touch(mode=0o000)
    with pytest.raises(ValueError, match="not readable"):
        check_shards("--laion_shards", f"{tmp_path}/a.tar")
