"""Methods: what they read, how their terms add up, and their options."""

import runpy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import refuses

from richkd.losses import (
    METHODS,
    Batch,
    Task,
    describe_method,
    method_class,
    method_options,
)
from richkd.losses.method import EVERY, TARGET

FEATURES = {"teacher_features"}
SEVERAL = ("aver", "ebkd", "ca-mkd")
READS = {
    "ce": set(),
    **{name: {TARGET} for name in ("kd", "kd-ls", "dkd", "dkd-ls", "mlkd", "mlkd-ls", "dist")},
    **dict.fromkeys(("crd", "rkd", "sp", "pkt", "vid"), FEATURES),
    "crd-kd": {TARGET, *FEATURES},
    **{name: {EVERY} for name in SEVERAL},
    "richkd": {TARGET, "teacher_features", "clip_features"},
    "richkd-ls": {TARGET, "teacher_features", "clip_features"},
    "richkd-l": {TARGET},
    "richkd-f": {"teacher_features", "clip_features"},
}
TASK = Task(
    labels=torch.arange(20) % 4,
    student_dim=6,
    teacher_dim=5,
    clip_dim=7,
    alpha=0.7,
    teachers=("cnn", "clip"),
)


def batch(rng: np.random.Generator) -> Batch:
    def normal(*shape: int) -> torch.Tensor:
        return torch.from_numpy(rng.normal(size=shape)).float()

    index = torch.tensor([3, 17, 8, 5])
    rows = {
        TARGET: normal(4, 4),
        "teacher_features": normal(4, 5),
        "clip_features": F.normalize(normal(4, 7)),
        "cnn/logits": normal(4, 4),
        "clip/logits": normal(4, 4),
    }
    return Batch(normal(4, 4), normal(4, 6), TASK.labels[index], index, rows)


def test_every_method_reads_what_it_says_and_nothing_else(rng: np.random.Generator) -> None:
    assert set(METHODS) == set(READS)
    for name, reads in READS.items():
        kind, options = method_class(name, {})
        assert set(kind.reads(options)) == reads
        full = batch(rng)
        rows = {key: full.rows[key] for key in kind.row_names(options, TASK)}
        method = kind(options, TASK)
        terms = method(Batch(full.logits, full.features, full.labels, full.index, rows))
        assert all(term.ndim == 0 and torch.isfinite(term) for term in terms.values())
        method.update()


def test_richkd_terms_against_float64(rng: np.random.Generator) -> None:
    kind, options = method_class("richkd", {"negatives": 6})
    method = kind(options, TASK)
    b = batch(rng)
    torch.manual_seed(5)
    terms = method(b)

    z, y, target = b.logits.double(), b.labels, b.rows[TARGET].double()
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
    fresh = kind(options, TASK).contrast
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
        method = kind(options, TASK)
        torch.manual_seed(1)
        terms[name] = method(b)
    whole = terms["richkd"]
    assert set(terms["richkd-l"]) == {"ce", "logit"} and set(terms["richkd-f"]) == {"ce", "feature"}
    assert torch.equal(terms["richkd-l"]["logit"], whole["logit"])
    assert torch.equal(terms["richkd-f"]["feature"], whole["feature"])


def test_features_may_have_a_blend_of_their_own(rng: np.random.Generator) -> None:
    b = batch(rng)
    terms = {}
    for alpha in (None, 0.7, 0.2):
        given = {} if alpha is None else {"feature_alpha": alpha}
        kind, options = method_class("richkd", {"negatives": 6, **given})
        torch.manual_seed(0)
        terms[alpha] = kind(options, TASK)(b)  # whose alpha is 0.7
    assert torch.equal(terms[None]["feature"], terms[0.7]["feature"])
    assert not torch.equal(terms[None]["feature"], terms[0.2]["feature"])
    assert torch.equal(terms[None]["logit"], terms[0.2]["logit"])


def test_weights_of_two_teachers_are_alpha(rng: np.random.Generator) -> None:
    """Bit for bit, and from the same random draws."""
    b, found = batch(rng), []
    for weights in ({}, {"clip": 1 - TASK.alpha, "cnn": TASK.alpha, "vit": 0.0}):
        kind, options = method_class("richkd", {"negatives": 6})
        torch.manual_seed(0)
        method = kind(options, replace(TASK, weights=weights, others={"vit": 3}))
        found.append((method.state_dict(), method(b)))
    assert found[0][0].keys() == found[1][0].keys()
    for mine, theirs in zip(*found, strict=True):
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_features_are_fused_by_one_rule() -> None:
    kind, options = method_class("richkd", {"feature_alpha": 0.5})
    task = replace(TASK, weights={"cnn": 0.4, "vit": 0.6}, others={"vit": 3})
    with refuses("feature-alpha-with-weights", 0.5, "cnn=0.4,vit=0.6"):
        kind(options, task)


@pytest.mark.parametrize("name", SEVERAL)
@pytest.mark.parametrize("teachers", [(), ("cnn",)])
def test_one_teacher_cannot_be_weighed_against_others(name: str, teachers: tuple[str, ...]) -> None:
    kind, options = method_class(name, {})
    with refuses("method-needs-teachers", *teachers, "add-teacher"):
        kind(options, replace(TASK, teachers=teachers))


# As published; tests/config/published/methods.toml says where.
PUBLISHED = {
    "richkd": {
        "ce_weight": 1.0,
        "logit_weight": 3.0,
        "feature_weight": 0.8,
        "temperature": 3.0,
        "negatives": 16384,
        "crd_temperature": 0.07,
        "bank_momentum": 0.5,
        "contrast": "exact",
        "standardize": False,
        "feature_alpha": None,
    },
    "kd": {"ce_weight": 0.1, "logit_weight": 0.9, "temperature": 4.0},
    "kd-ls": {"ce_weight": 0.1, "logit_weight": 9.0, "temperature": 2.0, "standardize": True},
    "dkd": {
        "ce_weight": 1.0,
        "tckd_weight": 1.0,
        "nckd_weight": 8.0,
        "temperature": 4.0,
        "warmup": 20,
    },
    "dkd-ls": {"tckd_weight": 9.0, "nckd_weight": 72.0, "temperature": 2.0, "standardize": True},
    "mlkd": {"ce_weight": 0.1, "logit_weight": 0.9, "temperature": 4.0},
    "mlkd-ls": {"ce_weight": 0.1, "logit_weight": 9.0, "temperature": 2.0, "standardize": True},
    "dist": {"ce_weight": 1.0, "inter_weight": 2.0, "intra_weight": 2.0, "temperature": 4.0},
    "crd": {"ce_weight": 1.0, "feature_weight": 0.8, "negatives": 16384},
    "crd-kd": {"ce_weight": 1.0, "logit_weight": 1.0, "temperature": 4.0, "feature_weight": 0.8},
    "rkd": {"ce_weight": 1.0, "distance_weight": 25.0, "angle_weight": 50.0},
    "sp": {"ce_weight": 1.0, "feature_weight": 3000.0},
    "pkt": {"ce_weight": 1.0, "feature_weight": 30000.0},
    "vid": {"ce_weight": 1.0, "feature_weight": 1.0},
    **{name: {"ce_weight": 1.0, "logit_weight": 1.0, "temperature": 4.0} for name in SEVERAL},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_weights(name: str) -> None:
    options = method_class(name, {})[1]
    assert {key: getattr(options, key) for key in PUBLISHED[name]} == PUBLISHED[name]


def test_every_method_can_be_described() -> None:
    for name in METHODS:
        entry = describe_method(name)
        assert entry["about"].endswith(".") and len(entry["about"]) <= 120
        assert entry["target"] == (
            None if TARGET not in READS[name] else "fused" if "richkd" in name else "teacher"
        )


def test_what_is_not_on_the_features_of_the_published_code_says_so() -> None:
    for name in ("sp", "vid"):
        assert "on pooled features, not on maps" in describe_method(name)["about"]
    for name in ("rkd", "pkt"):  # RepDistiller's take pooled features as well
        assert describe_method(name)["about"].endswith("on pooled features.")


def test_options_are_by_method() -> None:
    options = {"kd": {"temperature": 2}, "crd": {"negatives": 8}}
    assert method_options(options, "kd") == {"temperature": 2}
    assert method_options(options, "dkd") == {}
    with refuses("unknown-name", "'kdd'", "kd"):
        method_options({"kdd": {}}, "kd")
    with refuses("options-not-by-method", "options.temperature", 2, "[distill.options.kd]"):
        method_options({"temperature": 2}, "kd")


@pytest.mark.parametrize(
    ("name", "options", "code", "values"),
    [
        ("richKD", {}, "unknown-name", ("'richKD'", "richkd")),
        ("kd", {"temprature": 4}, "unknown-option", ("'temprature'", "temperature")),
        ("kd", {"temperature": 0}, "option-out-of-range", ("method kd", "temperature", 0)),
        ("kd", {"ce_weight": -1}, "option-out-of-range", ("ce_weight", -1)),
        ("kd", {"ce_weight": float("nan")}, "option-out-of-range", ("ce_weight", "nan")),
        ("kd", {"ce_weight": float("inf")}, "option-out-of-range", ("ce_weight", "inf")),
        ("richkd", {"negatives": 2.5}, "option-out-of-range", ("negatives", 2.5, "integer")),
        ("crd", {"contrast": "some"}, "option-out-of-range", ("'some'", "exact", "shared", "bank")),
        ("crd", {"bank_momentum": 1.5}, "option-out-of-range", ("bank_momentum", 1.5)),
        ("kd", {"temperature": "4"}, "option-out-of-range", ("temperature", "'4'", "number")),
        ("kd", {"standardize": 1}, "option-out-of-range", ("standardize", 1, "true or false")),
        ("dkd", {"warmup": 0}, "option-out-of-range", ("warmup", 0)),
        ("dkd", {"warmup": True}, "option-out-of-range", ("warmup", True, "integer")),
        ("richkd", {"feature_alpha": 1.5}, "option-out-of-range", ("feature_alpha", 1.5)),
        ("richkd", {"feature_alpha": float("nan")}, "option-out-of-range", ("feature_alpha",)),
        ("richkd", {"feature_alpha": "half"}, "option-out-of-range", ("'half'", "number")),
    ],
)
def test_bad_options(
    name: str, options: dict[str, object], code: str, values: tuple[object, ...]
) -> None:
    with refuses(code, *values):
        method_class(name, options)
    if code == "option-out-of-range":
        with refuses(code, *values[-2:]):
            METHODS[name][0].Options(**options)


def test_the_method_of_the_contributing_page_works(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    page = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    code = page.split("```python\n")[1].split("```")[0]
    assert len([line for line in code.splitlines() if line.strip()]) <= 24
    monkeypatch.setitem(METHODS, "regression", METHODS["kd"])  # taken away again afterwards
    del METHODS["regression"]
    (tmp_path / "regression.py").write_text(code)
    runpy.run_path(str(tmp_path / "regression.py"))
    kind, options = method_class("regression", {"logit_weight": 2.0})
    logits, target = torch.randn(4, 5), torch.randn(4, 5)
    b = Batch(logits, logits, torch.arange(4), torch.arange(4), {TARGET: target})
    expected = 2 * ((logits - target) ** 2).sum() / 20
    assert kind(options, TASK)(b)["logit"].item() == pytest.approx(expected.item(), rel=1e-5)
