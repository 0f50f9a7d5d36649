"""Top-k accuracy, in PyTorch alone: importing torchmetrics takes longer than importing PyTorch."""

from __future__ import annotations

from torch import Tensor


def accuracy(logits: Tensor, labels: Tensor, k: int) -> float:
    """Return the top-k accuracy of logits [N,C] against labels [N], in 0..1."""
    return (correct(logits, labels, k) / len(labels)).item()


def correct(logits: Tensor, labels: Tensor, k: int) -> Tensor:
    """Return how many labels [N] are among the k largest of logits [N,C], a scalar."""
    logits = logits.float()
    if k == 1:
        return (logits.argmax(1) == labels).sum()
    best = logits.topk(min(k, logits.shape[1])).indices
    return (best == labels[:, None]).any(1).sum()
