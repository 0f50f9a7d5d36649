"""Methods: what they read, how their terms add up, and their options."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from richkd.errors import RichKDError
from richkd.losses import METHODS, Batch, Widths, method_class

READS = {
    "ce": set(),
    "kd": {"teacher_logits"},
    "crd": {"teacher_features"},
    "richkd": {"fused_logits", "teacher_features", "clip_features"},
    "richkd-l": {"fused_logits"},
    "richkd-f": {"teacher_features", "clip_features"},
}
WIDTHS = Widths(labels=torch.arange(20) % 4, student=6, teacher=5, clip=7, alpha=0.7)


def batch(rng: np.random.Generator) -> Batch:
    def normal(*shape: int) -> torch.Tensor:
        return torch.from_numpy(rng.normal(size=shape)).float()

    index = torch.tensor([3, 17, 8, 5])
    rows = {"teacher_logits": normal(4, 4), "fused_logits": normal(4, 4),
            "teacher_features": normal(4, 5),
            "clip_features": F.normalize(normal(4, 7))}  # fmt: skip
    return Batch(normal(4, 4), normal(4, 6), WIDTHS.labels[index], index, rows)


def test_every_method_reads_what_it_says_and_nothing_else(rng: np.random.Generator) -> None:
    assert set(METHODS) == set(READS)
    for name, reads in READS.items():
        kind, options = method_class(name, {})
        assert set(kind.reads(options)) == reads
        full = batch(rng)
        rows = {key: full.rows[key] for key in reads}
        method = kind(options, WIDTHS)
        terms = method(Batch(full.logits, full.features, full.labels, full.index, rows))
        assert all(term.ndim == 0 and torch.isfinite(term) for term in terms.values())
        method.update()


def test_richkd_terms_against_float64(rng: np.random.Generator) -> None:
    kind, options = method_class("richkd", {"negatives": 6})
    method = kind(options, WIDTHS)
    b = batch(rng)
    torch.manual_seed(5)
    terms = method(b)

    z, y, target = b.logits.double(), b.labels, b.rows["fused_logits"].double()
    ce = -(z - z.logsumexp(1, keepdim=True))[range(4), y].mean()
    p = torch.softmax(target / 3, 1)
    q = torch.softmax(z / 3, 1)
    logit = 9 * (p * (p.log() - q.log())).sum(1).mean()
    assert terms["ce"].item() == pytest.approx(ce.item(), rel=1e-5)
    assert terms["logit"].item() == pytest.approx(3 * logit.item(), rel=1e-4)

    def embed(layer: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
        out = x.double() @ layer.weight.double().T + layer.bias.double()
        return out / out.norm(dim=1, keepdim=True)

    fused = 0.7 * embed(method.embed_teacher.linear, b.rows["teacher_features"])
    fused = fused + 0.3 * embed(method.embed_clip.linear, b.rows["clip_features"])
    fused = fused / fused.norm(dim=1, keepdim=True)
    student = embed(method.embed_student.linear, b.features)
    kind, options = method_class("richkd", {"negatives": 6})
    fresh = kind(options, WIDTHS).contrast
    fresh.student_bank.copy_(method.contrast.student_bank)
    fresh.teacher_bank.copy_(method.contrast.teacher_bank)
    torch.manual_seed(5)  # the same negatives
    feature = fresh(student.float(), fused.float(), b.index)
    assert terms["feature"].item() == pytest.approx(0.8 * feature.item(), rel=1e-4)


def test_variants_are_parts_of_the_whole(rng: np.random.Generator) -> None:
    b = batch(rng)
    terms = {}
    for name in ("richkd", "richkd-l", "richkd-f"):
        kind, options = method_class(name, {})
        torch.manual_seed(0)
        method = kind(options, WIDTHS)
        torch.manual_seed(1)
        terms[name] = method(b)
    whole = terms["richkd"]
    assert set(terms["richkd-l"]) == {"ce", "logit"} and set(terms["richkd-f"]) == {"ce", "feature"}
    assert torch.equal(terms["richkd-l"]["logit"], whole["logit"])
    assert torch.equal(terms["richkd-f"]["feature"], whole["feature"])


def test_released_weights() -> None:
    options = method_class("richkd", {})[1]
    assert (options.ce_weight, options.logit_weight, options.feature_weight) == (1.0, 3.0, 0.8)
    assert (options.temperature, options.negatives) == (3.0, 16384)
    assert (options.crd_temperature, options.bank_momentum) == (0.07, 0.5)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("richKD", {}, "unknown method 'richKD'.*richkd"),
        ("kd", {"temprature": 4}, "no option 'temprature'.*temperature"),
        ("kd", {"temperature": 0}, "temperature = 0.*above 0"),
        ("kd", {"ce_weight": -1}, "ce_weight = -1"),
        ("kd", {"ce_weight": float("nan")}, "ce_weight = nan"),
        ("richkd", {"negatives": 2.5}, "negatives = 2.5 should be a whole number"),
        ("kd", {"temperature": "4"}, "temperature = '4' should be a number"),
    ],
)
def test_bad_options(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(RichKDError, match=message):
        method_class(name, options)
