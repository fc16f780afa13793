"""One page about one run or several: `open-flamingo-report RUN [RUN …] -o page.html`. A single file, without network or server."""

import argparse
import base64
import hashlib
import html
import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from open_flamingo.train.atomic import atomic_write

METRICS, CAPTIONS, STARTS, IMAGES = "metrics.jsonl", "captions.jsonl", "starts.jsonl", "captions"  # of a run's folder
PAGE = "report.html"
MAX_LINES = 6000  # of a log; of more, evenly many are left out
MAX_POINTS = 600  # of a curve; more are averaged
MAX_CAPTION_STEPS = 6
COLORS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2")
DASHES = ("solid", "dash", "dot", "dashdot")

Value = Callable[[dict[str, Any]], Any]


@dataclass
class Run:
    """What a run's folder says of it."""

    name: str
    folder: Path
    lines: list[dict[str, Any]]  # of the log
    validations: list[dict[str, Any]]
    captions: list[dict[str, Any]]
    starts: list[dict[str, Any]]  # one for each time that it was started

    @classmethod
    def read(cls, folder: Path) -> "Run":
        """Raises ValueError where there is no run."""
        if not (folder / METRICS).is_file():
            raise ValueError(f"{folder} is not the folder of a run: it has no {METRICS}")
        texts: tuple[list[bytes], list[bytes]] = [], []
        for text in (folder / METRICS).read_bytes().splitlines():
            texts[b'"seconds_validating"' in text].append(text)
        lines, validations = texts
        lines = [*lines[: -1 : -(-len(lines) // MAX_LINES) or 1], *lines[-1:]]
        captions, starts = (
            (folder / name).read_bytes().splitlines() if (folder / name).is_file() else []
            for name in (CAPTIONS, STARTS)
        )
        parsed = (list(_parse(of)) for of in (lines, validations, captions, starts))
        run = cls(folder.resolve().name, folder, *parsed)
        # A start that went back takes the place of those after it.
        run.starts = [
            start for i, start in enumerate(run.starts) if all(start["step"] < s["step"] for s in run.starts[i + 1 :])
        ]
        return run


def image_path(folder: Path, key: str) -> Path:
    """Where a run keeps the image of the validation sample `key`."""
    return folder / IMAGES / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.jpg"


def _parse(lines: list[bytes]) -> Iterator[dict[str, Any]]:
    for line in lines:
        with suppress(ValueError):  # a partial line of a killed run
            yield json.loads(line)


def thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most `MAX_POINTS`, each the mean of its neighbors."""
    size = -(-len(points) // MAX_POINTS)
    groups = (points[i : i + size] for i in range(0, len(points), max(1, size)))
    return [(group[-1][0], sum(y for _, y in group) / len(group)) for group in groups]


def smoothed(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """An exponential mean over some fiftieth of them."""
    weight, mean, result = min(1.0, 50 / max(1, len(points))), None, []
    for x, y in points:
        mean = y if mean is None else mean + weight * (y - mean)
        result.append((x, mean))
    return result


class Charts:
    """The charts of a page; curves of all runs in the same axes, with a dotted line at each restart."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self.runs = runs
        self.html: list[str] = []

    def add(self, title: str, figure: Any) -> None:
        figure.update_layout(
            template="plotly_white",
            margin={"l": 55, "r": 10, "t": 10, "b": 40},
            legend={"orientation": "h", "y": -0.2, "font": {"size": 11}},
            height=330,
        )
        plot = figure.to_html(
            full_html=False, include_plotlyjs=False, config={"responsive": True, "displayModeBar": False}
        )
        self.html.append(f"<figure><figcaption>{html.escape(title)}</figcaption>{plot}</figure>")

    def curves(
        self, title: str, of: str, series: dict[str, Value], unit: str, *, log: bool = False, raw: bool = False
    ) -> None:
        """A chart of `series`, name → value of a line of `of`, "lines" or "validations". `raw`: the points behind a smoothed curve."""
        import plotly.graph_objects as go

        figure = go.Figure()
        number = 0
        for run_number, run in enumerate(self.runs):
            for index, (name, value) in enumerate(series.items()):
                points = [(line["step"], y) for line in getattr(run, of) if (y := value(line)) is not None]
                if not points:
                    continue
                several = len(self.runs) > 1
                color = COLORS[(run_number if several else index) % len(COLORS)]
                style = {"color": color, "dash": DASHES[index % len(DASHES)] if several else "solid"}
                label = f"{run.name}: {name}" if several else name
                if raw and len(points) > 3:
                    x, y = zip(*thinned(points), strict=True)
                    figure.add_scatter(x=x, y=y, line=style, opacity=0.25, showlegend=False, hoverinfo="skip")
                    points = smoothed(points)
                x, y = zip(*thinned(points), strict=True)
                mode = "lines+markers" if len(points) < 40 else "lines"
                figure.add_scatter(x=x, y=y, line=style, name=label, mode=mode)
                number += 1
        if not number:
            return
        for run in self.runs:
            for start in run.starts[1:]:
                figure.add_vline(x=start["step"], line_dash="dot", line_width=1, line_color="gray")
        figure.update_xaxes(title_text="update")
        figure.update_yaxes(title_text=unit, type="log" if log else "linear")
        self.add(title, figure)

    def gates(self, name: str, title: str) -> None:
        """How far the gates of each layer are open, over time."""
        import plotly.graph_objects as go

        for run in self.runs:
            lines = [line for line in run.lines if line.get(f"gates_{name}")]
            lines = lines[:: -(-len(lines) // 200) or 1]
            if lines:
                layers = list(lines[-1][f"gates_{name}"])
                z = [[line[f"gates_{name}"].get(layer) for line in lines] for layer in layers]
                steps = [line["step"] for line in lines]
                figure = go.Figure(go.Heatmap(z=z, x=steps, y=layers, colorscale="Viridis", zmin=0))
                figure.update_xaxes(title_text="update")
                figure.update_yaxes(title_text="decoder layer", type="category")
                self.add(f"{title}{f' of {run.name}' if len(self.runs) > 1 else ''}", figure)

    def left_out(self) -> None:
        """What the data lost, by reason."""
        import plotly.graph_objects as go

        figure = go.Figure()
        for run in self.runs:
            counts: Counter[str] = Counter()
            ends = [start["step"] for start in run.starts[1:]] + [math.inf]
            for end in ends:  # a line counts from the start before it
                last = next((line for line in reversed(run.lines) if line["step"] <= end), {})
                for name, value in last.items():
                    what, _, kind = name.rpartition("_")
                    if what in ("dropped", "errors"):
                        broken = " (broken)" * (what == "errors")
                        counts.update({f"{kind}: {reason}{broken}": n for reason, n in value.items()})
                    elif what == "bad_batches" and value:
                        counts[f"{kind}: batches with a loss that is not finite"] += value
            if counts:
                figure.add_bar(x=list(counts.values()), y=list(counts), orientation="h", name=run.name)
        if figure.data:
            figure.update_xaxes(title_text="samples, of all ranks")
            self.add("Left out of the data", figure)


def _charts(runs: Sequence[Run]) -> list[str]:
    def get(name: str, scale: float = 1.0) -> Value:
        return lambda line: None if line.get(name) is None else line[name] * scale

    kinds = ("laion", "mmc4")
    charts = Charts(runs)
    charts.curves("Training loss", "lines", {kind: get(f"loss_{kind}") for kind in kinds}, "nats per token", raw=True)
    charts.curves("Held-out loss", "validations", {kind: get(f"val_loss_{kind}") for kind in kinds}, "nats per token")
    gains = {f"{kind}: another sample's image − its own": get(f"image_gain_{kind}") for kind in kinds}
    gains |= {f"{kind}: a gray image − its own": get(f"blank_gain_{kind}") for kind in kinds}
    charts.curves(
        "The worth of the image: loss with another one less that with its own", "validations", gains, "nats per token"
    )
    by_image = {f"after image {k}": get(f"val_loss_mmc4_image_{k}") for k in range(1, 17)}
    charts.curves("Held-out loss of text by the number of images before it", "validations", by_image, "nats per token")
    charts.gates("attention", "Gates of cross-attention, |tanh|")
    charts.gates("feed_forward", "Gates of feed-forward, |tanh|")
    norms = {"all": get("grad_norm")}
    norms |= {part.replace("_", " "): get(f"grad_norm_{part}") for part in ("resampler", "cross_attention", "new_rows")}
    charts.curves("Gradient norm", "lines", norms, "before clipping", log=True)
    charts.curves("Learning rate", "lines", {"learning rate": get("lr")}, "")
    charts.curves(
        "Throughput",
        "lines",
        {"tokens": get("tokens_per_second"), "images": get("images_per_second")},
        "per second",
        log=True,
    )
    charts.curves(
        "Operations", "lines", {"TFLOP/s per device": get("tflops_per_device"), "MFU, %": get("mfu", 100)}, ""
    )
    seconds = {"median": get("step_seconds_median"), "slowest": get("step_seconds_slowest")}
    charts.curves("Seconds per update", "lines", seconds, "seconds", log=True)
    shares = {
        "waiting for data": get("data_wait", 100),
        "padding": get("padding", 100),
        "updates clipped": get("clipped", 100),
    }
    charts.curves("Shares", "lines", shares, "%")
    charts.curves("Memory of the fullest rank", "lines", {"GB": get("memory_gb")}, "GB")
    charts.left_out()
    return charts.html


def _flags(runs: Sequence[Run]) -> str:
    """A table of the flags; those that differ between the runs come first."""
    flags = [run.starts[-1]["flags"] if run.starts else {} for run in runs]
    names = sorted({name for of in flags for name in of})
    rows = []
    for name in names:
        values = [of.get(name) for of in flags]
        differs = len({json.dumps(value) for value in values}) > 1
        cells = "".join(f"<td>{html.escape(str(value))}</td>" for value in values)
        rows.append(
            (not differs, f"<tr{' class=differs' if differs else ''}><th>--{html.escape(name)}</th>{cells}</tr>")
        )
    head = "".join(f"<th>{html.escape(run.name)}</th>" for run in runs)
    body = "".join(row for _, row in sorted(rows, key=lambda row: row[0]))
    return (
        f"<details open><summary>Flags</summary><table><tr><th></th>{head}</tr>{body}</table></details>" if rows else ""
    )


def _captions(run: Run) -> str:
    """A table: an image, what the data say, what the model said over time."""
    steps = sorted({line["step"] for line in run.captions})
    chosen = steps[:: -(-len(steps) // MAX_CAPTION_STEPS) or 1]
    chosen = [*chosen[:-1], steps[-1]] if steps else []
    said = {(line["key"], line["step"]): line["model"] for line in run.captions}
    rows = []
    for key in dict.fromkeys(line["key"] for line in run.captions if line["step"] == steps[-1]):
        image = image_path(run.folder, key)
        shown = ""
        if image.is_file():
            shown = f"<img alt='' src='data:image/jpeg;base64,{base64.b64encode(image.read_bytes()).decode()}'>"
        data = next(line["data"] for line in run.captions if line["key"] == key)
        cells = "".join(f"<td>{html.escape(said.get((key, step), ''))}</td>" for step in chosen)
        rows.append(f"<tr><td>{shown}</td><td>{html.escape(data)}</td>{cells}</tr>")
    if not rows:
        return ""
    head = "".join(f"<th>after update {step:,}</th>" for step in chosen)
    return f"<h2>What {html.escape(run.name)} says of held-out images</h2><div class=wide><table><tr><th></th><th>the data</th>{head}</tr>{''.join(rows)}</table></div>"


STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 1.2rem auto; max-width: 1500px; padding: 0 1rem; color: #222; background: #fff }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 460px), 1fr)); gap: 1rem }
figure { margin: 0; min-width: 0; break-inside: avoid } figcaption, summary { font-weight: 600 }
table { border-collapse: collapse; font-size: 13px } th, td { text-align: left; vertical-align: top; padding: .2rem .6rem; border-bottom: 1px solid #ddd }
td { overflow-wrap: anywhere } .differs { background: #fff3cd } img { width: 110px } .wide { overflow-x: auto }
@media print { .grid { display: block } details { break-before: page } }
"""


def document(title: str, body: str, style: str = "") -> str:
    """A page with all that its charts need. `body` is HTML, `title` is not."""
    from plotly.offline import get_plotlyjs

    title = html.escape(title)
    return (
        f"<!doctype html><html lang=en><head><meta charset=utf-8><meta name=viewport content='width=device-width, initial-scale=1'>"
        f"<title>{title}</title><style>{STYLE}{style}</style><script>{get_plotlyjs()}</script></head><body><h1>{title}</h1>"
        f"{body}</body></html>"
    )


def page(runs: Sequence[Run]) -> str:
    """The page, whole."""
    if len({run.name for run in runs}) < len(runs):
        for run in runs:
            run.name = str(run.folder)
    facts = []
    for run in runs:
        last = run.lines[-1] if run.lines else {}
        restarts = max(0, len(run.starts) - 1)
        facts.append(
            f"{html.escape(run.name)}: {last.get('step', 0):,} updates, epoch {last.get('epoch', 0):.2f}, restarts: {restarts}"
        )
    body = f"<p>{'<br>'.join(facts)}</p><div class=grid>{''.join(_charts(runs))}</div>"
    return document(", ".join(run.name for run in runs), f"{body}{''.join(map(_captions, runs))}{_flags(runs)}")


def write_page(folders: Sequence[Path], path: Path) -> None:
    """Raises ValueError where a folder is not a run's."""
    text = page([Run.read(folder) for folder in folders])
    with atomic_write(path) as file:
        file.write(text.encode())


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="open-flamingo-report", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="the folder of a run ({run_name})")
    parser.add_argument("-o", "--output", type=Path, default=Path("report.html"), help="default: %(default)s")
    args = parser.parse_args(argv)
    try:
        write_page(args.runs, args.output)
    except ImportError as error:
        sys.exit(f"error: {error}. pip install open-flamingo[training] installs what is missing")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
