"""The CNN teacher: loaded from a weights file, or trained with cross-entropy."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from richkd.config.settings import Training, TrainTeacher, check_resume, to_table
from richkd.core.choices import TeacherHead
from richkd.core.errors import RichKDError
from richkd.core.files import (
    check_replaceable,
    check_still_locked,
    check_unlocked,
    locked,
    read_json,
    to_json,
    write_json,
)
from richkd.core.ownership import has_keys
from richkd.core.progress import Report, percent
from richkd.core.seeds import derive_seed
from richkd.data.datasets import Dataset, load_as_before
from richkd.data.framing import NetworkInput
from richkd.data.inputs import Normalize, make_inputs
from richkd.data.views import views_tensor
from richkd.losses import Task, method_class
from richkd.models import check_fit, check_trainable, create_model, forward
from richkd.models.weights import (
    check_weights,
    file_sha256,
    load_into,
    read_note,
    read_weights,
    save_tensors,
    state_sha256,
)
from richkd.teachers.heads import Probe
from richkd.teachers.pretrained import blank_named, load_named
from richkd.training.checkpoint import Progress
from richkd.training.data import Data, EpochRows, EvalSet
from richkd.training.device import choose_device
from richkd.training.identity import TeacherIdentity
from richkd.training.initial import PRETRAINED, Constants, Initial, recorded_constants
from richkd.training.loop import Trainer, describe_training
from richkd.training.optimizers import check_optimizer
from richkd.training.run_folder import PLACES, TeacherFolder

Outputs = tuple[int, ...]  # the number of the teacher's output for each class


@dataclass(frozen=True)
class CNNTeacher:
    """A trained network in evaluation mode, which takes images as bytes in its own framing."""

    name: str
    model: nn.Module
    sha256: str
    num_features: int
    input: NetworkInput
    device: torch.device
    outputs: Outputs | None = None  # None: the dataset's order
    head: TeacherHead = "own"
    probe: Probe | None = None  # fitted by stage one if that is its head

    @cached_property
    def normalize(self) -> Normalize:
        """The conversion from bytes to the network's input."""
        return Normalize(self.input.mean, self.input.std, self.device)

    @torch.inference_mode()
    def rows(self, images: Tensor, index: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Compute logits [B,C] in the dataset's order and features [B,F], f32.

        Args:
            images: [B,S,S,3] uint8.
            index: their positions among the training images [B], of which a probe's heads each saw
                some only; None for other images.
        """
        logits, features = forward(self.model, self.normalize(images))
        if self.probe is not None:
            return self.probe.logits(features, index), features
        return (logits if self._columns is None else logits[:, self._columns]), features

    @cached_property
    def _columns(self) -> Tensor | None:
        return None if self.outputs is None else torch.tensor(self.outputs, device=self.device)


def load_teacher(
    name: str,
    weights: Path | None,
    num_classes: int,
    network_input: NetworkInput,
    device: torch.device,
    *,
    key: str = "",
    outputs: Outputs | None = None,
    head: TeacherHead = "own",
    report: Report | None = None,
) -> CNNTeacher:
    """Load a teacher from a weights file, or create one with random weights.

    Args:
        name: the network's name.
        weights: the weights file; None for random weights.
        num_classes: the number of its outputs.
        network_input: the images that the network takes.
        device: where it runs.
        key: where in the file the weights are; empty to find them.
        outputs: the number of its output for each class; None for the dataset's order.
        head: its head; a probe is fitted later.
        report: where to log which entries of the file were unwrapped or ignored.

    Raises:
        RichKDError: there is no such model or file, or the weights do not fit the network.
    """
    size = network_input.size
    model = create_model(name, num_classes, image_size=size)
    num_features = check_fit(model, name, size, num_classes)
    if weights is not None:
        summary = load_into(model, read_weights(weights), name, weights, key)
        if summary and report is not None:
            report.log(summary)
    model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    sha256 = file_sha256(weights) if weights else ""
    return CNNTeacher(
        name, model.eval(), sha256, num_features, network_input, device, outputs, head
    )


def load_pretrained(
    name: str,
    network_input: NetworkInput,
    device: torch.device,
    *,
    outputs: Outputs | None = None,
    head: TeacherHead = "own",
    blank: bool = False,
) -> CNNTeacher:
    """Load a teacher by the name of its pretrained weights, with the classifier it comes with.

    Args:
        name: a name that `pretrained.check_name` accepts.
        network_input: the images that the network takes.
        device: where it runs.
        outputs: as in `load_teacher`.
        head: as in `load_teacher`.
        blank: use random weights instead, and download nothing.

    Raises:
        RichKDError: the weights cannot be loaded, or the network has no pooled features.
    """
    model = blank_named(name) if blank else load_named(name)
    num_features = check_fit(model, name, network_input.size, None)
    sha256 = "" if blank else state_sha256(model)
    model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return CNNTeacher(
        name, model.eval(), sha256, num_features, network_input, device, outputs, head
    )


def check_output(path: Path, overwrite: bool) -> None:
    """Check, before any long work, that weights can be written to a path.

    Raises:
        RichKDError: the path cannot be written or holds another file, or another process is
            training this teacher.
    """
    check_replaceable(path, is_trained_here)
    check_replaceable(summary_file(path), has_keys("weights", "model", "top1_last"))
    check_unlocked(path)
    if overwrite:
        TeacherFolder(path).check_place(overwrite=True)


def is_trained_here(path: Path) -> bool:
    """Return whether a file holds the weights of a teacher that richkd trained."""
    try:
        return "fingerprint" in read_note(path)
    except RichKDError:
        return False


def summary_file(weights: Path) -> Path:
    """Return the path of the summary of a training, beside its weights."""
    return weights.with_suffix(".json")


def remove_trained(path: Path) -> None:
    """Delete a trained or partly trained teacher that `check_output` found to be replaceable."""
    with locked(path):
        path.unlink(missing_ok=True)
        summary_file(path).unlink(missing_ok=True)
        TeacherFolder(path).remove()


def load_images(settings: TrainTeacher, report: Report, *, overwrite: bool = False) -> Dataset:
    """Load the images of a training; those of one that exists are treated as they were then."""

    def trained(files: Dataset) -> str | None:
        """Return the weights if they are of these files, or will be once they are complete."""
        out = Path(settings.for_size(files.image_size).out)
        if out.is_file():
            found = read_note(out).get("fingerprint", "")
        else:
            _, identity = TeacherFolder(out).started() or ({}, None)
            found = identity.dataset if isinstance(identity, TeacherIdentity) else ""
        return str(out) if found and files.fingerprint.startswith(found) else None

    return load_as_before(settings, report, lambda files: None if overwrite else trained(files))


def train_teacher(
    settings: TrainTeacher,
    dataset: Dataset,
    report: Report,
    *,
    resume: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Train a network with cross-entropy on augmented views and save its last weights.

    An interrupted training resumes from its last checkpoint, which is kept in a folder beside the
    weights until they are complete. Complete weights are left as they are.

    Args:
        settings: the network and its training.
        dataset: the images.
        report: where to log progress.
        resume: has no effect, since resuming is the default; contradicts `overwrite`.
        overwrite: train again from the start, replacing existing weights.

    Returns:
        A summary; its seconds include those before an interruption, and are None if unknown.

    Raises:
        RichKDError: a setting is wrong, or existing weights are of other settings or locked.
    """
    check_resume(resume, overwrite)
    check_optimizer(settings)
    settings, out = settings.for_size(dataset.image_size), Path(settings.out)
    check_trainable(settings.model, settings.init)
    check_output(out, overwrite)
    started = None if overwrite else started_from(settings)
    if started is not None:
        report.log(f"{settings.init} is missing; taken to be the file that {out} was started from")
    initial = initial_of(settings, dataset, started)
    dataset = as_expected(dataset, initial)
    if out.exists() and not overwrite:
        return completed(settings, dataset, report)
    device = choose_device(settings.device)
    trainer = make_trainer(settings, dataset, device, report.log)
    folder = TeacherFolder(out)
    digest = initial.digest(None if overwrite else folder.initial()) if initial else None
    recorded = training_of(settings), TeacherIdentity.of(dataset, digest)
    folder.check(*recorded, overwrite=overwrite)
    with locked(out):
        if out.exists() and not overwrite:  # written by the process that had the lock until now
            return completed(settings, dataset, report)
        if overwrite:
            folder.check(*recorded, overwrite=True)
            out.unlink(missing_ok=True)
            summary_file(out).unlink(missing_ok=True)
        resumed = folder.begin(*recorded, overwrite=overwrite)
        progress = start(trainer, initial, folder if resumed else None, report)
        report.log(opening(settings, len(dataset.train), device, progress))
        summary, note = train_epochs(trainer, settings, dataset, folder, progress, report)
        save_tensors(out, trainer.result.state_dict(), note)
        write_json(summary_file(out), summary)
        folder.remove()
    return summary


def opening(
    settings: TrainTeacher, num_samples: int, device: torch.device, progress: Progress
) -> str:
    """Describe the training that is about to start."""
    done = f"; resuming after epoch {progress.epoch} of {settings.epochs}"
    resuming = done if progress.epoch else ""
    return (
        f"training teacher {settings.model}: {settings.epochs} epochs of {num_samples:,} images, "
        f"batch {settings.batch_size}, {describe_training(settings, num_samples)}, seed "
        f"{settings.seed}, on {device}{resuming}"
    )


def start(
    trainer: Trainer, initial: Initial | None, folder: TeacherFolder | None, report: Report
) -> Progress:
    """Load the checkpoint of an interrupted training, else the weights to start from, if any."""
    if folder is not None:
        progress, tensors = folder.checkpoints.load(report.log)
        trainer.resume(tensors, folder.path, progress.step)
        return progress
    if initial is not None:
        trainer.start_from(initial)
    return Progress()


@dataclass(frozen=True)
class Started:
    """What is recorded of the file of weights that a training started from."""

    sha256: str
    constants: Constants | None  # by which its images are normalised


def started_from(settings: TrainTeacher) -> Started | None:
    """Return what is recorded of a file that is missing, and needed no more; else None."""
    out = Path(settings.out)
    if settings.init in ("", PRETRAINED) or Path(settings.init).exists():
        return None
    constants: Constants | None = None
    if out.is_file():
        note = read_note(out)
        training, constants = json.loads(note.get("training", "{}")), recorded_constants(note)
    else:
        training, identity = TeacherFolder(out).started() or ({}, None)
        if isinstance(identity, TeacherIdentity) and identity.constants is not None:
            mean, std = map(tuple, identity.constants)
            constants = mean, std
    sha256 = training.get("init", PRETRAINED)
    return None if sha256 == PRETRAINED else Started(sha256, constants)


def initial_of(
    settings: TrainTeacher, dataset: Dataset, started: Started | None = None
) -> Initial | None:
    """Return the weights that the network starts from, or None for random ones.

    Args:
        settings: of the training.
        dataset: its images.
        started: as `started_from` returns it.
    """
    if not settings.init:
        return None
    return Initial(
        weights=settings.init,
        name=settings.model,
        num_classes=len(dataset.class_names),
        image_size=dataset.image_size,
        key=settings.init_key,
        flag="--init",
        key_flag="--init-key",
        recorded=None if started is None else started.constants,
    )


def as_expected(dataset: Dataset, initial: Initial | None) -> Dataset:
    """Return the images normalised as the weights that a network starts from expect, if known."""
    constants = None if initial is None else initial.constants
    if constants is None or constants == (dataset.mean, dataset.std):
        return dataset
    mean, std = constants
    return replace(dataset, mean=mean, std=std)


def make_trainer(
    settings: TrainTeacher,
    dataset: Dataset,
    device: torch.device,
    log: Callable[[str], None] = lambda _: None,
) -> Trainer:
    """Return a trainer of a network with initial weights drawn from the seed.

    Raises:
        RichKDError: the network does not fit the images.
    """
    num_classes = len(dataset.class_names)
    torch.manual_seed(derive_seed(settings.seed, 0, 2))
    model = create_model(settings.model, num_classes, image_size=dataset.image_size)
    check_fit(model, settings.model, dataset.image_size, num_classes)
    method_type, options = method_class("ce", {})
    labels = dataset.train.labels.to(device)
    task = Task(
        labels=labels,
        student_dim=0,
        teacher_dim=0,
        clip_dim=0,
        alpha=1.0,
        label_smoothing=settings.label_smoothing,
    )
    method = method_type(options, task)
    data = Data(
        train=make_inputs(dataset.train.images, device),
        train_labels=labels,
        test=EvalSet.of(dataset.test, device),
        choice=EvalSet.of(dataset.validation, device) if dataset.validation else None,
        normalize=Normalize(dataset.mean, dataset.std, device),
        num_classes=num_classes,
    )
    return Trainer(model, method, data, settings, device, log)


def train_epochs(
    trainer: Trainer,
    settings: TrainTeacher,
    dataset: Dataset,
    folder: TeacherFolder,
    progress: Progress,
    report: Report,
) -> tuple[dict[str, Any], dict[str, str]]:
    """Train the remaining epochs, with a checkpoint after each.

    Returns:
        The summary, and the metadata of the weights.
    """
    space, num_samples = dataset.train.view_space, len(dataset.train)
    started, record = time.perf_counter() - progress.seconds, None
    left = settings.epochs - progress.epoch
    with report.track("teacher", left * num_samples, "images") as tick:
        for epoch in range(progress.epoch + 1, settings.epochs + 1):
            views = views_tensor(space.fresh(settings.seed, epoch, num_samples))
            record = trainer.train_epoch(epoch, EpochRows(views, {}), tick)
            if not abs(record.loss) < float("inf"):
                raise RichKDError(
                    f"the teacher diverged in epoch {epoch}; lower --lr (it is {settings.lr})",
                    code="teacher-diverged",
                )
            check_still_locked(Path(settings.out))
            seconds = time.perf_counter() - started
            done = Progress(epoch, seconds=seconds, step=trainer.ran_by)
            folder.checkpoints.save(done, trainer.state())
    data = trainer.data
    if record is None:  # interrupted after the last epoch, before the weights were saved
        top1, top5 = trainer.evaluate(data.test)
        validation = None if data.choice is None else trainer.evaluate(data.choice)[0]
    else:
        assert record.test_accuracy is not None and record.test_top5 is not None
        top1, top5 = record.test_accuracy, record.test_top5
        validation = record.validation_accuracy
    shares = {
        "train": None if record is None else record.train_accuracy,
        "validation": validation,
        "test": top1,
    }
    found = ", ".join(f"{k} {percent(share)} %" for k, share in shares.items() if share is not None)
    report.log(f"teacher {settings.model}: {found}, saved to {settings.out}")
    summary = _summary(
        settings,
        dataset,
        top1_validation=validation,
        top1_last=top1,
        top5_last=top5,
        seconds=time.perf_counter() - started,
    )
    return summary, _note(settings, dataset, top1)


def _note(settings: TrainTeacher, dataset: Dataset, accuracy: float) -> dict[str, str]:
    """Return the metadata of weights."""
    folders = {"class_folders": json.dumps(dataset.class_folders)} if dataset.class_folders else {}
    return {
        "model": settings.model,
        "dataset": dataset.name,
        "fingerprint": dataset.fingerprint,
        "epochs": str(settings.epochs),
        "seed": str(settings.seed),
        "test_accuracy": repr(accuracy),
        "training": to_json(training_of(settings)),
        "class_names": json.dumps(dataset.class_names),
        **folders,
        **dataset.network_input.note,
    }


def _summary(settings: TrainTeacher, dataset: Dataset, **results: float | None) -> dict[str, Any]:
    return {
        "weights": settings.out,
        "model": settings.model,
        "dataset": dataset.name,
        "epochs": settings.epochs,
        "seed": settings.seed,
        **results,
    }


def training_of(settings: TrainTeacher) -> dict[str, Any]:
    """Return the settings that, with the images, determine the weights."""
    names = {field.name for field in fields(Training)} | {"model", "validation", "init", "init_key"}
    table = to_table(settings)
    if settings.init not in ("", PRETRAINED):  # wherever the file is
        started = started_from(settings)
        if started is None:
            check_weights(Path(settings.init))
        table["init"] = file_sha256(Path(settings.init)) if started is None else started.sha256
    return {name: value for name, value in table.items() if name in names - PLACES}


def completed(settings: TrainTeacher, dataset: Dataset, report: Report) -> dict[str, Any]:
    """Return the summary of weights that are already complete.

    Raises:
        RichKDError: they were trained with other settings or on other images.
    """
    out = Path(settings.out)
    note = read_note(out)
    found = difference(settings, dataset, note)
    if found is not None:
        raise RichKDError(
            f"{out} holds a teacher of other settings: {found}; choose another --out, or train it "
            f"again with --overwrite",
            code="teacher-settings-differ",
        )
    TeacherFolder(out).tidy(out)
    unrecorded = (
        "; an earlier version of richkd trained it without recording all settings, so the others "
        "were not compared"
    )
    unknown = "" if "training" in note else unrecorded
    report.log(f"{out} is already complete; --overwrite trains it again{unknown}")
    accuracy = float(note["test_accuracy"])
    recorded = read_json(summary_file(out)) or {}
    if recorded.get("top1_last") == accuracy and recorded.get("model") == settings.model:
        return {**recorded, "weights": str(out)}
    return _summary(
        settings, dataset, top1_validation=None, top1_last=accuracy, top5_last=None, seconds=None
    )


def difference(
    settings: TrainTeacher,
    dataset: Dataset,
    note: Mapping[str, str],
    only: Collection[str] | None = None,
) -> str | None:
    """Return the first setting in which weights differ from a training, or None.

    Args:
        settings: the settings of the training.
        dataset: its images.
        note: the metadata of the weights.
        only: compare only these settings.
    """
    was: dict[str, Any] = {"fingerprint of the images": note["fingerprint"][:12]}
    now: dict[str, Any] = {"fingerprint of the images": dataset.fingerprint[:12]}
    was |= {name: note[name] for name in dataset.network_input.note if name in note}
    now |= {name: text for name, text in dataset.network_input.note.items() if name in note}
    classes = json.loads(note.get("class_names", "[]")), list(dataset.class_names)
    if "class_folders" in note and dataset.class_folders:  # names matter to CLIP alone
        classes = json.loads(note["class_folders"]), list(dataset.class_folders)
    if all(classes):
        number = next((n for n, pair in enumerate(zip_longest(*classes)) if len({*pair}) > 1), 0)
        name = f"name of class {number}"
        was[name], now[name] = (dict(enumerate(names)).get(number) for names in classes)
    now |= training_of(settings)
    if "training" in note:
        was |= json.loads(note["training"])
    else:  # earlier versions recorded no more
        now = {name: value for name, value in now.items() if name in was or name in note}
        was |= {name: int(note[name]) for name in ("epochs", "seed") if name in note}
        was |= {name: note[name] for name in ("model",) if name in note}
    names = was.keys() | now.keys()
    for name in sorted(names if only is None else names & {*only}):
        if was.get(name) != now.get(name):
            return f"{name} was {was.get(name)!r} and is now {now.get(name)!r}"
    return None
