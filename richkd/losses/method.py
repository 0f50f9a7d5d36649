"""What a method is: named options, the cached arrays that it reads, and its loss terms.

A new method is a class in a file of its own: give it `options` (a frozen dataclass) and `reads`,
return its weighted terms from `forward`, and register it by name with `@register("name")`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from richkd.errors import RichKDError, nearest, unknown


@dataclass(frozen=True)
class Batch:
    """What a loss sees of a step: B samples, C classes, F features, f32."""

    logits: Tensor  # [B,C], the student's
    features: Tensor  # [B,F], the student's pooled ones
    labels: Tensor  # [B]
    index: Tensor  # [B], training sample ids
    rows: Mapping[str, Tensor] = field(default_factory=dict)  # cached arrays, rows of these samples


@dataclass(frozen=True, kw_only=True)
class Widths:
    """The sizes that a method's own modules depend on."""

    labels: Tensor  # [N], of all training samples
    student: int  # F of the student
    teacher: int  # F of the CNN teacher
    clip: int  # D, 0 without CLIP
    alpha: float  # of the blend


class Method(nn.Module):
    """A training objective. Its parameters are trained and saved with the student's."""

    Options: ClassVar[type[Any]]

    def __init__(self, options: Any, widths: Widths) -> None:
        super().__init__()
        self.options = options

    @classmethod
    def reads(cls, options: Any) -> tuple[str, ...]:
        """The cached arrays whose rows it wants (`teacher_logits`, `clip_features`, …)."""
        return ()

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The weighted loss terms by name, scalars; the loss is their sum."""
        raise NotImplementedError

    def update(self) -> None:
        """Called after the optimizer's step, for memory banks."""


METHODS: dict[str, tuple[type[Method], Mapping[str, Any]]] = {}


def register(name: str, **options: Any) -> Callable[[type[Method]], type[Method]]:
    """Make a method known by a name, with options other than the class's own defaults."""

    def add(method: type[Method]) -> type[Method]:
        if name in METHODS:
            raise ValueError(f"two methods are called {name!r}")
        METHODS[name] = (method, options)
        return method

    return add


def method_class(name: str, given: Mapping[str, Any]) -> tuple[type[Method], Any]:
    """A method's class and its resolved options.

    Raises:
        RichKDError: no such method, no such option, or a value out of range.
    """
    if name not in METHODS:
        raise unknown("method", name, METHODS)
    method, own = METHODS[name]
    fields = {f.name: f for f in dataclasses.fields(method.Options)}
    for key, value in given.items():
        if key not in fields:
            raise RichKDError(f"method {name} has no option {key!r}; {nearest(key, fields)}")
        whole = fields[key].type == "int"
        if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
            raise RichKDError(
                f"method {name}: {key} = {value!r} should be a {'whole ' * whole}number"
            )
        if not 0 <= value < float("inf"):
            raise RichKDError(f"method {name}: {key} = {value!r} should be finite and not negative")
    options = method.Options(**{**own, **given})
    for key in ("temperature", "crd_temperature", "negatives"):
        if getattr(options, key, 1) <= 0:
            raise RichKDError(f"method {name}: {key} = {getattr(options, key)!r} should be above 0")
    return method, options
