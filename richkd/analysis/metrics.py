"""Measures of predictions besides accuracy: confidence, calibration, mistakes and classes.

Every function takes logits [N,C] and labels [N]; probabilities are their softmax in float64.
Confusion counts and calibration are computed here: importing torchmetrics takes longer than
importing PyTorch, and its calibration error rounds to float32 and returns no bins.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from richkd.core.accuracy import accuracy
from richkd.core.errors import RichKDError

BINS = 15
CELLS = ("confident_correct", "unsure_correct", "unsure_wrong", "confident_wrong")


def check_threshold(threshold: float) -> None:
    """Raise RichKDError unless the confidence threshold is between 0 and 1."""
    if not 0 < threshold < 1:
        raise RichKDError(
            f"threshold = {threshold}: must be between 0 and 1", code="value-out-of-range"
        )


def probabilities(logits: Tensor) -> Tensor:
    """Return the softmax in float64; float32 would round the small probabilities to 0."""
    return logits.double().softmax(1)


def right_of(logits: Tensor, labels: Tensor) -> Tensor:
    """Return which samples are classified correctly, [N] bool."""
    return logits.argmax(1) == labels


def score(logits: Tensor, labels: Tensor, threshold: float) -> dict[str, float]:
    """Return top-1, top-5, NLL in nats, Brier score, calibration error and confidence table.

    The Brier score is the squared distance between probabilities and one-hot label, summed over
    classes (0 to 2; Brier, 1950). The expected calibration error has 15 bins of equal width (Guo et
    al., 2017, eq. 3). The cells of the confidence table are shares of all samples; a prediction is
    confident if its top probability is at least `threshold`.
    """
    probability = probabilities(logits)
    right = probability.gather(1, labels[:, None])[:, 0]
    bins = reliability(logits, labels)
    return {
        "top1": accuracy(logits, labels, 1),
        "top5": accuracy(logits, labels, 5),
        "nll": F.cross_entropy(logits.double(), labels).item(),
        "brier": (probability.square().sum(1) - 2 * right + 1).mean().item(),
        "ece": sum(b.count * abs(b.accuracy - b.confidence) for b in bins) / len(labels),
        **confidence_table(probability, labels, threshold),
    }


def confidence_table(probability: Tensor, labels: Tensor, threshold: float) -> dict[str, float]:
    """Return the shares of correct and wrong predictions above and below the threshold."""
    top, predicted = probability.max(1)
    confident, right = top >= threshold, predicted == labels
    cells = (confident & right, ~confident & right, ~confident & ~right, confident & ~right)
    return {name: cell.double().mean().item() for name, cell in zip(CELLS, cells, strict=True)}


@dataclass(frozen=True)
class Bin:
    """A bin of a reliability diagram: predictions of similar confidence."""

    count: int
    confidence: float  # mean of the bin
    accuracy: float


def reliability(logits: Tensor, labels: Tensor, bins: int = BINS) -> list[Bin]:
    """Return the non-empty bins (low, high] of the top probability, of equal width."""
    top, predicted = probabilities(logits).max(1)
    which = (top * bins).ceil().long().clamp(1, bins) - 1
    right = (predicted == labels).double()
    count, confidence, correct = (
        torch.bincount(which, values, minlength=bins)
        for values in (torch.ones_like(top), top, right)
    )
    return [
        Bin(int(n), (c / n).item(), (r / n).item())
        for n, c, r in zip(count, confidence, correct, strict=True)
        if n > 0
    ]


# --- classes and mistakes ------------------------------------------------------------------------


def confusion(logits: Tensor, labels: Tensor) -> Tensor:
    """Return counts [C,C]: one row per true class, one column per predicted class."""
    num_classes = logits.shape[1]
    pair = labels * num_classes + logits.argmax(1)
    return torch.bincount(pair, minlength=num_classes**2).view(num_classes, num_classes)


def class_accuracy(counts: Tensor) -> Tensor:
    """Return the accuracy (recall) of each class [C] f64 from confusion counts.

    It is NaN for a class without samples. Transposed counts give the precision.
    """
    return counts.diagonal().double() / counts.sum(1)


def class_table(logits: Tensor, labels: Tensor, names: Sequence[str]) -> list[dict[str, Any]]:
    """Return count, recall and precision of each class that has samples.

    The precision is None for a class that is never predicted.
    """
    counts = confusion(logits, labels)
    columns = counts.sum(1), class_accuracy(counts), class_accuracy(counts.T)
    return [
        {
            "class": name,
            "count": count,
            "recall": recall,
            "precision": None if math.isnan(precision) else precision,
        }
        for name, count, recall, precision in zip(
            names, *(column.tolist() for column in columns), strict=True
        )
        if count
    ]


def confusion_pairs(
    logits: Tensor, labels: Tensor, names: Sequence[str], most: int = 10
) -> list[dict[str, Any]]:
    """Return the most frequent mistakes.

    Each has the true class, the predicted class, the count, and its share of the true class.
    """
    counts = confusion(logits, labels)
    per_class = counts.sum(1)
    wrong = counts.clone().fill_diagonal_(0)
    order = wrong.flatten().argsort(descending=True, stable=True)[:most].tolist()
    return [
        {
            "class": names[true],
            "taken_for": names[predicted],
            "count": int(wrong[true, predicted]),
            "share": int(wrong[true, predicted]) / int(per_class[true]),
        }
        for true, predicted in (divmod(index, len(wrong)) for index in order)
        if wrong[true, predicted]
    ]


# --- similarity of classes -----------------------------------------------------------------------


def soft_label_similarity(logits: Tensor, labels: Tensor) -> Tensor:
    """Return how similar a teacher's soft labels make two classes: [C,C] f64, symmetric.

    This is the probability that images of one class are given to the other, provided that they are
    not given to their own (the non-target part of DKD, Zhao et al., 2022, eq. 4), averaged over the
    two directions. Rows of classes without samples are NaN.
    """
    others = logits.double().scatter(1, labels[:, None], -math.inf).softmax(1)
    mean = class_means(others, labels, logits.shape[1])
    return (mean + mean.T) / 2


def mean_similarity(features: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Return cosines [C,C] f64 between the mean features [N,F] of classes; NaN without samples."""
    return cosines(class_means(features.double(), labels, num_classes))


def class_means(rows: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Return the mean row of each class: [N,F] f64 -> [C,F] f64; NaN without samples."""
    total = torch.zeros(num_classes, rows.shape[1], dtype=torch.float64)
    total.index_add_(0, labels, rows)
    return total / torch.bincount(labels, minlength=num_classes)[:, None]


def cosines(rows: Tensor) -> Tensor:
    """Return the cosines between rows: [C,F] -> [C,C] f64."""
    unit = F.normalize(rows.double(), dim=1)
    return unit @ unit.T


def rank_correlation(a: Tensor, b: Tensor) -> float | None:
    """Return Spearman's correlation of two symmetric matrices [C,C] over pairs of classes.

    It is None with fewer than three pairs, or if one matrix is constant.
    """
    from scipy.stats import spearmanr

    upper = torch.ones_like(a, dtype=torch.bool).triu(1)
    pairs = torch.stack([a[upper], b[upper]])
    pairs = pairs[:, ~pairs.isnan().any(0)]
    if pairs.shape[1] < 3 or (pairs == pairs[:, :1]).all(1).any():
        return None
    return float(spearmanr(*pairs.numpy()).statistic)
