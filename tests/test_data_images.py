"""Pixels: next to the reference's, whatever the image."""

from __future__ import annotations

import io
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, UnidentifiedImageError
from torchvision import transforms

from open_flamingo.train.data.images import ImagePreparer, image_size, image_spec, normalization
from open_flamingo.train.data.samples import SampleError
from open_flamingo.train.step import TrainDataset
from tests.data_tools import image_processor


def pixels(width: int, height: int, kind: str = "noise", seed: int = 0) -> np.ndarray:
    """uint8 [H, W, 3]. "noise" is the hardest for a resize, "soft" is like a photograph."""
    rng = np.random.default_rng([seed, width, height])
    if kind == "soft":
        small = rng.integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), dtype=np.uint8)
        soft = np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)).astype(int)
        return (soft + rng.integers(-20, 21, soft.shape)).clip(0, 255).astype(np.uint8)
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def reference(data: bytes, size: int = 224) -> np.ndarray:
    """What the reference's Pillow (9) makes of it: to RGB, along rows, along columns, crop. uint8 [3, H, W]."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    width, height = image.size
    resized = (size, int(size * height / width)) if width <= height else (int(size * width / height), size)
    image = image.resize((resized[0], height), Image.Resampling.BICUBIC).resize(resized, Image.Resampling.BICUBIC)
    return np.asarray(transforms.functional.center_crop(image, [size, size])).transpose(2, 0, 1)


def differences(data: bytes, size: int = 224) -> np.ndarray:
    """Of each value, in 255ths."""
    prepared = ImagePreparer(image_processor(size))(data)
    assert prepared.shape == (3, size, size)
    assert prepared.dtype == np.uint8
    return np.abs(prepared.astype(int) - reference(data, size).astype(int)).ravel()


def assert_close(values: np.ndarray) -> None:
    """Within 1/255, and within 2/255 in one of 100,000. (Of a few values: one.)"""
    assert values.max() <= 2
    assert (values > 1).sum() <= max(1, 1e-5 * len(values))


SIZES = [
    *[(1, 1), (2, 3), (1, 40), (40, 1), (30, 30), (3, 300), (300, 3)],
    *[(223, 223), (224, 224), (225, 224), (224, 225), (100, 80), (80, 100), (223, 500), (500, 223)],
    *[(256, 256), (256, 600), (600, 256), (230, 900), (900, 230), (512, 384), (384, 512), (640, 481), (1001, 777)],
]


def test_any_size() -> None:
    images = [Image.fromarray(pixels(*size, kind)) for size in SIZES for kind in ("noise", "soft")]
    assert_close(np.concatenate([differences(encoded(image)) for image in images]))


def test_few_values_differ() -> None:
    # 448: the weights are such that many a value ends in .5
    sizes = [(512, 384), (448, 448), (450, 900), (100, 80), (230, 227), (1600, 1200)]
    data = [encoded(Image.fromarray(pixels(*size))) for size in sizes]
    values = np.concatenate([differences(one, crop) for one in data for crop in (224, 222)])
    assert_close(values)
    assert (values > 0).mean() < 0.01


def test_many_sizes_of_noise() -> None:
    rng = np.random.default_rng(0)
    sizes = [(int(width), int(height)) for width, height in rng.integers(1, 400, (60, 2))]
    images = [
        Image.fromarray(pixels(*size, seed=seed)) for seed, size in enumerate(sizes) if max(size) <= 30 * min(size)
    ]
    assert_close(np.concatenate([differences(encoded(image), 112) for image in images]))


def test_an_image_like_a_line_takes_little_memory() -> None:
    # At full width it would be 224 × 4,480,000 pixels.
    assert ImagePreparer(image_processor())(encoded(Image.fromarray(pixels(20_000, 1)))).shape == (3, 224, 224)
    assert ImagePreparer(image_processor())(encoded(Image.fromarray(pixels(1, 20_000)))).shape == (3, 224, 224)


@pytest.mark.fault("1×1, 100,000×1, CMYK, 16 bit, animated, palette with transparency")
def test_every_kind_of_image() -> None:
    rgb = Image.fromarray(pixels(90, 70, "soft"))
    alpha = rgb.copy()
    alpha.putalpha(Image.fromarray(pixels(90, 70)[:, :, 0]))
    palette = rgb.quantize(16)
    palette.info["transparency"] = 3
    deep = Image.fromarray((pixels(90, 70)[:, :, 0].astype(np.uint16) << 8) + 7)
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated: Pillow does not turn the image, so neither do we
    images = {
        "jpeg": encoded(rgb, "JPEG"),
        "jpeg 4:4:4": encoded(rgb, "JPEG", subsampling=0),
        "jpeg 4:2:2": encoded(rgb, "JPEG", subsampling=1),
        "progressive": encoded(rgb, "JPEG", progressive=True),
        "rotated": encoded(rgb, "JPEG", exif=exif),
        "gray": encoded(rgb.convert("L"), "JPEG"),
        "cmyk": encoded(rgb.convert("CMYK"), "JPEG"),
        "extra bytes": encoded(rgb, "JPEG") + b"extra",
        "rgba": encoded(alpha),
        "palette": encoded(palette),
        "16 bit": encoded(deep),
        "1 bit": encoded(rgb.convert("1")),
        "gif": encoded(palette, "GIF", save_all=True, append_images=[palette.rotate(90)]),
        "webp": encoded(rgb, "WEBP"),
    }
    for name, data in images.items():
        assert (differences(data, 64) > 1).sum() <= 1, name


def test_truncated_and_broken_images_are_errors() -> None:
    prepare = ImagePreparer(image_processor())
    jpeg = encoded(Image.fromarray(pixels(90, 70)), "JPEG")
    png = encoded(Image.fromarray(pixels(90, 70)))
    for data in (jpeg[:-200], png[:-200], jpeg[:20], b"", b"no image", b"\xff\xd8\xff" + bytes(5000)):
        assert not prepare.exceeds_max_pixels(data)
        with pytest.raises(SampleError, match="corrupt_image"):
            prepare(data)


def test_size_is_known_without_decoding() -> None:
    assert image_size(encoded(Image.fromarray(pixels(90, 70)), "JPEG")[:800]) == (90, 70)
    assert image_size(encoded(Image.fromarray(pixels(90, 70)))[:800]) == (90, 70)
    with pytest.raises(UnidentifiedImageError):
        image_size(b"no image")
    data = encoded(Image.new("L", (20_000, 10_000)), optimize=False)  # what Pillow calls a decompression bomb
    assert ImagePreparer(image_processor(), max_pixels=10**12).exceeds_max_pixels(data)
    assert ImagePreparer(image_processor(), max_pixels=None).exceeds_max_pixels(data)
    small = encoded(Image.fromarray(pixels(90, 70)))
    assert ImagePreparer(image_processor(), max_pixels=6299).exceeds_max_pixels(small)
    assert not ImagePreparer(image_processor(), max_pixels=6300).exceeds_max_pixels(small)


def test_flip_mirrors() -> None:
    prepare = ImagePreparer(image_processor())
    for size in [(90, 70), (301, 250), (250, 301)]:
        data = encoded(Image.fromarray(pixels(*size)))
        assert np.array_equal(prepare(data, flip=True), prepare(data)[:, :, ::-1])


@pytest.mark.parametrize("standard", [True, False])
def test_the_vision_encoder_gets_what_the_image_processor_gives(standard: bool) -> None:
    image = Image.fromarray(pixels(300, 260, "soft"))
    processor = image_processor() if standard else lambda image: image_processor()(image)
    prepared = torch.from_numpy(ImagePreparer(processor)(encoded(image)))
    dataset = TrainDataset("laion", 1.0, None, normalization(processor), torch.device("cpu"))
    ours = dataset.images(SimpleNamespace(images=prepared))
    assert (ours - image_processor()(image)).abs().max() < 1.01 / 255 / 0.26


def squash(image: Image.Image) -> torch.Tensor:
    """An image processor that nobody can look into."""
    return torch.full((3, 8, 8), image.width / 100)


def test_another_image_processor_is_called() -> None:
    assert image_spec(squash) is None
    assert normalization(squash) is None
    prepared = ImagePreparer(squash)(encoded(Image.fromarray(pixels(50, 20))))
    assert prepared.dtype == np.float32
    assert prepared.shape == (3, 8, 8)
    assert float(prepared.max()) == 0.5
    padded = transforms.Compose(
        [
            transforms.Resize(8),
            transforms.CenterCrop(16),
            transforms.ToTensor(),
            transforms.Normalize([0.5] * 3, [0.5] * 3),
        ]
    )
    assert image_spec(padded) is None, "a crop larger than the image pads"


def test_a_pipeline_without_a_crop_squashes() -> None:
    size = transforms.Resize((40, 24), interpolation=transforms.InterpolationMode.BICUBIC, antialias=True)
    both = transforms.Compose([size, transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.5] * 3)])
    image = Image.fromarray(pixels(90, 70))
    prepared = ImagePreparer(both)(encoded(image))
    assert prepared.shape == (3, 40, 24)
    expected = (both(image) * 0.5 + 0.5) * 255
    assert np.abs(prepared - expected.numpy()).max() < 1.01


def test_it_can_be_sent_to_another_process() -> None:
    data = encoded(Image.fromarray(pixels(50, 50)))
    prepare = ImagePreparer(image_processor(), max_pixels=10**6)
    assert np.array_equal(pickle.loads(pickle.dumps(prepare))(data), prepare(data))
