"""Broken samples and shards, thousands at length: nothing but the counted errors comes out, and reading ends.

The cases are the same in each run (`derandomize`, seeded generators), so a failure is not a matter of luck.
"""

from __future__ import annotations

import base64
import bz2
import functools
import gzip
import io
import json
import lzma
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from open_flamingo.train.data import lanes, tars
from open_flamingo.train.data.images import ImagePreparer
from open_flamingo.train.data.laion import LaionPreparer
from open_flamingo.train.data.lanes import Lane, ShardOrder
from open_flamingo.train.data.mmc4 import Mmc4Preparer
from open_flamingo.train.data.samples import Counts, DataError, Drop, RawSample, Sample, SampleError
from open_flamingo.train.data.tars import read_shard
from tests.conftest import cases
from tests.data_tools import MEDIA, Fixed, image_processor, tokenizer
from tests.shards import big_picture, document, picture, synthetic_document, write_laion, write_mmc4

SIZE = 16
fuzz = functools.partial(
    settings, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
)


@functools.cache
def preparers() -> dict[str, Any]:
    prepare_image = ImagePreparer(image_processor(SIZE), max_pixels=10**6)
    return {"laion": LaionPreparer(tokenizer(), prepare_image), "mmc4": Mmc4Preparer(tokenizer(), prepare_image)}


def prepare(kind: str, **files: bytes) -> str:
    """What becomes of a sample: "sample", or the reason why it is none."""
    raw: RawSample = {"__key__": "key", "__url__": "a.tar", **files}
    try:
        sample = preparers()[kind](raw, Fixed(), Counts())
    except Drop as drop:
        return str(drop)
    except SampleError as error:
        return error.reason
    assert isinstance(sample, Sample)
    assert sample.input_ids.count(MEDIA) == len(sample.images) > 0
    assert len(sample.input_ids) <= {"laion": 32, "mmc4": 256}[kind]
    assert all(image.shape == (3, SIZE, SIZE) and image.dtype == np.uint8 for image in sample.images)
    return "sample"


def flipped(data: bytes, rng: np.random.Generator) -> bytes:
    """`data` with a few bytes changed, cut out, or put in."""
    broken = bytearray(data)
    for _ in range(int(rng.integers(1, 6))):
        if not broken:
            break
        # Headers are where the damage is the most interesting.
        at = int(rng.integers(min(len(broken), 600) if rng.random() < 0.5 else len(broken)))
        length = int(rng.choice([1, 1, 1, 4, 64, 1500]))
        match rng.integers(4):
            case 0:
                broken[at : at + length] = rng.bytes(length)
            case 1:
                broken[at] ^= 1 << int(rng.integers(8))
            case 2:
                del broken[at : at + length]
            case _:
                broken[at:at] = rng.bytes(length)
    return bytes(broken)


# ------------------------------------------------------------------------------------------------------------------ laion


@functools.cache
def pictures() -> list[bytes]:
    rgb = Image.open(io.BytesIO(picture(np.random.default_rng(0), "red", (40, 30))))
    palette = rgb.quantize(16)
    kinds: dict[str, tuple[Image.Image, dict[str, Any]]] = {
        "JPEG": (rgb, {}),
        "PNG": (rgb, {}),
        "GIF": (palette, {"save_all": True, "append_images": [palette.rotate(90)]}),
        "WEBP": (rgb, {}),
        "BMP": (rgb, {}),
        "TIFF": (rgb, {"compression": "tiff_lzw"}),
        "PPM": (rgb, {}),
        "ICO": (rgb, {}),
        "TGA": (rgb, {"compression": "tga_rle"}),
    }
    result = []
    for kind, (image, options) in kinds.items():
        buffer = io.BytesIO()
        image.save(buffer, format=kind, **options)
        result.append(buffer.getvalue())
    buffer = io.BytesIO()
    rgb.convert("CMYK").save(buffer, format="JPEG", progressive=True)
    return [*result, buffer.getvalue()]


@pytest.mark.fault(
    "Data",
    "Thousands of broken samples and shards (bytes changed, cut and put in; any json; headers with right checksums)",
    "a sample or a counted reason; reading ends",
)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
def test_changed_bytes_in_pictures_of_all_kinds() -> None:
    rng = np.random.default_rng(0)
    outcomes = {prepare("laion", jpg=data, txt=b"a caption") for data in pictures()}
    assert outcomes == {"sample"}
    for _ in range(cases(150)):
        outcomes |= {prepare("laion", jpg=flipped(data, rng), txt=b"a caption") for data in pictures()}
    assert outcomes <= {"sample", "corrupt_image", "image_too_large"}
    assert {"sample", "corrupt_image"} <= outcomes


@pytest.mark.fault(
    "Thousands of broken samples and shards (bytes changed, cut and put in; any json; headers with right checksums)"
)
@fuzz(max_examples=cases(800))
@given(image=st.one_of(st.binary(max_size=80), st.sampled_from([None, 0, 1, 2])), caption=st.binary(max_size=300))
def test_any_bytes_as_pair(image: bytes | int | None, caption: bytes) -> None:
    files = {"txt": caption}
    if image is not None:
        files["png"] = pictures()[image] if isinstance(image, int) else image
    assert prepare("laion", **files) in {"sample", "no_image", "corrupt_image", "bad_caption", "image_too_large"}


@pytest.mark.fault(
    "Thousands of broken samples and shards (bytes changed, cut and put in; any json; headers with right checksums)"
)
@fuzz(max_examples=cases(500))
@given(st.text(st.characters(), max_size=200))
def test_any_text_as_caption(caption: str) -> None:
    outcome = prepare("laion", jpg=pictures()[0], txt=caption.encode("utf-8", "surrogatepass"))
    assert outcome == "sample" or any(0xD800 <= ord(character) < 0xE000 for character in caption)


# ------------------------------------------------------------------------------------------------------------------- mmc4

MMC4_OUTCOMES = {
    *["sample", "no_image", "no_match", "few_images", "single_image", "image_last", "image_too_large"],
    *["no_json", "bad_json", "bad_document", "bad_similarity", "bad_base64", "corrupt_image"],
}
ANY_TEXT = st.text(st.characters(), max_size=60)  # lone surrogates too
ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | ANY_TEXT | st.just(10**400),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@functools.cache
def good_document() -> dict[str, Any]:
    return document(np.random.default_rng(0), images=2, number=0)


def dumped(value: Any) -> bytes:
    return json.dumps(value).encode()


@pytest.mark.fault(
    "Thousands of broken samples and shards (bytes changed, cut and put in; any json; headers with right checksums)"
)
@fuzz(max_examples=cases(800))
@given(ANY_JSON)
def test_any_json_as_document(value: Any) -> None:
    assert prepare("mmc4", json=dumped(value)) in MMC4_OUTCOMES


@pytest.mark.fault(
    "Thousands of broken samples and shards (bytes changed, cut and put in; any json; headers with right checksums)"
)
@fuzz(max_examples=cases(800))
@given(st.data())
def test_documents_with_one_part_replaced(data: st.DataObject) -> None:
    """Anywhere: a field, a sentence, a row or a value of the matrix, a picture."""
    synthetic = data.draw(st.booleans())
    broken = json.loads(dumped(synthetic_document(np.random.default_rng(0), 2, 0) if synthetic else good_document()))
    place: Any = broken
    while True:
        keys = sorted(place) if isinstance(place, dict) else range(len(place))
        key = data.draw(st.sampled_from(list(keys)))
        if not isinstance(place[key], dict | list) or not place[key] or data.draw(st.booleans()):
            break
        place = place[key]
    if data.draw(st.integers(0, 3)) == 0:
        del place[key]
    else:
        place[key] = data.draw(ANY_JSON)
    assert prepare("mmc4", json=dumped(broken)) in MMC4_OUTCOMES


@pytest.mark.fault(
    "Thousands of broken samples and shards (bytes changed, cut and put in; any json; headers with right checksums)"
)
@fuzz(max_examples=cases(300))
@given(ANY_TEXT, ANY_TEXT)
def test_any_sentences(one: str, other: str) -> None:
    changed = {**good_document(), "text_list": [one, other, "a", "b"]}
    assert prepare("mmc4", json=dumped(changed)) in MMC4_OUTCOMES - {"bad_json", "bad_similarity", "bad_base64"}


@pytest.mark.fault(
    "Thousands of broken samples and shards (bytes changed, cut and put in; any json; headers with right checksums)"
)
@fuzz(max_examples=cases(300))
@given(st.lists(st.lists(st.floats() | st.none(), max_size=5), max_size=4))
def test_any_matrix(matrix: list[list[float | None]]) -> None:
    assert prepare("mmc4", json=dumped({**good_document(), "similarity_matrix": matrix})) in MMC4_OUTCOMES


@pytest.mark.fault(
    "Thousands of broken samples and shards (bytes changed, cut and put in; any json; headers with right checksums)"
)
@pytest.mark.parametrize("synthetic", [False, True])
def test_changed_bytes_in_documents(synthetic: bool) -> None:
    rng = np.random.default_rng(1)
    good = dumped(synthetic_document(rng, 2, 0) if synthetic else good_document())
    assert prepare("mmc4", json=good) == "sample"
    outcomes = {prepare("mmc4", json=flipped(good, rng)) for _ in range(cases(400))}
    assert outcomes <= MMC4_OUTCOMES
    assert "bad_json" in outcomes
    info = {"image_base64": base64.b64encode(flipped(big_picture(rng, "red"), rng)).decode()}
    for _ in range(cases(200)):
        info = {"image_base64": base64.b64encode(flipped(big_picture(rng, "red"), rng)).decode()}
        changed = {**good_document(), "image_info": [info, *good_document()["image_info"][1:]]}
        assert prepare("mmc4", json=dumped(changed)) in MMC4_OUTCOMES


# ------------------------------------------------------------------------------------------------------------------ shards


class Watched(io.BytesIO):
    """Fails the test if it is read more often, or asked for more at once, than its length calls for."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.left = len(data) // 100 + 2 * tars.MAX_FILE // 65536

    def read1(self, size: int | None = -1, /) -> bytes:
        self.left -= 1
        assert self.left > 0, "reads without end"
        assert size is not None
        assert 0 <= size <= tars.MAX_SAMPLE
        return super().read1(size)


def read_tar(data: bytes) -> int:
    """The number of samples that are read before the end or an error."""
    count = 0
    try:
        for item in tars._samples(Watched(data), "a.tar"):
            count += isinstance(item, dict)
    except tarfile.TarError:
        pass
    return count


def small_shard(kind: int) -> bytes:
    """Names and sizes as each of tar's formats writes them."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=kind) as tar:
        for i, name in enumerate(["a.jpg", "a.txt", f"{'long/' * 40}b.jpg", "ü.txt", "c.jpg", "c.json"]):
            info = tarfile.TarInfo(name)
            info.size = 300 * i
            tar.addfile(info, io.BytesIO(bytes([i]) * info.size))
    return buffer.getvalue()


@pytest.mark.fault(
    "Thousands of broken samples and shards (bytes changed, cut and put in; any json; headers with right checksums)"
)
@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_changed_bytes_in_tars_of_all_formats(kind: int) -> None:
    good = small_shard(kind)
    assert read_tar(good) == 4
    rng = np.random.default_rng(kind)
    assert len({read_tar(flipped(good, rng)) for _ in range(cases(1500))}) > 2


def header(name: bytes, size: bytes, kind: bytes, rest: bytes) -> bytes:
    """A header whose checksum is right, whatever it says."""
    block = bytearray(512)
    block[:100] = name[:100].ljust(100, b"\0")
    block[124:136] = size[:12].ljust(12, b"\0")
    block[156:157] = kind
    block[157 : 157 + len(rest)] = rest
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


SIZES = st.one_of(
    st.integers(0, 2000).map(lambda size: b"%011o" % size),
    st.integers(0, 8**11 - 1).map(lambda size: b"%011o" % size),
    st.binary(min_size=11, max_size=11).map(lambda tail: b"\x80" + tail),  # base 256, up to 2^88
    st.binary(min_size=11, max_size=11).map(lambda tail: b"\xff" + tail),  # below zero
    st.binary(min_size=12, max_size=12),
)
BODIES = st.one_of(
    st.binary(max_size=600),
    st.sampled_from(
        [b"19 path=a/../b.jpg\n", b"12 size=100\n", b"13 size=-512\n", b"99999999999 path=x\n", b"0 a=b\n"]
    ),
    st.sampled_from(
        [b"22 GNU.sparse.major=1\n", b"20 hdrcharset=BINARY\n" * 30, b"1" * 700, b"30 size=9999999999999999999999\n"]
    ),
)
MEMBERS = st.tuples(
    st.one_of(st.sampled_from([b"a.jpg", b"a.txt", b"b.json", b"../x.jpg", b"/"]), st.binary(max_size=100)),
    SIZES,
    st.one_of(
        st.sampled_from([b"0", b"\0", b"1", b"2", b"5", b"L", b"K", b"x", b"g", b"S", b"7"]),
        st.binary(min_size=1, max_size=1),
    ),
    st.binary(max_size=355),
    BODIES,
)


@pytest.mark.fault("Tar headers that lie: sizes of 8 EiB or below zero, names of 1 GiB, sparse files")
@pytest.mark.fault(
    "Thousands of broken samples and shards (bytes changed, cut and put in; any json; headers with right checksums)"
)
@fuzz(max_examples=cases(1500))
@given(st.lists(MEMBERS, min_size=1, max_size=6))
def test_hostile_headers_with_right_checksums(members: list[tuple[bytes, bytes, bytes, bytes, bytes]]) -> None:
    data = b"".join(
        header(name, size, kind, rest) + body.ljust(-(-len(body) // 512) * 512, b"\0")
        for name, size, kind, rest, body in members
    )
    read_tar(data)
    read_tar(data + bytes(1024))


@pytest.mark.fault(
    "Thousands of broken samples and shards (bytes changed, cut and put in; any json; headers with right checksums)"
)
@pytest.mark.parametrize("compress", [bytes, gzip.compress, bz2.compress, lzma.compress])
def test_changed_bytes_in_compressed_shards(tmp_path: Path, compress: Any) -> None:
    good = compress(small_shard(tarfile.GNU_FORMAT))
    rng = np.random.default_rng(2)
    path = tmp_path / "a.tar"
    outcomes = set()
    for case in range(cases(300)):
        path.write_bytes(flipped(good, rng) if case else good)
        try:
            outcomes.add(len(list(read_shard(str(path), Counts()))))
        except SampleError as error:
            outcomes.add(error.reason)
    assert 4 in outcomes
    assert outcomes & {"unreadable_shard", "damaged_shard"}


@pytest.mark.fault(
    "Thousands of broken samples and shards (bytes changed, cut and put in; any json; headers with right checksums)"
)
@pytest.mark.parametrize("kind", ["laion", "mmc4"])
def test_lanes_go_on_over_damaged_shards(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the bytes of the file to the tensors; nothing needs the net that catches what nobody thought of."""
    write = write_laion(tmp_path, shards=1, samples=4) if kind == "laion" else write_mmc4(tmp_path, 1, documents=3)
    good = Path(write).read_bytes()
    rng = np.random.default_rng(3)
    urls = []
    for case in range(60):
        path = tmp_path / f"damaged-{case}.tar"
        path.write_bytes(flipped(good, rng) if case % 10 else good)
        urls.append(str(path))
    monkeypatch.setattr(lanes, "FAILURES_IN_A_ROW", 10_000)
    counts = Counts()
    lane = Lane(0, ShardOrder(tuple(urls), 1, 0, kind), preparers()[kind], 4, (0, 0), counts)
    try:
        while lane.cursor[0] < len(urls):
            next(lane)
    except DataError as error:
        pytest.fail(str(error))
    assert counts.errors["damaged_shard"] > 0
    assert "unexpected_error" not in counts.errors
