"""Both programs trained on the same batches from the same start: two loss curves."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.backbones import WEIGHTS, write_configs
from benchmarks.child import FOLDER, Child
from benchmarks.reference import install
from benchmarks.report import plot_path
from benchmarks.shapes import Shape, Text, gpt_neox

# How far losses may lie apart. At first it is rounding; then updates have amplified it until two runs of the same program on other
# numbers of threads are on paths of their own as well (the control), and only means can be compared.
TOGETHER, BOUND = 50, 1e-4  # updates, and their largest difference
WINDOW, MEANS_BOUND = 50, 0.1  # updates, and the largest difference of their means
CONTROL = "ours, another number of threads"
PRETRAINING = {"vision": 300, "language": 300}  # updates of the backbones
LEARNING_RATE = 1e-3
ROWS = {"laion": 8, "mmc4": 4}


def prepare(updates: int) -> Path:
    """Pretrains two small backbones on the demo's world, writes the demo's shards, and has our loader make the batches of `updates`
    updates. Returns the folder."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from open_flamingo.factory import load_vision_encoder
    from open_flamingo.scripts.demo import backbones as demo
    from open_flamingo.scripts.demo import pipeline
    from open_flamingo.scripts.demo import shards as demo_shards

    folder = FOLDER / "curve"
    if (folder / "batches.pt").exists() and len(torch.load(folder / "batches.pt")) >= updates:
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "language").mkdir(parents=True, exist_ok=True)
    tokenizer = demo.train_tokenizer(folder / "language")
    shape = Shape(
        "curve",
        demo.VISION_CONFIG["vision_cfg"],
        gpt_neox(128, 4, 4),
        vocabulary=len(tokenizer) + 3,
        laion=Text(ROWS["laion"], 32, 1, (1,)),
        mmc4=Text(ROWS["mmc4"], 256, 6, (3,)),
    )
    write_configs(folder, shape)
    torch.manual_seed(0)
    language_model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder / "language"))
    _pretrain(language_model, tokenizer, PRETRAINING["language"])
    language_model.save_pretrained(folder / "language")
    demo.pretrain_vision_tower(
        folder / "demo-vision.json", folder / "demo-vision.pt", PRETRAINING["vision"], pictures=2000
    )
    tower, _, _ = load_vision_encoder(str(folder / "demo-vision.json"), str(folder / "demo-vision.pt"))
    torch.save(weights_by_name(tower, language_model, "gpt_neox.layers"), folder / WEIGHTS)

    laion = demo_shards.write_laion(folder / "laion", pairs=2000, pairs_per_shard=125)
    download, _ = demo_shards.write_mmc4_download(folder / "mmc4-download", documents=1000)
    mmc4 = pipeline.convert(folder, str(download.parent))
    torch.save(list(draw_batches(folder, shape, laion, mmc4, updates)), folder / "batches.pt")
    return folder


def _pretrain(model: nn.Module, tokenizer: Any, updates: int) -> None:
    """On texts of the demo's world."""
    from open_flamingo.scripts.demo.backbones import END_OF_TEXT, draw_text

    rng = random.Random("curve")
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(updates):
        texts = [END_OF_TEXT + draw_text(rng) + END_OF_TEXT for _ in range(16)]
        rows = [torch.tensor(ids) for ids in tokenizer(texts)["input_ids"]]
        inputs = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        labels = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100)
        logits = model(input_ids=inputs).logits
        F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()


def weights_by_name(tower: nn.Module, language_model: nn.Module, layers: str) -> dict[str, Tensor]:
    """The backbones' weights under the names that both programs give them, and gates that start shut, as they do.

    `layers`: where the language model's decoder layers are.
    """
    weights = {f"vision_encoder.{name}": value for name, value in tower.state_dict().items()}
    for name, value in language_model.state_dict().items():
        if name.startswith(f"{layers}."):
            index, _, rest = name.removeprefix(f"{layers}.").partition(".")
            name = f"{layers}.{index}.decoder_layer.{rest}"
        weights[f"lang_encoder.{name}"] = value
    for number in range(len(list(language_model.get_submodule(layers).children()))):
        for gate in ("attn_gate", "ff_gate"):
            weights[f"lang_encoder.{layers}.{number}.gated_cross_attn_layer.{gate}"] = torch.zeros(1)
    return weights


def draw_batches(
    folder: Path, shape: Shape, laion: str, mmc4: str, updates: int
) -> Iterator[dict[str, dict[str, Tensor]]]:
    """Of our loader, in the form of `shapes.draw_batches`."""
    import open_clip

    from open_flamingo.factory import load_tokenizer
    from open_flamingo.scripts.demo.documents import THRESHOLD
    from open_flamingo.train.data.loader import build_loader
    from open_flamingo.train.data.options import DataOptions

    tokenizer = load_tokenizer(str(folder / "language"), use_local_files=True)
    image_processor = open_clip.image_transform(shape.vision["image_size"], is_train=False)
    loaders = {
        kind: build_loader(
            DataOptions(kind, shards, ROWS[kind], workers=0, mmc4_textsim_threshold=THRESHOLD),
            tokenizer,
            image_processor,
        )
        for kind, shards in (("laion", laion), ("mmc4", mmc4))
    }
    for _ in range(updates):
        batches = {kind: next(loader) for kind, loader in loaders.items()}
        yield {
            kind: {
                "images": batch.images,
                "input_ids": batch.input_ids,
                "image_counts": torch.tensor(batch.image_counts),
            }
            for kind, batch in batches.items()
        }


def measure(updates: int, only_ours: bool) -> dict[str, list[list[float]]]:
    """Program → LAION's and MMC4's loss of each update, in float32.

    Raises ValueError where the programs' lie further apart than the bounds above allow.
    """
    folder = prepare(updates)
    threads = torch.get_num_threads()
    cases = {"ours": threads, CONTROL: 1 if threads > 1 else 2}
    if not only_ours:
        install()
        cases = {"reference": threads} | cases
    losses = {}
    for name, number in cases.items():
        program = "reference" if name == "reference" else "ours"
        flags = [f"--learning_rate={LEARNING_RATE}"]
        with Child(program, str(folder), *flags, environment={"OMP_NUM_THREADS": str(number)}) as child:
            losses[name] = child.ask("losses", count=updates)
    if not only_ours:
        apart, means_apart = differences(losses, "reference")
        if not (apart <= BOUND and means_apart <= MEANS_BOUND):
            raise ValueError(f"the losses lie {apart:.1e} apart at first, their means {means_apart:.1e}")
    return losses


def differences(losses: dict[str, list[list[float]]], other: str) -> tuple[float, float]:
    """The most that our losses and those of `other` lie apart in the first `TOGETHER` updates; and that their means over any
    `WINDOW` updates, one window after the other, do."""
    ours, others = (torch.tensor(losses[name]) for name in ("ours", other))
    apart = (ours - others)[:TOGETHER].abs().max().item()
    means = [
        (ours - others)[start : start + WINDOW].mean(0).abs().max().item() for start in range(0, len(ours), WINDOW)
    ]
    return apart, max(means)


def describe(losses: dict[str, list[list[float]]]) -> str:
    updates = len(losses["ours"])
    means = {name: [sum(pair) / len(pair) for pair in zip(*values[-10:])] for name, values in losses.items()}
    ends = "; ".join(f"{name} LAION {pair[0]:.3f}, MMC4 {pair[1]:.3f}" for name, pair in means.items())
    text = (
        f"{updates} updates of {ROWS['laion']} pairs and {ROWS['mmc4']} documents of the demo's world, made by our loader and fed to both; "
        f"float32, learning rate {LEARNING_RATE}, small pretrained backbones (ViT 2 × 64, GPT-NeoX 4 × 128), gates from 0. Means of "
        f"the last ten updates: {ends}."
    )
    for name, words in (("reference", "the reference's"), (CONTROL, f"those of {CONTROL},")):
        if name in losses:
            apart, means_apart = differences(losses, name)
            text += (
                f" Our losses and {words} lie at most {apart:.1e} apart in the first {TOGETHER} updates, and their means over "
                f"{WINDOW} updates at most {means_apart:.1e} in all."
            )
    text += f" Bounds: {BOUND:.0e} and {MEANS_BOUND}. What parts them later is rounding, amplified by every update."
    return text


def plot(losses: dict[str, list[list[float]]], document: Path) -> str | None:
    """The curves, and how far they lie apart, as an image beside `document`; None without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(9, 5), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    for index, kind in enumerate(("LAION", "MMC4")):
        for name, style in (("reference", "-"), ("ours", "--")):
            if name in losses:
                line = [pair[index] for pair in losses[name]]
                upper.plot(line, style, label=f"{kind}, {name}", linewidth=3 if style == "-" else 1.2)
        for name, style in (("reference", "-"), (CONTROL, ":")):
            if name in losses:
                apart = [abs(a[index] - b[index]) for a, b in zip(losses[name], losses["ours"])]
                lower.semilogy([max(value, 1e-8) for value in apart], style, label=f"{kind}, {name}")
    upper.set_ylabel("loss")
    upper.legend(fontsize=8)
    lower.set_ylabel("difference to ours")
    lower.legend(fontsize=6)
    lower.set_xlabel("update")
    path = plot_path("curve", document)
    figure.savefig(path)
    return path.name
