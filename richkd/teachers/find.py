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
from richkd.models import check_fit, create_model, names_weights
from richkd.models.weights import read_note, state_sha256
from richkd.store import schema
from richkd.store.location import Location
from richkd.store.reader import TeacherCache
from richkd.store.schema import PrecisionError, TeacherEntry, describe_precision
from richkd.teachers.class_order import LOOKED_AT, preview_teacher, resolve_outputs
from richkd.teachers.clip import ClipTeacher, load_clip, precision_error
from richkd.teachers.cnn import (
    CNNTeacher,
    Outputs,
    check_output,
    difference,
    load_pretrained,
    load_teacher,
    train_teacher,
)
from richkd.teachers.framing import resolve_input
from richkd.teachers.heads import Probe, fit, kept
from richkd.teachers.kept import kept_arrays, known_manifest
from richkd.teachers.matching import num_outputs, other_classes, own_rows
from richkd.teachers.pretrained import by_name, check_teacher_name
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
            "view_space": settings.view_space,
            "model": settings.teacher,
            "device": settings.device,
            "validation": settings.validation,
        },
    )


def teacher_weights(settings: Precompute, training: TrainTeacher) -> Path | None:
    """Return the teacher's weights: those given, else those trained before, else None.

    It is None too if the teacher's name means published weights.
    """
    if settings.teacher_weights:
        return Path(settings.teacher_weights)
    if by_name(settings):
        return None
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
        place: Location | None = None,
    ) -> tuple[Teachers, Preview]:
        """Return both teachers, and their outputs for the first test images.

        Args:
            recorded: the CNN teacher's entry in the cache to repair, whose input and class order
                it keeps.
            interrupted: the manifest of the cache to resume or repair, if there is one.
            given: names of the settings for the teacher's training that the user gave.
            place: the location of that cache, whose text embeddings and probe are kept.
        """
        if self.settings.teacher == NO_TEACHER:
            clip, text, features, error = self._find_clip(place, interrupted)
            return Teachers(self.settings, None, clip, text), Preview((), features, error)
        weights = self.ranks.from_first(lambda: teacher_weights(self.settings, self.training))
        cnn: CNNTeacher | None = None
        outputs: Sequence[tuple[Tensor, Tensor]] = ()
        if weights is not None or by_name(self.settings):
            self._check_weights(weights, given)
            cnn = self._in_order(self._load(weights, recorded), weights, recorded, interrupted)
            if cnn.head != "probe":
                outputs = self._preview(cnn, weights, recorded)
        else:
            self._check_trainable()
        clip, text, features, error = self._find_clip(place, interrupted)
        if cnn is None:
            cnn = self._load(self._train(), recorded)
        elif cnn.head == "probe":
            cnn = self._with_probe(cnn, place, interrupted)
            outputs = self._preview(cnn, weights, recorded)
        return Teachers(self.settings, cnn, clip, text), Preview(outputs, features, error)

    def _check_trainable(self) -> None:
        """Raise RichKDError if the teacher does not fit the images or cannot be saved."""
        classes, side = len(self.dataset.class_names), self.dataset.image_size
        model = create_model(self.settings.teacher, classes, image_size=side)
        check_fit(model, self.settings.teacher, side, classes)
        self.ranks.from_first(lambda: check_output(Path(self.training.out), overwrite=False))

    def _check_weights(self, weights: Path | None, given: Collection[str]) -> None:
        """Check what weights were trained on, as far as they record it."""
        if weights is None:  # published under the teacher's name
            return
        if self.settings.teacher_weights:
            warn_of_validation(weights, self.dataset, self.report)
            if self.settings.teacher_head == "probe":
                warn_of_training(weights, self.dataset, self.report)
        else:
            check_trained_on(weights, self.dataset)
            log_other_training(self.training, given, self.dataset, self.report)

    def _load(self, weights: Path | None, recorded: TeacherEntry | None) -> CNNTeacher:
        settings, classes = self.settings, len(self.dataset.class_names)
        if weights is not None and settings.teacher_head != "own":
            classes = num_outputs(settings, weights, classes)
        if recorded is not None:
            framing = NetworkInput.of(recorded["input"])
        else:
            framing = resolve_input(settings, weights, self.dataset, self.report, classes)
        if weights is None:
            self.report.log(f"loading the weights of {settings.teacher}")
            return load_pretrained(
                settings.teacher, framing, self.device, head=settings.teacher_head
            )
        try:
            return load_teacher(
                settings.teacher,
                weights,
                classes,
                framing,
                self.device,
                key=settings.teacher_weights_key,
                head=settings.teacher_head,
                report=self.report,
            )
        except RichKDError as error:
            if error.code == "weights-do-not-fit":
                count = num_outputs(settings, weights, classes)
                if count != classes:
                    raise other_classes(settings, count, self.dataset, error.code) from None
            raise

    def _in_order(
        self,
        cnn: CNNTeacher,
        weights: Path | None,
        recorded: TeacherEntry | None,
        interrupted: Mapping[str, Any] | None,
    ) -> CNNTeacher:
        """Return the teacher with its outputs in the order of the dataset's classes."""
        known = recorded or recorded_order(interrupted, self.settings, cnn)

        def order() -> Outputs | None:
            if cnn.head == "probe":
                return None
            if cnn.head == "rows" and recorded is None:
                count = num_outputs(self.settings, weights, len(self.dataset.class_names))
                return own_rows(self.settings, count, self.dataset, self.report)
            if known is not None:
                return tuple(known["outputs"]) if "outputs" in known else None
            return resolve_outputs(self.settings, weights, cnn, self.dataset, self.report)

        return replace(cnn, outputs=self.ranks.from_first(order))

    def _with_probe(
        self, cnn: CNNTeacher, place: Location | None, interrupted: Mapping[str, Any] | None
    ) -> CNNTeacher:
        """Return the teacher with the probe of the cache to resume or repair, or with a new one."""

        def find() -> Probe:
            probe = None if place is None else kept(place, interrupted, cnn.sha256)
            if probe is not None:
                return probe
            batch = batch_size(self.settings, self.device, cnn.input.size)
            features = training_features(cnn, self.dataset, batch, self.report)
            return fit(features, self.dataset, cnn.name, self.report)

        return replace(cnn, probe=self.ranks.from_first(find).to(self.device))

    def _preview(
        self, cnn: CNNTeacher, weights: Path | None, recorded: TeacherEntry | None
    ) -> Sequence[tuple[Tensor, Tensor]]:
        """Log how well the teacher of a new cache does, and return its outputs."""
        if not self.ranks.first or recorded is not None:
            return ()
        batch = batch_size(self.settings, self.device, cnn.input.size)
        return preview_teacher(cnn, weights, self.dataset, batch, self.report)

    def _find_clip(
        self, place: Location | None, interrupted: Mapping[str, Any] | None
    ) -> tuple[ClipTeacher | None, Tensor | None, Sequence[Tensor], PrecisionError | None]:
        """Return CLIP, its text embeddings, and its features of the first test images."""
        clip = open_clip_teacher(self.settings, self.device, self.ranks, self.report)
        if clip is None:
            return None, None, (), None
        templates = load_prompts(self.settings.prompts)
        text = self._text(clip, templates, place, interrupted)
        if not self.ranks.first:
            return clip, text, (), None
        return clip, text, *preview_clip(clip, text, templates, self.dataset, self.report)

    def _text(
        self,
        clip: ClipTeacher,
        templates: tuple[str, ...],
        place: Location | None,
        interrupted: Mapping[str, Any] | None,
    ) -> Tensor:
        """Return the text embeddings of the cache to resume or repair, or compute them."""
        names = self.dataset.class_names

        def kept() -> Tensor | None:
            return None if place is None else kept_text(place, interrupted, clip, names, templates)

        found = kept() if self.ranks.first else None
        if not self.ranks.from_first(lambda: found is not None):
            return clip.text_embeddings(names, templates, self.ranks, self.report)
        self.report.log(f"{len(names) * len(templates):,} texts are already embedded")
        found = kept() if found is None else found
        if found is None:
            raise RichKDError(
                f"rank {self.ranks.rank} cannot read the text embeddings at {place}, which rank 0 "
                f"read; use a folder that all machines share, or object storage (s3://…)",
                code="rank-cache-missing",
            )
        return found

    def _train(self) -> Path:
        """Train the CNN teacher and return its weights."""
        out = Path(self.training.out)
        resuming = TeacherFolder(out).checkpoints.files
        self.report.log(
            f"no --teacher-weights given and none at {out}: "
            f"{'resuming the training of' if resuming else 'training'} the teacher, "
            f"{self.settings.teacher}, first{self._instead()}"
        )
        self.ranks.from_first(lambda: train_teacher(self.training, self.dataset, self.report))
        return out

    def _instead(self) -> str:
        """Return what is faster than training, for images of people's own; else nothing."""
        if isinstance(self.dataset.train.images, Tensor):
            return ""
        return (
            f" ({self.training.epochs} epochs; a pretrained teacher takes minutes: --teacher "
            f"timm/resnet50.a1_in1k --teacher-head probe)"
        )


def load_again(
    cache: TeacherCache, weights: Path, device: torch.device, report: Report
) -> CNNTeacher:
    """Load the CNN teacher of a cache, with its input, class order and head.

    Args:
        cache: the cache.
        weights: its weights file, or the name of its pretrained weights.
        device: where it runs.
        report: where to log.

    Raises:
        RichKDError: the weights cannot be loaded or are of another network.
    """
    entry, recipe = cache.manifest["teacher"], cache.manifest["recipe"]
    named = not weights.exists()
    if named:
        check_weights_name(str(weights), entry["name"], recipe.get("teacher_weights", ""))
    given = {"teacher": entry["name"], "teacher_weights": "" if named else str(weights)}
    settings = resolve(Precompute, recipe, given)
    check_teacher_name(settings)
    file = None if by_name(settings) else weights
    count = num_outputs(settings, file, cache.num_classes) if "head" in entry else cache.num_classes
    framing = NetworkInput.of(schema.teacher_input(cache.manifest))
    if file is None:
        found = load_pretrained(entry["name"], framing, device)
    else:
        key = entry.get("weights_key", "")
        found = load_teacher(entry["name"], file, count, framing, device, key=key, report=report)
        if "teacher_weights" not in recipe and names_weights(entry["name"]):
            found = replace(found, sha256=state_sha256(found.model))
    outputs, probe = entry.get("outputs"), Probe.of_cache(cache)
    return replace(
        found,
        outputs=None if outputs is None else tuple(outputs),
        probe=None if probe is None else probe.to(device),
    )


def check_weights_name(given: str, name: str, file: str) -> None:
    """Check that the name of pretrained weights is that of a cache's teacher.

    Args:
        given: the name.
        name: of the cache's teacher.
        file: that its weights were read from; empty if they were found by its name.

    Raises:
        RichKDError: it is another teacher's, or the weights are those of a file.
    """
    if file or not names_weights(name):
        remedy = f"pass the file of its weights{f' ({file})' if file else ''}"
    elif given.removeprefix("timm/") == name.removeprefix("timm/"):
        return
    else:
        remedy = f"pass --teacher {name}, or a file of its weights"
    raise RichKDError(
        f"no weights file at {given}, and the cache's teacher is {name}; {remedy}",
        code="weights-missing",
    )


def training_features(cnn: CNNTeacher, dataset: Dataset, batch_size: int, report: Report) -> Tensor:
    """Return the features [N,F] of the training images, in their evaluation view."""
    inputs = make_inputs(dataset.train.images, cnn.device, cnn.input)
    order, found = torch.arange(len(dataset.train)), []
    with report.track("features for the probe", len(order), "images") as tick:
        for index, images in inputs.batches(order, None, batch_size):
            found.append(cnn.rows(images)[1])
            tick(len(index))
    return torch.cat(found)


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
    entry: TeacherEntry | None = interrupted.get("teacher")  # absent from an added CLIP
    return entry if entry is not None and entry["sha256"] == teacher.sha256 else None


def kept_text(
    place: Location,
    interrupted: Mapping[str, Any] | None,
    clip: ClipTeacher,
    class_names: Sequence[str],
    templates: Sequence[str],
) -> Tensor | None:
    """Return the text embeddings of a cache to resume or repair, or None if there are none.

    Args:
        place: the cache.
        interrupted: its manifest, if there is one.
        clip: that embeds texts.
        class_names: that it embeds.
        templates: the prompts for each of them.
    """
    manifest = known_manifest(interrupted)
    entry = None if manifest is None else manifest["clip"]
    if manifest is None or entry is None or entry["sha256"] != clip.sha256:
        return None
    if (manifest["class_names"], manifest["prompts"]) != ([*class_names], [*templates]):
        return None
    arrays = kept_arrays(place, manifest, [schema.TEXT_ARRAY])
    return None if arrays is None else arrays[0]


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
    classes = fusion.class_embeddings(text, device=clip.device)
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
    if not dataset.is_of(trained_on):
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
    if not dataset.is_of(read_note(weights).get("fingerprint")):
        report.log(
            f"{weights} may also have been trained on the validation images; if so, alpha auto "
            f"trusts the CNN teacher too much: leave --teacher-weights out to train one without "
            f"them"
        )


def warn_of_training(weights: Path, dataset: Dataset, report: Report) -> None:
    """Log that a probe's features come from a network that was trained on the same images."""
    if dataset.is_of(read_note(weights).get("fingerprint")):
        report.log(
            f"{weights} was trained on these very images, so its features, and a probe's logits, "
            f"are surer about them than about new ones; --teacher-head own uses its own head"
        )
