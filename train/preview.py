"""`--preview N`: {run_name}/preview.html, a page of the first samples of a run as they will be trained on, and of what is left out and why.

A single file, without network or server. No training, no GPU.
"""

import logging
from argparse import Namespace
from pathlib import Path

from transformers.utils import logging as transformers_logging

from open_flamingo.train.atomic import atomic_write
from open_flamingo.train.data.options import data_options
from open_flamingo.train.data.samples import DataError
from open_flamingo.train.data.watched import read_first
from open_flamingo.train.distributed import World, detect_launcher
from open_flamingo.train.errors import UserError, user_error
from open_flamingo.train.model import FLAG_OF_ARGUMENT, model_from_flags
from open_flamingo.train.preview_page import page
from open_flamingo.train.report import setup_logging

log = logging.getLogger(__name__)

PAGE = "preview.html"


def preview(args: Namespace) -> int:
    """Writes the page. Returns 0, or 1 where the run could not begin or too few samples can be used."""
    setup_logging(rank=0)
    transformers_logging.disable_progress_bar()
    try:
        with user_error("cannot start"):
            launched = detect_launcher()
            world = World("preview", world_size=args.dry_run_ranks or launched.world_size)
            if not launched.is_main:
                return 0
            options = data_options(args, world, None)
        with user_error("cannot build the model", FLAG_OF_ARGUMENT):
            _, image_processor, tokenizer = model_from_flags(args, meta=True)
        with user_error("cannot load the data"):
            firsts = [read_first(option, tokenizer, image_processor, args.preview) for option in options.values()]
        path = Path(args.run_name) / PAGE
        with user_error(f"cannot write {path}"):
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(path) as file:  # half of a surrogate pair, of broken data, is no UTF-8
                file.write(
                    page(path.parent.resolve().name, firsts, tokenizer, image_processor).encode(errors="replace")
                )
    except (UserError, DataError) as error:
        log.error("%s", error)
        return 1
    for first in firsts:
        if first.problem:
            log.error("--%s_shards: %s", first.options.kind, first.problem)
    log.info("wrote %s: open it in a browser", path)
    return int(any(first.problem for first in firsts))
