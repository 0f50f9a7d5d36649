"""Map the outputs of the CNN teacher to the classes of the dataset.

A cache holds logits in the dataset's order; folders are in the order of their sorted names. Other
programs use other orders: timm's loader ignores case and sorts class2 before class10. `Outputs`
gives the number of the teacher's output for each class; None means the dataset's order.
"""

from __future__ import annotations

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
from richkd.teachers.framing import note_of, noted_names
from richkd.teachers.matching import named_outputs
from richkd.teachers.permutation import CLEARLY, advantage_of, likely_order
from richkd.teachers.pretrained import by_name

LOOKED_AT = 256  # training images to choose an order by, and test images of the preview
DOUBT = 0.01  # the probability below which an accuracy is called too low
DROP = 0.10  # how far a teacher may stay below the accuracy recorded in its file


def check_teacher_classes(settings: Precompute) -> None:
    """Check that --teacher-classes can be read and comes with weights; raise RichKDError if not."""
    given = settings.teacher_classes
    if not given:
        return
    if not (settings.teacher_weights or by_name(settings)):
        raise RichKDError(
            "--teacher-classes is only for weights from elsewhere, as a teacher that richkd trains "
            "has the dataset's order; pass --teacher-weights, or leave it out",
            code="teacher-classes-not-needed",
        )
    if given not in ORDERS:
        _read_lines(Path(given))


def given_outputs(settings: Precompute, dataset: Dataset) -> Outputs | None:
    """Return the order that the user gives: sorted, natural or the order in a file.

    Raises:
        RichKDError: the file lacks a class, repeats one, or names an unknown one.
    """
    given, folders = settings.teacher_classes, dataset.class_folders or dataset.class_names
    if given == "natural":
        return _outputs(natural(folders), folders)
    if given == "sorted":
        return _outputs(sorted(folders), folders)
    lines, file = _read_lines(Path(given)), f"--teacher-classes {given}"
    names = next((names for names in (folders, dataset.class_names) if {*lines} <= {*names}), None)
    if names is None:
        unknown = next(line for line in lines if line not in {*folders})
        raise RichKDError(
            f"{file}: {unknown!r} is not a class of {dataset.name}; {nearest(unknown, folders)}",
            code="teacher-classes-unknown",
        )
    twice = next((line for number, line in enumerate(lines) if line in lines[:number]), None)
    if twice is not None:
        raise RichKDError(
            f"{file} names {twice!r} twice; write one line per class", code="teacher-classes-wrong"
        )
    missing = next((name for name in names if name not in {*lines}), None)
    if missing is not None:
        raise RichKDError(
            f"{file} has {len(lines)} of {len(names)} classes: {missing!r} is missing; write one "
            f"line per class, in the order of the teacher's outputs",
            code="teacher-classes-wrong",
        )
    return _outputs(lines, names)


def _read_lines(file: Path) -> list[str]:
    try:
        lines = read_text(file).splitlines()
    except (OSError, ValueError) as error:
        raise RichKDError(
            f"cannot read --teacher-classes {file}: {error}; name a file with one class folder per "
            f"line, in the order of the teacher's outputs, or pass sorted or natural",
            code="teacher-classes-unreadable",
        ) from None
    return [line.strip() for line in lines if line.strip()]


def natural(names: Sequence[str]) -> list[str]:
    """Sort names as timm's loader does: ignoring case, and 2 before 10."""
    from timm.utils.misc import natural_key

    try:
        return sorted(sorted(names), key=natural_key)
    except ValueError:  # timm takes ² for a digit but cannot convert it
        return sorted(names)


def usual_orders(folders: Sequence[str]) -> dict[str, Outputs]:
    """Return the orders of common loaders, by name, that differ from the dataset's own."""
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
    """Return the position of each of our names among theirs; None if the order is the same."""
    position = {name: number for number, name in enumerate(theirs)}
    outputs = tuple(position[name] for name in ours)
    return None if outputs == tuple(range(len(ours))) else outputs


def noted_outputs(note: Mapping[str, str], weights: Path, dataset: Dataset) -> Outputs | None:
    """Return the order recorded with weights that richkd trained.

    Classes are compared by their folders, else by their names.

    Raises:
        RichKDError: the teacher has other classes, or the metadata is damaged.
    """
    if note.get("fingerprint") == dataset.fingerprint:
        return None  # the very same images and labels
    different: list[str] = []
    for kind, ours in (
        ("class_folders", dataset.class_folders),
        ("class_names", dataset.class_names),
    ):
        theirs = noted_names(note, kind, weights)
        if len(theirs) == len(ours) == len({*ours}) and {*theirs} == {*ours}:
            return _outputs(theirs, ours)
        if theirs and ours:
            different = sorted({*theirs} - {*ours}) or sorted({*ours} - {*theirs}) or different
    if different:
        raise RichKDError(
            f"{weights} was trained on other classes than {dataset.name} has: only one has "
            f"{different[0]!r}; if only the names differ, pass --teacher-classes FILE with the "
            f"class folders in the order of its outputs",
            code="teacher-classes-differ",
        )
    return None


def resolve_outputs(
    settings: Precompute,
    weights: Path | None,
    teacher: CNNTeacher,
    dataset: Dataset,
    report: Report,
) -> Outputs | None:
    """Return the order of a teacher's outputs, and log it unless it is the dataset's.

    What the user gives comes first, then what is recorded with the weights. Without either, the
    order of a common loader is chosen if it makes the teacher clearly better on training images.

    Args:
        settings: what the user gives.
        weights: the teacher's file; None if its weights go by name.
        teacher: the teacher loaded from it, in any order.
        dataset: the images.
        report: where to log the order.

    Raises:
        RichKDError: as `given_outputs` and `noted_outputs` do.
    """
    if settings.teacher_classes:
        outputs = given_outputs(settings, dataset)
        if outputs is not None:
            report.log(
                f"the teacher's outputs are {_some(outputs, dataset)}, by --teacher-classes "
                f"{settings.teacher_classes}; the cache has them in the dataset's order"
            )
        return outputs
    note = note_of(weights)
    if weights is None:
        outputs = named_outputs(settings, dataset)
        if outputs is None:
            return guess_outputs(teacher, dataset, report)
        source = f"by the configuration of {settings.teacher}"
    elif any(kind in note for kind in ("class_folders", "class_names")):
        outputs = noted_outputs(note, weights, dataset)
        source = f"as recorded in {weights}"
    else:
        return guess_outputs(teacher, dataset, report)
    if outputs is None or outputs == tuple(range(len(outputs))):
        return None
    report.log(
        f"the teacher's outputs are {_some(outputs, dataset)}, {source}; the cache has them in the "
        f"dataset's order"
    )
    return outputs


def guess_outputs(teacher: CNNTeacher, dataset: Dataset, report: Report) -> Outputs | None:
    """Return the common order with which a teacher is clearly best on training images; log it."""
    orders = usual_orders(dataset.class_folders)
    if not orders:
        return None
    images = differing(dataset.train, [*orders.values()])
    predicted, labels = predict(clean_rows(teacher, images)), images.labels
    right = {
        name: int((predicted == torch.tensor(outputs)[labels]).sum())
        for name, outputs in orders.items()
    }
    best = max(right, key=right.__getitem__)  # the first of equals
    better = advantage(predicted, labels, orders[best])
    if better < CLEARLY:
        if better > -CLEARLY:
            own = _some(tuple(range(len(dataset.class_folders))), dataset)
            report.log(
                f"assuming that the teacher's outputs are {own} in sorted order, since "
                f"{len(labels)} training images are too few to tell; if not, pass "
                f"--teacher-classes natural (timm's order), or a file"
            )
        return None
    report.log(
        f"assuming that the teacher's outputs are {_some(orders[best], dataset)} ({best}), since "
        f"it is right on {right[best]} of {len(labels)} training images in this order and on "
        f"{int((predicted == labels).sum())} in sorted order; if not, pass --teacher-classes "
        f"sorted, or a file"
    )
    return orders[best]


def _some(outputs: Outputs, dataset: Dataset, count: int = 4) -> str:
    """Return the first classes in the teacher's order."""
    names = dataset.class_folders or dataset.class_names
    order = sorted(range(len(outputs)), key=outputs.__getitem__)
    more = ", …" if len(order) > count else ""
    return ", ".join(names[number] for number in order[:count]) + more


def differing(split: Split, orders: Sequence[Outputs]) -> Split:
    """Return samples of the classes whose outputs the orders change, equally many of each."""
    apart = (torch.tensor(orders) != torch.arange(len(orders[0]))).any(0)
    index = apart[split.labels].nonzero().flatten()
    index = index[split.labels[index].argsort(stable=True)]  # class by class
    counts = torch.bincount(split.labels[index], minlength=len(apart))
    each = max(1, LOOKED_AT // max(1, int((counts > 0).sum())))
    rank = torch.arange(len(index)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    index = index[rank < each]
    step = -(-len(index) // LOOKED_AT)  # with very many classes, only every second or third
    return split.take(index[:: max(1, step)])


def clean_rows(
    teacher: CNNTeacher, split: Split, batch_size: int = 64
) -> list[tuple[Tensor, Tensor]]:
    """Return logits and features of the samples' evaluation views, batch by batch."""
    inputs = make_inputs(split.images, teacher.device, teacher.input)
    order = torch.arange(len(split))
    return [teacher.rows(images) for _, images in inputs.batches(order, None, batch_size)]


def predict(rows: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the outputs [N] with the largest logits."""
    found = [logits.argmax(1) for logits, _ in rows]
    return torch.cat(found).cpu() if found else torch.empty(0, dtype=torch.long)


def advantage(predicted: Tensor, labels: Tensor, outputs: Outputs) -> float:
    """Return how much better predictions are in one order than in the dataset's.

    Args:
        predicted: outputs [N], in the teacher's own numbering.
        labels: [N], of classes whose outputs differ between the two orders.
        outputs: the order.
    """
    ordered = predicted == torch.tensor(outputs)[labels]
    return advantage_of(ordered.double() - (predicted == labels).double(), labels)


def preview_teacher(
    teacher: CNNTeacher, weights: Path | None, dataset: Dataset, batch_size: int, report: Report
) -> list[tuple[Tensor, Tensor]]:
    """Log, before any long work, how well the teacher does and what may be wrong if it does badly.

    It does badly if it is clearly better in another order of the classes (`likely_order`), or is
    right on so few of the first test images that the probability is below 1 % for a teacher at the
    bound of `least`, or for one 10 percentage points below the accuracy recorded in its file.

    Returns:
        Logits and features of those images, batch by batch.
    """
    test = dataset.test.first(LOOKED_AT)
    rows = clean_rows(teacher, test, batch_size)
    predicted = predict(rows)
    right = int((predicted == test.labels).sum())
    count, classes = len(test), len(dataset.class_names)
    summary = (
        f"CNN teacher on {count} of the test images: {percent(right / count)} % (chance "
        f"{percent(1 / classes)} %)"
    )
    note = note_of(weights)
    recorded = None if weights is None else _recorded_accuracy(note, weights)
    if teacher.head != "own":  # it has the dataset's order
        if worse(right, count, least(classes)):
            summary += {
                "probe": "; its features hardly tell these classes apart: choose another teacher, "
                "or fine-tune it with richkd train-teacher --init",
                "rows": "; its outputs may be of other classes than those matched, or it was "
                "trained on images of another kind: compare --teacher-head probe",
            }[teacher.head]
    elif order := likely_order(predicted, test.labels, classes):
        summary += f"; {_in_another_order(order, predicted, test.labels, teacher, dataset)}"
    elif worse(right, count, least(classes)):
        size = "size or normalisation (--teacher-size, --teacher-mean, --teacher-std)"
        other = "other images" if note or weights is None else f"images of another {size}"
        summary += (
            f"; too low for a teacher read correctly: "
            f"{_some(teacher.outputs or tuple(range(classes)), dataset)} may not be the order of "
            f"its outputs (pass --teacher-classes FILE), or it was trained on {other}"
        )
    elif recorded is not None and worse(right, count, recorded - DROP):
        summary += (
            f"; far below the {percent(recorded)} % recorded in {weights}: the images may differ, "
            f"or other classes may have the same names"
        )
    report.log(summary)
    return rows


def _in_another_order(
    order: Mapping[int, int],
    predicted: Tensor,
    labels: Tensor,
    teacher: CNNTeacher,
    dataset: Dataset,
) -> str:
    """Describe an order in which a teacher is better than in its present one, and the remedy.

    The order of a common loader is named if it explains as much.

    Args:
        order: the order, as `likely_order` returns it.
        predicted: the teacher's answers [N].
        labels: the images' classes [N].
        teacher: the teacher, with its present order.
        dataset: its classes.
    """
    names = dataset.class_folders or dataset.class_names
    present = torch.tensor(teacher.outputs or range(len(names)))
    free = sorted({*range(len(names))} - {*order.values()}, reverse=True)
    whole = [order[number] if number in order else free.pop() for number in range(len(names))]
    found = tuple(present[whole].tolist())
    usual = {"sorted": tuple(range(len(names))), **usual_orders(dataset.class_folders)}

    def right(outputs: Outputs) -> int:
        return int((present[predicted] == torch.tensor(outputs)[labels]).sum())

    name = max(usual, key=lambda each: right(usual[each]))
    each = len(labels) // max(1, len(order))
    remark = f" (a guess from {each} images per class)" if each < 5 else ""
    flag = "FILE with one class per line in its order (class_to_idx where it was trained)"
    if right(usual[name]) >= 0.95 * right(found):
        found, remark = usual[name], f" ({name})"
        flag = {"sorted": "sorted", "timm's natural order": "natural"}.get(name, flag)
    shown = _some(found, dataset, 20 if len(names) <= 20 else 8)
    pairs = ", ".join(
        f"{names[one]} for {names[other]}"
        for one, other in [pair for pair in order.items() if len({*pair}) > 1][:3]
    )
    return (
        f"it takes {pairs}: its outputs are probably {shown}{remark}, in which order it is right "
        f"on {percent(right(found) / len(labels))} %; pass --teacher-classes {flag}"
    )


def least(classes: int) -> float:
    """Return the accuracy below which a teacher must have been read incorrectly.

    It is twice chance; with fewer than five classes, chance plus a quarter of the rest; and with
    more than twenty, 10 %.
    """
    chance = 1 / classes
    return max(0.1, min(2 * chance, chance + (1 - chance) / 4))


def worse(right: int, count: int, bound: float) -> bool:
    """Return whether so few right answers show that the accuracy is below a bound."""
    from scipy.stats import binom

    return bound > 0 and bool(binom.cdf(right, count, bound) < DOUBT)


def _recorded_accuracy(note: Mapping[str, str], weights: Path) -> float | None:
    """Return the test accuracy recorded when the teacher was trained, in 0..1, or None."""
    if "test_accuracy" not in note:
        return None
    try:
        return float(note["test_accuracy"])
    except ValueError:
        raise RichKDError(
            f"{weights} has damaged metadata: test_accuracy is not a number; restore the file",
            code="weights-metadata-damaged",
        ) from None
