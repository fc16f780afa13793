"""What is evaluated on: records in JSONL, and which of them demonstrate the task to which.

A line is `{"image": path}` with, by the task, `"caption"` or `"captions"`; `"question"` and `"answers"`; or `"label"`. It may have
an `"id"`, and a `"text"` that the prompt can name.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TASKS = ("caption", "vqa", "classify")
NEEDS = {"caption": "caption or captions", "vqa": "question and answers", "classify": "label"}
NAMED = 5  # missing images that an error names


@dataclass(frozen=True)
class Record:
    """One line."""

    id: str
    image: Path
    answers: tuple[str, ...]  # captions, answers, or the one label; a demonstration shows the first
    question: str = ""
    text: str = ""
    line: int = 0  # of its file, from 1
    flag: str = "--data"  # that names the file

    @property
    def where(self) -> str:
        return f"{self.flag}, line {self.line}"

    @property
    def fields(self) -> dict[str, str]:
        """What a prompt can name, beside the answer."""
        return {"question": self.question, "text": self.text}


def read_records(path: Path, task: str, flag: str, image_dir: Path | None = None) -> list[Record]:
    """The records of a JSONL file. Images are relative to `image_dir`, by default the file's folder.

    Raises ValueError, naming `flag`, file and line, where a line is not as the task needs it or an id stands twice.
    """
    records: list[Record] = []
    ids: dict[str, int] = {}
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # JSON may hold the other line ends of Unicode
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{flag}: {path} cannot be read: {error}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = _record(json.loads(line), task, image_dir or path.parent, number, flag)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            reason = f"lacks {error}" if isinstance(error, KeyError) else error
            raise ValueError(
                f"{flag}: {path}, line {number}: {reason}. --task {task} needs JSON with image and {NEEDS[task]}"
            ) from error
        if (first := ids.setdefault(record.id, number)) != number:
            raise ValueError(f"{flag}: {path}: lines {first} and {number} have the same id {record.id!r}")
        records.append(record)
    if not records:
        raise ValueError(f"{flag}: {path} has no line")
    return records


def _record(row: dict[str, Any], task: str, folder: Path, number: int, flag: str) -> Record:
    if not isinstance(row, dict):
        raise ValueError("is no JSON object")
    if not isinstance(row["image"], str):
        raise ValueError("image must be a path")
    if task == "caption":
        answers = row["captions"] if "captions" in row else [row["caption"]]
    elif task == "vqa":
        answers = row["answers"]
    else:
        answers = [row["label"]]
    if not isinstance(answers, list) or not answers or not all(isinstance(answer, str) for answer in answers):
        raise ValueError(f"{NEEDS[task].split()[-1]} must be {'text' if task == 'classify' else 'a list of texts'}")
    question = row["question"] if task == "vqa" else row.get("question", "")
    text = row.get("text", "")
    if not isinstance(question, str) or not isinstance(text, str):
        raise ValueError("question and text must be texts")
    id_ = number if row.get("id") is None else row["id"]
    return Record(str(id_), folder / row["image"], tuple(answers), question, text, number, flag)


def check_images(records: Sequence[Record], flag: str, path: Path) -> None:
    """Raises ValueError, naming the first lines, where images do not exist."""
    missing = [record for record in records if not record.image.is_file()]
    if missing:
        named = "; ".join(f"line {record.line}: {record.image}" for record in missing[:NAMED])
        raise ValueError(
            f"{flag}: {path}: {len(missing):,} of {len(records):,} images do not exist ({named}"
            f"{'; …' if len(missing) > NAMED else ''}). Paths are relative to the file's folder, or to --image_dir"
        )


def subset(records: Sequence[Record], size: int, what: str) -> list[Record]:
    """`size` of them in their order, drawn as `what` says; all where `size` is 0 or they are no more."""
    if not 0 < size < len(records):
        return list(records)
    return [records[i] for i in sorted(random.Random(f"open-flamingo {what}").sample(range(len(records)), size))]


def random_demonstrations(pool: Sequence[Record], query: Record, number: int, seed: int) -> list[int]:
    """Places in `pool` of `number` demonstrations: a function of seed and the query's id, whatever else is evaluated.

    Fewer demonstrations are the first of more. None has the query's own image. Raises ValueError if the pool is too small.
    """
    rng = random.Random(f"demonstrations {seed} {query.id}")
    chosen: list[int] = []
    for place in _permutation(len(pool), rng):
        if len(chosen) == number:
            break
        if pool[place].image != query.image:
            chosen.append(place)
    if len(chosen) < number:
        raise ValueError(f"--context has {len(chosen)} other images, which is too few for {number} demonstrations")
    return chosen


def _permutation(size: int, rng: random.Random) -> Iterator[int]:
    """0 … size − 1 in random order, without shuffling more than is taken."""
    moved: dict[int, int] = {}
    for i in range(size):
        j = rng.randrange(i, size)
        yield moved.get(j, j)
        moved[j] = moved.get(i, i)


def shuffled_answers(answers: Sequence[str], query: Record, seed: int) -> list[str]:
    """The answers of demonstrations, each at another one's place."""
    shift = random.Random(f"shuffle {seed} {query.id}").randrange(1, max(2, len(answers)))
    order = [*range(shift, len(answers)), *range(shift)]
    return [answers[i] for i in order]
