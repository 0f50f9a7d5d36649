"""Read recipes: TOML files with the settings of every stage."""

from __future__ import annotations

import os
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from richkd.config.settings import SECTIONS, check_table
from richkd.core.errors import RichKDError, nearest, unknown
from richkd.core.text_files import read_text
from richkd.core.validation import within

Epoch = Literal["last", "best", "unknown"]  # the epoch that a published figure refers to
EPOCHS = get_args(Epoch)


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A published figure."""

    top1: Annotated[float, within(0, 100)]  # in %
    epoch: Epoch = "unknown"  # best was chosen on the test split
    source: str = ""


@dataclass(frozen=True)
class Recipe:
    """A recipe file: its settings by command, its description and published figures."""

    name: str
    about: str
    published: dict[str, Figure]  # of the teacher, or by method
    tables: dict[str, dict[str, Any]]

    def table(self, command: str) -> dict[str, Any]:
        """Return the settings of a command; empty if the recipe has none."""
        return self.tables.get(command, {})


def load(path_or_name: str) -> Recipe:
    """Read a recipe by its path, or a packaged one by its name, and check every key and value.

    Raises:
        RichKDError: no such recipe, invalid TOML, an unknown table or key, or a bad value.
    """
    path = _find(path_or_name)
    try:
        content = tomllib.loads(read_text(path))
    except (OSError, ValueError) as error:  # TOML errors are ValueErrors
        raise RichKDError(f"cannot read recipe {path}: {error}", code="recipe-unreadable") from None
    about, published = content.pop("about", ""), content.pop("published", {})
    if not isinstance(about, str):
        raise RichKDError(f"recipe {path}: about = {about!r}: must be text", code="recipe-value")
    if not isinstance(published, dict):
        raise RichKDError(
            f"recipe {path}: [published] must be a table of figures", code="recipe-value"
        )
    figures = {
        name: _read_figure(value, f"recipe {path} [published]: {name}")
        for name, value in published.items()
    }
    for section, values in content.items():
        if section not in SECTIONS or not isinstance(values, dict):
            raise unknown(f"table in recipe {path}:", section, ["about", "published", *SECTIONS])
        check_table(values, SECTIONS[section], f"recipe {path} [{section}]")
    return Recipe(path.stem, about, figures, content)


def packaged() -> Path:
    """Return the folder of the packaged recipes."""
    installed = Path(__file__).parents[1] / "pipelines"
    return installed if installed.is_dir() else Path(__file__).parents[2] / "pipelines"


def _read_figure(value: object, where: str) -> Figure:
    """Return a published figure of a recipe, given as a table or as a number.

    Raises:
        RichKDError: neither, or an entry that is missing, unknown or out of range.
    """
    table: dict[str, Any] = value if isinstance(value, dict) else {"top1": value}
    check_table(table, Figure, where)
    if "top1" not in table:
        raise RichKDError(f"{where}: top1 is missing; add it", code="recipe-value")
    return Figure(**table)


def _find(path_or_name: str) -> Path:
    path = Path(path_or_name)
    if path.is_file():
        return path
    own = {recipe.stem: recipe for recipe in packaged().glob("*.toml")}
    if os.sep not in path_or_name and path.stem in own:
        return own[path.stem]
    raise RichKDError(
        f"no recipe {path_or_name!r}: neither a file nor a packaged recipe; "
        f"{nearest(path.stem, own)}",
        code="recipe-missing",
    )
