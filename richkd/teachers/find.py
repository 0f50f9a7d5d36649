"""Find the two teachers of stage one, and log how well they know the images."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from richkd.config.settings import NO_TEACHER, Precompute, TrainTeacher, resolve
from richkd.core import fusion
from richkd.core.accuracy import accuracy
from richkd.core.errors import RichKDError
from richkd.core.progress import Report, percent
from richkd.core.ranks import Ranks
from richkd.data.class_names import class_words
from richkd.data.datasets import Dataset
from richkd.data.framing import NetworkInput
from richkd.data.inputs import make_inputs
from richkd.data.prompts import load_prompts
from richkd.models import check_fit, create_model
from richkd.models.weights import read_note
from richkd.store import schema
from richkd.store.schema import PrecisionError, TeacherEntry, describe_precision
from richkd.teachers.class_order import LOOKED_AT, preview_teacher, resolve_outputs
from richkd.teachers.clip import ClipTeacher, load_clip, precision_error
from richkd.teachers.cnn import (
    CNNTeacher,
    Outputs,
    check_output,
    difference,
    load_teacher,
    train_teacher,
)
from richkd.teachers.framing import resolve_input
from richkd.teachers.rows import Preview, Teachers, batch_size
from richkd.training.run_folder import TeacherFolder


def training_settings(settings: Precompute, recipe: Mapping[str, Any]) -> TrainTeacher:
    """Return how the CNN teacher is trained if there are no weights for it."""
    return resolve(
        TrainTeacher,
        dict(recipe),
        {
            "dataset": settings.dataset,
            "limit": settings.limit,
            "data_root": settings.data_root,
            "image_size": settings.image_size,
            "model": settings.teacher,
            "device": settings.device,
            "validation": settings.validation,
        },
    )


def teacher_weights(settings: Precompute, training: TrainTeacher) -> Path | None:
    """Return the teacher's weights: those given, else those trained before, else None."""
    if settings.teacher_weights:
        return Path(settings.teacher_weights)
    trained = Path(training.out)
    if not trained.is_file():
        return None
    TeacherFolder(trained).tidy(trained)
    return trained


@dataclass(frozen=True)
class Finder:
    """Finds both teachers for the processes of a job.

    A CNN teacher without weights is trained by the first process, after everything else that
    could fail.
    """

    settings: Precompute
    dataset: Dataset
    training: TrainTeacher
    device: torch.device
    ranks: Ranks
    report: Report

    def find(
        self,
        recorded: TeacherEntry | None = None,
        interrupted: Mapping[str, Any] | None = None,
        given: Collection[str] = (),
    ) -> tuple[Teachers, Preview]:
        """Return both teachers, and their outputs for the first test images.

        Args:
            recorded: the CNN teacher's entry in the cache to repair, whose input and class order
                it keeps.
            interrupted: the manifest of the cache to resume, if there is one.
            given: names of the settings for the teacher's training that the user gave.
        """
        if self.settings.teacher == NO_TEACHER:
            clip, text, features, error = self._find_clip()
            return Teachers(self.settings, None, clip, text), Preview((), features, error)
        weights = self.ranks.from_first(lambda: teacher_weights(self.settings, self.training))
        cnn, outputs = None, []
        if weights is None:
            self._check_trainable()
        else:
            self._check_weights(weights, given)
            cnn = self._in_order(self._load(weights, recorded), weights, recorded, interrupted)
            if self.ranks.first and recorded is None:
                batch = batch_size(self.settings, self.device, cnn.input.size)
                outputs = preview_teacher(cnn, weights, self.dataset, batch, self.report)
        clip, text, features, error = self._find_clip()
        if cnn is None:
            cnn = self._load(self._train(), recorded)
        return Teachers(self.settings, cnn, clip, text), Preview(outputs, features, error)

    def _check_trainable(self) -> None:
        """Raise RichKDError if the teacher does not fit the images or cannot be saved."""
        classes, side = len(self.dataset.class_names), self.dataset.image_size
        model = create_model(self.settings.teacher, classes, image_size=side)
        check_fit(model, self.settings.teacher, side, classes)
        self.ranks.from_first(lambda: check_output(Path(self.training.out), overwrite=False))

    def _check_weights(self, weights: Path, given: Collection[str]) -> None:
        """Check what weights were trained on, as far as they record it."""
        if self.settings.teacher_weights:
            warn_of_validation(weights, self.dataset, self.report)
        else:
            check_trained_on(weights, self.dataset)
            log_other_training(self.training, given, self.dataset, self.report)

    def _load(self, weights: Path, recorded: TeacherEntry | None) -> CNNTeacher:
        if recorded is not None:
            framing = NetworkInput.of(recorded["input"])
        else:
            framing = resolve_input(self.settings, weights, self.dataset, self.report)
        classes = len(self.dataset.class_names)
        return load_teacher(
            self.settings.teacher,
            weights,
            classes,
            framing,
            self.device,
            key=self.settings.teacher_weights_key,
            report=self.report,
        )

    def _in_order(
        self,
        cnn: CNNTeacher,
        weights: Path,
        recorded: TeacherEntry | None,
        interrupted: Mapping[str, Any] | None,
    ) -> CNNTeacher:
        """Return the teacher with its outputs in the order of the dataset's classes."""
        known = recorded or recorded_order(interrupted, self.settings, cnn)

        def order() -> Outputs | None:
            if known is not None:
                return tuple(known["outputs"]) if "outputs" in known else None
            return resolve_outputs(self.settings, weights, cnn, self.dataset, self.report)

        return replace(cnn, outputs=self.ranks.from_first(order))

    def _find_clip(
        self,
    ) -> tuple[ClipTeacher | None, Tensor | None, Sequence[Tensor], PrecisionError | None]:
        """Return CLIP, its text embeddings, and its features of the first test images."""
        clip = open_clip_teacher(self.settings, self.device, self.ranks, self.report)
        if clip is None:
            return None, None, (), None
        templates = load_prompts(self.settings.prompts)
        text = clip.text_embeddings(self.dataset.class_names, templates)
        if not self.ranks.first:
            return clip, text, (), None
        return clip, text, *preview_clip(clip, text, templates, self.dataset, self.report)

    def _train(self) -> Path:
        """Train the CNN teacher and return its weights."""
        out = Path(self.training.out)
        resuming = TeacherFolder(out).checkpoints.files
        self.report.log(
            f"no --teacher-weights given and none at {out}: "
            f"{'resuming the training of' if resuming else 'training'} the teacher, "
            f"{self.settings.teacher}, first"
        )
        self.ranks.from_first(lambda: train_teacher(self.training, self.dataset, self.report))
        return out


def recorded_order(
    interrupted: Mapping[str, Any] | None, settings: Precompute, teacher: CNNTeacher
) -> TeacherEntry | None:
    """Return this teacher's entry in the cache to resume, unless the user gives its class order."""
    if (
        interrupted is None
        or settings.teacher_classes
        or schema.manifest_fault(interrupted) is not None
    ):
        return None
    entry: TeacherEntry = interrupted["teacher"]
    return entry if entry["sha256"] == teacher.sha256 else None


def open_clip_teacher(
    settings: Precompute, device: torch.device, ranks: Ranks, report: Report
) -> ClipTeacher | None:
    """Return the CLIP of the settings; `demo` is trained if it is missing, and `none` is None."""
    name = settings.clip
    if name == "none":
        return None
    if name == "demo":
        from richkd.teachers.demo_clip import demo_clip

        name = str(ranks.from_first(lambda: demo_clip(report)))
    return load_clip(name, device, settings.clip_precision)


def preview_clip(
    clip: ClipTeacher,
    text: Tensor,
    templates: tuple[str, ...],
    dataset: Dataset,
    report: Report,
) -> tuple[Sequence[Tensor], PrecisionError | None]:
    """Log the classes and prompts that CLIP gets, and its accuracy on the first test images.

    Returns:
        Its features of these images by batch, and what its precision costs on them.
    """
    names = dataset.class_names
    shown = [
        f"{folder} → {name}" if folder and name != class_words(folder) else name
        for folder, name in zip_longest(dataset.class_folders[:8], names[:8])
    ]
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    report.log(f"classes: {', '.join(shown)}{more}")
    asked = "; ".join(template.replace("{}", names[0]) for template in templates[:3])
    more = f"; and {len(templates) - 3} more" if len(templates) > 3 else ""
    report.log(f"prompts per class: {len(templates)}: {asked}{more}")
    count = min(LOOKED_AT, len(dataset.test))
    inputs = make_inputs(dataset.test.first(count).images, clip.device)
    features = clip.image_features(inputs, 0, count, LOOKED_AT)
    classes = fusion.class_embeddings(text)
    similarity = fusion.clip_similarity(features, classes)
    top1 = accuracy(similarity.cpu(), dataset.test.labels[:count], 1)
    report.log(
        f"CLIP zero-shot on {count} of the test images: {percent(top1)} % (chance "
        f"{percent(1 / len(names))} %)"
    )
    error = None
    if clip.precision != "float32":
        error = precision_error(clip, inputs, features, classes, LOOKED_AT)
        report.log(f"CLIP in {describe_precision(clip.precision, error)}")
    return torch.split(features, LOOKED_AT), error


def check_trained_on(weights: Path, dataset: Dataset) -> None:
    """Check that a teacher found by its name was trained on this dataset.

    Raises:
        RichKDError: its metadata records another fingerprint, or none.
    """
    trained_on = read_note(weights).get("fingerprint")
    if trained_on != dataset.fingerprint:
        raise RichKDError(
            f"{weights} was trained on other data ({(trained_on or 'not recorded')[:12]}) than "
            f"{dataset.name} ({dataset.fingerprint[:12]}), or on the same data read differently "
            f"(--background, --pixel-range, --broken); pass it as --teacher-weights to use it "
            f"anyway, or move it away to train another",
            code="teacher-of-other-data",
        )


def log_other_training(
    training: TrainTeacher, given: Collection[str], dataset: Dataset, report: Report
) -> None:
    """Log how a teacher found by its name differs from the settings that were given."""
    weights = Path(training.out)
    settings = training.for_size(dataset.image_size)
    found = difference(settings, dataset, read_note(weights), only=given)
    if found is not None:
        report.log(
            f"using {weights}, although it was trained with other settings ({found}); to train it "
            f"again, use richkd train-teacher --overwrite"
        )


def warn_of_validation(weights: Path, dataset: Dataset, report: Report) -> None:
    """Log that a teacher from elsewhere may have been trained on the validation images."""
    if dataset.validation is None:
        return
    if read_note(weights).get("fingerprint") != dataset.fingerprint:
        report.log(
            f"{weights} may also have been trained on the validation images; if so, alpha auto "
            f"trusts the CNN teacher too much: leave --teacher-weights out to train one without "
            f"them"
        )
