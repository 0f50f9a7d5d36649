"""Each figure against another reading of it: scipy's, or loops in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from torchmetrics.functional.classification import multiclass_calibration_error

from richkd.analysis import metrics
from richkd.analysis.corruptions import relative_errors

N, C = 400, 7


@pytest.fixture
def drawn(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits [N,C], labels [N] without class 5, and probabilities of their own reckoning."""
    logits = rng.normal(0, 2, (N, C)).astype(np.float32)
    labels = rng.choice([0, 1, 2, 3, 4, 6], N)
    logits[np.arange(N), labels] += 1.5
    return logits, labels, scipy.special.softmax(logits.astype(np.float64), axis=1)


def test_scores(drawn: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
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


def test_the_reliability_diagram_adds_up(drawn: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    logits, labels, p = drawn
    bins = metrics.reliability(torch.from_numpy(logits), torch.from_numpy(labels))
    score = metrics.score(torch.from_numpy(logits), torch.from_numpy(labels), 0.5)
    assert sum(bin.count for bin in bins) == N
    assert sum(bin.count * bin.accuracy for bin in bins) / N == pytest.approx(score["top1"])
    error = sum(bin.count / N * abs(bin.confidence - bin.accuracy) for bin in bins)
    assert error == pytest.approx(score["ece"], abs=1e-6)
    for bin in bins:
        low = math.ceil(bin.confidence * 15 - 1e-9) - 1
        inside = (p.max(1) > low / 15) & (p.max(1) <= (low + 1) / 15)
        assert bin.count == inside.sum()
        assert bin.confidence == pytest.approx(p.max(1)[inside].mean())


def test_classes_and_confusions(drawn: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    logits, labels, _ = drawn
    names = [f"class {c}" for c in range(C)]
    predicted = logits.argmax(1)
    given = torch.from_numpy(logits), torch.from_numpy(labels)
    by_class = metrics.class_accuracy(*given)
    table = {row["class"]: row for row in metrics.class_table(*given, names)}
    assert math.isnan(by_class[5]) and "class 5" not in table
    for c in (0, 1, 2, 3, 4, 6):
        hits = ((predicted == c) & (labels == c)).sum()
        assert by_class[c].item() == pytest.approx(hits / (labels == c).sum())
        row = table[names[c]]
        assert row["count"] == (labels == c).sum()
        assert row["recall"] == pytest.approx(by_class[c].item())
        assert row["precision"] == pytest.approx(hits / (predicted == c).sum())
    counts = np.zeros((C, C), int)
    np.add.at(counts, (labels, predicted), 1)
    assert metrics.confusion(*given).tolist() == counts.tolist()
    pairs = metrics.confusion_pairs(*given, names, most=5)
    np.fill_diagonal(counts, 0)
    assert [pair["count"] for pair in pairs] == sorted(counts.ravel(), reverse=True)[:5]
    for pair in pairs:
        true, taken = names.index(pair["class"]), names.index(pair["taken_for"])
        assert counts[true, taken] == pair["count"]
        assert pair["share"] == pytest.approx(pair["count"] / (labels == true).sum())


def test_similarity_of_classes(
    drawn: tuple[np.ndarray, np.ndarray, np.ndarray], rng: np.random.Generator
) -> None:
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


def test_confidence_that_is_all_but_certain() -> None:
    """Probabilities that f32 rounds to one are of the last bin, with those of 0.95."""
    logits = torch.zeros(200, 2)
    logits[:100, 0] = 30.0
    logits[100:, 0] = math.log(0.95 / 0.05)
    labels = torch.zeros(200, dtype=torch.int64)
    labels[:10] = 1
    score = metrics.score(logits, labels, 0.5)
    assert score["ece"] == pytest.approx(abs(0.95 - (0.5 * 1.0 + 0.5 * 0.95)), abs=1e-6)
    assert score["top5"] == 1.0 and score["confident_wrong"] == 0.05


def test_torchmetrics_says_the_same(drawn: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    logits, labels, p = drawn
    other = multiclass_calibration_error(
        torch.from_numpy(p), torch.from_numpy(labels), num_classes=C, n_bins=15
    )
    found = metrics.score(torch.from_numpy(logits), torch.from_numpy(labels), 0.5)["ece"]
    assert found == pytest.approx(other.item(), abs=1e-6)


def test_corruption_errors(rng: np.random.Generator) -> None:
    """As Hendrycks and Dietterich (2019) define them, on two models' mistakes."""
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
