"""What a training learns from, as recipe.toml records it: two trainings are compared by its fields.

Earlier versions recorded a sentence in place of a table; it is read into the same fields.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, ClassVar, Self

from richkd.core.validation import find_fault, hints
from richkd.data.datasets import Dataset
from richkd.data.framing import NetworkInput
from richkd.store.reader import TeacherCache
from richkd.store.schema import student_input, teacher_input

DIGITS = 16  # of a fingerprint or SHA-256
NUMBERS = {"views", "view_seed", "alpha", "scale", "keep", "keep_temperature", "classes"}


@dataclass(frozen=True, kw_only=True)
class Identity:
    """The base of both identities: fields of plain values, None for those that do not apply."""

    SENTENCE: ClassVar[re.Pattern[str]]  # of earlier versions, with a group for each field

    initial: str | None = None  # of the SHA-256 of the weights that the network starts from

    @classmethod
    def read(cls, recorded: object) -> Self:
        """Read what recipe.toml holds: a table, or the sentence of an earlier version.

        Raises:
            ValueError: it is neither.
        """
        if isinstance(recorded, str) and (found := cls.SENTENCE.fullmatch(recorded)):
            return cls(**{name: _value(name, text) for name, text in found.groupdict().items()})
        if isinstance(recorded, dict):
            try:
                identity = cls(**recorded)
            except TypeError:  # a field is missing, or is not one of ours
                raise ValueError(f"{recorded!r} does not identify what was trained on") from None
            for each in fields(cls):
                fault = find_fault(getattr(identity, each.name), hints(cls)[each.name], each.name)
                if fault is not None:
                    raise ValueError(fault)
            return identity
        raise ValueError(f"{recorded!r} does not identify what was trained on")

    @property
    def source(self) -> Self:
        """The identity of what is learned from, whatever weights the network starts from."""
        return replace(self, initial=None)

    @property
    def table(self) -> dict[str, Any]:
        """The fields that apply, for recipe.toml."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def difference(self, now: Identity) -> str:
        """Name the fields in which another identity differs, each with both values."""
        was, other = asdict(self), asdict(now)
        return ", ".join(
            f"{name} was {was[name]!r} and is now {other[name]!r}"
            for name in (each.name for each in fields(self) if each.compare)
            if was[name] != other[name]
        )


@dataclass(frozen=True, kw_only=True)
class RunIdentity(Identity):
    """What a student is trained on: a dataset, its teachers, and the cached views."""

    SENTENCE = re.compile(
        r"(?P<dataset>\w*), (?P<teacher>\w*), (?P<clip>\w*), "
        r"(?P<views>\d+) views of seed (?P<view_seed>\d+), "
        r"alpha (?P<alpha>\S+) scale (?P<scale>\S+) (?P<dtype>\w+)"
        r"(, the teacher sees (?P<teacher_input>.+?))?"
        r"(, top (?P<keep>\d+) at (?P<keep_temperature>\S+))?"
    )

    dataset: str  # the first digits of its fingerprint
    teacher: str  # of the SHA-256 of its weights
    clip: str  # likewise, or none
    views: int
    view_seed: int
    alpha: float
    scale: float | str
    dtype: str
    teacher_input: str | None = None  # where the teacher takes other images than the student
    keep: int | None = None  # logits of a row
    keep_temperature: float | None = None
    augment: str | None = None  # what views are besides a crop and flip
    pixels: int | None = None  # the shorter side of the photographs that the cache keeps
    blend: str | None = None  # "computed" where the cache does not keep its fused logits
    added: dict[str, str] | None = None  # of the added teachers that the run reads, like `teacher`

    @property
    def of_cache(self) -> Self:
        """The part that all runs from a cache share."""
        return replace(self.source, added=None)

    @classmethod
    def of(cls, cache: TeacherCache, added: Sequence[str] = ()) -> Self:
        """Return the identity of the runs that are trained from a cache.

        Args:
            cache: the cache.
            added: the added teachers that they read.
        """
        manifest = cache.manifest
        clip, views, seen = manifest["clip"], manifest["views"], teacher_input(manifest)
        temperature = manifest["keep_temperature"] if "keep" in manifest else None
        computed = clip is not None and not cache.has("train/fused_logits")
        return cls(
            dataset=manifest["dataset"]["fingerprint"][:DIGITS],
            teacher=manifest["teacher"]["sha256"][:DIGITS],
            clip=clip["sha256"][:DIGITS] if clip else "none",
            views=views["count"],
            view_seed=views["seed"],
            augment=views.get("augment"),
            alpha=manifest["alpha"],
            scale=manifest["scale"],
            dtype=manifest["dtype"],
            teacher_input=None
            if seen == student_input(manifest)
            else describe_input(NetworkInput.of(seen)),
            keep=manifest.get("keep"),
            keep_temperature=None if temperature is None else float(f"{temperature:g}"),
            pixels=manifest["pixels"]["side"] if "pixels" in manifest else None,
            blend="computed" if computed else None,
            added={name: _sha256(cache.addition(name))[:DIGITS] for name in added} or None,
        )


def _sha256(group: TeacherCache) -> str:
    """Return the SHA-256 of an added teacher's weights."""
    clip = group.manifest["clip"]
    return group.manifest["teacher"]["sha256"] if clip is None else clip["sha256"]


@dataclass(frozen=True, kw_only=True)
class TeacherIdentity(Identity):
    """What a teacher is trained on: the images of a dataset, as the network takes them."""

    SENTENCE = re.compile(r"(?P<dataset>\w*), (?P<classes>\d+) classes, images of (?P<input>.+)")

    dataset: str
    classes: int
    input: str
    # Mean and standard deviation, which `input` rounds, to resume without the initial weights.
    constants: list[list[float]] | None = field(default=None, compare=False)

    @classmethod
    def of(cls, dataset: Dataset, initial: str | None = None) -> Self:
        """Return the identity of the teachers that are trained on a dataset.

        Args:
            dataset: the dataset.
            initial: which weights the network starts from; None for random ones.
        """
        return cls(
            initial=initial,
            dataset=dataset.fingerprint[:DIGITS],
            classes=len(dataset.class_names),
            input=describe_input(dataset.network_input),
            constants=None if initial is None else [[*dataset.mean], [*dataset.std]],
        )


def describe_input(seen: NetworkInput) -> str:
    """Describe a network's input; recipe.toml records the text, so it must stay as it is."""
    mean, std = (",".join(f"{number:g}" for number in each) for each in (seen.mean, seen.std))
    return (
        f"{seen.size}×{seen.size}, crop {100 * seen.crop:g} %, {seen.interpolation}, mean {mean}, "
        f"std {std}"
    )


def _value(name: str, text: str | None) -> Any:
    """Read a field of a sentence; hexadecimal digits stay text, whatever they look like."""
    if text is None or name not in NUMBERS or text in ("native", "raw"):
        return text
    return int(text) if text.isdecimal() else float(text)
