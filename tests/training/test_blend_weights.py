"""The weights of the highest likelihood, against grids in numpy."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import scipy.optimize
import scipy.special
import torch
from helpers import refuses

from richkd.training.blend_weights import MOST, likeliest

N, C = 120, 5
Logits = list[np.ndarray]


def made(rng: np.random.Generator, count: int) -> tuple[Logits, np.ndarray]:
    """Teachers that know different parts of the labels, with different confidence."""
    labels = rng.integers(0, C, size=N)
    sure = 3 * np.eye(C)[labels]
    knows = rng.uniform(0.2, 0.9, size=count)
    return [
        rng.uniform(0.5, 3) * (rng.normal(size=(N, C)) + sure * (rng.random((N, 1)) < known))
        for known in knows
    ], labels


def nll(coefficients: np.ndarray, logits: Logits, labels: np.ndarray) -> float:
    blend = sum(c * z for c, z in zip(coefficients, logits, strict=True))
    return float(-scipy.special.log_softmax(blend, axis=1)[np.arange(N), labels].mean())


def chosen(logits: Logits, labels: np.ndarray) -> tuple[np.ndarray, float]:
    """Coefficients of the choice, and its NLL."""
    weights, scale, found = likeliest(
        [torch.from_numpy(z).float() for z in logits], torch.from_numpy(labels)
    )
    assert sum(weights) == pytest.approx(1) and min(weights) >= 0
    return np.array(weights) * scale, found


@pytest.mark.parametrize(("count", "points"), [(2, 41), (3, 13)])
def test_no_point_of_a_grid_is_likelier(rng: np.random.Generator, count: int, points: int) -> None:
    logits, labels = made(rng, count)
    logits = [z.astype(np.float32).astype(np.float64) for z in logits]
    best, found = chosen(logits, labels)
    assert found == pytest.approx(nll(best, logits, labels), abs=1e-12)
    coarse = itertools.product(np.linspace(0, 3, points), repeat=count)
    fine = itertools.product(*(c + np.linspace(-0.01, 0.01, 7) for c in best))
    for point in itertools.chain(coarse, fine):
        if min(point) >= 0:
            assert nll(np.array(point), logits, labels) >= found - 1e-12
    step = 1e-5
    for k in range(count):  # no slope, unless a teacher is left out
        up, down = (best + sign * step * np.eye(count)[k] for sign in (1, -1))
        slope = (nll(up, logits, labels) - nll(down, logits, labels)) / (2 * step)
        assert slope > -1e-7 and (best[k] == 0 or slope < 1e-7)
    assert chosen(logits, labels)[0].tolist() == best.tolist()


def test_one_teacher_gets_its_best_temperature(rng: np.random.Generator) -> None:
    logits, labels = made(rng, 1)
    logits = [logits[0].astype(np.float32).astype(np.float64)]
    weights, scale, found = likeliest([torch.from_numpy(logits[0])], torch.from_numpy(labels))
    best = scipy.optimize.minimize_scalar(
        lambda c: nll(np.array([c]), logits, labels), bounds=(0, MOST), options={"xatol": 1e-9}
    )
    assert weights == (1.0,) and scale == pytest.approx(best.x, rel=1e-5)
    assert found == pytest.approx(best.fun, abs=1e-10)


def test_a_teacher_that_misleads_is_left_out(rng: np.random.Generator) -> None:
    (good,), labels = made(rng, 1)
    wrong = 4 * np.eye(C)[(labels + 1) % C] + rng.normal(size=(N, C))
    assert chosen([wrong, good], labels)[0][0] == 0
    with refuses("weights-auto-without-information", N):
        chosen([wrong, -good], labels)


def test_a_teacher_without_mistakes_has_a_finite_scale(rng: np.random.Generator) -> None:
    labels = rng.integers(0, C, size=N)
    best, found = chosen([5 * np.eye(C)[labels], rng.normal(size=(N, C))], labels)
    assert 0 < best[0] <= MOST and 0 <= found < 0.01
