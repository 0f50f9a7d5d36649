"""The command line: quick help, one clear line for every mistake, machines served by --json."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import Forks
from helpers import Refusal, changed, tree

import richkd
from richkd.cli import app
from richkd.config.settings import Distill, Precompute, TrainTeacher
from richkd.data.datasets import SHAPES_SEEDS

Run = Callable[..., Any]
Fails = Callable[..., Refusal]


def fresh(*arguments: str, **settings: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "richkd", *arguments],
        capture_output=True,
        text=True,
        check=False,
        **settings,
    )


def test_help_names_the_commands() -> None:
    done = fresh("--help")
    assert done.returncode == 0
    assert all(f" {c} " in done.stdout for c in ("demo", "precompute", "distill", "inspect"))


@pytest.mark.parametrize("command", ["demo", "precompute", "distill", "run", "evaluate"])
def test_help_of_a_command_fits_80_columns(command: str) -> None:
    done = fresh(command, "--help", env={**os.environ, "COLUMNS": "80", "TERM": "dumb"})
    assert done.returncode == 0
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_version(run: Run) -> None:
    import richkd

    assert run("--version").out.strip() == f"richkd {richkd.__version__}"


@pytest.mark.parametrize(
    ("command", "code", "values"),
    [
        ("distil", "", "'distil'"),
        ("distill --cash x", "", "--cash"),
        ("distill --epochs many", "", "--epochs integer"),
        ("distill", "cache-not-given", "--cache"),
        ("distill --cache nowhere.zarr", "cache-missing", "nowhere.zarr"),
        ("distill --cache x --recipe nowhere", "recipe-missing", "'nowhere'"),
        ("distill --cache x --set temperature", "value-malformed", "--set 'temperature'"),
        ("distill --cache x --prompts a,b", "value-malformed", "--prompts 'a,b'"),
        ("distill --cache x --scale much", "unknown-name", "scale 'much' native raw"),
        ("distill --cache x --alpha most", "value-malformed", "alpha 'most' auto"),
        ("distill --cache x --alpha 1.5", "value-out-of-range", "alpha 1.5 1]"),
        ("distill --cache x --alpha auto --holdout 0.95", "value-out-of-range", "0.95 0.9"),
        ("distill --cache x --validation 0.1", "validation-belongs-to-cache", "--holdout 0.1"),
        ("distill --cache x --weights cnn=1,cnn=2", "value-malformed", "cnn=1,cnn=2 auto"),
        ("distill --cache x --weights cnn=0,b=0", "value-out-of-range", "cnn=0,b=0"),
        ("distill --cache x --weights cnn=-1", "value-out-of-range", "weights.cnn -1"),
        ("distill --cache x --weights auto --alpha 0.5", "value-out-of-range", "alpha 0.5"),
        ("distill --cache x --weights auto --scale raw", "value-out-of-range", "--balance none"),
        ("distill --cache x --balance none", "value-out-of-range", "balance weights"),
        ("distill --cache x --clip-head linear", "unknown-name", "'linear' zero-shot probe"),
        ("distill --cache x --student-set patch_size", "value-malformed", "--student-set"),
        ("distill --cache x --resume --overwrite", "resume-and-overwrite", "--overwrite"),
        ("precompute --dataset shapes --alpha auto", "alpha-auto-in-stage-one", "distill"),
        ("precompute --dataset shapes --alpha most", "value-malformed", "'most'"),
        ("methods kdd", "unknown-name", "'kdd' kd"),
        ("run nowhere", "recipe-missing", "'nowhere'"),
        ("run kd-t4 --student resnet9", "unknown-model", "'resnet9'"),
        ("inspect nowhere.zarr", "cache-missing", "nowhere.zarr"),
        ("precompute", "dataset-not-given", "--dataset"),
        ("precompute --teacher a --teacher=b", "flag-repeated", "--teacher 2 add-teacher"),
        ("precompute --dataset cifar1000", "unknown-name", "'cifar1000' cifar100"),
        ("precompute --dataset cifar10:x", "dataset-takes-no-path", "cifar10"),
        ("precompute --dataset shapes --alpha 1.2", "value-out-of-range", "alpha 1.2 1]"),
        ("precompute --dataset shapes --views 0", "value-out-of-range", "views 0 1"),
        ("precompute --dataset shapes --limit 0", "value-out-of-range", "limit 0 1"),
        ("precompute --dataset shapes --limit 20 --views 163 --clip none", "too-many-views", "162"),
        ("precompute --dataset shapes --dtype float8", "unknown-name", "'float8' float16 float32"),
        ("precompute --dataset shapes --keep top-0", "value-out-of-range", "'top-0' top-50"),
        ("precompute --dataset shapes --keep-bits 11", "value-out-of-range", "keep_bits 11 10"),
        ("precompute --dataset shapes --teacher-std 0", "value-out-of-range", "teacher_std 0"),
        ("precompute --dataset shapes --teacher-mean a", "value-malformed", "--teacher-mean 'a'"),
        ("precompute --dataset shapes --prompts mine.txt", "unknown-name", "'mine.txt'"),
        ("precompute --dataset shapes --clip ViT-B-99:openai", "unknown-name", "'ViT-B-99'"),
        (
            "precompute --dataset shapes --clip ViT-L-14:openai",
            "clip-activation",
            "ViT-L-14-quickgelu:openai",
        ),
        (
            "precompute --dataset shapes --teacher resnet21 --clip none",
            "unknown-model",
            "resnet21 resnet20",
        ),
        ("precompute --dataset shapes --teacher-weights no.pth", "weights-missing", "no.pth"),
        ("precompute --dataset imagefolder:nowhere", "dataset-folder-missing", "nowhere"),
        ("precompute --dataset shapes --device tpu9", "device-unusable", "'tpu9'"),
        ("train-teacher --dataset shapes --model resnet21", "unknown-model", "'resnet21'"),
        ("train-teacher --dataset shapes --out weights.pth", "value-out-of-range", "weights.pth"),
        ("train-teacher --dataset shapes --schedule linear", "unknown-name", "'linear' cosine"),
        (
            "train-teacher --dataset shapes --epochs 90 --milestones 30,90",
            "value-out-of-range",
            "milestones [30, 90] 90",
        ),
        ("distill --cache x --milestones 60,30", "value-out-of-range", "milestones [60, 30]"),
        ("distill --cache x --milestones 30,x", "value-malformed", "--milestones '30,x'"),
        ("sweep --cache x --students resnet8 --milestones 240", "value-out-of-range", "[240] 240"),
        ("sweep --cache x --students ,", "sweep-empty", "--students"),
        ("sweep --cache x --students resnet8 --alpha 0.5,x", "value-malformed", "'x'"),
        ("sweep --cache x --students resnet8 --concurrent many", "unknown-name", "'many' auto"),
        ("sweep --cache x --students resnet8 --address auto", "value-out-of-range", "--engine ray"),
        ("run kd-t4 --milestones 300", "value-out-of-range", "milestones [300]"),
        (
            "distill --cache x --schedule cosine --milestones 3",
            "value-out-of-range",
            "milestones cosine",
        ),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(
    fails: Fails,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    code: str,
    values: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    line = fails(*command.split())
    assert line.code == code, line
    assert all(value in line for value in values.split()), line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "command",
    [
        "distill --cache {store} --out {file}/run",
        "precompute --dataset shapes --clip none --out {file}/s.zarr",
        "train-teacher --dataset shapes --out {file}/t.safetensors",
        "distill --cache {file}",
        "distill --cache {store} --recipe {file}",
        "precompute --dataset shapes --clip none --teacher-weights {file}",
    ],
)
def test_a_file_where_something_else_should_be(
    fails: Fails, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_bytes(b"\xff\x00 precious")
    before = tree(tmp_path)
    assert "file" in fails(*command.format(store=store, file="file").split())
    assert changed(before, tree(tmp_path)) == []


def test_weights_that_do_not_fit_or_hold_code(
    fails: Fails, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    monkeypatch.chdir(tmp_path)
    for name, content in {
        "wrn.pth": {"model": richkd.create_model("wrn_16_1", 16).state_dict()},
        "ten.pth": richkd.create_model("resnet8", 10).state_dict(),
        "code.pth": {"model": {"fc.bias": torch.ones(1)}, "opt": Bomb()},
    }.items():
        torch.save(content, name)
    before = tree(tmp_path)
    command = (
        "precompute",
        "--dataset",
        "shapes",
        "--limit",
        20,
        "--teacher",
        "resnet8",
        "--clip",
        "none",
        "--teacher-weights",
    )
    for file, code in {
        "wrn.pth": "weights-other-architecture",
        "ten.pth": "weights-do-not-fit",
        "code.pth": "weights-unsafe",
    }.items():
        line = fails(*command, file)
        assert line.code == code and file in line
    assert not (tmp_path / "ran").exists()
    assert changed(before, tree(tmp_path)) == []


def test_what_a_store_without_clip_cannot_give(
    fails: Fails, make_store: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = make_store(clip="none")
    monkeypatch.chdir(tmp_path)
    for wanted in (
        ("--method", "richkd-f"),
        ("--method", "richkd-l"),
        ("--method", "richkd-ls"),
        ("--method", "dkd", "--target", "clip"),
        ("--method", "kd", "--target", "fused", "--clip-head", "probe"),
    ):
        line = fails("distill", "--cache", bare, *wanted)
        assert line.code == "array-absent" and "--clip none" in line and "--method kd" in line
    line = fails("distill", "--cache", bare, "--method", "sp", "--target", "fused")
    assert line.code == "target-not-taken" and "method sp" in line
    assert not list(tmp_path.iterdir())


def test_a_student_by_its_own_settings(run: Run, store: Path, tmp_path: Path) -> None:
    done = run(
        "distill",
        "--cache",
        store,
        "--out",
        tmp_path / "r",
        "--student",
        "test_vit",
        "--student-set",
        "patch_size=8",
        "--method",
        "kd",
        "--set",
        "standardize=true",
        "--epochs",
        1,
        "--json",
    )
    assert done.code == 0, done.err
    recorded = (tmp_path / "r" / "recipe.toml").read_text()
    assert "patch_size = 8" in recorded and "standardize = true" in recorded
    plain = sum(p.numel() for p in richkd.create_model("test_vit", 16, image_size=32).parameters())
    assert done.json["parameters"] != plain


def test_no_network_for_data_is_found_first(
    fails: Fails, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*_: object, **__: object) -> None:
        raise OSError("Name or service not known")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", offline)
    line = fails("precompute", "--dataset", "cifar100")
    assert line.code == "dataset-download-failed" and "cifar-100-python.tar.gz" in line


def test_no_network_for_clip_is_found_before_a_teacher_is_trained(
    fails: Fails, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*_: object, **__: object) -> None:
        raise OSError("Name or service not known")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("open_clip.factory.download_pretrained", offline)
    monkeypatch.setattr("richkd.teachers.clip.hub_fault", lambda: None)
    clip = "ViT-B-32:laion2b_s34b_b79k"
    line = fails("precompute", "--dataset", "shapes", "--limit", 20, "--clip", clip)
    assert line.code == "clip-cannot-be-loaded" and clip in line and "--clip DIRECTORY" in line
    assert not list(tmp_path.iterdir())


def test_teacher_of_other_classes(
    fails: Fails, shapes_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("richkd.data.shapes.CLASS_NAMES", ("a", "b"))
    line = fails(
        "precompute",
        "--dataset",
        "shapes",
        "--limit",
        20,
        "--teacher",
        "resnet8",
        "--teacher-weights",
        shapes_teacher,
        "--clip",
        "none",
    )
    assert line.code == "weights-do-not-fit" and "resnet8" in line
    assert not list(tmp_path.iterdir())


def test_both_stages_and_json(
    run: Run,
    fails: Fails,
    shapes_teacher: Path,
    clip_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    stage_one = (
        "precompute",
        "--dataset",
        "shapes",
        "--limit",
        32,
        "--teacher",
        "resnet8",
        "--teacher-weights",
        shapes_teacher,
        "--clip",
        clip_dir,
        "--views",
        2,
    )
    done = run(*stage_one)
    assert done.code == 0, done.err
    assert "of arrays before compression, 2 views" in done.err and "CLIP zero-shot:" in done.err
    assert done.out.strip() == "next: richkd distill --cache cache/shapes.zarr"
    before = tree(tmp_path / "cache")
    again = run(*stage_one)
    assert again.code == 0 and "is already complete" in again.err and again.out == done.out
    line = fails(*stage_one, "--views", 3)
    assert line.code == "cache-settings-differ" and "views was 2 and is now 3" in line
    assert changed(before, tree(tmp_path / "cache")) == []
    assert run(*stage_one, "--overwrite").code == 0

    text = run("inspect", "cache/shapes.zarr")
    assert text.code == 0 and "train/fused_logits" in text.out and "2×32×16" in text.out
    summary = run("inspect", "cache/shapes.zarr", "--json").json
    assert summary["complete"] is True and summary["manifest"]["prompts"][0] == "a photo of a {}"
    assert summary["arrays"]["train/fused_logits"]["shape"] == [2, 32, 16]
    assert summary["stored_bytes"] == sum(
        len(data)
        for name, data in tree(tmp_path / "cache/shapes.zarr").items()
        if "/" in name and name not in ("train/zarr.json", "test/zarr.json", "text/zarr.json")
    )

    stage_two = (
        "distill",
        "--cache",
        "cache/shapes.zarr",
        "--student",
        "resnet8",
        "--epochs",
        2,
        "--set",
        "temperature=2.5",
        "--set",
        "negatives=8",
    )
    done = run(*stage_two)
    assert done.code == 0, done.err
    assert "CNN teacher" in done.out and "resnet8 by richkd" in done.out
    assert max(map(len, done.out.splitlines())) <= 80
    assert "epoch 2/2: loss" in done.err
    again = run(*stage_two)
    assert again.code == 0 and "is already complete" in again.err
    result = run(*stage_two, "--overwrite", "--json")
    assert result.err == "" and result.json["method"] == "richkd"
    recipe = (tmp_path / "runs/shapes-resnet8-richkd-s0/recipe.toml").read_text()
    assert "temperature = 2.5" in recipe and "negatives = 8" in recipe


def test_train_teacher_is_found_by_precompute(
    run: Run, fails: Fails, clip_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = ("--dataset", "shapes", "--limit", 24)
    training = ("train-teacher", *data, "--model", "resnet8", "--epochs", 1, "--seed", 3)
    summary = run(*training, "--json").json
    assert summary["weights"] == "teachers/shapes-24-resnet8.safetensors"
    assert Path(summary["weights"]).is_file()
    assert run(*training, "--json").json == summary
    line = fails(*training, "--epochs", 2)
    assert line.code == "teacher-settings-differ" and "epochs was 1 and is now 2" in line
    stage_one = ("precompute", *data, "--teacher", "resnet8", "--clip", clip_dir, "--views", 1)
    done = run(*stage_one)
    assert done.code == 0 and "training teacher" not in done.err
    manifest = run("inspect", "cache/shapes.zarr", "--json").json["manifest"]
    assert manifest["teacher"]["accuracy"] == pytest.approx(summary["top1_last"])


def test_a_teacher_found_by_name_that_learnt_other_data_is_refused(
    run: Run, fails: Fails, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = ("--dataset", "shapes", "--limit", 24)
    assert run("train-teacher", *data, "--model", "resnet8", "--epochs", 1).code == 0
    monkeypatch.setitem(SHAPES_SEEDS, "train", 9)
    stage_one = ("precompute", *data, "--teacher", "resnet8", "--clip", "none", "--views", 1)
    assert fails(*stage_one).code == "teacher-of-other-data"
    weights = "teachers/shapes-24-resnet8.safetensors"
    assert run(*stage_one, "--teacher-weights", weights).code == 0


def test_precompute_without_weights_trains_the_teacher_and_says_so(
    run: Run, clip_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.toml").write_text(
        "[train-teacher]\nepochs = 2\nbatch_size = 8\n"
        f"[precompute]\ndataset = 'shapes'\nlimit = 24\nteacher = 'resnet8'\nclip = '{clip_dir}'\n"
        "views = 2\n[distill]\nstudent = 'resnet8'\nmethod = 'kd'\nepochs = 3\n"
    )
    done = run("precompute", "--recipe", "r.toml")
    assert done.code == 0
    assert "no --teacher-weights given" in done.err and "teacher resnet8: 2 epochs" in done.err
    done = run("distill", "--recipe", "r.toml", "--cache", "cache/shapes.zarr", "--json")
    assert (done.json["epochs"], done.json["method"]) == (3, "kd")


def test_interrupts_leave_with_the_usual_code(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("richkd.tools.inspect.summarize", interrupt)
    assert run("inspect", "x").code == 130


def test_a_bug_is_a_traceback_and_one(forks: Forks) -> None:
    script = (
        "import richkd.tools.inspect, richkd.__main__, sys\n"
        "richkd.tools.inspect.summarize = lambda path: 1 / 0\n"
        "sys.argv = ['richkd', 'inspect', 'x']; richkd.__main__.main()"
    )
    done = forks.run_python(script)
    assert done.code == 1 and "ZeroDivisionError" in done.err


def test_json_of_a_store_without_clip(run: Run, make_store: Callable[..., Path]) -> None:
    path = make_store(clip="none")
    assert run("inspect", path, "--json").json["manifest"]["clip"] is None
    assert "CLIP" in run("inspect", path).out
    assert json.loads((path / "zarr.json").read_text())["attributes"]["complete"] is True


def test_every_command_has_examples_that_parse() -> None:
    import typer

    group = typer.main.get_command(app)
    context = typer.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        heading, *examples = command.epilog.replace("\\[", "[").split("\n\n")
        assert heading == "Examples:" and examples, name
        for example in examples:
            program, verb, *arguments = shlex.split(example)
            assert (program, verb) == ("richkd", name)
            assert command.make_context(verb, arguments)


@pytest.mark.parametrize(
    ("command", "settings"),
    [("train-teacher", TrainTeacher), ("precompute", Precompute), ("distill", Distill)],
)
def test_every_setting_is_a_flag(command: str, settings: type) -> None:
    import typer

    group = typer.main.get_command(app)
    params = group.get_command(typer.Context(group), command).params
    names = [param.name for param in params if not param.hidden]
    in_recipes_only = {"teachers"}  # a table for each
    assert {field.name for field in fields(settings)} - in_recipes_only <= {*names}
    assert len(names) == len({*names})


def test_home_is_expanded_in_every_path(
    run: Run, fails: Fails, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for words in (
        ("inspect", "~/x.zarr"),
        ("report", "~/x.zarr"),
        ("distill", "--cache=~/x.zarr"),
        ("verify", "x", "--teacher=~/x.zarr"),
        ("run", "~/x.zarr"),
    ):
        assert "~" not in fails(*words), words
    (tmp_path / "images").mkdir()
    found = run("doctor", "--data-root=~/images", "--json").json
    assert str(tmp_path / "images") in json.dumps(found) and "~/images" not in json.dumps(found)


def test_help_shows_brackets(run: Run) -> None:
    assert "[sweep]" in fresh("run", "--help").stdout
    assert "(richkd[corruptions])" in " ".join(fresh("evaluate", "--help").stdout.split())
