"""The model against numbers of the reference (open-flamingo 2.0.1); tests/golden is described where it came from:
logits and losses to 2e-5, gradients to 1e-4 relative, parameters after five AdamW steps to 1e-4."""

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from open_flamingo import Flamingo, create_model_and_transforms
from open_flamingo.vision import patch_tokens
from open_flamingo.weights import reference_parameter_names, trained_tensors

GOLDEN = Path(__file__).parent / "golden"
PAD = 1002
NEW_TOKENS = [1000, 1001]
MODELS = [(lm, every) for lm in ("opt", "gpt_neox") for every in (1, 2)]
# The logits that are stored: all of them would be too large.
COLUMNS = [*range(100), 1000, 1001, 1002]


@cache
def tensors(name: str) -> dict[str, Tensor]:
    return load_file(GOLDEN / f"{name}.safetensors")


def outputs(lm: str, every: int) -> dict[str, Tensor]:
    return tensors(f"model/{lm}/every{every}/outputs")


@cache
def keys(lm: str, every: int) -> dict:
    return json.loads((GOLDEN / f"model/{lm}/every{every}/keys.json").read_text())


def build(lm: str, every: int, **kwargs) -> Flamingo:
    """The model of the goldens, through the factory as a user would."""
    model, _, _ = create_model_and_transforms(
        str(GOLDEN / "common/vision_config_open_clip.json"),
        str(GOLDEN / "common/vision.safetensors"),
        str(GOLDEN / f"model/{lm}/lm"),
        cross_attn_every_n_layers=every,
        use_local_files=True,
        **kwargs,
    )
    model.perceiver.load_state_dict(tensors("common/perceiver_init"))
    gated = [layer.gated_cross_attn_layer for layer in model.decoder_layers]
    assert [block is not None for block in gated] == [(i + 1) % every == 0 for i in range(2)]
    for index, block in enumerate(gated):
        if block is not None:
            prefix = f"layer{index}."
            values = tensors("common/xattn_init").items()
            block.load_state_dict({name.removeprefix(prefix): v for name, v in values if name.startswith(prefix)})
    return model


def inputs(batch: str) -> dict[str, Tensor]:
    """A stored batch; images are stored at 1/8 of their size."""
    stored = tensors("common/inputs")
    small = stored[f"{batch}.vision_small"]
    named = {"vision_x": small.repeat_interleave(8, -1).repeat_interleave(8, -2).unsqueeze(2)}
    for theirs, ours in (("input_ids", "lang_x"), ("attention_mask", "attention_mask"), ("labels", "labels")):
        if f"{batch}.{theirs}" in stored:
            named[ours] = stored[f"{batch}.{theirs}"]
    return named


def logits_of(model: Flamingo, batch: str) -> Tensor:
    given = inputs(batch)
    given.pop("labels", None)
    with torch.no_grad():
        return model(**given).logits


def assert_logits(logits: Tensor, golden: dict[str, Tensor], name: str, mask: Tensor | None = None) -> None:
    real = torch.ones(logits.shape[:2], dtype=torch.bool) if mask is None else mask == 1
    torch.testing.assert_close(logits[..., COLUMNS][real], golden[f"{name}_cols"][real], atol=2e-5, rtol=0)
    torch.testing.assert_close(logits.logsumexp(-1)[real], golden[f"{name}_lse"][real], atol=2e-5, rtol=0)
    assert torch.equal(logits.argmax(-1)[real].int(), golden[f"{name}_argmax"][real])


def digest(tensor: Tensor) -> Tensor:
    """(‖t‖, Σt, Σ t·cos(.37 i), Σ t·sin(.011 i + .5)): four numbers that any change of a tensor moves."""
    t = tensor.detach().double().flatten()
    i = torch.arange(len(t), dtype=torch.float64)
    return torch.stack([t.norm(), t.sum(), (t * torch.cos(0.37 * i)).sum(), (t * torch.sin(0.011 * i + 0.5)).sum()])


def assert_digest(tensor: Tensor, golden: Tensor) -> None:
    """A digest's sums cancel, so their error is measured against the norm."""
    scale = golden[0].abs() * max(1, tensor.numel()) ** 0.5
    error = (digest(tensor) - golden).abs()
    assert error[0] <= 1e-4 * golden[0] + 1e-9
    assert bool((error[1:] <= 1e-4 * scale + 1e-9).all())


# ---------------------------------------------------------------------------------------------------------------------
# Forward


@pytest.mark.parametrize("config", ["vision_config_open_clip", "vision_config_open_clip_preln"])
def test_features_are_before_the_final_norm_whatever_the_config(config: str) -> None:
    model, _, _ = create_model_and_transforms(
        str(GOLDEN / f"common/{config}.json"),
        str(GOLDEN / "common/vision.safetensors"),
        str(GOLDEN / "model/gpt_neox/lm"),
        use_local_files=True,
    )
    model.perceiver.load_state_dict(tensors("common/perceiver_init"))
    golden = outputs("gpt_neox", 1)
    for batch in ("mmc4.0", "laion.0"):
        images = inputs(batch)["vision_x"]
        features = patch_tokens(model.vision_encoder, images.flatten(0, 2)).unflatten(0, images.shape[:3])
        torch.testing.assert_close(features, golden[f"{batch}.vision_tokens"], atol=2e-5, rtol=0)
        with torch.no_grad():
            latents = model.perceiver(features)
        torch.testing.assert_close(latents, golden[f"{batch}.perceiver"], atol=2e-5, rtol=0)


@pytest.mark.parametrize(("lm", "every"), MODELS)
def test_logits(lm: str, every: int) -> None:
    model, golden = build(lm, every), outputs(lm, every)
    for batch in ("mmc4.0", "laion.0"):
        mask = inputs(batch)["attention_mask"]
        logits = logits_of(model, batch)
        if f"{batch}.logits" in golden:
            torch.testing.assert_close(logits[mask == 1], golden[f"{batch}.logits"][mask == 1], atol=2e-5, rtol=0)
        else:
            assert_logits(logits, golden, f"{batch}.logits", mask)


class AfterFinalNorm(nn.Module):
    """What OpenCLIP 3 returns by default: tokens after `ln_post`."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros(()), self.tower.ln_post(patch_tokens(self.tower, images))


@pytest.mark.parametrize(("lm", "every"), MODELS)
def test_logits_with_a_tower_that_gives_its_own_tokens(lm: str, every: int) -> None:
    model, golden = build(lm, every), outputs(lm, every)
    model.vision_encoder = AfterFinalNorm(model.vision_encoder)
    for batch in ("mmc4.0", "laion.0"):
        assert_logits(logits_of(model, batch), golden, f"postln.{batch}.logits", inputs(batch)["attention_mask"])


@pytest.mark.parametrize(("lm", "every"), MODELS)
def test_more_image_tokens_than_slots_is_an_error(lm: str, every: int) -> None:
    """The reference's `overflow.*` attends to everything, without a word."""
    model = build(lm, every)
    with pytest.raises(ValueError, match="row 0 has 4 <image> tokens but only 3 image slots"):
        model(**inputs("overflow"))
    with pytest.raises(ValueError, match="row 0 has 4 <image> tokens"):
        model.generate(**inputs("overflow"), max_new_tokens=1)


@pytest.mark.parametrize(("lm", "every"), MODELS)
def test_cached_media(lm: str, every: int) -> None:
    model, golden, stored = build(lm, every), outputs(lm, every), tensors("common/inputs")
    context, continuation = stored["cache.context_ids"], stored["cache.continuation_ids"]
    images = inputs("cache")["vision_x"]
    with torch.no_grad():
        assert_logits(model(images, context).logits, golden, "cache.context_logits")
        model.cache_media(context, images)
        cached = model(None, context, use_cache=True)
        assert_logits(cached.logits, golden, "cache.context_logits")
        logits = model(None, continuation, past_key_values=cached.past_key_values).logits
        assert_logits(logits, golden, "cache.continuation_logits")
        model.uncache_media()
    with pytest.raises(ValueError, match="cache_media"):
        model(None, continuation)


# ---------------------------------------------------------------------------------------------------------------------
# Generation


@pytest.mark.parametrize(("lm", "every"), MODELS)
@pytest.mark.parametrize("use_cache", [True, False])
def test_generation(lm: str, every: int, use_cache: bool) -> None:
    model, golden, given = build(lm, every), outputs(lm, every), inputs("gen")
    kwargs = {"max_new_tokens": 12, "pad_token_id": PAD, "use_cache": use_cache}
    for beams in (1, 3):
        expected = golden[f"gen.beams{beams}"]
        assert torch.equal(model.generate(**given, num_beams=beams, **kwargs), expected)
    first = {name: tensor[:1] for name, tensor in given.items()}
    assert torch.equal(model.generate(**first, **kwargs), golden["gen.row0_only"])


# ---------------------------------------------------------------------------------------------------------------------
# Training


def optimizer_of(model: Flamingo) -> torch.optim.AdamW:
    decay = [p for name, p in model.named_parameters() if p.requires_grad and "gated_cross_attn" in name]
    rest = [p for name, p in model.named_parameters() if p.requires_grad and "gated_cross_attn" not in name]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.999), eps=1e-8)


def train_five_steps(model: Flamingo) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    """The gradients of the first step, and losses and norms of all."""
    optimizer, history, gradients = optimizer_of(model), [], {}
    model.train()
    for step in range(5):
        laion, mmc4 = model(**inputs(f"laion.{step}")).loss, model(**inputs(f"mmc4.{step}")).loss
        (0.2 * laion + mmc4).backward()
        if step == 0:
            gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        norm = nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        history.append({"loss_laion": laion.item(), "loss_mmc4": mmc4.item(), "grad_norm": norm.item()})
        optimizer.step()
        optimizer.zero_grad()
    return gradients, history


@pytest.mark.parametrize(("lm", "every"), MODELS)
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_five_training_steps(lm: str, every: int, gradient_checkpointing: bool) -> None:
    golden, embedding = outputs(lm, every), keys(lm, every)["embedding_param"][0]
    model = build(lm, every, gradient_checkpointing=gradient_checkpointing)
    before = dict(trained_tensors(model))[embedding].clone()
    gradients, history = train_five_steps(model)

    for name in ("loss_laion", "loss_mmc4"):
        values = torch.tensor([step[name] for step in history])
        torch.testing.assert_close(values, golden[f"train.{name}"], atol=2e-5, rtol=0)
    norms = torch.tensor([step["grad_norm"] for step in history], dtype=torch.float64)
    torch.testing.assert_close(norms, golden["train.grad_norm"], atol=0, rtol=1e-4)

    # Gradients. The reference's embedding gradient is of the full matrix, all rows but the new tokens' masked to 0.
    names = reference_parameter_names(model)
    assert names.keys() == gradients.keys()
    for name, gradient in gradients.items():
        theirs = names[name]
        if theirs == embedding:
            full = torch.zeros_like(before)
            full[NEW_TOKENS] = gradient
            torch.testing.assert_close(
                full[1000:1003], golden[f"grad_embed_rows_1000_1003.{theirs}"], atol=1e-7, rtol=1e-4
            )
            gradient = full
        assert_digest(gradient, golden[f"grad_digest.{theirs}"])
        if f"grad.{theirs}" in golden:
            expected = golden[f"grad.{theirs}"]
            torch.testing.assert_close(gradient, expected, atol=1e-4 * expected.abs().max().item(), rtol=1e-4)

    after = dict(trained_tensors(model))
    for name in names.values():
        assert_digest(after[name], golden[f"after5_digest.{name}"])
        if f"after5.{name}" in golden:
            torch.testing.assert_close(after[name], golden[f"after5.{name}"], atol=1e-4, rtol=0)
    rows = after[embedding][1000:1003]
    torch.testing.assert_close(rows, golden[f"after5_embed_rows_1000_1003.{embedding}"], atol=1e-4, rtol=0)
    others = [i for i in range(len(before)) if i not in NEW_TOKENS]
    assert torch.equal(after[embedding][others], before[others])


# ---------------------------------------------------------------------------------------------------------------------
# Names


@pytest.mark.parametrize(("lm", "every"), MODELS)
def test_names_are_the_references(lm: str, every: int) -> None:
    model, golden = build(lm, every), keys(lm, every)
    assert list(reference_parameter_names(model).values()) == golden["named_parameters_trainable"]
    decayed = [name for name in reference_parameter_names(model).values() if "gated_cross_attn" in name]
    assert decayed == golden["weight_decay_group"]
    assert f"{model.decoder_layers_name}" == golden["decoder_layers_attr"]

    kept = {name.removeprefix("module.") for name in golden["peer_checkpoint_keys_ddp"]}
    lost = set() if golden["output_tied_to_input"] else {"lang_encoder.lm_head.weight"}
    ours = dict(trained_tensors(model))
    assert set(ours) == kept | lost
    shapes = golden["unfiltered_keys"]
    assert {name: list(tensor.shape) for name, tensor in ours.items()} == {n: shapes[n]["shape"] for n in ours}
    # Under no name is there anything else than in the reference, but the trained rows.
    aliases = set(golden["aliases(same tensor)"])
    rows = {name for name in model.state_dict() if name.endswith(".new_rows")}
    tied = {"lang_encoder.lm_head.weight"} - lost
    assert set(model.state_dict()) == set(shapes) - aliases | tied | rows
