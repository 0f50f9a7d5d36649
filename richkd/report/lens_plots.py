"""The plots of the pages of `richkd analyze` and `richkd evaluate`, by plotly."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import plotly.graph_objects as go

from richkd.analysis.metrics import CELLS
from richkd.core.teacher_names import NAMES, name_of
from richkd.report.plots import COLOURS, GREY, label_ends, log_ticks, room_for, styled, widened

# blue for correct and orange for wrong, dark for confident and pale for unsure
CELL_COLOURS = dict(zip(CELLS, ("#0072B2", "#8FC1E0", "#F0B68A", "#D55E00"), strict=True))
FEW = 10  # samples
CELL_NAMES = {
    "confident_correct": "confident, correct",
    "unsure_correct": "unsure, correct",
    "unsure_wrong": "unsure, wrong",
    "confident_wrong": "confident, wrong",
}


def confidence_bars(shares: Mapping[str, Mapping[str, float]]) -> go.Figure:
    """Plot the confidence table of each model as one stacked bar.

    Args:
        shares: the four cells, by model.
    """
    figure = go.Figure()
    models = list(shares)[::-1]  # plotly draws from the bottom
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
    return by_name(figure, 110 + 38 * len(models))


def reliability_diagram(bins: Mapping[str, Sequence[Mapping[str, float]]]) -> go.Figure:
    """Plot accuracy against confidence; a calibrated model lies on the diagonal.

    Bins of fewer than ten samples are too noisy to show.

    Args:
        bins: the bins of `metrics.reliability`, by model.
    """
    figure = go.Figure()
    figure.add_scatter(
        x=[0, 100],
        y=[0, 100],
        mode="lines",
        hoverinfo="skip",
        line={"color": GREY, "dash": "dot", "width": 1},
    )
    ends = []
    largest = max(bin["count"] for all_bins in bins.values() for bin in all_bins)
    for number, (model, all_bins) in enumerate(bins.items()):
        colour = colour_of(number)
        shown = [bin for bin in all_bins if bin["count"] >= FEW]
        if not shown:
            continue
        figure.add_scatter(
            x=[100 * bin["confidence"] for bin in shown],
            y=[100 * bin["accuracy"] for bin in shown],
            mode="lines+markers",
            line={"color": colour, "width": 1.5},
            marker={"size": [4 + 10 * (bin["count"] / largest) ** 0.5 for bin in shown]},
            hovertext=[
                f"{model}<br>confidence {100 * bin['confidence']:.1f} %, right "
                f"{100 * bin['accuracy']:.1f} %<br>{bin['count']:,} samples"
                for bin in shown
            ],
            hoverinfo="text",
        )
        ends.append((100 * shown[-1]["accuracy"], 100 * shown[-1]["confidence"], model, colour))
    if len(ends) > len(COLOURS):  # too many to label; hovering gives the names
        ends = []
    places = label_ends(figure, ends, (0, 100))
    figure.update_xaxes(title="confidence, %", range=(0, 101))
    figure.update_yaxes(title="right, %", range=(0, max([104.0, *places]) + 3))
    return styled(figure, right=room_for(bins))


def lines(
    curves: Mapping[str, Sequence[tuple[float, float]]],
    x_title: str,
    y_title: str,
    *,
    log: bool = False,
    marks: Sequence[tuple[float, str]] = (),
) -> go.Figure:
    """Plot curves with their names at their ends.

    Args:
        curves: points (x, y) by name.
        x_title: title of the x axis.
        y_title: title of the y axis.
        log: whether the x axis is logarithmic.
        marks: values of x for vertical lines, with their labels.
    """
    figure = go.Figure()
    bottom, top = widened([y for points in curves.values() for _, y in points], 0.06)
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
    places = label_ends(figure, ends, (bottom, top), log=log)
    for mark, text in marks:
        figure.add_vline(
            x=mark,
            line={"color": GREY, "dash": "dot", "width": 1},
            annotation={"text": text, "font": {"size": 11}},
        )
    figure.update_xaxes(title=x_title, type="log" if log else "linear")
    if log:
        low, high = widened([math.log10(x) for points in curves.values() for x, _ in points], 0.03)
        figure.update_xaxes(range=(low, high), **log_ticks(low, high))
    figure.update_yaxes(title=y_title, range=(min(bottom, *places), max(top, *places)))
    return styled(figure, right=room_for(curves))


def class_changes(rows: Sequence[Mapping[str, Any]]) -> go.Figure:
    """Plot the accuracy of classes with the CNN teacher alone and fused, joined by a line."""
    figure = go.Figure()
    shown = list(rows)[::-1]  # plotly draws from the bottom
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
                "color": GREY if kind == "clip" else colours,
            },
            hovertemplate=f"%{{y}}<br>{NAMES[kind]}: %{{x:.2f}} %<extra></extra>",
        )
    figure.update_xaxes(title="accuracy, %")
    return by_name(figure, 100 + 24 * len(shown))


def additions(rows: Sequence[Mapping[str, Any]]) -> go.Figure:
    """Plot what each teacher adds to the top-1 of the blend, with 95 % intervals.

    Args:
        rows: the entry `teachers` of `complementarity`.
    """
    figure = go.Figure()
    figure.add_vline(x=0, line={"color": GREY, "dash": "dot", "width": 1})
    for row in rows[::-1]:  # plotly draws from the bottom
        adds = row["adds"]["top1"]
        half = 0.0 if adds["high"] is None else adds["high"] - adds["mean"]
        figure.add_scatter(
            x=[100 * adds["mean"]],
            y=[name_of(row["teacher"])],
            mode="markers",
            marker={"size": 9, "color": COLOURS[0]},
            error_x={"type": "data", "array": [100 * half], "thickness": 1.5, "width": 4},
            hovertemplate="%{y}: %{x:+.2f} points<extra></extra>",
        )
    figure.update_xaxes(title="top-1 of the blend with it minus without it, points")
    return by_name(figure, 110 + 34 * len(rows))


def corruption_dots(top1: Mapping[str, Mapping[str, Sequence[float]]]) -> go.Figure:
    """Plot each run's mean accuracy over severities by corruption; hovering gives every severity.

    Args:
        top1: by run and corruption, the five accuracies in 0..1.
    """
    figure = go.Figure()
    for number, (run, by_corruption) in enumerate(top1.items()):
        names = [name.replace("_", " ") for name in by_corruption][::-1]
        severities = list(by_corruption.values())[::-1]
        figure.add_scatter(
            x=[100 * sum(values) / len(values) for values in severities],
            y=names,
            mode="markers",
            marker={
                "color": colour_of(number),
                "size": 9,
                "symbol": ["circle", "diamond", "square"][number // len(COLOURS) % 3],
            },
            hovertext=[
                f"{run}<br>{name}: " + ", ".join(f"{100 * v:.1f}" for v in values) + " %"
                for name, values in zip(names, severities, strict=True)
            ],
            hoverinfo="text",
        )
    figure.update_xaxes(title="top-1, mean of five severities, %")
    return by_name(figure, 420)


def by_name(figure: go.Figure, height: int) -> go.Figure:
    """Finish a plot whose y axis has names."""
    figure.update_yaxes(automargin=True, ticksuffix=" ", type="category")
    return styled(figure, height=height)


def key(names: Sequence[str]) -> dict[str, str]:
    """Return the colour of each of several models in the plots."""
    return {name: colour_of(number) for number, name in enumerate(names)}


def colour_of(number: int) -> str:
    """Return a colour of the palette, which repeats."""
    return COLOURS[number % len(COLOURS)]


def series(
    rows: Sequence[Mapping[str, Any]], by: str, x: str, y: str, factor: float = 1.0
) -> dict[str, list[tuple[float, float]]]:
    """Return rows as curves: grouped by one entry, points of two others, y times `factor`."""
    return {
        str(name): [(row[x], factor * row[y]) for row in group]
        for name, group in groupby(rows, key=lambda row: row[by])
    }
