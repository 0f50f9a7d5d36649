"""Pages: one HTML file with everything in it, from the templates beside this module."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs


def fill(template: str, **values: Any) -> str:
    """A whole page from a template's name; every name in it is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template(f"{template}.html.jinja")
    return page.render(plotly=get_plotlyjs(), **values)


def as_json(figures: Mapping[str, go.Figure | None]) -> dict[str, str]:
    """Figures that there are, to stand in a script element; the page draws them."""
    return {
        name: figure.to_json().replace("<", "\\u003c")
        for name, figure in figures.items()
        if figure is not None
    }
