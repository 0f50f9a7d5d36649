"""Rows of which the largest logits are kept: mass, classes, stores of them, students from them."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from helpers import Refusal, changed, refuses, tree
from safetensors.torch import load_file

import richkd
from richkd.config.settings import Distill, Precompute
from richkd.core.progress import Report
from richkd.data.inputs import Normalize
from richkd.distill import distill
from richkd.losses.method import TARGET
from richkd.models import forward
from richkd.store import schema
from richkd.store.checksums import take_checksums, write_sealed
from richkd.store.locations import open_location
from richkd.store.manifest import read_manifest
from richkd.store.topk import TopKRows, check_keep, keep_top, kl_errors
from richkd.tools.verify import verify_store
from richkd.training import loop
from richkd.training.source import Source

Make = Callable[..., Path]
Run = Callable[..., Any]
Fails = Callable[..., Refusal]
Array = np.ndarray[Any, Any]
QUIET = Report(quiet=True)


def softmax(logits: Array, tau: float) -> Array:
    shifted = np.exp((logits - logits.max(-1, keepdims=True)) / tau)
    return np.asarray(shifted / shifted.sum(-1, keepdims=True))


def recipe_of(page: str) -> Callable[[Any, str, int], Array]:
    """What a page says of how rows are filled up, as it stands there."""
    (code,) = re.findall(r"```python\n(import numpy as np\n.*?)```", page, re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)  # noqa: S102
    return names["filled_up"]  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def kept(make_store: Make) -> Path:
    """A store of `shapes`, 16 classes, of which five are kept."""
    return make_store(keep="top-5")


# --- rows ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("keep", "num_classes"), [(1, 7), (6, 7), (5, 16), (50, 1000), (1, 2)])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_largest_stay_and_the_others_keep_their_mass(
    rng: np.random.Generator, keep: int, num_classes: int, temperature: float
) -> None:
    logits = (rng.normal(size=(40, num_classes)) * 8 + rng.normal() * 30).astype(np.float32)
    rows = keep_top(torch.from_numpy(logits), keep, temperature)
    assert rows.shape == (40, num_classes) and len(rows) == 40
    dense = rows.float().numpy().astype(np.float64)
    for told, true in zip(dense, logits.astype(np.float64), strict=True):
        order = np.argsort(-true)
        assert (told[order[:keep]] == true[order[:keep]]).all()
        others = told[order[keep:]]
        assert (others == others[0]).all()
        mass, was = (softmax(z, temperature)[order[keep:]].sum() for z in (told, true))
        assert mass == pytest.approx(was, rel=1e-4)
        if keep == num_classes - 1:
            assert others[0] == pytest.approx(true[order[-1]], rel=1e-6)
    assert (rows.top.diff(dim=1) <= 0).all()


def test_logits_that_no_exponential_can_hold(rng: np.random.Generator) -> None:
    logits = torch.from_numpy(rng.normal(size=(5, 9)) * 3).float()
    for shift in (-1e4, 1e4):
        far = keep_top(logits + shift, 4, 1.0)
        torch.testing.assert_close(
            far.float() - shift, keep_top(logits, 4, 1.0).float(), rtol=0, atol=2e-3
        )


def test_of_equal_logits_the_lower_classes_stay() -> None:
    logits = torch.tensor([[1.0, 2.0, 1.0, 2.0, 1.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    rows = keep_top(logits, 3, 3.0)
    assert rows.class_index().tolist() == [[1, 3, 0], [0, 1, 2]]
    torch.testing.assert_close(rows.float(), logits)  # the others are alike, so nothing is lost


def test_classes_of_sixteen_bits(rng: np.random.Generator) -> None:
    logits = torch.from_numpy(rng.normal(size=(3, 2**16))).half()
    logits[:, [0, 2**15 - 1, 2**15, 2**16 - 1]] = torch.tensor([9.0, 8.0, 7.0, 6.0]).half()
    rows = keep_top(logits, 4, 3.0)
    assert rows.class_index().tolist() == [[0, 2**15 - 1, 2**15, 2**16 - 1]] * 3
    assert (rows.dense().argmax(1) == 0).all() and (rows.dense()[:, 2**16 - 1] == 6).all()
    check_keep(4, 2**16)
    with refuses("keep-out-of-range", "65,536"):
        check_keep(4, 2**16 + 1)


def test_rows_are_chosen_moved_and_filled_up_as_whole_ones(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = keep_top(torch.from_numpy(rng.normal(size=(3, 25, 12))).half(), 4, 3.0)
    dense = rows.dense()
    assert dense.dtype == torch.float16 and dense.shape == rows.shape == (3, 25, 12)
    monkeypatch.setattr("richkd.core.memory.ROWS_AT_ONCE", 8)
    assert torch.equal(rows.dense(), dense)
    one = keep_top(dense[1], 4, 3.0)
    index = torch.from_numpy(rng.permutation(25)[:9])
    batch = one[index]
    assert isinstance(batch, TopKRows) and len(batch) == 9
    assert torch.equal(batch.float(), one.dense()[index].float())
    moved = one.to(torch.device("meta"), non_blocking=True)
    assert {part.device.type for part in (moved.top, moved.classes, moved.rest)} == {"meta"}


def test_kl_errors_are_those_of_another_reading(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = (rng.normal(size=(50, 30)) * 4).astype(np.float16)
    monkeypatch.setattr("richkd.core.memory.ROWS_AT_ONCE", 16)
    errors = kl_errors(torch.from_numpy(logits), 6, 2.5)
    assert list(errors) == ["1", "2.5"]
    whole = logits.astype(np.float64)
    order = np.argsort(-whole, axis=1, kind="stable")
    others = np.take_along_axis(whole, order[:, 6:], 1)
    rest = 2.5 * np.log(np.exp(others / 2.5).mean(1))
    told = np.repeat(rest[:, None], 30, axis=1)
    np.put_along_axis(told, order[:, :6], np.take_along_axis(whole, order[:, :6], 1), axis=1)
    for tau, error in errors.items():
        p, q = softmax(whole, float(tau)), softmax(told, float(tau))
        assert error == pytest.approx((p * np.log(p / q)).sum(1).mean(), rel=5e-3)
    assert set(kl_errors(torch.from_numpy(logits), 6, 1.0)) == {"1"}


# --- stores --------------------------------------------------------------------------------------


def test_plain_zarr_reads_what_the_page_says(kept: Path, store: Path) -> None:
    group: Any = zarr.open_group(kept, mode="r")
    whole: Any = zarr.open_group(store, mode="r")
    cache = richkd.open_cache(kept)
    assert cache.manifest["keep"] == 5 and cache.manifest["keep_temperature"] == 3.0
    page = (Path(__file__).parents[2] / "cache" / "README.md").read_text()
    filled_up = recipe_of(page)
    for name in ("train/teacher_logits", "train/fused_logits"):
        assert name not in group
        parts = [group[f"{name}_{part}"] for part in ("top", "classes", "rest")]
        assert [part.shape for part in parts] == [(3, 48, 5), (3, 48, 5), (3, 48)]
        assert [str(part.dtype) for part in parts] == ["float16", "uint16", "float16"]
        assert [part.chunks for part in parts] == [(1, 48, 5), (1, 48, 5), (1, 48)]
        assert all(f"`{name}_{part}`" in page for part in ("top", "classes", "rest"))
        top, classes = (part[:] for part in parts[:2])
        true = whole[name][:]
        assert (np.take_along_axis(true, classes.astype(int), -1) == top).all()
        assert (-np.sort(-true, axis=-1)[..., :5] == top).all()
        rows = np.stack([filled_up(group, name, view) for view in range(3)])
        mass, was = (
            np.sort(softmax(z.astype(np.float64), 3.0), axis=-1)[..., :11].sum(-1)
            for z in (rows, true)
        )
        np.testing.assert_allclose(mass, was, rtol=5e-3)
        assert (cache.read(name).numpy() == rows).all()
        for view in range(3):
            slab = getattr(cache.slab(view), name.removeprefix("train/"))
            assert slab.dtype == torch.float16 and (slab.numpy() == rows[view]).all()
    for name in ("teacher_logits", "fused_logits"):
        assert (group[f"test/{name}"][:] == whole[f"test/{name}"][:]).all()
    with refuses("view-out-of-range", "view 3", "0..2"):
        cache.read("train/fused_logits", 3)


def test_whole_stores_are_as_they_were(store: Path) -> None:
    manifest = richkd.open_cache(store).manifest
    assert not {"keep", "keep_temperature", "keep_kl"} & manifest.keys()
    assert manifest["schema"] == schema.SCHEMA == 2


def test_another_blend_starts_from_the_kept_logits(kept: Path) -> None:
    cache = richkd.open_cache(kept)
    teacher = cache.read("train/teacher_logits", 1).double()
    again = 0.25 * teacher + 0.75 * 4.0 * cache.read("train/clip_similarity").double()
    torch.testing.assert_close(
        cache.fuse(1, alpha=0.25, scale=4.0).double(), again, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    "settings",
    [{"dtype": "float32", "clip": "none"}, {"keep_bits": 6, "keep_temperature": 1.0}],
)
def test_with_every_other_setting(
    make_store: Make, run: Run, shapes_teacher: Path, settings: dict[str, Any]
) -> None:
    path = make_store(keep="top-3", **settings)
    cache = richkd.open_cache(path)
    checked = run("verify", path, "--teacher", shapes_teacher, "--json")
    assert checked.code == 0, checked.err
    names = {check["name"]: check["faults"] for check in checked.json["checks"]}
    assert "kept logits" in names and not any(names.values())
    dtype = torch.float32 if "dtype" in settings else torch.float16
    assert cache.slab(0).teacher_logits.dtype == dtype  # type: ignore[union-attr]
    assert cache.has("train/fused_logits") == ("clip" not in settings)
    if "keep_bits" in settings:
        bits = cache.read("train/fused_logits_top").numpy().view(np.uint16)
        assert (bits & 0b1111 == 0).all()


def test_the_error_is_told_and_kept(
    make_store: Make, run: Run, tmp_path: Path, shapes_teacher: Path, clip_dir: Path
) -> None:
    done = run(
        "precompute",
        "--dataset",
        "shapes",
        "--limit",
        48,
        "--teacher",
        "resnet8",
        "--teacher-weights",
        shapes_teacher,
        "--clip",
        clip_dir,
        "--views",
        2,
        "--keep",
        "top-4",
        "--keep-temperature",
        2,
        "--device",
        "cpu",
        "--out",
        tmp_path / "s.zarr",
    )
    assert done.code == 0, done.err
    cache = richkd.open_cache(tmp_path / "s.zarr")
    errors = cache.manifest["keep_kl"]
    assert errors == pytest.approx(kl_errors(cache.read("test/fused_logits"), 4, 2.0))
    told = ", ".join(f"{errors[tau]:.2g} nats at τ {tau}" for tau in ("1", "2"))
    assert told in done.err and "the 4 largest of 16 logits per row" in done.err
    shown = run("inspect", tmp_path / "s.zarr")
    assert told in shown.out and "the 4 largest, the others alike at τ 2" in shown.out


def test_samples_and_analysis(kept: Path, run: Run) -> None:
    cache = richkd.open_cache(kept)
    samples = richkd.torch_dataset(cache, 2)
    assert {"teacher_logits", "fused_logits"} < samples[0].keys()
    assert torch.equal(samples[7]["fused_logits"], cache.read("train/fused_logits", 2)[7].float())
    analysed = run("analyze", kept, "--split", "train", "--json")
    assert analysed.code == 0, analysed.err
    whole = cache.read("train/fused_logits", 0).argmax(1) == cache.read("train/labels")
    assert analysed.json["teachers"]["fused"]["top1"] == pytest.approx(whole.double().mean().item())


def test_bench_counts_what_is_stored(kept: Path) -> None:
    from richkd.tools.bench import store_bytes

    names = (
        "teacher_features",
        *(
            f"{name}_logits_{part}"
            for name in ("teacher", "fused")
            for part in ("top", "classes", "rest")
        ),
    )
    files = [file for name in names for file in (kept / "train" / name).rglob("*")]
    stored = sum(file.stat().st_size for file in files if file.is_file())
    table = store_bytes(richkd.open_cache(kept), QUIET)
    assert table["as stored"]["bytes"] == pytest.approx(stored / (3 * 48), abs=0.1)
    assert table["raw f16"]["kl"] == pytest.approx(0, abs=1e-6)


# --- students ------------------------------------------------------------------------------------


def train(store: Path, out: Path, **settings: Any) -> list[dict[str, Any]]:
    given = {"student": "resnet8", "epochs": 2, "batch_size": 16, "device": "cpu", "lr": 0.02}
    distill(Distill(cache=str(store), out=str(out), **{**given, **settings}))
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_the_loss_of_a_step_is_that_of_rows_filled_up_by_hand(kept: Path, tmp_path: Path) -> None:
    settings = {"method": "richkd-l", "epochs": 1, "batch_size": 48}
    (line,) = train(kept, tmp_path / "run", **settings)
    raw: Any = zarr.open_group(kept, mode="r")
    page = (Path(__file__).parents[2] / "cache" / "README.md").read_text()
    target = torch.from_numpy(recipe_of(page)(raw, "train/fused_logits", 0)).float()
    images = torch.from_numpy(raw["train/images"][:])
    views = torch.from_numpy(raw["train/view_ids"][0].astype(np.int64))
    order = loop.epoch_order(0, 1, 48)
    torch.manual_seed(loop.derive_seed(0, 0, 2))
    student = richkd.create_model("resnet8", 16).to(memory_format=torch.channels_last).train()
    normalize = Normalize(raw.attrs["mean"], raw.attrs["std"], torch.device("cpu"))
    logits, _ = forward(student, normalize(richkd.apply_views(images[order], views[order])))
    labels = torch.from_numpy(raw["train/labels"][:])[order]
    soft = (target[order] / 3).double().softmax(1)
    told = (logits / 3).double().log_softmax(1)
    kl = 9 * (soft * (soft.log() - told)).sum(1).mean().item()
    loss = torch.nn.functional.cross_entropy(logits, labels).item() + 3 * kl
    assert line["loss"] == pytest.approx(loss, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["kd", "richkd-l"])
def test_all_but_one_kept_trains_as_all_kept(make_store: Make, tmp_path: Path, method: str) -> None:
    """The rest is then the one other class, up to the rounding of f32."""
    paths = {keep: make_store(keep=keep, dtype="float32") for keep in ("all", "top-15")}
    lines = {keep: train(path, tmp_path / keep, method=method) for keep, path in paths.items()}
    ends = [load_file(tmp_path / keep / "last.safetensors") for keep in paths]
    for name, weight in ends[0].items():
        torch.testing.assert_close(ends[1][name], weight, rtol=1e-3, atol=1e-4)
    for a, b in zip(*lines.values(), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)


def test_an_epochs_rows_stay_compact(kept: Path) -> None:
    def rows(**blend: Any) -> Any:
        settings = Distill(cache=str(kept), method="richkd-l", device="cpu", **blend)
        source = Source(settings, QUIET)
        name, _ = source.target(settings, "fused")
        assert name.startswith(TARGET)
        return next(source.epochs([name], 1, 1))[0].rows[name]

    compact = rows()
    assert isinstance(compact, TopKRows)
    parts = (compact.top, compact.classes, compact.rest)
    assert sum(part.nbytes for part in parts) == 48 * (5 * 2 + 5 * 2 + 2)
    blended = rows(alpha=0.5)
    assert blended.shape == (48, 16) and blended.dtype == torch.float16


# --- what is refused and what is found -----------------------------------------------------------


@pytest.mark.parametrize("keep", ["", "16", "top16", "top-0", "top--1", "top-1.5", "top-٣"])
def test_no_such_keep(keep: str) -> None:
    with refuses("value-out-of-range", "keep", keep):
        Precompute(dataset="shapes", keep=keep)


def test_mistakes(make_store: Make, fails: Fails, tmp_path: Path) -> None:
    out = tmp_path / "s.zarr"
    for keep in ("top-16", "top-999999999"):
        with refuses("keep-out-of-range", keep, "16"):
            make_store(keep=keep, out=str(out))
    assert not out.exists()
    line = fails("precompute", "--dataset", "shapes", "--keep", "top-3", "--keep-temperature", 0)
    assert line.code == "value-out-of-range" and "keep_temperature = 0.0" in line


@pytest.mark.slow
def test_a_store_begun_with_another_keep_is_refused(
    kept: Path, make_store: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = str(tmp_path / "s.zarr")

    def cut(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("richkd.store.writer.StoreWriter.write", cut)
        with pytest.raises(KeyboardInterrupt):
            make_store(keep="top-5", out=out)
    before = tree(Path(out))
    for settings, values in (
        ({}, ("keep", "5", "None")),
        ({"keep": "top-5", "keep_temperature": 4.0}, ("keep_temperature", "3.0", "4.0")),
    ):
        with refuses("cache-settings-differ", out, *values):
            make_store(out=out, **settings)
        assert changed(before, tree(Path(out))) == []
    make_store(keep="top-5", out=out)
    assert changed(tree(kept), tree(Path(out))) == ["zarr.json"]  # its recipe names `out`


def resealed(path: Path) -> None:
    """Whatever is wrong with the store, every checksum is right."""
    manifest: Any = read_manifest(path)
    manifest["checksums"] = take_checksums(open_location(path), schema.array_specs(manifest))
    write_sealed(open_location(path), manifest)


def swap(rows: Array) -> None:
    rows[1, 7, [0, 4]] = rows[1, 7, [4, 0]]


def repeat(rows: Array) -> None:
    rows[1, 7, 2] = rows[1, 7, 3]


def raise_rest(rows: Array) -> None:
    rows[1, 7] = 60


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("fused_logits_top", swap, "fused_logits view 1: 1 rows are not in descending order"),
        ("fused_logits_top", swap, "fused_logits view 1: 1 rows are not the blend of their parts"),
        ("teacher_logits_classes", repeat, "teacher_logits view 1: 1 rows have a class twice"),
        ("teacher_logits_rest", raise_rest, "1 rows have others above those that are kept"),
    ],
)
def test_rows_that_cannot_be(
    kept: Path, tmp_path: Path, part: str, change: Callable[[Array], None], message: str
) -> None:
    path = Path(shutil.copytree(kept, tmp_path / "copy.zarr"))
    array: Any = zarr.open_group(path, mode="r+")[f"train/{part}"]
    rows = array[:]
    change(rows)
    array[:] = rows
    resealed(path)
    faults = [fault for check in verify_store(path, None, QUIET) for fault in check.faults]
    assert any(message in fault for fault in faults), faults


def test_classes_and_manifests_that_cannot_be(kept: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(kept, tmp_path / "copy.zarr"))
    manifest: Any = richkd.open_cache(kept).manifest
    for entries, message in (
        ({"keep": 16}, "keep is 16"),
        ({"keep": 0}, "keep is 0"),
        ({"keep_temperature": 0.0}, "keep_temperature 0.0"),
        ({"keep_kl": {"1": "little"}}, "keep_kl.1 is 'little'"),
    ):
        write_sealed(open_location(path), {**manifest, **entries})
        with refuses("manifest-damaged", path, message):
            richkd.open_cache(path)
    write_sealed(open_location(path), {**manifest, "keep_kl": {"1": 0.5, "3": 0.5}})
    faults = [fault for check in verify_store(path, None, QUIET) for fault in check.faults]
    assert len(faults) == 2 and "KL error at τ 3 is 0.5, the test rows have" in faults[1]
    array: Any = zarr.open_group(path, mode="r+")["train/fused_logits_classes"]
    array[2, 4, 1] = 16
    resealed(path)
    cache = richkd.open_cache(path)
    cache.slab(1)
    with refuses("cache-damaged", "train/fused_logits", "0..15"):
        cache.slab(2)


@pytest.mark.slow
@pytest.mark.fault
def test_repair(make_store: Make, run: Run, fails: Fails, tmp_path: Path) -> None:
    path = make_store(keep="top-5", out=str(tmp_path / "s.zarr"))
    whole = tree(path)
    (path / "train/fused_logits_rest/c/1/0").unlink()
    chunk = path / "train/teacher_logits_classes/c/2/0/0"
    chunk.write_bytes(chunk.read_bytes()[:-1])
    line = fails("verify", path)
    assert line.code == "cache-verify-failed" and "richkd repair" in line
    done = run("repair", path, "--json")
    assert done.code == 0, done.err
    assert done.json["blocks"] == ["train view 1 samples 0..47", "train view 2 samples 0..47"]
    assert changed(whole, tree(path)) == []


def test_an_image_folder(make_store: Make, tmp_path: Path, rng: np.random.Generator) -> None:
    from helpers import write_teacher
    from PIL import Image

    for part in ("train", "val"):
        for name in ("cat", "dog", "eel"):
            (tmp_path / "p" / part / name).mkdir(parents=True)
            for number in range(4):
                pixels = rng.integers(0, 256, (40, 44, 3), np.uint8)
                Image.fromarray(pixels).save(tmp_path / "p" / part / name / f"{number}.png")
    path = make_store(
        dataset=f"imagefolder:{tmp_path / 'p'}",
        image_size=32,
        limit=None,
        keep="top-1",
        teacher_weights=str(write_teacher(tmp_path / "t.safetensors", "resnet8", 3)),
        out=str(tmp_path / "s.zarr"),
    )
    assert not [fault for check in verify_store(path, None, QUIET) for fault in check.faults]
    assert richkd.open_cache(path).rows("train/fused_logits", 2).shape == (12, 3)
