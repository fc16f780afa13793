"""Errors that the user's input causes: one line each."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager


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
