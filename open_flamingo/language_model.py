"""Gated cross-attention into any Hugging Face decoder-only model, and the trained rows of the new tokens.

The model is taken as it is: found by structure, its own `forward` and `generate` untouched. Two changes are made to it.

1. Each decoder layer is wrapped in a `ConditionedLayer`, which runs a gated cross-attention block before it. Hugging
   Face code calls the layers, so the images reach them through a context that one `with conditioned(...)` sets.
2. The rows of the new tokens become a small parameter, `new_rows`, beside the frozen embedding matrix: the optimizer
   keeps state for two rows instead of the vocabulary, and the matrix never gets a gradient.

Dimensions: B batch, T text tokens, N images, L latents per image, E image width, D text width, K new tokens.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import masking_utils

from .cross_attention import GatedCrossAttentionBlock, MediaMask, media_mask

# ---------------------------------------------------------------------------------------------------------------------
# The context: what the decoder layers of one forward or generate see


@dataclass
class Conditioning:
    """The images of a batch, and which of them each token sees.

    latents: [B, N, L, E].
    text_time: long[B, T], the number (from 1) of the image that each token of the prompt sees, 0 for none. Tokens after
        the prompt, generated ones, see what its last token sees.
    start: how many tokens the cache held before the prompt's first.
    """

    latents: Tensor
    text_time: Tensor
    start: int = 0
    media: Tensor = field(init=False)
    mask: MediaMask = field(init=False)
    uses_cache: bool = field(init=False, default=False)
    _most_uncached: int = field(init=False, default=0)

    def prepare_for_call(self, batch: int, num_tokens: int, cache: Any = None, uses_cache: bool = False) -> None:
        """Set what the layers read during a call of the language model on `num_tokens` tokens that follow those in `cache`.

        media: [batch, N·L, E]; mask: of [batch, num_tokens]; uses_cache: whether the call writes to a key-value cache.
        `batch` may be a multiple of B: beam search and `num_return_sequences` repeat each row in place.

        Raises:
            ValueError: the call goes on from earlier tokens, but has no cache to tell how many.
        """
        images, last = self.latents.shape[1], self.text_time.shape[1] - 1
        if cache is None:
            # Then each call has the whole text, which grows as it is generated.
            if num_tokens <= max(last, self._most_uncached):
                raise ValueError(
                    f"a call on {num_tokens} tokens goes on from a text of {max(last + 1, self._most_uncached)}, and none of its "
                    "arguments is known as a key-value cache: which images its tokens see cannot be told. Pass use_cache=False"
                )
            self._most_uncached = num_tokens
        first = cache_length(cache) - (self.start if cache is not None else 0)
        positions = torch.arange(first, first + num_tokens, device=self.text_time.device).clamp_(0, last)
        text_time, media = self.text_time[:, positions], self.latents.flatten(1, 2)
        repeats, rest = divmod(batch, len(media))
        if rest or not repeats:
            raise ValueError(f"images of {len(media)} rows cannot serve a text batch of {batch} rows")
        if repeats > 1:
            text_time, media = text_time.repeat_interleave(repeats, 0), media.repeat_interleave(repeats, 0)
        self.media = media
        self.mask = media_mask(text_time, images, self.latents.shape[2])
        self.uses_cache = uses_cache or cache is not None


_CONDITIONING: ContextVar[Conditioning | None] = ContextVar("conditioning", default=None)


@contextmanager
def conditioned(conditioning: Conditioning) -> Iterator[Conditioning]:
    """Within this `with`, the decoder layers see `conditioning`. The only thing that sets or clears it."""
    token = _CONDITIONING.set(conditioning)
    try:
        yield conditioning
    finally:
        _CONDITIONING.reset(token)


def find_cache(arguments: Iterable[Any]) -> Any:
    """The key-value cache among the arguments of a call, None if there is none.

    Found by what it is, since its name differs between models and versions of transformers: `past_key_values`, `cache`,
    `cache_params`.
    """
    return next((argument for argument in arguments if _is_cache(argument)), None)


def _is_cache(argument: Any) -> bool:
    if isinstance(argument, (tuple, list)):  # older models: (keys, values) of each layer, at first without a tensor
        return len(argument) > 0 and all(isinstance(of_layer, (tuple, list)) for of_layer in argument)
    return callable(getattr(argument, "get_seq_length", None))


def cache_length(cache: Any) -> int:
    """How many tokens a key-value cache holds: a `Cache`, the tuples of older models, or None."""
    if cache is None:
        return 0
    if hasattr(cache, "get_seq_length"):
        return int(cache.get_seq_length())
    # Of the values: some models keep their keys transposed.
    return next((of_layer[1].shape[-2] for of_layer in cache if len(of_layer) > 1), 0)


_FIND_PACKED = getattr(masking_utils, "find_packed_sequence_indices", None)


@contextmanager
def skip_packed_sequence_check() -> Iterator[None]:
    """Within this `with`, Hugging Face models do not look at the numbers of their position ids for rows of several texts.

    They would wait for the GPU there, in the middle of each forward pass. Where they count the positions themselves, such rows
    cannot be.
    """
    if _FIND_PACKED is not None:
        masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        if _FIND_PACKED is not None:
            masking_utils.find_packed_sequence_indices = _FIND_PACKED


def _prepare_conditioning(lang_encoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of the language model: `generate` calls it with the whole prompt, a piece of it or one token."""
    conditioning = _CONDITIONING.get()
    if conditioning is None:
        return
    tokens = args[0] if args else kwargs.get("input_ids")
    if tokens is None:
        tokens = kwargs["inputs_embeds"]
    uses_cache = kwargs.get("use_cache") is not False  # by default most models make one
    cache = find_cache((*args, *kwargs.values()))
    conditioning.prepare_for_call(tokens.shape[0], tokens.shape[1], cache, uses_cache)


# ---------------------------------------------------------------------------------------------------------------------
# The decoder layers


class ConditionedLayer(nn.Module):
    """A gated cross-attention block, or none, and then a decoder layer, in the decoder layer's place.

    Hugging Face models read attributes of their layers (`layer.attention_type`): public ones that this module does not
    have are the decoder layer's.
    """

    def __init__(self, decoder_layer: nn.Module, gated_cross_attn_layer: GatedCrossAttentionBlock | None) -> None:
        super().__init__()
        self.register_module("gated_cross_attn_layer", gated_cross_attn_layer)
        self.decoder_layer = decoder_layer
        self.gradient_checkpointing = False

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or name == "decoder_layer":
                raise
            return getattr(self.decoder_layer, name)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """hidden_states [B, T, D]; all else goes to the decoder layer, whose output is returned as it is."""
        conditioning = _CONDITIONING.get()
        if conditioning is None:
            raise RuntimeError("this language model is conditioned on images: call the Flamingo, not its lang_encoder")
        # A recomputed layer would write to the cache a second time, so there is no checkpointing beside a cache.
        recompute = self.gradient_checkpointing and torch.is_grad_enabled() and not conditioning.uses_cache
        if self.gated_cross_attn_layer is not None:
            inputs = (hidden_states, conditioning.media, conditioning.mask)
            hidden_states = maybe_checkpoint(self.gated_cross_attn_layer, *inputs, recompute=recompute)
        return maybe_checkpoint(self.decoder_layer, hidden_states, *args, recompute=recompute, **kwargs)


def maybe_checkpoint(module: nn.Module, *args: Any, recompute: bool, **kwargs: Any) -> Any:
    """Call `module`, keeping its activations for the backward pass or recomputing them there.

    No random state is kept for the recomputation: nothing here draws random numbers (frozen parts stay in eval mode).
    """
    if recompute:
        return checkpoint(module, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
    return module(*args, **kwargs)


def find_decoder_layers(lang_encoder: nn.Module, attr_name: str | None = None) -> tuple[str, nn.ModuleList]:
    """The name and the list of a model's decoder layers.

    Found by structure: of the lists of layers that do not lie in another list, the one with the most parameters.

    Args:
        lang_encoder: a Hugging Face model.
        attr_name: the list's name ("model.decoder.layers"), if you know better.

    Raises:
        ValueError: there is no such list.
    """
    if attr_name is not None:
        try:
            layers = lang_encoder.get_submodule(attr_name)
        except AttributeError:
            layers = None
        if not isinstance(layers, nn.ModuleList):
            lists = [name for name, module in lang_encoder.named_modules() if isinstance(module, nn.ModuleList)]
            raise ValueError(
                f"decoder_layers_attr_name={attr_name!r} is not a list of layers of {type(lang_encoder).__name__}; "
                f"its lists are: {', '.join(lists) or 'none'}"
            )
        return attr_name, layers

    outermost: dict[str, nn.ModuleList] = {}
    for name, module in lang_encoder.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in outermost)
        if isinstance(module, nn.ModuleList) and len(module) > 0 and not inside:
            outermost[name] = module
    if not outermost:
        raise ValueError(
            f"found no list of decoder layers in {type(lang_encoder).__name__}: name it with decoder_layers_attr_name"
        )
    name = max(outermost, key=lambda name: sum(p.numel() for p in outermost[name].parameters()))
    return name, outermost[name]


def hidden_size(lang_encoder: nn.Module) -> int:
    """D, the width of the hidden states between decoder layers (OPT-350m's embedding is narrower)."""
    config: Any = lang_encoder.config
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    for name in ("hidden_size", "d_model", "n_embd"):
        if getattr(config, name, None) is not None:
            return int(getattr(config, name))
    return input_embedding(lang_encoder).weight.shape[1]


def add_gated_cross_attention(
    lang_encoder: nn.Module, dim_visual: int, every_n_layers: int = 1, attr_name: str | None = None
) -> tuple[str, nn.ModuleList]:
    """Wrap each decoder layer in place; every n-th, counting from 1, gets a gated block before it.

    Returns:
        The name and the list of the layers, now `ConditionedLayer`s.

    Raises:
        ValueError: no decoder layers were found, or `every_n_layers` leaves none of them a gated block.
    """
    name, layers = find_decoder_layers(lang_encoder, attr_name)
    if not 1 <= every_n_layers <= len(layers):
        raise ValueError(f"cross_attn_every_n_layers must be 1 to {len(layers)} for this model, not {every_n_layers}")
    for index, layer in enumerate(layers):
        gated = None
        if (index + 1) % every_n_layers == 0:
            gated = GatedCrossAttentionBlock(hidden_size(lang_encoder), dim_visual)
        layers[index] = ConditionedLayer(layer, gated)
    lang_encoder.register_forward_pre_hook(_prepare_conditioning, with_kwargs=True)
    return name, layers


# ---------------------------------------------------------------------------------------------------------------------
# The rows of the new tokens


def input_embedding(lang_encoder: nn.Module) -> nn.Embedding:
    """The embedding of input ids."""
    return lang_encoder.get_input_embeddings()  # type: ignore[operator]  # mypy cannot see Hugging Face's methods


def output_head(lang_encoder: nn.Module) -> nn.Module | None:
    """The module that makes logits of hidden states, None if the model has none."""
    return lang_encoder.get_output_embeddings()  # type: ignore[operator]


def heads_are_tied(lang_encoder: nn.Module) -> bool:
    """Whether the output head's matrix is the input embedding's."""
    head = output_head(lang_encoder)
    return head is not None and head.weight is input_embedding(lang_encoder).weight


def add_new_token_rows(
    lang_encoder: nn.Module, token_ids: Sequence[int], train_output_rows: bool = False
) -> list[nn.Parameter]:
    """Give the rows of `token_ids` a parameter of their own, `new_rows` [K, D], beside the frozen embedding matrix.

    Hooks put them in, so the modules keep their class, their forward and their names. Where the head is tied, the
    logits of these tokens come from the same rows.

    Args:
        lang_encoder: the model, its matrices already large enough.
        token_ids: the new tokens; sorted by id in `new_rows`.
        train_output_rows: with an untied head, its rows of these tokens become a second such parameter.

    Returns:
        The parameters made: of the input, and of the output if there is one.

    Raises:
        ValueError: an id lies beyond the embedding matrix.
    """
    embedding, head = input_embedding(lang_encoder), output_head(lang_encoder)
    ids = sorted(token_ids)
    if ids[0] < 0 or ids[-1] >= len(embedding.weight):
        raise ValueError(f"token ids {ids} do not lie in an embedding matrix of {len(embedding.weight)} rows")
    embedding.padding_idx = None  # it only stops the gradient of one row, and here it would stop a trained one's
    parameters = [_add_rows(embedding, ids)]
    if head is embedding:
        patch = EmbeddingPatch(embedding)
        lang_encoder.register_forward_pre_hook(patch.apply)
        lang_encoder.register_forward_hook(patch.restore, always_call=True)
        return parameters
    embedding.register_forward_hook(_embed_new_tokens)
    if heads_are_tied(lang_encoder):
        assert head is not None
        head.register_forward_hook(partial(_new_token_logits, embedding))
    elif train_output_rows and head is not None:
        parameters.append(_add_rows(head, ids))
        head.register_forward_hook(partial(_new_token_logits, head))
    return parameters


def _add_rows(module: nn.Module, ids: Sequence[int]) -> nn.Parameter:
    """Copy the rows `ids` of `module.weight` into a parameter of its own."""
    weight: Any = module.weight
    rows = nn.Parameter(weight.detach()[list(ids)].clone())
    module.register_parameter("new_rows", rows)
    module.register_buffer("new_ids", torch.tensor(ids, device=weight.device), persistent=False)
    return rows


def _embed_new_tokens(embedding: nn.Module, args: tuple[Any, ...], embedded: Tensor) -> Tensor:
    """Forward hook of the embedding: put in the trained rows.

    A subclass may do more than look up (Gemma 3 scales what it finds), so its own forward finds the trained rows too,
    with them as its matrix.
    """
    is_new = args[0].unsqueeze(-1) == embedding.new_ids  # bool[B, T, K]
    frozen = embedding._parameters["weight"]
    embedding._parameters["weight"] = embedding.new_rows  # type: ignore[assignment]
    try:
        trained = embedding.forward(is_new.int().argmax(-1))
    finally:
        embedding._parameters["weight"] = frozen
    return torch.where(is_new.any(-1, keepdim=True), trained.to(embedded.dtype), embedded)


def _new_token_logits(owner: nn.Module, head: nn.Module, args: tuple[Any, ...], logits: Tensor) -> Tensor:
    """Forward hook of the output head: the logits of the new tokens come from `owner.new_rows`."""
    ids: Any = owner.new_ids
    rows: Any = owner.new_rows
    bias: Any = getattr(head, "bias", None)
    new_logits = F.linear(args[0], rows.to(args[0].dtype), None if bias is None else bias[ids])
    return logits.index_copy(-1, ids, new_logits.to(logits.dtype))


class EmbeddingPatch:
    """For a model with no head module, which multiplies by its embedding's matrix somewhere in its forward (the code of
    MPT-1B): during its forward, the matrix is a new one with the trained rows written in.

    That costs a copy of the matrix and a gradient of its size on the way to the rows, as in the reference.
    """

    def __init__(self, embedding: nn.Embedding) -> None:
        self.embedding = embedding
        self.frozen: list[Any] = []

    def apply(self, lang_encoder: nn.Module, args: tuple[Any, ...]) -> None:
        weight, ids, rows = (getattr(self.embedding, name) for name in ("weight", "new_ids", "new_rows"))
        self.frozen.append(weight)
        self.embedding._parameters["weight"] = weight.index_copy(0, ids, rows.to(weight.dtype))

    def restore(self, lang_encoder: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.embedding._parameters["weight"] = self.frozen.pop()
