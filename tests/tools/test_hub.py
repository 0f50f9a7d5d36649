"""Caches and students survive push and pull unchanged; a fake server stands in for the hub."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from fake_hub import TOKEN, FakeHub, serving
from helpers import Refusal, changed, tree

import richkd
from richkd.config.settings import Distill
from richkd.distill import distill
from richkd.models.hub_access import offline
from richkd.tools.hub_cards import student_card, text

pytestmark = [
    pytest.mark.slow,
    # huggingface_hub's own use of httpx
    pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning"),
]

Run = Callable[..., Any]
Fails = Callable[..., Refusal]


def assert_refused(refusal: Refusal, code: str, *values: object) -> None:
    assert refusal.code == code, refusal
    assert all(str(value) in refusal for value in values), refusal


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    for name in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_PROGRESS_BARS", "HF_OIDC_RESOURCE"):
        monkeypatch.delenv(name, raising=False)
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    with serving() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        yield hub


@pytest.fixture(scope="session")
def trained(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that no test changes."""
    out = tmp_path_factory.mktemp("run") / "resnet8"
    distill(
        Distill(
            cache=str(store), student="resnet8", epochs=2, batch_size=16, device="cpu", out=str(out)
        )
    )
    return out


def left() -> list[str]:
    """Every file in the working folder, hidden ones too."""
    return sorted(str(path) for path in Path().rglob("*") if path.is_file())


def front_matter(card: bytes) -> tuple[dict[str, Any], str]:
    _, front, body = card.decode().split("---\n", 2)
    return yaml.safe_load(front), body


def test_a_cache_is_the_same_after_push_and_pull(run: Run, hub: FakeHub, store: Path) -> None:
    pushed = run("push", store, "me/shapes", "--json")
    assert pushed.code == 0, pushed.err
    assert pushed.err == ""
    repo = hub.repos["dataset", "me/shapes"]
    assert pushed.json == {
        "repo": "me/shapes",
        "kind": "store",
        "commit": repo.commits[-1][0],
        "url": f"{hub.url}/datasets/me/shapes",
    }
    assert hub.objects  # some went as large files
    pulled = run("pull", "me/shapes", "--json")
    assert pulled.code == 0, pulled.err
    assert pulled.err == "" and pulled.json["path"] == "cache/shapes.zarr"
    assert changed(tree(store), tree(Path("cache/shapes.zarr"))) == []
    assert all(name.startswith("cache/shapes.zarr/") for name in left())
    assert run("verify", "cache/shapes.zarr").code == 0


def test_the_card_of_a_cache(run: Run, hub: FakeHub, store: Path) -> None:
    assert run("push", store, "me/shapes").out.strip() == f"{hub.url}/datasets/me/shapes"
    front, body = front_matter(hub.repos["dataset", "me/shapes"].files["README.md"])
    manifest = richkd.open_cache(store).manifest
    assert {"knowledge-distillation", "richkd"} <= set(front["tags"])
    about = front["richkd"]
    assert about["accuracy"]["cnn"] == manifest["teacher"]["accuracy"]
    assert about["accuracy"]["fused"] == manifest["fused_accuracy"]
    assert (about["views"], about["alpha"], about["images_inside"]) == (3, manifest["alpha"], True)
    assert "**The images are inside**" in body
    assert f"| {100 * manifest['teacher']['accuracy']:.2f} |" in body
    for array in richkd.open_cache(store).specs:
        assert f"| `{array}` |" in body
    assert manifest["versions"]["zarr"].replace(".", r"\.") in body


def test_the_card_of_a_cache_without_clip(
    run: Run, hub: FakeHub, make_store: Callable[..., Path], tmp_path: Path
) -> None:
    store = make_store(clip="none")
    assert run("push", store, "me/plain", "--json").code == 0
    front, body = front_matter(hub.repos["dataset", "me/plain"].files["README.md"])
    assert front["richkd"]["clip"] is None and "CLIP" not in body


def test_a_student_is_the_same_after_push_and_pull(
    run: Run, hub: FakeHub, store: Path, trained: Path, rng: np.random.Generator, tmp_path: Path
) -> None:
    mine = tmp_path / "mine"
    shutil.copytree(trained, mine)
    assert run("evaluate", mine, "--json").code == 0
    (mine / "checkpoint.safetensors").write_bytes(b"not for others")
    (mine / "student.pt2").write_bytes(b"nor this")
    pushed = run("push", mine, "me/resnet8", "--private", "--json")
    assert pushed.code == 0, pushed.err
    repo = hub.repos["model", "me/resnet8"]
    assert repo.private
    assert set(repo.files) == {
        ".gitattributes",
        "README.md",
        "recipe.toml",
        "summary.json",
        "metrics.jsonl",
        "last.safetensors",
        "best.safetensors",
        "evaluation.json",
    }
    pulled = run("pull", "me/resnet8", "--json")
    assert pulled.code == 0, pulled.err
    folder = Path(pulled.json["path"])
    assert folder == Path("runs/resnet8")
    assert (
        changed({name: mine.joinpath(name).read_bytes() for name in tree(folder)}, tree(folder))
        == []
    )
    images = torch.from_numpy(rng.normal(size=(5, 3, 32, 32)).astype(np.float32))
    for weights in ("last", "best"):
        with torch.no_grad():
            wanted, found = (richkd.load_student(path, weights)(images) for path in (mine, folder))
        assert torch.equal(wanted, found)
    assert run("report", "runs", "--json").code == 0
    assert run("evaluate", folder, "--cache", store, "--json").code == 0
    assert run("export", folder, "--format", "torch", "--json").code == 0


def test_the_card_of_a_student(run: Run, hub: FakeHub, trained: Path) -> None:
    assert run("push", trained, "me/resnet8", "--json").code == 0
    front, body = front_matter(hub.repos["model", "me/resnet8"].files["README.md"])
    summary = json.loads((trained / "summary.json").read_text())
    assert front["library_name"] == "richkd"
    assert {"knowledge-distillation", "richkd"} <= set(front["tags"])
    (result,) = front["model-index"][0]["results"]
    found = {metric["name"]: metric["value"] for metric in result["metrics"]}
    assert found == {"top-1": summary["top1_last"], "top-5": summary["top5_last"]}
    assert f"| {100 * summary['top1_last']:.2f} |" in body
    # the lines that it shows do load the student
    assert run("pull", "me/resnet8", "--json").code == 0
    names: dict[str, Any] = {}
    exec(body.split("```python\n")[1].split("```")[0], names)  # noqa: S102
    assert isinstance(names["student"], torch.nn.Module)


def test_names_are_text(trained: Path, tmp_path: Path) -> None:
    assert text("a|b\n# <b>`*_") == r"a\|b \# \<b\>\`\*\_"
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    summary = json.loads((folder / "summary.json").read_text())
    summary["class_names"][0] = "x |\n---\n# <script>alert(1)</script> [a](http://b) \x1b[31m"
    summary["dataset"] = 'imagefolder:"a: b"\n---\n- c'
    (folder / "summary.json").write_text(json.dumps(summary))
    card = student_card(folder, "me/x")
    front, body = front_matter(card.encode())
    assert front["model-index"][0]["results"][0]["dataset"]["name"] == 'imagefolder:"a: b" --- - c'
    assert "<script>" not in body and "](" not in body and "\x1b" not in body
    assert r"\<script\>alert\(1\)\<\/script\>" in body


def test_pushing_again_leaves_nothing_of_before(
    run: Run, fails: Fails, hub: FakeHub, store: Path, make_store: Callable[..., Path]
) -> None:
    larger = make_store(views=4)
    assert run("push", larger, "me/shapes", "--json").code == 0
    first = hub.repos["dataset", "me/shapes"].commits[-1][0]
    hub.repos["dataset", "me/shapes"].tags["v1"] = first
    assert run("push", store, "me/shapes", "--json").code == 0
    files = hub.repos["dataset", "me/shapes"].files
    assert files.keys() == tree(store).keys() | {".gitattributes", "README.md"}
    done = run("pull", "me/shapes", "--revision", "v1", "--out", "was.zarr", "--json")
    assert done.code == 0 and done.json["commit"] == first
    assert changed(tree(larger), tree(Path("was.zarr"))) == []
    refusal = fails("pull", "me/shapes", "--revision", "v2", "--out", "b.zarr")
    assert_refused(refusal, "hub-failed", "me/shapes", "'v2'")


def test_only_known_files_come(run: Run, hub: FakeHub, store: Path, trained: Path) -> None:
    evil = {
        "train/labels/c/0.py": b"1",
        "evil.pt": b"1",
        "train/c/x.pkl": b"1",
        "README.md": b"1",
        "c/0/../../../escaped/c/0": b"1",
    }
    hub.add("dataset", "me/shapes", {**tree(store), **evil})
    hub.add("model", "me/student", {**tree(trained), "evil.pt": b"1", "hubconf.py": b"1"})
    assert run("pull", "me/shapes", "--json").code == 0
    assert changed(tree(store), tree(Path("cache/shapes.zarr"))) == []
    assert run("pull", "me/student", "--json").code == 0
    assert changed(tree(trained), tree(Path("runs/student"))) == []
    assert not any(name in line for line in hub.asked for name in (".py", ".pt", ".pkl", "escaped"))


def test_damage_is_refused_and_nothing_is_kept(
    fails: Fails, hub: FakeHub, store: Path, trained: Path
) -> None:
    hub.add("dataset", "me/shapes", tree(store))
    hub.add("model", "me/student", tree(trained))
    chunk = next(name for name in tree(store) if "teacher_logits/c/" in name)
    hub.damaged = {chunk, "last.safetensors"}
    refusal = fails("pull", "me/shapes")
    assert_refused(refusal, "hub-damaged", "me/shapes at ", chunk)
    assert_refused(fails("pull", "me/student"), "hub-damaged", "me/student at ", "last.safetensors")
    gone = tree(store)
    del gone[chunk]
    hub.add("dataset", "me/shapes", gone)
    assert_refused(fails("pull", "me/shapes"), "hub-damaged")
    hub.add("dataset", "me/shapes", {**tree(store), "zarr.json": b"{"})
    assert_refused(fails("pull", "me/shapes"), "hub-damaged")
    hub.damaged = set()
    hub.add("model", "me/student", {"recipe.toml": b"[x]\ny = 1"})
    assert_refused(fails("pull", "me/student"), "hub-damaged", "me/student at ")
    assert left() == []


def test_what_cannot_be_pushed(
    fails: Fails, hub: FakeHub, store: Path, tmp_path: Path, trained: Path
) -> None:
    for empty in (tmp_path, tmp_path / "nothing"):
        assert_refused(fails("push", empty, "me/x"), "hub-nothing-to-push", empty)
    broken = tmp_path / "broken.zarr"
    shutil.copytree(store, broken)
    chunk = next(broken.glob("train/teacher_logits/c/0/0/0"))
    chunk.write_bytes(bytes([chunk.read_bytes()[0] ^ 1]) + chunk.read_bytes()[1:])
    assert_refused(fails("push", broken, "me/x"), "cache-damaged", "c/0/0/0", "richkd repair")
    manifest = json.loads((broken / "zarr.json").read_text())
    manifest["attributes"]["complete"] = False
    (broken / "zarr.json").write_text(json.dumps(manifest))
    assert_refused(fails("push", broken, "me/x"), "cache-incomplete", broken)
    half = tmp_path / "half"
    shutil.copytree(trained, half)
    (half / "summary.json").unlink()
    assert_refused(fails("push", half, "me/x"), "run-incomplete", half)
    for wrong in ("x", "me/a--b", "me/x/y", "datasets/me/x", "me/ä", "/x", ""):
        assert_refused(fails("push", store, wrong), "hub-name", repr(wrong))
    hub.add("dataset", "me/other", {"data.csv": b"1"})
    assert_refused(fails("push", store, "me/other"), "hub-foreign", "me/other")
    hub.add("dataset", "me/seen", {})
    assert_refused(fails("push", store, "me/seen", "--private"), "hub-public", "me/seen")
    assert not any(line.startswith("POST") for line in hub.asked)


def test_what_cannot_be_pulled(
    fails: Fails, run: Run, hub: FakeHub, store: Path, trained: Path
) -> None:
    assert_refused(fails("pull", "me/x"), "hub-failed", "me/x", hub.url)
    hub.add("dataset", "me/other", {"data.csv": b"1"})
    assert_refused(fails("pull", "me/other"), "hub-foreign", "me/other")
    hub.add("dataset", "me/x", tree(store))
    hub.add("model", "me/x", tree(trained))
    assert_refused(fails("pull", "me/x"), "hub-ambiguous", "datasets/me/x", "models/me/x")
    assert run("pull", "models/me/x", "--json").json["path"] == "runs/x"
    before = tree(Path("runs/x"))
    assert run("pull", "models/me/x").code == 0
    hub.add("model", "me/x", {**tree(trained), "summary.json": b"{}"})
    assert fails("pull", "models/me/x").code == "hub-damaged"
    hub.add("model", "me/x", {**tree(trained), "recipe.toml": trained_by_others(trained)})
    assert_refused(fails("pull", "models/me/x"), "foreign-file", "runs/x", "recipe.toml", "--out")
    assert changed(before, tree(Path("runs/x"))) == []
    hub.add("dataset", "me/y", tree(store))
    Path("runs/y").mkdir()
    refusal = fails("pull", "me/y", "--out", "runs/y")
    assert_refused(refusal, "foreign-file", "runs/y", "--out")
    Path("file").write_text("")
    assert_refused(fails("pull", "datasets/me/x", "--out", "file"), "foreign-file", "file")
    assert fails("pull", "datasets/me/x", "--out", "file/x").code == "parent-is-file"


def trained_by_others(run: Path) -> bytes:
    """The recipe of a run with one more line."""
    return (run / "recipe.toml").read_bytes() + b"# from elsewhere\n"


def test_refused_and_unreachable(
    fails: Fails, hub: FakeHub, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    assert_refused(fails("push", store, "me/x"), "hub-failed", "me/x", "401", "HF_TOKEN")
    for status in (401, 403, 500):
        hub.status = status
        for refusal in (fails("pull", "me/x"), fails("push", store, "me/x")):
            assert_refused(refusal, "hub-failed", hub.url, "me/x", status)
    hub.status = 200  # something answers, but it is no hub
    assert_refused(fails("pull", "me/x"), "hub-failed", "me/x")
    monkeypatch.setenv("HF_ENDPOINT", "http://host:port")
    assert_refused(fails("pull", "me/x"), "hub-endpoint", "'http://host:port'")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    start = time.perf_counter()
    for command in (("pull", "me/x"), ("push", store, "me/x")):
        assert_refused(fails(*command), "hub-failed", "http://127.0.0.1:1", "HF_ENDPOINT")
    assert time.perf_counter() - start < 10
    with offline():
        assert_refused(fails("pull", "me/x"), "hub-failed", "HF_HUB_OFFLINE")
    assert left() == []


def test_the_environment_is_huggingfaces(hub: FakeHub, store: Path) -> None:
    environment = {**os.environ, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(Path("home").absolute())}
    for words in (("push", store, "me/shapes"), ("pull", "me/shapes")):
        done = subprocess.run(
            [sys.executable, "-m", "richkd", *map(str, words)],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    assert changed(tree(store), tree(Path("cache/shapes.zarr"))) == []
