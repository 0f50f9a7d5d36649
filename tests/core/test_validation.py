"""The checker of values against type hints and their limits."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NotRequired, TypedDict

import numpy as np
import pytest

from richkd.core.validation import (
    CHOICE,
    RANGE,
    TYPE,
    Count,
    Positive,
    Share,
    find_fault,
    within,
    words,
)


class Inner(TypedDict):
    count: Count
    note: NotRequired[str]


class Outer(TypedDict):
    inner: Inner | None
    names: list[str]
    sizes: dict[str, int]


Scale = Positive | Literal["native", "raw"]
GOOD = {"inner": {"count": 1}, "names": ["a"], "sizes": {"x": 1}}


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        (3, int),
        (3, float),
        (np.int64(3), Count),
        (np.float32(0.5), Share),
        (True, bool),
        (None, Count | None),
        ("native", Scale),
        (2, Scale),
        ([1, 2], tuple[int, ...]),
        ((), list[str]),
        ({"anything": object()}, dict[str, Any]),
        (GOOD, Outer),
        ({**GOOD, "inner": None, "more": 1}, Outer),
    ],
)
def test_what_fits(value: object, hint: Any) -> None:
    assert find_fault(value, hint) is None


@pytest.mark.parametrize(
    ("value", "hint", "place", "code", "must"),
    [
        (True, int, "x", TYPE, "an integer"),
        (1, bool, "x", TYPE, "true or false"),
        ("1", float, "x", TYPE, "a number"),
        (0, Count, "x", RANGE, "at least 1"),
        (0, Count | None, "x", RANGE, "at least 1"),
        ("0", Count | None, "x", TYPE, "an integer"),
        (float("nan"), Share, "x", RANGE, "in [0, 1]"),
        (float("inf"), Positive, "x", RANGE, "above 0"),
        ("naive", Scale, "x", CHOICE, "a number, native or raw"),
        (-1.0, Scale, "x", RANGE, "above 0"),
        ([1], Scale, "x", TYPE, "a number, native or raw"),
        ([1, "a"], list[int], "x[1]", TYPE, "an integer"),
        ([0.5, 2.0], tuple[Annotated[float, within(0, 1)], ...], "x[1]", RANGE, "in [0, 1]"),
        ({**GOOD, "inner": {"count": 0}}, Outer, "x.inner.count", RANGE, "at least 1"),
        ({**GOOD, "inner": {"count": 1, "note": 2}}, Outer, "x.inner.note", TYPE, "text"),
        ({**GOOD, "inner": {}}, Outer, "x.inner.count", TYPE, "an integer"),
        ({**GOOD, "sizes": {"y": "1"}}, Outer, "x.sizes.y", TYPE, "an integer"),
        ({"inner": None, "names": []}, Outer, "x.sizes", TYPE, "a table"),
        ([], Outer, "x", TYPE, "a table"),
    ],
)
def test_what_does_not_fit(value: object, hint: Any, place: str, code: str, must: str) -> None:
    fault = find_fault(value, hint, "x")
    assert fault is not None
    assert (fault.place, fault.code, fault.must) == (place, code, must)
    assert str(fault).startswith(f"{place} is ")
    error = fault.error("here: ")
    assert error.code == code and str(error).startswith(f"here: {place} ")


def test_a_default_of_empty_text_is_not_shown_among_the_choices() -> None:
    assert words(Literal["a", "b"] | Literal[""]) == "a or b"
    assert words(list[int]) == "a list, each an integer"
