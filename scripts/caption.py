"""`open-flamingo-caption CHECKPOINT IMAGE …`: what a trained model says of images, one line for each."""

from __future__ import annotations

import argparse
import base64
import glob
import html
import io
import json
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from open_flamingo.scripts.evaluate.model import MODEL_FLAGS, max_prompt_tokens
from open_flamingo.train.arguments import positive_int
from open_flamingo.train.atomic import atomic_write
from open_flamingo.train.data.decoding import FORMATS, decode_rgb
from open_flamingo.train.page import STYLE

if TYPE_CHECKING:
    import torch

SUFFIXES = {suffix for suffix, kind in Image.registered_extensions().items() if kind in FORMATS}  # of images in folders
THUMBNAIL = 320  # pixels of the longer side
# An image of 1,000,000 x 1 pixels, resized whole, would take 150 GB: its ends, which are cropped, go first.
MAX_ASPECT_RATIO = 128


class Shot(NamedTuple):
    """An example that stands before each image."""

    image: Path
    text: str


class Result(NamedTuple):
    image: str  # as it was named
    caption: str | None  # None: it could not be read
    problem: str = ""  # why
    thumbnail: bytes = b""  # JPEG


# ---------------------------------------------------------------------------------------------------------------------
# What there is to caption


def find_images(arguments: Iterable[str]) -> Iterator[Result]:
    """Images by their names, not read yet; those of a folder, at any depth, and of a pattern in the order of their names. What names none
    is a problem."""
    for argument in arguments:
        is_pattern = glob.has_magic(argument) and not os.path.exists(argument)
        paths = sorted(glob.glob(argument, recursive=True)) if is_pattern else [argument]
        found = [path for each in paths for path in (_in_folder(each) if os.path.isdir(each) else [each])]
        yield from (Result(path, None) for path in found)
        if not found:
            yield Result(argument, None, "no image there")


def _in_folder(folder: str) -> list[str]:
    files = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    return [str(path) for path in files]


def read_image(path: str | Path) -> Image.Image:
    """RGB. Raises ValueError, saying what is wrong with the file, in one line."""
    try:
        image = decode_rgb(Path(path).read_bytes())
    except UnidentifiedImageError as error:
        raise ValueError("not an image, or of a kind that is not read") from error
    except Exception as error:  # a broken image can raise anything
        reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        raise ValueError(reason) from error
    longest = MAX_ASPECT_RATIO * min(image.size)
    left, top = (max(0, side - longest) // 2 for side in image.size)
    return image.crop((left, top, image.width - left, image.height - top)) if left or top else image


def read_shots(path: Path) -> list[Shot]:
    """Lines of {"image": path, "caption" or "text": text}; paths are relative to the file. Raises ValueError, naming the line."""
    shots = []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # JSON may hold the other line ends of Unicode
    except (OSError, UnicodeError) as error:
        raise ValueError(f"--shots {path}: {getattr(error, 'strerror', None) or error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            image, text = record["image"], record.get("caption", record.get("text"))
            if not isinstance(image, str) or not isinstance(text, str):
                raise ValueError
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f'--shots {path}, line {number} is not {{"image": path, "caption": text}}') from error
        shots.append(Shot(path.parent / image, text))
    return shots


# ---------------------------------------------------------------------------------------------------------------------
# The model


class Captioner:
    """Names of images → what the model says of them.

    Args:
        args: the flags.
        shots: those of `--shots`.
        device: where the model is.

    Raises ValueError or FileNotFoundError, saying what is wrong, where the model cannot be loaded, an example's image cannot be read, or
    the prompt is too long.
    """

    def __init__(self, args: argparse.Namespace, shots: Sequence[Shot], device: str) -> None:
        import torch
        from transformers.utils import logging as transformers_logging

        from open_flamingo import load
        from open_flamingo.train.data.text import MAX_CHARACTERS, TextEncoder

        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        warnings.filterwarnings("ignore", module=r"PIL\.")  # of broken images: what is wrong is told
        overrides = {name: getattr(args, name) for name in MODEL_FLAGS}
        where = {"use_local_files": args.offline, "trust_remote_code": args.trust_remote_code}
        dtype = getattr(torch, args.dtype)
        self._model, self._processor, self._tokenizer = load(args.checkpoint, device, dtype, **overrides, **where)
        self._device, self._wants_thumbnails = device, args.html is not None
        self._generation: dict[str, Any] = {"num_beams": args.num_beams, "max_new_tokens": args.max_new_tokens}

        # As training reads a text: "<image>", and what stands in a prompt as if it were such a token is text.
        gap = " " if args.prompt[-1:].isalnum() else ""  # not "It isa green fox"
        parts = ["", *(f"{args.prompt}{gap}{shot.text}" for shot in shots), args.prompt]
        if sum(map(len, parts)) > MAX_CHARACTERS // 2:
            raise ValueError(f"the prompt is of more than {MAX_CHARACTERS // 2:,} characters: give fewer --shots")
        encode = TextEncoder(self._tokenizer, max_tokens=2**20)
        ids = encode(parts)
        end = len(ids) - 1 - ids[::-1].index(encode.eoc_token_id)
        self._prompt = torch.tensor([ids[:end]], device=device)
        most = max_prompt_tokens(self._model, args.max_new_tokens)
        if most is not None and end > most:
            raise ValueError(
                f"the prompt is of {end} tokens, and the language model takes {most} beside --max_new_tokens {args.max_new_tokens}: "
                "give fewer --shots or a shorter --prompt"
            )
        self._shots = []
        for shot in shots:
            try:
                self._shots.append(self._processor(read_image(shot.image)))
            except ValueError as error:
                raise ValueError(f"--shots: {shot.image}: {error}") from error

    def __call__(self, paths: Sequence[str]) -> list[Result]:
        """A result for each of a batch, in their order."""
        import torch

        with ThreadPoolExecutor(min(8, len(paths))) as threads:
            read = list(threads.map(self._read, paths))
        images = [image for image, _, _ in read if image is not None]
        captions = iter(self._caption(torch.stack(images)) if images else ())
        return [
            Result(path, None if image is None else next(captions), problem, thumbnail)
            for path, (image, problem, thumbnail) in zip(paths, read, strict=True)
        ]

    def _read(self, path: str) -> tuple[torch.Tensor | None, str, bytes]:
        """The model's input [3, H, W], None with a reason where there is none, and a small image of it."""
        try:
            image = read_image(path)
        except ValueError as error:
            return None, str(error), b""
        tensor = self._processor(image)
        if not self._wants_thumbnails:
            return tensor, "", b""
        small = io.BytesIO()
        image.thumbnail((THUMBNAIL, THUMBNAIL))
        image.save(small, "JPEG", quality=85)
        return tensor, "", small.getvalue()

    def _caption(self, images: torch.Tensor) -> list[str]:
        """[B, 3, H, W] → B captions."""
        import torch

        shots = [shot.expand(len(images), -1, -1, -1) for shot in self._shots]
        vision_x = torch.stack([*shots, images], 1).unsqueeze(2).to(self._device)  # [B, images, 1, 3, H, W]
        prompt = self._prompt.expand(len(images), -1)
        ends = [self._model.eoc_token_id, self._tokenizer.eos_token_id]
        tokens = self._model.generate(
            vision_x,
            prompt,
            torch.ones_like(prompt),
            do_sample=False,
            eos_token_id=ends,
            suppress_tokens=[self._model.media_token_id],  # there is no further image
            **self._generation,
        )
        texts = self._tokenizer.batch_decode(tokens[:, prompt.shape[1] :], skip_special_tokens=True)
        return [" ".join(text.split()) for text in texts]


def caption(args: argparse.Namespace, shots: Sequence[Shot], paths: Sequence[str]) -> Iterator[Result]:
    """A result for each of `paths`, in their order: batches go to all devices, each with a copy of the model and a process of its own."""
    import torch

    devices = args.devices or [f"cuda:{i}" for i in range(torch.cuda.device_count())] or ["cpu"]
    batches = [paths[i : i + args.batch_size] for i in range(0, len(paths), args.batch_size)]
    if len(devices) == 1 or len(batches) == 1:
        captioner = Captioner(args, shots, devices[0])
        for batch in batches:
            yield from captioner(batch)
        return
    context = torch.multiprocessing.get_context("spawn")
    free = context.SimpleQueue()
    for device in devices:
        free.put(device)
    with ProcessPoolExecutor(len(devices), context, _start, (args, shots, free)) as processes:
        try:
            for results in processes.map(_work, batches):
                yield from results
        finally:
            processes.shutdown(wait=False, cancel_futures=True)


_process: dict[str, Any] = {}  # of a process of `caption`: its captioner, or why there is none


def _start(args: argparse.Namespace, shots: Sequence[Shot], free: Any) -> None:
    try:
        _process["captioner"] = Captioner(args, shots, free.get())
    except (ValueError, OSError) as error:  # raised here, nobody would learn it
        _process["error"] = error


def _work(paths: Sequence[str]) -> list[Result]:
    if "error" in _process:
        raise _process["error"]
    return _process["captioner"](paths)


# ---------------------------------------------------------------------------------------------------------------------
# What is shown


def page(title: str, results: Sequence[Result]) -> str:
    """The images with their captions, whole in one text of HTML."""
    figures = "".join(
        f"<figure><img alt='' src='data:image/jpeg;base64,{base64.b64encode(result.thumbnail).decode()}'>"
        f"<p>{html.escape(result.caption or '')}</p><small>{html.escape(result.image)}</small></figure>"
        for result in results
        if result.caption is not None
    )
    style = f"{STYLE}.grid {{ grid-template-columns: repeat(auto-fill, minmax(220px, 1fr)) }} img {{ width: 100% }} small {{ color: #777; overflow-wrap: anywhere }}"
    title = html.escape(title)
    return (
        "<!doctype html><html lang=en><head><meta charset=utf-8><meta name=viewport content='width=device-width, initial-scale=1'>"
        f"<title>{title}</title><style>{style}</style></head><body><h1>{title}</h1><div class=grid>{figures}</div></body></html>"
    )


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="open-flamingo-caption", description=__doc__)
    add = parser.add_argument
    add("checkpoint", help="checkpoint or folder of a run, folder of save_pretrained, or name on the Hugging Face hub")
    add("images", nargs="+", metavar="IMAGE", help="images, folders of them, or quoted patterns such as 'photos/*.jpg'")
    add(
        "--prompt",
        default="",
        help="what stands between the image and what is generated: 'Question: what is it? Answer:'",
    )
    add("--shots", type=Path, help='examples before each image: JSONL of {"image": path, "caption": text}')
    add(
        "--num_beams",
        type=positive_int,
        default=3,
        help="of beam search; 1: the likeliest token at a time (default: %(default)s)",
    )
    add("--max_new_tokens", type=positive_int, default=30, help="the longest caption (default: %(default)s)")
    add("--json", action="store_true", help='lines of {"image": …, "caption": …}')
    add("--html", type=Path, help="also write a page of the images with their captions, a single file")
    add("--batch_size", type=positive_int, default=8, help="images at once on each device (default: %(default)s)")
    add("--devices", nargs="+", help="default: all GPUs, or cpu. Each takes a copy of the model")
    add(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        default="float32",
        help="of the model (default: %(default)s)",
    )
    for name in MODEL_FLAGS:
        kind = positive_int if name == "cross_attn_every_n_layers" else str
        add(
            f"--{name}",
            type=kind,
            help="instead of what the checkpoint records" if name == MODEL_FLAGS[0] else "the same",
        )
    add("--offline", action="store_true", help="do not ask the Hugging Face hub")
    add(
        "--trust_remote_code",
        action="store_true",
        help="run code that the language model brings (MPT-1B and MPT-7B do)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line. Raises SystemExit: with a message where nothing can begin, with 1 where no image could be captioned."""
    args = build_parser().parse_args(argv)
    if args.offline:
        os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported, which nothing above does
    for stream in (sys.stdout, sys.stderr):  # names of files can be of any bytes
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    found = list(find_images(args.images))
    paths = [result.image for result in found if not result.problem]
    done: list[Result] = []

    def show(result: Result) -> None:
        if result.caption is None:
            tqdm.write(f"skipped {result.image}: {result.problem}", file=sys.stderr)
            return
        record = {"image": result.image, "caption": result.caption}
        line = json.dumps(record, ensure_ascii=False) if args.json else f"{result.image}\t{result.caption}"
        tqdm.write(line, file=sys.stdout)
        sys.stdout.flush()
        done.append(result)

    for result in found:
        if result.problem:
            show(result)
    try:
        shots = [] if args.shots is None else read_shots(args.shots)
        with tqdm(total=len(paths), unit=" images", file=sys.stderr, disable=not sys.stderr.isatty()) as bar:
            for result in caption(args, shots, paths) if paths else ():
                show(result)
                bar.update()
        if args.html is not None:
            with atomic_write(args.html) as file:
                file.write(page(f"{args.checkpoint} {args.prompt}".strip(), done).encode(errors="xmlcharrefreplace"))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except RuntimeError as error:
        if isinstance(error, BrokenProcessPool):
            sys.exit("error: a process was killed: is the machine out of memory? Give fewer --devices")
        if "out of memory" not in str(error):
            raise
        sys.exit(f"error: {error}. Try a smaller --batch_size, or --dtype bfloat16")
    if not done:
        sys.exit(1)


if __name__ == "__main__":
    main()
