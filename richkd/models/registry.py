"""The registry of richkd's own networks, and timm, which takes about a second to import."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

from torch import nn

Constructor = TypeVar("Constructor", bound=Callable[..., nn.Module])

CONSTRUCTORS: dict[str, Callable[..., nn.Module]] = {}


def register_model(constructor: Constructor) -> Constructor:
    """Register a network under its constructor's name, like timm's decorator of this name."""
    CONSTRUCTORS[constructor.__name__] = constructor
    return constructor


@cache
def import_timm() -> Any:
    """Import timm and register our networks with it.

    Call it only if one of timm's own networks may be meant; commands start faster without it.
    """
    import timm

    for constructor in CONSTRUCTORS.values():
        timm.models.register_model(constructor)
    return timm
