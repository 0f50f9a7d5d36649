"""Whether a teacher's own classes are the dataset's, and which of its outputs match them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from richkd.config.settings import Precompute
from richkd.core.errors import RichKDError, nearest
from richkd.core.progress import Report
from richkd.data.datasets import Dataset
from richkd.models import create_model
from richkd.models.hub_access import Fault, hub_fault, planning
from richkd.models.weights import find_state, read_weights
from richkd.teachers.cnn import Outputs
from richkd.teachers.framing import note_of, noted_names
from richkd.teachers.heads import check_folds
from richkd.teachers.pretrained import by_name, configuration

SHOWN = 4  # classes in messages


@dataclass(frozen=True)
class OwnClasses:
    """The classes of a teacher's own outputs, in their order."""

    source: str  # where they are known from
    ids: tuple[str, ...]  # WordNet ids, or names
    names: tuple[tuple[str, ...], ...]  # all names of each class

    @cached_property
    def rows(self) -> dict[str, list[int]]:
        """The outputs that a plain id or name may mean."""
        found: dict[str, list[int]] = defaultdict(list)
        for row, (own, names) in enumerate(zip(self.ids, self.names, strict=True)):
            for key in dict.fromkeys(map(plain, (own, *names))):
                found[key].append(row)
        return dict(found)

    def shown(self, row: int) -> str:
        """Return a class as messages name it."""
        own, first = self.ids[row], self.names[row][0]
        return own if own == first else f"{own} {first}"


def plain(name: str) -> str:
    """Return a name without case, underscores, hyphens and spaces."""
    return "".join(part for part in name.lower() if part not in "_- ")


def recorded_classes(weights: Path, count: int) -> OwnClasses | None:
    """Return the classes that richkd recorded in a teacher's file, or None if it did not."""
    note = note_of(weights)
    folders, names = (noted_names(note, kind, weights) for kind in ("class_folders", "class_names"))
    listed = [each for each in (folders, names) if len(each) == count]
    if not listed:
        return None
    texts = tuple(map(_lemmas, listed[-1]))
    return OwnClasses(f"recorded in {weights}", tuple(listed[0]), texts)


def named_classes(count: int, config: Any) -> OwnClasses | None:
    """Return the classes that timm's configuration of weights names, or None if it names none."""
    labels = getattr(config, "label_names", None)
    labels = tuple(labels) if isinstance(labels, list | tuple) else ()
    if labels and len(labels) == count and all(isinstance(each, str) for each in labels):
        known = getattr(config, "label_descriptions", None)
        descriptions = known if isinstance(known, Mapping) else {}
        texts = [str(descriptions.get(each, each)) for each in labels]
        return OwnClasses("named by its configuration", labels, tuple(map(_lemmas, texts)))
    return None


def imagenet_classes(count: int) -> OwnClasses | None:
    """Return the classes of an ImageNet with as many, or None if there is none."""
    from timm.data import imagenet_info

    subset = imagenet_info.infer_imagenet_subset({"num_classes": count})
    if subset is None:
        return None
    info: Any = imagenet_info.ImageNetInfo(subset)
    lemmas = info.label_descriptions()
    return OwnClasses(
        f"assumed to be {subset}'s", tuple(info.label_names()), tuple(map(_lemmas, lemmas))
    )


def _lemmas(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip()) or (text,)


def match_rows(dataset: Dataset, own: OwnClasses) -> Outputs:
    """Return the one output of the teacher that each class of the dataset matches.

    A class matches by its folder, a WordNet id or a name, else by its name; case, underscores,
    hyphens and spaces do not count.

    Raises:
        RichKDError: a class matches no output or several, or two classes match the same one.
    """
    missing: list[str] = []
    rows: list[int] = []
    taken: dict[int, str] = {}
    names = dataset.class_names
    for folder, name in zip(dataset.class_folders or names, names, strict=True):
        first, second = (own.rows.get(plain(text), []) for text in (folder, name))
        found = [row for row in first if row in second] or first or second
        if not found:
            missing.append(folder)
            continue
        if len(found) > 1:
            raise RichKDError(
                f"--teacher-head rows: class {folder!r} may be any of "
                f"{_some(map(own.shown, found))}; name the folder by the WordNet id, or use "
                f"--teacher-head probe",
                code="teacher-rows-ambiguous",
            )
        if found[0] in taken:
            raise RichKDError(
                f"--teacher-head rows: classes {taken[found[0]]!r} and {folder!r} both match "
                f"{own.shown(found[0])}; rename one, or use --teacher-head probe",
                code="teacher-rows-twice",
            )
        taken[found[0]] = folder
        rows.append(found[0])
    if missing:
        every = [name for names in own.names for name in names]
        more = f" (and {len(missing) - 1} more classes)" if len(missing) > 1 else ""
        raise RichKDError(
            f"--teacher-head rows: class {missing[0]!r}{more} matches none of the teacher's "
            f"{len(own.ids):,} classes, {own.source}; {nearest(missing[0], every, SHOWN)}; name "
            f"the folder by a WordNet id or one of its names, or use --teacher-head probe",
            code="teacher-rows-unmatched",
        )
    return tuple(rows)


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:SHOWN]) + f" and {len(listed) - SHOWN} more" * (len(listed) > SHOWN)


def own_rows(
    settings: Precompute, count: int, dataset: Dataset, report: Report, fault: Fault = hub_fault
) -> Outputs:
    """Return and log the rows of the teacher's own head for the dataset's classes.

    Args:
        settings: of the teacher.
        count: the number of its outputs.
        dataset: the images.
        report: where to log them.
        fault: returns why the hub cannot be reached.

    Raises:
        RichKDError: as `match_rows`, or the classes of its outputs are unknown.
    """
    if by_name(settings):
        own = named_classes(count, configuration(settings.teacher, fault))
    else:
        own = recorded_classes(Path(settings.teacher_weights), count)
    own = own or imagenet_classes(count)
    if own is None:
        raise RichKDError(
            f"--teacher-head rows: the classes of the teacher's {count:,} outputs are unknown, as "
            f"they are not those of an ImageNet; use --teacher-head probe",
            code="teacher-rows-unknown",
        )
    rows = match_rows(dataset, own)
    folders = dataset.class_folders or dataset.class_names
    pairs = (f"{name} → {own.shown(row)}" for name, row in zip(folders, rows, strict=True))
    report.log(
        f"matched {len(rows):,} classes to the teacher's {count:,} outputs, {own.source}: "
        f"{_some(pairs)}"
    )
    return rows


def named_outputs(
    settings: Precompute, dataset: Dataset, fault: Fault = hub_fault
) -> Outputs | None:
    """Return the output for each class, if a pretrained teacher's configuration names its classes.

    Args:
        settings: of a teacher whose weights go by name, with as many outputs as there are classes.
        dataset: the images.
        fault: returns why the hub cannot be reached.

    Raises:
        RichKDError: its classes are not the dataset's.
    """
    own = named_classes(len(dataset.class_names), configuration(settings.teacher, fault))
    if own is None:
        return None
    try:
        return match_rows(dataset, own)
    except RichKDError:
        folders = dataset.class_folders or dataset.class_names
        pairs = zip(folders, dataset.class_names, strict=True)
        known = own.rows.keys()
        lost = [folder for folder, name in pairs if not {plain(folder), plain(name)} & known]
        fault_of = f"lack {lost[0]!r}" if lost else "do not match them one to one"
        raise RichKDError(
            f"teacher {settings.teacher} was trained on other classes than {dataset.name} has: its "
            f"own, {_some(map(own.shown, range(len(own.ids))))}, {fault_of}; if only the names "
            f"differ, pass --teacher-classes FILE with the class folders in the order of its "
            f"outputs",
            code="teacher-classes-differ",
        ) from None


def num_outputs(
    settings: Precompute, weights: Path | None, classes: int, fault: Fault = hub_fault
) -> int:
    """Return the number of the teacher's own outputs.

    Args:
        settings: of the teacher.
        weights: its file; None if its weights go by name.
        classes: the number to return for weights whose network the name is not.
        fault: returns why the hub cannot be reached.

    Raises:
        RichKDError: the weights cannot be read or are of another network.
    """
    if weights is None:
        return int(configuration(settings.teacher, fault).num_classes)
    few, more = (_on_meta(settings.teacher, number) for number in (2, 3))
    content = read_weights(weights)
    key = settings.teacher_weights_key
    state, _ = find_state(few, content, settings.teacher, weights, key)
    for name, tensor in few.items():
        for axis, (one, two) in enumerate(zip(tensor.shape, more[name].shape, strict=True)):
            if one != two and state[name].ndim == tensor.ndim:
                return state[name].shape[axis]
    return classes


def _on_meta(name: str, num_classes: int) -> dict[str, Tensor]:
    """Return the entries of a network without their values."""
    with torch.device("meta"):
        return create_model(name, num_classes).state_dict()


def check_head(settings: Precompute, dataset: Dataset, fault: Fault = hub_fault) -> None:
    """Check, before any weights are downloaded, that the teacher can have this head.

    Raises:
        RichKDError: its outputs do not fit the classes, or there are too few images for a probe.
    """
    head = settings.teacher_head
    named = by_name(settings)
    if head != "own" and not (named or settings.teacher_weights):
        raise RichKDError(
            f"--teacher-head {head} is for a teacher of other classes, but richkd would train "
            f"{settings.teacher} on these; name pretrained weights, e.g. --teacher "
            f"timm/resnet50.a1_in1k, or pass --teacher-weights FILE",
            code="teacher-head-not-needed",
        )
    if head != "own" and settings.teacher_classes:
        raise RichKDError(
            f"--teacher-classes is the order of the teacher's own head, but --teacher-head {head} "
            f"has the dataset's; leave one out",
            code="teacher-classes-not-needed",
        )
    if head == "probe":
        check_folds(dataset)
    elif named or head == "rows":
        weights = None if named else Path(settings.teacher_weights)
        count = num_outputs(settings, weights, len(dataset.class_names), fault)
        if head == "rows":
            own_rows(settings, count, dataset, Report(quiet=True), fault)
        elif count != len(dataset.class_names):
            raise other_classes(settings, count, dataset, fault=fault)
        elif not settings.teacher_classes and (dataset.class_folders or fault is not planning):
            named_outputs(settings, dataset, fault)  # a plan's drawn images have no class names


def other_classes(
    settings: Precompute,
    count: int,
    dataset: Dataset,
    code: str = "teacher-outputs-differ",
    fault: Fault = hub_fault,
) -> RichKDError:
    """Return the error for a teacher of another number of classes, with the heads that it may have.

    Args:
        settings: of the teacher.
        count: the number of its outputs.
        dataset: the images.
        code: of the error.
        fault: returns why the hub cannot be reached.
    """
    try:
        own_rows(settings, count, dataset, Report(quiet=True), fault)
        offer = "use --teacher-head rows, as its own head has all of these classes, or"
    except RichKDError:
        offer = "use"
    return RichKDError(
        f"teacher {settings.teacher_weights or settings.teacher} has {count:,} outputs, but "
        f"{dataset.name} has {len(dataset.class_names)} classes; {offer} --teacher-head probe, "
        f"which fits a linear head on its features, or fine-tune it with richkd train-teacher "
        f"--init",
        code=code,
    )
