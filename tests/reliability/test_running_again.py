"""Every command twice, and killed and run again: its exit codes, and the files that it leaves."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_hub import TOKEN, serving
from forked import Forks, Kill, Outcome
from helpers import assert_same_run, tree
from safetensors import safe_open

from richkd.config.recipes import packaged

pytestmark = pytest.mark.fault
SIGNALS = (signal.SIGKILL, signal.SIGTERM)
RUN = {"recipe.toml", "metrics.jsonl", "last.safetensors", "best.safetensors", "summary.json"}
CUT = {
    "recipe.toml",
    "metrics.jsonl",
    "best.safetensors",
    "checkpoint.safetensors",
    "previous.safetensors",
}
FEW = {"richkd.data.datasets:SHAPES_TEST": 40}
DEMO = {
    **FEW,
    "richkd.demo:RECIPE": "../small.toml",
    "richkd.teachers.demo_clip:DRAWINGS": 128,
}
TEACHER = (
    "train-teacher",
    "--dataset",
    "shapes",
    "--limit",
    48,
    "--model",
    "resnet8",
    "--epochs",
    4,
    "--device",
    "cpu",
    "--out",
    "t.safetensors",
)
STUDENT = ("--student", "resnet8", "--epochs", 4, "--batch-size", 16, "--device", "cpu")


@pytest.fixture
def again(forks: Forks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """Run a command in an empty folder, which it may be killed in."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("RICHKD_HOME", str(tmp_path / "home"))

    def run(*words: Any, kill: Kill | None = None, values: dict[str, Any] = FEW) -> Outcome:
        return forks.run(*words, kill=kill, values=values)

    return run


def left(folder: str = ".") -> set[str]:
    """Every file, hidden ones too."""
    return {str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file()}


def of(folder: str, names: set[str]) -> set[str]:
    return {f"{folder}/{name}" for name in names}


def cut_off(done: Outcome, by: int) -> None:
    assert done.code == (-by if by == signal.SIGKILL else 128 + by), done
    assert "Traceback" not in done.err


def locked(by: int, name: str) -> set[str]:
    """The lock of something, which stays where nothing can be done about the signal."""
    return {f".{name}.lock"} if by == signal.SIGKILL else set()


def tensors(path: str) -> tuple[dict[str, bytes], dict[str, str]]:
    with safe_open(path, "np") as file:
        values = {name: file.get_tensor(name).tobytes() for name in file.keys()}  # noqa: SIM118
        return values, file.metadata()


@pytest.mark.slow
@pytest.mark.parametrize("by", SIGNALS)
def test_train_teacher(again: Callable[..., Outcome], by: int) -> None:
    whole = again(*TEACHER[:-1], "whole.safetensors", "--json")
    assert whole.code == 0 and left() == {"whole.safetensors", "whole.json"}
    at = "richkd.training.checkpoint:Checkpoints.save"
    cut_off(again(*TEACHER, kill=Kill(at, 1, by)), by)
    cut_off(again(*TEACHER, kill=Kill(at, 2, by)), by)  # after the third epoch
    training = of("t.training", {"recipe.toml", "checkpoint.safetensors", "previous.safetensors"})
    others = {"whole.safetensors", "whole.json"}
    assert left() - others == training | locked(by, "t.safetensors")
    done = again(*TEACHER)
    assert done.code == 0 and "resuming after epoch 3 of 4" in done.err, done.err
    assert left() - others == {"t.safetensors", "t.json"}
    assert tensors("t.safetensors") == tensors("whole.safetensors")
    before = tree(Path())
    for words in (TEACHER, (*TEACHER, "--resume")):
        done = again(*words)
        assert done.code == 0 and "t.safetensors is already complete" in done.err
    first, second = (json.loads(again(*TEACHER, "--json").out) for _ in range(2))
    assert first == second == json.loads(Path("t.json").read_text())
    timed = {"seconds": 0, "weights": ""}
    assert {**first, **timed} == {**whole.json, **timed}
    assert tree(Path()) == before


@pytest.mark.slow
def test_a_teacher_killed_where_its_weights_are_written(again: Callable[..., Outcome]) -> None:
    cut_off(
        again(*TEACHER, kill=Kill("richkd.training.run_folder:TeacherFolder.remove", before=True)),
        signal.SIGKILL,
    )
    assert "t.safetensors" in left() and "t.training/recipe.toml" in left()
    again_ = again(*TEACHER)
    assert again_.code == 0 and "already complete" in again_.err
    assert left() == {"t.safetensors", "t.json"}


@pytest.mark.slow
@pytest.mark.parametrize("by", SIGNALS)
def test_precompute(again: Callable[..., Outcome], clip_dir: Path, by: int, tmp_path: Path) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text('[train-teacher]\nepochs = 3\nout = "t.safetensors"\n')
    words = (
        "precompute",
        "--dataset",
        "shapes",
        "--limit",
        48,
        "--teacher",
        "resnet8",
        "--clip",
        clip_dir,
        "--views",
        3,
        "--device",
        "cpu",
        "--recipe",
        recipe,
        "--out",
        "s.zarr",
    )
    assert again(*words[:-1], "whole.zarr").code == 0
    whole, teacher = tree(Path("whole.zarr")), tensors("t.safetensors")
    shutil.rmtree("whole.zarr")
    Path("t.safetensors").unlink()
    Path("t.json").unlink()
    at = Kill("richkd.training.checkpoint:Checkpoints.save", 2, by)
    cut_off(again(*words, kill=at), by)
    training = of("t.training", {"recipe.toml", "checkpoint.safetensors", "previous.safetensors"})
    assert left() == training | locked(by, "t.safetensors")
    done = again(*words, kill=Kill("richkd.store.writer:StoreWriter.flush", 1, by))
    cut_off(done, by)
    assert "resuming the training" in done.err and "resuming after epoch 2 of 3" in done.err
    assert tensors("t.safetensors") == teacher and "t.json" in left()
    done = again(*words)
    assert done.code == 0 and "resuming: " in done.err, done.err
    assert left() == of("s.zarr", {*whole}) | {"t.safetensors", "t.json"}
    arrays = {name: data for name, data in tree(Path("s.zarr")).items() if name != "zarr.json"}
    assert arrays == {name: data for name, data in whole.items() if name != "zarr.json"}
    before, told = tree(Path()), json.loads(again("inspect", "s.zarr", "--json").out)
    for flag in ((), ("--resume",), ("--json",)):
        done = again(*words, *flag)
        assert done.code == 0 and ("already complete" in done.err or flag == ("--json",))
    assert json.loads(done.out) == told
    assert tree(Path()) == before


@pytest.mark.slow
@pytest.mark.parametrize("by", SIGNALS)
def test_distill_and_what_is_made_of_a_run(
    again: Callable[..., Outcome], store: Path, by: int
) -> None:
    words = ("distill", "--cache", store, *STUDENT, "--method", "kd", "--out")
    whole = again(*words, "whole", "--json")
    assert whole.code == 0
    at = "richkd.training.run_folder:RunFolder.save_epoch"
    cut_off(again(*words, "run", kill=Kill(at, 2, by)), by)
    assert left("run") == CUT and ((by == signal.SIGKILL) == (".run.lock" in left()))
    cut_off(
        again(
            *words,
            "run",
            kill=Kill("richkd.training.run_folder:RunFolder.finish", 1, by, before=True),
        ),
        by,
    )
    done = again(*words, "run", "--json")
    assert done.code == 0 and left() == of("whole", RUN) | of("run", RUN)
    assert_same_run(Path("whole"), Path("run"))
    assert done.json["images_per_second"] is not None
    lines = map(json.loads, Path("run/metrics.jsonl").read_text().splitlines())
    assert done.json["seconds"] >= sum(line["seconds"] for line in lines)
    before = tree(Path())
    for flag in ((), ("--resume",)):
        again_ = again(*words, "run", *flag)
        assert again_.code == 0 and "run is already complete" in again_.err
    assert again(*words, "run", "--json").json == done.json
    both = again(*words, "run", "--resume", "--overwrite")
    assert both.code == 2 and "contradict" in both.err
    assert tree(Path()) == before
    shutil.rmtree("whole")
    if by != signal.SIGKILL:
        return

    made = {
        ("report", "run"): (
            Kill("richkd.report:write_csv", 1, by, before=True),
            {"report.html", "report.json", "leaderboard.csv"},
        ),
        ("evaluate", "run"): (
            Kill("richkd.report.evaluation:render", 1, by),
            {"evaluation.json", "evaluation.html", "comparison.json"},
        ),
        ("export", "run", "--format", "torch"): (
            Kill("richkd.tools.export:write_program", 1, by),
            {"student.pt2"},
        ),
    }
    there = RUN
    for command, (kill, files) in made.items():
        cut_off(again(*command, kill=kill), by)
        there = there | files
        for _ in range(2):
            done = again(*command)
            assert done.code == 0, done.err
            assert left() == of("run", there), command
    done = again(*words, "run", "--overwrite")
    assert done.code == 0 and "already complete" not in done.err
    assert left("run") == RUN | {"report.html", "report.json", "leaderboard.csv"}


@pytest.mark.slow
@pytest.mark.parametrize("by", SIGNALS)
def test_sweep(again: Callable[..., Outcome], store: Path, by: int) -> None:
    words = (
        "sweep",
        "--cache",
        store,
        "--students",
        "resnet8",
        "--methods",
        "ce,kd",
        "--seeds",
        1,
        *STUDENT[2:],
        "--concurrent",
        1,
        "--out",
        "runs",
        "--json",
    )
    names = [f"runs/shapes-resnet8-{method}-s0" for method in ("ce", "kd")]
    done = again(*words, kill=Kill("richkd.training.run_folder:RunFolder.save_epoch", 6, by))
    cut_off(done, by)
    lock = {"runs/.shapes-resnet8-kd-s0.lock"} if by == signal.SIGKILL else set()
    assert left() == of(names[0], RUN) | of(names[1], CUT) | lock
    first, second = again(*words), again(*words)
    assert first.code == second.code == 0
    assert json.loads(first.out, parse_constant=pytest.fail) == second.json  # strict JSON
    assert left() == of(names[0], RUN) | of(names[1], RUN)


@pytest.mark.slow
@pytest.mark.parametrize("by", SIGNALS)
def test_run(
    again: Callable[..., Outcome], clip_dir: Path, shapes_teacher: Path, tmp_path: Path, by: int
) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text(
        f'[precompute]\ndataset = "shapes"\nlimit = 48\nteacher = "resnet8"\nviews = 2\n'
        f'clip = "{clip_dir}"\nteacher_weights = "{shapes_teacher}"\n'
        f'[distill]\nstudent = "resnet8"\nmethod = "kd"\nepochs = 3\nbatch_size = 16\n'
    )
    words = ("run", recipe, "--device", "cpu", "--json")
    kills = (
        "richkd.store.writer:StoreWriter.flush",
        "richkd.training.run_folder:RunFolder.finish",
        "richkd.report:write_csv",
    )
    for at in kills:
        cut_off(again(*words, kill=Kill(at, 1, by)), by)
    first, second = again(*words), again(*words)
    assert first.code == second.code == 0, first.err + second.err
    assert first.json == second.json
    run = of("runs/mine/resnet8-kd-s0", RUN)
    page = of("runs/mine", {"report.html", "report.json", "leaderboard.csv"})
    assert {name for name in left() if not name.startswith("cache/shapes-resnet8.zarr/")} == (
        run | page
    )


@pytest.mark.slow
def test_demo(again: Callable[..., Outcome], tmp_path: Path) -> None:
    recipe = (packaged() / "demo.toml").read_text()
    for was, now in (("1000", "48"), ("24", "3"), ("30", "3")):
        recipe = recipe.replace(f"= {was}", f"= {now}")
    Path("../small.toml").write_text(recipe.replace("eval_every = 10", "eval_every = 1"))

    def demo(*flags: Any, kill: Kill | None = None) -> Outcome:
        return again("demo", *flags, kill=kill, values=DEMO)

    saved = "richkd.training.checkpoint:Checkpoints.save"
    cut_off(demo(kill=Kill(saved, 2)), signal.SIGKILL)
    assert {path.name for path in (tmp_path / "home").iterdir()} == {
        "demo-clip-1.training",
        ".demo-clip-1.lock",
    }
    done = demo(kill=Kill(saved, 2, signal.SIGTERM))  # one of CLIP was left, one is the teacher's
    cut_off(done, signal.SIGTERM)
    assert "training the demo CLIP" in done.err and "resuming after epoch 2 of 3" in done.err
    assert [path.name for path in (tmp_path / "home").iterdir()] == ["demo-clip-1"]
    cut_off(demo(kill=Kill("richkd.training.run_folder:RunFolder.save_epoch", 2)), signal.SIGKILL)
    first = demo()
    assert first.code == 0 and "resuming after epoch 2 of 3" in first.err, first.err
    files = left("runs/demo")
    assert {name for name in files if not name.startswith("shapes.zarr/")} == {
        "teacher.safetensors",
        "teacher.json",
        "report.html",
        "report.json",
        "leaderboard.csv",
        "shapes-analysis.html",
        "shapes-analysis.json",
        *(f"resnet8-{method}-s0/{name}" for method in ("ce", "kd", "richkd") for name in RUN),
    }
    second = demo()
    assert second.code == 0 and second.err.count("is already complete") == 4
    assert left("runs/demo") == files
    other = demo("--seed", 1)
    assert other.code == 2 and "seed was 0 and is now 1" in other.err
    assert left("runs/demo") == files
    Path("runs/demo/notes.txt").write_text("precious")
    anew = demo("--overwrite", "--seed", 1)
    assert anew.code == 0 and "training teacher" in anew.err, anew.err
    assert Path("runs/demo/notes.txt").read_text() == "precious"


@pytest.mark.slow
def test_commands_on_a_store(again: Callable[..., Outcome], store: Path) -> None:
    by = signal.SIGKILL
    shutil.copytree(store, "s.zarr")
    whole = left("s.zarr")
    pages = {"s-analysis.html", "s-analysis.json"}
    done = again("analyze", "s.zarr", kill=Kill("richkd.report.analysis:render", 1, by))
    cut_off(done, by)
    for words in (
        ("analyze", "s.zarr"),
        ("inspect", "s.zarr"),
        ("verify", "s.zarr"),
        ("repair", "s.zarr"),
        (
            "plan",
            "--dataset",
            "shapes",
            "--limit",
            48,
            "--views",
            2,
            "--teacher",
            "resnet8",
            "--clip",
            "none",
            "--device",
            "cpu",
        ),
    ):
        for _ in range(2):
            done = again(*words)
            assert done.code == 0, (words, done.err)
        assert left() == of("s.zarr", whole) | pages, words
    damaged = next(Path("s.zarr").glob("train/teacher_logits/c/1/0/0"))
    damaged.unlink()
    cut_off(again("repair", "s.zarr", kill=Kill("richkd.store.writer:reopen", 1, by)), by)
    done = again("repair", "s.zarr", "--json")
    assert done.code == 0 and len(done.json["blocks"]) == 1, done.err
    assert again("repair", "s.zarr", "--json").json["blocks"] == []
    assert left() == of("s.zarr", whole) | pages
    assert again("verify", "s.zarr").code == 0


@pytest.mark.slow
@pytest.mark.parametrize("by", SIGNALS)
def test_push_and_pull(
    again: Callable[..., Outcome],
    store: Path,
    monkeypatch: pytest.MonkeyPatch,
    by: int,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    constants = {
        "huggingface_hub.constants:HF_HUB_DISABLE_XET": True,
        "huggingface_hub.constants:HF_HOME": str(tmp_path / "hf"),
    }

    def call(*words: Any, kill: Kill | None = None) -> Outcome:
        return again(*words, kill=kill, values=constants)

    with serving() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        push = ("push", store, "me/shapes", "--json")
        cut_off(call(*push, kill=Kill("huggingface_hub:HfApi.upload_folder", 1, by)), by)
        for _ in range(2):
            done = call(*push)
            assert done.code == 0, done.err
        pull = ("pull", "me/shapes", "--json")
        done = call(*pull, kill=Kill("richkd.tools.hub:_check_download", 2, by))
        cut_off(done, by)
        asked = len(hub.asked)
        first = call(*pull)
        assert first.code == 0, first.err
        chunks = [line for line in hub.asked[asked:] if line.startswith("GET") and "/c/" in line]
        assert not chunks, "what came before is not asked for again"
        second = call(*pull)
        assert second.code == 0 and second.json == first.json
        assert left() == of("cache/shapes.zarr", left(str(store)))
