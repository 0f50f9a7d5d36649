"""Every method against a second reading of its paper: float64, written out sample by sample.

Values of the terms and the gradient into the student, on fresh random input every run.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from richkd.losses import Batch, Task, confidence_weights, entropy_weights, method_class
from richkd.losses.method import TARGET

B, C, FS, FT, D, N = 6, 9, 7, 5, 8, 24
Terms = dict[str, Tensor]


def softmax(z: Tensor, temperature: float) -> Tensor:
    e = torch.exp(z / temperature - (z / temperature).max())
    return e / e.sum()


def kl(p: Tensor, q: Tensor) -> Tensor:
    return sum((p[i] * (p[i].log() - q[i].log()) for i in range(len(p))), torch.zeros(()).double())


def z_scores(z: Tensor) -> Tensor:
    mean = z.sum() / len(z)
    return (z - mean) / (((z - mean) ** 2).sum() / (len(z) - 1)).sqrt()


def cross_entropy(z: Tensor, labels: Tensor) -> Tensor:
    return -torch.stack([softmax(z[b], 1.0)[labels[b]].log() for b in range(len(z))]).mean()


def kd(s: Tensor, t: Tensor, temperature: float) -> Tensor:
    rows = [kl(softmax(t[b], temperature), softmax(s[b], temperature)) for b in range(len(s))]
    return temperature**2 * torch.stack(rows).mean()


def decoupled(s: Tensor, t: Tensor, labels: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    target, others = [], []
    for b in range(len(s)):
        y = int(labels[b])
        p, q = softmax(t[b], temperature), softmax(s[b], temperature)
        target.append(kl(torch.stack([p[y], 1 - p[y]]), torch.stack([q[y], 1 - q[y]])))
        rest = [c for c in range(s.shape[1]) if c != y]
        others.append(kl(p[rest] / p[rest].sum(), q[rest] / q[rest].sum()))
    square = temperature**2
    return square * torch.stack(target).mean(), square * torch.stack(others).mean()


def pearson(a: Tensor, b: Tensor) -> Tensor:
    a, b = a - a.mean(), b - b.mean()
    return (a * b).sum() / ((a**2).sum().sqrt() * (b**2).sum().sqrt())


def smooth_l1(a: Tensor, b: Tensor) -> Tensor:
    d = (a - b).abs()
    return torch.where(d < 1, d**2 / 2, d - 0.5)


def read_ce(o: Any, b: Batch, rows: Terms, state: Terms) -> Terms:
    return {}


def read_kd(o: Any, b: Batch, rows: Terms, state: Terms) -> Terms:
    return {"logit": o.logit_weight * kd(b.logits, rows[TARGET], o.temperature)}


def read_kd_ls(o: Any, b: Batch, rows: Terms, state: Terms) -> Terms:
    s, t = (torch.stack([z_scores(row) for row in z]) for z in (b.logits, rows[TARGET]))
    return {"logit": o.logit_weight * kd(s, t, o.temperature)}


def read_dkd(o: Any, b: Batch, rows: Terms, state: Terms) -> Terms:
    s, t = b.logits, rows[TARGET]
    if o.standardize:
        s, t = (torch.stack([z_scores(row) for row in z]) for z in (s, t))
    tckd, nckd = decoupled(s, t, b.labels, o.temperature)
    grown = min(b.epoch / o.warmup, 1)
    return {"tckd": grown * o.tckd_weight * tckd, "nckd": grown * o.nckd_weight * nckd}


def read_mlkd(o: Any, b: Batch, rows: Terms, state: Terms) -> Terms:
    terms = {name: torch.zeros(()).double() for name in ("instance", "batch", "class")}
    raw = b.logits, rows[TARGET]
    pair = [torch.stack([z_scores(row) for row in z]) for z in raw] if o.standardize else raw
    for temperature in (o.temperature, 2, 3, 5, 6):
        terms["instance"] = terms["instance"] + kd(pair[0], pair[1], temperature)
        s, t = ([softmax(row, temperature) for row in z] for z in raw)
        for i in range(B):
            for j in range(B):
                gap = (t[i] * t[j]).sum() - (s[i] * s[j]).sum()
                terms["batch"] = terms["batch"] + gap**2 / B / 2
        for c in range(C):
            for k in range(C):
                gap = sum(t[i][c] * t[i][k] - s[i][c] * s[i][k] for i in range(B))
                terms["class"] = terms["class"] + gap**2 / C / 2
    return {name: o.logit_weight * term for name, term in terms.items()}


def read_dist(o: Any, b: Batch, rows: Terms, state: Terms) -> Terms:
    s, t = (
        torch.stack([softmax(row, o.temperature) for row in z]) for z in (b.logits, rows[TARGET])
    )
    inter = torch.stack([1 - pearson(s[i], t[i]) for i in range(B)]).mean()
    intra = torch.stack([1 - pearson(s[:, c], t[:, c]) for c in range(C)]).mean()
    square = o.temperature**2
    return {"inter": o.inter_weight * square * inter, "intra": o.intra_weight * square * intra}


def read_rkd(o: Any, b: Batch, rows: Terms, state: Terms) -> Terms:
    def distances(f: Tensor) -> Tensor:
        d = torch.stack(
            [
                torch.stack(
                    [
                        ((f[i] - f[j]) ** 2).sum().clamp_min(1e-30).sqrt()
                        if i != j
                        else f.new_zeros(())
                        for j in range(B)
                    ]
                )
                for i in range(B)
            ]
        )
        return d / (d.sum() / (B * B - B))

    def angles(f: Tensor) -> Tensor:
        out = f.new_zeros(B, B, B)
        for i in range(B):
            for j in range(B):
                for k in range(B):
                    if i not in (j, k):
                        a, c = f[j] - f[i], f[k] - f[i]
                        out[i, j, k] = (a * c).sum() / ((a**2).sum() * (c**2).sum()).sqrt()
        return out

    s, t = b.features, rows["teacher_features"]
    return {
        "distance": o.distance_weight * smooth_l1(distances(s), distances(t)).mean(),
        "angle": o.angle_weight * smooth_l1(angles(s), angles(t)).mean(),
    }


def read_sp(o: Any, b: Batch, rows: Terms, state: Terms) -> Terms:
    def similar(f: Tensor) -> Tensor:
        g = torch.stack([torch.stack([(f[i] * f[j]).sum() for j in range(B)]) for i in range(B)])
        return torch.stack([row / (row**2).sum().sqrt() for row in g])

    gap = similar(rows["teacher_features"]) - similar(b.features)
    return {"feature": o.feature_weight * (gap**2).sum() / B**2}


def read_pkt(o: Any, b: Batch, rows: Terms, state: Terms) -> Terms:
    def neighbours(f: Tensor) -> Tensor:
        unit = [row / (row**2).sum().sqrt() for row in f]
        k = torch.stack([torch.stack([((a * c).sum() + 1) / 2 for c in unit]) for a in unit])
        return torch.stack([row / row.sum() for row in k])

    s, t = neighbours(b.features), neighbours(rows["teacher_features"])
    return {"feature": o.feature_weight * (t * (t / s).log()).sum() / B**2}


def read_vid(o: Any, b: Batch, rows: Terms, state: Terms) -> Terms:
    x = b.features
    for layer in (0, 2, 4):
        x = x @ state[f"information.regressor.{layer}.weight"].T
        x = x if layer == 4 else torch.clamp(x, min=0)
    variance = (1 + state["information.log_scale"].exp()).log() + 1e-5
    gap = (rows["teacher_features"] - x) ** 2
    return {"feature": o.feature_weight * (gap / (2 * variance) + variance.log() / 2).mean()}


def contrast(o: Any, s: Tensor, t: Tensor, b: Batch, state: Terms) -> Tensor:
    """CRD with the whole bank as negatives: nothing is drawn, so every number can be followed."""
    labels = TASK.labels
    total = s.new_zeros(())
    for embedding, bank in (
        (s, state["contrast.teacher_bank"]),
        (t, state["contrast.student_bank"]),
    ):
        scores = [
            [(embedding[i] @ bank[n] / o.crd_temperature).exp() for n in range(N)] for i in range(B)
        ]
        others = [[n for n in range(N) if labels[n] != b.labels[i]] for i in range(B)]
        used = [scores[i][n] for i in range(B) for n in [int(b.index[i]), *others[i]]]
        z = N * float(torch.stack(used).detach().mean())
        for i in range(B):
            k = len(others[i])
            positive = scores[i][int(b.index[i])] / z
            total = total - (positive / (positive + k / N)).log() / B
            for n in others[i]:
                total = total - ((k / N) / (scores[i][n] / z + k / N)).log() / B
    return total


def embed(x: Tensor, state: Terms, which: str) -> Tensor:
    y = x @ state[f"embed_{which}.linear.weight"].T + state[f"embed_{which}.linear.bias"]
    return torch.stack([row / (row**2).sum().sqrt() for row in y])


def read_crd(o: Any, b: Batch, rows: Terms, state: Terms) -> Terms:
    s = embed(b.features, state, "student")
    t = embed(rows["teacher_features"], state, "teacher")
    return {"feature": o.feature_weight * contrast(o, s, t, b, state)}


def read_crd_kd(o: Any, b: Batch, rows: Terms, state: Terms) -> Terms:
    return {**read_crd(o, b, rows, state), **read_kd(o, b, rows, state)}


def read_richkd(o: Any, b: Batch, rows: Terms, state: Terms) -> Terms:
    terms = (read_kd_ls if o.standardize else read_kd)(o, b, rows, state)
    s = embed(b.features, state, "student")
    alpha = 0.6 if o.feature_alpha is None else o.feature_alpha
    fused = alpha * embed(rows["teacher_features"], state, "teacher")
    fused = fused + (1 - alpha) * embed(rows["clip_features"], state, "clip")
    fused = torch.stack([row / (row**2).sum().sqrt() for row in fused])
    return {**terms, "feature": o.feature_weight * contrast(o, s, fused, b, state)}


def read_weighted(o: Any, b: Batch, rows: Terms, state: Terms, task: Task) -> Terms:
    """RichKD with a weight by teacher; the layers of added teachers are ordered by name."""
    s = embed(b.features, state, "student")
    fused = torch.zeros(B, 128).double()
    if task.weights.get("cnn"):
        fused = fused + task.weights["cnn"] * embed(rows["teacher_features"], state, "teacher")
    if task.weights.get("clip"):
        fused = fused + task.weights["clip"] * embed(rows["clip_features"], state, "clip")
    for place, name in enumerate(k for k in sorted(task.others) if task.weights.get(k)):
        own = embed(rows[f"{name}/features"], state, f"others.{place}")
        fused = fused + task.weights[name] * own
    fused = torch.stack([row / (row**2).sum().sqrt() for row in fused])
    logit = read_kd(o, b, rows, state) if o.logit_weight else {}
    return {**logit, "feature": o.feature_weight * contrast(o, s, fused, b, state)}


def of_teachers(o: Any, b: Batch, rows: Terms, weights: list[list[Tensor]]) -> Terms:
    """The mean over teachers and samples of weight times divergence; weights [K][B]."""
    teachers = list(rows.values())
    total = torch.zeros(()).double()
    for k, z in enumerate(teachers):
        for i in range(B):
            p, q = softmax(z[i], o.temperature), softmax(b.logits[i], o.temperature)
            total = total + weights[k][i] * o.temperature**2 * kl(p, q) / (len(teachers) * B)
    return {"logit": o.logit_weight * total}


def read_aver(o: Any, b: Batch, rows: Terms, state: Terms) -> Terms:
    return of_teachers(o, b, rows, [[torch.ones(()).double()] * B for _ in rows])


def read_ebkd(o: Any, b: Batch, rows: Terms, state: Terms) -> Terms:
    h = []
    for z in rows.values():
        p = [softmax(z[i], 1.0) for i in range(B)]
        h.append([-sum(p[i][c] * p[i][c].log() for c in range(C)) for i in range(B)])
    total = [sum(own[i] for own in h) for i in range(B)]
    return of_teachers(o, b, rows, [[1 - own[i] / total[i] for i in range(B)] for own in h])


def read_ca_mkd(o: Any, b: Batch, rows: Terms, state: Terms) -> Terms:
    wrong = [
        [(-softmax(z[i], 1.0)[b.labels[i]].log()).exp() for i in range(B)] for z in rows.values()
    ]
    total = [sum(own[i] for own in wrong) for i in range(B)]
    weights = [[(1 - own[i] / total[i]) / (len(wrong) - 1) for i in range(B)] for own in wrong]
    return of_teachers(o, b, rows, weights)


TASK = Task(labels=torch.arange(N) % C, student_dim=FS, teacher_dim=FT, clip_dim=D, alpha=0.6)
WHOLE_BANK = {"contrast": "bank", "crd_temperature": 0.3}
READINGS: list[tuple[str, dict[str, Any], Callable[..., Terms]]] = [
    ("ce", {"ce_weight": 0.7}, read_ce),
    ("kd", {}, read_kd),
    ("kd", {"temperature": 1.5, "ce_weight": 0.0}, read_kd),
    ("kd-ls", {}, read_kd_ls),
    ("dkd", {}, read_dkd),
    ("dkd", {"warmup": 2, "temperature": 1.0}, read_dkd),
    ("dkd-ls", {}, read_dkd),
    ("mlkd", {}, read_mlkd),
    ("mlkd-ls", {}, read_mlkd),
    ("dist", {}, read_dist),
    ("dist", {"temperature": 1.0, "inter_weight": 2.0, "intra_weight": 0.5}, read_dist),
    ("rkd", {}, read_rkd),
    ("sp", {}, read_sp),
    ("pkt", {}, read_pkt),
    ("vid", {}, read_vid),
    ("crd", WHOLE_BANK, read_crd),
    ("crd-kd", WHOLE_BANK, read_crd_kd),
    ("richkd", WHOLE_BANK, read_richkd),
    ("richkd", {**WHOLE_BANK, "feature_alpha": 0.25}, read_richkd),
    ("richkd-ls", WHOLE_BANK, read_richkd),
]


@pytest.mark.parametrize(("name", "given", "reading"), READINGS)
def test_terms_and_gradients(
    rng: np.random.Generator, name: str, given: dict[str, Any], reading: Callable[..., Terms]
) -> None:
    check_terms(rng, name, given, reading, TASK)


@pytest.mark.parametrize(
    ("weights", "others", "clip_dim"),
    [
        ({"cnn": 0.5, "vit": 0.2, "clip": 0.3}, {"vit": 4}, D),
        ({"clip": 0.4, "b": 0.6, "type": 0.0, "cnn": 0.0}, {"type": 9, "b": 6}, D),
        ({"vit.b": 0.3, "train": 0.45, "cnn": 0.25}, {"train": 3, "vit.b": 4}, 0),
        ({"b": 1.0}, {"b": 6}, 0),
    ],
)
@pytest.mark.parametrize("name", ["richkd", "richkd-f"])
def test_richkd_of_many_teachers(
    rng: np.random.Generator,
    weights: dict[str, float],
    others: dict[str, int],
    clip_dim: int,
    name: str,
) -> None:
    """Rows of teachers that do not count are not there to be read."""
    task = replace(TASK, weights=weights, others=others, clip_dim=clip_dim)
    names = {"cnn": "teacher_features", "clip": "clip_features"}
    counted = {names.get(k, f"{k}/features") for k, weight in weights.items() if weight}
    kind, options = method_class(name, WHOLE_BANK)
    target = {TARGET} if name == "richkd" else set()
    assert set(kind.row_names(options, task)) == target | counted
    check_terms(rng, name, WHOLE_BANK, partial(read_weighted, task=task), task)


@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize(
    ("name", "reading"), [("aver", read_aver), ("ebkd", read_ebkd), ("ca-mkd", read_ca_mkd)]
)
@pytest.mark.parametrize("given", [{}, {"temperature": 1.5, "logit_weight": 0.3, "ce_weight": 0.2}])
def test_several_teachers(
    rng: np.random.Generator,
    name: str,
    reading: Callable[..., Terms],
    count: int,
    given: dict[str, float],
) -> None:
    task = replace(TASK, teachers=("cnn", "clip", "vit.b", "type")[:count])
    check_terms(rng, name, given, reading, task)


def test_weights_of_teachers_that_are_certain(rng: np.random.Generator) -> None:
    """Finite, and equal if nothing tells the teachers apart."""
    labels = torch.from_numpy(rng.integers(0, C, size=B))
    certain = 1e4 * torch.eye(C)[labels].expand(3, B, C)
    for weights in (entropy_weights(certain), confidence_weights(certain, labels)):
        assert torch.allclose(weights, weights[0, 0].expand(3, B))
    wrong = certain.clone()
    wrong[0] = certain[0].roll(1, dims=1)
    weights = confidence_weights(wrong, labels)
    assert torch.allclose(weights[0], torch.zeros(B)) and torch.allclose(
        weights.sum(0), torch.ones(B)
    )


def check_terms(
    rng: np.random.Generator,
    name: str,
    given: dict[str, Any],
    reading: Callable[..., Terms],
    task: Task,
) -> None:
    """Compare a method's terms and gradients with their reading, on random input."""

    def normal(*shape: int) -> Tensor:
        return torch.from_numpy(rng.normal(size=shape))

    kind, options = method_class(name, given)
    torch.manual_seed(int(rng.integers(2**31)))
    method = kind(options, task)
    index = torch.from_numpy(rng.permutation(N)[:B])
    exact = {"logits": 3 * normal(B, C), "features": normal(B, FS)}
    rows = {
        TARGET: 4 * normal(B, C),
        "teacher_features": normal(B, FT),
        "clip_features": torch.nn.functional.normalize(normal(B, D)),
        **{f"{teacher}/features": normal(B, width) for teacher, width in task.others.items()},
        **{f"{teacher}/logits": 4 * normal(B, C) for teacher in task.teachers},
    }
    names = kind.row_names(options, task)
    assert task.weights or task.teachers or names == kind.reads(options)

    def batch(dtype: torch.dtype) -> Batch:
        student = {k: v.to(dtype).requires_grad_() for k, v in exact.items()}
        return Batch(
            labels=task.labels[index],
            index=index,
            epoch=3,
            rows={k: rows[k].to(dtype) for k in names},
            **student,
        )

    got, expected = batch(torch.float32), batch(torch.float64)
    terms = method(got)
    state = {k: v.detach().double() for k, v in method.state_dict().items()}
    wanted = {"ce": options.ce_weight * cross_entropy(expected.logits, expected.labels)}
    wanted |= reading(options, expected, expected.rows, state)
    assert terms.keys() == wanted.keys()
    for key, term in terms.items():
        assert term.dtype == torch.float32 and term.shape == ()
        assert term.item() == pytest.approx(float(wanted[key].detach()), rel=2e-4, abs=1e-6), key
    torch.stack(list(terms.values())).sum().backward()  # type: ignore[no-untyped-call]
    torch.stack([term.double() for term in wanted.values()]).sum().backward()  # type: ignore[no-untyped-call]
    for mine, theirs in ((got.logits, expected.logits), (got.features, expected.features)):
        if theirs.grad is None:
            assert mine.grad is None
            continue
        assert mine.grad is not None
        scale = float(theirs.grad.abs().max())
        torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=1e-3, atol=1e-4 * scale)


def test_the_published_masks_of_mlkd_halve_and_leave_nothing_out(rng: np.random.Generator) -> None:
    """Samples and classes up to the median of the teacher's confidence, times a loss's mean."""
    p = torch.softmax(torch.from_numpy(rng.normal(size=(64, 100))), dim=1).numpy()
    loss = float(rng.uniform(1, 9))
    for confidence in (p.max(axis=1), p.sum(axis=0)):
        mask = confidence <= np.percentile(confidence, 50)
        assert (loss * mask).mean() == pytest.approx(loss / 2)


def test_identical_student_and_teacher_have_nothing_to_match(rng: np.random.Generator) -> None:
    logits = torch.from_numpy(rng.normal(size=(B, C))).float()
    features = torch.from_numpy(rng.normal(size=(B, FT))).float()
    batch = Batch(
        logits,
        features,
        torch.arange(B),
        torch.arange(B),
        {TARGET: logits, "teacher_features": features},
    )
    for name in ("kd", "kd-ls", "dkd", "mlkd", "dist", "rkd", "sp", "pkt"):
        kind, options = method_class(name, {})
        terms = kind(options, TASK)(batch)
        assert all(abs(t.item()) < 1e-3 for k, t in terms.items() if k != "ce"), name


def test_standardised_losses_ignore_shift_and_scale_of_logits(rng: np.random.Generator) -> None:
    logits, target = (torch.from_numpy(rng.normal(size=(B, C))).float() for _ in range(2))
    for name in ("kd-ls", "dkd-ls"):
        kind, options = method_class(name, {"ce_weight": 0.0})
        method = kind(options, TASK)
        losses = []
        for scale, shift in ((1.0, 0.0), (7.0, -3.0)):
            rows = {TARGET: target * scale + shift}
            batch = Batch(logits * scale + shift, logits, torch.arange(B), torch.arange(B), rows)
            losses.append(sum(term.item() for term in method(batch).values()))
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_collapsed_features_give_finite_gradients() -> None:
    for name in ("rkd", "sp", "pkt", "vid"):
        features = torch.zeros(B, FT, requires_grad=True)
        kind, options = method_class(name, {})
        rows = {"teacher_features": torch.randn(B, FT)}
        task = Task(labels=TASK.labels, student_dim=FT, teacher_dim=FT, clip_dim=D, alpha=0.5)
        batch = Batch(torch.zeros(B, C), features, torch.arange(B), torch.arange(B), rows)
        loss = torch.stack(list(kind(options, task)(batch).values())).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        assert features.grad is not None
        assert math.isfinite(loss.item()) and torch.isfinite(features.grad).all(), name
        assert features.grad.abs().max() < 1e6, name
