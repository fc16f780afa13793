"""Faults of the data and of those who bring it: each is a sample, or a counted reason, or one error that names the culprit."""

from __future__ import annotations

import base64
import bz2
import gzip
import http.server
import io
import json
import logging
import lzma
import os
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import threading
import time
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from open_flamingo.train.data import streams, tars
from open_flamingo.train.data.images import ImagePreparer
from open_flamingo.train.data.laion import LaionPreparer
from open_flamingo.train.data.lanes import BUFFER_BYTES, Lane, ShardOrder, shuffle
from open_flamingo.train.data.loader import Loader
from open_flamingo.train.data.mmc4 import Mmc4Preparer
from open_flamingo.train.data.samples import Counts, DataError, SampleError
from open_flamingo.train.data.tars import MAX_SAMPLE, read_shard
from open_flamingo.train.data.workers import LoaderState
from tests.conftest import AT_LENGTH
from tests.data_tools import image_processor, loader, rows, same, tokenizer
from tests.shards import document, picture, write_laion, write_mmc4, write_tar

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")
RNG = np.random.default_rng(0)
JPEG = picture(RNG, "red")
MIB = 1 << 20


# --------------------------------------------------------------------------------------------------- bad input, by name


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def png_bomb() -> bytes:
    """A header that promises 50,000 × 50,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    start = chunk(b"IHDR", struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + start + chunk(b"IDAT", zlib.compress(bytes(10**6))) + chunk(b"IEND", b"")


def jpeg_bomb() -> bytes:
    """A picture whose header was changed to 65,500 × 65,500 pixels: 13 GB, were it decoded."""
    at = JPEG.index(b"\xff\xc0") + 5
    return JPEG[:at] + struct.pack(">HH", 65_500, 65_500) + JPEG[at + 4 :]


def rgb() -> Image.Image:
    return Image.open(io.BytesIO(JPEG)).convert("RGB")


def animated(kind: str) -> bytes:
    frames = [rgb().rotate(angle).quantize(16) for angle in (0, 90, 180)]
    return encoded(frames[0], kind, save_all=True, append_images=frames[1:])


def deep() -> bytes:
    return encoded(Image.fromarray((np.asarray(rgb())[:, :, 0].astype(np.uint16) << 8) + 7))


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(rgb(), "JPEG", exif=exif)


def see_through() -> bytes:
    palette = rgb().quantize(16)
    palette.info["transparency"] = bytes(range(16))
    return encoded(palette)


Cases = dict[str, tuple[Callable[[], bytes], str]]  # what makes the bytes, and what becomes of them

PICTURES: Cases = {
    "decompression bomb, png": (png_bomb, "image_too_large"),
    "decompression bomb, jpeg": (jpeg_bomb, "image_too_large"),
    "1x1": (lambda: encoded(Image.new("RGB", (1, 1))), "sample"),
    "100,000x1": (lambda: encoded(Image.new("RGB", (100_000, 1))), "sample"),
    "1x100,000": (lambda: encoded(Image.new("RGB", (1, 100_000))), "sample"),
    "cmyk": (lambda: encoded(rgb().convert("CMYK"), "JPEG"), "sample"),
    "16 bit": (deep, "sample"),
    "animated gif": (lambda: animated("GIF"), "sample"),
    "animated webp": (lambda: animated("WEBP"), "sample"),
    "exif-rotated": (rotated, "sample"),
    "palette with transparency": (see_through, "sample"),
    "eps, which Pillow would run as a program": (lambda: encoded(rgb(), "EPS"), "corrupt_image"),
    "an html page": (lambda: b"<!DOCTYPE html><html>403</html>", "corrupt_image"),
    "no byte": (lambda: b"", "corrupt_image"),
}
CAPTIONS: Cases = {
    "empty caption": (lambda: b"", "sample"),
    "caption of a megabyte": (lambda: b"a very long story " * 60_000, "sample"),
    "caption of a megabyte without a space": (lambda: b"a" * MIB, "sample"),
    "caption of spaces": (lambda: b" " * MIB, "sample"),
    "caption larger than a sample may be": (lambda: b" " * (MAX_SAMPLE + 1), "sample_too_large"),
    "invalid utf-8": (lambda: b"caf\xe9", "bad_caption"),
    "special tokens": (lambda: b"<image><|endofchunk|><image>", "sample"),
}
GOOD = document(np.random.default_rng(1), images=2, number=0)
WIDE = len(GOOD["text_list"])


def changed(**fields: Any) -> bytes:
    return json.dumps({**GOOD, **fields}).encode()


def with_more(field: str) -> bytes:
    return (json.dumps(GOOD)[:-1] + f", {field}}}").encode()


def with_scores(scores: Any) -> Callable[[], bytes]:
    return lambda: changed(similarity_matrix=scores)


def with_base64(change: Callable[[str], str]) -> bytes:
    return changed(image_info=[{"image_base64": change(info["image_base64"])} for info in GOOD["image_info"]])


def in_lines(text: str) -> str:
    return base64.encodebytes(base64.b64decode(text)).decode().replace("\n", "\r\n")


DOCUMENTS: Cases = {
    "json of 200 MB": (lambda: b'{"text_list": [' + b" " * 200_000_000 + b"]}", "sample_too_large"),
    "deep json": (lambda: b"[" * 1_000_000, "bad_json"),
    "deep json in a field": (lambda: with_more('"n": ' + "[" * 100_000 + "]" * 100_000), "bad_json"),
    "a number of a million digits": (lambda: with_more('"n": ' + "9" * MIB), "sample"),
    "nan similarities": (with_scores([[float("nan")] * WIDE] * 2), "bad_similarity"),
    "infinite similarities": (with_scores([[float("inf")] * WIDE] * 2), "bad_similarity"),
    "similarities of one row": (with_scores([[1.0] * WIDE]), "bad_similarity"),
    "similarities in one dimension": (with_scores([1.0] * WIDE), "bad_similarity"),
    "similarities in three dimensions": (with_scores([[[50.0]] * WIDE] * 2), "bad_similarity"),
    "ragged similarities": (with_scores([[1.0], [1.0, 2.0]]), "bad_similarity"),
    "similarities of words": (with_scores([["high"] * WIDE] * 2), "bad_similarity"),
    "no similarities": (with_scores([]), "bad_similarity"),
    "more similarities than sentences": (
        with_scores([[0.0] * WIDE + [90.0, 0.0], [0.0] * WIDE + [0.0, 90.0]]),
        "bad_document",
    ),
    "sentences that are numbers": (lambda: changed(text_list=[1] * WIDE), "bad_document"),
    "sentences in one string": (lambda: changed(text_list="a" * WIDE), "bad_document"),
    "half a surrogate pair": (lambda: changed(text_list=["\ud800"] * WIDE), "bad_document"),
    "base64 with line breaks": (lambda: with_base64(in_lines), "sample"),
    "base64 that is none": (lambda: with_base64(lambda text: text[:-3] + "é"), "bad_base64"),
    "invalid utf-8 in json": (lambda: with_more('"n": "n"').replace(b'"n"}', b'"\xff"}'), "bad_json"),
    "duplicate keys in json": (lambda: with_more('"text_list": ' + json.dumps(GOOD["text_list"])), "sample"),
    "json that is a list": (lambda: b"[1]", "bad_document"),
    "no byte of json": (lambda: b"", "bad_json"),
}


def one_pass(kind: str, urls: list[str], samples: int) -> tuple[set[str], set[str]]:
    """The keys of `samples` samples, and all reasons for which others were left out before the next one."""
    prepare_image = ImagePreparer(image_processor(32), max_pixels=None)
    prepare: Any = (LaionPreparer if kind == "laion" else Mmc4Preparer)(tokenizer(), prepare_image)
    counts = Counts()
    lane = Lane(0, ShardOrder(tuple(urls), 1, 0, kind), prepare, 2, (0, 0), counts)
    keys = {sample.key.split("#")[1] for sample in islice(lane, samples)}
    next(lane)
    return keys, set(counts.errors) | set(counts.dropped)


def check(kind: str, tmp_path: Path, files: list[tuple[str, bytes]], outcome: str) -> None:
    """The good samples in the same shard and in the next one come, whatever `files` are."""
    good: dict[str, bytes] = {"jpg": JPEG, "txt": b"fine"}
    if kind == "mmc4":
        good = {"json": json.dumps(document(np.random.default_rng(2), images=2, number=1)).encode()}
    write_tar(tmp_path / "0.tar", [*files, *[(f"good-0.{suffix}", data) for suffix, data in good.items()]])
    write_tar(tmp_path / "1.tar", [(f"good-1.{suffix}", data) for suffix, data in good.items()])
    expected = {"good-0", "good-1"} | ({"bad"} if outcome == "sample" else set())
    keys, reasons = one_pass(kind, [str(tmp_path / f"{i}.tar") for i in range(2)], len(expected))
    assert keys == expected
    assert reasons == (set() if outcome == "sample" else {outcome})


@pytest.mark.fault(
    "Data",
    "Decompression bomb: a PNG or JPEG header of gigapixels",
    "dropped and counted, `image_too_large`; nothing is decoded, whatever `--max_image_pixels` is",
)
@pytest.mark.fault(
    "Data",
    "1×1, 100,000×1, CMYK, 16 bit, animated, palette with transparency",
    'a sample, with the pixels of Pillow\'s `convert("RGB")`; of an animation the first frame',
    "the same",
)
@pytest.mark.fault(
    "Data",
    "An image that is EPS (Pillow runs Ghostscript on it), html, or empty",
    "`corrupt_image`; only the web's formats are opened",
)
@pytest.mark.parametrize("name", PICTURES)
def test_pictures(name: str, tmp_path: Path) -> None:
    make, outcome = PICTURES[name]
    check("laion", tmp_path, [("bad.jpg", make()), ("bad.txt", b"a caption")], outcome)


@pytest.mark.fault(
    "Data", "Empty caption; caption of a megabyte", "a sample; of a text the first 131,072 characters are looked at"
)
@pytest.mark.fault("Data", "Caption that is not UTF-8", "`bad_caption`")
@pytest.mark.fault("A sample of more than 64 MiB (json of 200 MB, caption of 64 MB, 100 files of one key)")
@pytest.mark.parametrize("name", CAPTIONS)
def test_captions(name: str, tmp_path: Path) -> None:
    make, outcome = CAPTIONS[name]
    check("laion", tmp_path, [("bad.jpg", JPEG), ("bad.txt", make())], outcome)


@pytest.mark.fault(
    "Data",
    "A sample of more than 64 MiB (json of 200 MB, caption of 64 MB, 100 files of one key)",
    "left out unread, `sample_too_large`",
)
@pytest.mark.fault(
    "Data", "Deep json, json that is not json, a number of a million digits", "`bad_json`; the number is harmless"
)
@pytest.mark.fault(
    "Data",
    "Similarities that are NaN, infinite, ragged, words, of another shape",
    "`bad_similarity`; more columns than sentences: `bad_document`",
)
@pytest.mark.fault("Data", "base64 with line breaks; base64 that is not base64", "a sample; `bad_base64`")
@pytest.mark.fault("Data", "Sentences that are not strings, half a surrogate pair", "`bad_document`")
@pytest.mark.parametrize("name", DOCUMENTS)
def test_documents(name: str, tmp_path: Path) -> None:
    make, outcome = DOCUMENTS[name]
    check("mmc4", tmp_path, [("bad.json", make())], outcome)


@pytest.mark.fault("Data", "EXIF-rotated image", "a sample, not turned", "the same")
def test_a_rotated_picture_is_not_turned() -> None:
    """As in the reference, whose Pillow does not look at EXIF."""
    prepare = ImagePreparer(image_processor(32))
    assert np.array_equal(prepare(rotated()), prepare(encoded(rgb(), "JPEG")))


def odd(name: str, kind: bytes, **fields: Any) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type = kind
    for field, value in fields.items():
        setattr(info, field, value)
    return info, b""


def plain(name: str, data: bytes) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    return info, data


def tar_of(*members: tuple[tarfile.TarInfo, bytes], end: bool = True) -> bytes:
    parts = [info.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % 512) for info, data in members]
    return b"".join(parts) + bytes(10240 if end else 0)


def pair(key: str) -> list[tuple[tarfile.TarInfo, bytes]]:
    return [plain(f"{key}.jpg", JPEG), plain(f"{key}.txt", b"fine")]


HTML = b"<!DOCTYPE html><html><body>503 Slow Down</body></html>\n" * 20
LINKS = [
    odd("link.jpg", tarfile.SYMTYPE, linkname="/etc/passwd"),
    odd("hard.jpg", tarfile.LNKTYPE, linkname="a.jpg"),
    odd("device.jpg", tarfile.CHRTYPE, devmajor=1, devminor=5),
    odd("disk.jpg", tarfile.BLKTYPE),
    odd("pipe.jpg", tarfile.FIFOTYPE),
    odd("folder.jpg", tarfile.DIRTYPE),
]
# Bytes of a shard; the keys that are read; the reasons that are counted.
SHARDS: dict[str, Callable[[], tuple[bytes, list[str], list[str]]]] = {
    "duplicate keys": lambda: (
        tar_of(*pair("a"), plain("a.jpg", b"other"), *pair("b")),
        ["a", "b"],
        ["duplicate_member"],
    ),
    "members named ../x": lambda: (tar_of(*pair("../x"), *pair("/etc/y")), ["../x", "/etc/y"], []),
    "links and devices": lambda: (tar_of(*pair("a"), *LINKS, *pair("b")), ["a", "b"], []),
    "a Mac's tar": lambda: (
        tar_of(
            *[
                plain(f"d/{name}", b"Mac OS X")
                for name in (".DS_Store", "._a.jpg", "PaxHeaders.7/a.jpg", "__MACOSX/a.jpg")
            ],
            pair("d/a")[0],
            *[plain(name, b"Mac OS X") for name in ("d/._a.txt", "__MACOSX/d/._a.txt", "PaxHeader/a.txt")],
            pair("d/a")[1],
            plain("d/._b.jpg", b"Mac OS X"),
        ),
        ["d/a"],
        [],
    ),
    "names for a terminal": lambda: (tar_of(*pair("\x1b[2Ja\n")), ["\\x1b[2Ja\\n"], []),
    "a long name": lambda: (tar_of(*pair("d/" * 1000 + "a")), ["d/" * 1000 + "a"], []),
    "a name of 60,000 slashes": lambda: (tar_of(plain("/" * 60_000, b""), *pair("a")), ["a"], []),
    "an html error page": lambda: (HTML, [], ["unreadable_shard"]),
    "a gzip'd html error page": lambda: (gzip.compress(HTML), [], ["unreadable_shard"]),
    "gzip'd": lambda: (gzip.compress(tar_of(*pair("a"))), ["a"], []),
    "gzip'd in pieces": lambda: (
        b"".join(map(gzip.compress, (tar_of(*pair("a"), end=False), tar_of(*pair("b"))))),
        ["a", "b"],
        [],
    ),
    "bzip2'd": lambda: (bz2.compress(tar_of(*pair("a"))), ["a"], []),
    "xz'd": lambda: (lzma.compress(tar_of(*pair("a"))), ["a"], []),
    "zero bytes": lambda: (b"", [], ["unreadable_shard"]),
    "no end": lambda: (tar_of(*pair("a"), end=False), ["a"], ["damaged_shard"]),
    "no sample": lambda: (tar_of(), [], []),
    "a size of 8 EiB": lambda: (
        tar_of(*pair("a"), *pair("b"), odd("c.jpg", b"0", size=1 << 63)),
        ["a"],
        ["damaged_shard"],
    ),
    "a size below zero": lambda: (
        tar_of(*pair("a"), *pair("b"), odd("c.jpg", b"0", size=-512)),
        ["a"],
        ["damaged_shard"],
    ),
    "a name of 1 GiB": lambda: (tar_of(*pair("a"), odd("b", b"L", size=1 << 30)), [], ["unreadable_shard"]),
    "a sparse file": lambda: (tar_of(*pair("a"), *pair("b"), odd("c.jpg", b"S", size=0)), ["a"], ["damaged_shard"]),
    "a gzip bomb": lambda: (
        gzip.compress(tar_of(plain("b.jpg", bytes(300 * MIB)), *pair("a")), 1),
        ["a"],
        ["sample_too_large"],
    ),
    "many files of one sample": lambda: (
        tar_of(*[plain(f"a.{i}", bytes(MIB)) for i in range(100)], *pair("b")),
        ["b"],
        ["sample_too_large"],
    ),
}


@pytest.mark.fault("A sample of more than 64 MiB (json of 200 MB, caption of 64 MB, 100 files of one key)")
@pytest.mark.fault(
    "Data",
    "A Mac's `._a.jpg`, `.DS_Store` and `__MACOSX/` in a tar",
    "passed over",
    "every file is its own sample: half are lost",
)
@pytest.mark.fault("Data", "Duplicate keys in a tar", "the first stays, `duplicate_member`")
@pytest.mark.fault(
    "Data",
    "Members named `../x` or `/etc/x`; links, devices, pipes, folders",
    "names are only keys, nothing is ever written; links and the like are passed over",
)
@pytest.mark.fault(
    "Data",
    "Tar headers that lie: sizes of 8 EiB or below zero, names of 1 GiB, sparse files",
    "`damaged_shard` after the samples before it, in time and memory in proportion to what is read",
)
@pytest.mark.fault(
    "Data",
    "A shard that is an html error page, or has zero bytes",
    "`unreadable_shard`, with the first bytes in the message",
    "corrupt, empty or garbage tar among good ones: survives with warnings",
)
@pytest.mark.fault("Data", "gzip'd, bzip2'd, xz'd shards, in pieces too", "read")
@pytest.mark.fault("Data", "A gzip bomb", "`sample_too_large`; under 160 MiB are held")
@pytest.mark.parametrize("name", SHARDS)
def test_shards(name: str, tmp_path: Path) -> None:
    data, keys, reasons = SHARDS[name]()
    folder = tmp_path / "shards"
    folder.mkdir()
    (folder / "bad.tar").write_bytes(data)
    (folder / "good.tar").write_bytes(tar_of(*pair("good")))
    del data
    before = sorted(os.listdir(tmp_path)), sorted(os.listdir(folder))
    found, errors, peak = read_all(str(folder / "bad.tar"))
    assert [sample["__key__"] for sample in found] == keys
    assert all(sample["jpg"] == JPEG and sample["txt"] == b"fine" for sample in found)
    assert errors == reasons
    assert peak < 2.5 * MAX_SAMPLE
    assert (sorted(os.listdir(tmp_path)), sorted(os.listdir(folder))) == before, "nothing is ever written"
    passed, counted = one_pass("laion", [str(folder / "bad.tar"), str(folder / "good.tar")], len(keys) + 1)
    assert passed == {"good", *keys}
    assert counted == set(reasons)


def read_all(url: str) -> tuple[list[dict[str, Any]], list[str], int]:
    """Samples, reasons of errors, and the most bytes that Python held meanwhile."""
    found, counts = [], Counts()
    tracemalloc.start()
    try:
        for sample in read_shard(url, counts):
            found.append(sample)
        failed = []
    except SampleError as error:
        failed = [error.reason]
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return found, [*counts.errors, *failed], peak


@pytest.mark.fault("Thousands of samples, hundreds of passes")
def test_the_shuffle_buffer_is_bounded_in_bytes_too() -> None:
    """And in an order that is still a function of the data and the key."""
    given = 0

    def large() -> Iterator[dict[str, Any]]:
        nonlocal given
        data = bytes(BUFFER_BYTES // 4)
        for i in range(12):
            given += 1
            yield {"__key__": str(i), "jpg": data}

    shuffled = shuffle(large(), 500, ("key",))
    keys = [next(shuffled)["__key__"]]
    assert given == 4
    keys += [sample["__key__"] for sample in shuffled]
    assert sorted(map(int, keys)) == list(range(12))
    assert keys == [sample["__key__"] for sample in shuffle(large(), 500, ("key",))]


def test_a_compressed_pipe_may_begin_with_a_single_byte(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(gzip.compress(tar_of(*pair("a"))))
    command = f"head -c 1 {tmp_path}/a.tar; sleep 0.3; tail -c +2 {tmp_path}/a.tar"
    found, errors, _ = read_all(f"pipe:{command}")
    assert [sample["__key__"] for sample in found] == ["a"]
    assert errors == []


@pytest.mark.fault("Data", "A pipe that never ends", "left 64 MiB after the archive's end, `damaged_shard`")
def test_a_stream_that_never_ends_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "MAX_REST", MIB)
    monkeypatch.setattr(tars, "RETRY_DELAYS", ())
    (tmp_path / "a.tar").write_bytes(tar_of(*pair("a")))
    found, errors, _ = read_all(f"pipe:cat {tmp_path}/a.tar /dev/zero")
    assert [sample["__key__"] for sample in found] == ["a"]
    assert errors == ["damaged_shard"]


# ------------------------------------------------------------------------------------------- networks that fail half-way


@pytest.fixture
def no_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tars, "RETRY_DELAYS", (0.0, 0.0))


@dataclass
class Server:
    """Serves a shard over http, and breaks the connection after `breaks[i]` bytes of the i-th answer; stalls there if `stall`."""

    data: bytes
    breaks: list[int]
    stall: bool = False
    url: str = ""
    requests: int = 0


@contextmanager
def serving(server: Server) -> Iterator[str]:
    done = threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            number = server.requests
            server.requests += 1
            broken = number < len(server.breaks)
            self.send_response(200)
            self.send_header("Content-Length", str(len(server.data)))
            self.end_headers()
            self.wfile.write(server.data[: server.breaks[number]] if broken else server.data)
            if broken and server.stall:
                self.wfile.flush()
                done.wait()

        def log_message(self, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as real:
        thread = threading.Thread(target=real.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield f"http://127.0.0.1:{real.server_address[1]}/a.tar"
        finally:
            done.set()
            real.shutdown()
            thread.join()


def shard_bytes(tmp_path: Path, samples: int = 12) -> bytes:
    return Path(write_laion(tmp_path, shards=1, samples=samples)).read_bytes()


needs_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="webdataset reads http through curl")


@pytest.mark.fault(
    "Data",
    "http or a pipe (`s3://`) that fails half-way, at once, at its end, or is killed",
    "read again after 1 and 4 s, going on where it was: batches and cursors unchanged; then counted once",
)
@needs_curl
@pytest.mark.parametrize("seed", range(4))
def test_http_that_breaks_is_read_again_from_where_it_was(tmp_path: Path, seed: int, no_wait: None) -> None:
    data = shard_bytes(tmp_path)
    expected = list(read_shard(str(tmp_path / "laion-000000.tar"), Counts()))
    breaks = np.random.default_rng(seed).integers(0, len(data), 2).tolist()
    server = Server(data, breaks)
    with serving(server) as url:
        counts = Counts()
        result = list(read_shard(url, counts))
    assert [{**sample, "__url__": ""} for sample in result] == [{**sample, "__url__": ""} for sample in expected]
    assert server.requests == 3
    assert not counts.errors


@pytest.mark.fault("http or a pipe (`s3://`) that fails half-way, at once, at its end, or is killed")
@needs_curl
def test_http_that_always_breaks_is_counted_once(tmp_path: Path, no_wait: None) -> None:
    data = shard_bytes(tmp_path)
    server = Server(data, [len(data) // 3, len(data) // 2, len(data) // 4])
    with serving(server) as url:
        found, errors, _ = read_all(url)
    keys = [sample["__key__"] for sample in found]
    assert keys == [f"0000{i:05d}" for i in range(len(keys))], "the furthest that any try came, nothing twice"
    assert 4 <= len(keys) <= 6
    assert errors == ["damaged_shard"]
    assert server.requests == 3


@pytest.mark.fault("Data", "http or a pipe that stalls", "after 120 s killed, with all it started, and read again")
@needs_curl
def test_http_that_stalls_is_tried_again(tmp_path: Path, no_wait: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "STALL", 1.0)
    data = shard_bytes(tmp_path)
    with serving(Server(data, [len(data) // 2], stall=True)) as url:
        found, errors, _ = read_all(url)
    assert len(found) == 12
    assert errors == []


def flaky(tmp_path: Path, path: str, failures: int, fail: str) -> str:
    """A command that writes `path`, but `fail`s the first times; what it did so far stands in a file."""
    script = tmp_path / f"flaky-{len(list(tmp_path.glob('flaky-*')))}.sh"
    calls = shlex.quote(f"{script}.calls")
    script.write_text(
        f"echo $$ >> {calls}\nshard={shlex.quote(path)}\nif [ $(wc -l < {calls}) -le {failures} ]; then {fail}; fi\nexec cat $shard\n"
    )
    return f"pipe:sh {script}"


def calls(url: str) -> list[int]:
    return [int(pid) for pid in Path(f"{url.split()[-1]}.calls").read_text().split()]


FAILURES = {
    "at once": "exit 1",
    "half-way": "head -c 9000 $shard; exit 1",
    "half-way, and says it went well": "head -c 9000 $shard; exit 0",
    "at the very end": "cat $shard; exit 1",
    "killed": "head -c 9000 $shard; kill -9 $$",
}


@pytest.mark.fault("http or a pipe (`s3://`) that fails half-way, at once, at its end, or is killed")
@pytest.mark.parametrize("how", FAILURES)
def test_a_pipe_that_fails_is_read_again_from_where_it_was(how: str, tmp_path: Path, no_wait: None) -> None:
    shard_bytes(tmp_path)
    path = str(tmp_path / "laion-000000.tar")
    url = flaky(tmp_path, path, 2, FAILURES[how])
    counts = Counts()
    keys = [sample["__key__"] for sample in read_shard(url, counts)]
    assert keys == [f"0000{i:05d}" for i in range(12)]
    assert len(calls(url)) == 3
    assert not counts.errors


def test_tries_are_further_and_further_apart_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(tars, "time", SimpleNamespace(sleep=waits.append))
    found, errors, _ = read_all("pipe:false")
    assert (found, errors) == ([], ["unreadable_shard"])
    assert waits == [1.0, 4.0]
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2
    assert "pipe:false failed after 0 samples: the command ended with exit status 1 (empty file)" in caplog.text
    waits.clear()
    assert read_all(str(tmp_path / "missing.tar"))[1] == ["unreadable_shard"]
    assert waits == [], "a file on this machine does not come by waiting"


def test_what_is_counted_in_a_shard_is_counted_once_however_often_it_is_read(tmp_path: Path, no_wait: None) -> None:
    (tmp_path / "a.tar").write_bytes(tar_of(*pair("a"), plain("a.txt", b"2"), *pair("b"), *pair("c")))
    counts = Counts()
    url = flaky(tmp_path, str(tmp_path / "a.tar"), 2, "head -c 9000 $shard; exit 1")
    assert [sample["__key__"] for sample in read_shard(url, counts)] == ["a", "b", "c"]
    assert counts.errors == {"duplicate_member": 1}


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.fault("http or a pipe that stalls")
def test_a_pipe_that_stalls_is_killed_and_tried_again(
    tmp_path: Path, no_wait: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "STALL", 1.0)
    shard_bytes(tmp_path)
    url = flaky(tmp_path, str(tmp_path / "laion-000000.tar"), 1, "head -c 9000 $shard; exec sleep 600")
    found, errors, _ = read_all(url)
    assert len(found) == 12
    assert errors == []
    assert not any(running(pid) for pid in calls(url))


@pytest.mark.fault("http or a pipe (`s3://`) that fails half-way, at once, at its end, or is killed")
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("kind", ["laion", "mmc4"])
def test_a_flaky_network_changes_no_batch_and_no_cursor(tmp_path: Path, kind: str, workers: int, no_wait: None) -> None:
    """Also for a run that stops and goes on in the middle of it."""
    write = write_laion if kind == "laion" else write_mmc4
    write(tmp_path, 3, 5)
    paths = [str(tmp_path / f"{kind}-{i:06d}.tar") for i in range(3)]

    def batches(urls: list[str], count: int, state: LoaderState | None = None) -> tuple[list[Any], LoaderState]:
        with loader(kind, tuple(urls), state, lanes=2, workers=workers, shuffle_buffer=3) as its:
            taken = list(islice(its, count))
        found = [(key.split("#")[1], *rest) for batch in taken for key, *rest in rows(batch)]
        return found, LoaderState(taken[-1].samples, taken[-1].cursors)

    steady, end = batches([f"pipe:cat {path}" for path in paths], 8)
    first, state = batches([flaky(tmp_path, path, 2, "head -c 12000 $shard; exit 7") for path in paths], 3)
    second, its_end = batches([flaky(tmp_path, path, 2, "head -c 12000 $shard; exit 7") for path in paths], 5, state)
    assert same(first + second, steady)
    assert its_end == end


# ------------------------------------------------------------------------------------------------ workers that die or hang


def workers_of(batches: Loader) -> list[int]:
    pids = [worker.process.pid for worker in batches._workers]
    assert all(pids)
    return [pid for pid in pids if pid is not None]


@pytest.mark.fault(
    "Data",
    "SIGKILL (out of memory) or SIGSEGV of a loader worker",
    "`DataError` naming dataset, worker, rank, pid, shard, signal, when its batch is wanted, and never in the middle of a step or a save",
)
@pytest.mark.fault(
    "Data",
    "A loader worker that hangs (SIGSTOP, a read that never returns)",
    "named by its own rank after `--dist_timeout`, before the other ranks give up: `DataError` as above",
)
@pytest.mark.parametrize("idle", [False, True], ids=["at work", "far ahead"])
@pytest.mark.parametrize(
    ("number", "what"),
    [
        (signal.SIGKILL, r"was killed by SIGKILL: is the machine out of memory\?"),
        (signal.SIGSEGV, "was killed by SIGSEGV"),
        (signal.SIGSTOP, "hangs: it has given nothing for 2 seconds"),
    ],
    ids=["SIGKILL", "SIGSEGV", "SIGSTOP"],
)
def test_a_worker_that_dies_or_hangs_is_named(tmp_path: Path, number: signal.Signals, what: str, idle: bool) -> None:
    pattern = write_laion(tmp_path, shards=3, samples=6)
    batches = loader("laion", pattern, workers=2, lanes=4, size=224, timeout=2.0, rank=1, world_size=2)
    next(batches)
    if idle:
        time.sleep(1)  # it waits in the middle of a share, as the pipe holds no more
    pids = workers_of(batches)
    os.kill(pids[1], number)
    with pytest.raises(DataError) as caught:
        list(islice(batches, 20))  # those that were ready still come
    message = str(caught.value)
    who = rf"^laion loader worker 1 of rank 1 \(pid {pids[1]}\), which was up to 2 batches beyond "
    assert re.search(rf"{who}{tmp_path}/laion-00000\d\.tar \(lane 3\), {what}$", message), message
    assert "\n" not in message
    assert not any(running(pid) for pid in pids), "nobody stays"
    with pytest.raises(StopIteration):
        next(batches)


@pytest.mark.fault("A loader worker that hangs (SIGSTOP, a read that never returns)")
def test_a_worker_whose_read_never_returns_is_named(tmp_path: Path) -> None:
    """Also where another worker is far ahead."""
    write_laion(tmp_path, shards=2, samples=6)
    hangs, reads = f"{tmp_path}/hangs.tar", f"{tmp_path}/laion-000001.tar"
    os.mkfifo(hangs)  # nobody writes to it
    seed = next(s for s in range(99) if ShardOrder((hangs, reads), 2, s, "laion").url(1, 0) == hangs)
    batches = loader("laion", (hangs, reads), workers=2, lanes=2, seed=seed, startup_timeout=2.0, timeout=9.0)
    pids = workers_of(batches)
    with pytest.raises(DataError, match=rf"worker 1 of rank 0 \(pid {pids[1]}\).*hangs.tar .* nothing for 2 seconds"):
        next(batches)
    assert not any(running(pid) for pid in pids)


def test_a_full_dev_shm_does_not_matter(tmp_path: Path) -> None:
    """Docker gives a container 64 MB."""
    pattern = write_laion(tmp_path, shards=2, samples=20)
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from tests.data_tools import loader
with loader("laion", {pattern!r}, workers=2, batch_size=80, lanes=2) as batches:
    print(len(next(batches).keys), "samples")
"""
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode != 0:
        pytest.skip("needs to be root")
    small = 'mount -t tmpfs -o size=64k none /dev/shm && exec "$0" "$@"'
    command = ["unshare", "--mount", "sh", "-c", small, sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout == "80 samples\n", done


@pytest.mark.fault("SIGKILL (out of memory) or SIGSEGV of a loader worker")
def test_a_death_is_told_when_a_batch_is_wanted_and_not_before(tmp_path: Path) -> None:
    """Not wherever the training is: in the middle of a save, say."""
    pattern = write_laion(tmp_path, shards=2, samples=6)
    with loader("laion", pattern, workers=1) as batches:
        next(batches)
        (pid,) = workers_of(batches)
        os.kill(pid, signal.SIGKILL)
        while running(pid):
            time.sleep(0.01)
        time.sleep(0.1)  # time for a signal's handler
        with pytest.raises(DataError, match="SIGKILL"):
            list(islice(batches, 20))


def test_the_first_batch_may_take_longer(tmp_path: Path) -> None:
    write_laion(tmp_path, shards=1, samples=30)
    slow = f"pipe:sleep 3; cat {tmp_path}/laion-000000.tar"
    with loader("laion", slow, workers=1, lanes=1, timeout=2.0) as batches:
        assert len(list(islice(batches, 3))) == 3


def test_a_stopped_worker_does_not_keep_a_loader_from_closing(tmp_path: Path) -> None:
    batches = loader("laion", write_laion(tmp_path, shards=2, samples=6), workers=1)
    next(batches)
    pids = workers_of(batches)
    os.kill(pids[0], signal.SIGSTOP)
    batches.close()
    assert not any(running(pid) for pid in pids)


# ----------------------------------------------------------------------------------------------------------------- memory


def resident(pid: int) -> int:
    """Bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.fault(
    "Data",
    "Thousands of samples, hundreds of passes",
    "memory of process and worker is flat; a lane's shuffle buffer holds at most 256 MiB",
)
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("kind", ["laion", "mmc4"])
def test_memory_of_a_loader_is_flat(tmp_path: Path, kind: str, workers: int) -> None:
    """Over hundreds of passes at length, with a damaged shard in each."""
    pattern = write_laion(tmp_path, 3, samples=6) if kind == "laion" else write_mmc4(tmp_path, 3, documents=3)
    (tmp_path / "cut.tar").write_bytes(Path(pattern.replace("{000000..000002}", "000000")).read_bytes()[:40_000])
    sizes: dict[int, list[int]] = {}
    with loader(kind, f"{pattern}::{tmp_path}/cut.tar", workers=workers, batch_size=8, lanes=4) as batches:
        next(batches)
        pids = [os.getpid(), *workers_of(batches)] if workers else [os.getpid()]
        count = {"laion": 900, "mmc4": 250}[kind] // (1 if AT_LENGTH else 3)
        for i in range(count):
            next(batches)
            if i >= count // 4:
                for pid in pids:
                    sizes.setdefault(pid, []).append(resident(pid))
    for measured in sizes.values():
        slope = np.polyfit(np.arange(len(measured)) * 8.0, measured, 1)[0]
        # One leaked picture of 32 × 32 is 3,072 bytes, a leaked document some 30,000.
        assert slope < {"laion": 1000, "mmc4": 3000}[kind] * (1 if AT_LENGTH else 3), f"{slope:.0f} bytes a sample"
