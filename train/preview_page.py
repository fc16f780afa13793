"""The page of `--preview`: samples as they are trained on, what is left out, histograms. All that comes from the data is escaped."""

import base64
import html
import io
import json
from collections.abc import Sequence
from contextlib import suppress
from itertools import takewhile
from typing import Any

import numpy as np
import plotly.graph_objects as go
from PIL import Image

from open_flamingo.train.data import laion, mmc4
from open_flamingo.train.data.images import ImagePreparer, image_size
from open_flamingo.train.data.labels import IGNORE
from open_flamingo.train.data.loader import Batch
from open_flamingo.train.data.mmc4 import decode_base64
from open_flamingo.train.data.samples import RawSample
from open_flamingo.train.data.text import TextEncoder
from open_flamingo.train.data.watched import FirstSamples, Seen, where
from open_flamingo.train.page import COLORS, Charts, document

MAX_TOKENS = {"laion": laion.MAX_TOKENS, "mmc4": mmc4.MAX_TOKENS}
NO_LIMIT = 1 << 20  # tokens; no text that is looked at has as many
MAX_CHARACTERS = 600  # of a text that is not trained on
MAX_THUMBNAILS = 6  # of a sample that is left out

# What is meant by the reasons that are left out on purpose; errors bring a message.
MEANING = {
    "no_caption": "there is no caption",
    "no_image": "there is no image, or only icons under 11 kB and images that are too large",
    "image_too_large": "an image has more pixels than --max_image_pixels; of interleaved documents each such image counts",
    "no_match": "no image is similar enough to its sentence: --mmc4_textsim_threshold",
    "few_images": "fewer images than --mmc4_min_num_images stand within the token limit",
    "single_image": "a document of one image, left out by the coin, as half of them are",
    "image_last": "no text follows the only image",
}
LEGEND = (
    ("trained", "trained on"),
    ("masked", "masked: read, but not in the loss"),
    ("trained special", "special, trained on"),
    ("masked special", "special, masked"),
    ("padding", "padding"),
)
STYLE = """
.sample { border: 1px solid #ddd; border-radius: 6px; padding: .6rem .8rem; margin: .8rem 0; break-inside: avoid }
h3 { margin: 1.2rem 0 .2rem } .key { color: #666; font-size: 12px; overflow-wrap: anywhere }
.tokens { line-height: 1.9; overflow-wrap: anywhere } .token { white-space: pre-wrap; border-radius: 3px; padding: .1rem 0; margin-right: 1px }
.trained { background: #bfe8c5 } .masked { background: #e4e4e4; color: #555 } .padding { background: repeating-linear-gradient(45deg, #fff 0 4px, #ddd 4px 8px); color: #555; padding: .1rem .4rem }
.special { outline: 1.5px solid #7b3fb5; color: #5a1f94; font-weight: 600 } .cut { color: #b00020; white-space: pre-wrap; overflow-wrap: anywhere }
.image { display: inline-block; margin: .2rem .5rem; vertical-align: middle; text-align: center; line-height: 1.2 } .image img { display: block; width: 150px; margin: auto } td .image img { width: 75px }
.here { display: inline-block; white-space: nowrap }
small { color: #666 } .under { color: #b00020 } .text { white-space: pre-wrap; overflow-wrap: anywhere; max-width: 900px } .problem { background: #fff3cd; padding: .5rem }
"""


def page(title: str, firsts: Sequence[FirstSamples], tokenizer: Any, image_processor: Any) -> str:
    """The page, whole."""
    legend = " ".join(f"<span class='token {names}'>{html.escape(text)}</span>" for names, text in LEGEND)
    world_size = firsts[0].options.world_size
    facts = (
        f"The first samples that rank 0 of {world_size} of a new run trains on, in their order; images as the vision encoder gets them, "
        "each after its &lt;image&gt; token."
    )
    sections = [Section(first, tokenizer, image_processor) for first in firsts]
    shown = "".join(section.samples() for section in sections)
    left_out = "".join(section.left_out() for section in sections)
    histograms = f"<h2 id=histograms>Histograms of all samples that were read</h2><div class=grid>{''.join(charts(firsts))}</div>"
    targets = [*(f"{first.options.kind}{part}" for part in ("", "_left_out") for first in firsts), "histograms"]
    links = " · ".join(f"<a href='#{target}'>{target.replace('_', ' ')}</a>" for target in targets)
    body = f"<p>{facts}</p><p>{links}</p><p>{legend}</p>{shown}{left_out}{histograms}"
    return document(f"Preview of {title}", body, STYLE)


class Section:
    """What the page says of one dataset. All that comes from the data is escaped."""

    def __init__(self, first: FirstSamples, tokenizer: Any, image_processor: Any) -> None:
        self.first = first
        self.options = first.options
        self.tokenizer = tokenizer
        self.prepare_image = ImagePreparer(image_processor, first.options.max_image_pixels)
        self.max_tokens = MAX_TOKENS[first.options.kind]
        self.encode_whole = TextEncoder(tokenizer, NO_LIMIT)

    def samples(self) -> str:
        kind, first = self.options.kind, self.first
        problem = f"<p class=problem>{html.escape(first.problem)}</p>" if first.problem else ""
        blocks = "".join(self.sample(*row) for row in first.rows)
        of = f"{plural(first.read, 'sample')} read for this page, {len(first.figures.tokens):,} of them can be used"
        return f"<h2 id={kind}>{kind}: the first {len(first.rows)}</h2><p>{of}</p>{problem}{blocks}"

    def sample(self, seen: Seen, batch: Batch, row: int) -> str:
        assert seen.sample is not None
        length = len(seen.sample.input_ids)
        padding = batch.input_ids.shape[1] - length
        counted = int((batch.labels[row, 1:] != IGNORE).sum())
        images = plural(batch.image_counts[row], "image")
        facts = f"{plural(length, 'token')}, {counted} trained on, {padding} of padding in its batch of {len(batch.keys)}; {images}"
        return (
            f"<div class=sample><div class=key>{html.escape(batch.keys[row])}</div><small>{facts}</small>"
            f"<div class=tokens>{self.tokens(seen, batch, row)}</div>{self.cut_off(seen)}{self.matches(seen)}</div>"
        )

    def tokens(self, seen: Seen, batch: Batch, row: int) -> str:
        """Every token as it is trained on, images after theirs."""
        assert seen.sample is not None
        length = len(seen.sample.input_ids)
        ids, labels = batch.input_ids[row, :length].tolist(), batch.labels[row, :length].tolist()
        special = {*self.tokenizer.all_special_ids, self.encode_whole.media_token_id, self.encode_whole.eoc_token_id}
        names = self.tokenizer.convert_ids_to_tokens(ids)
        spans, number = [], 0
        for i, text in enumerate(token_texts(self.tokenizer, ids)):
            # The first of a row is never predicted, whatever its label.
            state = "trained" if i > 0 and labels[i] != IGNORE else "masked"
            classes = f"token {state}{' special' if ids[i] in special else ''}"
            text = text.replace("\n", "↵\n") or "⋯"  # part of a character
            title = html.escape(f"{ids[i]} {names[i]}")
            span = f"<span class='{classes}' title='{title}'>{html.escape(text)}</span>"
            if ids[i] == self.encode_whole.media_token_id:
                pixels = batch.images[row, number].numpy()
                (width, height), flip = seen.sizes[number], seen.flips[number]
                number += 1
                shown = image_html(pixels, f"image {number}: {width} × {height}{', mirrored' if flip else ''}")
                span = f"<span class=here>{span}{shown}</span>"
            spans.append(span)
        if padding := batch.input_ids.shape[1] - length:
            spans.append(f"<span class='token padding'>padding × {padding}</span>")
        return "".join(spans)

    def cut_off(self, seen: Seen) -> str:
        """The text beyond the token limit."""
        assert seen.sample is not None
        ids = seen.sample.input_ids
        if len(ids) < self.max_tokens:
            return ""
        whole = self.encode_whole(seen.parts)
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(ids, whole)))
        if not (rest := whole[same:]):
            return ""
        images = rest.count(self.encode_whole.media_token_id)
        count = f"{len(rest)} tokens after the first {self.max_tokens}, {images} &lt;image&gt; among them"
        return f"<p class=cut><b>Cut off</b> ({count}): {shortened(self.tokenizer.decode(rest))}</p>"

    def matches(self, seen: Seen) -> str:
        """A table of images and the sentences they were assigned to."""
        if seen.matches is None:
            return ""
        document = json.loads(seen.raw["json"], parse_int=float)
        threshold, most = self.options.mmc4_textsim_threshold, self.options.mmc4_max_num_images
        used, rank, rows = len(seen.sample.images) if seen.sample else 0, 0, []
        for image, sentence, similarity in sorted(zip(*seen.matches), key=lambda match: match[1]):
            names = shown = text = ""
            if not similarity >= threshold:
                names, state = " class=under", f"under the threshold of {threshold:g}"
            elif seen.sample is None:
                state = "similar enough"
            elif rank >= most:
                state = "beyond --mmc4_max_num_images"
            else:
                state = "used" if rank < used else "cut off with the text"
                shown = f"image {rank + 1}" if rank < used else ""
            rank += similarity >= threshold
            shown = shown or self.thumbnail(decode_base64(document["image_info"][image].get("image_base64") or ""))
            with suppress(LookupError):  # more columns than sentences
                text = shortened(str(document["text_list"][sentence]))
            rows.append(f"<tr{names}><td>{shown}<td>{text}<td>{similarity:.4g}<td>{state}</tr>")
        others = len(document["image_info"]) - len(rows)
        rest = f"<small>in no pair: {plural(others, 'image')} (missing, an icon under 11 kB, too large, or without a sentence left)</small>"
        head = "<tr><th>image<th>sentence that it stands before<th>similarity<th>outcome</tr>"
        return f"<div class=wide><table>{head}{''.join(rows)}</table></div>{rest if others else ''}"

    def left_out(self) -> str:
        """Each reason with its number and examples."""
        kind, first = self.options.kind, self.first
        parts = [f"<h2 id={kind}_left_out>{kind}: {'left out' if first.counts else 'nothing is left out'}</h2>"]
        for reason, count in first.counts.most_common():
            examples = first.left_out.get(reason, [])
            meaning = MEANING.get(reason) or ("" if examples else first.errors.get(reason, ""))
            parts.append(f"<h3>{html.escape(reason)}: {count:,}</h3><div class=text>{shortened(meaning)}</div>")
            for seen in examples:
                text, images = raw_contents(seen.raw)
                shown = "".join(map(self.thumbnail, images[:MAX_THUMBNAILS])) if not seen.matches else ""
                parts.append(
                    f"<div class=sample><div class=key>{html.escape(where(seen.raw))}</div>"
                    f"<div class=under>{shortened(seen.message)}</div>{shown}<div class=text>{shortened(text)}</div>{self.matches(seen)}</div>"
                )
        return "".join(parts)

    def thumbnail(self, data: bytes) -> str:
        """An image that is not trained on, or what is wrong with it."""
        try:
            if self.prepare_image.exceeds_max_pixels(data):
                return "<span class=image>[too large]</span>"
            return image_html(self.prepare_image(data), "{} × {}".format(*image_size(data)))
        except Exception:  # whatever is broken has been counted
            return f"<span class=image>[not an image, {len(data):,} bytes]</span>"


def plural(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' if count != 1 else ''}"


def shortened(text: str) -> str:
    """Escaped, and not too long."""
    return html.escape(text[:MAX_CHARACTERS]) + ("…" if len(text) > MAX_CHARACTERS else "")


def image_html(pixels: np.ndarray, caption: str) -> str:
    """`pixels` [3, H, W], uint8 or normalized, which are stretched to what can be seen."""
    if pixels.dtype != np.uint8:
        low, high = pixels.min(), pixels.max()
        pixels = (255 * (pixels - low) / max(high - low, 1e-6)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels.transpose(1, 2, 0)).save(buffer, format="PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    return (
        f"<span class=image><img alt='' src='data:image/png;base64,{data}'><small>{html.escape(caption)}</small></span>"
    )


def token_texts(tokenizer: Any, ids: list[int]) -> list[str]:
    """What each token adds to the text; nothing, where a later one completes a character."""
    texts, before = [], ""
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:end], clean_up_tokenization_spaces=False)
        if text.startswith(before) and not text.endswith("\ufffd"):
            texts.append(text[len(before) :])
            before = text
        else:
            texts.append("")
    return texts


def raw_contents(raw: RawSample) -> tuple[str, list[bytes]]:
    """Text and images of a sample that is left out, as far as there are any."""
    images = [raw[suffix] for suffix in (*laion.IMAGE_SUFFIXES, "webp") if suffix in raw]
    text = (raw.get("txt") or raw.get("json") or b"").decode(errors="replace")
    # What is broken in it has been counted.
    with suppress(Exception):
        fields = json.loads(raw["json"], parse_int=float)
        if "example" in fields:
            text, infos = str(fields["example"]), list(fields["image_map"].values())
        elif "text_list" in fields:
            text, infos = "\n".join(fields["text_list"]), fields["image_info"]
        else:
            return str(fields["caption"]), images
        for info in infos[:MAX_THUMBNAILS]:
            images.append(decode_base64(info.get("image_base64") or info.get("base64_image") or ""))
    return text, images


def charts(firsts: Sequence[FirstSamples]) -> list[str]:
    """Histograms of all samples that were read."""
    made = Charts([])

    def add(
        title: str, unit: str, series: dict[str, list[Any]], bin_size: int | None = None, line: float | None = None
    ) -> None:
        figure = go.Figure(layout={"barmode": "overlay"})
        for (name, values), color in zip(series.items(), COLORS):
            if values:
                bins = {"start": -bin_size / 2, "size": bin_size} if bin_size else None
                figure.add_histogram(x=values, name=name, opacity=0.7, marker_color=color, xbins=bins)
        if not figure.data:
            return
        if line is not None:
            figure.add_vline(x=line, line_dash="dash", line_color="#b00020")
        # The margins are fixed, and wide enough.
        figure.update_xaxes(title_text=unit, automargin=False)
        figure.update_yaxes(automargin=False)
        made.add(title, figure)

    for first in firsts:
        kind, figures = first.options.kind, first.figures
        if kind == "mmc4":
            threshold = first.options.mmc4_textsim_threshold
            unit = f"dashed: --mmc4_textsim_threshold {threshold:g}"
            add("Similarity of each image to its sentence", unit, {kind: figures.similarities}, line=threshold)
            add("Images per document", "images", {kind: figures.images}, bin_size=1)
        most = MAX_TOKENS[kind]
        unit = f"tokens; dashed: {most}, longer ones are cut off"
        add(f"Tokens per sample, {kind}", unit, {kind: figures.tokens}, bin_size=most // 32, line=most)
    sizes = {first.options.kind: [min(size) for size in first.figures.sizes] for first in firsts}
    add("Image sizes", "the shorter side, pixels", sizes)
    return made.html
