"""The images that the CNN teacher takes: recorded with it, given by the user, or the defaults."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from richkd.config import catalog
from richkd.config.settings import Precompute
from richkd.core.errors import RichKDError
from richkd.core.progress import Report
from richkd.data.boxes import CLEAN_SHARE
from richkd.data.datasets import SMALL_SIDE, Dataset, statistics
from richkd.data.framing import NetworkInput
from richkd.models import create_model, has_tag, names_weights, pretrained_input
from richkd.models.weights import find_state, read_note, read_weights
from richkd.teachers.pretrained import by_name, named_input


def resolve_input(
    settings: Precompute,
    weights: Path | None,
    dataset: Dataset,
    report: Report,
    num_outputs: int | None = None,
) -> NetworkInput:
    """Return and log the images that the teacher takes: size, normalisation, crop, interpolation.

    What richkd recorded when it trained the teacher, or timm's configuration of pretrained weights,
    decides. Otherwise the user's settings do; what they leave open follows timm's configuration of
    the network (for image files) or the way richkd trains networks on this dataset.

    Args:
        settings: the teacher's name and the user's settings of its input.
        weights: the weights file; None if there is none yet.
        dataset: the images.
        report: where to log the result.
        num_outputs: of the network in the file; None for the dataset's number of classes.

    Raises:
        RichKDError: the user gives what the teacher records, the tag is unknown, or the network
            takes images that are not supported.
    """
    check_unsaid(settings, weights)
    name = settings.teacher
    if by_name(settings):
        found = named_input(name)
        report.log(f"the teacher takes images of {found}, by the configuration of {name}")
        return found
    own = note_of(weights)
    if own:
        found = _trained_here(own, weights, dataset)
        report.log(f"the teacher takes images of {found}, as recorded in {weights}")
        return found
    known = pretrained_input(name)
    if known is not None and has_tag(name):
        report.log(f"the teacher takes images of {known}, by timm's configuration of {name}")
        return known
    here = dataset.network_input
    if known is None or weights is None or isinstance(dataset.train.images, Tensor):
        found, source = here, f"like networks that richkd trains on {dataset.name}"
    else:
        found, source = known, f"by timm's configuration of {name}"
    found = replace(found, **settings.teacher_input)
    if weights is not None and settings.teacher_size is None:
        sizes = [each.size for each in (found, here, known) if each is not None]
        count = num_outputs or len(dataset.class_names)
        found = replace(found, size=_size_of(settings, weights, count, sizes))
    source += ", and as given" * bool(settings.teacher_input)
    students = f" (students take {here.size})" * (found.size != here.size)
    report.log(
        f"the teacher takes images of {found} ({source}); if it was trained otherwise, pass "
        f"--teacher-size{students}, --teacher-mean, --teacher-std, --teacher-crop or "
        f"--teacher-interpolation"
    )
    return found


def check_unsaid(settings: Precompute, weights: Path | None) -> None:
    """Check that the user does not give an input that the teacher records; raise RichKDError."""
    if not settings.teacher_input:
        return
    flag = f"--teacher-{next(iter(settings.teacher_input))}"
    if note_of(weights):
        raise RichKDError(
            f"{flag}: {weights} already records what its teacher was trained with; leave it out",
            code="teacher-input-known",
        )
    if settings.teacher and names_weights(settings.teacher):
        raise RichKDError(
            f"{flag}: timm's configuration of {settings.teacher} states how it was trained; "
            f"leave it out, or name the network without its tag",
            code="teacher-input-known",
        )


def check_from_elsewhere(settings: Precompute) -> None:
    """Check that the user gives an input only for weights from elsewhere; raise RichKDError."""
    if settings.teacher_input and not (settings.teacher_weights or by_name(settings)):
        raise RichKDError(
            f"--teacher-{next(iter(settings.teacher_input))} is only for weights from elsewhere, "
            f"as richkd records how it trains a teacher; pass --teacher-weights, or leave it out",
            code="teacher-input-not-needed",
        )


def note_of(weights: Path | None) -> dict[str, str]:
    """Return the metadata of weights that richkd trained; empty for other weights."""
    if weights is None or not weights.is_file():
        return {}
    note = read_note(weights)
    if "fingerprint" in note:  # a teacher
        return note
    summary = weights.with_name("summary.json")
    return _of_student(summary) if weights.stem in ("last", "best") and summary.is_file() else {}


def noted_names(note: Mapping[str, str], kind: str, weights: Path) -> list[str]:
    """Return the class names or folders in the metadata of weights, which are JSON there.

    Raises:
        RichKDError: the metadata is damaged.
    """
    try:
        found = json.loads(note.get(kind, "[]"))
    except ValueError:
        found = None
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise RichKDError(
            f"{weights} has damaged metadata: {kind} is not a list of names; restore the file",
            code="weights-metadata-damaged",
        )
    return found


def _of_student(summary: Path) -> dict[str, str]:
    """Return the metadata of a student, from the summary in its run folder."""
    try:
        about = json.loads(summary.read_text(encoding="utf-8"))
        files = catalog.is_own(about["dataset"])
        found = NetworkInput(
            size=about["image_size"],
            mean=about["mean"],
            std=about["std"],
            crop=about.get("crop", CLEAN_SHARE if files else 1.0),  # earlier runs lack it
        )
        return {**found.note, "class_names": json.dumps(about["class_names"])}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise RichKDError(
            f"{summary} is damaged or not the summary of a run ({error}); restore the file",
            code="summary-damaged",
        ) from None


def _trained_here(note: Mapping[str, str], weights: Path | None, dataset: Dataset) -> NetworkInput:
    """Return the images that a network takes, by its metadata."""
    if "mean" in note:
        try:
            return NetworkInput.of_note(note)
        except ValueError as error:
            raise RichKDError(
                f"{weights} has damaged metadata: {error}; restore the file",
                code="weights-metadata-damaged",
            ) from None
    # earlier versions did not record it, and always used the dataset's own
    here, name = dataset.network_input, note.get("dataset", dataset.name)
    if name == dataset.name:
        return here
    mean, std = statistics(name)
    if catalog.is_own(name):
        return replace(here, mean=mean, std=std, crop=CLEAN_SHARE)
    return replace(here, mean=mean, std=std, crop=1.0, size=SMALL_SIDE)


def _size_of(settings: Precompute, weights: Path, num_classes: int, sizes: list[int]) -> int:
    """Return the first size at which a network's parameters have the shapes in a file.

    Without one, return the first size. Convolutions fit any size, position embeddings only one.
    """
    name, key = settings.teacher, settings.teacher_weights_key
    found: dict[int, dict[str, torch.Size]] = {}
    own: dict[str, Tensor] = {}
    for size in dict.fromkeys(sizes):
        with suppress(RichKDError), torch.device("meta"):
            own = create_model(name, num_classes, image_size=size).state_dict()
            found[size] = _shapes(own)
    if all(shapes == found.get(sizes[0]) for shapes in found.values()):
        return sizes[0]
    wanted = _shapes(find_state(own, read_weights(weights), name, weights, key)[0])
    return next((size for size, shapes in found.items() if shapes == wanted), sizes[0])


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}
