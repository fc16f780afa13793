"""`open-flamingo-annotations FORMAT FILE … > data.jsonl`: annotation files as their data sets publish them → what is evaluated on.

Images are written relative to the data set's folder (`--image_dir` of open-flamingo-evaluate), or to `--image_folder` in it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Convert = Callable[[list[Any], argparse.Namespace], Iterator[Row]]


def coco(files: list[Any], args: argparse.Namespace) -> Iterator[Row]:
    """captions_val2014.json of COCO, or Karpathy's dataset_coco.json with --split."""
    (data,) = files
    if "annotations" not in data:
        yield from karpathy(data, args)
        return
    captions = defaultdict(list)
    for annotation in data["annotations"]:
        captions[annotation["image_id"]].append(annotation["caption"])
    for image in data["images"]:
        folder = args.image_folder
        if folder is None:  # COCO_val2014_000000000042.jpg lies in val2014; 2017's names do not say it
            parts = image["file_name"].split("_")
            folder = parts[1] if len(parts) == 3 else ""
        if captions[image["id"]]:
            yield {"id": image["id"], "image": _at(folder, image["file_name"]), "captions": captions[image["id"]]}


def karpathy(data: Any, args: argparse.Namespace) -> Iterator[Row]:
    """Karpathy's splits of COCO and Flickr30k."""
    if args.split is None:
        splits = ", ".join(sorted({image["split"] for image in data["images"]}))
        raise ValueError(f"it holds all splits: give --split (one or more of {splits})")
    for image in data["images"]:
        if image["split"] in args.split:
            folder = image.get("filepath", "") if args.image_folder is None else args.image_folder
            captions = [sentence["raw"] for sentence in image["sentences"]]
            name = image.get("cocoid", image["filename"])
            yield {"id": name, "image": _at(folder, image["filename"]), "captions": captions}


def flickr30k(files: list[Any], args: argparse.Namespace) -> Iterator[Row]:
    """Karpathy's dataset_flickr30k.json with --split, or results_20130124.token (all images)."""
    (data,) = files
    if isinstance(data, dict):
        yield from karpathy(data, args)
        return
    captions = defaultdict(list)
    for number, line in enumerate(data, start=1):
        name, tab, caption = line.partition("\t")
        name, mark, _ = name.rpartition("#")
        if not (tab and mark):
            raise ValueError(f"line {number} is not as 1000092795.jpg#0, a tab and a caption")
        captions[name].append(caption)
    for name, of in captions.items():
        yield {"id": name, "image": _at(args.image_folder or "", name), "captions": of}


def vqa(files: list[Any], args: argparse.Namespace) -> Iterator[Row]:
    """The questions and the annotations of VQAv2 or OK-VQA, in either order.

    OK-VQA's `answer` is stemmed; its `raw_answer`, what people wrote, is taken.
    """
    questions = next((data for data in files if "questions" in data), None)
    annotations = next((data for data in files if "annotations" in data), None)
    if len(files) != 2 or questions is None or annotations is None:
        raise ValueError("two files are needed: of questions and of annotations")
    answers = {
        one["question_id"]: [answer.get("raw_answer", answer["answer"]) for answer in one["answers"]]
        for one in annotations["annotations"]
    }
    split = questions.get("data_subtype") or annotations.get("data_subtype")
    if not split:
        raise ValueError("neither file has a data_subtype, such as val2014, which is in the names of images")
    folder = split if args.image_folder is None else args.image_folder
    for one in questions["questions"]:
        if one["question_id"] not in answers:
            raise ValueError(f"question {one['question_id']} has no annotation: are both files of one split?")
        image = _at(folder, f"COCO_{split}_{one['image_id']:012d}.jpg")
        text, of = one["question"], answers[one["question_id"]]
        yield {"id": one["question_id"], "image": image, "question": text, "answers": of}


def textvqa(files: list[Any], args: argparse.Namespace) -> Iterator[Row]:
    """TextVQA_0.5.1_val.json; its training and validation images lie in train_images."""
    (data,) = files
    folder = "train_images" if args.image_folder is None else args.image_folder
    for one in data["data"]:
        image = _at(folder, f"{one['image_id']}.jpg")
        yield {"id": one["question_id"], "image": image, "question": one["question"], "answers": one["answers"]}


def vizwiz(files: list[Any], args: argparse.Namespace) -> Iterator[Row]:
    """train.json or val.json of VizWiz-VQA, whose images lie in a folder of that name."""
    (data,) = files
    for one in data:
        folder = one["image"].split("_")[1] if args.image_folder is None else args.image_folder
        answers = [answer["answer"] for answer in one["answers"]]
        image = _at(folder, one["image"])
        yield {"id": one["image"], "image": image, "question": one["question"], "answers": answers}


def hateful_memes(files: list[Any], args: argparse.Namespace) -> Iterator[Row]:
    """train.jsonl, dev_seen.jsonl and so on; the label is no or yes, the answer to the paper's question."""
    (lines,) = files
    for number, line in enumerate(lines, start=1):
        one = json.loads(line)
        if "label" not in one:
            raise ValueError(f"line {number} has no label: this split cannot be scored")
        image = one["img"] if args.image_folder is None else _at(args.image_folder, Path(one["img"]).name)
        yield {"id": one["id"], "image": image, "text": one["text"], "label": ("no", "yes")[one["label"]]}


FORMATS: dict[str, tuple[Convert, str]] = {
    "coco": (coco, "caption"),
    "flickr30k": (flickr30k, "caption"),
    "vqav2": (vqa, "vqa"),
    "okvqa": (vqa, "vqa"),
    "textvqa": (textvqa, "vqa"),
    "vizwiz": (vizwiz, "vqa"),
    "hateful_memes": (hateful_memes, "classify"),
}


def _at(folder: str, name: str) -> str:
    return f"{folder.rstrip('/')}/{name}" if folder else name


def read(path: Path) -> Any:
    """JSON, or the lines of a file that is none."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        return json.loads(text)
    return [line for line in text.split("\n") if line.strip()]


def convert(kind: str, paths: Sequence[Path], args: argparse.Namespace) -> Iterator[Row]:
    """Raises ValueError, naming the files, where they are not of this kind."""
    try:
        yield from FORMATS[kind][0]([read(path) for path in paths], args)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        reason = f"there is no {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{', '.join(map(str, paths))}: not as {kind} is published: {reason}") from error


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="open-flamingo-annotations", description=__doc__)
    kinds = "\n".join(f"{name} (--task {task}): {function.__doc__}" for name, (function, task) in FORMATS.items())
    parser.epilog = kinds
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("format", choices=FORMATS, metavar="FORMAT", help=", ".join(FORMATS))
    add("files", type=Path, nargs="+", metavar="FILE", help="one; of vqav2 and okvqa two, questions and annotations")
    add("--split", nargs="+", help="of Karpathy's files: test, or train restval")
    add("--image_folder", help="the images' folder, if not the one that the data set has; '' for none")
    add("-o", "--output", type=Path, help="default: standard output")
    args = parser.parse_args(argv)
    try:
        rows = [json.dumps(row, ensure_ascii=False) for row in convert(args.format, args.files, args)]
        if not rows:
            raise ValueError(f"{', '.join(map(str, args.files))}: nothing of that split")
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(args.output.open("w", encoding="utf-8")) if args.output else sys.stdout
            file.writelines(f"{row}\n" for row in rows)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"{len(rows):,} lines for --task {FORMATS[args.format][1]}", file=sys.stderr)


if __name__ == "__main__":
    main()
