"""The base class of methods: options, the cached arrays that it reads, and its loss terms.

To add a method, write a class in a new file: define `Options` and `reads`, return the weighted
terms from `forward`, and register it with `@register("name")`. CONTRIBUTING.md has an example.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from richkd.core.errors import RichKDError, nearest, unknown
from richkd.core.validation import NotNegative, check, hints

TARGET = "target_logits"  # of the teacher, CLIP or both fused, as the user chooses
EVERY = "every_teacher"  # the logits of every teacher, each as it gave them
PARTNER, SHARE = "partner_label", "share"  # rows of mixed views, besides those that are read


@dataclass(frozen=True)
class Batch:
    """The inputs of a loss for one step: B samples, C classes, F features; f32."""

    logits: Tensor  # [B,C], of the student
    features: Tensor  # [B,F], pooled features of the student
    labels: Tensor  # [B]
    index: Tensor  # [B], indices of the training samples
    rows: Mapping[str, Tensor] = field(
        default_factory=dict
    )  # the arrays named by `reads`, for these samples
    epoch: int | Tensor = 1  # from 1; during training a float64 scalar on the device
    partner: Tensor | None = None  # [B], the labels of the images that are mixed in, if any are
    share: Tensor | None = None  # [B], λ of the images that `labels` belong to


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a method is built for: the training labels, the widths of the features, and the blend.

    F is the width of a network's pooled features, D of CLIP's image embeddings. Teachers are named
    `cnn`, `clip`, or as they were added.
    """

    labels: Tensor  # [N], of all training samples
    student_dim: int  # F of the student
    teacher_dim: int  # F of the CNN teacher
    clip_dim: int  # D, 0 without CLIP
    alpha: float  # weight of the CNN teacher in the fused target
    teachers: tuple[str, ...] = ()  # whose rows `NAME/logits` [B,C] EVERY stands for
    others: Mapping[str, int] = field(default_factory=dict)  # F_k of added teachers
    weights: Mapping[str, float] = field(default_factory=dict)  # by teacher; empty: α alone
    label_smoothing: float = 0.0  # share of a label that is spread over all classes
    mixed: bool = False  # images are mixed, and so of two classes


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of every method: the weight of the cross-entropy with the labels."""

    ce_weight: NotNegative = 1.0

    def __post_init__(self) -> None:
        check_options(type(self), vars(self), "options")


def check_options(kind: type[Any], given: Mapping[str, Any], where: str) -> None:
    """Raise RichKDError if a method has no such option, or a value is of a wrong type or range.

    Args:
        kind: the method's dataclass of options.
        given: options by name.
        where: whose options they are, for the message.
    """
    known = hints(kind)
    for key, value in given.items():
        if key not in known:
            raise RichKDError(
                f"{where} has no option {key!r}; {nearest(key, known)}", code="unknown-option"
            )
        check(value, known[key], key, f"{where}: ", code="option-out-of-range")


MEASURED_VIEWS = (8, 16, 32, 64, 162)


@dataclass(frozen=True, kw_only=True)
class FewViews:
    """The accuracy lost by caching few views of an image, as measured by benchmarks/views.py.

    `points` holds a number of views if its 95 % interval lies below that of an online teacher.
    """

    measured_with: str  # method
    points: Mapping[int, float]  # of top-1 lost, by number of views

    @property
    def enough(self) -> int:
        """The least number of views from which on nothing is measurably lost."""
        return next(count for count in MEASURED_VIEWS if count > max(self.points))

    def cost(self, count: int) -> str:
        """Describe the cost of so many views, by the next larger number measured."""
        at = min((each for each in self.points if each >= count), default=max(self.points))
        fewer = ", and fewer cost more" if count < min(self.points) else ""
        return (
            f"in 120 epochs of Fashion-MNIST, {at} views cost {self.measured_with} "
            f"{self.points[at]:.1f} points{fewer}"
        )


class Method(nn.Module):
    """A training objective. Its parameters are trained and saved with the student's."""

    Options: ClassVar[type[Any]] = Options
    target: ClassVar[str] = "teacher"  # whose logits it takes by default
    few_views: ClassVar[FewViews] = FewViews(measured_with="kd", points={8: 0.49})
    needs_one_label: ClassVar[bool] = False  # and so takes no mixed images

    def __init__(self, options: Any, task: Task) -> None:
        super().__init__()
        self.options = options
        self.label_smoothing = task.label_smoothing

    @classmethod
    def reads(cls, options: Any) -> tuple[str, ...]:
        """Return the names of the arrays it needs.

        These are TARGET, EVERY, teacher_features and clip_features.
        """
        return ()

    @classmethod
    def row_names(cls, options: Any, task: Task) -> tuple[str, ...]:
        """Return the keys of the rows of a batch that it uses: `reads`, resolved for a task."""
        reads = cls.reads(options)
        every = [f"{name}/logits" for name in task.teachers] if EVERY in reads else []
        return (*(name for name in reads if name != EVERY), *every)

    @classmethod
    def needs_whole_rows(cls, options: Any) -> bool:
        """Return whether it needs all logits of a row, not only the largest ones."""
        return getattr(options, "standardize", False)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return the weighted loss terms by name, scalars; the loss is their sum."""
        raise NotImplementedError

    def label_term(self, batch: Batch) -> Tensor:
        """Return the weighted cross-entropy with the labels, f32.

        Of mixed images it is λ·CE(own) + (1 − λ)·CE(partner), as in mixup (arXiv 1710.09412) and
        CutMix (arXiv 1905.04899).
        """
        weight: float = self.options.ce_weight
        loss = partial(F.cross_entropy, batch.logits.float(), label_smoothing=self.label_smoothing)
        if batch.partner is None or batch.share is None:
            return weight * loss(batch.labels)
        own, other = (loss(each, reduction="none") for each in (batch.labels, batch.partner))
        return weight * torch.lerp(other, own, batch.share).mean()

    def update(self) -> None:
        """Update memory banks; called after the step of the optimizer."""


def mixing(rows: Mapping[str, Tensor]) -> tuple[Tensor | None, Tensor | None]:
    """Return `partner` and `share` of a batch, from its rows; None if its images are not mixed."""
    if PARTNER not in rows:
        return None, None
    return rows[PARTNER].long(), rows[SHARE]


METHODS: dict[str, tuple[type[Method], Mapping[str, Any]]] = {}


def register(name: str, **options: Any) -> Callable[[type[Method]], type[Method]]:
    """Register a method by name, with options that override the defaults of its class."""

    def add(method: type[Method]) -> type[Method]:
        if name in METHODS:
            raise ValueError(f"two methods are named {name!r}")
        METHODS[name] = (method, options)
        return method

    return add


def method_class(name: str, given: Mapping[str, Any]) -> tuple[type[Method], Any]:
    """Return a method's class and its resolved options.

    Raises:
        RichKDError: no such method or option, or a value of a wrong type or range.
    """
    if name not in METHODS:
        raise unknown("method", name, METHODS)
    method, own = METHODS[name]
    check_options(method.Options, given, f"method {name}")
    return method, method.Options(**{**own, **given})


def method_options(options: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Return one method's options from a recipe's, which are grouped by method.

    Raises:
        RichKDError: an unknown method, or options that are not grouped by method.
    """
    for method, table in options.items():
        if not isinstance(table, Mapping):
            raise RichKDError(
                f"options.{method} = {table!r}: must be grouped by method, as in "
                f"[distill.options.{name}]",
                code="options-not-by-method",
            )
        if method not in METHODS:
            raise unknown("method in options:", method, METHODS)
    chosen: Mapping[str, Any] = options.get(name, {})
    return chosen


def describe_method(name: str) -> dict[str, Any]:
    """Return a method's description, the arrays it reads, and its options with their defaults."""
    method, options = method_class(name, {})
    reads = method.reads(options)
    own = METHODS[name][1]
    base = next(other for other, entry in METHODS.items() if entry == (method, {}))
    about = (method.__doc__ or "").splitlines()[0]
    if own:
        about = f"{base} with " + ", ".join(f"{key} = {value}" for key, value in own.items()) + "."
    return {
        "name": name,
        "about": about,
        "reads": list(reads),
        "target": method.target if TARGET in reads else None,
        "options": dataclasses.asdict(options),
    }
