"""`richkd analyze`: its figures computed from the plain arrays, and caches without CLIP."""

from __future__ import annotations

import io
import json
from base64 import b64decode
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.special
import scipy.stats
import zarr
from helpers import Refusal
from PIL import Image

from richkd.analysis import teachers
from richkd.analysis.teachers import ALPHAS, analyze, images_as_png
from richkd.report.analysis import WITHOUT_CLIP
from richkd.store.reader import open_cache

Run = Callable[..., Any]
Fails = Callable[..., Refusal]


@pytest.fixture(scope="module")
def analysis(store: Path) -> dict[str, Any]:
    return analyze(open_cache(store), threshold=0.3)


@pytest.fixture(scope="module")
def arrays(store: Path) -> dict[str, Any]:
    """The test split by plain zarr, in float64."""
    group: Any = zarr.open_group(store, mode="r")
    return {
        "labels": group["test/labels"][:],
        "cnn": group["test/teacher_logits"][:].astype(np.float64),
        "cosine": group["test/clip_similarity"][:].astype(np.float64),
        "image": group["test/clip_features"][:].astype(np.float64),
        "features": group["test/teacher_features"][:].astype(np.float64),
        "text": group["text/embeddings"][:].astype(np.float64),
        "attributes": dict(group.attrs),
    }


def top1(logits: np.ndarray, labels: np.ndarray) -> float:
    return float(np.mean(logits.argmax(1) == labels))


def nll(logits: np.ndarray, labels: np.ndarray) -> float:
    p = scipy.special.log_softmax(logits, axis=1)
    return float(-np.mean(p[np.arange(len(labels)), labels]))


def test_the_teachers_of_the_store(analysis: dict[str, Any], arrays: dict[str, Any]) -> None:
    a, native = arrays["attributes"]["alpha"], arrays["attributes"]["clip"]["logit_scale"]
    stored = {"native": native, "raw": 1.0}[arrays["attributes"]["scale"]]
    logits = {
        "cnn": arrays["cnn"],
        "clip": native * arrays["cosine"],
        "fused": a * arrays["cnn"] + (1 - a) * stored * arrays["cosine"],
        "raw": a * arrays["cnn"] + (1 - a) * arrays["cosine"],
        "native": a * arrays["cnn"] + (1 - a) * native * arrays["cosine"],
    }
    assert {*analysis["teachers"]} == {*logits} - {arrays["attributes"]["scale"]}
    for kind, scores in analysis["teachers"].items():
        own, labels = logits[kind], arrays["labels"]
        confident = scipy.special.softmax(own, axis=1).max(1) >= 0.3
        right = own.argmax(1) == labels
        assert scores["top1"] == pytest.approx(top1(own, labels), abs=1e-6)
        assert scores["nll"] == pytest.approx(nll(own, labels), rel=1e-5)
        assert scores["confident_correct"] == pytest.approx(np.mean(confident & right), abs=1e-6)
        assert scores["confident_wrong"] == pytest.approx(np.mean(confident & ~right), abs=1e-6)
    recorded = arrays["attributes"]["teacher"]["accuracy"]
    assert analysis["teachers"]["cnn"]["top1"] == pytest.approx(recorded)


def test_disagreement_is_a_partition(analysis: dict[str, Any], arrays: dict[str, Any]) -> None:
    cases = {row["case"]: row for row in analysis["disagreement"]}
    assert sum(row["share"] for row in cases.values()) == pytest.approx(1)
    cnn, clip = (arrays[kind].argmax(1) == arrays["labels"] for kind in ("cnn", "cosine"))
    same = arrays["cnn"].argmax(1) == arrays["cosine"].argmax(1)
    assert cases["both right"]["share"] == pytest.approx(np.mean(cnn & clip))
    assert cases["only CLIP right"]["share"] == pytest.approx(np.mean(~cnn & clip))
    assert cases["both wrong, the same class"]["share"] == pytest.approx(np.mean(~cnn & same))
    a, scale = arrays["attributes"]["alpha"], arrays["attributes"]["clip"]["logit_scale"]
    fused = a * arrays["cnn"] + (1 - a) * scale * arrays["cosine"]
    alone = ~cnn & clip
    if alone.any():
        expected = np.mean(fused[alone].argmax(1) == arrays["labels"][alone])
        assert cases["only CLIP right"]["fused_top1"] == pytest.approx(expected)
    right = sum(row["share"] * (row["fused_top1"] or 0) for row in cases.values())
    assert right == pytest.approx(analysis["teachers"]["fused"]["top1"])


def test_classes_that_change(store: Path, analysis: dict[str, Any], arrays: dict[str, Any]) -> None:
    names, labels = arrays["attributes"]["class_names"], arrays["labels"]
    cache = open_cache(store)
    fused = cache.read("test/fused_logits").double().numpy()
    change = {
        name: np.mean(fused[labels == c].argmax(1) == c)
        - np.mean(arrays["cnn"][labels == c].argmax(1) == c)
        for c, name in enumerate(names)
        if (labels == c).any()
    }
    found = analysis["class_changes"]
    assert {row["class"] for row in found["gain"]} <= {n for n, d in change.items() if d > 0}
    assert {row["class"] for row in found["lose"]} <= {n for n, d in change.items() if d < 0}
    for kind, sign in (("gain", 1), ("lose", -1)):
        ours = [sign * (row["fused"] - row["cnn"]) for row in found[kind]]
        theirs = sorted((sign * d for d in change.values() if sign * d > 0), reverse=True)[:10]
        assert ours == pytest.approx(theirs)
        for row in found[kind]:
            for sample in row["samples"]:
                assert names[labels[sample]] == row["class"]
                right = fused[sample].argmax() == labels[sample]
                assert right == (kind == "gain")
    shown = images_as_png(cache, "test", [3])
    image = Image.open(io.BytesIO(b64decode(shown[3].partition(",")[2])))
    assert np.array_equal(np.array(image), cache.read("test/images")[3].numpy())


def test_the_effect_of_the_blend(analysis: dict[str, Any], arrays: dict[str, Any]) -> None:
    labels, blend = arrays["labels"], analysis["blend"]
    native = arrays["attributes"]["clip"]["logit_scale"]
    assert len(blend["alpha"]) == 2 * len(ALPHAS)
    for row in blend["alpha"]:
        scale = {"raw": 1.0, "native": native}[row["scale"]]
        fused = row["alpha"] * arrays["cnn"] + (1 - row["alpha"]) * scale * arrays["cosine"]
        assert row["nll"] == pytest.approx(nll(fused, labels), rel=1e-4)
    ends = {(row["scale"], row["alpha"]): row["top1"] for row in blend["alpha"]}
    assert ends["native", 0.0] == ends["raw", 0.0] == analysis["teachers"]["clip"]["top1"]
    assert ends["native", 1.0] == ends["raw", 1.0] == analysis["teachers"]["cnn"]["top1"]
    alpha = arrays["attributes"]["alpha"]
    for row in blend["scale"]:
        fused = alpha * arrays["cnn"] + (1 - alpha) * row["scale"] * arrays["cosine"]
        assert row["nll"] == pytest.approx(nll(fused, labels), rel=1e-4)
    assert {1.0, native} <= {row["scale"] for row in blend["scale"]}
    by_prompt = {row["prompt"]: row["clip_top1"] for row in blend["prompt"]}
    for number, prompt in enumerate(arrays["attributes"]["prompts"]):
        cosine = arrays["image"] @ arrays["text"][:, number].T
        assert by_prompt[prompt] == pytest.approx(top1(cosine, labels), abs=1 / len(labels))
    counts = [row["prompts"] for row in blend["num_prompts"]]
    assert counts[0] == 1 and counts[-1] == len(by_prompt) and counts == sorted(counts)
    mean = np.mean(list(by_prompt.values()))
    assert blend["num_prompts"][0]["clip_top1"] == pytest.approx(mean)
    assert blend["num_prompts"][-1]["clip_top1"] == analysis["teachers"]["clip"]["top1"]
    # one is blended anew and the other rounded to f16
    fused = analysis["teachers"]["fused"]["top1"]
    assert blend["num_prompts"][-1]["fused_top1"] == pytest.approx(fused, abs=1.01 / len(labels))


def test_consistency_is_spearman(analysis: dict[str, Any], arrays: dict[str, Any]) -> None:
    """Again from the arrays, with loops over pairs of classes."""
    labels, logits = arrays["labels"], arrays["cnn"]
    present = sorted(set(labels.tolist()))
    p = scipy.special.softmax(logits, axis=1)
    text = arrays["text"].mean(1)
    mean = {c: arrays["features"][labels == c].mean(0) for c in present}

    def cosine(u: np.ndarray, v: np.ndarray) -> float:
        return float(u @ v / np.linalg.norm(u) / np.linalg.norm(v))

    rows = []
    for a in present:
        for b in present:
            if a < b:
                forth = np.mean([p[i, b] / (1 - p[i, a]) for i in np.flatnonzero(labels == a)])
                back = np.mean([p[i, a] / (1 - p[i, b]) for i in np.flatnonzero(labels == b)])
                rows.append((forth + back, cosine(text[a], text[b]), cosine(mean[a], mean[b])))
    soft, by_text, by_features = np.array(rows).T
    found = analysis["consistency"]
    assert found.keys() == analysis["teachers"].keys()
    for name, yardstick in (("text", by_text), ("features", by_features)):
        expected = scipy.stats.spearmanr(soft, yardstick).statistic
        assert found["cnn"][name] == pytest.approx(expected, abs=1e-6), name


def test_the_training_split_is_its_first_view(store: Path) -> None:
    cache = open_cache(store)
    found = analyze(cache, split="train")
    labels = cache.read("train/labels").numpy()
    logits = cache.read("train/teacher_logits", 0).double().numpy()
    assert found["samples"] == len(labels)
    assert found["teachers"]["cnn"]["nll"] == pytest.approx(nll(logits, labels), rel=1e-5)


def test_the_command(run: Run, fails: Fails, store: Path, tmp_path: Path) -> None:
    done = run("analyze", store, "--out", tmp_path, "--json")
    assert done.code == 0, done.err
    saved = json.loads((tmp_path / f"{store.stem}-analysis.json").read_text())
    assert {**saved, "files": done.json["files"]} == done.json
    shown = run("analyze", store, "--out", tmp_path)
    assert shown.out.splitlines()[-1] == str(tmp_path / f"{store.stem}-analysis.html")
    assert max(map(len, shown.out.splitlines()[:-1])) <= 80
    for words, code, value in (
        ((store, "--threshold", 1.5), "value-out-of-range", "threshold = 1.5"),
        ((store, "--split", "val"), "unknown-name", "'val'"),
        ((tmp_path / "nothing.zarr",), "cache-missing", tmp_path / "nothing.zarr"),
    ):
        line = fails("analyze", *words)
        assert line.code == code and str(value) in line


def test_a_store_without_clip_says_what_it_can(
    run: Run, make_store: Callable[..., Path], tmp_path: Path
) -> None:
    store = make_store(clip="none", limit=32, views=1, out=str(tmp_path / "plain.zarr"))
    done = run("analyze", store, "--json")
    assert done.code == 0, done.err
    assert list(done.json["teachers"]) == ["cnn"] and done.json["blend"] is None
    assert done.json["consistency"]["cnn"].keys() == {"features"}
    page = (tmp_path / "plain-analysis.html").read_text()
    assert 'id="scores"' in page and 'id="disagreement"' not in page
    assert WITHOUT_CLIP in page and WITHOUT_CLIP in run("analyze", store).err


def test_more_than_two_teachers(
    run: Run, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only then is there an entry about what each knows and adds."""
    assert "complementarity" not in analyze(open_cache(store))
    two = teachers.every_logits(open_cache(store), "test")
    assert [*two] == ["cnn", "clip"]
    added = {**two, "vit": two["cnn"].roll(1, dims=0)}
    monkeypatch.setattr(teachers, "every_logits", lambda *_: added)
    done = run("analyze", store, "--out", tmp_path, "--json")
    assert done.code == 0, done.err
    found = done.json["complementarity"]
    assert [row["teacher"] for row in found["teachers"]] == ["cnn", "clip", "vit"]
    assert [*done.json["teachers"]][:3] == ["cnn", "clip", "vit"]
    shown = run("analyze", store, "--out", tmp_path).out.splitlines()
    assert max(map(len, shown[:-1])) <= 80
    assert any("blend without" in line for line in shown)
    page = (tmp_path / f"{store.stem}-analysis.html").read_text()
    assert all(f'id="{name}"' in page for name in ("knows", "right-where-wrong", "adds"))


@pytest.mark.slow
@pytest.mark.parametrize(("alpha", "scale"), [(1.0, "native"), (0.5, 20.0), (0.7, 1.0)])
def test_stores_with_other_blends(
    run: Run, make_store: Callable[..., Path], tmp_path: Path, alpha: float, scale: Any
) -> None:
    """A name with a dot in it, too."""
    store = make_store(
        alpha=alpha,
        scale=scale,
        views=1,
        limit=16,
        dtype="float32",
        out=str(tmp_path / f"shapes-a{alpha}.zarr"),
    )
    done = run("analyze", store, "--json")
    assert done.code == 0, done.err
    assert Path(done.json["files"]["html"]).name == f"shapes-a{alpha}-analysis.html"
    teachers = done.json["teachers"]
    if alpha == 1.0:
        assert teachers["fused"] == pytest.approx(teachers["cnn"], abs=1e-6)
        assert done.json["class_changes"] == {"gain": [], "lose": []}
    if scale == 1.0:
        assert "raw" not in teachers  # that is the stored one
    if scale == 20.0:
        assert {row["scale"] for row in done.json["blend"]["alpha"]} == {"raw", "native", "20"}
        assert 20.0 in {row["scale"] for row in done.json["blend"]["scale"]}
