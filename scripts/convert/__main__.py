"""`open-flamingo-convert FORMAT … --output_dir shards/`: what people have → the WebDataset shards that training reads."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from open_flamingo.scripts.convert.documents import Interleaved, Llava, Obelics
from open_flamingo.scripts.convert.engine import Format, convert
from open_flamingo.scripts.convert.mmc4 import Mmc4
from open_flamingo.scripts.convert.pairs import Pairs
from open_flamingo.scripts.convert.tables import Table
from open_flamingo.scripts.convert.video import Video
from open_flamingo.train.arguments import positive_int

FORMATS: dict[str, tuple[type[Table], str]] = {
    "pairs": (Pairs, "images and captions: folders, imagefolders, CSV, TSV, JSONL, Parquet"),
    "interleaved": (Interleaved, 'JSONL of {"content": [{"type": "text", "text": …}, {"type": "image", "path": …}]}'),
    "obelics": (Obelics, "Parquet or JSONL of lists `images` (URLs) and `texts`; images in --image_dir"),
    "llava": (Llava, "JSON of `image` and `conversations` with <image> in the text"),
    "video": (Video, "folders of frames or video files, with captions"),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line. Raises SystemExit with a message where the input cannot be used."""
    parser = argparse.ArgumentParser(
        prog="open-flamingo-convert",
        description="Makes training shards of your data. Start it again to go on after a stop. img2dataset's shards need no converting.",
    )
    formats = parser.add_subparsers(dest="format", required=True, metavar="FORMAT")
    for name, (_, text) in FORMATS.items():
        add = formats.add_parser(name, help=text, description=text).add_argument
        add("input", nargs="+", help="files or folders; braces and quoted stars are expanded")
        add("--image_dir", type=Path, help="what paths are relative to, and must be in (default: the input's folder)")
        add("--image_field", help="field of the image" if name != "video" else "field of the video")
        add("--caption_field", help="field of the caption")
        if name == "video":
            add(
                "--frames", type=positive_int, default=6, help="frames per video, sampled evenly (default: %(default)s)"
            )
        add_common(add)
    add_mmc4(formats.add_parser("mmc4", help="zips of documents, and folders of images"))
    args = parser.parse_args(argv)
    if args.format == "mmc4":
        run(Mmc4(args.zip_files, args.image_dir), args)
        return
    kind = FORMATS[args.format][0]
    more = {"frames": args.frames} if args.format == "video" else {}
    run(kind(args.input, args.image_dir, args.image_field, args.caption_field, **more), args)


def main_mmc4(argv: Sequence[str] | None = None) -> None:
    """`open-flamingo-convert mmc4` under its older name."""
    parser = argparse.ArgumentParser(
        description="Converts MMC4 to WebDataset shards. Start it again to go on after a stop."
    )
    add_mmc4(parser)
    args = parser.parse_args(argv)
    run(Mmc4(args.zip_files, args.image_dir), args)


def add_mmc4(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--zip_files", required=True, help="zips of documents: 'docs/shard_{0..23098}.zip'")
    add("--image_dir", type=Path, required=True, help="images: {image_dir}/{place in the list of zips}/{image_name}")
    add_common(add)


def add_common(add) -> None:  # type: ignore[no-untyped-def]
    add("--output_dir", type=Path, required=True, help="folder for the shards, 000000000.tar and on")
    add("--num_files_per_shard", type=positive_int, default=1000, help="samples per shard (default: %(default)s)")
    add("--workers", type=positive_int, default=1, help="processes (default: %(default)s)")


def run(form: Format, args: argparse.Namespace) -> None:
    try:
        convert(form, args.output_dir, args.num_files_per_shard, args.workers)
    except (ValueError, OSError, RuntimeError) as error:
        if isinstance(error, BrokenProcessPool):
            sys.exit(
                "error: a worker was killed: is the machine out of memory? The same command goes on, with fewer --workers if it is"
            )
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
