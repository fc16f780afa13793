"""Samples → tensors, against what the reference made of the same shards; and the differences on purpose."""

from __future__ import annotations

import base64
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from open_flamingo.train.data.images import ImagePreparer
from open_flamingo.train.data.laion import LaionPreparer
from open_flamingo.train.data.lanes import Counts
from open_flamingo.train.data.mmc4 import Mmc4Preparer, decode_base64
from open_flamingo.train.data.samples import Drop, Sample, SampleError
from tests.data_tools import EOC, EOS, GOLDEN, MEDIA, NO_COUNTS, Fixed, image_processor, raw_samples, tokenizer

LAION = {case["key"]: case for case in json.loads((GOLDEN / "data" / "laion.json").read_text())["samples"]}
LAION_RAW = raw_samples(GOLDEN / "data" / "laion-000000.tar")
MMC4 = json.loads((GOLDEN / "data" / "mmc4.json").read_text())["docs"]
MMC4_RAW = raw_samples(GOLDEN / "data" / "mmc4-000000.tar")
TENSORS = load_file(GOLDEN / "data" / "data.safetensors")
# 1/255 of a pixel after dividing by the smallest of CLIP's standard deviations.
PIXEL = 1 / 255 / 0.26


def laion() -> LaionPreparer:
    return LaionPreparer(tokenizer(), ImagePreparer(image_processor()))


def mmc4(**options: float) -> Mmc4Preparer:
    return Mmc4Preparer(tokenizer(), ImagePreparer(image_processor()), **options)  # type: ignore[arg-type]


def document(index: int) -> dict:
    return json.loads(MMC4_RAW[f"{index:06d}"]["json"])


def raw(contents: object) -> dict:
    return {"__key__": "k", "__url__": "u", "json": json.dumps(contents).encode()}


def pooled(images: list[np.ndarray]) -> torch.Tensor:
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    pixels = (torch.from_numpy(np.stack(images)).float() / 255 - mean) / std
    return torch.nn.functional.adaptive_avg_pool2d(pixels, 7)


@pytest.mark.parametrize("key", LAION)
def test_laion_sample(key: str) -> None:
    case = LAION[key]
    sample_of = lambda: laion()(LAION_RAW[key], Fixed(), NO_COUNTS)  # noqa: E731
    if not case["ok"]:
        # The reference decodes before it looks at the image: what failed there is an error here, the rest was dropped.
        with pytest.raises((Drop, SampleError)) as caught:
            sample_of()
        is_error = isinstance(caught.value, SampleError)
        assert is_error == bool(case["log"]) or caught.match("unknown_suffix")
        return
    sample = sample_of()
    if "literal" in case["text"]:
        assert sample.input_ids.count(MEDIA) == sample.input_ids.count(EOC) == 1
        assert tokenizer().decode(sample.input_ids) == case["text"]
    else:
        assert sample.input_ids == case["input_ids"][0]
    assert (pooled(sample.images) - TENSORS[f"laion.{key}.image_pooled7"]).abs().max() < PIXEL


# Where the reference is wrong: the images, in the order of their <image> tokens, and the text where that differs too.
DIFFERENT: dict[str, tuple[list[int], str | None]] = {
    "two_images_crossed": ([1, 0], None),
    "assignment_not_greedy": ([1, 0], None),
    "more_images_than_max": (
        [0, 3, 6, 1, 4, 7],
        "<image>The quick brown fox jumps.<|endofchunk|><image>Over the lazy dog <|endofchunk|><image>training a model with images"
        "<|endofchunk|><image>and text is interleaved.<|endofchunk|><image>Last sentence here!<|endofchunk|><image>Six. Seven words "
        "are in this sentence now. Eight<|endofchunk|><|endoftext|>",
    ),
    "images_truncated_away_to_one": ([0], None),
    "three_images_one_truncated": ([0, 1], None),
    "literal_image_token_in_text": (
        [0],
        "has <image> inside<image>Over the lazy dog <|endofchunk|><|endoftext|>",
    ),
    "literal_eoc_token_in_text": (
        [0, 1],
        "<image>The quick brown fox jumps. has <|endofchunk|> inside<|endofchunk|><image>training a model with images<|endofchunk|>"
        "<|endoftext|>",
    ),
    "gpt_more_than_max": (
        [0, 1, 2, 3, 4, 5],
        "".join(f"<image>caption {i}.<|endofchunk|>" for i in range(6)) + "<|endoftext|>",
    ),
    "gpt_image_order_swapped": ([1, 0], None),
}
DROPPED = {
    "No images in sample": "",
    "Only one image in sample": "single_image",
    "Only one image at the end of sample, so labels will all be -100": "image_last",
    "Fewer than 1 images in sample": "few_images",
    "torch.cat(): expected a non-empty list of Tensors": "few_images",
}


@pytest.mark.parametrize("coin", [0.4, 0.6])
@pytest.mark.parametrize("case", MMC4, ids=lambda case: case["name"])
def test_mmc4_document(case: dict, coin: float) -> None:
    index, name, expected = case["index"], case["name"], case["results"][f"random={coin}"]
    if name in ("literal_image_token_in_text",) and coin == 0.4:
        expected = {"ok": False, "message": "Only one image in sample"}  # the other one is text
    prepare = mmc4()
    if not expected["ok"]:
        on_purpose = expected["message"] in DROPPED
        with pytest.raises(Drop if on_purpose else SampleError) as caught:
            prepare(MMC4_RAW[f"{index:06d}"], Fixed(value=coin), NO_COUNTS)
        assert not on_purpose or DROPPED[expected["message"]] in str(caught.value)
        return
    sample = prepare(MMC4_RAW[f"{index:06d}"], Fixed(value=coin), NO_COUNTS)
    length = int(TENSORS[f"mmc4.{index}.attention_mask"].sum())
    order, text = DIFFERENT.get(name, ([i for i in expected["image_order"] if i != "zero"], None))
    if text is None:
        assert sample.input_ids == TENSORS[f"mmc4.{index}.input_ids"][0, :length].tolist()
    else:
        assert tokenizer().decode(sample.input_ids) == text
    assert len(order) == sample.input_ids.count(MEDIA)
    assert_pictures(document(index), order, sample)
    if order == [i for i in expected["image_order"] if i != "zero"]:
        assert (pooled(sample.images) - TENSORS[f"mmc4.{index}.image_pooled7"][: len(order)]).abs().max() < PIXEL


def assert_pictures(contents: dict, order: list[int], sample: Sample) -> None:
    """The pictures of `sample` are those of the document, in `order`."""
    if "is_gpt" in contents:
        encoded = [contents["image_map"][f"_!_IMAGE{i + 1}_!_"]["base64_image"] for i in order]
    else:
        encoded = [contents["image_info"][i]["image_base64"] for i in order]
    prepare = ImagePreparer(image_processor())
    assert len(sample.images) == len(encoded)
    for image, one in zip(sample.images, encoded, strict=True):
        assert np.array_equal(image, prepare(base64.b64decode(one)))


def test_drop_reasons_of_documents() -> None:
    reasons = {}
    for case in MMC4:
        try:
            mmc4()(MMC4_RAW[f"{case['index']:06d}"], Fixed(value=0.4), NO_COUNTS)
        except (Drop, SampleError) as error:
            reasons[case["name"]] = error.reason if isinstance(error, SampleError) else str(error)
    assert reasons == {
        "all_images_invalid": "no_image",
        "all_below_threshold": "no_match",
        "one_image": "single_image",
        "one_image_last_token": "single_image",
        "images_truncated_away_to_one": "single_image",
        "images_truncated_away_to_zero": "few_images",
        "corrupt_image": "corrupt_image",
        "truncated_jpeg": "corrupt_image",
        "literal_image_token_in_text": "single_image",
        "empty_text_list": "no_match",
        "nan_similarity": "bad_similarity",
        "sim_matrix_rows_too_few": "bad_similarity",
        "missing_similarity_key": "bad_document",
        "gpt_no_image": "few_images",
        "gpt_no_image_in_text": "few_images",
    }


def test_thresholds_and_limits_are_the_users() -> None:
    two = MMC4_RAW["000000"]  # similarities 35 and 33
    assert len(mmc4(textsim_threshold=33)(two, Fixed(), NO_COUNTS).images) == 2
    assert len(mmc4(textsim_threshold=34)(two, Fixed(), NO_COUNTS).images) == 1
    assert len(mmc4(max_num_images=1)(two, Fixed(), NO_COUNTS).images) == 1
    with pytest.raises(Drop, match="few_images"):
        mmc4(min_num_images=3)(two, Fixed(), NO_COUNTS)


def test_a_synthetic_document_of_one_image_needs_no_coin() -> None:
    assert mmc4()(MMC4_RAW["000028"], Fixed(value=0.0), NO_COUNTS).images


def test_only_images_that_are_used_are_decoded() -> None:
    contents = document(16)  # the third image's <image> is cut off
    for broken in (2, 1):
        contents["image_info"][broken]["image_base64"] = base64.b64encode(b"\xff\xd8\xff" + bytes(20_000)).decode()
        if broken == 2:
            assert len(mmc4()(raw(contents), Fixed(), NO_COUNTS).images) == 2
        else:
            with pytest.raises(SampleError, match="corrupt_image"):
                mmc4()(raw(contents), Fixed(), NO_COUNTS)


def test_nothing_is_decoded_for_a_document_that_is_rejected() -> None:
    prepare = mmc4()
    decoded = []
    prepare.prepare_image = lambda *args, **kwargs: decoded.append(args)  # type: ignore[assignment]
    prepare.prepare_image.exceeds_max_pixels = lambda data: False  # type: ignore[method-assign]
    for index in (7, 12, 13, 15, 33):
        with pytest.raises(Drop):
            prepare(MMC4_RAW[f"{index:06d}"], Fixed(value=0.4), NO_COUNTS)
    assert not decoded


def test_too_large_images_are_no_candidates_and_are_counted() -> None:
    contents, counts = document(0), Counts()
    prepare = Mmc4Preparer(tokenizer(), ImagePreparer(image_processor(), max_pixels=1))
    with pytest.raises(Drop, match="no_image"):
        prepare(raw(contents), Fixed(), counts)
    assert counts.dropped == {"image_too_large": 2}
    with pytest.raises(Drop, match="image_too_large"):
        prepare(MMC4_RAW["000027"], Fixed(), counts)
    with pytest.raises(Drop, match="image_too_large"):
        LaionPreparer(tokenizer(), ImagePreparer(image_processor(), max_pixels=1))(LAION_RAW["000000"], Fixed(), counts)


@pytest.mark.parametrize(
    ("contents", "reason"),
    [
        (b"{", "bad_json"),
        (b"\xff\xfe", "bad_json"),
        (b"[1, 2]", "bad_document"),
        (b"3", "bad_document"),
        (b'{"is_gpt": true, "example": "_!_IMAGE1_!_ a", "image_map": {}}', "bad_document"),
        (b'{"is_gpt": true, "example": 5, "image_map": {}}', "bad_document"),
        (b'{"text_list": ["a"], "similarity_matrix": [[1]], "image_info": [{"image_base64": "A"}]}', "bad_base64"),
    ],
)
def test_malformed_documents_are_errors_with_a_reason(contents: bytes, reason: str) -> None:
    with pytest.raises(SampleError) as caught:
        mmc4()({"__key__": "k", "__url__": "u", "json": contents}, Fixed(), NO_COUNTS)
    assert caught.value.reason == reason


def test_a_match_beyond_the_sentences_is_an_error() -> None:
    contents = document(0)
    contents["similarity_matrix"] = [[1.0] * 4 + [90.0], [1.0] * 5]
    with pytest.raises(SampleError, match="bad_document"):
        mmc4()(raw(contents), Fixed(), NO_COUNTS)


def test_base64_as_the_standard_library_reads_it() -> None:
    data = bytes(range(256))
    text = base64.b64encode(data).decode()
    assert decode_base64(text) == data
    assert decode_base64("\n".join(text[i : i + 76] for i in range(0, len(text), 76))) == data
    assert decode_base64(str(text.encode())) == data, "the reference's converter wrote the repr of bytes"
    with pytest.raises(SampleError, match="bad_base64"):
        decode_base64(text[:-5])


@pytest.mark.parametrize("text", ["see <image> here", "<|endofchunk|>", "a<image><|endofchunk|>b", " <image> "])
def test_a_written_out_special_token_stays_text(text: str) -> None:
    caption = {"__key__": "k", "__url__": "u", "jpg": LAION_RAW["000000"]["jpg"], "txt": text.encode()}
    ids = laion()(caption, Fixed(), NO_COUNTS).input_ids
    assert ids[0] == MEDIA
    assert ids[-2:] == [EOC, EOS]
    assert MEDIA not in ids[1:]
    assert EOC not in ids[:-2]
    assert tokenizer().decode(ids[1:-2]) == text.strip()
    contents = document(0)
    contents["text_list"][1] = text
    ids = mmc4()(raw(contents), Fixed(), NO_COUNTS).input_ids
    assert ids.count(MEDIA) == ids.count(EOC) == 2
    assert text in tokenizer().decode(ids), "clean-up does not touch it"


def test_text_with_a_literal_is_cut_at_the_same_length() -> None:
    caption = {"__key__": "k", "__url__": "u", "jpg": LAION_RAW["000000"]["jpg"], "txt": b"<image> " + b"word " * 100}
    ids = laion()(caption, Fixed(), NO_COUNTS).input_ids
    assert len(ids) == 32
    assert EOC not in ids
