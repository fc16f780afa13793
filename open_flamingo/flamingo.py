"""Flamingo: images → patch tokens → latents → a language model that sees them.

After Flamingo (Alayrac et al. 2022) and open-flamingo 2.0.1, whose interface and parameter names this keeps.

Dimensions: B batch, T text tokens, I image slots, N most images of a row, M images in all, F frames (1), V patch tokens, L latents
per image, E width of images.
"""

import inspect
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelHubMixin
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys
from transformers import masking_utils
from transformers.modeling_outputs import CausalLMOutputWithPast

from . import mpt, saving
from .cross_attention import GatedCrossAttentionBlock
from .language_model import (
    Conditioning,
    add_gated_cross_attention,
    add_new_token_rows,
    cache_length,
    conditioned,
    maybe_checkpoint,
    output_head,
    replaced,
)
from .loss import LabeledPositions, copy_to, full_loss, has_base_model, labeled_loss, labeled_positions
from .resampler import PerceiverResampler
from .vision import patch_tokens
from .weights import load_into


class Flamingo(nn.Module, ModelHubMixin):
    """A vision encoder and a language model, both frozen, joined by what is trained: a Perceiver resampler, gated
    cross-attention blocks, and the embeddings of `<image>` and `<|endofchunk|>`.

    `save_pretrained(folder)` and `push_to_hub(name)`, of huggingface_hub's mixin, write what `open_flamingo.load` reads: see `saving`. The
    model card, which is not written over, has the flags of the training, which name the places of its data.

    Args:
        vision_encoder: an OpenCLIP vision tower (or any module that gives patch tokens, see `vision.patch_tokens`).
        lang_encoder: a Hugging Face decoder-only causal language model, changed in place; ValueError for any other.
        eoc_token_id: id of `<|endofchunk|>`, which ends a generated text.
        media_token_id: id of `<image>`, which marks an image's place in the text.
        vis_dim: E, the width of the vision encoder's patch tokens.
        cross_attn_every_n_layers: a gated block before every n-th decoder layer.
        gradient_checkpointing: see `set_gradient_checkpointing`.
        decoder_layers_attr_name: where the language model's decoder layers are; found by structure if None.
        freeze_lm_embeddings: do not train the new tokens' rows.
        train_output_rows: where the output head is not tied to the input embedding, train its rows of the new tokens too.
        pad_token_id: what `generate` pads with; the language model's own, or else `eoc_token_id`, if None.
    """

    def __init__(
        self,
        vision_encoder: nn.Module,
        lang_encoder: nn.Module,
        eoc_token_id: int,
        media_token_id: int,
        vis_dim: int,
        cross_attn_every_n_layers: int = 1,
        gradient_checkpointing: bool = False,
        *,
        decoder_layers_attr_name: str | None = None,
        freeze_lm_embeddings: bool = False,
        train_output_rows: bool = False,
        pad_token_id: int | None = None,
    ) -> None:
        super().__init__()
        name = type(lang_encoder).__name__
        if getattr(getattr(lang_encoder, "config", None), "is_encoder_decoder", False):
            raise ValueError(f"{name} is an encoder-decoder model; a decoder-only language model is needed")
        if not hasattr(lang_encoder, "get_output_embeddings") or output_head(lang_encoder) is None:
            raise ValueError(f"{name} has no language-modeling head; load it with AutoModelForCausalLM")
        self.eoc_token_id = eoc_token_id
        self.media_token_id = media_token_id
        self.pad_token_id = pad_token_id
        self.vis_dim = vis_dim

        # What is added after freezing is trained. The order is the reference's: its optimizer state is numbered by it.
        self.vision_encoder = vision_encoder.requires_grad_(False)
        self.perceiver = PerceiverResampler(vis_dim)
        self.lang_encoder = lang_encoder.requires_grad_(False)
        self.decoder_layers_name = add_gated_cross_attention(
            self.lang_encoder, vis_dim, cross_attn_every_n_layers, decoder_layers_attr_name
        )
        rows = add_new_token_rows(self.lang_encoder, [eoc_token_id, media_token_id], train_output_rows)
        rows.requires_grad_(not freeze_lm_embeddings)

        self._has_fused_mpt = mpt.fuse_attention(self.lang_encoder)
        parameters = inspect.signature(self.lang_encoder.forward).parameters
        self._takes_position_ids = "position_ids" in parameters
        self._takes_logits_to_keep = "logits_to_keep" in parameters
        names = ("cache", "past_key_values", "cache_params")  # transformers from 5.24 on, before, and some hybrids
        self._cache_name = next((name for name in names if name in parameters), "past_key_values")
        self._cached_media: tuple[Tensor, Tensor] | None = None
        self.origin: saving.Origin | None = None  # what it was made of, where `create_model_and_transforms` made it
        self.set_gradient_checkpointing(gradient_checkpointing)
        self.train(self.training)

    @property
    def decoder_layers(self) -> nn.ModuleList:
        """The language model's layers, each a `ConditionedLayer`."""
        return self.lang_encoder.get_submodule(self.decoder_layers_name)  # type: ignore[return-value]

    def set_gradient_checkpointing(self, enabled: bool = True) -> None:
        """Recompute gated blocks, decoder layers and the resampler in the backward pass: less memory, one more forward."""
        self.gradient_checkpointing = enabled
        for layer in self.decoder_layers:
            layer.gradient_checkpointing = enabled  # type: ignore[assignment]

    def train(self, mode: bool = True) -> "Flamingo":
        """Set the mode of what is trained. The frozen parts stay in eval mode always: dropout there (OPT's, in the reference) is noise
        in a function that is not being fitted, and different on every layout of ranks."""
        super().train(mode)
        self.vision_encoder.eval()
        self.lang_encoder.eval()
        for module in self.lang_encoder.modules():
            if isinstance(module, GatedCrossAttentionBlock):
                module.train(mode)
        return self

    def forward(
        self,
        vision_x: Tensor | None,
        lang_x: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | LabeledPositions | None = None,
        clear_conditioned_layers: bool = True,
        past_key_values: Any = None,
        use_cache: bool = False,
        *,
        image_counts: Sequence[int] | None = None,
        per_token: bool = False,
        logits_to_keep: int | None = None,
    ) -> CausalLMOutputWithPast:
        """The `loss` of `labels` (float32 scalar, mean over those that count, 0 if none does), or all `logits` [B, T, vocabulary].

        Args:
            vision_x: images [B, I, F, 3, height, width], prepared by the image processor, F = 1. Row b's images are its first slots,
                one for each `<image>` token of its text in their order (ValueError if they are too few); later slots are padding
                and are not looked at. None: the images given to `cache_media`.
            lang_x: token ids, long[B, T].
            attention_mask: [B, T], 0 where a token is padding. Padding on the right needs none: in a causal model no real token
                sees it. (Without one, attention runs its faster causal kernels.)
            labels: long[B, T], -100 where a token does not count. With labels, `logits` is None: only the logits of positions whose
                next token has a label are made, a piece at a time. Picking these positions waits for the GPU if the labels are
                there (where FSDP puts all tensors that it is given): `labeled_positions` of labels on the CPU does not.
            clear_conditioned_layers: accepted for the reference's callers. Nothing needs clearing here.
            past_key_values: a cache of earlier tokens, as Hugging Face models take it. The images are those of `lang_x` nevertheless,
                or those of `cache_media`.
            use_cache: return `past_key_values` (without labels).
            image_counts: how many `<image>` tokens each row of `lang_x` has. Saves waiting for the GPU to count them.
            per_token: without gradients, `loss` is that of each label that counts, float32[P], in the order of `labeled_positions`.
            logits_to_keep: without labels, make only the logits of the last so many positions, where the language model can; the last
                position of `logits` is the text's last either way.
        """
        # What waits for the GPU comes first, while little is queued there.
        labeled = labeled_positions(labels, lang_x.device) if isinstance(labels, Tensor) else labels
        conditioning = self._condition(vision_x, lang_x, image_counts, start=cache_length(past_key_values))
        inputs: dict[str, Any] = {"input_ids": lang_x, "attention_mask": attention_mask}
        if attention_mask is not None and self._takes_position_ids:
            # By default some models count left padding as positions.
            positions = attention_mask.long().cumsum(-1).sub_(1).clamp_(min=0)
            inputs["position_ids"] = positions[:, -lang_x.shape[1] :]
        if logits_to_keep is not None and labeled is None and self._takes_logits_to_keep:
            inputs["logits_to_keep"] = logits_to_keep
        if past_key_values is not None:
            inputs[self._cache_name] = past_key_values
        elif self._has_fused_mpt and attention_mask is None and not use_cache:
            inputs["attention_mask"] = mpt.causal_mask(lang_x.shape[1], lang_x.device)

        with conditioned(conditioning):
            if labeled is None:
                return self.lang_encoder(**inputs, use_cache=use_cache)
            if not has_base_model(self.lang_encoder):
                logits = self.lang_encoder(**inputs, use_cache=False).logits
                return CausalLMOutputWithPast(loss=full_loss(logits, *labeled, per_token))
            base_model: Any = self.lang_encoder.base_model
            conditioning.prepare_for_call(lang_x, past_key_values)
            # Hugging Face models would look for rows of several texts in the position ids, and wait for the GPU in each forward pass.
            with replaced(vars(masking_utils), "find_packed_sequence_indices", lambda position_ids: None):
                hidden_states = base_model(**inputs, use_cache=False)[0]
            return CausalLMOutputWithPast(loss=labeled_loss(self.lang_encoder, hidden_states, *labeled, per_token))

    @torch.no_grad()
    def generate(
        self,
        vision_x: Tensor | None,
        lang_x: Tensor,
        attention_mask: Tensor | None = None,
        *,
        beams_share_prompt: bool = False,
        **generate_kwargs: Any,
    ) -> Tensor:
        """Continue prompts, with Hugging Face's `generate`: long[B, T] → long[B · num_return_sequences, T + new tokens].

        Args:
            vision_x: as for `forward`.
            lang_x: prompts, padded on the left.
            attention_mask: [B, T], 0 where a token is padding. None: every token but the padding token counts.
            beams_share_prompt: compute a prompt once and repeat its key-value cache for `num_beams`, instead of computing it for each.
                Not every language model can; those of attention alone do.
            generate_kwargs: `max_new_tokens`, `num_beams`, … By default a text ends with `<|endofchunk|>`.
        """
        generate_kwargs.setdefault("eos_token_id", self.eoc_token_id)
        config: Any = getattr(self.lang_encoder, "generation_config", self.lang_encoder.config)
        pad = next((i for i in (self.pad_token_id, config.pad_token_id) if i is not None), self.eoc_token_id)
        pad = generate_kwargs.setdefault("pad_token_id", pad)
        if attention_mask is None:
            attention_mask = torch.ones_like(lang_x) if pad == self.eoc_token_id else (lang_x != pad).long()
        conditioning = self._condition(vision_x, lang_x, None)
        beams = generate_kwargs.get("num_beams", 1)
        if beams_share_prompt and beams > 1 and lang_x.shape[1] > 1:
            generate_kwargs[self._cache_name] = self._prompt_cache(conditioning, lang_x, attention_mask, beams)
            generate_kwargs["use_cache"] = True  # which is off in MPT's config
        with conditioned(conditioning):
            generate: Any = self.lang_encoder.generate
            return generate(input_ids=lang_x, attention_mask=attention_mask, **generate_kwargs)

    def _prompt_cache(self, conditioning: Conditioning, lang_x: Tensor, attention_mask: Tensor, beams: int) -> Any:
        """The key-value cache of prompts [B, T] but for their last token, of which `generate` goes on, for B · `beams` rows."""
        prompt = Conditioning(conditioning.latents, conditioning.text_time[:, :-1])
        prompt.media_cache = conditioning.media_cache
        inputs: dict[str, Any] = {"input_ids": lang_x[:, :-1], "attention_mask": attention_mask[:, :-1]}
        if self._takes_position_ids:
            inputs["position_ids"] = inputs["attention_mask"].long().cumsum(-1).sub_(1).clamp_(min=0)
        if self._takes_logits_to_keep:
            inputs["logits_to_keep"] = 1
        with conditioned(prompt):
            cache = self.lang_encoder(**inputs, use_cache=True).past_key_values
        cache.reorder_cache(torch.arange(len(lang_x), device=lang_x.device).repeat_interleave(beams))
        return cache

    def cache_media(self, input_ids: Tensor, vision_x: Tensor) -> None:
        """Keep the latents of the images [B, I, 1, 3, height, width] of a context, long[B, T], for calls with `vision_x=None`.

        Text with no `<image>` in any row then sees each row's last image of the context; otherwise its `<image>` tokens stand for
        the cached images, from the first.
        """
        counts = (input_ids == self.media_token_id).sum(1).tolist()
        self.cache_latents(self._encode_images(vision_x, counts, len(input_ids)), counts)

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """Images [M, 3, height, width], prepared by the image processor → latents [M, L, E], for `cache_latents`.

        An image that stands in many prompts is encoded once.
        """
        return self._encode(images.unsqueeze(1))

    def cache_latents(self, latents: Tensor, counts: Sequence[int]) -> None:
        """As `cache_media`, of images that are encoded: latents [B, N, L, E], of which row b has its first `counts[b]`."""
        self._cached_media = (latents, torch.tensor(counts, device=latents.device).unsqueeze(1))

    def uncache_media(self) -> None:
        """Forget the images of `cache_media`."""
        self._cached_media = None

    def _condition(
        self, vision_x: Tensor | None, lang_x: Tensor, image_counts: Sequence[int] | None, start: int = 0
    ) -> Conditioning:
        """What the decoder layers need to know of the images."""
        text_time = (lang_x == self.media_token_id).cumsum(1)
        counts = text_time[:, -1].tolist() if image_counts is None else image_counts
        if vision_x is not None:
            latents = self._encode_images(vision_x, counts, len(lang_x))
        elif self._cached_media is not None:
            latents, last = self._cached_media
            check_counts(counts, latents.shape[1])
            if not any(counts):
                text_time = last.expand(-1, lang_x.shape[1])  # rows of text may be a multiple of those that are cached
        else:
            raise ValueError("vision_x is None, and no images are cached: pass images, or call cache_media first")
        return Conditioning(latents, text_time, start)

    def _encode_images(self, vision_x: Tensor, counts: Sequence[int], rows: int) -> Tensor:
        """Latents [B, N, L, E] of the images that the text names, `counts` of each of the `rows`; N is at least 1.

        Only those reach the vision encoder. A batch that names none still encodes one slot, which no token sees: its gradient is 0,
        but every trained parameter takes part in the step, as data parallelism needs.
        """
        if vision_x.ndim != 6 or vision_x.shape[2] != 1:
            shape = tuple(vision_x.shape)
            raise ValueError(f"vision_x must be (batch, images, one frame, channels, height, width), not {shape}")
        if len(vision_x) != rows or len(counts) != rows:
            raise ValueError(f"{rows} rows of text, but {len(vision_x)} of images and {len(counts)} image counts")
        slots = vision_x.shape[1]
        check_counts(counts, slots)
        if slots and all(count == slots for count in counts):
            return self._encode(vision_x.flatten(0, 1)).unflatten(0, (rows, slots))

        real = [(row, image) for row, count in enumerate(counts) for image in range(count)] or [(0, 0)]
        index = copy_to(vision_x.device, torch.tensor(real).T)
        images = vision_x[index[0], index[1]] if slots else vision_x.new_zeros(1, *vision_x.shape[2:])
        latents = self._encode(images)
        padded = latents.new_zeros(rows, max(1, *counts), *latents.shape[1:])
        return padded.index_put((index[0], index[1]), latents)

    def _encode(self, images: Tensor) -> Tensor:
        """Images [M, F, 3, height, width] → latents [M, L, E]."""
        dtypes = [parameter.dtype for parameter in self.vision_encoder.parameters()]
        dtype = dtypes[0]
        # A tower that is held in a lower precision throughout gains nothing from autocast but conversions around each norm.
        is_low = dtype != torch.float32 and len({*dtypes}) == 1
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False) if is_low else nullcontext():
            features = patch_tokens(self.vision_encoder, images.flatten(0, 1).to(dtype))
        features = features.unflatten(0, (len(images), 1, -1)).to(self.perceiver.latents.dtype)  # [M, 1, F, V, E]
        recompute = self.gradient_checkpointing and torch.is_grad_enabled()
        return maybe_checkpoint(self.perceiver, features, recompute=recompute).squeeze(1)

    def load_state_dict(
        self, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False
    ) -> _IncompatibleKeys:
        """Load a checkpoint of this program or of the reference; see `weights.load_into`."""
        return load_into(self, state_dict, strict, assign)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> "Flamingo":
        """The model alone that `open_flamingo.load` gives, which takes the same arguments."""
        from .pretrained import load

        return load(pretrained_model_name_or_path, **kwargs)[0]

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Uploads what `save_pretrained` writes; arguments, and what is returned, are those of `ModelHubMixin.push_to_hub`."""
        kwargs["model_card_kwargs"] = {"name": repo_id} | (kwargs.get("model_card_kwargs") or {})
        return super().push_to_hub(repo_id, **kwargs)

    def _save_pretrained(self, save_directory: Path) -> None:
        saving.save(self, save_directory)

    def generate_model_card(self, **kwargs: Any) -> ModelCard:
        """See `saving.card`."""
        return ModelCard(saving.card(self, **kwargs))


def check_counts(counts: Sequence[int], slots: int) -> None:
    """Raise ValueError if a row's text names more images than there are."""
    for row, count in enumerate(counts):
        if count > slots:
            raise ValueError(f"row {row} has {count} <image> tokens but only {slots} image slots")
