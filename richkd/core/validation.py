"""Check values against type hints and the limits declared in them.

A limit is declared with the type: `Annotated[int, at_least(1)]`. Settings, CLI flags, keys of
recipes, options of methods and manifests are all checked here.

(msgspec does the same with `Meta`, but adds 11 to 24 ms to `--help`, does not check objects built
in Python, turns integers into floats, and its messages name neither the value nor the choices.)
"""

from __future__ import annotations

import math
import numbers
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal

from richkd.core.errors import RichKDError

TYPE, RANGE, CHOICE = "setting-type", "value-out-of-range", "unknown-name"  # error codes
_MISSING = object()


@dataclass(frozen=True)
class Limit:
    """A condition on a value besides its type."""

    must: str  # what the value must be, in words
    holds: Callable[[Any], bool]


def at_least(low: float) -> Limit:
    """Return the limit `low <= value`."""
    return Limit(f"at least {low}", lambda value: low <= value)


def above(low: float) -> Limit:
    """Return the limit `low < value`, value finite."""
    return Limit(f"above {low}", lambda value: low < value < math.inf)


def within(low: float, high: float) -> Limit:
    """Return the limit `low <= value <= high`."""
    return Limit(f"in [{low}, {high}]", lambda value: low <= value <= high)


def from_to_below(low: float, high: float) -> Limit:
    """Return the limit `low <= value < high`."""
    return Limit(f"in [{low}, {high})", lambda value: low <= value < high)


Count = Annotated[int, at_least(1)]
Share = Annotated[float, within(0, 1)]
Positive = Annotated[float, above(0)]
NotNegative = Annotated[float, Limit("finite and at least 0", lambda value: 0 <= value < math.inf)]


@dataclass(frozen=True)
class Fault:
    """Why a value does not fit its type hint."""

    place: str  # e.g. views.count, or prompts[1]
    value: object
    must: str  # what it must be, in words
    code: str

    def __str__(self) -> str:
        return self._message("is")

    def error(self, where: str = "", code: str | None = None) -> RichKDError:
        """Return the error for the user."""
        return RichKDError(f"{where}{self._message('=')}", code=code or self.code)

    def _message(self, verb: str) -> str:
        if self.value is _MISSING:
            return f"{self.place} is missing"
        return f"{self.place} {verb} {self.value!r}: must be {self.must}"


def find_fault(value: object, hint: Any, place: str = "") -> Fault | None:
    """Return the first fault of a value, or None if it fits its hint.

    An int fits float, a list fits tuple, a bool does not fit int. A TypedDict may have more keys.

    Args:
        value: of any type.
        hint: a type, Literal, union, list, tuple, dict, TypedDict, or Annotated with limits.
        place: the name of the value, for the message.
    """
    return next(_faults(value, hint, place), None)


def check(value: object, hint: Any, name: str, where: str = "", code: str | None = None) -> None:
    """Raise RichKDError if a value does not fit its hint.

    Args:
        value: of any type.
        hint: as in `find_fault`.
        name: the name of the value.
        where: a prefix of the message, e.g. the recipe it was read from.
        code: replaces the fault's own error code.
    """
    fault = find_fault(value, hint, name)
    if fault is not None:
        raise fault.error(where, code)


def hints(of: type) -> dict[str, Any]:
    """Return the type hints of a dataclass or a TypedDict by name, with their limits."""
    return _hints(of)


@cache
def _hints(of: Any) -> dict[str, Any]:  # mypy holds no type[...] to be hashable
    return typing.get_type_hints(of, include_extras=True)


def _faults(value: object, hint: Any, place: str) -> Iterator[Fault]:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if value is _MISSING:
        if origin is not typing.NotRequired:
            yield Fault(place, value, words(hint), TYPE)
    elif origin is typing.NotRequired:
        yield from _faults(value, arguments[0], place)
    elif origin is Annotated:
        yield from _faults(value, arguments[0], place)
        for limit in arguments[1:]:  # only reached if the type is right: see `find_fault`
            if isinstance(limit, Limit) and not limit.holds(value):
                yield Fault(place, value, limit.must, RANGE)
    elif origin in (typing.Union, types.UnionType):
        yield from _faults_of_union(value, hint, place)
    elif origin is Literal:
        if value not in arguments:
            yield Fault(place, value, words(hint), CHOICE if isinstance(value, str) else TYPE)
    elif (parts := _parts(value, hint, place)) is not None:
        for part in parts:
            yield from _faults(*part)
    elif not _is(value, hint):
        yield Fault(place, value, words(hint), TYPE)


def _parts(value: object, hint: Any, place: str) -> Iterator[tuple[object, Any, str]] | None:
    """Return the parts of a list or a table with their hints and places; None for other values."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (list, tuple) and isinstance(value, (list, tuple)):
        return ((one, arguments[0], f"{place}[{number}]") for number, one in enumerate(value))
    if not isinstance(value, Mapping):
        return None
    prefix = f"{place}." if place else ""
    if typing.is_typeddict(hint):
        known = hints(hint).items()
        return ((value.get(name, _MISSING), wanted, f"{prefix}{name}") for name, wanted in known)
    if origin is dict:
        return ((one, arguments[1], f"{prefix}{name}") for name, one in value.items())
    return None


def _faults_of_union(value: object, hint: Any, place: str) -> Iterator[Fault]:
    options = typing.get_args(hint)
    if value is None and type(None) in options:
        return
    found = [find_fault(value, option, place) for option in options if option is not type(None)]
    if None in found:
        return
    for fault in found:
        # the value has this option's type, so only its own fault is relevant
        if fault is not None and (fault.code == RANGE or fault.place != place):
            yield fault
            return
    chosen = any(fault is not None and fault.code == CHOICE for fault in found)
    yield Fault(place, value, words(hint), CHOICE if chosen else TYPE)


def _is(value: object, hint: Any) -> bool:
    """Return whether a value is of a type that has no parts."""
    if hint is Any:
        return True
    if not isinstance(hint, type) or typing.is_typeddict(hint):
        return False
    if isinstance(value, bool):
        return hint is bool
    abstract = {int: numbers.Integral, float: numbers.Real}  # includes NumPy's numbers
    return isinstance(value, abstract.get(hint, hint))


WORDS = {int: "an integer", float: "a number", str: "text", bool: "true or false"}


def words(hint: Any) -> str:
    """Return what a hint allows, in words: "a number, native or raw"."""
    *most, last = dict.fromkeys(_words(hint)) or [""]
    return f"{', '.join(most)} or {last}" if most else last


def _words(hint: Any) -> Iterator[str]:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        yield from _words(arguments[0])
    elif origin in (typing.Union, types.UnionType):
        for option in arguments:
            if option is not type(None):
                yield from _words(option)
    elif origin is Literal:
        yield from (str(choice) for choice in arguments if choice != "")
    elif origin in (list, tuple):
        yield f"a list, each {words(arguments[0])}"
    else:
        yield WORDS.get(hint, "a table")
