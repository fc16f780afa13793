"""results.json: scores of each condition, their mean and spread over seeds. And the page that shows them."""

from __future__ import annotations

import base64
import html
import io
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from open_flamingo.scripts.evaluate.conditions import BLANK, IMAGES, SHUFFLED, Condition
from open_flamingo.scripts.evaluate.data import Record
from open_flamingo.scripts.evaluate.images import read_image
from open_flamingo.scripts.evaluate.metrics import CaptionScorer, roc_auc, vqa_accuracy
from open_flamingo.train.atomic import atomic_write

RESULTS, PAGE = "results.json", "results.html"
SHOWN = 24  # records on the page
THUMBNAIL = 160  # pixels
NAMES = {IMAGES: "images", BLANK: "blank images", SHUFFLED: "shuffled answers"}
COLORS = {IMAGES: "#1f77b4", BLANK: "#7f7f7f", SHUFFLED: "#d62728"}

Rows = Sequence[dict[str, Any]]
Scorer = Callable[[Rows], dict[str, float]]


def build_scorer(task: str, records: Sequence[Record], classes: Sequence[str], tokenizer: str) -> Scorer:
    """Predictions of all records → metric → score in percent; the first is the one to quote."""
    if task == "caption":
        captions = CaptionScorer({record.id: record.answers for record in records}, tokenizer)
        return lambda rows: captions({row["id"]: row["prediction"] for row in rows})
    if task == "vqa":
        return lambda rows: {"VQA accuracy": 100 * _mean([vqa_accuracy(r["prediction"], r["truth"]) for r in rows])}

    def classification(rows: Rows) -> dict[str, float]:
        scores = {"accuracy": 100 * _mean([float(row["prediction"] == row["truth"][0]) for row in rows])}
        if len(classes) == 2:
            area = roc_auc([row["truth"][0] == classes[1] for row in rows], [row["score"] for row in rows])
            scores = {"ROC AUC": 100 * area} | scores if math.isfinite(area) else scores
        return scores

    return classification


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def summarize(scores: Mapping[Condition, dict[str, float]]) -> list[dict[str, Any]]:
    """For each variant and number of shots: every metric of each seed, its mean, and its standard deviation over seeds (that of these
    seeds, as the reference's, not an estimate for all)."""
    groups: dict[tuple[str, int], list[Condition]] = defaultdict(list)
    for condition in scores:
        groups[condition.variant, condition.shots].append(condition)
    summary = []
    for (variant, shots), of in groups.items():
        metrics = {}
        for metric in scores[of[0]]:
            values = [scores[condition][metric] for condition in of]
            spread = {"mean": _mean(values), "standard_deviation": statistics.pstdev(values), "seeds": values}
            metrics[metric] = {name: _rounded(value) for name, value in spread.items()}
        summary.append({"variant": variant, "shots": shots, "seeds": [c.seed for c in of], "scores": metrics})
    return summary


def _rounded(value: Any) -> Any:
    return [round(one, 4) for one in value] if isinstance(value, list) else round(value, 4)


def write_results(
    folder: Path,
    settings: Mapping[str, Any],
    records: Sequence[Record],
    scores: Mapping[Condition, dict[str, float]],
    predictions: Mapping[Condition, Rows],
    notes: Sequence[str],
) -> dict[str, Any]:
    """Writes results.json and the page into `folder`; returns what is in results.json."""
    left_out = sum(row.get("left_out", 0) for rows in predictions.values() for row in rows)
    results = {
        "metric": next(iter(next(iter(scores.values())))),
        "samples": len(records),
        "results": summarize(scores),
        "demonstrations_left_out": left_out,
        "notes": list(notes),
        "settings": dict(settings),
    }
    with atomic_write(folder / RESULTS) as file:
        file.write(json.dumps(results, indent=1, ensure_ascii=False).encode())
    with atomic_write(folder / PAGE) as file:
        title = f"{settings['checkpoint'].partition(',')[0]}, {settings['task']}: {folder.resolve().name}"
        file.write(page(title, results, records, predictions).encode())
    return results


def table(results: Mapping[str, Any]) -> str:
    """The metric to quote, for a terminal."""
    metric = results["metric"]
    lines = [f"{metric}, {results['samples']:,} samples; mean ± standard deviation over seeds"]
    for of in results["results"]:
        score = of["scores"][metric]
        spread = f" ± {score['standard_deviation']:.2f}" if len(of["seeds"]) > 1 else ""
        lines.append(f"  {of['shots']:>3} shots  {NAMES[of['variant']]:<36} {score['mean']:7.2f}{spread}")
    return "\n".join(lines)


def _plot(results: Mapping[str, Any]) -> str:
    import plotly.graph_objects as go

    metric, figure = results["metric"], go.Figure()
    for variant, name in NAMES.items():
        of = [one for one in results["results"] if one["variant"] == variant and metric in one["scores"]]
        of.sort(key=lambda one: one["shots"])
        if of:
            spread = [one["scores"][metric]["standard_deviation"] for one in of]
            figure.add_scatter(
                x=[str(one["shots"]) for one in of],
                y=[one["scores"][metric]["mean"] for one in of],
                error_y={"type": "data", "array": spread, "visible": any(spread)},
                name=name,
                mode="lines+markers",
                line={"color": COLORS[variant], "dash": "solid" if variant == IMAGES else "dash"},
            )
        if variant == IMAGES and of and of[0]["shots"] == 0:
            zero = of[0]["scores"][metric]["mean"]
            figure.add_hline(y=zero, line_dash="dot", line_width=1, line_color="gray", annotation_text="0 shots")
    shots = sorted({one["shots"] for one in results["results"]})
    figure.update_xaxes(title_text="demonstrations", type="category", categoryarray=[str(number) for number in shots])
    figure.update_yaxes(title_text=metric)
    figure.update_layout(
        template="plotly_white",
        margin={"l": 55, "r": 10, "t": 10, "b": 40},
        legend={"orientation": "h", "y": -0.2},
        height=420,
    )
    return figure.to_html(full_html=False, include_plotlyjs=False, config={"responsive": True, "displayModeBar": False})


def _numbers(results: Mapping[str, Any]) -> str:
    metrics = list(dict.fromkeys(metric for one in results["results"] for metric in one["scores"]))
    rows = []
    for one in results["results"]:
        cells = [str(one["shots"]), NAMES[one["variant"]], str(len(one["seeds"]))]
        for metric in metrics:
            score = one["scores"].get(metric)
            spread = f" ± {score['standard_deviation']:.2f}" if score and len(one["seeds"]) > 1 else ""
            cells.append(f"{score['mean']:.2f}{spread}" if score else "")
        rows.append("".join(f"<td>{html.escape(cell)}</td>" for cell in cells))
    head = "".join(f"<th>{html.escape(name)}</th>" for name in ("shots", "", "seeds", *metrics))
    return f"<div class=wide><table><tr>{head}</tr>{''.join(f'<tr>{row}</tr>' for row in rows)}</table></div>"


def _examples(records: Sequence[Record], predictions: Mapping[Condition, Rows]) -> str:
    """A table: an image, what people say, what the model says by number of demonstrations."""
    shown = [condition for condition in predictions if condition.variant == IMAGES and condition.seed == 0]
    rows = []
    for index in range(0, len(records), -(-len(records) // SHOWN)):
        record = records[index]
        truth = " / ".join(dict.fromkeys(record.answers))
        cells = [f"<td>{_thumbnail(record.image)}</td>"]
        for text in (record.question or record.text, truth, *(predictions[c][index]["prediction"] for c in shown)):
            cells.append(f"<td>{html.escape(text)}</td>")
        rows.append(f"<tr>{''.join(cells)}</tr>")
    head = "".join(f"<th>{condition.shots} shots</th>" for condition in shown)
    return f"<h2>Predictions</h2><div class=wide><table><tr><th></th><th></th><th>truth</th>{head}</tr>{''.join(rows)}</table></div>"


def _thumbnail(path: Path) -> str:
    try:
        image = read_image(path)
    except ValueError:  # gone since
        return ""
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    data = io.BytesIO()
    image.save(data, "JPEG", quality=80)
    return f"<img alt='' src='data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}'>"


def page(
    title: str, results: Mapping[str, Any], records: Sequence[Record], predictions: Mapping[Condition, Rows]
) -> str:
    """One file that needs no network."""
    from plotly.offline import get_plotlyjs

    from open_flamingo.train.page import STYLE

    title = html.escape(title)
    notes = "".join(f"<p>{html.escape(note)}</p>" for note in results["notes"])
    settings = "".join(
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(str(value))}</td></tr>"
        for name, value in results["settings"].items()
    )
    return (
        f"<!doctype html><html lang=en><head><meta charset=utf-8><meta name=viewport content='width=device-width, initial-scale=1'>"
        f"<title>{title}</title><style>{STYLE}</style><script>{get_plotlyjs()}</script></head><body><h1>{title}</h1>"
        f"<p>{html.escape(results['metric'])} of {results['samples']:,} samples over the number of demonstrations; mean and standard "
        f"deviation over seeds</p>{notes}<figure>{_plot(results)}</figure>{_numbers(results)}{_examples(records, predictions)}"
        f"<details><summary>Settings</summary><table>{settings}</table></details></body></html>"
    )
