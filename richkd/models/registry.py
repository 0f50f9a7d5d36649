"""The networks of richkd's own by name, and timm, which takes about a second to import."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

from torch import nn

Constructor = TypeVar("Constructor", bound=Callable[..., nn.Module])

CONSTRUCTORS: dict[str, Callable[..., nn.Module]] = {}


def register_model(constructor: Constructor) -> Constructor:
    """Decorator: have a network found by its constructor's name, as timm's of that name does."""
    CONSTRUCTORS[constructor.__name__] = constructor
    return constructor


@cache
def import_timm() -> Any:
    """The module timm, which knows the networks registered here as well.

    Only where a network of timm's own may be meant: without it, a command starts sooner.
    """
    import timm

    for constructor in CONSTRUCTORS.values():
        timm.models.register_model(constructor)
    return timm
