"""Make CLI flags from the fields of the settings.

The type of a setting determines its syntax: lists are separated by commas, tables are NAME=VALUE,
and a value that may be a number or a word is read as a number if possible. A field with `read` is
read by that function instead.
"""

from __future__ import annotations

import tomllib
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from inspect import Parameter
from typing import Annotated, Any, Literal

import typer
from typer.core import HAS_RICH

from richkd.config.catalog import at_home
from richkd.core.errors import RichKDError
from richkd.core.validation import hints

LAST = ("device", "precision", "step")  # where and how a command runs: shown last


@dataclass(frozen=True)
class Flag:
    """A setting as a CLI flag."""

    parameter: Parameter  # of the command, for typer; its default is None
    read: Callable[[Any], Any]  # converts what typer gives into the setting


def flags(settings: type, names: str = "", *, others: bool = True, without: str = "") -> list[Flag]:
    """Return the flags of a command that takes settings.

    Args:
        settings: a dataclass of settings.
        names: the fields that come first, in this order, separated by spaces.
        others: include the other fields too, in their own order.
        without: fields to leave out, separated by spaces.
    """
    first, left_out = names.split(), {*names.split(), *without.split()}
    rest = [name for name in hints(settings) if name not in left_out] if others else []
    return [_flag(settings, name) for name in [*first, *sorted(rest, key=LAST.__contains__)]]


def option(settings: type, name: str) -> Any:
    """Return typer's option for one setting."""
    metadata = settings.__dataclass_fields__[name].metadata  # type: ignore[attr-defined]
    declared = [metadata["flag"]] if metadata["flag"] else []
    callback = expand_home if metadata["path"] else None
    return typer.Option(
        *declared, help=plain(metadata["help"]), show_default=False, callback=callback
    )


def expand_home(value: Any) -> Any:
    """Expand `~` in one path or several; the shell leaves it in --out=~/runs."""
    return [*map(at_home, value)] if isinstance(value, list) else value and at_home(value)


def plain(text: str) -> str:
    """Escape text that rich, if installed, would read as markup."""
    return text.replace("[", "\\[") if HAS_RICH else text


def _flag(settings: type, name: str) -> Flag:
    metadata = settings.__dataclass_fields__[name].metadata  # type: ignore[attr-defined]
    kind, read = _typed(hints(settings)[name], metadata["flag"] or f"--{name.replace('_', '-')}")
    if metadata["read"]:
        kind, read = str, metadata["read"]
    annotation = Annotated[kind | None, option(settings, name)]  # type: ignore[valid-type]
    parameter = Parameter(name, Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
    return Flag(parameter, read)


def _typed(hint: Any, flag: str) -> tuple[Any, Callable[[Any], Any]]:
    """Return the type that typer reads for a setting, and the function that converts it."""
    kinds = {typing.get_origin(kind) or kind: kind for kind in _alternatives(hint)}
    if dict in kinds:
        return list[str], lambda texts: _assignments(flag, texts)
    if tuple in kinds:
        element = next(_alternatives(typing.get_args(kinds[tuple])[0]))
        return str, (lambda text: _numbers(flag, text, element)) if element in _WORDS else _names
    if len(kinds) == 1 and str not in kinds and Literal not in kinds:
        return next(iter(kinds)), _as_it_is
    number = next((kind for kind in kinds if kind in _WORDS), None)
    return str, _as_it_is if number is None else lambda text: _number_or_word(text, number)


def _alternatives(hint: Any) -> Iterator[Any]:
    """Yield the types that a hint allows, without limits and None."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        yield from _alternatives(arguments[0])
    elif origin in (typing.Union, types.UnionType):
        for option in arguments:
            yield from _alternatives(option)
    elif hint is not type(None):
        yield hint


_WORDS: dict[Any, str] = {
    int: "integers separated by commas, e.g. 1,2,5",
    float: "numbers separated by commas, e.g. 0.5,0.5,0.5",
}


_EXAMPLES = {
    "--set": "temperature=4",
    "--student-set": "patch_size=4",
    "--optimizer-set": "eps=1e-6",
}


def _as_it_is(value: Any) -> Any:
    return value


def _names(text: str) -> tuple[str, ...]:
    return tuple(filter(None, (part.strip() for part in text.split(","))))


def _numbers(flag: str, text: str, kind: Callable[[str], Any]) -> tuple[Any, ...]:
    try:
        return tuple(map(kind, text.split(",")))
    except ValueError:
        raise RichKDError(
            f"{flag} {text!r}: must be {_WORDS[kind]}", code="value-malformed"
        ) from None


def _number_or_word(text: str, kind: Callable[[str], Any]) -> Any:
    try:
        return kind(text)
    except ValueError:
        return text


def _assignments(flag: str, texts: list[str]) -> dict[str, Any]:
    """Read NAME=VALUE, the value as in TOML; text needs no quotes."""
    values: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name or not value:
            raise RichKDError(
                f"{flag} {text!r}: must be NAME=VALUE, e.g. {flag} {_EXAMPLES[flag]}",
                code="value-malformed",
            )
        try:
            values[name] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            values[name] = value
    return values
