"""What the programs that use a trained model share. Nothing heavy is imported here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from open_flamingo import Flamingo

# Flags that are arguments of `open_flamingo.load`: what a checkpoint may not record.
MODEL_FLAGS = (
    "vision_encoder_path",
    "vision_encoder_pretrained",
    "lm_path",
    "tokenizer_path",
    "cross_attn_every_n_layers",
)


def max_prompt_tokens(model: Flamingo, answer_tokens: int) -> int | None:
    """What the language model has room for beside the answer; None where its config names no limit."""
    config: Any = model.lang_encoder.config.get_text_config()  # type: ignore[operator,union-attr]
    limits = (getattr(config, name, None) for name in ("max_position_embeddings", "n_positions", "max_seq_len"))
    limit = next((limit for limit in limits if limit), None)
    return None if limit is None else limit - answer_tokens


@contextmanager
def together() -> Iterator[None]:
    """Raise on all ranks what goes wrong on one, so that none waits for it: a ValueError or OSError, or that its memory is full."""
    from open_flamingo.train.distributed import raise_on_all_ranks

    with raise_on_all_ranks():
        try:
            yield
        except RuntimeError as error:
            if "out of memory" not in str(error):
                raise
            reason = str(error).partition("\n")[0]
            raise ValueError(f"{reason} Try a smaller --batch_size or --kept_images, or --dtype bfloat16") from error
