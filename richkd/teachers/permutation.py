"""Tell from its answers whether a teacher's outputs are in another order than the classes."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

CLEARLY = 3.0  # standard deviations
ONE_TO_ONE = 0.9  # an order explains at least this share of what any map of classes explains


def likely_order(predicted: Tensor, labels: Tensor, classes: int) -> dict[int, int]:
    """Return the output of each class in the order that fits a teacher's answers best.

    The order is the assignment of outputs to classes that makes most answers right. With few images
    per class some assignment does so for any teacher. It therefore has to hold on images that it
    was not chosen by: in two halves, each judged by the order of the other, the teacher has to be
    clearly better than in the dataset's order, and right on a third of what chance leaves. A bad
    teacher, which takes several classes for the same one, is no teacher in another order: choosing
    an output for each class by itself, without regard to the others, must not explain much more.

    Args:
        predicted: outputs [N].
        labels: classes [N], in the same numbering.
        classes: C.

    Returns:
        Outputs by class, of the classes with images and answers; empty if the dataset's own order
        may be right, or no order is.
    """
    own = predicted == labels
    halves = alternate(labels)
    ordered, free = torch.zeros_like(own), torch.zeros_like(own)
    for half in (halves, ~halves):
        for one_to_one, right in ((True, ordered), (False, free)):
            outputs = assign(predicted[~half], labels[~half], one_to_one)
            right[half] = matches(predicted[half], labels[half], outputs)
    wins, bound = ordered.double() - own.double(), (1 + 2 / classes) / 3
    sure = advantage_of(wins, labels) >= CLEARLY and float(ordered.double().mean()) >= bound
    if not sure or ordered.sum() < ONE_TO_ONE * free.sum():
        return {}
    return assign(predicted, labels)


def alternate(labels: Tensor) -> Tensor:
    """Return every second image of each class, as a mask [N]."""
    order = labels.argsort(stable=True)
    counts = torch.bincount(labels)
    rank = torch.arange(len(labels)) - (counts.cumsum(0) - counts)[labels[order]]
    mask = torch.zeros(len(labels), dtype=torch.bool)
    mask[order] = rank % 2 == 1
    return mask


def assign(predicted: Tensor, labels: Tensor, one_to_one: bool = True) -> dict[int, int]:
    """Return the output of each class that makes most answers right.

    Args:
        predicted: outputs [N].
        labels: classes [N].
        one_to_one: whether no two classes may have the same output.
    """
    from scipy.optimize import linear_sum_assignment

    if not len(labels):
        return {}
    classes, row = np.unique(labels.numpy(), return_inverse=True)
    outputs, column = np.unique(predicted.numpy(), return_inverse=True)
    counts = np.zeros((len(classes), len(outputs)))
    np.add.at(counts, (row, column), 1)
    counts += 0.01 * (counts > 0) * (classes[:, None] == outputs)  # of equals, the class's own
    if one_to_one:
        rows, columns = linear_sum_assignment(counts, maximize=True)
    else:
        rows, columns = np.arange(len(classes)), counts.argmax(1)
    some = counts[rows, columns] > 0
    pairs = zip(classes[rows[some]].tolist(), outputs[columns[some]].tolist(), strict=True)
    return dict(pairs)


def matches(predicted: Tensor, labels: Tensor, outputs: dict[int, int]) -> Tensor:
    """Return whether each answer is right in an order; False for classes without an output."""
    wanted = [outputs.get(label, -1) for label in labels.tolist()]
    return predicted == torch.tensor(wanted, dtype=torch.long)


def advantage_of(wins: Tensor, labels: Tensor) -> float:
    """Return how much better one order is than another, in standard deviations.

    This is McNemar's test: images that are right in neither order do not count. Classes weigh the
    same however many images they have, so that a network that always predicts the same class gains
    nothing.

    Args:
        wins: by image [N]: 1 if it is right in the first order only, −1 in the other only, else 0.
        labels: the images' classes [N].
    """
    if not wins.any():
        return 0.0
    counts = torch.bincount(labels).double()
    sums = torch.zeros_like(counts).index_add(0, labels, wins)
    present = counts > 0
    error = math.sqrt(float(wins.abs().mean() * (1 / counts[present]).sum())) / int(present.sum())
    return float((sums[present] / counts[present]).mean()) / error
