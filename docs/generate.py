"""Generate the parts of the documentation that come from the code, as Markdown."""

from __future__ import annotations

import ast
import dataclasses
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from richkd.cli import app
from richkd.config import recipes
from richkd.config.settings import SECTIONS, describe
from richkd.core.validation import hints
from richkd.losses import EVERY, METHODS, describe_method


def write_all(folder: Path) -> None:
    """Write every part that changed, so that only its page is rebuilt."""
    folder.mkdir(exist_ok=True)
    for name, part in (
        ("settings", settings),
        ("methods", methods),
        ("recipes", recipe_table),
        ("commands", commands),
        ("examples", examples),
    ):
        text = "\n".join(part()) + "\n"
        file = folder / f"{name}.md"
        if not file.is_file() or file.read_text(encoding="utf-8") != text:
            file.write_text(text, encoding="utf-8")


def settings() -> Iterator[str]:
    """Yield tables of all keys of a recipe."""
    for section in ("train-teacher", "precompute", "distill", "sweep"):
        kind = SECTIONS[section]
        yield f"### `[{section}]`\n\n| key | type | default | meaning |\n|---|---|---|---|"
        for field in dataclasses.fields(kind):
            default = _default(field)
            what = _cell(describe(kind, field.name))
            yield f"| `{field.name}` | {_type(hints(kind)[field.name])} | {default} | {what} |"
        yield ""


def _default(field: dataclasses.Field[Any]) -> str:
    value = field.default
    if value is dataclasses.MISSING or value is None or value in ("", ()):
        return ""
    return f"`{list(value) if isinstance(value, tuple) else value}`".replace("'", '"')


def _type(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        named = (_type(one) for one in arguments if one is not type(None))
        return " or ".join(filter(None, named))
    if origin is typing.Annotated:
        return _type(arguments[0])
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" for value in arguments if value)
    if origin is tuple:
        return f"list of {_type(arguments[0])}"
    names = {str: "text", int: "integer", float: "number", bool: "true or false"}
    return names.get(origin or hint, "table")


def methods() -> Iterator[str]:
    """Yield a table of the distillation methods and their options."""
    yield "| method | description | matches | options and defaults |\n|---|---|---|---|"
    for name in sorted(METHODS):
        entry = describe_method(name)
        options = ", ".join(
            f"`{key}`" if value is None else f"`{key}={value}`"
            for key, value in entry["options"].items()
        )
        target = f"logits (`{entry['target']}`)" if entry["target"] else ""
        every = "logits of every teacher" if EVERY in entry["reads"] else ""
        features = "features" if any("features" in read for read in entry["reads"]) else ""
        matched = ", ".join(filter(None, (target, every, features)))
        yield f"| `{name}` | {_cell(entry['about'])} | {matched} | {options} |"


def recipe_table() -> Iterator[str]:
    """Yield a table of the packaged recipes."""
    yield "| recipe | description | last epoch | best epoch on the test images | unknown epoch |"
    yield "|---|---|---|---|---|"
    for path in sorted(recipes.packaged().glob("*.toml")):
        recipe = recipes.load(str(path))
        figures = (
            ", ".join(
                f"{name} {figure.top1:.2f}"
                for name, figure in recipe.published.items()
                if figure.epoch == epoch
            )
            for epoch in recipes.EPOCHS
        )
        yield f"| `{recipe.name}` | {_cell(recipe.about)} | {' | '.join(figures)} |"


def commands() -> Iterator[str]:
    """Yield the help of every command."""
    group: Any = typer.main.get_command(app)
    context = typer.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        yield f"## richkd {name}\n\n{_plain(command.help)}\n"
        examples = _plain(command.epilog).split("\n\n")[1:]
        yield "```console\n" + "\n".join(f"$ {example}" for example in examples) + "\n```\n"
        yield "| option | meaning |\n|---|---|"
        for parameter in command.params:
            if parameter.name == "help":
                continue
            flags = ", ".join(f"`{flag}`" for flag in (*parameter.opts, *parameter.secondary_opts))
            if parameter.param_type_name == "argument":
                flags = f"`{parameter.name.upper()}`"
            yield f"| {flags} | {_cell(_plain(parameter.help or ''))} |"
        yield ""


def examples() -> Iterator[str]:
    """Yield the example files, each under its docstring."""
    for path in sorted((Path(__file__).parent / "examples").glob("*.py")):
        source = path.read_text(encoding="utf-8")
        about = ast.get_docstring(ast.parse(source)) or path.stem
        title, _, rest = about.partition(": ")
        code = source.split('"""', 2)[2].strip()
        yield f"### {title}\n\n{rest[:1].upper()}{rest[1:]}\n\n```python\n{code}\n```\n"


def _plain(text: str) -> str:
    return text.replace("\\[", "[")


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*")
