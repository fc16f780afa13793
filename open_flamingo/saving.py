"""What `Flamingo.save_pretrained` writes, and `pretrained.load` reads.

    model.safetensors   what was trained, and what else a checkpoint of the reference holds, under its names
    config.json         what builds the model: backbones, spacing, tokens; and the run that trained it
    tokenizer/          with the added tokens
    README.md           the model card

The frozen backbones are named, not copied.
"""

import json
import os
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file

from .weights import head_name, heads_are_tied, trained_tensors

if TYPE_CHECKING:
    from .flamingo import Flamingo

WEIGHTS, CONFIG, TOKENIZER = "model.safetensors", "config.json", "tokenizer"
KIND = "open_flamingo"  # in a config of ours, its model_type

CARD = """---
{header}
---

# {name}

An OpenFlamingo vision-language model: the vision encoder {vision} and the language model {language}, both frozen, joined by a Perceiver
resampler and gated cross-attention before {layers}. `{weights}` holds what was trained; the backbones come from
where they were published.

```python
from PIL import Image
from open_flamingo import load

model, image_processor, tokenizer = load("{name}")
image = image_processor(Image.open("image.jpg").convert("RGB"))[None, None, None]  # batch, images, frames, channels, height, width
prompt = tokenizer(["<image>"], return_tensors="pt")
device = next(model.parameters()).device
prompt = prompt.to(device)
text = model.generate(image.to(device), prompt["input_ids"], prompt["attention_mask"], max_new_tokens=30)
print(tokenizer.decode(text[0], skip_special_tokens=True))
```
"""


@dataclass
class Origin:
    """What a model was made of."""

    settings: dict[str, Any]  # what `load` would need: `vision_encoder_path`, `lm_path`, …
    tokenizer: Any
    training: dict[str, Any] = field(default_factory=dict)  # of its run: flags, updates, epochs, validation, versions


def origin_of(model: "Flamingo") -> Origin:
    """Raises ValueError where it is not known, or a saved model could not be made again."""
    if model.origin is None:
        raise ValueError(
            "this model was not built by create_model_and_transforms or load: what it was made of is not known"
        )
    if not made_of_weights(model.origin.settings):
        raise ValueError(
            "clip_vision_encoder_pretrained is empty: this vision encoder has random weights, which a saved model does not hold"
        )
    return model.origin


def made_of_weights(settings: dict[str, Any]) -> bool:
    """Whether the vision encoder has weights that can be found again."""
    brings = str(settings.get("vision_encoder_path")).startswith(("hf-hub:", "local-dir:"))
    return brings or bool(settings.get("vision_encoder_pretrained"))


def save(model: "Flamingo", folder: Path) -> None:
    """Writes all but the model card. Raises ValueError as `origin_of` does."""
    origin = origin_of(model)
    tied = head_name(model) if heads_are_tied(model.lang_encoder) else None  # stored once, as the embedding
    tensors = {name: tensor.contiguous() for name, tensor in trained_tensors(model) if name != tied}
    save_file(tensors, folder / f".{WEIGHTS}", metadata={"format": "pt"})
    os.replace(folder / f".{WEIGHTS}", folder / WEIGHTS)
    if not brings_code(origin.tokenizer):
        origin.tokenizer.save_pretrained(folder / TOKENIZER)
    tokens = {"<|endofchunk|>": model.eoc_token_id, "<image>": model.media_token_id}
    config = {"model_type": KIND, **origin.settings, "tokens": tokens, "training": origin.training}
    (folder / CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False, default=str) + "\n", encoding="utf-8")


def brings_code(tokenizer: Any) -> bool:
    """Whether the tokenizer is a class of the hub: code is not copied, and not run out of a saved model."""
    return "auto_map" in getattr(tokenizer, "init_kwargs", {})


def card(model: "Flamingo", name: str = "path/or/name") -> str:
    """The model card, in Markdown: how to use it, and, of what `load` knows of its training, data, validation and flags."""
    origin = origin_of(model)
    settings, training = origin.settings, origin.training
    header = {"library_name": KIND, "pipeline_tag": "image-text-to-text", "tags": [KIND, "vision-language"]}
    if not Path(settings["lm_path"]).is_absolute() and not Path(settings["lm_path"]).exists():
        header["base_model"] = settings["lm_path"]
    every = settings["cross_attn_every_n_layers"]
    pretrained = settings["vision_encoder_pretrained"]
    text = CARD.format(
        header="\n".join(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in header.items()),
        name=name,
        vision=f"`{settings['vision_encoder_path']}`" + (f" (`{pretrained}`)" if pretrained else ""),
        language=f"`{settings['lm_path']}`",
        layers="every decoder layer" if every == 1 else f"one in {every} decoder layers",
        weights=WEIGHTS,
    )
    flags = training.get("flags", {})
    shards = {kind: flags[f"{kind}_shards"] for kind in ("laion", "mmc4") if flags.get(f"{kind}_shards")}
    if shards:
        text += "\n## Data\n\n" + "".join(f"- {kind}: `{value}`\n" for kind, value in shards.items())
    if "updates" in training:
        text += f"\n{training['updates']:,} updates, {training['epochs']:,} epochs.\n"
    if figures := training.get("validation"):
        text += f"\n## Validation after update {figures['step']:,}\n\n| | nats per token |\n|---|---|\n"
        text += "".join(
            f"| {key} | {value:.4f} |\n"
            for key, value in figures.items()
            if key not in ("step", "seconds_validating") and isinstance(value, float)
        )
    if flags:
        lines = (
            f"--{key}" + ("" if value is True else f" {shlex.quote(str(value))}")
            for key, value in sorted(flags.items())
            if value not in (None, False)
        )
        text += "\n## Flags of the training\n\n````\n" + "\n".join(lines) + "\n````\n"
    return text
