"""Which output of the CNN teacher is which class.

A store's rows are in the data set's order, which for folders is that of their sorted names. Others
have other orders: timm's loader sorts class10 behind class2 and ignores case. `Outputs` says which
output is class c; None stands for the data set's own order.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from richkd.config.settings import Precompute
from richkd.core.choices import ORDERS
from richkd.core.errors import RichKDError, nearest
from richkd.core.progress import Report, percent
from richkd.core.text_files import read_text
from richkd.data.datasets import Dataset, Split
from richkd.data.inputs import make_inputs
from richkd.teachers.cnn import CNNTeacher, Outputs
from richkd.teachers.framing import note_of

LOOKED_AT = 256  # images, of the training split for a choice and of the test split for a preview
CLEARLY = 3.0  # standard deviations
DOUBT = 0.01  # the chance that a teacher at the bound does as badly
DROP = 0.10  # what a teacher may lose of the accuracy that its file records


def check_teacher_classes(settings: Precompute) -> None:
    """Refuse an order of the teacher's classes that is in no file, or is not for a file of weights.

    Raises:
        RichKDError: that is so.
    """
    given = settings.teacher_classes
    if not given:
        return
    if not settings.teacher_weights:
        raise RichKDError(
            "--teacher-classes is for weights from elsewhere, and a teacher that is trained here "
            "has the data set's order; pass --teacher-weights, or leave it out",
            code="teacher-classes-not-needed",
        )
    if given not in ORDERS:
        _read_lines(Path(given))


def given_outputs(settings: Precompute, dataset: Dataset) -> Outputs | None:
    """The order that the settings say: sorted, natural or that of a file.

    Raises:
        RichKDError: a class is missing there, or unknown, or named twice.
    """
    given, folders = settings.teacher_classes, dataset.class_folders or dataset.class_names
    if given == "natural":
        return _outputs(natural(folders), folders)
    if given == "sorted":
        return _outputs(sorted(folders), folders)
    lines, file = _read_lines(Path(given)), f"--teacher-classes {given}"
    names = next((names for names in (folders, dataset.class_names) if {*lines} <= {*names}), None)
    if names is None:
        stranger = next(line for line in lines if line not in {*folders})
        raise RichKDError(
            f"{file}: {stranger!r} is no class of {dataset.name}; {nearest(stranger, folders)}",
            code="teacher-classes-unknown",
        )
    twice = next((line for number, line in enumerate(lines) if line in lines[:number]), None)
    if twice is not None:
        raise RichKDError(
            f"{file}: {twice!r} is there twice; write a line a class", code="teacher-classes-wrong"
        )
    missing = next((name for name in names if name not in {*lines}), None)
    if missing is not None:
        raise RichKDError(
            f"{file} has {len(lines)} of {len(names)} classes: {missing!r} is missing; write a "
            f"line a class, in the order of the teacher's outputs",
            code="teacher-classes-wrong",
        )
    return _outputs(lines, names)


def _read_lines(file: Path) -> list[str]:
    try:
        lines = read_text(file).splitlines()
    except (OSError, ValueError) as error:
        raise RichKDError(
            f"cannot read --teacher-classes {file}: {error}; name a file with a class folder a "
            f"line, in the order of the teacher's outputs, or say sorted or natural",
            code="teacher-classes-unreadable",
        ) from None
    return [line.strip() for line in lines if line.strip()]


def natural(names: Sequence[str]) -> list[str]:
    """Names in the order of timm's loader: ignoring case, and 2 before 10."""
    from timm.utils.misc import natural_key

    try:
        return sorted(sorted(names), key=natural_key)
    except ValueError:  # timm takes ² for a digit, and cannot read it
        return sorted(names)


def usual_orders(folders: Sequence[str]) -> dict[str, Outputs]:
    """Orders that loaders have, by their names, where they are not the data set's own."""
    numbers = re.compile(r"(\d+)")
    orders = {
        "timm's natural order": natural(folders),
        "sorted ignoring case": sorted(folders, key=str.lower),
        "sorted with numbers as numbers": sorted(
            folders,
            key=lambda name: [
                (int(part), "") if part.isdecimal() else (-1, part) for part in numbers.split(name)
            ],
        ),
    }
    found = {name: _outputs(order, folders) for name, order in orders.items()}
    return {name: outputs for name, outputs in found.items() if outputs is not None}


def _outputs(theirs: Sequence[str], ours: Sequence[str]) -> Outputs | None:
    """Which output is each of our classes, where theirs are these; both are the same set."""
    place = {name: number for number, name in enumerate(theirs)}
    outputs = tuple(place[name] for name in ours)
    return None if outputs == tuple(range(len(ours))) else outputs


def noted_outputs(note: Mapping[str, str], weights: Path, dataset: Dataset) -> Outputs | None:
    """The order that weights say themselves which were trained here.

    Classes are compared by their folders, else by their names.

    Raises:
        RichKDError: the teacher's classes are others, or the note is damaged.
    """
    if note.get("fingerprint") == dataset.fingerprint:
        return None  # the very same images and labels
    strangers: list[str] = []
    for kind, ours in (
        ("class_folders", dataset.class_folders),
        ("class_names", dataset.class_names),
    ):
        theirs = _noted(note, kind, weights)
        if len(theirs) == len(ours) == len({*ours}) and {*theirs} == {*ours}:
            return _outputs(theirs, ours)
        if theirs and ours:
            strangers = sorted({*theirs} - {*ours}) or sorted({*ours} - {*theirs}) or strangers
    if strangers:
        raise RichKDError(
            f"{weights} was trained on other classes than those of {dataset.name}, {strangers[0]!r}"
            f" is only in one of them; if they only have other names, pass --teacher-classes FILE "
            f"with the class folders in the order of its outputs",
            code="teacher-classes-differ",
        )
    return None


def _noted(note: Mapping[str, str], kind: str, weights: Path) -> list[str]:
    """Class names or folders, as a note has them in JSON."""
    try:
        found = json.loads(note.get(kind, "[]"))
    except ValueError:
        found = None
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise RichKDError(
            f"{weights} is damaged: of its metadata, {kind} is no list of names",
            code="weights-metadata-damaged",
        )
    return found


def resolve_outputs(
    settings: Precompute, weights: Path, teacher: CNNTeacher, dataset: Dataset, report: Report
) -> Outputs | None:
    """Which output of a teacher is which class, told where it is not the data set's order.

    What the user says counts first, then the teacher's own word. Where there is neither, the order
    of another loader is taken if the teacher is clearly better on training images so.

    Args:
        settings: what the user says.
        weights: the teacher's file.
        teacher: as loaded from it, in whatever order.
        dataset: the images, its training split among them.
        report: where it is told.

    Raises:
        RichKDError: as `given_outputs` and `noted_outputs`.
    """
    if settings.teacher_classes:
        outputs = given_outputs(settings, dataset)
        if outputs is not None:
            report.log(
                f"the teacher's outputs are {_some(outputs, dataset)}, by --teacher-classes "
                f"{settings.teacher_classes}; the store has them in the data set's order"
            )
        return outputs
    note = note_of(weights)
    if any(kind in note for kind in ("class_folders", "class_names")):
        outputs = noted_outputs(note, weights, dataset)
        if outputs is not None:
            report.log(
                f"the teacher's outputs are {_some(outputs, dataset)}, as {weights} says; the "
                f"store has them in the data set's order"
            )
        return outputs
    orders = usual_orders(dataset.class_folders)
    if not orders:
        return None
    images = differing(dataset.train, [*orders.values()])
    predicted, labels = predict(clean_rows(teacher, images)), images.labels
    right = {
        name: int((predicted == torch.tensor(outputs)[labels]).sum())
        for name, outputs in orders.items()
    }
    best = max(right, key=right.__getitem__)  # of equals, the first
    better = advantage(predicted, labels, orders[best])
    if better < CLEARLY:
        if better > -CLEARLY:
            own = _some(tuple(range(len(dataset.class_folders))), dataset)
            report.log(
                f"the teacher's outputs are taken for {own}, the sorted order, for {len(labels)} "
                f"training images tell too little of others; --teacher-classes natural (as timm "
                f"has them), or a file, says otherwise"
            )
        return None
    report.log(
        f"the teacher's outputs are taken for {_some(orders[best], dataset)}, {best}, for it is "
        f"right on {right[best]} of {len(labels)} training images so and on "
        f"{int((predicted == labels).sum())} in sorted order; if that is wrong, pass "
        f"--teacher-classes sorted, or a file of them"
    )
    return orders[best]


def _some(outputs: Outputs, dataset: Dataset) -> str:
    """The first few classes in the teacher's order."""
    names = dataset.class_folders or dataset.class_names
    order = sorted(range(len(outputs)), key=outputs.__getitem__)
    more = ", …" if len(order) > 4 else ""
    return ", ".join(names[number] for number in order[:4]) + more


def differing(split: Split, orders: Sequence[Outputs]) -> Split:
    """Samples of classes that orders make other outputs, the same number of each."""
    apart = (torch.tensor(orders) != torch.arange(len(orders[0]))).any(0)
    index = apart[split.labels].nonzero().flatten()
    index = index[split.labels[index].argsort(stable=True)]  # class by class
    counts = torch.bincount(split.labels[index], minlength=len(apart))
    each = max(1, LOOKED_AT // max(1, int((counts > 0).sum())))
    rank = torch.arange(len(index)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    index = index[rank < each]
    step = -(-len(index) // LOOKED_AT)  # of very many classes, every second or third
    return split.take(index[:: max(1, step)])


def clean_rows(
    teacher: CNNTeacher, split: Split, batch_size: int = 64
) -> list[tuple[Tensor, Tensor]]:
    """Logits and features of the samples' evaluation views, batch by batch."""
    inputs = make_inputs(split.images, teacher.device, teacher.input)
    order = torch.arange(len(split))
    return [teacher.rows(images) for _, images in inputs.batches(order, None, batch_size)]


def predict(rows: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """The classes [N] that a teacher sees in samples, by its rows."""
    found = [logits.argmax(1) for logits, _ in rows]
    return torch.cat(found).cpu() if found else torch.empty(0, dtype=torch.long)


def advantage(predicted: Tensor, labels: Tensor, outputs: Outputs) -> float:
    """By how many standard deviations predictions are better in one order than in the data set's.

    McNemar's test: images that are right in neither order say nothing. Classes count the same,
    however many images they have, so that a network that always says the same gains nothing.

    Args:
        predicted: outputs [N], in the teacher's own numbering.
        labels: [N], of classes that are different outputs in the two orders.
        outputs: the order.
    """
    wins = (predicted == torch.tensor(outputs)[labels]).double() - (predicted == labels).double()
    if not wins.any():
        return 0.0
    counts = torch.bincount(labels, minlength=len(outputs)).double()
    sums = torch.zeros_like(counts).index_add(0, labels, wins)
    there = counts > 0
    error = math.sqrt(float(wins.abs().mean() * (1 / counts[there]).sum())) / int(there.sum())
    return float((sums[there] / counts[there]).mean()) / error


def preview_teacher(
    teacher: CNNTeacher, weights: Path, dataset: Dataset, batch_size: int, report: Report
) -> list[tuple[Tensor, Tensor]]:
    """Say, before anything long, how well the teacher does, and what may be wrong where it is bad.

    It is bad where a teacher of the accuracy of `least`, or of 10 percentage points less than its
    file records, would be right on so few of the first test images in less than 1 % of cases; or
    where it takes classes for each other.

    Returns:
        Logits and features of those images, batch by batch.
    """
    test = dataset.test.first(LOOKED_AT)
    rows = clean_rows(teacher, test, batch_size)
    predicted = predict(rows)
    right = int((predicted == test.labels).sum())
    count, classes = len(test), len(dataset.class_names)
    said = (
        f"CNN teacher on {count} of the test images: {percent(right / count)} % (chance "
        f"{percent(1 / classes)} %)"
    )
    note = note_of(weights)
    recorded = _recorded_accuracy(note, weights)
    order = f"{_some(teacher.outputs or tuple(range(classes)), dataset)} may not be the order of "
    order += "its outputs (say it by --teacher-classes FILE)"
    if worse(right, count, least(classes)):
        other = (
            "on other images than these"
            if note
            else (
                "on images of another size or normalisation (--teacher-size, --teacher-mean, "
                "--teacher-std)"
            )
        )
        said += f"; so little suggests that it is read wrongly: {order}, or it was trained {other}"
    elif cycle := exchanged(predicted, test.labels, classes):
        names = dataset.class_folders or dataset.class_names
        pairs = ", ".join(
            f"{names[one]} for {names[other]}"
            for one, other in [*zip(cycle, [*cycle[1:], cycle[0]], strict=True)][:3]
        )
        said += f"; it takes {pairs}: {order}"
    elif recorded is not None and worse(right, count, recorded - DROP):
        said += (
            f"; far below the {percent(recorded)} % that {weights} records: these may be "
            f"other images, or other classes by the same names"
        )
    report.log(said)
    return rows


def exchanged(predicted: Tensor, labels: Tensor, classes: int) -> list[int]:
    """Classes that a teacher takes for each other all around, as in another order; or none.

    A teacher may take one class for another, but hardly that one for the first, too. Classes of
    fewer than five images say nothing, nor do those of which less than 80 % get one output.
    """
    if 5 * classes > len(labels):
        return []
    counts = torch.zeros(classes, classes, dtype=torch.long)
    counts.index_put_((labels, predicted), torch.ones_like(labels), accumulate=True)
    totals = counts.sum(1)
    most, taken_for = counts.max(1)
    sure = (totals >= 5) & (most >= 0.8 * totals)
    after = torch.where(sure, taken_for, -1).tolist()
    for start in range(classes):
        path = [start]
        while (other := after[path[-1]]) not in (-1, *path):
            path.append(other)
        if other == start and len(path) > 1:
            return path
    return []


def least(classes: int) -> float:
    """The accuracy that any teacher has which is read rightly.

    It is twice chance; for fewer than five classes, chance and a quarter of the rest; and for more
    than twenty, 10 %.
    """
    chance = 1 / classes
    return max(0.1, min(2 * chance, chance + (1 - chance) / 4))


def worse(right: int, count: int, bound: float) -> bool:
    """Whether so many right answers leave no doubt that an accuracy is below a bound."""
    from scipy.stats import binom

    return bound > 0 and bool(binom.cdf(right, count, bound) < DOUBT)


def _recorded_accuracy(note: Mapping[str, str], weights: Path) -> float | None:
    """On the test images that a teacher had where it was trained, in 0..1."""
    if "test_accuracy" not in note:
        return None
    try:
        return float(note["test_accuracy"])
    except ValueError:
        raise RichKDError(
            f"{weights} is damaged: of its metadata, test_accuracy is no number",
            code="weights-metadata-damaged",
        ) from None
