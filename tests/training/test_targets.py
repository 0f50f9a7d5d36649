"""Targets: teacher, CLIP or fused, by another head, blend or choice of α, against plain numpy."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import refuses, write_clip
from test_distill import metrics, train

import richkd
from richkd.config.settings import Distill
from richkd.core.progress import Report
from richkd.training.probe import fit_probe, stratified_folds
from richkd.training.source import Source
from richkd.training.targets import choose_target, describe_target, held_out

Make = Callable[..., Path]
QUIET = Report(quiet=True)


def target_rows(store: Path, view: int, **settings: Any) -> np.ndarray[Any, Any]:
    """What stage two would give a method as target logits in the epoch that shows a view."""
    chosen = Distill(cache=str(store), **settings)
    source = Source(chosen, QUIET)
    name, _ = source.target(chosen, "teacher")
    rows, _ = next(source.epochs([name], view + 1, view + 1))
    return rows.rows[name].float().numpy()


def read(store: Path, name: str, view: int | None = None) -> np.ndarray[Any, Any]:
    return richkd.open_cache(store).read(name, view).numpy().astype(np.float64)


def test_each_target_is_what_its_name_says(store: Path) -> None:
    manifest = richkd.open_cache(store).manifest
    clip = manifest["clip"]
    assert clip is not None
    cosines = read(store, "train/clip_similarity")
    for view in (0, 2):
        teacher = read(store, "train/teacher_logits", view)
        assert np.array_equal(target_rows(store, view), teacher)
        assert np.array_equal(
            target_rows(store, view, target="fused"), read(store, "train/fused_logits", view)
        )
        native = clip["logit_scale"] * cosines
        np.testing.assert_allclose(target_rows(store, view, target="clip"), native, rtol=1e-5)
        np.testing.assert_allclose(
            target_rows(store, view, target="clip", scale=7.0), 7 * cosines, rtol=1e-5
        )
        other = target_rows(store, view, target="fused", alpha=0.25, scale="raw")
        np.testing.assert_allclose(other, 0.25 * teacher + 0.75 * cosines, rtol=2e-3, atol=1e-3)


def test_a_bias_is_part_of_logits_at_clips_own_scale(
    make_store: Make, tmp_path: Path, run: Callable[..., Any]
) -> None:
    """Stage one, the cache, the check of it, and targets, with a CLIP like SigLIP."""
    siglip = write_clip(tmp_path / "siglip", init_logit_bias=-11.5)
    store = make_store(clip=str(siglip), dtype="float32", alpha=0.25)
    cache = richkd.open_cache(store)
    clip = cache.manifest["clip"]
    assert clip is not None and clip["logit_bias"] == -11.5
    cosines, teacher = read(store, "train/clip_similarity"), read(store, "train/teacher_logits", 1)
    native = clip["logit_scale"] * cosines - 11.5
    close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-4)
    close(read(store, "train/fused_logits", 1), 0.25 * teacher + 0.75 * native)
    close(cache.fuse(1, alpha=0.5).numpy(), 0.5 * teacher + 0.5 * native)
    close(cache.fuse(1, alpha=0.5, scale="raw").numpy(), 0.5 * teacher + 0.5 * cosines)
    close(target_rows(store, 1, target="clip"), native)
    close(target_rows(store, 1, target="clip", scale=7.0), 7 * cosines)
    close(target_rows(store, 1, target="fused", alpha=0.5), 0.5 * teacher + 0.5 * native)
    chosen = choose_target(cache, Distill(cache=str(store), alpha="auto"), "fused", QUIET)
    assert not any(part.shift for part in chosen.parts)  # its scale is a number
    assert run("verify", store).code == 0


def test_other_clips_have_none(store: Path) -> None:
    clip = richkd.open_cache(store).manifest["clip"]
    assert clip is not None and "logit_bias" not in clip


def test_fewer_prompts(store: Path) -> None:
    text = read(store, "text/embeddings")[:, [1, 4]]
    classes = text.mean(1) / np.linalg.norm(text.mean(1), axis=-1, keepdims=True)
    cosines = read(store, "train/clip_features") @ classes.T
    got = target_rows(store, 0, target="clip", scale="raw", prompts=(1, 4))
    np.testing.assert_allclose(got, cosines, atol=1e-3)


@pytest.mark.parametrize("method", ["kd", "dkd", "mlkd", "dist", "richkd-l"])
@pytest.mark.parametrize("target", ["teacher", "clip", "fused"])
def test_any_logit_method_takes_any_target(
    store: Path, tmp_path: Path, method: str, target: str
) -> None:
    summary = train(store, tmp_path / "a", method=method, target=target, epochs=1)
    assert summary["target"]["kind"] == target
    labels = read(store, "test/labels")
    if target == "fused":
        logits = read(store, "test/fused_logits")
    elif target == "clip":
        logits = read(store, "test/clip_similarity") * summary["target"]["scale"]
    else:
        logits = read(store, "test/teacher_logits")
    assert summary["target"]["top1"] == pytest.approx((logits.argmax(1) == labels).mean())
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    nll = -log_p[np.arange(len(labels)), labels.astype(int)].mean()
    assert summary["target"]["nll"] == pytest.approx(nll, rel=1e-3)
    train(store, tmp_path / "b", method=method, target="teacher", epochs=1)
    same = metrics(tmp_path / "a")[0]["loss"] == metrics(tmp_path / "b")[0]["loss"]
    assert same == (target == "teacher")


def gaussians(rng: np.random.Generator, n: int, classes: int, d: int) -> tuple[Any, Any]:
    labels = np.arange(n) % classes
    centers = np.eye(classes, d) * 2
    x = centers[labels] + rng.normal(size=(n, d))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    return torch.from_numpy(x).float(), torch.from_numpy(labels)


def newton(z: Any, labels: Any, penalty: float) -> Any:
    """Weights and, in the last row, biases of least penalised cross-entropy, in float64."""

    def loss(flat: Any) -> Any:
        head = flat.view(-1, 3)
        scores = z @ head[:-1] + head[-1]
        own = scores[torch.arange(len(z)), labels]
        return (scores.logsumexp(1) - own).mean() + penalty / 2 * flat.square().sum()

    flat = torch.zeros(3 * (z.shape[1] + 1), dtype=torch.float64)
    for _ in range(100):
        slope = torch.autograd.functional.jacobian(loss, flat)
        step = torch.linalg.solve(torch.autograd.functional.hessian(loss, flat), slope)
        length = 1.0
        while loss(flat - length * step) > loss(flat) and length > 1e-9:
            length /= 2
        flat = flat - length * step
    assert slope.abs().max() < 1e-9
    return flat.view(-1, 3)


@pytest.mark.slow
def test_a_probe_is_the_penalised_maximum_of_likelihood_out_of_fold(
    rng: np.random.Generator,
) -> None:
    x, labels = gaussians(rng, 60, 3, 6)
    test, _ = gaussians(rng, 9, 3, 6)
    probe = fit_probe(x, labels, test, 3, folds=4, seed=5)
    fold = stratified_folds(labels, 4, seed=5)
    mean, std = x.double().mean(0), x.double().std(0)
    z, z_test = (x.double() - mean) / std, (test.double() - mean) / std
    tests = []
    for number in range(4):
        seen = fold != number
        head = newton(z[seen], labels[seen], probe.penalty)
        expected = z[~seen] @ head[:-1] + head[-1]
        torch.testing.assert_close(
            probe.train_logits[~seen].double(), expected, rtol=0.02, atol=0.02
        )
        tests.append(z_test @ head[:-1] + head[-1])
    torch.testing.assert_close(
        probe.other_logits.double(), torch.stack(tests).mean(0), rtol=0.02, atol=0.02
    )


def test_no_sample_is_scored_by_a_head_that_saw_its_label(rng: np.random.Generator) -> None:
    """With labels that mean nothing, an honest head is at chance; one that saw them is not."""
    x = torch.nn.functional.normalize(torch.from_numpy(rng.normal(size=(400, 64))).float(), dim=1)
    labels = torch.from_numpy(rng.integers(0, 4, 400))
    probe = fit_probe(x, labels, x, 4)
    honest = (probe.train_logits.argmax(1) == labels).float().mean()
    saw = (probe.other_logits.argmax(1) == labels).float().mean()
    assert honest < 0.35 and saw > 0.4
    assert probe.nll == pytest.approx(np.log(4), abs=0.1)  # one that overfits is at 2
    again = fit_probe(x, labels, x, 4)
    assert torch.equal(again.train_logits, probe.train_logits)


def test_the_probe_head_as_target(store: Path, tmp_path: Path) -> None:
    cache = richkd.open_cache(store)
    probe = fit_probe(
        cache.read("train/clip_features"),
        cache.read("train/labels"),
        cache.read("test/clip_features"),
        cache.num_classes,
    )
    fused = target_rows(store, 1, target="fused", clip_head="probe", alpha=0.4)
    expected = 0.4 * read(store, "train/teacher_logits", 1) + 0.6 * probe.train_logits.numpy()
    np.testing.assert_allclose(fused, expected, rtol=2e-3, atol=2e-3)
    summary = train(store, tmp_path / "a", method="richkd-l", clip_head="probe", epochs=1)
    assert summary["target"]["head"] == "probe"
    labels = cache.read("train/labels")
    top1 = (probe.train_logits.argmax(1) == labels).float().mean().item()
    assert summary["target"]["out_of_fold_top1"] == pytest.approx(top1)


def test_alpha_auto_is_the_best_of_the_held_out_images(store: Path, tmp_path: Path) -> None:
    settings = {"method": "richkd-l", "alpha": "auto", "holdout": 0.5, "epochs": 1}
    summary = train(store, tmp_path / "a", **settings)
    chosen = summary["target"]
    held, tested = held_out(40, 0.5)
    assert len(held) == len(tested) == 20 and not set(held.tolist()) & set(tested.tolist())
    labels = read(store, "test/labels")[held].astype(int)
    teacher = read(store, "test/teacher_logits")[held]
    cosines = read(store, "test/clip_similarity")[held]

    def nll(alpha: float, scale: float) -> float:
        z = alpha * teacher + (1 - alpha) * scale * cosines
        log_p = z - z.max(1, keepdims=True)
        log_p -= np.log(np.exp(log_p).sum(1, keepdims=True))
        return float(-log_p[np.arange(20), labels].mean())

    native = richkd.open_cache(store).manifest["clip"]["logit_scale"]  # type: ignore[index]
    grid = [(a, native * 2 ** (k / 2)) for a in np.arange(21) / 20 for k in range(-24, 7)]
    best = min(nll(a, s) for a, s in grid)
    assert chosen["held_out_nll"] == pytest.approx(best, rel=1e-4)
    assert nll(chosen["alpha"], chosen["scale"]) == pytest.approx(best, rel=1e-4)
    # and the student is tested on the other images only
    model = richkd.create_model("resnet8", 16).eval()
    from safetensors.torch import load_file

    model.load_state_dict(load_file(tmp_path / "a" / "last.safetensors"))
    cache = richkd.open_cache(store)
    mean, std = (torch.tensor(cache.manifest[key]) for key in ("mean", "std"))
    x = ((cache.read("test/images").float() / 255 - mean) / std).permute(0, 3, 1, 2)[tested]
    with torch.no_grad():
        hits = (model(x).argmax(1) == cache.read("test/labels")[tested]).float().mean().item()
    assert summary["top1_last"] == pytest.approx(hits)


def test_alpha_auto_with_a_given_scale_chooses_alpha_alone(store: Path) -> None:
    cache = richkd.open_cache(store)
    settings = Distill(cache=str(store), alpha="auto", scale=30.0)
    target = choose_target(cache, settings, "fused", QUIET)
    assert target.about["scale"] == 30.0
    about = describe_target(target, cache, held_out(40, 0.2)[1])
    assert about["alpha"] == target.alpha and 0 <= about["top1"] <= 1


@pytest.mark.parametrize(
    ("settings", "code", "flag"),
    [
        ({"method": "crd", "target": "fused"}, "target-not-taken", "--target"),
        ({"method": "kd", "target": "both"}, "unknown-name", "choose from clip, fused, teacher"),
        ({"method": "kd", "alpha": "auto"}, "alpha-auto-without-blend", "--target fused"),
        (
            {"method": "richkd-l", "clip_head": "probe", "scale": "raw"},
            "scale-with-probe",
            "--scale",
        ),
        (
            {"method": "richkd-l", "clip_head": "probe", "prompts": (1,)},
            "prompts-with-probe",
            "--prompts",
        ),
    ],
)
def test_settings_that_contradict_each_other(
    store: Path, tmp_path: Path, settings: dict[str, Any], code: str, flag: str
) -> None:
    with refuses(code, flag):
        train(store, tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()


def test_targets_of_a_store_without_clip(make_store: Make, tmp_path: Path) -> None:
    bare = make_store(clip="none")
    assert train(bare, tmp_path / "kd", method="kd", epochs=1)["target"]["kind"] == "teacher"
    for settings in (
        {"method": "kd", "target": "clip"},
        {"method": "dkd", "target": "fused"},
        {"method": "richkd-l"},
        {"method": "kd", "target": "fused", "clip_head": "probe"},
        {"method": "richkd-f", "target": ""},
    ):
        with refuses("array-absent", "--clip none", "--method kd"):
            train(bare, tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [("clip_head", "linear"), ("holdout", 1.0), ("holdout", -0.1)],
)
def test_values_out_of_range(name: str, value: Any) -> None:
    with refuses("value-out-of-range" if name == "holdout" else "unknown-name", name, value):
        Distill(cache="c.zarr", **{name: value})


def test_the_share_held_out_is_resolved_by_what_is_chosen() -> None:
    def resolved(validation: bool = False, choosing: bool = False, **settings: Any) -> Any:
        return Distill(cache="c.zarr", **settings).with_holdout(validation, choosing).holdout

    assert resolved() == 0.0
    assert resolved(alpha="auto") == 0.2 and resolved(choosing=True) == 0.2
    assert resolved(alpha="auto", holdout=0.5) == 0.5 and resolved(holdout=0.3) == 0.3
    assert resolved(True, alpha="auto") == 0.0 and resolved(True, True) == 0.0
    for choosing in ({"alpha": "auto"}, {"choosing": True}):
        with refuses("value-out-of-range", "holdout = 0.0"):
            resolved(holdout=0.0, **choosing)
    with refuses("value-out-of-range", "holdout = 0.2"):
        resolved(True, holdout=0.2)


def test_a_probe_needs_a_sample_a_fold() -> None:
    with refuses("probe-too-few-samples", 5, 3, "--clip-head zero-shot"):
        fit_probe(torch.ones(3, 2), torch.arange(3), torch.ones(1, 2), 3)
