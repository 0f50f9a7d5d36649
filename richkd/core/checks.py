"""Whether values from files are what type hints say: keys of recipes, entries of manifests."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from functools import cache
from typing import Any, Literal


@cache
def hints(of: type) -> dict[str, Any]:
    """The type hints of a dataclass or a TypedDict by name."""
    return typing.get_type_hints(of, include_extras=True)


def fits(value: object, hint: Any) -> bool:
    """Whether a value is what a hint says; an int is a float, a bool is no int."""
    return misfit(value, hint) is None


def misfit(value: object, hint: Any, place: str = "") -> str | None:
    """Where a value is not what a hint says and what is there instead; None where it fits."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    inner: list[str | None] = []
    if typing.is_typeddict(hint) and isinstance(value, Mapping):
        for name, wanted in hints(hint).items():
            at = f"{place}.{name}" if place else name
            if name in value:
                inner.append(misfit(value[name], wanted, at))
            elif typing.get_origin(wanted) is not typing.NotRequired:
                inner.append(f"{at} is missing")
    elif origin is typing.NotRequired:
        return misfit(value, arguments[0], place)
    elif origin in (typing.Union, types.UnionType):
        # of several, the last one's complaint is the one to hear: `| None` has none of its own
        found = [misfit(value, option, place) for option in arguments if option is not type(None)]
        inner = [] if (value is None and type(None) in arguments) or None in found else found[-1:]
    elif origin in (list, tuple) and isinstance(value, (list, tuple)):
        inner = [misfit(one, arguments[0], f"{place}[{n}]") for n, one in enumerate(value)]
    elif origin is dict and isinstance(value, Mapping):
        inner = [misfit(one, arguments[1], f"{place}.{name}") for name, one in value.items()]
    elif not _is(value, hint, arguments):
        return f"{place} is {value!r}"
    return next((complaint for complaint in inner if complaint is not None), None)


def _is(value: object, hint: Any, arguments: tuple[Any, ...]) -> bool:
    """Whether a value is of a type that has no parts."""
    if hint is Any:
        return True
    if typing.get_origin(hint) is Literal:
        return value in arguments or isinstance(value, str)  # who reads it names the choices
    if not isinstance(hint, type) or typing.is_typeddict(hint):
        return False
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, (int, float) if hint is float else hint)
