"""The plots of the pages on teachers and on students, by plotly."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import plotly.graph_objects as go

from richkd.analysis.metrics import CELLS
from richkd.core.teacher_names import NAMES
from richkd.report.plots import COLOURS, apart, plain, ticks, widened

# right to wrong, each firm and faint
CELL_COLOURS = dict(zip(CELLS, ("#0072B2", "#8FC1E0", "#F0B68A", "#D55E00"), strict=True))
FEW = 10  # samples
CELL_NAMES = {
    "confident_correct": "confident, correct",
    "unsure_correct": "unsure, correct",
    "unsure_wrong": "unsure, wrong",
    "confident_wrong": "confident, wrong",
}


def confidence_bars(shares: Mapping[str, Mapping[str, float]]) -> go.Figure:
    """The confidence table of each model as a bar from confident and correct to confidently wrong.

    Args:
        shares: by model, the four cells.
    """
    figure = go.Figure()
    models = list(shares)[::-1]  # plotly draws from below
    for cell in CELLS:
        values = [100 * shares[model][cell] for model in models]
        figure.add_bar(
            y=models,
            x=values,
            orientation="h",
            marker={"color": CELL_COLOURS[cell]},
            text=[f"{value:.1f}" if value >= 4 else "" for value in values],
            textangle=0,
            textposition="inside",
            insidetextanchor="middle",
            hovertemplate=f"%{{y}}<br>{CELL_NAMES[cell]}: %{{x:.2f}} %<extra></extra>",
        )
    figure.update_layout(barmode="stack", bargap=0.35)
    figure.update_xaxes(title="samples, %", range=(0, 100))
    figure.update_yaxes(automargin=True, ticksuffix=" ", type="category")
    return plain(figure, height=110 + 38 * len(models))


def reliability_diagram(bins: Mapping[str, Sequence[Mapping[str, float]]]) -> go.Figure:
    """Accuracy against confidence; on the diagonal, a model is as often right as it says.

    Bins of fewer than ten samples are left out: they say nothing.

    Args:
        bins: by model, as `metrics.reliability` gives them.
    """
    figure = go.Figure()
    figure.add_scatter(
        x=[0, 100],
        y=[0, 100],
        mode="lines",
        hoverinfo="skip",
        line={"color": "#888888", "dash": "dot", "width": 1},
    )
    ends = []
    most = max(bin["count"] for everything in bins.values() for bin in everything)
    for number, (model, everything) in enumerate(bins.items()):
        colour = colour_of(number)
        own = [bin for bin in everything if bin["count"] >= FEW]
        if not own:
            continue
        figure.add_scatter(
            x=[100 * bin["confidence"] for bin in own],
            y=[100 * bin["accuracy"] for bin in own],
            mode="lines+markers",
            line={"color": colour, "width": 1.5},
            marker={"size": [4 + 10 * (bin["count"] / most) ** 0.5 for bin in own]},
            hovertext=[
                f"{model}<br>confidence {100 * bin['confidence']:.1f} %, right "
                f"{100 * bin['accuracy']:.1f} %<br>{bin['count']:,} samples"
                for bin in own
            ],
            hoverinfo="text",
        )
        ends.append((100 * own[-1]["accuracy"], 100 * own[-1]["confidence"], model, colour))
    # of many, hovering tells the names
    places = _label_ends(figure, ends, (0, 100)) if len(ends) <= len(COLOURS) else []
    figure.update_xaxes(title="confidence, %", range=(0, 101))
    figure.update_yaxes(title="right, %", range=(0, max([104.0, *places]) + 3))
    return plain(figure, right=14 + 7 * max(len(model) for model in bins))


def lines(
    curves: Mapping[str, Sequence[tuple[float, float]]],
    x_title: str,
    y_title: str,
    *,
    log: bool = False,
    marks: Sequence[tuple[float, str]] = (),
) -> go.Figure:
    """Curves with their names at their ends, in the order of the palette.

    Args:
        curves: points (x, y) by name.
        x_title: of the axis.
        y_title: of the axis.
        log: whether the axis of x is logarithmic.
        marks: values of x to draw a line at, with what they are.
    """
    figure = go.Figure()
    seen = [y for points in curves.values() for _, y in points]
    bottom, top = widened(seen, 0.06)
    ends = []
    for number, (name, points) in enumerate(curves.items()):
        colour = colour_of(number)
        x, y = ([point[axis] for point in points] for axis in (0, 1))
        figure.add_scatter(
            x=x,
            y=y,
            mode="lines+markers",
            marker={"size": 5},
            line={"color": colour, "width": 2},
            hovertemplate=f"{name}<br>{x_title} %{{x:.4g}}: %{{y:.2f}}<extra></extra>",
        )
        ends.append((y[-1], x[-1], name, colour))
    places = _label_ends(figure, ends, (bottom, top), log=log)
    for x_mark, text in marks:
        figure.add_vline(
            x=x_mark,
            line={"color": "#888888", "dash": "dot", "width": 1},
            annotation={"text": text, "font": {"size": 11}},
        )
    figure.update_xaxes(title=x_title, type="log" if log else "linear")
    if log:
        low, high = widened([math.log10(x) for points in curves.values() for x, _ in points], 0.03)
        figure.update_xaxes(range=(low, high), **ticks(low, high))
    figure.update_yaxes(title=y_title, range=(min(bottom, *places), max(top, *places)))
    return plain(figure, right=14 + 7 * max(len(name) for name in curves))


def _label_ends(
    figure: go.Figure,
    ends: Sequence[tuple[float, float, str, str]],
    within: tuple[float, float],
    log: bool = False,
) -> list[float]:
    """Names at the ends (y, x, name, colour) of lines, moved off each other; where they went."""
    if not ends:
        return []
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


def class_changes(rows: Sequence[Mapping[str, Any]]) -> go.Figure:
    """Accuracy of some classes with the CNN teacher alone, and with the blend: an arrow each."""
    figure = go.Figure()
    shown = list(rows)[::-1]
    names = [row["class"] for row in shown]
    colours = [COLOURS[0] if row["fused"] >= row["cnn"] else COLOURS[1] for row in shown]
    for row, colour in zip(shown, colours, strict=True):
        figure.add_scatter(
            x=[100 * row["cnn"], 100 * row["fused"]],
            y=[row["class"]] * 2,
            mode="lines",
            line={"color": colour, "width": 2},
            hoverinfo="skip",
        )
    for kind, symbol in (("cnn", "circle-open"), ("clip", "x-thin-open"), ("fused", "circle")):
        figure.add_scatter(
            x=[100 * row[kind] for row in shown],
            y=names,
            mode="markers",
            marker={
                "symbol": symbol,
                "size": 9,
                "line": {"width": 1.5},
                "color": "#888888" if kind == "clip" else colours,
            },
            hovertemplate=f"%{{y}}<br>{NAMES[kind]}: %{{x:.2f}} %<extra></extra>",
        )
    figure.update_xaxes(title="accuracy, %")
    figure.update_yaxes(automargin=True, ticksuffix=" ", type="category")
    return plain(figure, height=100 + 24 * len(shown))


def key(names: Sequence[str]) -> dict[str, str]:
    """The colour of each of several models, as in the plots."""
    return {name: colour_of(number) for number, name in enumerate(names)}


def colour_of(number: int) -> str:
    """The palette, over and over."""
    return COLOURS[number % len(COLOURS)]


def corruption_dots(top1: Mapping[str, Mapping[str, Sequence[float]]]) -> go.Figure:
    """Mean accuracy over severities, by corruption, a colour a run; hovering gives each severity.

    Args:
        top1: by run, by corruption, the five accuracies in 0..1.
    """
    figure = go.Figure()
    for number, (run, by_name) in enumerate(top1.items()):
        names = [name.replace("_", " ") for name in by_name][::-1]
        each = list(by_name.values())[::-1]
        figure.add_scatter(
            x=[100 * sum(values) / len(values) for values in each],
            y=names,
            mode="markers",
            marker={
                "color": colour_of(number),
                "size": 9,
                "symbol": ["circle", "diamond", "square"][number // len(COLOURS) % 3],
            },
            hovertext=[
                f"{run}<br>{name}: " + ", ".join(f"{100 * v:.1f}" for v in values) + " %"
                for name, values in zip(names, each, strict=True)
            ],
            hoverinfo="text",
        )
    figure.update_xaxes(title="top-1, mean of five severities, %")
    figure.update_yaxes(automargin=True, ticksuffix=" ", type="category")
    return plain(figure, height=420)


def series(
    rows: Sequence[Mapping[str, Any]], by: str, x: str, y: str, factor: float = 1.0
) -> dict[str, list[tuple[float, float]]]:
    """Rows as curves: grouped by one entry, points of two others; `factor` is that of y."""
    return {
        str(name): [(row[x], factor * row[y]) for row in group]
        for name, group in groupby(rows, key=lambda row: row[by])
    }
