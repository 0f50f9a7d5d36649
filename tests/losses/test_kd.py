"""Logit distillation against a float64 reading of Hinton et al."""

import numpy as np
import pytest
import torch

from richkd.losses import kd_loss


def reference(student: np.ndarray, target: np.ndarray, temperature: float) -> float:
    """τ² · mean over the batch of Σ p·(log p − log q)."""

    def softmax(z: np.ndarray) -> np.ndarray:
        e = np.exp((z - z.max(1, keepdims=True)) / temperature)
        return e / e.sum(1, keepdims=True)

    p, q = softmax(target), softmax(student)
    return float(temperature**2 * (p * (np.log(p) - np.log(q))).sum(1).mean())


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_value_and_gradient(rng: np.random.Generator, temperature: float) -> None:
    student, target = rng.normal(size=(6, 11)) * 3, rng.normal(size=(6, 11)) * 5
    logits = torch.tensor(student, dtype=torch.float32, requires_grad=True)
    loss = kd_loss(logits, torch.tensor(target, dtype=torch.float32), temperature)
    assert loss.item() == pytest.approx(reference(student, target, temperature), rel=1e-4)
    loss.backward()  # type: ignore[no-untyped-call]
    step = 1e-5
    for row, column in ((0, 0), (3, 7), (5, 10)):
        shift = np.zeros_like(student)
        shift[row, column] = step
        slope = (
            reference(student + shift, target, temperature)
            - reference(student - shift, target, temperature)
        ) / (2 * step)
        assert logits.grad is not None
        assert logits.grad[row, column].item() == pytest.approx(slope, rel=1e-3, abs=1e-6)


def test_no_gradient_into_the_target_and_zero_at_the_target() -> None:
    target = torch.randn(4, 5, requires_grad=True)
    student = target.detach().clone().requires_grad_()
    loss = kd_loss(student, target, 3.0)
    loss.backward()  # type: ignore[no-untyped-call]
    assert target.grad is None and abs(loss.item()) < 1e-6


def test_half_precision_is_computed_in_f32(rng: np.random.Generator) -> None:
    student, target = rng.normal(size=(4, 9)) * 30, rng.normal(size=(4, 9)) * 30
    half = [torch.tensor(z, dtype=torch.float16) for z in (student, target)]
    loss = kd_loss(half[0], half[1], 2.0)
    assert loss.dtype == torch.float32
    expected = reference(half[0].double().numpy(), half[1].double().numpy(), 2.0)
    assert loss.item() == pytest.approx(expected, rel=1e-4)
