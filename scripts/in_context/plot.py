"""Accuracy over shots as a small SVG."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

WIDTH, HEIGHT = 800, 340
LEFT, RIGHT, TOP, BOTTOM = 56, 410, 20, 290  # of the axes
COLORS = ("#1f6fb4", "#d1495b", "#8d99ae", "#2a9d8f", "#edae49", "#b8b8b8")
STYLE = "font: 13px system-ui, sans-serif; fill: #222"


def write_plot(path: Path, shots: Sequence[int], results: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
    """Write the accuracies of `results`, by training and condition, over `shots`, and chance among the words shown."""
    lines = [
        (f"trained on {name}, {condition}", list(values))
        for name, by_condition in results.items()
        for condition, values in by_condition.items()
    ]
    parts = [grid(shots), curve(shots, [1 / count for count in shots], "#555", dashes="5 4")]
    parts += [curve(shots, values, COLORS[i % len(COLORS)]) for i, (_, values) in enumerate(lines)]
    parts += [legend(i, label, COLORS[i % len(COLORS)]) for i, (label, _) in enumerate(lines)]
    parts.append(legend(len(lines), "chance among the words shown", "#555", dashes="5 4"))
    path.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}">'
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>{"".join(parts)}</svg>\n',
        encoding="utf-8",
    )


def place(shots: Sequence[int], count: int, value: float) -> tuple[float, float]:
    """Where an accuracy lies in the plot; shots on a logarithmic axis."""
    along = math.log(count / shots[0]) / math.log(shots[-1] / shots[0])
    return LEFT + along * (RIGHT - LEFT), BOTTOM - value * (BOTTOM - TOP)


def grid(shots: Sequence[int]) -> str:
    parts = []
    for percent in (0, 25, 50, 75, 100):
        y = place(shots, shots[0], percent / 100)[1]
        parts.append(f'<line x1="{LEFT}" x2="{RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end" style="{STYLE}">{percent} %</text>')
    for count in shots:
        x = place(shots, count, 0)[0]
        parts.append(f'<text x="{x:.1f}" y="{BOTTOM + 20}" text-anchor="middle" style="{STYLE}">{count}</text>')
    middle = (LEFT + RIGHT) / 2
    parts.append(
        f'<text x="{middle}" y="{BOTTOM + 40}" text-anchor="middle" style="{STYLE}">demonstrations in the prompt</text>'
    )
    return "".join(parts)


def curve(shots: Sequence[int], values: Sequence[float], color: str, dashes: str = "") -> str:
    points = [place(shots, count, value) for count, value in zip(shots, values, strict=True)]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dots = "" if dashes else "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{color}"/>' for x, y in points)
    return (
        f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="2" stroke-dasharray="{dashes}"/>{dots}'
    )


def legend(number: int, label: str, color: str, dashes: str = "") -> str:
    x, y = RIGHT + 30, TOP + 20 + 26 * number
    return (
        f'<line x1="{x}" x2="{x + 24}" y1="{y}" y2="{y}" stroke="{color}" stroke-width="2" stroke-dasharray="{dashes}"/>'
        f'<text x="{x + 32}" y="{y + 4}" style="{STYLE}">{escape(label)}</text>'
    )
