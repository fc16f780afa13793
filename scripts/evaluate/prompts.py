"""Prompts of the paper, and what of the generated text is the answer."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from dataclasses import dataclass

from open_flamingo.scripts.evaluate.data import Record

IMAGE, END = "<image>", "<|endofchunk|>"
ANSWERS = {"caption": "caption", "vqa": "answer", "classify": "label"}
PROMPTS = {
    # The reference ends demonstrations of captions and answers with a new line, those of classes without one.
    "caption": "<image>Output:{caption}<|endofchunk|>\n",
    "vqa": "<image>Question:{question} Short answer:{answer}<|endofchunk|>\n",
    "classify": "<image>Output:{label}<|endofchunk|>",
}
# Where every label is no or yes, and there is text.
HATEFUL_MEMES = "<image>is an image with: '{text}' written on it. Is it hateful? Answer:{label}<|endofchunk|>"


def default_prompt(task: str, records: Sequence[Record]) -> str:
    """The paper's. Raises ValueError, naming flag and line, where only some records have the text that it would ask about."""
    is_hateful_memes = task == "classify" and {record.answers[0] for record in records} <= {"no", "yes"}
    if not is_hateful_memes or not any(record.text for record in records):
        return PROMPTS[task]
    for record in records:
        if not record.text:
            raise ValueError(f"{record.where}: lacks text, which others have: give it to all, or give a --prompt")
    return HATEFUL_MEMES


@dataclass(frozen=True)
class Prompt:
    """A demonstration with its answer, of which a query is what stands before the answer."""

    template: str
    answer: str  # name of its field
    before: str  # the template up to the answer

    @classmethod
    def parse(cls, template: str, task: str) -> Prompt:
        """Raises ValueError, naming the flag, where `template` is none."""
        answer = ANSWERS[task]
        try:
            parts = list(string.Formatter().parse(template))
        except ValueError as error:
            raise ValueError(f"--prompt: {error}; a brace that is text is written twice") from error
        names = [name for _, name, _, _ in parts if name is not None]
        if any(spec or conversion for _, _, spec, conversion in parts) or set(names) - {"question", "text", answer}:
            raise ValueError(f"--prompt: fields are {{question}}, {{text}} and {{{answer}}} for --task {task}")
        if names.count(answer) != 1 or names[-1] != answer:
            raise ValueError(f"--prompt: {{{answer}}} must stand in it once, after the other fields")
        before = ""
        for literal, name, _, _ in parts:
            before += literal.replace("{", "{{").replace("}", "}}")
            if name == answer:
                break
            before += f"{{{name}}}" if name is not None else ""
        if template.count(IMAGE) != 1 or IMAGE not in before:
            raise ValueError(f"--prompt: {IMAGE} must stand in it once, before {{{answer}}}")
        return cls(template, answer, before)

    def demonstration(self, record: Record, answer: str) -> str:
        fields = {name: _plain(value) for name, value in (record.fields | {self.answer: answer}).items()}
        return self.template.format(**fields)

    def query(self, record: Record) -> str:
        return self.before.format(**{name: _plain(value) for name, value in record.fields.items()})

    def text(self, query: Record, demonstrations: Sequence[tuple[Record, str]], has_images: bool = True) -> str:
        """Demonstrations and their answers, without their `<image>` if not `has_images`, and the query."""
        shown = "".join(self.demonstration(record, answer) for record, answer in demonstrations)
        return (shown if has_images else shown.replace(IMAGE, "")) + self.query(query)


def _plain(text: str) -> str:
    """Data never become special tokens."""
    for token in (IMAGE, END):
        text = text.replace(token, token.strip("<|>"))
    return text.strip()


def answer_of(task: str, text: str) -> str:
    """The answer in a generated text, which may go on with another prompt."""
    if task == "caption":
        return text.split("Output", 1)[0].replace('"', "").strip()
    return re.split("Question|Answer|Short", text, maxsplit=1)[0].split(", ", 1)[0].strip()
