"""CRD against the direct form: gather K+1 vectors a sample, in float64, over several steps."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import refuses

from richkd.losses import CRDLoss


class Direct:
    """The published loss, written out: per-vector dot products and logarithms."""

    def __init__(self, loss: CRDLoss) -> None:
        self.banks = {
            "s": loss.student_bank.double().clone(),
            "t": loss.teacher_bank.double().clone(),
        }
        self.n, self.temperature, self.momentum = loss.num_samples, loss.temperature, loss.momentum
        self.z: dict[str, torch.Tensor] = {}

    def side(
        self, name: str, embedding: torch.Tensor, bank: torch.Tensor, columns: torch.Tensor
    ) -> torch.Tensor:
        vectors = bank[columns]  # [B,K+1,D]
        scores = torch.exp(torch.einsum("bkd,bd->bk", vectors, embedding) / self.temperature)
        self.z.setdefault(name, scores.detach().mean() * self.n)
        p = scores / self.z[name]
        k = columns.shape[1] - 1
        eps = 1e-7
        total = torch.zeros((), dtype=torch.float64)
        for b in range(len(columns)):
            total = total - torch.log(p[b, 0] / (p[b, 0] + k / self.n + eps))
            for j in range(1, k + 1):
                total = total - torch.log((k / self.n) / (p[b, j] + k / self.n + eps))
        return total / len(columns)

    def __call__(
        self, s: torch.Tensor, t: torch.Tensor, index: torch.Tensor, negatives: torch.Tensor
    ) -> torch.Tensor:
        columns = torch.cat([index[:, None], negatives], 1)
        return self.side("s", s, self.banks["t"], columns) + self.side(
            "t", t, self.banks["s"], columns
        )

    def update(self, s: torch.Tensor, t: torch.Tensor, index: torch.Tensor) -> None:
        for name, value in (("s", s), ("t", t)):
            rows = self.momentum * self.banks[name][index] + (1 - self.momentum) * value.detach()
            self.banks[name][index] = rows / rows.norm(dim=1, keepdim=True)


def unit_rows(rng: np.random.Generator, *shape: int) -> torch.Tensor:
    rows = torch.from_numpy(rng.normal(size=shape))
    return rows / rows.norm(dim=-1, keepdim=True)


def test_equals_the_direct_form_over_steps(rng: np.random.Generator) -> None:
    n, d, k, b = 40, 12, 9, 6
    loss = CRDLoss(n, d, k, temperature=0.1, momentum=0.5)
    direct = Direct(loss)
    for _ in range(5):
        index = torch.from_numpy(rng.permutation(n)[:b])
        negatives = torch.from_numpy(rng.integers(0, n, (b, k)))
        s64, t64 = (unit_rows(rng, b, d).requires_grad_() for _ in range(2))
        s32, t32 = (x.detach().float().requires_grad_() for x in (s64, t64))
        expected = direct(s64, t64, index, negatives)
        got = loss(s32, t32, index, negatives)
        assert got.dtype == torch.float32
        assert got.item() == pytest.approx(expected.item(), rel=1e-5)
        expected.backward()
        got.backward()
        for mine, theirs in ((s32, s64), (t32, t64)):
            assert mine.grad is not None and theirs.grad is not None
            torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=1e-3, atol=1e-6)
        loss.update()
        direct.update(s64, t64, index)
        torch.testing.assert_close(loss.student_bank.double(), direct.banks["s"], rtol=0, atol=1e-6)
        torch.testing.assert_close(loss.teacher_bank.double(), direct.banks["t"], rtol=0, atol=1e-6)


def test_constants_are_those_of_the_first_batch(rng: np.random.Generator) -> None:
    loss = CRDLoss(30, 8, 5)
    index = torch.arange(4)
    loss(unit_rows(rng, 4, 8), unit_rows(rng, 4, 8), index)
    fixed = loss.normalizers.clone()
    assert (fixed > 0).all()
    loss.update()
    loss(unit_rows(rng, 4, 8), unit_rows(rng, 4, 8), index)
    assert torch.equal(loss.normalizers, fixed)


def test_negatives_are_all_the_samples_of_other_classes_alike() -> None:
    labels = torch.tensor([0, 1, 1, 2, 0, 2, 2, 1, 0, 0])
    loss = CRDLoss(10, 4, 20_000, labels=labels)
    torch.manual_seed(0)
    negatives = loss.draw_negatives(torch.arange(10))
    assert negatives.shape == (10, 20_000)
    for sample in range(10):
        counts = torch.bincount(negatives[sample], minlength=10)
        others = labels != labels[sample]
        assert (counts[~others] == 0).all()
        expected = 20_000 / int(others.sum())
        assert (counts[others] - expected).abs().max() < 6 * expected**0.5


def test_without_labels_only_the_sample_itself_is_left_out() -> None:
    negatives = CRDLoss(5, 4, 2000).draw_negatives(torch.tensor([3]))
    assert sorted(set(negatives[0].tolist())) == [0, 1, 2, 4]


def test_one_class_is_refused() -> None:
    with refuses("crd-one-class", 5):
        CRDLoss(5, 4, 3, labels=torch.zeros(5, dtype=torch.int64))


def test_update_needs_a_batch() -> None:
    with pytest.raises(RuntimeError, match="before forward"):
        CRDLoss(5, 4, 3).update()


@pytest.mark.parametrize("contrast", ["shared", "bank"])
def test_shared_and_whole_bank_equal_the_direct_form(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, contrast: str
) -> None:
    n, d, k, b = 30, 8, 12, 5
    labels = torch.from_numpy(rng.integers(0, 4, n))
    loss = CRDLoss(n, d, k, temperature=0.2, labels=labels, contrast=contrast)
    drawn = torch.from_numpy(rng.integers(0, n, k)) if contrast == "shared" else torch.arange(n)
    if contrast == "shared":
        monkeypatch.setattr(torch, "randint", lambda high, size, device: drawn)
    banks = {"s": loss.teacher_bank.double(), "t": loss.student_bank.double()}
    index = torch.from_numpy(rng.permutation(n)[:b])
    sides = {"s": unit_rows(rng, b, d), "t": unit_rows(rng, b, d)}
    expected = 0.0
    for side, embedding in sides.items():
        scores = torch.exp(embedding @ banks[side].T / 0.2)
        kept = [[j for j in drawn.tolist() if labels[j] != labels[i]] for i in index.tolist()]
        used = [scores[row, j] for row, i in enumerate(index) for j in [int(i), *kept[row]]]
        z = n * torch.stack(used).mean()
        for row, i in enumerate(index):
            noise = len(kept[row]) / n
            positive = scores[row, i] / z
            terms = [positive / (positive + noise)]
            terms += [noise / (scores[row, j] / z + noise) for j in kept[row]]
            expected -= float(torch.stack(terms).log().sum()) / b
    got = loss(sides["s"].float(), sides["t"].float(), index)
    assert got.item() == pytest.approx(expected, rel=1e-5)


def test_shared_negatives_all_of_ones_own_class_leave_a_finite_loss(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loss = CRDLoss(4, 3, 2, labels=torch.tensor([0, 0, 1, 1]), contrast="shared")
    monkeypatch.setattr(torch, "randint", lambda high, size, device: torch.tensor([0, 1]))
    student = torch.nn.functional.normalize(torch.randn(1, 3), dim=1).requires_grad_()
    value = loss(student, student.detach(), torch.tensor([0]))
    value.backward()
    assert torch.isfinite(value) and student.grad is not None
    assert torch.isfinite(student.grad).all()
