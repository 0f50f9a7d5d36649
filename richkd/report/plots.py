"""The plots of a report, by plotly: labels beside points and lines, details on hovering."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import plotly.graph_objects as go

from richkd.analysis.results import Standing, mean_std, minus_kd
from richkd.report.rows import Row
from richkd.training.loop import score_of
from richkd.training.run_folder import Run

# Okabe and Ito's palette for colour-blind readers, without black and yellow
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
SYMBOLS = {"circle": "●", "square": "■", "diamond": "◆", "triangle-up": "▲", "x": "✖", "star": "★"}
GREY = "#888888"
HEIGHT = 340
COSTS = {
    "parameters": ("parameters, millions", 1e-6),
    "multiply_adds": ("multiply-adds an image, millions", 1e-6),
    "latency_ms": ("latency of one image on the CPU, ms", 1.0),
}

Looks = dict[str, tuple[str, str]]  # method -> colour and symbol
Point = tuple[float, float, Standing]  # cost, top-1 in percent
End = tuple[float, float, str, str]  # of a curve: y, x, name and colour


def looks_of(methods: Iterable[str]) -> Looks:
    """Return the colour and symbol of each method, for all plots of a page."""
    symbols = [*SYMBOLS]
    return {
        method: (COLOURS[number % len(COLOURS)], symbols[number // len(COLOURS) % len(symbols)])
        for number, method in enumerate(sorted({*methods}))
    }


def pareto(rows: Sequence[Row], cost: str, looks: Looks, heading: str = "") -> go.Figure:
    """Plot accuracy against cost; a line joins the students that no cheaper one surpasses."""
    title, factor = COSTS[cost]
    points: list[Point] = [
        (factor * getattr(row.cost, cost), 100 * row.standing.last[0], row.standing) for row in rows
    ]
    figure = go.Figure()
    front: list[Point] = []
    for point in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or point[1] > front[-1][1]:
            front.append(point)
    figure.add_scatter(
        x=[x for x, _, _ in front],
        y=[y for _, y, _ in front],
        mode="lines",
        hoverinfo="skip",
        line={"color": GREY, "dash": "dot", "width": 1},
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
                "array": [_spread(s) for _, _, s in own],
                "thickness": 1,
                "width": 3,
            },
        )
    low, high = widened([math.log10(x) for x, _, _ in points], 0.18)
    labels = _column_labels(points, 0.2 * (high - low))
    for names, x, y in labels:
        figure.add_annotation(
            x=x, y=y, text="<br>".join(names), showarrow=False, yanchor="bottom", yshift=6
        )
    bottom, top = widened(
        [y + sign * (_spread(s) or 0) for _, y, s in points for sign in (-1, 1)], 0.08
    )
    room = 0.09 * max(len(names) for names, _, _ in labels)
    figure.update_xaxes(title=title, type="log", range=(low, high), **log_ticks(low, high))
    figure.update_yaxes(title="top-1, %", range=(bottom, top + room * (top - bottom)))
    return styled(figure, title=heading)


def _column_labels(points: Sequence[Point], near: float) -> list[tuple[list[str], float, float]]:
    """Return labels (students, log x, y) above columns of points; near columns share one."""
    columns: list[list[Point]] = []
    for point in sorted(points, key=lambda point: point[0]):
        if columns and math.log10(point[0] / columns[-1][0][0]) < near:
            columns[-1].append(point)
        else:
            columns.append([point])
    labels = []
    for column in columns:
        best_first = sorted(column, key=lambda point: -point[1])
        x = statistics.fmean({math.log10(x) for x, _, _ in column})
        y = max(y + (_spread(s) or 0.0) for _, y, s in column)
        labels.append((list(dict.fromkeys(s.student for _, _, s in best_first)), x, y))
    return labels


def differences(standings: Sequence[Standing], looks: Looks) -> go.Figure | None:
    """Plot paired differences to KD with their intervals; None if there are none."""
    figure = go.Figure()
    for standing in reversed(standings):  # plotly draws from the bottom
        difference = standing.minus_kd
        if difference is None or difference.n < 2:
            continue
        colour, symbol = looks[standing.method]
        half = 100 * (difference.high - difference.mean)
        figure.add_scatter(
            x=[100 * difference.mean],
            y=[standing.label],
            mode="markers",
            marker={"color": colour, "symbol": symbol, "size": 9},
            error_x={"type": "data", "array": [half], "thickness": 1.5, "width": 4},
            hovertext=f"{standing.label}<br>{minus_kd(difference)} points, n = {difference.n}",
            hoverinfo="text",
        )
    if not figure.data:
        return None
    height = 90 + 26 * len(figure.data)
    figure.add_vline(x=0, line={"color": GREY, "width": 1})
    figure.update_xaxes(title="top-1 minus KD's, points")
    figure.update_yaxes(automargin=True)
    return styled(figure, height=height)


def learning_curves(
    rows: Sequence[Row], student: str, looks: Looks, heading: str = ""
) -> go.Figure | None:
    """Plot accuracy by epoch, the mean over seeds: one line per configuration of a student.

    The accuracy is on the images for choices if the runs have any, else on the test images.
    """
    figure = go.Figure()
    ends: list[End] = []
    seen: list[float] = []
    for row in (row for row in rows if row.standing.student == student):
        curves = [_scores(run) for run in row.runs]
        epochs = sorted(set.intersection(*(set(curve) for curve in curves)))
        if not epochs:
            continue
        means = [100 * statistics.fmean(curve[epoch] for curve in curves) for epoch in epochs]
        name = row.standing.configuration
        colour = looks[row.standing.method][0]
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
    places = label_ends(figure, ends, (bottom, top))
    chosen = any(
        record.get("validation_accuracy") is not None
        for row in rows
        for run in row.runs
        for record in run.metrics
    )
    figure.update_xaxes(title="epoch")
    figure.update_yaxes(
        title="top-1 on images for choices, %" if chosen else "top-1, %",
        range=(bottom, max(top, *places)),
    )
    title = f"{student} ({heading})" if heading else student
    return styled(figure, right=room_for(name for _, _, name, _ in ends), title=title)


def _scores(run: Run) -> dict[int, float]:
    scores = {record["epoch"]: score_of(record) for record in run.metrics}
    return {epoch: score for epoch, score in scores.items() if score is not None}


def _spread(standing: Standing) -> float | None:
    """Return the standard deviation over seeds in percent; None for one seed."""
    std = standing.last[1]
    return None if math.isnan(std) else 100 * std


# --- for all plots -------------------------------------------------------------------------------


def widened(values: Sequence[float], share: float) -> tuple[float, float]:
    """Return the range of values with some room on both sides."""
    low, high = min(values), max(values)
    room = share * (high - low) or 0.3
    return low - room, high + room


def log_ticks(low: float, high: float) -> dict[str, Any]:
    """Return ticks at 1, 2, 5, 10, … for a logarithmic axis.

    Plotly's own would be single digits from 2 to 9, without the power of ten that they multiply.
    """
    values = [
        digit * 10.0**decade
        for decade in range(math.floor(low), math.ceil(high) + 1)
        for digit in (1, 2, 5)
    ]
    shown = [value for value in values if low <= math.log10(value) <= high]
    return {"tickvals": shown, "ticktext": [f"{value:g}" for value in shown]}


def label_ends(
    figure: go.Figure, ends: Sequence[End], within: tuple[float, float], log: bool = False
) -> list[float]:
    """Write names at the ends of curves, moved apart; return the y where each was placed."""
    places = apart([end[0] for end in ends], 0.075 * (within[1] - within[0]))
    for y, (_, x, name, colour) in zip(places, ends, strict=True):
        figure.add_annotation(
            x=math.log10(x) if log else x,
            y=y,
            text=f" {name}",
            showarrow=False,
            xanchor="left",
            font={"color": colour},
        )
    return places


def apart(values: Sequence[float], gap: float) -> list[float]:
    """Move values to be at least `gap` apart, and keep their mean."""
    if not values:
        return []
    order = sorted(range(len(values)), key=values.__getitem__)
    placed = list(values)
    for lower, upper in pairwise(order):
        placed[upper] = max(placed[upper], placed[lower] + gap)
    shift = statistics.fmean(placed) - statistics.fmean(values)
    return [value - shift for value in placed]


def room_for(names: Iterable[str]) -> int:
    """Return the right margin for names at the ends of curves, in pixels."""
    return 14 + 7 * max(map(len, names))


def styled(
    figure: go.Figure, *, title: str = "", height: int = HEIGHT, right: int = 16
) -> go.Figure:
    """Apply the common layout, without a background: pages are light or dark."""
    figure.update_layout(
        template="none",
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        height=height,
        margin={"l": 58, "r": right, "t": 44 if title else 16, "b": 52},
        title={"text": title, "font": {"size": 15}, "x": 0, "xanchor": "left"},
        font={"family": "system-ui, sans-serif", "size": 13},
        showlegend=False,
        hoverlabel={"align": "left"},
    )
    figure.update_xaxes(gridcolor="rgba(128,128,128,0.2)", zeroline=False)
    figure.update_yaxes(gridcolor="rgba(128,128,128,0.2)", zeroline=False)
    return figure
