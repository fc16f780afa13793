"""Errors that the user's input causes: one line each."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

# Argument of `create_model_and_transforms`, which its errors name → flag.
MODEL_FLAGS = {
    "clip_vision_encoder_path": "--vision_encoder_path",
    "clip_vision_encoder_pretrained": "--vision_encoder_pretrained",
    "lang_encoder_path": "--lm_path",
    "tokenizer_path": "--tokenizer_path (by default that of --lm_path)",
    "cross_attn_every_n_layers": "--cross_attn_every_n_layers",
    "trust_remote_code=True": "--trust_remote_code",
}


class UserError(RuntimeError):
    """The run cannot be what the user asked for; the message says why and what to do."""


@contextmanager
def user_error(what: str, flags: Mapping[str, str] | None = None) -> Iterator[None]:
    """Turn errors that the user's input causes into one line, which begins with `what`. `flags`: argument that errors name → flag."""
    try:
        yield
    except (ValueError, OSError) as error:
        message = str(error)
        for argument, flag in (flags or {}).items():
            message = message.replace(argument, flag, 1)
        raise UserError(f"{what}: {message}") from error
