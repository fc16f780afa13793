"""Gated cross-attention into any Hugging Face decoder-only model, and the trained rows of the new tokens.

The model is taken as it is: found by structure, its own `forward` and `generate` untouched. Two changes are made to it.

1. Each decoder layer is wrapped in a `ConditionedLayer`, which runs a gated cross-attention block before it. Hugging Face code calls
   the layers, so the images reach them through a context that one `with conditioned(...)` sets.
2. The rows of the new tokens become a small parameter, `new_rows`, beside the frozen embedding matrix: the optimizer keeps state
   for two rows instead of the vocabulary, and the matrix never gets a gradient.

Dimensions: B batch, T text tokens, N images, L latents per image, E image width, D text width, K new tokens.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .cross_attention import GatedCrossAttentionBlock, MediaMask, media_mask


@dataclass
class Conditioning:
    """The images of a batch, and which of them each token sees. Tokens after the prompt see what its last token sees."""

    latents: Tensor  # [B, N, L, E]
    text_time: Tensor  # long[B, T], the number (from 1) of the image that each token of the prompt sees, 0 for none
    start: int = 0  # how many tokens the cache held before the prompt's first
    # Of one call of the language model:
    media: Tensor = field(init=False)  # [B, N·L, E]
    mask: MediaMask = field(init=False)  # of [batch, num_tokens]
    uses_cache: bool = field(init=False, default=False)  # whether the call writes to a key-value cache
    # Keys and values of the media, by attention.
    media_cache: dict[nn.Module, Tensor] = field(init=False, default_factory=dict)
    _most_uncached: int = field(init=False, default=0)

    def prepare_for_call(self, tokens: Tensor, cache: Any = None, uses_cache: bool = False) -> None:
        """Set what the layers read during a call on `tokens` [batch, num_tokens] or their embeddings, which follow those in `cache`.

        `batch` may be a multiple of B: beam search and `num_return_sequences` repeat each row in place. Raises ValueError if the
        call goes on from earlier tokens, but has no cache to tell how many.
        """
        batch, num_tokens = tokens.shape[:2]
        first, last = 0, self.text_time.shape[1] - 1
        if cache is not None:
            first = cache_length(cache) - self.start
        elif num_tokens > max(last, self._most_uncached):
            self._most_uncached = num_tokens  # each call has the whole text, which grows as it is generated
        else:
            raise ValueError(
                f"a call on {num_tokens} tokens goes on from a text of {max(last + 1, self._most_uncached)}, and none of its "
                "arguments is known as a key-value cache: which images its tokens see cannot be told. Pass use_cache=False"
            )
        positions = torch.arange(first, first + num_tokens, device=self.text_time.device).clamp_(0, last)
        # Not a view: torch.compile would compile again for another way of being one.
        text_time, media = self.text_time[:, positions], self.latents.flatten(1, 2).clone()
        repeats, rest = divmod(batch, len(media))
        if rest or not repeats:
            raise ValueError(f"images of {len(media)} rows cannot serve a text batch of {batch} rows")
        if repeats > 1:
            text_time = text_time.repeat_interleave(repeats, 0)  # of the media, attention needs no copies
        self.media = media
        num_images, num_latents = self.latents.shape[1:3]
        self.mask = media_mask(text_time, num_images, num_latents, compute_dtype(media))
        self.uses_cache = uses_cache or cache is not None


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """What products of `tensor` are computed in: autocast's type where it is enabled."""
    device = tensor.device.type
    is_on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if is_on else tensor.dtype


_CONDITIONING: ContextVar[Conditioning | None] = ContextVar("conditioning", default=None)


@contextmanager
def conditioned(conditioning: Conditioning) -> Iterator[None]:
    """Within this `with`, the decoder layers see `conditioning`. The only thing that sets or clears it."""
    token = _CONDITIONING.set(conditioning)
    try:
        yield
    finally:
        _CONDITIONING.reset(token)


@contextmanager
def replaced(owner: dict[str, Any], name: str, value: Any) -> Iterator[None]:
    """Within this `with`, `owner[name]` is `value`."""
    own = {name: owner[name]} if name in owner else {}
    owner[name] = value
    try:
        yield
    finally:
        del owner[name]
        owner |= own


def find_cache(arguments: Iterable[Any]) -> Any:
    """The key-value cache among the arguments of a call, if any: its name differs between models and versions of transformers."""
    for argument in arguments:
        if callable(getattr(argument, "get_seq_length", None)):
            return argument
        # Older models: (keys, values) of each layer, at first without a tensor.
        if isinstance(argument, (tuple, list)) and argument and all(isinstance(x, (tuple, list)) for x in argument):
            return argument
    return None


def cache_length(cache: Any) -> int:
    """How many tokens a key-value cache holds: a `Cache`, the tuples of older models, or None."""
    if hasattr(cache, "get_seq_length"):
        return int(cache.get_seq_length())
    # Of the values: some models keep their keys transposed.
    return next((of_layer[1].shape[-2] for of_layer in cache or () if len(of_layer) > 1), 0)


def _prepare_conditioning(lang_encoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of the language model: `generate` calls it with the whole prompt, a piece of it or one token."""
    conditioning = _CONDITIONING.get()
    if conditioning is None:
        return
    tokens = args[0] if args else kwargs.get("input_ids")
    if tokens is None:
        tokens = kwargs["inputs_embeds"]
    uses_cache = kwargs.get("use_cache") is not False  # by default most models make one
    conditioning.prepare_for_call(tokens, find_cache((*args, *kwargs.values())), uses_cache)


class ConditionedLayer(nn.Module):
    """A gated cross-attention block, or none, and then a decoder layer, in the decoder layer's place."""

    def __init__(self, decoder_layer: nn.Module, gated_cross_attn_layer: GatedCrossAttentionBlock | None) -> None:
        super().__init__()
        self.register_module("gated_cross_attn_layer", gated_cross_attn_layer)
        self.decoder_layer = decoder_layer
        self.gradient_checkpointing = False

    def __getattr__(self, name: str) -> Any:
        """Public attributes that this module lacks are the decoder layer's: models read some (`layer.attention_type`)."""
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
            # A generated token sees the images of the one before: their keys and values are computed once.
            media_cache = conditioning.media_cache if conditioning.uses_cache and not torch.is_grad_enabled() else None
            # By argument: the recomputation in the backward pass has no context.
            inputs = (hidden_states, conditioning.media, conditioning.mask, media_cache)
            hidden_states = maybe_checkpoint(self.gated_cross_attn_layer, *inputs, recompute=recompute)
        return maybe_checkpoint(self.decoder_layer, hidden_states, *args, recompute=recompute, **kwargs)


def maybe_checkpoint(module: nn.Module, *args: Any, recompute: bool, **kwargs: Any) -> Any:
    """Call `module`, keeping its activations for the backward pass or recomputing them there."""
    if recompute:  # no random state is kept: frozen parts stay in eval mode, trained ones draw no random numbers
        return checkpoint(module, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
    return module(*args, **kwargs)


def find_decoder_layers(lang_encoder: nn.Module, attr_name: str | None) -> tuple[str, nn.ModuleList]:
    """The name and the list of a model's decoder layers: `attr_name` ("model.decoder.layers"), or else found by structure.

    That is, of the lists of layers that do not lie in another list, the one with the most parameters.
    """
    model = type(lang_encoder).__name__
    lists = {name: m for name, m in lang_encoder.named_modules(remove_duplicate=False) if isinstance(m, nn.ModuleList)}
    if attr_name is not None:
        if attr_name not in lists:
            raise ValueError(
                f"decoder_layers_attr_name={attr_name!r} is not a list of layers of {model}; "
                f"its lists are: {', '.join(lists) or 'none'}"
            )
        return attr_name, lists[attr_name]
    outermost = [name for name in lists if len(lists[name]) and not any(name.startswith(f"{x}.") for x in lists)]
    if not outermost:
        raise ValueError(f"found no list of decoder layers in {model}: name it with decoder_layers_attr_name")
    name = max(outermost, key=lambda name: sum(p.numel() for p in lists[name].parameters()))
    return name, lists[name]


def add_gated_cross_attention(lang_encoder: Any, dim_visual: int, every_n_layers: int, attr_name: str | None) -> str:
    """Wrap each decoder layer in place; every n-th, counting from 1, gets a gated block before it. Returns the layers' name.

    Raises ValueError if there are no decoder layers, or `every_n_layers` leaves none of them a gated block.
    """
    name, layers = find_decoder_layers(lang_encoder, attr_name)
    if not 1 <= every_n_layers <= len(layers):
        raise ValueError(f"cross_attn_every_n_layers must be 1 to {len(layers)} for this model, not {every_n_layers}")
    config = lang_encoder.config.get_text_config()
    widths = (getattr(config, name, None) for name in ("hidden_size", "d_model", "n_embd"))
    # The embedding's only if the config does not say: OPT-350m's is narrower than the hidden states.
    dim = next((width for width in widths if width is not None), input_embedding(lang_encoder).weight.shape[1])
    for number, layer in enumerate(layers, start=1):
        gated = GatedCrossAttentionBlock(dim, dim_visual) if number % every_n_layers == 0 else None
        layers[number - 1] = ConditionedLayer(layer, gated)
    lang_encoder.register_forward_pre_hook(_prepare_conditioning, with_kwargs=True)
    return name


def input_embedding(lang_encoder: nn.Module) -> nn.Embedding:
    """The embedding of input ids."""
    return lang_encoder.get_input_embeddings()  # type: ignore[operator]  # mypy cannot see Hugging Face's methods


def output_head(lang_encoder: nn.Module) -> Any:
    """The module that makes logits of hidden states: for a model without one, its embedding, or None."""
    return lang_encoder.get_output_embeddings()  # type: ignore[operator]


def heads_are_tied(lang_encoder: nn.Module) -> bool:
    """Whether the output head's matrix is the input embedding's."""
    return output_head(lang_encoder).weight is input_embedding(lang_encoder).weight


def add_new_token_rows(lang_encoder: nn.Module, token_ids: Sequence[int], train_output_rows: bool) -> nn.Parameter:
    """Give the rows of `token_ids` a parameter of their own, `new_rows` [K, D], beside the frozen embedding matrix.

    Hooks put them in, so the modules keep their class, their forward and their names. Where the head is tied, the logits of these
    tokens come from the same rows; where it is not, its own rows become a second such parameter if `train_output_rows`.

    Returns the embedding's `new_rows`, sorted by token id. Raises ValueError if an id lies beyond the matrix.
    """
    embedding, head = input_embedding(lang_encoder), output_head(lang_encoder)
    ids = sorted(token_ids)
    if ids[0] < 0 or ids[-1] >= len(embedding.weight):
        raise ValueError(f"token ids {ids} do not lie in an embedding matrix of {len(embedding.weight)} rows")
    embedding.padding_idx = None  # it only stops the gradient of one row, and here it would stop a trained one's
    rows = _add_rows(embedding, ids)
    if head is embedding:
        patch = EmbeddingPatch(embedding)
        lang_encoder.register_forward_pre_hook(patch.apply)
        lang_encoder.register_forward_hook(patch.restore, always_call=True)
        return rows
    embedding.register_forward_hook(_embed_new_tokens)
    if heads_are_tied(lang_encoder):
        head.register_forward_hook(partial(_new_token_logits, embedding))
    elif train_output_rows:
        _add_rows(head, ids)
        head.register_forward_hook(partial(_new_token_logits, head))
    return rows


def _add_rows(module: nn.Module, ids: Sequence[int]) -> nn.Parameter:
    """Copy the rows `ids` of `module.weight` into a parameter of its own."""
    weight: Any = module.weight
    rows = nn.Parameter(weight.detach()[list(ids)])
    module.register_parameter("new_rows", rows)
    module.register_buffer("new_ids", torch.tensor(ids, device=weight.device), persistent=False)
    return rows


def _embed_new_tokens(embedding: Any, args: tuple[Any, ...], embedded: Tensor) -> Tensor:
    """Forward hook of the embedding: put in the trained rows."""
    is_new = args[0].unsqueeze(-1) == embedding.new_ids  # bool[B, T, K]
    # A subclass may do more than look up (Gemma 3 scales what it finds), so its own forward finds the trained rows too.
    with replaced(embedding._parameters, "weight", embedding.new_rows):
        trained = embedding.forward(is_new.int().argmax(-1))
    return torch.where(is_new.any(-1, keepdim=True), trained.to(embedded.dtype), embedded)


def _new_token_logits(owner: Any, head: nn.Module, args: tuple[Any, ...], logits: Tensor) -> Tensor:
    """Forward hook of the output head: the logits of the new tokens come from `owner.new_rows`."""
    bias: Any = getattr(head, "bias", None)
    rows = owner.new_rows.to(args[0].dtype)
    new_logits = F.linear(args[0], rows, None if bias is None else bias[owner.new_ids])
    return logits.index_copy_(-1, owner.new_ids, new_logits.to(logits.dtype))  # in place: there is no larger tensor


class EmbeddingPatch:
    """For a model with no head module, which multiplies by its embedding's matrix somewhere in its forward (the code of MPT-1B):
    during its forward, the matrix is a copy with the trained rows written in, and gets a whole gradient, as in the reference."""

    def __init__(self, embedding: Any) -> None:
        self.embedding = embedding
        self.patched = ExitStack()

    def apply(self, lang_encoder: nn.Module, args: tuple[Any, ...]) -> None:
        weight, rows = self.embedding.weight, self.embedding.new_rows
        whole = weight.index_copy(0, self.embedding.new_ids, rows.to(weight.dtype))
        self.patched.enter_context(replaced(self.embedding._parameters, "weight", whole))

    def restore(self, lang_encoder: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.patched.close()
