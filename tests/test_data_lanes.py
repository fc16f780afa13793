"""Lanes: which sample comes when, and what happens where data is broken."""

from __future__ import annotations

import gzip
import http.server
import json
import shutil
import tarfile
import threading
from collections import Counter
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from open_flamingo.train.data import tars
from open_flamingo.train.data.lanes import (
    Counts,
    Lane,
    Randomness,
    RawSample,
    ShardOrder,
    read_shard,
    shuffle,
    uniform,
)
from open_flamingo.train.data.samples import DataError, Drop, Sample, SampleError
from tests.data_tools import loader, rows
from tests.shards import big_picture, picture, write_laion, write_mmc4, write_tar


@pytest.fixture(autouse=True)
def _no_wait_between_tries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tars, "RETRY_DELAYS", (0.0,))


URLS = tuple(f"{i}.tar" for i in range(7))


def test_one_pass_reads_every_shard_once() -> None:
    """Also with more lanes than shards, and fewer; a pass ends in the middle of a round of the lanes."""
    for lanes in (3, 7, 16):
        order = ShardOrder(URLS, lanes, seed=1, kind="laion")
        read = [order.url(i % lanes, i // lanes) for i in range(7 * 12)]
        passes = [read[start : start + 7] for start in range(0, len(read), 7)]
        assert all(sorted(one) == sorted(URLS) for one in passes)
        assert len({tuple(one) for one in passes}) > 6, "each pass has its own order"


def test_the_order_is_fixed_for_good() -> None:
    """A change of these numbers breaks the resuming of every run that is under way."""
    order = ShardOrder(URLS, 4, seed=42, kind="laion")
    assert "".join(order.url(i % 4, i // 4)[0] for i in range(14)) == "32546105012364"
    drawn = ShardOrder(URLS, 4, seed=42, kind="laion", resampled=True)
    assert "".join(drawn.url(0, k)[0] for k in range(10)) == "5051206111"
    randomness = Randomness((42, "mmc4", 3, 1, 5))
    assert round(randomness.coin(), 6) == 0.022025
    assert [randomness.flip(i) for i in range(8)] == [True] * 4 + [False] * 4
    shuffled = shuffle([{"__key__": str(i)} for i in range(10)], 4, (42, "laion", 0, 0))
    assert "".join(sample["__key__"] for sample in shuffled) == "3216745809"


def test_datasets_seeds_lanes_and_samples_have_their_own_randomness() -> None:
    keys = [
        (seed, kind, lane, k, n) for seed in (1, 2) for kind in "ab" for lane in (0, 1) for k in (0, 1) for n in (0, 1)
    ]
    assert len({uniform(*key) for key in keys}) == len(keys)
    order = [[ShardOrder(URLS, 1, 1, kind).url(0, k) for k in range(7)] for kind in ("laion", "mmc4")]
    assert order[0] != order[1]
    values = [uniform("spread", i) for i in range(4000)]
    assert abs(np.mean(values) - 0.5) < 0.03
    assert 0 <= min(values) < 0.01
    assert 0.99 < max(values) < 1


def test_resampling_draws_each_lane_on_its_own() -> None:
    order = ShardOrder(URLS, 4, seed=1, kind="laion", resampled=True)
    lanes = [[order.url(lane, k) for k in range(300)] for lane in range(4)]
    assert len({tuple(lane) for lane in lanes}) == 4
    drawn = Counter(url for lane in lanes for url in lane)
    assert set(drawn) == set(URLS)
    assert max(drawn.values()) < 2 * min(drawn.values())


def numbers(count: int) -> list[RawSample]:
    return [{"__key__": str(i), "__url__": "a.tar"} for i in range(count)]


def test_the_buffer_keeps_every_sample_once_and_mixes() -> None:
    for size in (1, 5, 100):
        out = [int(sample["__key__"]) for sample in shuffle(numbers(40), size, ("key",))]
        assert sorted(out) == list(range(40))
        assert (out == list(range(40))) == (size == 1)
        assert all(number < place + size for place, number in enumerate(out)), "nothing from beyond the buffer"


def test_what_goes_wrong_comes_after_the_samples_before_it() -> None:
    def broken() -> Iterator[RawSample]:
        yield from numbers(10)
        raise SampleError("damaged_shard", "a.tar")

    shuffled = shuffle(broken(), 4, ("key",))
    out = [sample["__key__"] for sample in islice(shuffled, 10)]
    assert len(set(out)) == 10
    with pytest.raises(SampleError):
        next(shuffled)


# ------------------------------------------------------------------------------------------------------------------ shards


def keys_and_errors(url: str) -> tuple[list[str], list[str]]:
    keys, errors, counts = [], [], Counts()
    try:
        for sample in read_shard(url, counts):
            keys.append(sample["__key__"])
    except SampleError as error:
        errors.append(error.reason)
    return keys, errors + list(counts.errors)


def test_shards_of_every_sort(tmp_path: Path) -> None:
    write_laion(tmp_path, shards=1, samples=4)
    path = tmp_path / "laion-000000.tar"
    whole = [f"0000{i:05d}" for i in range(4)]
    assert keys_and_errors(str(path)) == (whole, [])
    assert keys_and_errors(f"file:{path}") == (whole, [])
    assert keys_and_errors(f"pipe:cat {path}") == (whole, [])
    (tmp_path / "zipped.tar.gz").write_bytes(gzip.compress(path.read_bytes()))
    assert keys_and_errors(str(tmp_path / "zipped.tar.gz")) == (whole, [])


@pytest.mark.fault(
    "Data",
    "A shard cut off anywhere",
    "the samples before, then `damaged_shard`; also where only the mark of the end is missing",
    "survives with warnings",
)
def test_damaged_shards_are_errors_after_what_can_be_read(tmp_path: Path) -> None:
    write_laion(tmp_path, shards=1, samples=4)
    whole = (tmp_path / "laion-000000.tar").read_bytes()
    whole_keys = [f"0000{i:05d}" for i in range(4)]
    with tarfile.open(tmp_path / "laion-000000.tar") as tar:
        header = tar.getmembers()[4].offset  # of the third sample's jpg
    damaged = {
        "cut in a file": whole[: header + 700],
        "cut in a header": whole[: header + 100],
        "garbage for a header": whole[:header] + b"garbage!" * 300,
        "cut gzip": gzip.compress(whole)[:3000],
    }
    for name, data in damaged.items():
        path = tmp_path / "damaged.tar"
        path.write_bytes(data)
        keys, errors = keys_and_errors(str(path))
        # The last sample before the damage may be incomplete; it is left out, unless another one has begun.
        expected = {"cut in a file": 2, "cut in a header": 1, "garbage for a header": 1, "cut gzip": 1}[name]
        assert keys == whole_keys[:expected], name
        assert errors == ["damaged_shard"], name


def test_a_failing_command_is_an_error_even_after_a_whole_tar(tmp_path: Path) -> None:
    write_laion(tmp_path, shards=1, samples=4)
    path = tmp_path / "laion-000000.tar"
    assert keys_and_errors("pipe:false") == ([], ["unreadable_shard"])
    assert keys_and_errors("pipe:no-such-command-here 2>/dev/null") == ([], ["unreadable_shard"])
    keys, errors = keys_and_errors(f"pipe:cat {path}; exit 3")
    assert len(keys) == 4, "all that it wrote is used, however soon it ended"
    assert errors == ["damaged_shard"]
    assert keys_and_errors(str(tmp_path / "missing.tar")) == ([], ["unreadable_shard"])


def test_a_shard_can_be_left_in_the_middle(tmp_path: Path) -> None:
    write_laion(tmp_path, shards=1, samples=40)
    stream = read_shard(f"pipe:cat {tmp_path}/laion-000000.tar", Counts())
    assert next(stream)["__key__"] == "000000000"
    stream.close()  # type: ignore[attr-defined]


def test_odd_members(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    files = [("__info__.json", b"{}"), ("no_suffix", b""), ("d/a.TXT", b"1"), ("d/a.txt", b"2"), ("d/a.b.jpg", b"3")]
    write_tar(path, [*files, ("d/b.txt", b"4")])
    counts = Counts()
    samples = list(read_shard(str(path), counts))
    assert [(sample["__key__"], sample["txt"]) for sample in samples] == [("d/a", b"1"), ("d/b", b"4")]
    assert samples[0]["b.jpg"] == b"3"
    assert counts.errors == {"duplicate_member": 1}


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


@pytest.mark.skipif(shutil.which("curl") is None, reason="webdataset reads http through curl")
def test_shards_over_http(tmp_path: Path) -> None:
    write_laion(tmp_path, shards=1, samples=4)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(tmp_path))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}"
        assert len(keys_and_errors(f"{address}/laion-000000.tar")[0]) == 4
        assert keys_and_errors(f"{address}/missing.tar") == ([], ["unreadable_shard"])
        server.shutdown()


# ------------------------------------------------------------------------------------------------------------------- lanes


def accept(raw: RawSample, randomness: Randomness, counts: Counts) -> Sample:
    return Sample([], [], f"{raw['__url__']}#{raw['__key__']}")


def refuse(raw: RawSample, randomness: Randomness, counts: Counts) -> Sample:
    raise Drop("refused")


def fail(raw: RawSample, randomness: Randomness, counts: Counts) -> Sample:
    raise SampleError("broken", "it is broken")


def fail_odd(raw: RawSample, randomness: Randomness, counts: Counts) -> Sample:
    if int(raw["__key__"]) % 2:
        raise SampleError("broken", "it is broken")
    return accept(raw, randomness, counts)


def lane_of(urls: list[str], prepare: object, cursor: tuple[int, int] = (0, 0)) -> tuple[Lane, Counts]:
    counts = Counts()
    return Lane(0, ShardOrder(tuple(urls), 1, 0, "laion"), prepare, 4, cursor, counts), counts  # type: ignore[arg-type]


def test_a_cursor_is_the_whole_state(tmp_path: Path) -> None:
    write_laion(tmp_path, shards=3, samples=6)
    urls = [str(path) for path in sorted(tmp_path.iterdir())]
    lane, _ = lane_of(urls, fail_odd)
    passed = [(next(lane).key, lane.cursor) for _ in range(25)]
    for done in (1, 3, 8, 9, 10):
        again, _ = lane_of(urls, fail_odd, passed[done - 1][1])
        assert [(next(again).key, again.cursor) for _ in range(10)] == passed[done : done + 10]


def test_skipping_prepares_nothing(tmp_path: Path) -> None:
    write_laion(tmp_path, shards=1, samples=10)
    prepared = []

    def note(raw: RawSample, randomness: Randomness, counts: Counts) -> Sample:
        prepared.append(randomness.key)
        return accept(raw, randomness, counts)

    lane, _ = lane_of([str(tmp_path / "laion-000000.tar")], note, (5, 7))
    next(lane)
    assert [key[-2:] for key in prepared] == [(5, 7)]


def test_a_hundred_failures_in_a_row_stop_the_run(tmp_path: Path) -> None:
    write_laion(tmp_path, shards=2, samples=60)
    urls = [str(path) for path in sorted(tmp_path.iterdir())]
    lane, counts = lane_of(urls, fail)
    with pytest.raises(
        DataError, match=r"100 laion samples in a row failed; the last is .*laion-00000.\.tar#.*it is broken"
    ):
        next(lane)
    assert counts.errors == {"broken": 100}
    lane, counts = lane_of(urls, fail_odd)
    assert len(list(islice(lane, 300))) == 300, "failures that are not in a row never stop it"


@pytest.mark.fault("Every shard missing, or without a sample")
def test_a_pass_that_yields_nothing_stops_the_run(tmp_path: Path) -> None:
    write_laion(tmp_path, shards=3, samples=2)
    urls = [str(path) for path in sorted(tmp_path.iterdir())]
    lane, counts = lane_of(urls, refuse)
    with pytest.raises(DataError, match=r"^3 of the 3 laion shards.* yielded no sample.*laion-00000.\.tar.*'refused'"):
        next(lane)
    assert counts.dropped["refused"] >= 6

    def accept_last(raw: RawSample, randomness: Randomness, counts: Counts) -> Sample:
        if not raw["__url__"].endswith("2.tar"):
            raise Drop("refused")
        return accept(raw, randomness, counts)

    lane, _ = lane_of(urls, accept_last)
    assert len(list(islice(lane, 100))) == 100, "one good shard is enough, whenever it comes"


def test_a_hundred_shards_that_yield_nothing_stop_the_run_before_a_pass_of_thousands(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [("a.txt", b"")])
    for number in range(1, 150):
        (tmp_path / f"{number}.tar").hardlink_to(tmp_path / "0.tar")
    lane, counts = lane_of([str(path) for path in tmp_path.iterdir()], refuse)
    with pytest.raises(DataError, match=r"^100 of the 150 laion shards, one after another, yielded no sample"):
        next(lane)
    assert counts.dropped == {"refused": 100}


JPEG = picture(np.random.default_rng(0), "red")
WRONG_TARS = {
    "images first": (
        [f"{i}.{suffix}" for suffix in ("jpg", "txt") for i in range(5)],
        r"0\.txt is apart from 0\.jpg.*--sort=name",
    ),
    "in no order": (
        ["2.txt", "0.jpg", "1.jpg", "0.txt", "2.jpg", "1.txt"],
        r"0\.txt is apart from 0\.jpg.*--sort=name",
    ),
    "dots": (
        [f"{i}.input.{suffix}" for i in range(5) for suffix in ("jpg", "txt")],
        r"\d\.input\.jpg has .* 'input\.jpg'.*for are jpg",
    ),
    "dots in one": (
        [f"{i}.{suffix}" for i in range(5) for suffix in ("jpg", "v2.TXT")],
        r"\d\.v2\.txt has .* 'v2\.txt'.*for are jpg",
    ),
}


@pytest.mark.fault(
    "Data",
    "Files of a sample apart from each other in the tar; names with two dots",
    "`not_adjacent`, `unknown_suffix`, with an example and how to make the tar",
    "dropped",
)
@pytest.mark.parametrize("name", WRONG_TARS)
def test_tars_that_were_made_wrong_are_told_how_to_be_made(name: str, tmp_path: Path) -> None:
    files, message = WRONG_TARS[name]
    write_tar(tmp_path / "a.tar", [(file, JPEG if file.endswith("jpg") else b"a caption") for file in files])
    reason = "not_adjacent" if "apart" in message else "unknown_suffix"
    with loader("laion", str(tmp_path / "a.tar"), lanes=1) as batches:
        with pytest.raises(DataError, match=f"'{reason}': .*for example .*{message}"):
            next(batches)


def test_a_document_with_two_dots_in_its_name_is_told_of(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("a.v2.json", b"{}")])
    with loader("mmc4", str(tmp_path / "a.tar"), lanes=1) as batches:
        with pytest.raises(DataError, match=r"'unknown_suffix': 1.*a\.v2\.json .*for are json"):
            next(batches)


def test_files_that_are_apart_leave_the_samples_around_them_alone(tmp_path: Path) -> None:
    names = ["a.jpg", "b.jpg", "b.txt", "a.txt", "b.jpg", "b.txt", "c.json", "c.jpg", "c.txt"]
    write_tar(tmp_path / "a.tar", [(name, b"") for name in names])
    counts = Counts()
    found = [(raw["__key__"], *list(raw)[2:]) for raw in read_shard(str(tmp_path / "a.tar"), counts)]
    assert found == [("a", "jpg"), ("b", "jpg", "txt"), ("b", "jpg", "txt"), ("c", "json", "jpg", "txt")]
    assert counts.errors == {"not_adjacent": 1}


@pytest.mark.fault(
    "Data",
    "Every shard missing, or without a sample",
    "`DataError` that names a shard, after one pass or 100 shards",
    "zero steps, a checkpoint, exit 0; with resampling: spins forever",
)
def test_unreadable_shards_alone_stop_the_run(tmp_path: Path) -> None:
    lane, counts = lane_of(["pipe:false", "pipe:exit 2"], accept)
    with pytest.raises(DataError, match="pipe:"):
        next(lane)
    assert set(counts.errors) == {"unreadable_shard"}


# ------------------------------------------------------------------------------------------- broken data, seen from outside


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_samples_and_shards_among_good_ones_are_counted_apart(tmp_path: Path, workers: int) -> None:
    write_laion(tmp_path, shards=2, samples=6)
    rng = np.random.default_rng(0)
    good = picture(rng, "red")
    write_tar(
        tmp_path / "mixed.tar",
        [
            *[("a.jpg", good), ("a.txt", b"fine")],
            *[("b.jpg", good)],
            *[("c.txt", b"no picture")],
            *[("d.jpg", good[:-300]), ("d.txt", b"cut")],
            *[("e.jpg", good), ("e.txt", b"\xff\xfe")],
            *[("f.jpg", picture(rng, "blue", (400, 400))), ("f.txt", b"large")],
        ],
    )
    (tmp_path / "cut.tar").write_bytes((tmp_path / "laion-000000.tar").read_bytes()[:9000])
    (tmp_path / "garbage.tar").write_bytes(b"garbage" * 1000)
    (tmp_path / "empty.tar").touch()
    urls = [str(path) for path in sorted(tmp_path.iterdir())] + ["pipe:false"]
    dropped: Counter[str] = Counter()
    errors: Counter[str] = Counter()
    options = {"lanes": 2, "max_image_pixels": 100_000, "workers": workers, "shuffle_buffer": 3}
    with loader("laion", tuple(urls), **options) as batches:
        for batch in islice(batches, 24):
            dropped += batch.dropped
            errors += batch.errors
    assert set(dropped) == {"no_caption", "no_image", "image_too_large"}
    assert set(errors) == {"corrupt_image", "bad_caption", "damaged_shard", "unreadable_shard"}
    assert errors["unreadable_shard"] > 2 * errors["bad_caption"], "three shards of this sort, and one such caption"


def test_broken_documents_are_counted(tmp_path: Path) -> None:
    write_mmc4(tmp_path, shards=1, documents=6)
    icon = {"image_base64": "AAAA"}
    documents = {
        "a": b"{",
        "b": json.dumps({"text_list": ["x"], "similarity_matrix": [[1]], "image_info": [icon]}).encode(),
        "c": json.dumps({"image_info": []}).encode(),
    }
    write_tar(tmp_path / "broken.tar", [*[(f"{key}.json", data) for key, data in documents.items()], ("d.txt", b"")])
    assert len(big_picture(np.random.default_rng(0), "red")) >= 11_000
    dropped: Counter[str] = Counter()
    errors: Counter[str] = Counter()
    with loader("mmc4", tuple(str(path) for path in sorted(tmp_path.iterdir())), lanes=1) as batches:
        for batch in islice(batches, 6):
            dropped += batch.dropped
            errors += batch.errors
    assert dropped["no_image"] == errors["bad_json"] == errors["bad_document"] == errors["no_json"] > 0
    assert dropped["single_image"] > 0


@pytest.mark.parametrize("workers", [0, 2])
def test_hopeless_data_stops_the_training_process_with_a_clean_message(tmp_path: Path, workers: int) -> None:
    write_tar(tmp_path / "a.tar", [(f"{i}.txt", b"no picture") for i in range(5)])
    with loader("laion", str(tmp_path / "a.tar"), lanes=2, workers=workers) as batches:
        with pytest.raises(DataError, match=r"^1 of the 1 laion shards.*a\.tar.*'no_image'") as caught:
            next(batches)
        assert "Traceback" not in str(caught.value)
        with pytest.raises(StopIteration):
            next(batches)


def test_two_documents_of_one_image_get_their_own_coin(tmp_path: Path) -> None:
    """And another one in the next pass."""
    write_mmc4(tmp_path, shards=1, documents=16)
    with loader("mmc4", str(tmp_path / "mmc4-000000.tar"), lanes=1, batch_size=2) as batches:
        seen = Counter(row[0].split("#")[1] for batch in islice(batches, 80) for row in rows(batch))
    singles = [seen[f"0000{number:05d}"] for number in range(0, 16, 3)]
    assert min(seen[f"0000{number:05d}"] for number in (1, 2, 4, 5)) > max(singles)
    assert len(set(singles)) > 1
    assert sum(singles) > 0
