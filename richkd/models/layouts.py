"""Name the network that weights belong to, if they do not fit the one that they were given for."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from richkd.core.errors import RichKDError
from richkd.models import ZOO, create_model
from richkd.models.candidates import Candidate, find_candidates

_CLASSES = 9973  # a width that no layer has, so that it marks a classifier's entries
_NEAR = 0.1  # share of a network's entries
# networks of timm, and of torchvision, that files without a name are often of
_COMMON = tuple(f"timm/resnet{depth}" for depth in (18, 34, 50, 101))
# where trainers record the network's name
_TABLES = ("args", "opt", "hyper_parameters", "hparams", "config", "cfg")
_NAMES = ("arch", "model", "model_name", "architecture", "network", "net")


@dataclass(frozen=True)
class _Fit:
    """How the weights in a file differ from those of a network."""

    name: str
    classes: int | None  # that its classifier has in the file
    differing: list[str]  # names of entries
    entries: int  # of the network


def describe_layout(name: str, content: Mapping[str, Any], note: Mapping[str, str]) -> str:
    """Return which network the weights in a file belong to, for a message; empty if unknown.

    The network that the file names, those of the zoo and some others are compared with it.

    Args:
        name: the network that they do not fit.
        content: the content of the file.
        note: its metadata, if it is a safetensors file.
    """
    named = [other for other in dict.fromkeys(_named(content, note)) if other != name]
    nearest: _Fit | None = None
    for other in (*named, *(each for each in (*ZOO, *_COMMON) if each not in (name, *named))):
        fit = _fit(other, content)
        if fit is not None and not fit.differing:
            return f"it has the keys of {other} with {fit.classes} classes"
        if fit is not None and (nearest is None or len(fit.differing) < len(nearest.differing)):
            nearest = fit
    if nearest is not None and len(nearest.differing) <= _NEAR * nearest.entries:
        more = f" and {len(nearest.differing) - 1} more" if len(nearest.differing) > 1 else ""
        return f"it has the keys of {nearest.name} but for {nearest.differing[0]!r}{more}"
    return f"it names {named[0]} as its network" if named else ""


def _named(content: Mapping[str, Any], note: Mapping[str, str]) -> Iterator[str]:
    """Yield the names of networks that a file gives."""
    inside = [content.get(key) for key in _TABLES]
    for table in (content, note, *(getattr(each, "__dict__", each) for each in inside)):
        if isinstance(table, Mapping):
            found = (table.get(key) for key in _NAMES)
            yield from (
                name
                for name in found
                if isinstance(name, str) and re.fullmatch(r"(timm/)?[\w.-]{1,100}", name)
            )


def _fit(name: str, content: Mapping[str, Any]) -> _Fit | None:
    """Compare a network with the weights in a file; None if there is no such network."""
    with suppress(RichKDError):
        own = _blank(name)
        fits = [_compare(name, own, one) for one in find_candidates(own, content)]
        return min(fits, key=lambda fit: len(fit.differing), default=None)
    return None


@lru_cache(64)
def _blank(name: str) -> dict[str, Tensor]:
    """Return a network's state dict without values."""
    with torch.device("meta"):
        return create_model(name, _CLASSES).state_dict()


def _compare(name: str, own: Mapping[str, Tensor], found: Candidate) -> _Fit:
    classes, differing = Counter[int](), [*found.missing, *found.extra]
    for key, tensor in own.items():
        theirs, ours = found.tensors.get(key, tensor).shape, tensor.shape
        if ours[:1] == (_CLASSES,) and len(theirs) > 0:
            classes[theirs[0]] += 1
            theirs, ours = theirs[1:], ours[1:]
        if theirs != ours:
            differing.append(key)
    number = max(classes, key=classes.__getitem__, default=None)
    return _Fit(name, number, sorted(differing), len(own))
