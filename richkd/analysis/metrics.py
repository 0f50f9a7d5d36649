"""How good predictions are beside being right: confident, calibrated, and wrong about what.

Everything takes logits [N,C] and labels [N]; probabilities are their softmax, in f64.
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
    """Refuse a confidence that is none."""
    if not 0 < threshold < 1:
        raise RichKDError(
            f"threshold = {threshold}: must be between 0 and 1", code="value-out-of-range"
        )


def probabilities(logits: Tensor) -> Tensor:
    """The softmax in f64: of large logits, f32 would round the smaller classes away."""
    return logits.double().softmax(1)


def score(logits: Tensor, labels: Tensor, threshold: float) -> dict[str, float]:
    """Top-1, top-5, NLL in nats, Brier score, calibration error, and the confidence table.

    The Brier score is the squared distance of the probabilities from the label, summed over
    classes (0 to 2; Brier, 1950). The calibration error is the expected one over 15 bins of equal
    width (Guo et al., 2017, eq. 3). The four cells of the confidence table are shares of all
    samples; confident is a top probability of at least `threshold`.
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
    """Shares of samples: right or wrong, with a top probability of at least `threshold` or not."""
    top, predicted = probability.max(1)
    confident, right = top >= threshold, predicted == labels
    cells = (confident & right, ~confident & right, ~confident & ~right, confident & ~right)
    return {name: cell.double().mean().item() for name, cell in zip(CELLS, cells, strict=True)}


@dataclass(frozen=True)
class Bin:
    """Predictions of about the same confidence."""

    count: int
    confidence: float  # their mean
    accuracy: float


def reliability(logits: Tensor, labels: Tensor, bins: int = BINS) -> list[Bin]:
    """The reliability diagram: bins of equal width of the top probability; empty ones left out."""
    top, predicted = probabilities(logits).max(1)
    which = (top * bins).ceil().long().clamp(1, bins) - 1
    right = (predicted == labels).double()
    count, confidence, correct = (
        torch.zeros(bins, dtype=torch.float64).index_add_(0, which, values)
        for values in (torch.ones_like(top), top, right)
    )
    return [
        Bin(int(n), (c / n).item(), (r / n).item())
        for n, c, r in zip(count, confidence, correct, strict=True)
        if n > 0
    ]


def class_accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Accuracy of each class [C] f64, NaN for a class without samples."""
    num_classes = logits.shape[1]
    right = (logits.argmax(1) == labels).double()
    zeros = torch.zeros(num_classes, dtype=torch.float64)
    count = zeros.index_add(0, labels, torch.ones_like(right))
    return zeros.index_add(0, labels, right) / count


def class_table(logits: Tensor, labels: Tensor, names: Sequence[str]) -> list[dict[str, Any]]:
    """Of each class with samples: how many, how many found (recall), and how many so called were
    (precision; None where nothing was called so)."""
    counts = confusion(logits, labels)
    found, called = counts.sum(1).tolist(), counts.sum(0).tolist()
    right = counts.diagonal().tolist()
    return [
        {"class": name, "count": n, "recall": hit / n, "precision": hit / c if c else None}
        for name, n, c, hit in zip(names, found, called, right, strict=True)
        if n
    ]


def confusion(logits: Tensor, labels: Tensor) -> Tensor:
    """Counts [C,C]: a row a true class, a column a predicted one."""
    from torchmetrics.functional.classification import multiclass_confusion_matrix

    return multiclass_confusion_matrix(
        logits.argmax(1), labels, num_classes=logits.shape[1], validate_args=False
    )


def confusion_pairs(
    logits: Tensor, labels: Tensor, names: Sequence[str], most: int = 10
) -> list[dict[str, Any]]:
    """The most frequent mistakes: the true class, what it was taken for, how often, and the share
    of the true class's samples."""
    counts = confusion(logits, labels)
    per_class = counts.sum(1)
    wrong = counts.clone().fill_diagonal_(0)
    order = wrong.flatten().argsort(descending=True, stable=True)[:most].tolist()
    pairs = []
    for place in order:
        true, taken = divmod(place, len(wrong))
        count = int(wrong[true, taken])
        if count:
            pairs.append(
                {
                    "class": names[true],
                    "taken_for": names[taken],
                    "count": count,
                    "share": count / int(per_class[true]),
                }
            )
    return pairs


# --- between classes -----------------------------------------------------------------------------


def soft_label_similarity(logits: Tensor, labels: Tensor) -> Tensor:
    """How alike a teacher's soft labels make two classes: [C,C] f64, symmetric.

    The probability that images of one class have for the other, given that they are not of their
    own (the non-target part of DKD, Zhao et al., 2022, eq. 4), averaged over the images of either
    class. Rows of classes without samples are NaN.
    """
    num_classes = logits.shape[1]
    others = logits.double().scatter(1, labels[:, None], -math.inf).softmax(1)
    total = torch.zeros(num_classes, num_classes, dtype=torch.float64)
    total.index_add_(0, labels, others)
    mean = total / torch.bincount(labels, minlength=num_classes)[:, None]
    return (mean + mean.T) / 2


def mean_similarity(features: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Cosines [C,C] f64 of the classes' mean features, of [N,F]; NaN without samples."""
    features = features.double()
    total = torch.zeros(num_classes, features.shape[1], dtype=torch.float64)
    total.index_add_(0, labels, features)
    means = total / torch.bincount(labels, minlength=num_classes)[:, None]
    return cosines(means)


def cosines(rows: Tensor) -> Tensor:
    """[C,F] -> [C,C] f64."""
    unit = F.normalize(rows.double(), dim=1)
    return unit @ unit.T


def rank_correlation(a: Tensor, b: Tensor) -> float | None:
    """Spearman's correlation of two symmetric matrices [C,C] over pairs of different classes;
    None where there are fewer than three pairs, or one matrix is the same everywhere."""
    from scipy.stats import rankdata

    upper = torch.ones_like(a, dtype=torch.bool).triu(1)
    x, y = a[upper], b[upper]
    known = ~(x.isnan() | y.isnan())
    if known.sum() < 3:
        return None
    ranks = torch.stack([torch.from_numpy(rankdata(values[known].numpy())) for values in (x, y)])
    value = torch.corrcoef(ranks)[0, 1].item()
    return None if math.isnan(value) else value
