"""A linear probe on frozen features: CLIP's in a cache, or those of a teacher of other classes.

It is multinomial logistic regression, as in the CLIP paper (Radford et al. 2021, arXiv 2103.00020,
section 3.2), fitted out of fold: a sample's logits come from heads that never saw it, so they are
as uncertain about training samples as about new ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from richkd.core.errors import RichKDError

# L2, of weights on standardised features
PENALTIES = (1.0, 3e-1, 1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 3e-4)
STEPS = 100


@dataclass(frozen=True)
class Probe:
    """The heads, the logits of those that did not see the sample, and what the fit found."""

    train_logits: Tensor  # [N,C], each by the head of the other folds
    other_logits: Tensor  # [M,C], the mean of the heads
    penalty: float
    nll: float  # of the training samples, out of fold, nats
    too_small: list[int]  # classes with fewer samples than folds, which some heads hardly saw
    heads: Tensor  # [K,D+1,C] f32, on features as they are: weights, and biases in the last row
    fold: Tensor  # [N], which head did not see the sample


def fit_probe(
    train: Tensor, labels: Tensor, others: Tensor, num_classes: int, folds: int = 5, seed: int = 0
) -> Probe:
    """Fit K heads, each on all folds but one; the first fold's likelihood chooses the penalty.

    Every class is spread evenly over the folds.

    Args:
        train: [N,D].
        labels: [N].
        others: [M,D], of samples that no head is fitted on.
        num_classes: C.
        folds: K.
        seed: of the folds.

    Raises:
        RichKDError: fewer samples than folds.
    """
    if len(train) < folds:
        raise RichKDError(
            f"a probe of {folds} folds needs at least {folds} training samples, but there are "
            f"{len(train)}; use --clip-head zero-shot",
            code="probe-too-few-samples",
        )
    train, others = train.float(), others.float()
    std, mean = torch.std_mean(train, dim=0)
    std = std.clamp_min(1e-6)
    train, others = ((x - mean) / std for x in (train, others))
    fold = stratified_folds(labels, folds, seed).to(train.device)

    first = fold == 0
    penalty, best, head = PENALTIES[0], float("inf"), None
    for candidate in PENALTIES:  # from strong to weak, each starting from the head before
        head = _fit(train[~first], labels[~first], num_classes, candidate, head)
        nll = F.cross_entropy(apply_head(head, train[first]), labels[first]).item()
        if nll < best:
            penalty, best = candidate, nll

    train_logits = train.new_empty(len(train), num_classes)
    other_logits = others.new_zeros(len(others), num_classes)
    heads = []
    for number in range(folds):
        out = fold == number
        head = _fit(train[~out], labels[~out], num_classes, penalty, None)
        train_logits[out] = apply_head(head, train[out])
        other_logits += apply_head(head, others) / folds
        heads.append(_folded(head, mean, std))
    counts = torch.bincount(labels, minlength=num_classes)
    return Probe(
        train_logits,
        other_logits,
        penalty,
        nll=F.cross_entropy(train_logits, labels).item(),
        too_small=(counts < folds).nonzero().flatten().tolist(),
        heads=torch.stack(heads),
        fold=fold,
    )


def stratified_folds(labels: Tensor, folds: int, seed: int) -> Tensor:
    """Draw the fold [N] of each sample, 0..K−1, with classes and sizes evenly spread."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    order = order[labels.cpu()[order].argsort(stable=True)]  # class by class
    fold = torch.empty(len(labels), dtype=torch.long)
    fold[order] = torch.arange(len(labels)) % folds
    return fold


def _fit(
    x: Tensor, labels: Tensor, num_classes: int, penalty: float, start: Tensor | None
) -> Tensor:
    """Fit weights and, in the last row, biases [D+1,C] by cross-entropy and penalty."""
    head = x.new_zeros(x.shape[1] + 1, num_classes) if start is None else start.clone()
    head.requires_grad_()
    optimizer = torch.optim.LBFGS(
        [head],
        max_iter=STEPS,
        tolerance_grad=1e-5,
        tolerance_change=1e-7,
        line_search_fn="strong_wolfe",
    )

    def loss() -> float:
        optimizer.zero_grad()
        value = F.cross_entropy(apply_head(head, x), labels) + penalty / 2 * head.square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value.item()

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    return head.detach()


def apply_head(head: Tensor, x: Tensor) -> Tensor:
    """Return logits [N,C] by a head [D+1,C], whose last row is the biases, of features [N,D]."""
    return torch.addmm(head[-1], x, head[:-1])


def _folded(head: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Return the head on features as they are of a head on standardised ones."""
    weights = head[:-1].double() / std.double()[:, None]
    bias = head[-1].double() - mean.double() @ weights
    return torch.cat([weights, bias[None]]).float()
