"""The plots of the page, by plotly: labels at the points and lines, details on hovering."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import plotly.graph_objects as go

from richkd.analysis.results import Standing, mean_std, minus_kd
from richkd.report.cost import Cost
from richkd.training.loop import score_of
from richkd.training.run_folder import Run

# Okabe and Ito's palette, which colour-blind people tell apart, without black and yellow
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
SYMBOLS = {"circle": "●", "square": "■", "diamond": "◆", "triangle-up": "▲", "x": "✖", "star": "★"}
HEIGHT = 340
COSTS = {
    "parameters": ("parameters, millions", 1e-6),
    "multiply_adds": ("multiply-adds an image, millions", 1e-6),
    "latency_ms": ("latency of one image on the CPU, ms", 1.0),
}


Looks = dict[str, tuple[str, str]]  # colour and symbol by method


def look_of(standings: Sequence[Standing]) -> Looks:
    """Colour and symbol of each method, the same in every plot."""
    methods = dict.fromkeys(sorted(standing.method for standing in standings))
    return {
        method: (COLOURS[number % len(COLOURS)], [*SYMBOLS][number // len(COLOURS) % len(SYMBOLS)])
        for number, method in enumerate(methods)
    }


def key(standings: Sequence[Standing]) -> dict[str, tuple[str, str]]:
    """Colour and mark of each method, for text."""
    return {
        method: (colour, SYMBOLS[symbol]) for method, (colour, symbol) in look_of(standings).items()
    }


def pareto(
    standings: Sequence[Standing], costs: Sequence[Cost], cost: str, looks: Looks, heading: str = ""
) -> go.Figure:
    """Accuracy against one cost; the line joins students that no cheaper one surpasses."""
    title, factor = COSTS[cost]
    figure = go.Figure()
    points = [
        (factor * getattr(c, cost), 100 * s.last[0], s)
        for s, c in zip(standings, costs, strict=True)
    ]
    front: list[tuple[float, float]] = []
    for x, y, _ in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or y > front[-1][1]:
            front.append((x, y))
    figure.add_scatter(
        x=[x for x, _ in front],
        y=[y for _, y in front],
        mode="lines",
        hoverinfo="skip",
        line={"color": "#888888", "dash": "dot", "width": 1},
    )
    for method, (colour, symbol) in looks.items():
        own = [point for point in points if point[2].method == method]
        figure.add_scatter(
            x=[x for x, _, _ in own],
            y=[y for _, y, _ in own],
            mode="markers",
            hovertext=[
                f"{s.label}<br>{mean_std(s.last)} %, n = {len(s.runs)}<br>{title}: {x:.3g}"
                for x, _, s in own
            ],
            hoverinfo="text",
            marker={"color": colour, "symbol": symbol, "size": 9},
            error_y={
                "type": "data",
                "array": [_spread(s.last) for _, _, s in own],
                "thickness": 1,
                "width": 3,
            },
        )
    low, high = widened([math.log10(x) for x, _, _ in points], 0.18)
    for names, x, y in _labels(points, 0.2 * (high - low)):
        figure.add_annotation(
            x=x, y=y, text="<br>".join(names), showarrow=False, yanchor="bottom", yshift=6
        )
    figure.update_xaxes(title=title, type="log", range=(low, high), **ticks(low, high))
    bottom, top = widened(
        [y + sign * (_spread(s.last) or 0) for _, y, s in points for sign in (-1, 1)], 0.08
    )
    room = 0.09 * max(len(names) for names, _, _ in _labels(points, 0.2 * (high - low)))
    figure.update_yaxes(title="top-1, %", range=(bottom, top + room * (top - bottom)))
    return plain(figure, title=heading)


def _labels(
    points: Sequence[tuple[float, float, Standing]], near: float
) -> list[tuple[list[str], float, float]]:
    """Students' names above their columns of points: (names, log x, y); near columns share one."""
    columns: list[list[tuple[float, float, Standing]]] = []
    for point in sorted(points, key=lambda point: point[0]):
        if columns and math.log10(point[0] / columns[-1][0][0]) < near:
            columns[-1].append(point)
        else:
            columns.append([point])
    labels = []
    for column in columns:
        ranked = sorted(column, key=lambda point: -point[1])
        x = statistics.fmean({math.log10(x) for x, _, _ in column})
        y = max(y + (_spread(s.last) or 0.0) for _, y, s in column)
        labels.append((list(dict.fromkeys(s.student for _, _, s in ranked)), x, y))
    return labels


def widened(values: Sequence[float], share: float) -> tuple[float, float]:
    """The range of values with some room on both sides."""
    low, high = min(values), max(values)
    room = share * (high - low) or 0.3
    return low - room, high + room


def ticks(low: float, high: float) -> dict[str, Any]:
    """1, 2, 5, 10, … within a logarithmic range; plotly's own ticks are 2 to 9 without a decade."""
    values = [
        digit * 10.0**decade
        for decade in range(math.floor(low), math.ceil(high) + 1)
        for digit in (1, 2, 5)
    ]
    shown = [value for value in values if low <= math.log10(value) <= high]
    return {"tickvals": shown, "ticktext": [f"{value:g}" for value in shown]}


def differences(standings: Sequence[Standing]) -> go.Figure | None:
    """Paired differences to KD with their intervals; None where there is none."""
    looks = look_of(standings)
    shown = [s for s in standings if s.minus_kd is not None and s.minus_kd.n > 1]
    if not shown:
        return None
    shown.reverse()  # plotly draws from below
    figure = go.Figure()
    for standing in shown:
        difference = standing.minus_kd
        assert difference is not None
        half = 100 * (difference.high - difference.mean)
        figure.add_scatter(
            x=[100 * difference.mean],
            y=[standing.label],
            mode="markers",
            marker={
                "color": looks[standing.method][0],
                "symbol": looks[standing.method][1],
                "size": 9,
            },
            error_x={"type": "data", "array": [half], "thickness": 1.5, "width": 4},
            hovertext=f"{standing.label}<br>{minus_kd(difference)} points, n = {difference.n}",
            hoverinfo="text",
        )
    figure.add_vline(x=0, line={"color": "#888888", "width": 1})
    figure.update_xaxes(title="top-1 minus KD's, points")
    figure.update_yaxes(automargin=True)
    return plain(figure, height=90 + 26 * len(shown))


def learning_curves(
    standings: Sequence[Standing],
    runs: Sequence[Run],
    student: str,
    looks: Looks,
    heading: str = "",
) -> go.Figure | None:
    """Accuracy by epoch, the mean over seeds, a line a configuration of one student.

    On validation images where a run has them, else on test images.
    """
    by_path = {str(run.path): run for run in runs}
    figure = go.Figure()
    ends = []
    seen: list[float] = []
    for standing in (s for s in standings if s.student == student):
        curves = [_scores(by_path[str(summary["run"])]) for summary in standing.runs.values()]
        epochs = sorted(set.intersection(*(set(curve) for curve in curves)))
        if not epochs:
            continue
        means = [100 * statistics.fmean(curve[epoch] for curve in curves) for epoch in epochs]
        name = standing.configuration
        colour = looks[standing.method][0]
        figure.add_scatter(
            x=epochs,
            y=means,
            name=name,
            mode="lines" if len(epochs) > 1 else "markers",
            line={"color": colour, "width": 2},
            hovertemplate=f"{name}<br>epoch %{{x}}: %{{y:.2f}} %<extra></extra>",
        )
        ends.append((means[-1], epochs[-1], name, colour))
        seen += means
    if not ends:
        return None
    bottom, top = widened(seen, 0.05)
    places = apart([end[0] for end in ends], 0.075 * (top - bottom))
    for y, (_, x, name, colour) in zip(places, ends, strict=True):
        figure.add_annotation(
            x=x, y=y, text=f" {name}", showarrow=False, xanchor="left", font={"color": colour}
        )
    figure.update_xaxes(title="epoch")
    shown = [by_path[str(summary["run"])] for s in standings for summary in s.runs.values()]
    chosen = any(
        record.get("validation_accuracy") is not None for run in shown for record in run.metrics
    )
    figure.update_yaxes(
        title="top-1 on images for choices, %" if chosen else "top-1, %",
        range=(bottom, max(top, *places)),
    )
    widest = max(len(name) for _, _, name, _ in ends)
    title = f"{student} ({heading})" if heading else student
    return plain(figure, right=14 + 7 * widest, title=title)


def _scores(run: Run) -> dict[int, float]:
    scores = {record["epoch"]: score_of(record) for record in run.metrics}
    return {epoch: score for epoch, score in scores.items() if score is not None}


def _spread(pair: tuple[float, float]) -> float | None:
    return None if pair[1] != pair[1] else 100 * pair[1]


def apart(values: Sequence[float], gap: float) -> list[float]:
    """Where labels go so that they do not lie on each other, about the middle of the values."""
    order = sorted(range(len(values)), key=values.__getitem__)
    placed = list(values)
    for lower, upper in pairwise(order):
        placed[upper] = max(placed[upper], placed[lower] + gap)
    shift = statistics.fmean(placed) - statistics.fmean(values)
    return [value - shift for value in placed]


def plain(figure: go.Figure, **looks: Any) -> go.Figure:
    """No background of its own, so that it goes with a light and a dark page."""
    title = looks.get("title", "")
    figure.update_layout(
        template="none",
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        height=looks.get("height", HEIGHT),
        margin={"l": 58, "r": looks.get("right", 16), "t": 44 if title else 16, "b": 52},
        title={"text": title, "font": {"size": 15}, "x": 0, "xanchor": "left"},
        font={"family": "system-ui, sans-serif", "size": 13},
        showlegend=False,
        hoverlabel={"align": "left"},
    )
    figure.update_xaxes(gridcolor="rgba(128,128,128,0.2)", zeroline=False)
    figure.update_yaxes(gridcolor="rgba(128,128,128,0.2)", zeroline=False)
    return figure
