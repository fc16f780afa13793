"""`open_flamingo.load` and `save_pretrained`: the model that was trained comes back bit for bit, from all that a checkpoint can be."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi
from safetensors.torch import load_file

import open_flamingo.train.loop as loop
from open_flamingo import Flamingo, create_model_and_transforms, load, pretrained
from open_flamingo.train.train import main
from tests.test_hostile import Hostile, save_hostile
from tests.test_model_factory import LANGUAGE_MODEL
from tests.tiny import assert_same


def outputs(model: Flamingo, tokenizer: Any) -> dict[str, torch.Tensor]:
    """Logits of a text with two images, and what is generated after it."""
    images = torch.randn(1, 2, 1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    ids = tokenizer("<image>a red fox<|endofchunk|><image>a", return_tensors="pt").input_ids
    with torch.no_grad():
        logits = model.eval()(images, ids).logits
    return {"logits": logits, "text": model.generate(images, ids, max_new_tokens=5)}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, backbones: list[str], shards: dict[str, str]) -> dict[str, Any]:
    """Two updates, their checkpoints as a file and sharded, and what the trained model itself computes."""
    folder = tmp_path_factory.mktemp("trained")
    data = [f"--laion_shards={shards['laion']}", f"--val_laion_shards={shards['laion']}", "--val_samples=8"]
    size = ["--batch_size_laion=4", "--train_num_samples_laion=8", "--learning_rate=1e-1", "--warmup_steps=1"]
    flags = [*backbones, *data, *size, "--workers=0", "--logging_steps=1", "--train_output_rows"]
    built: list[Any] = []
    build = loop.model_from_flags

    def listening(*args: Any, **kwargs: Any) -> Any:
        built[:] = build(*args, **kwargs)
        return tuple(built)

    loop.model_from_flags = listening  # type: ignore[assignment]
    try:
        main([*flags, f"--run_name={folder / 'sharded'}", "--checkpoint_format=sharded"])
        main([*flags, f"--run_name={folder / 'run'}"])
    finally:
        loop.model_from_flags = build  # type: ignore[assignment]
    model, _, tokenizer = built
    return {"folder": folder, "outputs": outputs(model, tokenizer)}


@pytest.mark.parametrize("name", ["run/checkpoint_0.pt", "sharded/checkpoint_0", "run", "sharded"])
def test_a_checkpoint_gives_the_trained_model(name: str, trained: dict[str, Any]) -> None:
    model, image_processor, tokenizer = load(trained["folder"] / name, device="cpu")
    assert not model.training
    assert tokenizer.padding_side == "left"
    assert "Normalize" in str(image_processor)
    assert_same(outputs(model, tokenizer), trained["outputs"])


def test_saved_loaded_and_saved_again(trained: dict[str, Any], tmp_path: Path) -> None:
    model, _, _ = load(trained["folder"] / "run", device="cpu")
    model.save_pretrained(tmp_path / "saved")
    again, _, tokenizer = load(tmp_path / "saved", device="cpu")
    assert_same(outputs(again, tokenizer), trained["outputs"])
    only_model = Flamingo.from_pretrained(tmp_path / "saved", device="cpu")
    assert_same(outputs(only_model, tokenizer), trained["outputs"])
    again.save_pretrained(tmp_path / "again")
    for name in ("config.json", "README.md", "model.safetensors"):
        assert (tmp_path / "saved" / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name

    config = json.loads((tmp_path / "saved/config.json").read_text())
    assert config["cross_attn_every_n_layers"] == 1
    assert config["train_output_rows"] is True
    assert config["tokens"] == {"<|endofchunk|>": model.eoc_token_id, "<image>": model.media_token_id}
    assert "trust_remote_code" not in json.dumps(config)
    names = load_file(tmp_path / "saved/model.safetensors")
    assert not [name for name in names if name.startswith("vision_encoder")]

    card = (tmp_path / "saved/README.md").read_text()
    last = [json.loads(line) for line in (trained["folder"] / "run/metrics.jsonl").read_text().splitlines()][-1]
    assert f"| val_loss_laion | {last['val_loss_laion']:.4f} |" in card
    for part in ("## Data", "laion-{000000..000002}.tar", "--learning_rate 0.1", "--train_output_rows\n", "2 updates"):
        assert part in card


def test_push_to_hub_uploads_what_is_saved(
    trained: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def create_repo(self: HfApi, repo_id: str, **kwargs: Any) -> Any:
        return type("Repo", (), {"repo_id": repo_id})

    def upload_folder(self: HfApi, folder_path: Path, **kwargs: Any) -> str:
        shutil.copytree(folder_path, tmp_path / "hub")
        return "url"

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    model, _, _ = load(trained["folder"] / "run", device="cpu")
    assert model.push_to_hub("someone/fox") == "url"
    assert 'load("someone/fox")' in (tmp_path / "hub/README.md").read_text()

    def snapshot_download(name: str, **kwargs: Any) -> str:
        assert name == "someone/fox"
        return str(tmp_path / "hub")

    monkeypatch.setattr(pretrained, "snapshot_download", snapshot_download)
    model, _, tokenizer = load("someone/fox", device="cpu")
    assert_same(outputs(model, tokenizer), trained["outputs"])


def test_precision(trained: dict[str, Any]) -> None:
    model, _, tokenizer = load(trained["folder"] / "run", "cpu", torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    logits = outputs(model, tokenizer)["logits"].float()
    assert (logits - trained["outputs"]["logits"]).abs().max() < 0.1


def test_what_has_moved_is_named_and_can_be_given(
    trained: dict[str, Any], tmp_path: Path, backbones: list[str]
) -> None:
    where = dict(flag.removeprefix("--").split("=") for flag in backbones if "=" in flag)
    checkpoint = torch.load(trained["folder"] / "run/checkpoint_0.pt", weights_only=True)
    checkpoint["flags"] |= {"lm_path": "/gone/lm", "vision_encoder_pretrained": "/gone/vision.pt"}
    torch.save(checkpoint, tmp_path / "moved.pt")
    with pytest.raises(FileNotFoundError, match=r"vision.pt.*moved\.pt records it: pass vision_encoder_pretrained="):
        load(tmp_path / "moved.pt")
    vision = where["vision_encoder_pretrained"]
    with pytest.raises(FileNotFoundError, match=r"^lm_path.*'/gone/lm'.*moved\.pt records it: pass lm_path="):
        load(tmp_path / "moved.pt", vision_encoder_pretrained=vision)
    with pytest.raises(FileNotFoundError, match=r"^lm_path: there is no folder '/not/here/lm'[^.]*$"):
        load(tmp_path / "moved.pt", vision_encoder_pretrained=vision, lm_path="/not/here/lm")
    model, _, tokenizer = load(tmp_path / "moved.pt", "cpu", vision_encoder_pretrained=vision, lm_path=where["lm_path"])
    assert_same(outputs(model, tokenizer), trained["outputs"])


def test_bare_weights_need_to_be_told(trained: dict[str, Any], tmp_path: Path, backbones: list[str]) -> None:
    where: dict[str, Any] = dict(flag.removeprefix("--").split("=") for flag in backbones if "=" in flag)
    whole = torch.load(trained["folder"] / "run/checkpoint_0.pt", weights_only=True)
    bare = whole["model_state_dict"]
    for name, contents in (("bare", bare), ("reference", {"epoch": 0, "model_state_dict": bare})):
        torch.save(contents, tmp_path / f"{name}.pt")
        lacking = "cross_attn_every_n_layers, lm_path, vision_encoder_path, vision_encoder_pretrained"
        with pytest.raises(ValueError, match=rf"{name}\.pt does not record what .*: pass {lacking}$"):
            load(tmp_path / f"{name}.pt")
        model, _, tokenizer = load(tmp_path / f"{name}.pt", "cpu", **where, cross_attn_every_n_layers=1)
        assert_same(outputs(model, tokenizer), trained["outputs"])
    with pytest.raises(ValueError, match=r"bare\.pt is of another model\. Compare lm_path.*1 parameters|parameters do"):
        load(tmp_path / "bare.pt", **where, cross_attn_every_n_layers=2)
    with pytest.raises(ValueError, match=r"bare\.pt is of another model.* has shape"):
        load(tmp_path / "bare.pt", **where | {"lm_path": str(LANGUAGE_MODEL)}, cross_attn_every_n_layers=1)


def test_the_tokens_must_be_those_of_the_training(trained: dict[str, Any], tmp_path: Path) -> None:
    model, _, _ = load(trained["folder"] / "run", device="cpu")
    model.save_pretrained(tmp_path / "saved")
    other = tmp_path / "other"
    shutil.copytree(tmp_path / "saved/tokenizer", other)
    config = json.loads((tmp_path / "saved/config.json").read_text())
    config["tokens"]["<image>"] += 1
    (tmp_path / "saved/config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"saved was trained with <image> as token \d+, which this tokenizer has not"):
        load(tmp_path / "saved", tokenizer_path=str(other))


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_a_hostile_checkpoint_is_refused(zipped: bool, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    path = save_hostile(tmp_path / "run/checkpoint_0.pt", mark, {"model_state_dict": {}, "flags": {}}, zipped)
    with pytest.raises(ValueError, match=r"checkpoint_0\.pt cannot be read as a checkpoint"):
        load(path)
    with pytest.raises(ValueError, match="run holds no checkpoint that can be read"):
        load(tmp_path / "run")
    assert not mark.exists()


def test_no_code_of_a_saved_folder_runs(trained: dict[str, Any], tmp_path: Path) -> None:
    """Not even where the language model's is trusted."""
    model, _, _ = load(trained["folder"] / "run", device="cpu")
    folder = tmp_path / "saved"
    model.save_pretrained(folder)
    mark = tmp_path / "mark"
    (folder / "tokenizer/code.py").write_text(f"open({str(mark)!r}, 'w')\n")
    config = json.loads((folder / "tokenizer/tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "Hostile", "auto_map": {"AutoTokenizer": ["code.Hostile", "code.Hostile"]}}
    (folder / "tokenizer/tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="tokenizer_path"):
        load(folder, device="cpu", trust_remote_code=True)
    assert not mark.exists()

    shutil.rmtree(folder / "tokenizer")
    saved = json.loads((folder / "config.json").read_text()) | {"lm_path": str(folder / "lm")}
    (folder / "config.json").write_text(json.dumps(saved))
    with pytest.raises(ValueError, match="saved names itself as lm_path, and code of a checkpoint is not run"):
        load(folder, device="cpu", trust_remote_code=True)

    torch.save({"more": Hostile(mark)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"saved: its model\.safetensors cannot be read"):
        load(folder)
    assert not mark.exists()


def test_released_models_are_known_by_name(
    trained: dict[str, Any], tmp_path: Path, backbones: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    where: dict[str, Any] = dict(flag.removeprefix("--").split("=") for flag in backbones if "=" in flag)
    whole = torch.load(trained["folder"] / "run/checkpoint_0.pt", weights_only=True)
    torch.save({f"module.{name}": tensor for name, tensor in whole["model_state_dict"].items()}, tmp_path / "released")
    asked: list[Any] = []

    def download(repo: str, file: str, **kwargs: Any) -> str:
        asked.append((repo, file, kwargs))
        return str(tmp_path / "released")

    class Stop(Exception):
        pass

    def create(*args: Any, **kwargs: Any) -> None:
        asked.append((args, kwargs["cross_attn_every_n_layers"]))
        raise Stop

    monkeypatch.setattr(pretrained, "hf_hub_download", download)
    name = "openflamingo/OpenFlamingo-3B-vitl-mpt1b"
    model, _, tokenizer = load(name, "cpu", **where, use_local_files=True)
    assert asked == [(name, "checkpoint.pt", {"cache_dir": None, "local_files_only": True})]
    assert_same(outputs(model, tokenizer), trained["outputs"])

    monkeypatch.setattr(pretrained, "create_model_and_transforms", create)
    made_of = {}
    for name in pretrained.RELEASED:
        with pytest.raises(Stop):
            load(name)
        (vision, weights, language_model, tokenizer_path), every = asked[-1]
        assert (vision, weights, tokenizer_path) == ("ViT-L-14", "openai", None)
        made_of[name.removeprefix("openflamingo/OpenFlamingo-")] = (language_model, every)
    assert made_of["9B-vitl-mpt7b"] == ("anas-awadalla/mpt-7b", 4)
    assert made_of["4B-vitl-rpj3b-langinstruct"] == ("togethercomputer/RedPajama-INCITE-Instruct-3B-v1", 2)


def test_what_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    for wrong in ("nowhere", str(tmp_path / "nowhere.pt"), "~/run"):
        with pytest.raises(FileNotFoundError, match=rf"there is no checkpoint '{wrong}': give"):
            load(wrong)
    with pytest.raises(FileNotFoundError, match="'runs/mine' here, and the Hugging Face hub does not give it: "):
        load("runs/mine", use_local_files=True, cache_dir=str(tmp_path / "cache"))
    (tmp_path / "text.pt").write_text("no checkpoint")
    with pytest.raises(ValueError, match=r"text\.pt cannot be read as a checkpoint"):
        load(tmp_path / "text.pt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds no checkpoint that can be read"):
        load(tmp_path / "empty")
    torch.save({"model_state_dict": {}, "flags": {"lm_path": ["a"]}}, tmp_path / "flags.pt")
    with pytest.raises(ValueError, match=r"flags\.pt: lm_path is recorded as \['a'\]"):
        load(tmp_path / "flags.pt")
    (tmp_path / "empty/config.json").write_text('{"model_type": "opt"}')
    with pytest.raises(ValueError, match=r"empty: its config\.json is not one that save_pretrained wrote: 'opt'"):
        load(tmp_path / "empty")


def test_what_cannot_be_made_again_is_not_saved(tmp_path: Path, backbones: list[str]) -> None:
    where = dict(flag.removeprefix("--").split("=") for flag in backbones if "=" in flag)
    model, _, _ = create_model_and_transforms(where["vision_encoder_path"], None, where["lm_path"])
    with pytest.raises(ValueError, match="clip_vision_encoder_pretrained is empty"):
        model.save_pretrained(tmp_path)
    model.origin = None
    with pytest.raises(ValueError, match="what it was made of is not known"):
        model.save_pretrained(tmp_path)
