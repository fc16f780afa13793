"""The paper numbers of docs/scaling.md: regenerated, and checked against closed forms and the real FSDP2."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import open_clip
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, OPTConfig, OPTForCausalLM

from benchmarks import loader_scale, scaling
from open_flamingo import Flamingo
from open_flamingo.train import estimate
from open_flamingo.train.data import lanes
from open_flamingo.train.distributed import World
from open_flamingo.train.parallel import Sharding, gradient_sync, parallelize
from open_flamingo.train.precision import autocast, autocast_dtype, cast_frozen_weights
from tests.conftest import AT_LENGTH, only_at_length
from tests.tiny import ROOT, VISION_CONFIG

DOCUMENT = ROOT / "docs" / "scaling.md"
WORLD = 8


# ---------------------------------------------------------------------------------------------------------------------
# The document


def cells(markdown: str) -> list[str]:
    return [cell.strip() for line in markdown.splitlines() for cell in line.strip("|").split("|")]


def numbers(cell: str) -> tuple[str, list[float]]:
    """The text of a cell with its numbers taken out, and those numbers."""
    found = [float(number.replace(",", "")) for number in re.findall(r"\d[\d,]*\.?\d*", cell)]
    return re.sub(r"\d[\d,]*\.?\d*", "#", cell), found


@only_at_length
def test_the_document_holds_what_the_script_computes() -> None:
    """To 2%: how many matrix products a model takes may differ a little from one version of transformers to the next."""
    document = DOCUMENT.read_text(encoding="utf-8")
    written = document.partition(scaling.BEGIN)[2].partition(scaling.END)[0].strip()
    computed = scaling.report(scaling.parse_args([])).strip()
    for ours, theirs in zip(cells(written), cells(computed), strict=True):
        text, values = numbers(ours)
        expected_text, expected_values = numbers(theirs)
        assert text == expected_text, "run: python benchmarks/scaling.py --write docs/scaling.md"
        assert values == pytest.approx(expected_values, rel=0.02, abs=0.011), (
            f"{ours!r} is now {theirs!r}; run: python benchmarks/scaling.py --write docs/scaling.md"
        )


def test_tables_are_replaced_between_their_marks() -> None:
    document = f"before\n{scaling.BEGIN}\nold\n{scaling.END}\nafter\n"
    replaced = scaling.replace_tables(document, "new")
    assert replaced == f"before\n{scaling.BEGIN}\n\nnew\n{scaling.END}\nafter\n"
    with pytest.raises(ValueError, match="lacks the marks"):
        scaling.replace_tables("no marks", "new")


# ---------------------------------------------------------------------------------------------------------------------
# Against closed forms


@only_at_length
def test_parameters_and_flops_of_the_3b_model() -> None:
    recipe = next(recipe for recipe in scaling.RECIPES if recipe.name == "3B")
    counted = scaling.count(recipe, True)
    width, layers, vision_width, inner, vocabulary = 2048, 24, 1024, 512, 50432

    # MPT has no biases: attention 4·D², feed-forward 8·D², two norms; and a norm and the tied matrix.
    layer = 12 * width**2 + 2 * width
    assert counted.parameters["language model"] == layers * layer + width + vocabulary * width
    feed_forward = 8 * width**2 + 2 * width
    block = feed_forward + 2 * width * inner + 2 * vision_width * inner + 2 * width + 2
    assert counted.parameters["gated blocks"] == layers * block
    attention = vision_width * inner * 4 + 4 * vision_width
    resampler = 6 * (attention + 8 * vision_width**2 + 2 * vision_width) + 64 * vision_width + 2 * vision_width
    assert counted.parameters["resampler"] == resampler
    assert counted.parameters["new rows"] == 2 * width
    assert counted.trained == layers * block + resampler + 2 * width

    # Two FLOPs a parameter and token, but for what attention multiplies beside: less than a tenth.
    images, tokens, labels = 64 + 32 * 3, 64 * 32 + 32 * 256, 64 * 30 + 32 * 253
    forward = 2 * (
        counted.parameters["vision encoder"] * images * 257
        + layers * 12 * width**2 * tokens
        + vocabulary * width * labels
        + layers * (8 * width**2 + 2 * width * inner) * tokens
        + layers * 2 * vision_width * inner * images * 64
        + 6 * (2 * vision_width * inner * images * 321 + (8 * vision_width**2 + 2 * vision_width * inner) * images * 64)
    )
    assert forward < counted.passes.forward < 1.1 * forward
    # Backward: each product of the language model once for activations and once recomputed; of what is trained, once more
    # for weights; nothing in the vision encoder.
    assert 1.2 * counted.passes.forward < counted.passes.backward < 2 * counted.passes.forward


def test_the_meter_counts_products_and_what_is_alive() -> None:
    x = torch.empty(100, 50, device="meta")
    with estimate.Meter() as meter:
        y = x @ torch.empty(50, 20, device="meta")  # 4 kB, 8 kB
        y = y.t().add_(1).t() + 1  # 8 kB more; then the first 8 are free
        z = y.reshape(-1).exp()
        del y, z
        torch.empty(10, 10, device="meta")
    assert meter.flops == 2 * 100 * 50 * 20
    assert meter.peak == 16_000


def test_without_checkpointing_nothing_is_recomputed_and_more_is_held() -> None:
    recipe = scaling.Recipe("tiny", lambda: GPTNeoXForCausalLM(neox_config(vocab_size=50432)), 1)
    with_it, without = scaling.count(recipe, True), scaling.count(recipe, False)
    assert with_it.passes.forward == without.passes.forward
    assert with_it.passes.backward > without.passes.backward
    assert with_it.passes.peak < without.passes.peak


def test_hybrid_sends_less_to_other_nodes_and_ddp_the_least() -> None:
    """And DDP sends the ring all-reduce's 2·P·(W - 1)/W elements of four bytes."""
    counted = scaling.count(scaling.RECIPES[0], True)
    sent, network = {}, {}
    for strategy in scaling.strategies(64):
        calls = list(estimate.collectives(counted.units, strategy, 2))
        sent[strategy.name, strategy.frozen] = sum(call.sent for call in calls)
        network[strategy.name, strategy.frozen] = sum(call.network for call in calls)
    assert sent["DDP", False] == pytest.approx(4 * 2 * counted.trained * 63 / 64)
    assert sent["DDP", False] == min(sent.values())
    for frozen in (True, False):
        assert network["FSDP hybrid", frozen] < 0.7 * network["FSDP full", frozen]
        assert sent["FSDP full", frozen] == pytest.approx(network["FSDP full", frozen] * estimate.GPUS_OF_NODE)


# ---------------------------------------------------------------------------------------------------------------------
# Against the real FSDP2, in a world whose other ranks are made up


def opt_config() -> OPTConfig:
    return OPTConfig(
        vocab_size=103,
        hidden_size=32,
        num_hidden_layers=3,
        ffn_dim=60,
        num_attention_heads=2,
        word_embed_proj_dim=32,
        max_position_embeddings=64,
    )


def neox_config(vocab_size: int = 103) -> GPTNeoXConfig:
    return GPTNeoXConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        num_hidden_layers=3,
        intermediate_size=60,
        num_attention_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )


def tiny_flamingo(tied: bool, gradient_checkpointing: bool) -> Flamingo:
    vision = open_clip.CLIP(**VISION_CONFIG).visual
    language_model = OPTForCausalLM(opt_config()) if tied else GPTNeoXForCausalLM(neox_config())
    return Flamingo(vision, language_model, 101, 102, 32, 2, gradient_checkpointing)


@pytest.fixture(scope="module")
def one_of_eight() -> Iterator[World]:
    """This process as rank 0 of eight; the others are not there, and what they would send is left as it was."""
    dist.init_process_group("fake", rank=0, world_size=WORLD, store=FakeStore())
    yield World(rank=0, world_size=WORLD, local_rank=0, device=torch.device("cpu"), launcher="the test")
    dist.destroy_process_group()


class Sent(TorchDispatchMode):
    """Counts calls of collectives, and the bytes that a ring would make this rank send for them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._overloadpacket.__name__
        if func.namespace == "c10d":
            self.calls[name] += 1
            if name == "_allgather_base_":
                self.bytes += args[1].nbytes * (ranks(args[2]) - 1)
            elif name == "_reduce_scatter_base_":
                self.bytes += args[0].nbytes * (ranks(args[2]) - 1)
            else:
                assert name == "allreduce_", name
                self.bytes += 2 * args[0][0].nbytes * (ranks(args[1]) - 1) / ranks(args[1])
        return func(*args, **(kwargs or {}))


def ranks(group: Any) -> int:
    return dist.ProcessGroup.unbox(group).size()


def held_in(model: nn.Module, gradients: bool) -> int:
    """Bytes that this rank holds of the parameters, or of their gradients."""
    tensors = [p.grad if gradients else p for p in model.parameters()]
    local = [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors if tensor is not None]
    return sum(tensor.nbytes for tensor in local)


@pytest.mark.parametrize("recompute", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen_sharded", "frozen_replicated"])
@pytest.mark.parametrize("shard", [8, 4], ids=["full", "hybrid"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("precision", ["fp32", "amp_bf16"])
def test_bytes_held_and_sent_are_those_of_fsdp(
    precision: str, tied: bool, shard: int, frozen: bool, recompute: bool, one_of_eight: World
) -> None:
    if precision == "amp_bf16" and not (tied or AT_LENGTH):
        pytest.skip("only at length: OPEN_FLAMINGO_TEST_LENGTH=long")
    model = tiny_flamingo(tied, recompute)
    cast_frozen_weights(model, precision)
    strategy = estimate.Strategy("FSDP", WORLD, shard, frozen)
    units = estimate.unit_pieces(model, autocast_dtype(precision))
    expected = estimate.held(units, strategy)
    calls = list(estimate.collectives(units, strategy, passes=2))

    sharded = parallelize(model, one_of_eight, Sharding(shard, frozen, autocast_dtype(precision)))
    tokens = torch.tensor([[102, 5, 6, 101]])
    with Sent() as sent:
        for last in (False, True):
            with gradient_sync(sharded, enabled=last):
                with autocast(precision, one_of_eight.device):
                    loss = sharded(vision_x=torch.zeros(1, 1, 1, 3, 32, 32), lang_x=tokens, labels=tokens).loss
                loss.backward()

    assert held_in(sharded, gradients=False) == expected.parameters
    assert held_in(sharded, gradients=True) == expected.gradients
    assert sum(sent.calls.values()) == len(calls)
    assert sent.bytes == pytest.approx(sum(call.sent for call in calls))


# ---------------------------------------------------------------------------------------------------------------------
# The loader's simulation


def test_simulated_lanes_cover_every_pass_and_share_it_equally(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes, "read_shard", loader_scale.read_made_up_shard)
    result = loader_scale.simulate("laion", "{000..336}.tar", ranks=8, workers=4)
    assert (result.shards, result.lanes) == (337, 32)
    assert result.covered
    assert result.resumed
    assert result.shards_a_lane == (10, 11)
    assert result.shards_a_rank == (42, 43)
    # Equal shares of samples, and nothing read that was not needed for them.
    least, most = result.read_a_rank
    assert 0.8 < least <= 1 <= most < 1.2
    assert result.shards_unread < 337 / 10


def test_a_lane_order_that_forgets_a_shard_is_noticed() -> None:
    class Forgetful(lanes.ShardOrder):
        def url(self, lane: int, k: int) -> str:
            return super().url(lane, k).replace("7.tar", "8.tar")

    urls = tuple(f"{i}.tar" for i in range(20))
    assert loader_scale.covers_every_pass(lanes.ShardOrder(urls, 4, 0, "laion"), passes=2)
    assert not loader_scale.covers_every_pass(Forgetful(urls, 4, 0, "laion"), passes=2)
