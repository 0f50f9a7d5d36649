"""Files of others are neither replaced nor deleted, and refusals come before any change."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optional
import pytest
import torch
from forked import interrupted
from helpers import changed, refuses, tree, write_teacher
from safetensors.torch import save_file

from richkd.core.errors import local_path
from richkd.core.ownership import is_export

Run = Callable[..., Any]
Fails = Callable[..., Any]
SAVE = "richkd.training.checkpoint:Checkpoints.save"
STUDENT = (
    "--student",
    "resnet8",
    "--epochs",
    1,
    "--batch-size",
    16,
    "--device",
    "cpu",
    "--method",
    "kd",
)


@pytest.fixture(scope="module")
def trained(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from richkd.config.settings import Distill
    from richkd.distill import distill

    out = tmp_path_factory.mktemp("runs") / "run"
    distill(
        Distill(
            cache=str(store),
            student="resnet8",
            method="kd",
            epochs=1,
            batch_size=16,
            device="cpu",
            out=str(out),
        )
    )
    return out


@pytest.fixture
def mine(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of a run in the working folder, which the test may change."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained, "mine")
    return Path("mine")


@pytest.mark.parametrize(
    "files",
    [
        {"recipe.toml": "[cake]\nflour = 500\n"},
        {"recipe.toml": "flour, 500 g", "notes.txt": "precious"},
        {"notes.txt": "precious"},
        {"summary.json": "{}", "last.safetensors": "theirs"},
    ],
)
@pytest.mark.parametrize("flag", [(), ("--overwrite",), ("--resume",)])
def test_a_folder_that_is_no_run_stays_as_it_is(
    fails: Fails, store: Path, tmp_path: Path, files: dict[str, str], flag: tuple[str, ...]
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text)
    before = tree(folder)
    line = fails("distill", "--cache", store, *STUDENT, "--out", folder, *flag)
    assert line.code == "foreign-file" and str(folder) in line
    assert tree(folder) == before


def test_other_files_in_a_run_that_is_overwritten_stay(run: Run, store: Path, mine: Path) -> None:
    shutil.copytree(mine, mine / "another")
    theirs = {
        "notes.txt": "precious",
        "student.onnx": "no export",
        "evaluation.html": "mine",
        "report.html": "mine",
        "weights/last.safetensors": "theirs",
        "another/.half.123.tmp": "being written",
    }
    for name, text in theirs.items():
        (mine / name).parent.mkdir(exist_ok=True)
        (mine / name).write_text(text)
    (mine / "evaluation.json").write_text('{"samples": 1, "held_out": 0.0, "ece": 0.5}')
    (mine / "best.safetensors").write_bytes(b"to be replaced")
    before = tree(mine)
    done = run("distill", "--cache", store, *STUDENT, "--out", mine, "--overwrite")
    assert done.code == 0, done.err
    now = tree(mine)
    assert set(changed(before, now)) <= {
        "recipe.toml",
        "evaluation.json",
        "best.safetensors",
        "last.safetensors",
        "metrics.jsonl",
        "summary.json",
    }
    assert "evaluation.json" not in now  # it described the replaced run
    assert now["best.safetensors"] != b"to be replaced"


def test_refusals_come_before_anything_is_deleted(fails: Fails, store: Path, mine: Path) -> None:
    before = tree(mine)
    for words in (
        ("--student", "resnet9"),
        ("--method", "kdd"),
        ("--target", "nobody"),
        ("--holdout", "0.001"),
        ("--resume",),
    ):
        fails("distill", "--cache", store, *STUDENT, "--out", mine, "--overwrite", *words)
        assert tree(mine) == before, words


@pytest.mark.parametrize(
    "file",
    [
        "notes.txt",
        "train/notes.txt",
        "train/labels/c/notes",
        "mine/zarr.json",
        "mine/c/0",
        "train/labels/c/0.py",
    ],
)
def test_a_store_with_other_files_is_not_replaced(
    fails: Fails, run: Run, store: Path, shapes_teacher: Path, tmp_path: Path, file: str
) -> None:
    copy = tmp_path / "s.zarr"
    shutil.copytree(store, copy)
    (copy / file).parent.mkdir(parents=True, exist_ok=True)
    (copy / file).write_text("precious")
    before = tree(copy)
    words = (
        "precompute",
        "--dataset",
        "shapes",
        "--limit",
        16,
        "--views",
        1,
        "--teacher",
        "resnet8",
        "--teacher-weights",
        shapes_teacher,
        "--clip",
        "none",
        "--device",
        "cpu",
        "--out",
        copy,
        "--overwrite",
    )
    line = fails(*words)
    assert line.code == "foreign-file" and file in line and str(copy) in line
    assert tree(copy) == before
    (copy / file).unlink()
    done = run(*words)
    assert done.code == 0, done.err
    assert not any(path.name.startswith(".") for path in tmp_path.iterdir())


def test_a_store_behind_a_link_is_replaced_there(
    run: Run, store: Path, shapes_teacher: Path, tmp_path: Path
) -> None:
    (tmp_path / "scratch").mkdir()
    shutil.copytree(store, tmp_path / "scratch" / "real.zarr")
    link = tmp_path / "s.zarr"
    link.symlink_to(tmp_path / "scratch" / "real.zarr")
    done = run(
        "precompute",
        "--dataset",
        "shapes",
        "--limit",
        16,
        "--views",
        1,
        "--teacher",
        "resnet8",
        "--teacher-weights",
        shapes_teacher,
        "--clip",
        "none",
        "--device",
        "cpu",
        "--out",
        link,
        "--overwrite",
    )
    assert done.code == 0, done.err
    assert link.is_symlink() and (tmp_path / "scratch" / "real.zarr" / "zarr.json").is_file()
    assert [path.name for path in (tmp_path / "scratch").iterdir()] == ["real.zarr"]


@pytest.mark.slow
def test_weights_that_richkd_did_not_train_stay(fails: Fails, tmp_path: Path) -> None:
    words = (
        "train-teacher",
        "--dataset",
        "shapes",
        "--limit",
        16,
        "--model",
        "resnet8",
        "--epochs",
        1,
        "--device",
        "cpu",
        "--out",
    )
    theirs = write_teacher(tmp_path / "theirs.safetensors", "resnet8", 16)
    save_file({"x": torch.ones(1)}, tmp_path / "bare.safetensors")
    (tmp_path / "text.safetensors").write_text("no weights at all")
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "t.json").write_text('{"my": "notes"}')
    (tmp_path / "u.training").mkdir()
    (tmp_path / "u.training" / "recipe.toml").write_text("flour = 500")
    before = tree(tmp_path)
    for path in (
        theirs,
        *(tmp_path / f"{name}.safetensors" for name in ("bare", "text", "folder")),
        tmp_path / "t.safetensors",
        tmp_path / "u.safetensors",
    ):
        for flag in ((), ("--overwrite",)):
            line = fails(*words, path, *flag)
            assert line.code == "foreign-file" and path.stem in line
            assert tree(tmp_path) == before, path


@pytest.mark.slow
def test_pages_and_exports_of_others_stay(
    run: Run, fails: Fails, store: Path, mine: Path, tmp_path: Path
) -> None:
    commands: dict[tuple[Any, ...], list[str]] = {
        ("report", mine): ["report.html", "report.json", "leaderboard.csv"],
        ("evaluate", mine): ["evaluation.html", "comparison.json"],
        ("export", mine, "--format", "torch"): ["student.pt2"],
        ("analyze", store, "--out", mine): ["shapes-analysis.html", "shapes-analysis.json"],
    }
    for words, names in commands.items():
        for name in names:
            (mine / name).write_text("<title>my thesis</title>")
            before = tree(tmp_path)
            line = fails(*words)
            assert line.code == "foreign-file" and name in line
            assert tree(tmp_path) == before, name
            (mine / name).write_text("")  # in which nothing is lost
        for _ in range(2):
            done = run(*words)
            assert done.code == 0, done.err
        assert {*names} <= tree(mine).keys()
    assert is_export(mine / "student.pt2")


@pytest.mark.slow
def test_an_export_as_onnx_is_known_again(run: Run, fails: Fails, mine: Path) -> None:
    optional.require("onnx", "onnxscript", "onnxruntime")
    for _ in range(2):
        assert run("export", mine, "--out", "a.onnx").code == 0
    assert is_export(Path("a.onnx"))
    Path("b.onnx").write_bytes(b"\x08\x09somebody's")
    line = fails("export", mine, "--out", "b.onnx")
    assert line.code == "foreign-file" and "b.onnx" in line


def test_tensorboard_takes_its_own_events_only(run: Run, mine: Path) -> None:
    optional.require("tensorboard")
    logs = mine / "tensorboard" / "mine"
    logs.mkdir(parents=True)
    (logs / "plot.png").write_bytes(b"precious")
    for _ in range(2):
        assert run("report", mine, "--tensorboard").code == 0
    assert (logs / "plot.png").read_bytes() == b"precious"
    assert len(list(logs.glob("events.out.tfevents.*"))) == 1


@pytest.mark.parametrize("flag", [(), ("--overwrite",)])
def test_a_demo_among_other_files(fails: Fails, tmp_path: Path, flag: tuple[str, ...]) -> None:
    folder = tmp_path / "demo"
    folder.mkdir()
    (folder / "notes.txt").write_text("precious")
    line = fails("demo", "--out", folder, *flag)
    assert line.code == "demo-foreign-folder" and str(folder) in line
    (folder / "report.html").write_text("my thesis")
    (folder / "shapes.zarr").mkdir()
    before = tree(folder)
    line = fails("demo", "--out", folder, *flag)
    assert line.code == "foreign-file" and "report.html" in line
    assert tree(folder) == before


# --- URLs where a path is meant ------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    ["s3://b/x", "hf://me/x", "file:///x", "abfs+s3://b/x"],
)
def test_a_url_is_no_path(fails: Fails, store: Path, mine: Path, url: str, tmp_path: Path) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text(
        "".join(
            f'[{table}]\nout = "{url}{suffix}"\n'
            for table, suffix in (("distill", ""), ("sweep", ""), ("train-teacher", ".safetensors"))
        )
    )
    before = tree(tmp_path)
    stores = ("--cache", store)
    for words in (
        ("distill", *stores, "--out", url),
        ("distill", *stores, "--recipe", recipe),
        ("sweep", *stores, "--students", "resnet8", "--out", url),
        ("sweep", *stores, "--students", "resnet8", "--recipe", recipe),
        ("train-teacher", "--dataset", "shapes", "--out", f"{url}.safetensors"),
        ("train-teacher", "--dataset", "shapes", "--recipe", recipe),
        ("train-teacher", "--dataset", "cifar100", "--data-root", url),
        ("run", "shapes", "--out", url),
        ("demo", "--out", url),
        ("report", mine, "--out", url),
        ("evaluate", mine, "--out", url),
        ("export", mine, "--out", url),
        ("analyze", store, "--out", url),
        ("pull", "me/x", "--out", url),
    ):
        line = fails(*words)
        assert line.code == "path-is-url" and url in line, words
    assert tree(tmp_path) == before and not list(tmp_path.glob("*:"))


def test_paths_with_colons_are_paths() -> None:
    for url in ("gs://b/x", "az://b/x", "https://host/x", "S3://b/x", Path("s3://b/x")):
        with refuses("path-is-url", url):
            local_path(url)
    for name in ("a:b", "12:30/x", "C:/x", "x/s3:/y", "", "~/x"):
        assert local_path(name) == Path(name)


# --- settings that were not recorded --------------------------------------------------------------


def test_teachers_of_earlier_versions_are_compared_by_what_they_record(
    run: Run, fails: Fails, tmp_path: Path
) -> None:
    from richkd.models.weights import read_safetensors, save_tensors

    path = tmp_path / "t.safetensors"
    words = (
        "train-teacher",
        "--dataset",
        "shapes",
        "--limit",
        16,
        "--model",
        "resnet8",
        "--device",
        "cpu",
        "--out",
        path,
        "--epochs",
    )
    assert run(*words, 1).code == 0
    tensors, note = read_safetensors(path)
    del note["training"]
    save_tensors(path, tensors, note)
    (tmp_path / "t.json").unlink()
    before = tree(tmp_path)
    done = run(*words, 1, "--lr", 0.2)
    assert done.code == 0 and str(path) in done.err
    shown = run(*words, 1, "--json").json
    assert shown["seconds"] is None and shown["top1_last"] == float(note["test_accuracy"])
    for flags, value in ((("2",), "epochs"), ((1, "--seed", 5), "seed"), ((1, "--limit", 17), "")):
        line = fails(*words, *flags)
        assert line.code == "teacher-settings-differ" and value in line
    assert tree(tmp_path) == before


def test_an_interrupted_teacher_of_other_settings_is_named(
    run: Run, fails: Fails, tmp_path: Path
) -> None:
    path = tmp_path / "t.safetensors"
    words = (
        "train-teacher",
        "--dataset",
        "shapes",
        "--limit",
        16,
        "--model",
        "resnet8",
        "--device",
        "cpu",
        "--out",
        path,
        "--epochs",
    )
    with interrupted(SAVE):
        assert run(*words, 2).code == 130
    before = tree(tmp_path)
    for flags, values in (((3,), ("epochs", "2", "3")), ((2, "--lr", 0.1), ("lr", "0.05", "0.1"))):
        line = fails(*words, *flags)
        assert line.code == "run-settings-differ"
        assert all(value in line for value in values)
    assert tree(tmp_path) == before
    assert run(*words, 3, "--overwrite").code == 0
    assert set(tree(tmp_path)) == {"t.safetensors", "t.json"}


def test_a_teacher_with_damaged_checkpoints(run: Run, fails: Fails, tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    words = (
        "train-teacher",
        "--dataset",
        "shapes",
        "--limit",
        16,
        "--model",
        "resnet8",
        "--device",
        "cpu",
        "--epochs",
        3,
        "--out",
        path,
    )
    with interrupted(SAVE, 2):
        assert run(*words).code == 130
    last, previous = (
        tmp_path / "t.training" / f"{name}.safetensors" for name in ("checkpoint", "previous")
    )
    whole = previous.read_bytes()
    for file in (last, previous):
        content = file.read_bytes()
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 4]))
    assert fails(*words).code == "checkpoint-unreadable"
    previous.write_bytes(whole)
    done = run(*words)
    assert done.code == 0
    assert str(last) in done.err and "epoch 1 of 3" in done.err


def test_held_out_sets_that_would_be_empty_are_refused_before_all_runs(
    fails: Fails, store: Path, tmp_path: Path
) -> None:
    for holdout in ("0.001", "0.01"):
        for words in (("distill", "--student", "resnet8"), ("sweep", "--students", "resnet8")):
            said = fails(
                *words,
                "--cache",
                store,
                "--holdout",
                holdout,
                "--device",
                "cpu",
                "--out",
                tmp_path / "out",
            )
            assert said.code == "holdout-share"
            assert all(f" {value} " in said for value in (40, 0)) and holdout in said
    assert not list(tmp_path.iterdir())


def test_json_has_no_numbers_that_json_lacks(run: Run, store: Path, tmp_path: Path) -> None:
    from richkd.core.files import to_json

    odd = {"a": float("nan"), "b": [float("inf"), (1.5, float("-inf"))], "c": {"d": 2}}
    assert json.loads(to_json(odd)) == {"a": None, "b": [None, [1.5, None]], "c": {"d": 2}}
    done = run(
        "sweep",
        "--cache",
        store,
        "--students",
        "resnet8",
        "--methods",
        "kd,ce",
        "--seeds",
        1,
        "--epochs",
        1,
        "--batch-size",
        16,
        "--device",
        "cpu",
        "--out",
        tmp_path,
        "--json",
    )
    assert done.code == 0
    rows = json.loads(done.out, parse_constant=lambda name: pytest.fail(name))["leaderboard"]
    assert all(row["last"][1] is None for row in rows)  # no deviation of one run
