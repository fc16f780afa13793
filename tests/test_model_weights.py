"""Checkpoints of the reference load here, and ours are what the reference would have saved."""

import copy

import pytest
import torch
from torch import Tensor

from open_flamingo import Flamingo
from open_flamingo.weights import reference_parameter_names, trained_tensors
from tests.families import IMAGE, flamingo, images, language_model, text
from tests.test_model_golden import MODELS, build, inputs, keys, outputs


def reference_state_dict(lm: str, every: int, filtered: bool, prefix: str) -> dict[str, Tensor]:
    """A state dict with the reference's names and shapes, every tensor with values of its own, aliases equal."""
    golden = keys(lm, every)
    torch.manual_seed(0)
    values = {n: torch.randn(v["shape"]) for n, v in golden["unfiltered_keys"].items()}
    values |= {alias: values[name] for alias, name in golden["aliases(same tensor)"].items()}
    if filtered:
        values = {n: v for n, v in values.items() if f"module.{n}" in golden["peer_checkpoint_keys_ddp"]}
    return {prefix + name: value for name, value in values.items()}


@pytest.mark.parametrize(("lm", "every"), MODELS)
@pytest.mark.parametrize("filtered", [True, False])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_reference_checkpoint_loads(lm: str, every: int, filtered: bool, prefix: str) -> None:
    model, given = build(lm, every), reference_state_dict(lm, every, filtered, prefix)
    result = model.load_state_dict(given, strict=False)
    assert result.missing_keys == []
    assert result.unexpected_keys == []
    assert model.load_state_dict(given) == result  # strict
    for name, tensor in trained_tensors(model):
        if prefix + name in given:
            assert torch.equal(tensor, given[prefix + name]), name
    if not filtered:
        assert torch.equal(model.vision_encoder.conv1.weight, given[f"{prefix}vision_encoder.conv1.weight"])


@pytest.mark.parametrize(("lm", "every"), MODELS)
def test_second_names_are_enough(lm: str, every: int) -> None:
    """Gated blocks by `gated_cross_attn_layers.{i}` alone, decoder layers by `old_decoder_blocks.{i}`."""
    model, given = build(lm, every), reference_state_dict(lm, every, filtered=False, prefix="")
    layers = f"lang_encoder.{model.decoder_layers_name}."
    aliases = {name: value for name, value in given.items() if not name.startswith(layers)}
    result = model.load_state_dict(aliases, strict=False)
    assert result.missing_keys == []
    assert result.unexpected_keys == []
    for name, tensor in model.state_dict().items():
        if name.startswith(layers):
            assert torch.equal(tensor, given[name]), name


@pytest.mark.parametrize(("lm", "every"), MODELS)
def test_our_checkpoint_restores_the_model(lm: str, every: int) -> None:
    """Through a file, into a model with other values; and with all that is saved, nothing trained is missing."""
    model, golden = build(lm, every), outputs(lm, every)
    saved = dict(trained_tensors(model))
    other = build(lm, every)
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.requires_grad:
                parameter.zero_()
    result = other.load_state_dict(saved)
    assert result.missing_keys == []
    assert result.unexpected_keys == []
    given = inputs("mmc4.0")
    given.pop("labels")
    logits, mask = other(**given).logits, given["attention_mask"] == 1
    lse = golden["mmc4.0.logits_lse"]
    torch.testing.assert_close(logits.logsumexp(-1)[mask], lse[mask], atol=2e-5, rtol=0)


@pytest.mark.parametrize("tied", [True, False])
def test_a_state_dict_of_our_own_names(tied: bool) -> None:
    model = flamingo(language_model("llama", tied), train_output_rows=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".new_rows"):
                parameter.normal_()
    other = flamingo(language_model("llama", tied), train_output_rows=True)
    other.load_state_dict(model.state_dict())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(other.get_parameter(name), parameter), name


def test_trained_rows_of_an_untied_head_are_saved_and_loaded() -> None:
    model = flamingo(language_model("llama", False), train_output_rows=True)
    head = model.lang_encoder.lm_head
    with torch.no_grad():
        head.new_rows.normal_()
    saved = dict(trained_tensors(model))
    assert torch.equal(saved["lang_encoder.lm_head.weight"][head.new_ids], head.new_rows)

    # A run that does not train them gets them all the same.
    other = flamingo(language_model("llama", False))
    other.load_state_dict(saved)
    token_ids, mask, _ = text()
    expected = model(images(3, 2), token_ids, mask).logits
    torch.testing.assert_close(other(images(3, 2), token_ids, mask).logits, expected)

    # A checkpoint of the reference lacks them; they stay as they are.
    again = flamingo(language_model("llama", False), train_output_rows=True)
    before = again.lang_encoder.lm_head.new_rows.clone()
    del saved["lang_encoder.lm_head.weight"]
    assert again.load_state_dict(saved).missing_keys == []
    assert torch.equal(again.lang_encoder.lm_head.new_rows, before)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("theirs", "ours"), [(61, 64), (64, 61)])
def test_vocabularies_padded_to_another_size(tied: bool, theirs: int, ours: int) -> None:
    given = dict(trained_tensors(flamingo(language_model("llama", tied, vocab_size=theirs))))
    model = flamingo(language_model("llama", tied, vocab_size=ours))
    result = model.load_state_dict(given)
    assert result.unexpected_keys == []
    after = dict(trained_tensors(model))
    for name in ("lang_encoder.model.embed_tokens.weight", "lang_encoder.lm_head.weight"):
        assert len(after[name]) == ours
        assert torch.equal(after[name][:61], given[name][:61])


def test_old_names_of_transformers() -> None:
    """GPT-NeoX's head was `embed_out` until transformers 5, and its layers kept constants as buffers."""
    model = build("gpt_neox", 1)
    given = dict(trained_tensors(model))
    head = torch.randn_like(given.pop("lang_encoder.lm_head.weight"))
    attention = "lang_encoder.gpt_neox.layers.0.decoder_layer.attention."
    given |= {
        "lang_encoder.embed_out.weight": head,
        f"{attention}bias": torch.ones(1, 1, 8, 8, dtype=torch.bool),
        f"{attention}masked_bias": torch.tensor(-1e9),
        f"{attention}rotary_emb.inv_freq": torch.ones(1),
    }
    result = model.load_state_dict(given, strict=False)
    assert result.unexpected_keys == []
    assert torch.equal(model.lang_encoder.lm_head.weight, head)


def test_a_checkpoint_of_another_model_is_refused_by_name() -> None:
    model, given = build("opt", 1), reference_state_dict("opt", 1, True, "module.")
    name = "lang_encoder.model.decoder.layers.0.gated_cross_attn_layer.attn.to_kv.weight"
    given[f"module.{name}"] = torch.zeros(1024, 48)
    with pytest.raises(ValueError, match=rf"{name} has shape \(1024, 48\) in the checkpoint and \(1024, 32\)"):
        model.load_state_dict(given, strict=False)
    given = reference_state_dict("opt", 1, True, "")
    given["lang_encoder.model.decoder.embed_tokens.weight"] = torch.zeros(1003, 48)
    with pytest.raises(ValueError, match=r"embed_tokens.weight has shape \(1003, 48\)"):
        model.load_state_dict(given, strict=False)


def test_what_is_missing_or_unknown_is_reported() -> None:
    model, given = build("opt", 2), reference_state_dict("opt", 1, True, "")
    del given["perceiver.latents"]
    result = model.load_state_dict(given, strict=False)
    assert result.missing_keys == ["perceiver.latents"]
    block = "lang_encoder.model.decoder.layers.0.gated_cross_attn_layer."
    assert all(name.startswith(block) for name in result.unexpected_keys)
    assert len(result.unexpected_keys) == 11
    with pytest.raises(RuntimeError, match=r"missing \['perceiver.latents'\]"):
        model.load_state_dict(given)


def test_names_for_a_reference_optimizer() -> None:
    """Its state is numbered by named_parameters, of which our trained rows are one full matrix."""
    model = build("gpt_neox", 2, train_output_rows=True)
    names = reference_parameter_names(model)
    assert list(names.values()) == keys("gpt_neox", 2)["named_parameters_trainable"]
    assert names["lang_encoder.gpt_neox.embed_in.new_rows"] == "lang_encoder.gpt_neox.embed_in.weight"
    assert "lang_encoder.lm_head.new_rows" not in names


def test_a_copied_model_is_on_its_own() -> None:
    """Hooks of a deep copy must read the copy's rows."""
    model: Flamingo = flamingo(language_model("llama", True))
    token_ids, mask, _ = text()
    expected = model(images(3, 2), token_ids, mask).logits
    clone = copy.deepcopy(model)
    with torch.no_grad():
        clone.lang_encoder.get_input_embeddings().new_rows.add_(1)
    assert torch.equal(model(images(3, 2), token_ids, mask).logits, expected)
    assert not torch.equal(clone(images(3, 2), token_ids, mask).logits[..., IMAGE], expected[..., IMAGE])
