"""Sphinx configuration: pages in Markdown, the API from docstrings, settings from the code."""

import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml

sys.path.insert(0, str(Path(__file__).parent))
import generate

project = "richkd"
author = "the richkd authors"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build", "generated"]
html_theme = "furo"
html_title = "richkd"
html_show_copyright = False
html_static_path = ["style.css"]
html_css_files = ["style.css"]
html_extra_path = ["two-stages.svg"]
html_theme_options = {"source_edit_link": None, "footer_icons": []}
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
default_role = "code"
smartquotes = False
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
napoleon_google_docstring, napoleon_numpy_docstring = True, False
linkcheck_timeout = 20


def setup(app: Any) -> None:
    """Generate pages from the code and render equations as MathML, without scripts or network."""
    app.connect("builder-inited", lambda _: generate.write_all(Path(__file__).parent / "generated"))
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))


html_math_renderer = "mathml"


def _inline(writer: Any, node: nodes.Node) -> None:
    writer.body.append(tex2mathml(node.astext()))
    raise nodes.SkipNode


def _block(writer: Any, node: nodes.Node) -> None:
    equation = tex2mathml(node.astext(), as_block=True)
    writer.body.append(f'<div class="equation">{equation}</div>')
    raise nodes.SkipNode
