"""What several teachers know and add, against loops in numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch

from richkd.analysis.complementarity import complementarity

N, C = 90, 5
Logits = dict[str, np.ndarray]


def made(rng: np.random.Generator, names: tuple[str, ...]) -> tuple[Logits, np.ndarray]:
    labels = rng.integers(0, C, size=N)
    sure = 2 * np.eye(C)[labels]
    return {
        name: rng.uniform(0.2, 9) * (rng.normal(size=(N, C)) + sure * (rng.random((N, 1)) < 0.5))
        for name in names
    }, labels


def compared(logits: Logits, labels: np.ndarray, weights: Any = None) -> dict[str, Any]:
    tensors = {name: torch.from_numpy(own) for name, own in logits.items()}
    return complementarity(tensors, torch.from_numpy(labels), weights)


def scores(logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Whether each sample is right, and its NLL."""
    nll = -scipy.special.log_softmax(logits, axis=1)[np.arange(N), labels]
    return (logits.argmax(1) == labels).astype(float), nll


@pytest.mark.parametrize("names", [("cnn", "vit"), ("cnn", "clip", "vit"), ("cnn", "a", "b", "c")])
@pytest.mark.parametrize("weighted", [False, True])
def test_against_loops(rng: np.random.Generator, names: tuple[str, ...], weighted: bool) -> None:
    logits, labels = made(rng, names)
    weights = dict(zip(names, rng.dirichlet(np.ones(len(names))).tolist(), strict=True))
    found = compared(logits, labels, weights if weighted else None)
    if not weighted:
        weights = dict.fromkeys(names, 1 / len(names))
    spread = {k: np.mean([np.std(row, ddof=1) for row in z]) for k, z in logits.items()}
    balanced = {k: z * spread[names[0]] / spread[k] for k, z in logits.items()}
    right = {k: z.argmax(1) == labels for k, z in logits.items()}

    def blend(weights: dict[str, float]) -> tuple[np.ndarray, np.ndarray]:
        total = sum(weights.values())
        return scores(sum(w / total * balanced[k] for k, w in weights.items()), labels)

    whole = blend(weights)
    assert found["weights"] == pytest.approx(weights)
    assert found["blend"]["top1"] == pytest.approx(whole[0].mean())
    assert found["blend"]["nll"] == pytest.approx(whole[1].mean(), rel=1e-5)
    for k, row in zip(names, found["teachers"], strict=True):
        others = [other for other in names if other != k]
        assert row["teacher"] == k and row["top1"] == pytest.approx(right[k].mean())
        alone = [right[k][i] and not any(right[o][i] for o in others) for i in range(N)]
        assert row["alone"] == pytest.approx(np.mean(alone))
        rivals = blend(dict.fromkeys(others, 1.0))[0]
        assert row["beats_others"] == pytest.approx(np.mean(right[k] & (rivals == 0)))
        for other, share in found["right_where_wrong"][k].items():
            assert share == pytest.approx(np.mean(right[k] & ~right[other]))
        without = blend({other: weights[other] for other in others})
        for key, a, b in zip(("top1", "nll"), whole, without, strict=True):
            assert row["without"][key] == pytest.approx(b.mean(), rel=1e-5)
            expected = scipy.stats.ttest_rel(a, b).confidence_interval(0.95)
            got = row["adds"][key]
            assert got["mean"] == pytest.approx(a.mean() - b.mean(), abs=1e-6)
            if np.isfinite(expected.low):
                limits = (expected.low, expected.high)
                assert (got["low"], got["high"]) == pytest.approx(limits, abs=1e-5)


def test_a_copy_adds_nothing_and_a_rival_is_seen(rng: np.random.Generator) -> None:
    logits, labels = made(rng, ("cnn",))
    found = compared({**logits, "copy": 7 * logits["cnn"]}, labels)
    assert found["scales"] == pytest.approx({"cnn": 1.0, "copy": 1 / 7})
    for row in found["teachers"]:
        assert row["alone"] == row["beats_others"] == 0
        assert row["adds"]["top1"]["mean"] == 0
        assert row["adds"]["nll"]["mean"] == pytest.approx(0, abs=1e-6)


def test_the_whole_weight_on_one_teacher(rng: np.random.Generator) -> None:
    """Without it, the others are blended with equal weights."""
    logits, labels = made(rng, ("cnn", "a", "b"))
    found = compared(logits, labels, {"cnn": 1.0})
    others = compared({k: logits[k] for k in ("a", "b")}, labels)
    cnn = found["teachers"][0]
    assert found["blend"]["top1"] == cnn["top1"]
    assert cnn["without"]["top1"] == others["blend"]["top1"]
    assert all(row["adds"]["nll"]["mean"] == 0 for row in found["teachers"][1:])
