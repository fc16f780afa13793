"""Train an OpenFlamingo-style model on LAION and MMC4 shards. loop.py is the run, from top to bottom.

Runs as a file (`torchrun ... train/train.py`), a module (`python -m open_flamingo.train.train`) and the command `open-flamingo-train`.
"""

import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a file: use this checkout, installed or not, and keep this folder off the path
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    import open_flamingo

    open_flamingo.__path__.append(sys.path[0])

import os
from collections.abc import Sequence

from open_flamingo.train.arguments import parse_args
from open_flamingo.train.libraries import with_versions


def set_allocator() -> None:
    """What CUDA reads when it starts. Batches differ in their numbers of images and tokens, which fragments memory; and eight threads
    page-lock the memory of the first checkpoint."""
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        settings = ("expandable_segments:True", "pinned_use_cuda_host_register:True", "pinned_num_register_threads:8")
        os.environ["PYTORCH_ALLOC_CONF"] = ",".join(settings)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    set_allocator()
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if args.offline:
        os.environ["HF_HUB_OFFLINE"] = "1"
    try:  # the imports take seconds: wrong flags have been refused before
        if args.dry_run:
            from open_flamingo.train.dry_run import dry_run as run
        elif args.preview:
            from open_flamingo.train.preview import preview as run
        else:
            from open_flamingo.train.loop import run
    except ImportError as error:
        raise SystemExit(f"cannot start: {with_versions(error)}") from error
    if exit_code := run(args):
        raise SystemExit(exit_code)


if __name__ == "__main__":
    main()
