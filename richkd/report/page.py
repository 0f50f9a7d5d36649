"""Self-contained HTML pages from the templates in this folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs


def fill(template: str, **values: Any) -> str:
    """Render a template; all values are escaped."""
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
    """Return the figures that are not None as JSON for a script element, which draws them."""
    return {
        name: figure.to_json().replace("<", "\\u003c")
        for name, figure in figures.items()
        if figure is not None
    }
