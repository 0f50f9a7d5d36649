"""Top-k accuracy."""

from __future__ import annotations

from torch import Tensor


def accuracy(logits: Tensor, labels: Tensor, k: int) -> float:
    """Return the top-k accuracy, in 0..1, of logits [N,C]; k is at most C."""
    from torchmetrics.functional.classification import multiclass_accuracy

    value: Tensor = multiclass_accuracy(
        logits.float(),
        labels,
        num_classes=logits.shape[1],
        top_k=min(k, logits.shape[1]),
        average="micro",
        validate_args=False,
    )
    return float(value)
