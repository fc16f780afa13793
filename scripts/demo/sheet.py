"""One page of images with what the model said of them."""

import base64
import html
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .score import parse
from .shards import encode
from .world import ATTRIBUTES, FORMS, Scene, caption

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #222; background: #fafafa }
h1 { font-size: 1.4em } .numbers b { font-size: 1.3em }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(192px, 1fr)); gap: 1.4em 1em; margin-top: 1.5em }
figure { margin: 0 } img { width: 192px; height: 192px; border-radius: 6px; display: block; margin-bottom: .4em }
figcaption .truth { color: #777; font-size: .87em } .wrong { background: #ffd9d6; border-radius: 3px }
"""


def write_sheet(
    path: Path, headline: str, numbers: Sequence[tuple[str, str]], rows: Sequence[tuple[np.ndarray, Scene, str]]
) -> None:
    """Write a page that needs no other file: `numbers` are (value, what it is), `rows` are (image, what it shows, caption)."""
    figures = []
    for image, scene, text in rows:
        source = base64.b64encode(encode(image)).decode()
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


def mark_wrong(text: str, scene: Scene) -> str:
    """The caption as HTML, what is wrong in it marked."""
    said = parse(text)
    if len(said) < len(ATTRIBUTES):  # not the language of captions
        return f'<span class="wrong">{html.escape(text)}</span>'
    marked = html.escape(text)
    for name, word in said.items():
        if word != getattr(scene, name):
            written = FORMS[word] if name == "form" and FORMS[word] in marked else word
            marked = marked.replace(written, f'<span class="wrong">{written}</span>', 1)
    return marked
