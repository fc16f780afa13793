"""The model's promises that do not depend on the language model's family."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    DynamicCache,
    MptConfig,
    MptForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from open_flamingo import mpt
from open_flamingo.cross_attention import GatedCrossAttentionBlock, MaskedCrossAttention, media_mask
from open_flamingo.language_model import conditioned
from open_flamingo.loss import _by_softmax, _in_passes
from open_flamingo.resampler import FeedForward, PerceiverResampler
from tests.families import (
    END_OF_CHUNK,
    IMAGE,
    PAD,
    VIS_DIM,
    VOCABULARY,
    TinyTower,
    flamingo,
    images,
    language_model,
    text,
)

# ---------------------------------------------------------------------------------------------------------------------
# Images


def naive_latents(model: nn.Module, vision_x: Tensor) -> Tensor:
    """Every slot encoded, padding or not."""
    features = model.vision_encoder(vision_x.flatten(0, 2)).flatten(2).transpose(1, 2)
    return model.perceiver(features.unflatten(0, vision_x.shape[:3]))


def test_beams_share_keys_and_values_of_their_images() -> None:
    """Rows that are repeated in place give what they give with their media repeated, and keys and values are computed once."""
    torch.manual_seed(0)
    attention = MaskedCrossAttention(dim=16, dim_visual=12)
    text_time = torch.tensor([[0, 1, 1, 2], [1, 1, 2, 2], [0, 0, 0, 1]]).repeat_interleave(2, 0)
    hidden, media, mask = torch.randn(6, 4, 16), torch.randn(3, 10, 12), media_mask(text_time, 2, 5)
    expected = attention(hidden, media.repeat_interleave(2, 0), mask)
    torch.testing.assert_close(attention(hidden, media, mask), expected, atol=1e-6, rtol=1e-5)
    kept: dict[nn.Module, Tensor] = {}
    torch.testing.assert_close(attention(hidden, media, mask, kept), expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(kept[attention], attention.to_kv(media))
    torch.testing.assert_close(
        attention(hidden, torch.full_like(media, torch.nan), mask, kept), expected, atol=1e-6, rtol=1e-5
    )


def test_generation_projects_the_images_once() -> None:
    model = flamingo(language_model("llama", True), cross_attn_every_n_layers=1)
    calls = []
    for layer in model.decoder_layers:
        layer.gated_cross_attn_layer.attn.to_kv.register_forward_hook(lambda *args: calls.append(args[2].shape[0]))
    token_ids, mask, _ = text()
    kwargs = {"max_new_tokens": 5, "num_beams": 3, "eos_token_id": VOCABULARY + 1}
    cached = model.generate(images(3, 2), token_ids.flip(1), mask.flip(1), **kwargs)
    assert calls == [3] * len(model.decoder_layers), "of three rows, whatever the beams and tokens"
    calls.clear()
    assert torch.equal(model.generate(images(3, 2), token_ids.flip(1), mask.flip(1), use_cache=False, **kwargs), cached)
    assert calls == [3] * 5 * len(model.decoder_layers)


def test_only_images_that_the_text_names_reach_the_vision_encoder() -> None:
    model, (token_ids, mask, labels) = flamingo(language_model("llama", True)), text()
    pictures = images(3, 4)
    loss = model(pictures, token_ids, mask, labels).loss
    assert model.vision_encoder.images_seen == 3  # of 12 slots; rows with 2, 1 and 0 images

    # Exactly equal to the naive way, gradients too.
    naive = flamingo(language_model("llama", True))
    naive._encode_images = lambda vision_x, counts, rows: naive_latents(naive, vision_x)
    expected = naive(pictures, token_ids, mask, labels).loss
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=0)
    loss.backward()
    expected.backward()
    for (name, ours), theirs in zip(model.named_parameters(), naive.parameters()):
        if ours.requires_grad:
            torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-7, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_image_counts_given_by_the_caller_change_nothing() -> None:
    model, (token_ids, mask, labels) = flamingo(language_model("llama", True)), text()
    counted = model(images(3, 4), token_ids, mask, labels).loss
    assert torch.equal(model(images(3, 4), token_ids, mask, labels, image_counts=[2, 1, 0]).loss, counted)


@pytest.mark.parametrize("slots", [0, 2])
def test_a_batch_without_images_gives_every_parameter_a_gradient_of_its_own(slots: int) -> None:
    """Else data parallelism waits forever for the gradient of the resampler."""
    model = flamingo(language_model("opt", True))
    token_ids = torch.tensor([[3, 4, 5, 6]])
    model(torch.full((1, slots, 1, 3, 8, 8), 0.5), token_ids, labels=token_ids).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            if name.startswith("perceiver"):
                assert not parameter.grad.any(), name


@pytest.mark.parametrize(
    ("vision_x", "message"),
    [
        (torch.zeros(1, 1, 2, 3, 8, 8), "one frame"),
        (torch.zeros(1, 1, 3, 8, 8), "must be"),
        (torch.zeros(2, 1, 1, 3, 8, 8), "1 rows of text, but 2 of images"),
        (torch.zeros(1, 0, 1, 3, 8, 8), "row 0 has 1 <image> tokens but only 0 image slots"),
        (None, "no images are cached"),
    ],
)
def test_wrong_images_are_named(vision_x: Tensor | None, message: str) -> None:
    model = flamingo(language_model("opt", True))
    with pytest.raises(ValueError, match=message):
        model(vision_x, torch.tensor([[IMAGE, 3]]))


# ---------------------------------------------------------------------------------------------------------------------
# The trained modules


def test_cross_attention_equals_explicit_attention_to_the_one_image() -> None:
    torch.manual_seed(0)
    attention = MaskedCrossAttention(dim=16, dim_visual=12)
    text_time = torch.tensor([[0, 1, 1, 2], [0, 0, 0, 1]])
    hidden, media = torch.randn(2, 4, 16), torch.randn(2, 2, 5, 12)
    out = attention(hidden, media.flatten(1, 2), media_mask(text_time, num_images=2, num_latents=5))
    for row in range(2):
        for token in range(4):
            if text_time[row, token] == 0:
                assert not out[row, token].any()
                continue
            image = media[row, text_time[row, token] - 1]
            query = attention.to_q(attention.norm(hidden[row, token])).view(8, 1, 64)
            key, value = (x.view(5, 8, 64).transpose(0, 1) for x in attention.to_kv(image).chunk(2, -1))
            weights = (query @ key.transpose(1, 2) / 8).softmax(-1)
            expected = attention.to_out((weights @ value).flatten())
            torch.testing.assert_close(out[row, token], expected, atol=1e-6, rtol=1e-5)


def test_tokens_without_an_image_send_no_nan_back() -> None:
    block = GatedCrossAttentionBlock(dim=16, dim_visual=12)
    nn.init.ones_(block.attn_gate)
    hidden, media = torch.randn(1, 3, 16, requires_grad=True), torch.randn(1, 5, 12, requires_grad=True)
    block(hidden, media, media_mask(torch.zeros(1, 3, dtype=torch.long), 1, 5)).square().sum().backward()
    assert hidden.grad.isfinite().all()
    assert not media.grad.any()


def test_the_resampler_treats_images_apart() -> None:
    torch.manual_seed(0)
    resampler = PerceiverResampler(dim=12, depth=2)
    features = torch.randn(2, 3, 1, 7, 12)
    latents = resampler(features)
    assert latents.shape == (2, 3, 64, 12)
    torch.testing.assert_close(resampler(features[1:, 2:]), latents[1:, 2:])


# ---------------------------------------------------------------------------------------------------------------------
# What is trained


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "amp_bf16"])
def test_the_feed_forward_is_its_layers_and_keeps_the_widest_tensor_once(autocast: bool) -> None:
    torch.manual_seed(0)
    feed = FeedForward(8)

    def run(function: Callable[[Tensor], Tensor]) -> tuple[int, list[Tensor]]:
        x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1), requires_grad=True)
        kept: dict[int, Tensor] = {}  # by storage: each alive, so that none takes another's place
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                output = function(x)
        wide = sum(t.numel() == 2 * 5 * 32 for t in kept.values())
        return wide, [output.detach(), *torch.autograd.grad(output.float().square().sum(), [x, *feed.parameters()])]

    kept, found = run(feed)
    norm, widen, _, narrow = feed
    kept_by_layers, expected = run(lambda x: F.linear(F.gelu(widen(norm(x))), narrow.weight))
    assert (kept, kept_by_layers) == (1, 2)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_what_is_trained() -> None:
    model = flamingo(language_model("gpt_neox", False))
    for name, parameter in model.named_parameters():
        trained = name.startswith("perceiver.") or ".gated_cross_attn_layer." in name or name.endswith(".new_rows")
        assert parameter.requires_grad == trained, name
    parameters = list(model.parameters())
    assert len({id(p) for p in parameters}) == len(parameters)
    rows = [name for name, _ in model.named_parameters() if name.endswith(".new_rows")]
    assert rows == ["lang_encoder.gpt_neox.embed_in.new_rows"]

    with_output = flamingo(language_model("gpt_neox", False), train_output_rows=True)
    rows = [name for name, _ in with_output.named_parameters() if name.endswith(".new_rows")]
    assert rows == ["lang_encoder.gpt_neox.embed_in.new_rows", "lang_encoder.lm_head.new_rows"]
    token_ids, mask, labels = text()
    with_output(images(3, 2), token_ids, mask, labels).loss.backward()
    assert with_output.lang_encoder.lm_head.new_rows.grad.any()

    frozen = flamingo(language_model("gpt_neox", False), freeze_lm_embeddings=True)
    assert not any(p.requires_grad for n, p in frozen.named_parameters() if n.endswith(".new_rows"))


def test_training_mode_leaves_frozen_parts_without_dropout() -> None:
    model = flamingo(language_model("opt", True)).train()  # this OPT has dropout of 0.1
    token_ids, mask, labels = text()
    losses = {model(images(3, 2), token_ids, mask, labels).loss.item() for _ in range(3)}
    assert len(losses) == 1
    assert model.training
    assert model.perceiver.training
    assert model.decoder_layers[0].gated_cross_attn_layer.training
    assert not model.vision_encoder.training


@pytest.mark.parametrize("family", ["opt", "gpt2", "gptj"])
def test_gradient_checkpointing_changes_no_gradient(family: str) -> None:
    token_ids, mask, labels = text()
    gradients = []
    for checkpointing in (False, True):
        model = flamingo(language_model(family, True), gradient_checkpointing=checkpointing)
        calls = []
        model.decoder_layers[0].gated_cross_attn_layer.register_forward_pre_hook(lambda *_, c=calls: c.append(1))
        model(images(3, 2), token_ids, mask, labels).loss.backward()
        assert len(calls) == 1 + checkpointing
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})
        # Recomputing a layer would write to a cache twice: with one, nothing is recomputed.
        calls.clear()
        model(images(3, 2), token_ids, mask, use_cache=True).logits.sum().backward()
        assert len(calls) == 1
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-7, rtol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Loss


def test_logits_are_made_of_labeled_positions_only_and_a_piece_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("open_flamingo.loss.MAX_LOGITS", 5 * VOCABULARY * 4)
    model, (token_ids, mask, labels) = flamingo(language_model("llama", False)), text()
    sizes: list[int] = []
    model.lang_encoder.lm_head.register_forward_hook(lambda m, args, out: sizes.append(out.numel() // VOCABULARY))
    out = model(images(3, 2), token_ids, mask, labels)
    assert out.logits is None
    assert max(sizes) <= 5
    assert sum(sizes) == (labels[:, 1:] != -100).sum()


def test_a_batch_without_labels_has_a_loss_of_zero() -> None:
    model, (token_ids, mask, labels) = flamingo(language_model("llama", True)), text()
    loss = model(images(3, 2), token_ids, mask, torch.full_like(labels, -100)).loss
    assert loss == 0
    loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert not parameter.grad.any(), name


@pytest.mark.parametrize("family", ["opt", "gemma2", "gpt_neox", "mpt"])
def test_autocast(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("open_flamingo.loss.MAX_LOGITS", 3 * VOCABULARY * 2)
    model, (token_ids, mask, labels) = flamingo(language_model(family, True)), text()
    exact = model(images(3, 2), token_ids, mask, labels).loss
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(images(3, 2), token_ids, mask, labels).loss
        logits = model(images(3, 2), token_ids, mask).logits
    assert loss.dtype == torch.float32
    naive = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
    torch.testing.assert_close(loss, naive, atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(loss, exact, atol=0.1, rtol=0.05)
    trained = [p for p in model.parameters() if p.requires_grad]
    mine, theirs = torch.autograd.grad(loss, trained), torch.autograd.grad(naive, trained)
    assert all(gradient.dtype == torch.float32 for gradient in mine)
    apart = torch.stack([(one - other).norm() for one, other in zip(mine, theirs)]).norm()
    assert apart < 0.02 * torch.stack([gradient.norm() for gradient in theirs]).norm()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_mpt_fused_attention_is_its_own(checkpointing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With 3 heads (slopes that are no powers of 2), in float32 and, far from the query, in bfloat16."""
    config = MptConfig(
        d_model=48, n_layers=2, n_heads=3, vocab_size=VOCABULARY, attn_config={"clip_qkv": 0.5, "softmax_scale": 0.3}
    )
    token_ids = torch.randint(1, 50, (2, 300))
    token_ids[:, [0, 150]] = IMAGE
    results = {}
    for fused in (True, False):
        with monkeypatch.context() as patches:
            if not fused:
                patches.setattr(mpt, "fuse_attention", lambda lang_encoder: False)
            torch.manual_seed(0)
            model = flamingo(MptForCausalLM(config), gradient_checkpointing=checkpointing).train()
        kinds = {type(module) for module in model.modules()}
        assert (mpt.FusedMptAttention in kinds) == fused
        losses = []
        for dtype in (torch.float32, torch.bfloat16):
            with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
                losses.append(model(images(2, 2), token_ids, labels=token_ids).loss)
        losses[0].backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        # One row with padding; the mask of a batch of several takes transformers' own way.
        padded = model(images(1, 2), token_ids[:1], (token_ids[:1] > 9).long()).logits.detach()
        results[fused] = *losses, gradient, padded
    for name, mine, theirs, bound in zip(
        ("loss", "loss in bfloat16", "gradient", "padded"), results[True], results[False], (1e-5, 1e-3, 1e-4, 1e-4)
    ):
        assert (mine - theirs).norm() <= bound * theirs.norm(), name


def test_in_float16_the_loss_scale_comes_before_any_rounding() -> None:
    model, (token_ids, mask, labels) = flamingo(language_model("llama", False)), text()
    with torch.no_grad():
        model.lang_encoder.lm_head.weight.mul_(4)
        # Of what it is sure of, and right about, the gradients of the logits are less than float16's least number.
        labels[:, 1:] = model(images(3, 2), token_ids, mask).logits[:, :-1].argmax(-1)
    with torch.autocast("cpu", torch.float16):
        loss = model(images(3, 2), token_ids, mask, labels).loss
        logits = model(images(3, 2), token_ids, mask).logits
    naive = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
    trained = [p for p in model.parameters() if p.requires_grad]
    mine, theirs = (torch.autograd.grad(one * 2**12, trained) for one in (loss, naive))
    for one, other in zip(mine, theirs):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_frozen_weights_in_half_precision() -> None:
    """A later step keeps what is frozen in bfloat16; what is trained stays in float32."""
    model, (token_ids, mask, labels) = flamingo(language_model("llama", True)), text()
    exact = model(images(3, 2), token_ids, mask, labels).loss
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(images(3, 2), token_ids, mask, labels).loss
    torch.testing.assert_close(loss, exact, atol=0.1, rtol=0.05)
    loss.backward()


# ---------------------------------------------------------------------------------------------------------------------
# Generation


def test_beams_and_several_answers_keep_to_their_rows_images() -> None:
    model = flamingo(language_model("llama", True), gates=2.0)
    prompt = torch.tensor([[3, IMAGE, 5], [4, IMAGE, 6]])
    pictures = images(2, 1)
    kwargs = {"max_new_tokens": 5, "num_beams": 4, "num_return_sequences": 2, "eos_token_id": None}
    together = model.generate(pictures, prompt, **kwargs)
    alone = [model.generate(pictures[[row]], prompt[[row]], **kwargs) for row in range(2)]
    assert torch.equal(together, torch.cat(alone))
    swapped = model.generate(pictures.flip(0), prompt, **kwargs)
    assert not torch.equal(together, swapped)


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_generated_image_token_names_no_image(use_cache: bool) -> None:
    model = flamingo(language_model("llama", True), gates=2.0)
    prompt, pictures = torch.tensor([[3, IMAGE, 5]]), images(1, 2)
    with torch.no_grad():  # so that greedy decoding picks <image> again and again
        model.lang_encoder.get_output_embeddings().register_forward_hook(
            lambda m, args, out: out.index_fill(-1, torch.tensor([IMAGE]), 1e3)
        )
    kwargs = {"max_new_tokens": 4, "use_cache": use_cache, "output_scores": True, "return_dict_in_generate": True}
    out = model.generate(pictures, prompt, **kwargs)
    assert (out.sequences[0, 3:] == IMAGE).all()
    forced = model.generate(pictures, prompt, **kwargs | {"use_cache": not use_cache})
    torch.testing.assert_close(torch.stack(out.scores), torch.stack(forced.scores), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "mistral"])
@pytest.mark.parametrize("way", ["in pieces", "static", "prompt lookup", "assisted", "wrapped", "beams"])
def test_every_way_to_generate_sees_the_same_images(family: str, way: str) -> None:
    model = flamingo(language_model(family, True), gates=2.0)
    prompt, pictures = torch.tensor([[3, IMAGE, 5, 6, IMAGE, 7, 8]]), images(1, 2)
    kwargs = {"max_new_tokens": 8, "eos_token_id": None}
    kwargs |= {"num_beams": 3, "num_return_sequences": 2} if way == "beams" else {}
    expected = model.generate(pictures, prompt, use_cache=False, **kwargs)
    ways: dict[str, dict[str, Any]] = {
        "in pieces": {"prefill_chunk_size": 3},
        "static": {"cache_implementation": "static"},
        "prompt lookup": {"prompt_lookup_num_tokens": 3},
        "assisted": {"assistant_model": language_model(family, True)},
        "wrapped": {"past_key_values": WrappedCache()},
    }
    assert torch.equal(model.generate(pictures, prompt, **kwargs, **ways.get(way, {})), expected)


class WrappedCache(DynamicCache):
    """As caches that quantize, or are kept elsewhere: of a class that is nobody's."""


def test_a_cache_counts_under_any_name_and_in_any_form() -> None:
    model = flamingo(language_model("llama", True), gates=2.0)
    conditioning = model._condition(images(1, 2), torch.tensor([[3, IMAGE, 5, IMAGE, 6, 7]]), None)
    keys = torch.zeros(1, 4, 8, 3)  # of three tokens, transposed as Bloom's
    wrapped = WrappedCache()
    wrapped.update(keys.transpose(2, 3), keys.transpose(2, 3), 0)
    model.lang_encoder.forward = lambda *args, **kwargs: None
    for cache in (wrapped, ((keys, keys.transpose(2, 3)),) * 2):
        for name in ("cache", "past_key_values", "memory"):
            with conditioned(conditioning):
                model.lang_encoder(torch.tensor([[9]]), **{name: cache})
            seen = (conditioning.mask.bias[0, 0, 0] == 0).unflatten(0, (2, -1)).all(1)
            assert seen.tolist() == [False, True]  # the fourth token names the second image


def test_a_call_that_goes_on_without_a_known_cache_is_an_error() -> None:
    model = flamingo(language_model("llama", True))
    for prompt in (torch.tensor([[3, IMAGE, 5]]), torch.tensor([[IMAGE]])):
        model.lang_encoder.forward = lambda *args, **kwargs: None
        with conditioned(model._condition(images(1, 1), prompt, None)):
            model.lang_encoder(prompt)
            with pytest.raises(ValueError, match="none of its arguments is known as a key-value cache"):
                model.lang_encoder(torch.tensor([[7]]), memory=object())


def test_generation_ends_with_the_end_of_chunk_and_pads_with_the_padding_token() -> None:
    model = flamingo(language_model("llama", True), gates=2.0)
    prompt, pictures = torch.tensor([[3, IMAGE, 5], [4, IMAGE, 6]]), images(2, 1)
    rows = iter([[END_OF_CHUNK, 7], [7, 7], [7, END_OF_CHUNK]])

    def choose(module: nn.Module, args: tuple, out: Tensor) -> Tensor:
        out = torch.zeros_like(out)
        for row, token in enumerate(next(rows)):
            out[row, -1, token] = 1
        return out

    model.lang_encoder.get_output_embeddings().register_forward_hook(choose)
    out = model.generate(pictures, prompt, max_new_tokens=9)
    assert out[:, 3:].tolist() == [[END_OF_CHUNK, PAD, PAD], [7, 7, END_OF_CHUNK]]


def test_without_a_mask_padding_is_found() -> None:
    model = flamingo(language_model("llama", True), gates=2.0)
    prompt, pictures = torch.tensor([[PAD, PAD, 3, IMAGE, 5]]), images(1, 1)
    padded = model.generate(pictures, prompt, max_new_tokens=5)
    assert torch.equal(padded[:, 2:], model.generate(pictures, prompt[:, 2:], max_new_tokens=5))


def test_cached_images_serve_generation() -> None:
    model = flamingo(language_model("llama", True), gates=2.0)
    prompt, pictures = torch.tensor([[3, IMAGE, 5, IMAGE, 6]]), images(1, 2)
    expected = model.generate(pictures, prompt, max_new_tokens=5)
    model.cache_media(prompt, pictures)
    assert torch.equal(model.generate(None, prompt, max_new_tokens=5), expected)

    # Text without <image> sees the last cached image; text with too many is an error.
    continuation = torch.tensor([[7, 8]])
    logits = model(None, continuation).logits
    model.cache_media(prompt[:, 2:], pictures[:, 1:])
    torch.testing.assert_close(model(None, continuation).logits, logits)
    with pytest.raises(ValueError, match="2 <image> tokens but only 1"):
        model(None, prompt)

    # Several candidates are scored against one context.
    candidates = torch.tensor([[7, 8], [9, 10], [7, 8]])
    several = model(None, candidates).logits
    torch.testing.assert_close(several[0], logits[0])
    torch.testing.assert_close(several[2], logits[0])


# ---------------------------------------------------------------------------------------------------------------------
# Language models of unusual make


class HeadlessConfig(PretrainedConfig):
    model_type = "headless"


class Headless(PreTrainedModel):
    """As the code of MPT-1B on the hub: no base model, and the embedding's matrix in place of a head."""

    config_class = HeadlessConfig

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config)
        self.wte = nn.Embedding(VOCABULARY, 32)
        self.blocks = nn.ModuleList(nn.Linear(32, 32) for _ in range(2))

    def get_input_embeddings(self) -> nn.Embedding:
        return self.wte

    def get_output_embeddings(self) -> nn.Embedding:
        return self.wte

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, use_cache: bool = False):
        hidden_states = self.wte(input_ids)
        for block in self.blocks:
            hidden_states = torch.tanh(block(hidden_states))
        return CausalLMOutputWithPast(logits=F.linear(hidden_states, self.wte.weight))


def test_a_model_without_a_head_trains_its_rows_as_input_and_output() -> None:
    model = flamingo(Headless(HeadlessConfig()))
    embedding = model.lang_encoder.wte
    token_ids, mask, labels = text()
    with torch.no_grad():
        embedding.new_rows.normal_()
    model(images(3, 2), token_ids, mask, labels).loss.backward()

    whole = flamingo(Headless(HeadlessConfig()))
    with torch.no_grad():
        whole.load_state_dict(model.state_dict())
        whole.lang_encoder.wte.weight[embedding.new_ids] = embedding.new_rows
    weight = whole.lang_encoder.wte.weight.requires_grad_()
    whole.lang_encoder.wte.new_rows.requires_grad_(False)
    for hooks in (whole.lang_encoder._forward_pre_hooks, whole.lang_encoder._forward_hooks):
        for key, hook in list(hooks.items()):
            if "EmbeddingPatch" in repr(hook):
                del hooks[key]
    logits = whole(images(3, 2), token_ids, mask).logits
    F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()).backward()
    torch.testing.assert_close(embedding.new_rows.grad, weight.grad[embedding.new_ids])
    assert embedding.weight.grad is None
    assert isinstance(embedding.weight, nn.Parameter)


def test_models_that_do_not_fit_are_refused() -> None:
    t5 = T5ForConditionalGeneration(
        T5Config(vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    )
    with pytest.raises(ValueError, match="T5ForConditionalGeneration is an encoder-decoder model"):
        flamingo(t5)
    with pytest.raises(ValueError, match="LlamaModel has no language-modeling head"):
        flamingo(language_model("llama", True).model)
    with pytest.raises(ValueError, match=r"its lists are: model\.layers"):
        flamingo(language_model("llama", True), decoder_layers_attr_name="transformer.h")
    with pytest.raises(ValueError, match="must be 1 to 2"):
        flamingo(language_model("llama", True), cross_attn_every_n_layers=3)
    small = OPTForCausalLM(
        OPTConfig(vocab_size=50, hidden_size=16, ffn_dim=16, num_hidden_layers=1, num_attention_heads=2)
    )
    with pytest.raises(ValueError, match="do not lie in an embedding matrix of 50 rows"):
        flamingo(small)


def test_decoder_layers_may_be_named() -> None:
    model = flamingo(language_model("llama", True), decoder_layers_attr_name="model.layers")
    assert model.decoder_layers is model.lang_encoder.model.layers
    assert TinyTower is type(model.vision_encoder)
    assert model.vis_dim == VIS_DIM


def test_the_language_model_alone_says_that_it_needs_images() -> None:
    model = flamingo(language_model("llama", True))
    with pytest.raises(RuntimeError, match="call the Flamingo"):
        model.lang_encoder(torch.tensor([[3, 4]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_loss_of_a_gpu_is_that_of_a_cpu(dtype: torch.dtype) -> None:
    """Two ways to the same sum and the same gradient; of a target that is all but certain, too."""
    torch.manual_seed(0)
    logits, targets = 4 * torch.randn(6, 1000), torch.randint(1000, (6,))
    logits[0, targets[0]] = 20.0
    logits = logits.to(dtype)
    exact = logits.double().softmax(1)
    exact[range(6), targets] -= 1
    for way in (_by_softmax, _in_passes):
        total, gradient = way(logits.clone(), targets[:, None])
        torch.testing.assert_close(total, F.cross_entropy(logits.float(), targets, reduction="sum"))
        assert gradient.dtype == dtype
        torch.testing.assert_close(gradient.double(), exact, rtol=1e-5 + torch.finfo(dtype).eps, atol=1e-7)
