"""The figures of `richkd.analysis.metrics` against scipy, torchmetrics, or loops in float64."""

from __future__ import annotations

import math

import numpy as np
import optional
import pytest
import scipy.special
import scipy.stats
import torch

from richkd.analysis import metrics
from richkd.analysis.corruptions import relative_errors
from richkd.core.accuracy import accuracy

N, C = 400, 7
Drawn = tuple[np.ndarray, np.ndarray, np.ndarray]


@pytest.fixture
def drawn(rng: np.random.Generator) -> Drawn:
    """Logits [N,C], labels [N] without class 5, and probabilities by scipy."""
    logits = rng.normal(0, 2, (N, C)).astype(np.float32)
    labels = rng.choice([0, 1, 2, 3, 4, 6], N)
    logits[np.arange(N), labels] += 1.5
    return logits, labels, scipy.special.softmax(logits.astype(np.float64), axis=1)


def test_scores(drawn: Drawn) -> None:
    logits, labels, p = drawn
    found = metrics.score(torch.from_numpy(logits), torch.from_numpy(labels), 0.6)
    order = np.argsort(-logits, axis=1)
    top, right = p.max(1), order[:, 0] == labels
    nll = brier = error = 0.0
    for i in range(N):
        nll -= math.log(p[i, labels[i]]) / N
        brier += sum((p[i, c] - (c == labels[i])) ** 2 for c in range(C)) / N
    for low in range(15):
        inside = (top > low / 15) & (top <= (low + 1) / 15)
        if inside.any():
            error += inside.mean() * abs(top[inside].mean() - right[inside].mean())
    expected = {
        "top1": right.mean(),
        "top5": np.mean([labels[i] in order[i, :5] for i in range(N)]),
        "nll": nll,
        "brier": brier,
        "ece": error,
        "confident_correct": np.mean((top >= 0.6) & right),
        "unsure_correct": np.mean((top < 0.6) & right),
        "unsure_wrong": np.mean((top < 0.6) & ~right),
        "confident_wrong": np.mean((top >= 0.6) & ~right),
    }
    assert found == pytest.approx(expected, abs=1e-6)
    assert sum(found[cell] for cell in metrics.CELLS) == pytest.approx(1)


def test_reliability_diagram(drawn: Drawn) -> None:
    logits, labels, p = drawn
    bins = metrics.reliability(torch.from_numpy(logits), torch.from_numpy(labels))
    assert sum(bin.count for bin in bins) == N
    for bin in bins:
        low = math.ceil(bin.confidence * 15 - 1e-9) - 1
        inside = (p.max(1) > low / 15) & (p.max(1) <= (low + 1) / 15)
        assert bin.count == inside.sum()
        assert bin.confidence == pytest.approx(p.max(1)[inside].mean())
        assert bin.accuracy == pytest.approx((logits.argmax(1) == labels)[inside].mean())


def test_certain_predictions_fall_into_the_last_bin() -> None:
    """A probability that float32 rounds to 1 shares the last bin with 0.95."""
    logits = torch.zeros(200, 2)
    logits[:100, 0] = 30.0
    logits[100:, 0] = math.log(0.95 / 0.05)
    labels = torch.zeros(200, dtype=torch.int64)
    labels[:10] = 1
    score = metrics.score(logits, labels, 0.5)
    assert score["ece"] == pytest.approx(abs(0.95 - (0.5 * 1.0 + 0.5 * 0.95)), abs=1e-6)
    assert score["top5"] == 1.0 and score["confident_wrong"] == 0.05


def test_torchmetrics_agrees(drawn: Drawn) -> None:
    classification = optional.load("torchmetrics.functional.classification")
    logits, labels, p = (torch.from_numpy(array) for array in drawn)
    ties = logits.round().half()
    for k in (1, 2, 5):
        by_torchmetrics = classification.multiclass_accuracy(
            ties, labels, num_classes=C, top_k=k, average="micro"
        )
        assert accuracy(ties, labels, k) == by_torchmetrics.item(), k
    counts = metrics.confusion(logits, labels)
    expected = classification.multiclass_confusion_matrix(logits, labels, num_classes=C)
    assert torch.equal(counts, expected)
    for name, found in (
        ("recall", metrics.class_accuracy(counts)),
        ("precision", metrics.class_accuracy(counts.T)),
    ):
        figures = getattr(classification, f"multiclass_{name}")(
            logits, labels, num_classes=C, average=None
        )
        torch.testing.assert_close(found.nan_to_num(0).float(), figures, msg=name)
    ece = classification.multiclass_calibration_error(p, labels, num_classes=C, n_bins=15)
    assert metrics.score(logits, labels, 0.5)["ece"] == pytest.approx(ece.item(), abs=1e-6)


def test_classes_and_confusions(drawn: Drawn) -> None:
    logits, labels, _ = drawn
    names = [f"class {c}" for c in range(C)]
    predicted = logits.argmax(1)
    given = torch.from_numpy(logits), torch.from_numpy(labels)
    counts = metrics.confusion(*given).numpy()
    assert math.isnan(metrics.class_accuracy(torch.from_numpy(counts))[5])
    table = {row["class"]: row for row in metrics.class_table(*given, names)}
    assert table.keys() == {*names} - {"class 5"}
    for c in (0, 1, 2, 3, 4, 6):
        hits = ((predicted == c) & (labels == c)).sum()
        row = table[names[c]]
        assert row["count"] == (labels == c).sum()
        assert row["recall"] == pytest.approx(hits / (labels == c).sum())
        assert row["precision"] == pytest.approx(hits / (predicted == c).sum())
    (never,) = metrics.class_table(torch.tensor([[0.0, 1.0]]), torch.tensor([0]), ["a", "b"])
    assert never == {"class": "a", "count": 1, "recall": 0.0, "precision": None}
    pairs = metrics.confusion_pairs(*given, names, most=5)
    np.fill_diagonal(counts, 0)
    assert [pair["count"] for pair in pairs] == sorted(counts.ravel(), reverse=True)[:5]
    for pair in pairs:
        true, taken = names.index(pair["class"]), names.index(pair["taken_for"])
        assert counts[true, taken] == pair["count"]
        assert pair["share"] == pytest.approx(pair["count"] / (labels == true).sum())


def test_similarity_of_classes(drawn: Drawn, rng: np.random.Generator) -> None:
    logits, labels, p = drawn
    features = rng.normal(size=(N, 11)).astype(np.float32)
    given = torch.from_numpy(labels)
    soft = metrics.soft_label_similarity(torch.from_numpy(logits), given).numpy()
    mean = metrics.mean_similarity(torch.from_numpy(features), given, C).numpy()
    present = [0, 1, 2, 3, 4, 6]
    for a in present:
        for b in present:
            if a == b:
                continue
            forth = np.mean([p[i, b] / (1 - p[i, a]) for i in range(N) if labels[i] == a])
            back = np.mean([p[i, a] / (1 - p[i, b]) for i in range(N) if labels[i] == b])
            assert soft[a, b] == pytest.approx((forth + back) / 2, rel=1e-6)
            u, v = (features[labels == c].astype(np.float64).mean(0) for c in (a, b))
            cosine = u @ v / np.linalg.norm(u) / np.linalg.norm(v)
            assert mean[a, b] == pytest.approx(cosine, abs=1e-9)
    pairs = [(a, b) for a in present for b in present if a < b]
    expected = scipy.stats.spearmanr([soft[pair] for pair in pairs], [mean[pair] for pair in pairs])
    found = metrics.rank_correlation(torch.from_numpy(soft), torch.from_numpy(mean))
    assert found == pytest.approx(expected.statistic, abs=1e-9)
    flat = torch.ones(C, C, dtype=torch.float64)
    assert metrics.rank_correlation(flat, torch.from_numpy(mean)) is None
    assert metrics.rank_correlation(torch.eye(2), torch.eye(2)) is None


def test_corruption_errors(rng: np.random.Generator) -> None:
    """mCE and relative mCE as Hendrycks and Dietterich (2019) define them, of two models."""
    names = ["snow", "frost", "fog"]
    ours, theirs = ({name: rng.integers(200, 700, 5).tolist() for name in names} for _ in range(2))
    clean, other = 90, 150
    ce = [sum(ours[n]) / sum(theirs[n]) for n in names]
    added = [sum(w - clean for w in ours[n]) / sum(w - other for w in theirs[n]) for n in names]
    found = relative_errors(ours, clean, theirs, other)
    assert found == pytest.approx((np.mean(ce), np.mean(added)))
    assert relative_errors(theirs, other, theirs, other) == pytest.approx((1, 1))
    perfect = {name: [0] * 5 for name in names}
    assert relative_errors(ours, clean, perfect, 0) == (None, None)
    assert relative_errors(perfect, 0, theirs, 700)[0] == 0.0
    nothing = {**theirs, "fog": [140, 160, 150, 150, 150]}  # adds none to the clean mistakes
    assert relative_errors(ours, clean, nothing, 150)[1] is None
