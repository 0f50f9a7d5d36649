"""Which teacher is right where the others are wrong, and what each adds to their blend."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from richkd.analysis.metrics import right_of
from richkd.analysis.results import finite, paired_difference
from richkd.core import fusion


def complementarity(
    logits: Mapping[str, Tensor], labels: Tensor, weights: Mapping[str, float] | None = None
) -> dict[str, Any]:
    """Compare several teachers on the same samples.

    All logits are balanced first (`fusion.balance`). A teacher is compared with the blend of the
    others, in which all weigh the same; what it adds to the blend of all is the difference of this
    blend to the one without it. Differences are paired by sample, with 95 % intervals (Student's
    t) over the samples: other samples may give other values, other teachers' seeds are not covered.

    Args:
        logits: of each teacher by name, [N,C], of at least two teachers.
        labels: [N].
        weights: of each teacher in the blend of all, by name, summing to 1; by default the same.

    Returns:
        `weights` and `scales` (factors that balance) by teacher; `blend`, the scores of the blend
        of all; `right_where_wrong[k][l]`, the share of samples where k is right and l is wrong; and
        `teachers`, a row for each: its top-1, the share of samples where it alone is right
        (`alone`), and where it is right and the blend of the others is wrong (`beats_others`),
        the scores of the blend `without` it, and what it `adds` to those. Shares and accuracies are
        in 0..1, NLL in nats.

    Raises:
        RichKDError: the logits of a teacher cannot be balanced.
    """
    scales = fusion.balance(logits)
    balanced = {name: scales[name] * own.float() for name, own in logits.items()}
    right = {name: right_of(own, labels) for name, own in logits.items()}
    equal = {name: 1 / len(logits) for name in logits}
    weights = equal if weights is None else {name: weights.get(name, 0.0) for name in logits}
    whole = _blend(balanced, weights)
    rows = []
    for name, own in right.items():
        others = [other for other in logits if other != name]
        rivals = right_of(_blend(balanced, dict.fromkeys(others, 1.0)), labels)
        alone = own.clone()
        for other in others:
            alone &= ~right[other]
        rows.append(
            {
                "teacher": name,
                "top1": _share(own),
                "alone": _share(alone),
                "beats_others": _share(own & ~rivals),
                **_addition(balanced, weights, name, whole, labels),
            }
        )
    return {
        "weights": dict(weights),
        "scales": scales,
        "blend": _scores(whole, labels),
        "right_where_wrong": {
            k: {other: _share(own & ~right[other]) for other in logits} for k, own in right.items()
        },
        "teachers": rows,
    }


def _addition(
    balanced: Mapping[str, Tensor],
    weights: Mapping[str, float],
    name: str,
    whole: Tensor,
    labels: Tensor,
) -> dict[str, Any]:
    """Return the scores of the blend without a teacher, and their differences to the whole."""
    rest = {other: weight for other, weight in weights.items() if other != name}
    if not sum(rest.values()) > 0:  # it is the whole blend: the others, as if they weighed the same
        rest = dict.fromkeys(rest, 1.0)
    without = _blend(balanced, rest)
    top1 = right_of(whole, labels).double() - right_of(without, labels).double()
    nll = _nll(whole, labels) - _nll(without, labels)
    differences = {"top1": top1, "nll": nll}
    adds = {key: paired_difference(values.tolist()) for key, values in differences.items()}
    return {
        "without": _scores(without, labels),
        "adds": {key: each and finite(each) for key, each in adds.items()},
    }


def _blend(balanced: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """Return the blend by weights, which need not sum to 1."""
    total = sum(weights.values())
    chosen = {name: weight / total for name, weight in weights.items() if weight > 0}
    return fusion.blend_logits([balanced[name] for name in chosen], list(chosen.values()))


def _scores(logits: Tensor, labels: Tensor) -> dict[str, float]:
    nll = _nll(logits, labels).mean().item()
    return {"top1": _share(right_of(logits, labels)), "nll": nll}


def _nll(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the NLL of each sample, [N] f64."""
    return F.cross_entropy(logits.double(), labels, reduction="none")


def _share(which: Tensor) -> float:
    return which.double().mean().item()
