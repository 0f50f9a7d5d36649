"""Students, and teachers of train-teacher, that start from weights of a file or of timm."""

from __future__ import annotations

import json
import shutil
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from forked import Outcome
from helpers import Refusal, assert_same_run, refuses
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from test_distill import CutOff, interrupted, same, train, weights

from richkd.config.settings import Distill, TrainTeacher
from richkd.core.progress import Report
from richkd.core.seeds import derive_seed
from richkd.data.datasets import load_dataset
from richkd.data.framing import NetworkInput
from richkd.models import create_model
from richkd.models.weights import file_sha256, read_note, save_tensors
from richkd.teachers import cnn
from richkd.training import initial
from richkd.training.checkpoint import Checkpoints
from richkd.training.loop import Trainer
from richkd.training.run_folder import load_runs, load_student

Run = Callable[..., Outcome]
Fails = Callable[..., Refusal]
NAME = "test_resnet.r160_in1k"
CLASSES = 16  # of shapes


def published(name: str) -> torch.nn.Module:
    """A network of timm with random weights and its own classifier, from a fixed seed."""
    torch.manual_seed(7)
    return timm.create_model(name)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache with weights of two networks, in its exact layout, and no network."""
    root = tmp_path / "hub"
    for name in (NAME, "test_vit.r160_in1k"):
        folder = root / f"models--timm--{name}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text("0" * 40)
        (folder / "blobs").mkdir()
        blob = folder / "blobs" / ("a" * 64)
        save_file(published(name).state_dict(), blob)
        snapshot = folder / "snapshots" / ("0" * 40)
        snapshot.mkdir(parents=True)
        (snapshot / "model.safetensors").symlink_to(f"../../blobs/{blob.name}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(root))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return root


@pytest.fixture
def first(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, torch.Tensor]]]:
    """The weights of every student and teacher before its first step."""
    seen: list[dict[str, torch.Tensor]] = []
    steps = Trainer.steps

    def watched(self: Trainer, epoch: int, *arguments: Any) -> Any:
        if epoch == 1:
            seen.append({k: v.clone() for k, v in self.model.state_dict().items()})
        return steps(self, epoch, *arguments)

    monkeypatch.setattr(Trainer, "steps", watched)
    yield seen


def drawn(name: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """The weights that a seed draws."""
    torch.manual_seed(derive_seed(seed, 0, 2))
    return create_model(name, CLASSES, image_size=32).state_dict()


def fresh_head(own: Any, theirs: Any, head: str = "fc.") -> dict[str, torch.Tensor]:
    return {name: (own if name.startswith(head) else theirs)[name] for name in own}


def test_a_pretrained_student_trains_and_resumes(
    store: Path, tmp_path: Path, hub: Path, first: Any, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    """From the hub's cache; normalised as its weights expect; resumed after they are gone."""
    settings = {"student": NAME, "student_weights": "pretrained", "method": "kd", "ema": 0.5}
    done = run(
        *f"distill --cache {store} --out {tmp_path / 'whole'} --student {NAME}".split(),
        *f"--student-weights pretrained --method kd --ema 0.5 --epochs {2} --lr 0.02".split(),
        *f"--batch-size 16 --device {'cpu'}".split(),
    )
    assert done.code == 0, done.err
    assert NAME in done.err and "1000 classes and not 16" in done.err
    assert "mean 0.5,0.5,0.5, std 0.5,0.5,0.5, as they expect" in done.err
    summary = json.loads((tmp_path / "whole" / "summary.json").read_text())
    assert summary["mean"] == summary["std"] == [0.5, 0.5, 0.5]
    assert same(first[0], fresh_head(drawn(NAME), published(NAME).state_dict()))
    interrupted(store, tmp_path / "cut", monkeypatch, **settings)
    recipe = tomllib.loads((tmp_path / "cut" / "recipe.toml").read_text())
    assert len(recipe["richkd-distill"]["initial"]) == 16
    shutil.rmtree(hub)
    initial._load_pretrained.cache_clear()
    train(store, tmp_path / "cut", **settings)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    train(store, tmp_path / "cut", **settings)  # complete
    loaded = load_student(tmp_path / "cut").state_dict()
    assert same(loaded, weights(tmp_path / "cut"))
    # another run of the same student starts from its own classifier
    assert not torch.equal(drawn(NAME)["fc.weight"], drawn(NAME, 1)["fc.weight"])
    assert len(load_runs([tmp_path], str(store))) == 2
    with refuses("pretrained-cannot-be-loaded", NAME, "HF_HUB_OFFLINE", hub, "--student-weights"):
        train(store, tmp_path / "new", **settings)
    assert not (tmp_path / "new").exists()


def test_a_student_from_a_file(
    store: Path, tmp_path: Path, first: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a classifier of as many classes, or of more; compared by its bytes, wherever it is."""
    file = tmp_path / "a.pth"
    torch.manual_seed(3)
    model = create_model("resnet8", CLASSES)
    torch.save({"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, file)
    train(store, tmp_path / "run", method="ce", epochs=1, student_weights=str(file))
    assert same(first[0], model.state_dict())
    file.rename(tmp_path / "b.pth")
    train(store, tmp_path / "run", method="ce", epochs=1, student_weights=str(tmp_path / "b.pth"))
    train(store, tmp_path / "run", method="ce", epochs=1, student_weights=str(file))
    torch.save(create_model("resnet8", 100).state_dict(), file)
    with refuses("initial-weights-differ", "initial was", file_sha256(file)[:16]):
        train(store, tmp_path / "run", method="ce", epochs=1, student_weights=str(file))
    with refuses("initial-weights-differ", "None"):
        train(store, tmp_path / "run", method="ce", epochs=1)
    interrupted(store, tmp_path / "more", monkeypatch, student_weights=str(file))
    assert same(first[1], fresh_head(drawn("resnet8"), torch.load(file), "fc."))
    file.unlink()
    train(store, tmp_path / "more", student_weights=str(file))
    with refuses("weights-missing", file):
        train(store, tmp_path / "new", student_weights=str(file))
    torch.save(create_model("resnet14", CLASSES).state_dict(), file)
    with refuses("weights-other-architecture", file, "resnet8"):
        train(store, tmp_path / "new", student_weights=str(file))
    assert not (tmp_path / "new").exists()


def test_a_key_chooses_among_the_networks_of_a_file(
    store: Path, tmp_path: Path, first: Any
) -> None:
    """It is recorded, and an error names the flag of the command."""
    a, b = (create_model("resnet8", CLASSES).state_dict() for _ in range(2))
    file = tmp_path / "two.pth"
    torch.save({"student": a, "teacher": b}, file)
    settings = {"method": "ce", "epochs": 1, "student_weights": str(file)}
    with refuses("weights-ambiguous", file, "--student-weights-key student"):
        train(store, tmp_path / "run", **settings)
    with refuses("weights-key-unknown", "'other'", "student, teacher"):
        train(store, tmp_path / "run", **settings, student_weights_key="other")
    train(store, tmp_path / "run", **settings, student_weights_key="teacher")
    with refuses("run-settings-differ", "student_weights_key"):
        train(store, tmp_path / "run", **settings, student_weights_key="student")
    out, settings = tmp_path / "t.safetensors", {"model": "resnet8", "epochs": 1, "warmup": 0}
    with refuses("weights-ambiguous", file, "--init-key student"):
        tuned(out, str(file), **settings)
    tuned(out, str(file), **settings, init_key="student")
    assert json.loads(read_note(out)["training"])["init_key"] == "student"
    with refuses("teacher-settings-differ", "init_key"):
        tuned(out, str(file), **settings, init_key="teacher")
    assert same(first[0], b) and same(first[1], a)
    for none in ("", "pretrained"):
        with refuses("value-out-of-range", "init_key", "'model'"):
            TrainTeacher(dataset="shapes", init=none, init_key="model")
        with refuses("value-out-of-range", "student_weights_key", "'model'"):
            Distill(cache="a.zarr", student_weights=none, student_weights_key="model")


@pytest.mark.parametrize(
    ("flags", "code", "values"),
    [
        ("--student resnet8 --student-weights pretrained", "pretrained-weights-unknown", "resnet8"),
        ("--student resnet18.a9 --student-weights pretrained", "pretrained-weights-unknown", "a1"),
        (f"--student {NAME} --method kd", "model-names-weights", "r160_in1k"),
        ("--student-weights no.pth", "weights-missing", "no.pth"),
    ],
)
def test_weights_that_a_student_cannot_start_from(
    store: Path, tmp_path: Path, fails: Fails, flags: str, code: str, values: str
) -> None:
    line = fails(*f"distill --cache {store} --out {tmp_path / 'a'} --lr 1 {flags}".split())
    assert line.code == code and values in line
    assert not (tmp_path / "a").exists()


def tuned(
    out: Path, init: str, model: str = NAME, *, overwrite: bool = False, **given: Any
) -> dict[str, Any]:
    """Fine-tune a network on a few shapes."""
    settings = {"limit": 48, "epochs": 3, "batch_size": 16, "device": "cpu", "optimizer": "adamw"}
    settings |= {"warmup": 1, "schedule": "cosine", "ema": 0.5, "lr": 1e-3}
    chosen = TrainTeacher(
        dataset="shapes", model=model, init=init, out=str(out), **{**settings, **given}
    )
    report = Report(quiet=True)
    dataset = load_dataset(chosen, report=report)
    return cnn.train_teacher(chosen, dataset, report, overwrite=overwrite)


@pytest.mark.slow
def test_a_teacher_is_fine_tuned_and_resumed(
    tmp_path: Path, hub: Path, first: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    summary = tuned(tmp_path / "whole.safetensors", "pretrained")
    assert same(first[0], fresh_head(drawn(NAME), published(NAME).state_dict()))
    save = Checkpoints.save

    def cut(self: Any, *arguments: Any) -> None:
        save(self, *arguments)
        raise CutOff

    with monkeypatch.context() as patch, pytest.raises(CutOff):
        patch.setattr(Checkpoints, "save", cut)
        tuned(tmp_path / "cut.safetensors", "pretrained")
    shutil.rmtree(hub)
    initial._load_pretrained.cache_clear()
    assert tuned(tmp_path / "cut.safetensors", "pretrained")["top1_last"] == summary["top1_last"]
    whole, again = (load_file(tmp_path / f"{run}.safetensors") for run in ("whole", "cut"))
    assert same(whole, again)
    note = read_note(tmp_path / "cut.safetensors")
    assert json.loads(note["mean"]) == json.loads(note["std"]) == [0.5, 0.5, 0.5]
    assert json.loads(note["size"]) == 32 and json.loads(note["training"])["init"] == "pretrained"
    with refuses("teacher-settings-differ", "init"):
        tuned(tmp_path / "cut.safetensors", "", "test_resnet")
    # and from there, on the same classes: the same constants
    tuned(tmp_path / "more.safetensors", str(tmp_path / "cut.safetensors"), "test_resnet")
    assert same(first[-1], again)
    assert read_note(tmp_path / "more.safetensors")["mean"] == note["mean"]


def test_a_file_tells_what_it_expects_before_a_tag_does(tmp_path: Path) -> None:
    """A network named by its tag, which means 0.5, was trained further on other constants."""
    seen = NetworkInput(size=32, mean=(0.1, 0.2, 1 / 3), std=(0.3, 0.4, 2 / 7), crop=1.0)
    state = create_model(NAME, CLASSES).state_dict()
    for note, mean in (
        (seen.note, seen.mean),
        ({}, (0.5, 0.5, 0.5)),
        ({"mean": "1", "std": "x"}, (0.5, 0.5, 0.5)),
    ):
        file = tmp_path / "a.safetensors"
        save_tensors(file, state, note)
        weights = initial.Initial(weights=str(file), name=NAME, num_classes=CLASSES, image_size=32)
        assert weights.constants is not None and weights.constants[0] == mean


def test_a_teacher_needs_its_file_only_to_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without it, training ends in the same weights, by exactly the constants that it recorded."""
    seen = NetworkInput(size=32, mean=(0.1, 0.2, 1 / 3), std=(0.3, 0.4, 2 / 7), crop=1.0)
    file, settings = tmp_path / "a.safetensors", {"model": "resnet8", "epochs": 2, "warmup": 0}
    save_tensors(file, create_model("resnet8", CLASSES).state_dict(), seen.note)
    whole, cut, new = (tmp_path / f"{name}.safetensors" for name in ("whole", "cut", "new"))
    tuned(whole, str(file), **settings)
    save = Checkpoints.save

    def stop(self: Any, *arguments: Any) -> None:
        save(self, *arguments)
        raise CutOff

    with monkeypatch.context() as patch, pytest.raises(CutOff):
        patch.setattr(Checkpoints, "save", stop)
        tuned(cut, str(file), **settings)
    file.unlink()
    done = tuned(cut, str(file), **settings)
    assert cut.read_bytes() == whole.read_bytes()
    assert read_note(cut)["mean"] == seen.note["mean"]
    assert tuned(cut, str(file), **settings) == done  # complete
    with refuses("teacher-settings-differ", "epochs"):
        tuned(cut, str(file), **{**settings, "epochs": 3})
    for out, overwrite in ((new, False), (cut, True)):
        with refuses("weights-missing", file):
            tuned(out, str(file), overwrite=overwrite, **settings)
    assert not new.exists() and cut.read_bytes() == whole.read_bytes()


def test_a_repository_is_no_network_to_train(store: Path, tmp_path: Path, fails: Fails) -> None:
    hub, file = f"hf-hub:timm/{NAME}", tmp_path / "w.safetensors"
    save_tensors(file, create_model("test_resnet", CLASSES).state_dict())
    for words in (
        f"train-teacher --dataset shapes --limit 48 --out {tmp_path / 'a.safetensors'} --model",
        f"distill --cache {store} --out {tmp_path / 'a'} --student",
        f"sweep --cache {store} --out {tmp_path / 'b'} --student-weights pretrained --students",
    ):
        command, option = words.split()[0], "--init" if "train" in words else "--student-weights"
        for start in ([], ["pretrained"], [str(file)]) if command != "sweep" else ([],):
            line = fails(*words.split(), hub, *(word for each in start for word in (option, each)))
            assert line.code == "model-names-weights" and repr(hub) in line and option in line
    assert [*tmp_path.iterdir()] == [file]


def test_a_fine_tuned_teacher_has_a_file_of_its_own() -> None:
    given: dict[str, Any] = {"dataset": "cifar100", "model": "resnet18.a1_in1k"}
    assert TrainTeacher(**given, init="pretrained").out == (
        "teachers/cifar100-resnet18.a1_in1k-from-pretrained.safetensors"
    )
    assert TrainTeacher(dataset="cifar100").out == "teachers/cifar100-resnet32x4.safetensors"


def test_weights_that_a_teacher_cannot_start_from(tmp_path: Path, fails: Fails) -> None:
    common = f"train-teacher --dataset shapes --limit 48 --out {tmp_path / 't.safetensors'}"
    line = fails(*f"{common} --model resnet8 --init pretrained".split())
    assert line.code == "pretrained-weights-unknown" and "--init" in line
    line = fails(*f"{common} --model {NAME}".split())
    assert line.code == "model-names-weights"
    line = fails(*f"{common} --model resnet8 --init {tmp_path / 'no.pth'}".split())
    assert line.code == "weights-missing"
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_a_vision_transformer_trains_by_adamw(store: Path, tmp_path: Path, hub: Path) -> None:
    """From random weights, and from pretrained ones at another size and patch."""
    settings: dict[str, Any] = {"student": "test_vit", "optimizer": "adamw", "lr": 1e-3}
    settings |= {"warmup": 1, "schedule": "cosine", "epochs": 3, "method": "kd"}
    settings |= {"student_options": {"img_size": 32, "patch_size": 4}}
    train(store, tmp_path / "random", **settings)
    train(store, tmp_path / "pretrained", **settings, student_weights="pretrained")
    for name in ("random", "pretrained"):
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses = [json.loads(line)["loss"] for line in lines]
        assert losses[-1] < losses[0]


def test_the_command_that_repeats_a_run(store: Path, tmp_path: Path) -> None:
    train(
        store,
        tmp_path / "a",
        method="ce",
        epochs=1,
        optimizer="sgdw",
        optimizer_options={"caution": True},
        label_smoothing=0.1,
    )
    train(store, tmp_path / "b", method="ce", epochs=1, nesterov=True)
    a, b = (run.command([0]) for run in load_runs([tmp_path], None))
    assert "--optimizer sgdw" in a and "--optimizer-set caution=true" in a
    assert "--label-smoothing 0.1" in a and "nesterov" not in a and "--nesterov" in b.split()
    assert Distill(cache="x").nesterov is False
