"""Every property that the model has, with every family of language models: none is known by name."""

import copy
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from open_flamingo import Flamingo
from tests.families import FAMILIES, IMAGE, PAD, VOCABULARY, flamingo, images, language_model, text

every_family = pytest.mark.parametrize(
    ("family", "tied"),
    [pytest.param(f, t, id=f"{f}-{'tied' if t else 'untied'}") for f, t in itertools.product(FAMILIES, (True, False))],
)


def naive_loss(model: Flamingo, labels: Tensor, *inputs: Tensor) -> Tensor:
    """Full logits, every position."""
    logits = model(*inputs).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100)


def gradients(model: Flamingo, loss: Tensor) -> dict[str, Tensor]:
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values()))))


@every_family
def test_with_gates_at_zero_the_logits_are_the_bare_models(family: str, tied: bool) -> None:
    bare = language_model(family, tied)
    model = flamingo(copy.deepcopy(bare), gates=0.0)
    token_ids, mask, _ = text()
    with torch.no_grad():
        expected = bare(input_ids=token_ids, attention_mask=mask).logits[mask == 1]
        logits = model(images(3, 2), token_ids, mask).logits[mask == 1]
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    assert logits.std() > 0.1  # else this would say nothing


@every_family
def test_loss_and_gradients_are_those_of_full_logits(family: str, tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("open_flamingo.loss.MAX_LOGITS", 61 * 4 * 4)  # four positions at a time
    model = flamingo(language_model(family, tied))
    token_ids, mask, labels = text()
    loss = model(images(3, 2), token_ids, mask, labels).loss
    naive = naive_loss(model, labels, images(3, 2), token_ids, mask)
    torch.testing.assert_close(loss, naive, atol=1e-6, rtol=1e-6)
    mine, theirs = gradients(model, loss), gradients(model, naive)
    for name, gradient in mine.items():
        torch.testing.assert_close(
            gradient,
            theirs[name],
            atol=1e-5 if family == "zamba2" else 1e-6,
            rtol=1e-4,
            msg=lambda m, n=name: f"{n}: {m}",
        )
        assert gradient.abs().max() > 0, name
    # Padding on the right needs no mask: no real token sees it.
    torch.testing.assert_close(model(images(3, 2), token_ids, None, labels).loss, loss, atol=1e-5, rtol=1e-5)


@every_family
def test_training_lowers_the_loss_and_moves_nothing_frozen(family: str, tied: bool) -> None:
    model = flamingo(language_model(family, tied), gates=0.0).train()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=3e-3, weight_decay=0.0)
    token_ids, mask, labels = text()
    losses = []
    for _ in range(12):
        loss = model(images(3, 2), token_ids, mask, labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]
    for name, parameter in model.named_parameters():
        if name in frozen:
            assert parameter.grad is None, name
            assert torch.equal(parameter, frozen[name]), name


@every_family
def test_generation(family: str, tied: bool) -> None:
    """With the cache as without it, a left-padded row as an unpadded one, and the image before its end matters."""
    model = flamingo(language_model(family, tied), gates=2.0)
    prompt = torch.tensor([[3, IMAGE, 5, 6, 7, IMAGE, 8, 9], [PAD, PAD, PAD, 4, IMAGE, 10, 11, 12]])
    pictures = images(2, 2)
    kwargs = {"max_new_tokens": 8, "eos_token_id": None, "return_dict_in_generate": True, "output_scores": True}

    def scores(vision_x: Tensor, token_ids: Tensor, use_cache: bool = True) -> tuple[Tensor, Tensor]:
        out = model.generate(vision_x, token_ids, use_cache=use_cache, **kwargs)
        return out.sequences[:, token_ids.shape[1] :], torch.stack(out.scores, 1)

    cached, cached_scores = scores(pictures, prompt)
    plain, plain_scores = scores(pictures, prompt, use_cache=False)
    assert torch.equal(cached, plain)
    # Zamba 2 itself, without images, is 0.03 apart with its cache and without.
    torch.testing.assert_close(cached_scores, plain_scores, atol=0.1 if family == "zamba2" else 1e-4, rtol=1e-4)

    alone, alone_scores = scores(pictures[1:], prompt[1:, 3:])
    assert torch.equal(cached[1:], alone)
    torch.testing.assert_close(cached_scores[1:], alone_scores, atol=1e-4, rtol=1e-4)

    other = pictures.clone()
    other[1, 1] += 1  # a slot without a token
    assert torch.equal(scores(other, prompt)[1], cached_scores)
    other[1, 0] += 1
    changed = (scores(other, prompt)[1][:, 0] - cached_scores[:, 0]).abs().amax(-1)
    assert changed[0] == 0
    assert changed[1] > 1e-3


@every_family
def test_padding_on_the_left_moves_no_logit(family: str, tied: bool) -> None:
    """Some models count padding as positions unless told."""
    model = flamingo(language_model(family, tied))
    row, pictures = torch.tensor([[3, IMAGE, 5, 6, IMAGE, 7]]), images(1, 2)
    padded = F.pad(row, (3, 0), value=PAD)
    with torch.no_grad():
        expected = model(pictures, row).logits
        logits = model(pictures, padded, (padded != PAD).long()).logits[:, 3:]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


@every_family
def test_a_token_sees_the_image_just_before_it_and_no_other(family: str, tied: bool) -> None:
    """Exactly so in a gated block; the language model's attention then carries it on, to later tokens only."""
    model = flamingo(language_model(family, tied))
    token_ids, mask, _ = text()
    seen: list[Tensor] = []
    block = model.decoder_layers[0].gated_cross_attn_layer
    block.register_forward_hook(lambda module, args, output: seen.append(output))

    def run(pictures: Tensor) -> tuple[Tensor, Tensor]:
        seen.clear()
        with torch.no_grad():
            return model(pictures, token_ids, mask).logits, seen[0]

    pictures = images(3, 2)
    logits, block_output = run(pictures)
    image_of = (token_ids == IMAGE).cumsum(1)
    for row, image in ((0, 0), (0, 1), (1, 0)):
        other = pictures.clone()
        other[row, image] += 1
        changed_logits, changed_output = run(other)
        moved = (changed_output != block_output).any(-1)
        own = torch.zeros_like(moved)
        own[row] = image_of[row] == image + 1
        assert torch.equal(moved, own)
        change = (changed_logits - logits).abs().amax(-1)
        start = (image_of[row] == image + 1).int().argmax()
        assert change[row, :start].max() < 1e-6
        assert change[[r for r in range(3) if r != row]].max() < 1e-6
        assert change[row, start + 1] > 1e-4
    # No image, whatever lies in the slots.
    pictures[2] = torch.nan
    pictures[1, 1] = torch.nan
    assert torch.equal(run(pictures)[0], logits)


@every_family
def test_beams_that_share_a_prompt_say_the_same(family: str, tied: bool) -> None:
    if family == "zamba2":
        pytest.skip("with its cache it computes something else than without, by itself too")
    model = flamingo(language_model(family, tied)).eval()
    token_ids, mask, _ = text()
    kwargs: dict[str, Any] = {"max_new_tokens": 5, "num_beams": 3, "eos_token_id": VOCABULARY + 1}
    kwargs |= {"output_scores": True, "return_dict_in_generate": True}
    prompt = (images(3, 2), token_ids.flip(1), mask.flip(1))  # padded on the left
    each, shared = (model.generate(*prompt, beams_share_prompt=share, **kwargs) for share in (False, True))
    assert torch.equal(shared.sequences, each.sequences)
    torch.testing.assert_close(shared.sequences_scores, each.sequences_scores, atol=1e-4, rtol=1e-4)


@every_family
def test_new_rows_stand_in_for_rows_of_the_matrix(family: str, tied: bool) -> None:
    """Writing new values into the trained rows is as writing them into the full matrix of a bare model."""
    bare = language_model(family, tied)
    model = flamingo(copy.deepcopy(bare), gates=0.0, train_output_rows=True)
    token_ids, mask, _ = text()
    torch.manual_seed(3)
    with torch.no_grad():
        embedding, head = bare.get_input_embeddings(), bare.get_output_embeddings()
        for matrix, owner in ((embedding, model.lang_encoder.get_input_embeddings()), (head, None)):
            owner = owner or (None if tied else model.lang_encoder.get_output_embeddings())
            if owner is not None:
                rows = torch.randn_like(owner.new_rows)
                owner.new_rows.copy_(rows)
                matrix.weight[owner.new_ids] = rows
        expected = bare(input_ids=token_ids, attention_mask=mask).logits
        logits = model(images(3, 2), token_ids, mask).logits
    torch.testing.assert_close(logits[mask == 1], expected[mask == 1], atol=1e-5, rtol=1e-5)
