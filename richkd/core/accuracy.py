"""Top-k accuracy, in PyTorch alone: importing torchmetrics takes longer than importing PyTorch."""

from __future__ import annotations

from torch import Tensor


def accuracy(logits: Tensor, labels: Tensor, k: int) -> float:
    """Return the top-k accuracy of logits [N,C] against labels [N], in 0..1."""
    logits = logits.float()
    if k == 1:
        correct = logits.argmax(1) == labels
    else:
        best = logits.topk(min(k, logits.shape[1])).indices
        correct = (best == labels[:, None]).any(1)
    return (correct.sum() / len(labels)).item()
