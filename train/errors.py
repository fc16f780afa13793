"""How a run ends with an error: one line if the user's input caused it, on one rank or on all."""

import logging
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from open_flamingo.train.data.samples import DataError
from open_flamingo.train.distributed import World
from open_flamingo.train.watchdog import Watchdog, is_communication_error

log = logging.getLogger(__name__)


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


@contextmanager
def exit_on_error(world: World, watchdog: Watchdog) -> Iterator[None]:
    """After an error the last log lines are written; a rank of several says why, or which rank is to blame, and exits at once.

    NCCL takes a process group down with all ranks together, and this rank and the others may be waiting for each other: nobody would
    ever read of the error, or see the exit code.
    """
    try:
        yield
    except BaseException as error:
        watchdog.set_phase("ending after an error", limited=False)
        if world.world_size > 1:
            # torchrun ends all ranks as soon as the first has ended: let this one finish.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            blamed = watchdog.diagnose() if is_communication_error(error) else None
            log.error("%s", blamed or error, exc_info=not (blamed or isinstance(error, (UserError, DataError))))
        watchdog.before_exit()
        if world.world_size == 1:
            raise
        sys.stdout.flush()
        os._exit(1)
