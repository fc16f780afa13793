"""Backbones: what the factory takes, and patch tokens out of every kind of vision tower."""

import json
import logging
import shutil
from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoTokenizer

from open_flamingo import create_model_and_transforms
from open_flamingo.factory import load_language_model, load_tokenizer, load_vision_encoder
from open_flamingo.vision import patch_tokens, patch_width
from tests.families import language_model
from tests.tiny import assert_same

GOLDEN = Path(__file__).parent / "golden"
CONFIG = GOLDEN / "common/vision_config_open_clip.json"
WEIGHTS = GOLDEN / "common/vision.safetensors"
LANGUAGE_MODEL = GOLDEN / "model/opt/lm"
TEXT = {"context_length": 8, "vocab_size": 32, "width": 16, "heads": 2, "layers": 1}
VIT = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16}
TOWERS = {
    "ViT": (VIT, (4, 32)),
    "ViT, mean of all tokens": (VIT | {"pool_type": "avg", "final_ln_after_pool": True}, (4, 32)),
    "ViT, attentional pooling (CoCa)": (VIT | {"attentional_pool": True, "attn_pooler_heads": 2}, (4, 32)),
    "ResNet": (VIT | {"layers": [1, 1, 1, 1], "width": 8, "image_size": 64, "head_width": 64}, (4, 256)),
    "timm convolutional": ({"timm_model_name": "test_convnext", "image_size": 64}, None),
    "timm ViT": ({"timm_model_name": "test_vit", "image_size": 160}, None),
    "timm Swin": ({"timm_model_name": "swin_tiny_patch4_window7_224", "image_size": 224}, (49, 768)),
}


def config_file(folder: Path, vision: dict, name: str = "tiny") -> Path:
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"embed_dim": 32, "vision_cfg": vision, "text_cfg": TEXT}))
    return path


# ---------------------------------------------------------------------------------------------------------------------
# Vision towers


@pytest.mark.parametrize("kind", TOWERS)
def test_patch_tokens(kind: str, tmp_path: Path) -> None:
    vision, shape = TOWERS[kind]
    tower, transform, size = load_vision_encoder(str(config_file(tmp_path, vision)))
    picture = transform(Image.new("RGB", (90, 70), "red"))
    assert picture.shape == (3, *size)
    pictures = torch.stack([picture, torch.randn_like(picture)])
    with torch.no_grad():
        tokens = patch_tokens(tower, pictures)
        alone = patch_tokens(tower, pictures[1:])
    assert tokens.ndim == 3
    assert patch_width(tower, size) == tokens.shape[-1]
    torch.testing.assert_close(tokens[1:], alone, atol=1e-4, rtol=1e-4)
    if shape is not None:
        assert tuple(tokens.shape[1:]) == shape
    if hasattr(tower, "trunk"):
        trunk = tower.trunk
        with torch.no_grad():
            features = trunk.forward_features(pictures)
        if features.ndim == 4 and trunk.num_features == features.shape[1]:
            # Tokens run along the rows of the feature map.
            torch.testing.assert_close(tokens[:, features.shape[3] + 1], features[:, :, 1, 1])
        elif features.ndim == 4:
            torch.testing.assert_close(tokens[:, features.shape[2] + 1], features[:, 1, 1])
        else:
            assert tokens.shape[1] == features.shape[1] - trunk.num_prefix_tokens
            torch.testing.assert_close(tokens[:, -1], features[:, -1])


@pytest.mark.parametrize("kind", ["ResNet", "timm convolutional", "timm ViT"])
def test_a_model_of_any_tower_trains(kind: str, tmp_path: Path) -> None:
    config = config_file(tmp_path, TOWERS[kind][0])
    model, transform, tokenizer = create_model_and_transforms(str(config), None, str(LANGUAGE_MODEL))
    picture = transform(Image.new("RGB", (90, 70), "red"))[None, None, None]
    token_ids = tokenizer("<image>a red square<|endofchunk|>", return_tensors="pt").input_ids
    before = {name: buffer.clone() for name, buffer in model.vision_encoder.named_buffers()}
    model.train()
    with torch.no_grad():
        for layer in model.decoder_layers:
            layer.gated_cross_attn_layer.attn_gate.fill_(1.0)
    model(picture, token_ids, labels=token_ids).loss.backward()
    assert model.perceiver.latents.grad.any()
    assert all(p.grad is None for p in model.vision_encoder.parameters())
    for name, buffer in model.vision_encoder.named_buffers():  # the statistics of batch norms
        assert torch.equal(buffer, before[name]), name


@pytest.mark.parametrize("kind", TOWERS)
def test_a_tower_without_weights_has_the_same_structure(kind: str, tmp_path: Path) -> None:
    path = str(config_file(tmp_path, TOWERS[kind][0]))
    tower, transform, size = load_vision_encoder(path)
    empty, its_transform, its_size = load_vision_encoder(path, meta=True)
    assert (str(transform), size, patch_width(tower, size)) == (str(its_transform), its_size, patch_width(empty, size))
    for tensors in (nn.Module.named_parameters, nn.Module.named_buffers):  # those that no state dict holds, too
        own, its = dict(tensors(tower)), dict(tensors(empty))
        assert [(name, t.shape, t.dtype) for name, t in own.items()] == [
            (name, t.shape, t.dtype) for name, t in its.items()
        ]
        assert all(tensor.is_meta for tensor in its.values())
    # What is no parameter or buffer, nobody would send.
    assert not [name for m in tower.modules() for name, value in vars(m).items() if isinstance(value, torch.Tensor)]


# ---------------------------------------------------------------------------------------------------------------------
# Where weights come from


def test_weights_of_the_whole_clip_or_the_tower_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = config_file(tmp_path, VIT)
    torch.manual_seed(0)
    clip = open_clip.CLIP(**json.loads(config.read_text()))
    tower, whole = clip.visual.state_dict(), clip.state_dict()
    files = {
        "tower.pt": tower,
        "whole.pt": {"state_dict": {f"module.{name}": value for name, value in whole.items()}, "epoch": 3},
        "visual.pt": {f"visual.{name}": value for name, value in tower.items()},
    }
    for name, weights in files.items():
        torch.save(weights, tmp_path / name)
    save_file(tower, tmp_path / "tower.safetensors")
    save_file(whole, tmp_path / "whole.safetensors")
    with caplog.at_level(logging.WARNING):
        for name in (*files, "tower.safetensors", "whole.safetensors"):
            loaded, _, _ = load_vision_encoder(str(config), str(tmp_path / name))
            assert all(torch.equal(v, tower[k]) for k, v in loaded.state_dict().items()), name
    assert "random" not in caplog.text


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A CLIP as OpenCLIP's push_to_hub writes it, with a transform of its own."""
    folder = tmp_path / "clip"
    folder.mkdir()
    config = json.loads(config_file(tmp_path, VIT, "hub").read_text())
    save_file(open_clip.CLIP(**config).state_dict(), folder / "open_clip_model.safetensors")
    own = {"mean": [0.5, 0.4, 0.3], "std": [0.1, 0.2, 0.3], "interpolation": "bilinear", "resize_mode": "squash"}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": own}))
    return folder


@pytest.mark.parametrize("pretrained", [None, "", "openai"])
def test_a_folder_brings_its_weights_and_transform(
    pretrained: str | None, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        tower, transform, _ = load_vision_encoder(f"local-dir:{folder}", pretrained)
    expected, _, its_transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    assert_same(tower.state_dict(), expected.visual.state_dict())
    same = [str(step) for step in its_transform.transforms]
    assert [str(step) for step in transform.transforms] == same
    for meta in (
        load_vision_encoder(f"local-dir:{folder}", meta=True),
        load_vision_encoder(str(folder / "open_clip_config.json")),
    ):
        assert [str(step) for step in meta[1].transforms] == same
    warned = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert not warned
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("open_flamingo")]
    assert lines == ([f"local-dir:{folder} brings its own weights: 'openai' is not used"] if pretrained else [])


def test_a_file_replaces_the_weights_of_a_folder(folder: Path, tmp_path: Path) -> None:
    """OpenCLIP itself would not look at it."""
    whole = {name: torch.randn_like(value) for name, value in load_file(folder / "open_clip_model.safetensors").items()}
    save_file(whole, tmp_path / "other.safetensors")
    tower, _, _ = load_vision_encoder(f"local-dir:{folder}", str(tmp_path / "other.safetensors"))
    assert torch.equal(tower.conv1.weight, whole["visual.conv1.weight"])


def test_a_folder_without_weights_is_refused(folder: Path) -> None:
    """OpenCLIP would go on with random ones."""
    (folder / "open_clip_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"clip_vision_encoder_path.*could not be loaded"):
        load_vision_encoder(f"local-dir:{folder}")


def test_a_tag_brings_its_transform() -> None:
    """Of all tags, as far as can be seen without their weights."""
    tags = [(name, tag) for name, tag in open_clip.list_pretrained() if name in ("ViT-B-16-SigLIP-512", "ViT-B-32")]
    for name, tag in tags:
        _, transform, size = load_vision_encoder(name, tag, meta=True)
        config = open_clip.get_pretrained_cfg(name, tag)
        assert size == (512, 512) if "512" in name else (224, 224)
        normalize = transform.transforms[-1]
        assert tuple(normalize.mean) == tuple(config.get("mean") or open_clip.OPENAI_DATASET_MEAN)


def test_a_name_that_openclip_was_told_of(tmp_path: Path) -> None:
    open_clip.add_model_config(config_file(tmp_path, VIT, "told-of"))
    assert patch_width(*load_vision_encoder("told-of")[::2]) == 32


def test_two_configs_of_one_name_are_two_models(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first, second = config_file(tmp_path / "a", VIT), config_file(tmp_path / "b", VIT | {"width": 48})
    widths = [patch_width(*load_vision_encoder(str(path))[::2]) for path in (first, second, first)]
    assert widths == [32, 48, 32]


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'ViT-Z' is neither an OpenCLIP model name"):
        load_vision_encoder("ViT-Z", "openai")
    with pytest.raises(ValueError, match=r"'openia' is neither a file nor .* its tags are: openai"):
        load_vision_encoder("ViT-L-14", "openia")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pt"):
        load_vision_encoder("ViT-L-14", str(tmp_path / "nowhere.pt"))
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json"):
        load_vision_encoder(str(tmp_path / "nowhere.json"))
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    with pytest.raises(ValueError, match=r"broken\.json is not JSON"):
        load_vision_encoder(str(broken))
    broken.write_text('{"embed_dim": 3}')
    with pytest.raises(ValueError, match="it has no vision_cfg, text_cfg"):
        load_vision_encoder(str(broken))
    weights = load_file(WEIGHTS)
    del weights["conv1.weight"]
    torch.save(weights, tmp_path / "lacking.pt")
    with pytest.raises(ValueError, match=r"(?s)lacking\.pt do not fit .*conv1\.weight"):
        load_vision_encoder(str(CONFIG), str(tmp_path / "lacking.pt"))
    for name in ("garbage.pt", "garbage.safetensors"):
        (tmp_path / name).write_bytes(b"not weights")
        with pytest.raises(ValueError, match=f"{name} do not fit"):
            load_vision_encoder(str(CONFIG), str(tmp_path / name))


# ---------------------------------------------------------------------------------------------------------------------
# Language


def test_special_tokens_are_added_once_and_are_special(tmp_path: Path) -> None:
    for path in (GOLDEN / "common/tokenizer_base", LANGUAGE_MODEL):
        tokenizer = load_tokenizer(str(path), use_local_files=True)
        assert len(tokenizer) == 1003
        ids = tokenizer.convert_tokens_to_ids(["<|endofchunk|>", "<image>", "<PAD>"])
        assert ids == [1000, 1001, 1002]
        assert tokenizer.pad_token_id == 1002
        encoded = tokenizer("<image>a dog<|endofchunk|>").input_ids
        assert encoded[0] == 1001
        assert encoded[-1] == 1000
        assert tokenizer.decode(encoded, skip_special_tokens=True).strip() == "a dog"

    own = AutoTokenizer.from_pretrained(GOLDEN / "common/tokenizer_base")
    own.add_special_tokens({"pad_token": "<|endoftext|>"})
    own.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    assert (len(tokenizer), tokenizer.pad_token) == (1002, "<|endoftext|>")


@pytest.mark.parametrize("tied", [True, False])
def test_the_vocabulary_grows_but_never_shrinks(tied: bool, tmp_path: Path) -> None:
    language_model("llama", tied, vocab_size=1024).half().save_pretrained(tmp_path)
    model = load_language_model(str(tmp_path), vocabulary=1003)
    assert model.get_input_embeddings().weight.shape[0] == 1024
    assert model.dtype == torch.float32
    old = model.get_input_embeddings().weight.clone()
    model = load_language_model(str(tmp_path), vocabulary=1030)
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        assert module.weight.shape[0] == 1030
        assert 0.01 < module.weight[1024:].std() < 0.03  # N(0, initializer_range), as the reference's
    assert torch.equal(model.get_input_embeddings().weight[:1024], old)


def test_a_fresh_model_generates(tmp_path: Path) -> None:
    """From a tokenizer without the special tokens and a model without their rows, as a first-time user has them."""
    language_model("llama", True, vocab_size=1000, pad_token_id=None).save_pretrained(tmp_path)
    shutil.copytree(GOLDEN / "common/tokenizer_base", tmp_path, dirs_exist_ok=True)
    model, transform, tokenizer = create_model_and_transforms(
        str(CONFIG), str(WEIGHTS), str(tmp_path), cross_attn_every_n_layers=2, gradient_checkpointing=True
    )
    assert model.gradient_checkpointing
    assert (model.eoc_token_id, model.media_token_id, model.pad_token_id) == (1000, 1001, 1002)
    pictures = torch.stack([transform(Image.new("RGB", (40, 60), color)) for color in ("red", "blue")])
    prompt = tokenizer(["<image>a", "<image>a picture of"], return_tensors="pt", padding=True, padding_side="left")
    out = model.generate(pictures[:, None, None], prompt.input_ids, prompt.attention_mask, max_new_tokens=3)
    assert out.shape[0] == 2
