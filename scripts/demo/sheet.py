"""One page of pictures with what the model said of them."""

import base64
import html
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .score import parse
from .shards import encode
from .world import ATTRIBUTES, Shape, caption

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #222; background: #fafafa }
h1 { font-size: 1.4em } .numbers b { font-size: 1.3em }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(192px, 1fr)); gap: 1.4em 1em; margin-top: 1.5em }
figure { margin: 0 } img { width: 192px; height: 192px; border-radius: 6px; display: block; margin-bottom: .4em }
figcaption .truth { color: #777; font-size: .87em } .wrong { background: #ffd9d6; border-radius: 3px }
"""


def write_sheet(
    path: Path, headline: str, numbers: Sequence[tuple[str, str]], rows: Sequence[tuple[np.ndarray, list[Shape], str]]
) -> None:
    """Write a page that needs no other file: `numbers` are (value, what it is), `rows` are (picture, its shapes, caption)."""
    figures = []
    for picture, scene, text in rows:
        source = base64.b64encode(encode(picture)).decode()
        said = mark_wrong(text, scene)
        truth = "" if text == caption(scene) else f'<div class="truth">truth: {html.escape(caption(scene))}</div>'
        figures.append(
            f'<figure><img alt="{html.escape(caption(scene))}" src="data:image/jpeg;base64,{source}">'
            f"<figcaption>{said}{truth}</figcaption></figure>"
        )
    facts = "".join(f"<p><b>{html.escape(value)}</b> {html.escape(what)}</p>" for value, what in numbers)
    path.write_text(
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(headline)}</title><style>{STYLE}</style>'
        f'<h1>{html.escape(headline)}</h1><div class="numbers">{facts}</div><div class="grid">{"".join(figures)}</div></html>\n',
        encoding="utf-8",
    )


def mark_wrong(text: str, scene: Sequence[Shape]) -> str:
    """The caption as HTML, what is wrong in it marked."""
    phrases = []
    said = parse(text)
    pieces = text.split(" and ")
    if len(pieces) != len(said):  # not the language of captions
        return f'<span class="wrong">{html.escape(text)}</span>'
    for number, (piece, attributes) in enumerate(zip(pieces, said, strict=True)):
        marked = html.escape(piece)
        for name in ATTRIBUTES:
            word = attributes.get(name)
            if word and (number >= len(scene) or word != getattr(scene[number], name)):
                marked = marked.replace(word, f'<span class="wrong">{word}</span>', 1)
        phrases.append(marked)
    return " and ".join(phrases)
