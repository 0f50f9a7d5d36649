"""Evaluation of students beyond test accuracy.

    run folders ─▶ students ┐
    test images ────────────┴▶ logits ─▶ scores, classes, confusions
    corrupted, shifted images ─▶ logits ─▶ robustness

All runs see the same images, so differences between them are paired by image. Where a cache keeps
pixels, each sees them or the files, whichever it was trained on.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor, nn

from richkd.analysis import metrics
from richkd.analysis.corruptions import (
    NAMES,
    PUBLISHED,
    SEVERITIES,
    Corruptions,
    MadeCorruptions,
    PublishedCorruptions,
    relative_errors,
)
from richkd.analysis.results import finite, paired_difference
from richkd.config.settings import Distill, recorded_holdout, resolve
from richkd.core.errors import RichKDError, nearest
from richkd.core.files import check_replaceable, read_json, write_json
from richkd.core.ownership import ABOUT_RUN
from richkd.core.progress import Report
from richkd.core.validation import find_fault
from richkd.data.boxes import CLEAN_SHARE
from richkd.data.class_names import class_words, text_key
from richkd.data.datasets import ImageFiles, Split, files_split
from richkd.data.decoding import Decoding, describe_decoding
from richkd.data.folders import find_images, list_images
from richkd.data.inputs import Batches, Normalize, make_inputs
from richkd.data.kept import KeptImages
from richkd.data.scans import Listing
from richkd.data.sources import FolderFiles
from richkd.data.views import ResizedCropFlip, views_tensor
from richkd.store.folder import Folder
from richkd.store.locations import open_location
from richkd.store.reader import TeacherCache, open_cache
from richkd.training.device import choose_device
from richkd.training.identity import RunIdentity
from richkd.training.images import student_images
from richkd.training.loop import EVAL_BATCH, predict
from richkd.training.run_folder import Run, complete_run, load_student
from richkd.training.targets import held_out


@dataclass(frozen=True)
class Student:
    """A trained student, ready to predict."""

    run: Run
    model: nn.Module
    normalize: Normalize
    device: torch.device

    def logits(self, batches: Batches) -> Tensor:
        """Return logits [N,C] f32 on the CPU.

        Raises:
            RichKDError: they are not finite.
        """
        logits = predict(self.model, batches, self.normalize).cpu()
        if not torch.isfinite(logits).all():
            raise RichKDError(
                f"the student of {self.run.path} outputs NaN or infinity: training diverged; train "
                f"it again with a lower --lr",
                code="student-diverged",
            )
        return logits


def evaluate(
    folders: Sequence[str | Path],
    *,
    weights: str = "last",
    threshold: float = 0.8,
    limit: int | None = None,
    cache: str | None = None,
    dataset: str | None = None,
    data_root: str | None = None,
    corruptions: bool = False,
    corruption_files: str | None = None,
    shift: str | None = None,
    seed: int = 0,
    device: str = "auto",
    report: Report | None = None,
) -> dict[str, Any]:
    """Evaluate the students of one or several runs on the test images of their dataset.

    The results of each run are also written to its folder (`evaluation_file`) for reports to read.

    Args:
        folders: run folders of complete runs on one dataset; all are compared with the first.
        weights: last or best.
        threshold: the lowest top probability of a confident prediction.
        limit: evaluate on the first `limit` test images, of those that no run holds out.
        cache: the location of the cache, if it has moved since training.
        dataset: the dataset, if it has moved since training.
        data_root: the folder of datasets, if it has moved since training.
        corruptions: also evaluate on corrupted images: the published files if they are in the data
            root (e.g. data/CIFAR-100-C), else corruptions made here.
        corruption_files: a folder with the published files of CIFAR-10-C or CIFAR-100-C.
        shift: a folder of other images of the same classes, with one folder per class.
        seed: seed of the noise in corruptions.
        device: device to predict on.
        report: receives progress.

    Returns:
        The name of the dataset and the results of each run, with the comparison with the first run
        under `comparison`. Accuracies and shares are in 0..1.

    Raises:
        RichKDError: a setting, run, cache or folder of images cannot be used; raised before any
            student predicts.
    """
    report = report or Report(quiet=True)
    check_settings(threshold, limit, seed)
    runs = [
        complete_run(folder)
        for folder in {Path(folder).resolve(): Path(folder) for folder in folders}.values()
    ]
    for run in runs:
        path = evaluation_file(run.path, weights)
        check_replaceable(path, ABOUT_RUN["evaluation.json"])
    settings = [resolve(Distill, dict(run.settings), {}) for run in runs]
    store = open_store_of(runs, cache)
    root = data_root or settings[0].data_root
    modes = decodings(store, settings)
    if corruptions or corruption_files is not None:
        check_alike(runs, modes)
    named = dataset or settings[0].dataset
    tests = {mode: student_images(store, named, root, mode)["test"] for mode in modes}
    test = tests[modes[0]]
    if any(isinstance(split.images, KeptImages) for split in tests.values()):
        store.check_content("test/pixels")
    share = max(recorded_holdout(run.settings) for run in runs)
    tested = held_out(len(test), share)[1][:limit]  # the sets of several shares are nested
    chosen = choose_device(device)
    name = store.manifest["dataset"]["name"]
    corrupted = find_corruptions(test, store, root, corruptions, corruption_files, seed)
    shifted = None if shift is None else load_shift(Path(shift), store, test, report)
    students = [prepare(run, store, weights, chosen) for run in runs]

    labels = test.labels[tested]
    images = {mode: make_inputs(split.images, chosen) for mode, split in tests.items()}
    clean_views = views_tensor(test.view_space.clean(len(test)))
    logits = []
    with report.track("evaluate", len(students) * len(tested), "images") as tick:
        for student, mode in zip(students, modes, strict=True):
            logits.append(student.logits(images[mode].batches(tested, clean_views, EVAL_BATCH)))
            tick(len(tested))
    about = {"weights": weights, "samples": len(labels), "held_out": share}
    parts = [
        {**describe(student), **about, **describe_logits(own, labels, threshold, store)}
        for student, own in zip(students, logits, strict=True)
    ]
    compare(parts, "top1", [metrics.right_of(own, labels) for own in logits])
    if corrupted is not None:
        under_corruptions(parts, students, corrupted, tested, labels, logits, report)
    if shifted is not None:
        under_shift(parts, students, shifted, logits, labels, threshold, report)
    for part, run in zip(parts, runs, strict=True):
        keep(part, evaluation_file(run.path, weights))
    return {"dataset": name, "runs": parts}


def decodings(store: TeacherCache, settings: Sequence[Distill]) -> list[str]:
    """Return how to read the test images of each run, kept pixels or files, as it was trained.

    Drafts and decoding on the device are of training images only.
    """
    kept = "pixels" in store.manifest
    return ["exact" if kept and each.decode != "auto" else "auto" for each in settings]


def check_alike(runs: Sequence[Run], modes: Sequence[str]) -> None:
    """Raise RichKDError if runs read other test images than the first."""
    for run, mode in zip(runs, modes, strict=True):
        if mode != modes[0]:
            raise RichKDError(
                f"of {runs[0].path} and {run.path}, one was trained on the pixels that the cache "
                f"keeps and the other on image files (--decode), so corruptions of the same pixels "
                f"suit only one; evaluate them separately, or without --corruptions",
                code="run-decode-differs",
            )


def check_settings(threshold: float, limit: int | None, seed: int) -> None:
    """Raise RichKDError if a setting is out of range."""
    metrics.check_threshold(threshold)
    if limit is not None and limit < 1:
        raise RichKDError(f"limit = {limit}: must be at least 1", code="value-out-of-range")
    if not 0 <= seed < 2**32:
        raise RichKDError(f"seed = {seed}: must be in 0..2³²−1", code="value-out-of-range")


def describe(student: Student) -> dict[str, Any]:
    """Return what identifies the run."""
    summary = student.run.complete
    return {
        "run": str(student.run.path),
        **{key: summary[key] for key in ("student", "method", "seed")},
    }


def describe_logits(
    logits: Tensor, labels: Tensor, threshold: float, store: TeacherCache
) -> dict[str, Any]:
    """Return the scores of one student's logits on the clean test images."""
    names = store.manifest["class_names"]
    return {
        "threshold": threshold,
        **metrics.score(logits, labels, threshold),
        "reliability": [asdict(bin) for bin in metrics.reliability(logits, labels)],
        "classes": metrics.class_table(logits, labels, names),
        "confusions": metrics.confusion_pairs(logits, labels, names),
        "comparison": {},
    }


# --- what to evaluate, and on what ---------------------------------------------------------------


def open_store_of(runs: Sequence[Run], cache: str | None) -> TeacherCache:
    """Open the cache that the first run names, or `cache`, and check that all runs used its data.

    Raises:
        RichKDError: it is missing or cannot be opened, or a run was trained on other data.
    """
    named = cache or str(runs[0].settings["cache"])
    location = open_location(named)
    if isinstance(location, Folder) and not Path(named).exists():
        raise RichKDError(
            f"{runs[0].path} was trained from {named}, which does not exist; give the cache's "
            f"location with --cache",
            code="run-cache-missing",
        )
    store = open_cache(named)
    of_cache = RunIdentity.of(store)
    for run in runs:
        if run.identity.dataset != of_cache.dataset:
            raise RichKDError(
                f"{run.path} was trained on other data than {named} holds; evaluate runs of one "
                f"dataset at a time, with a cache of that dataset",
                code="run-of-other-data",
            )
    return store


def prepare(run: Run, store: TeacherCache, weights: str, device: torch.device) -> Student:
    """Load a student and check that it was trained on images and classes like the cache's."""
    summary = run.complete
    pairs = zip(summary["class_names"], store.manifest["class_names"], strict=False)
    for number, (own, other) in enumerate(pairs):
        if own != other:
            raise RichKDError(
                f"class {number} is {own!r} in {run.path} and {other!r} in {store.location}; pass "
                f"the cache that the run was trained from with --cache",
                code="run-class-differs",
            )
    for what in ("image_size", "num_classes"):
        of_store = store.num_classes if what == "num_classes" else store.manifest["image_size"]
        if summary[what] != of_store:
            raise RichKDError(
                f"{run.path} was trained with {what} = {summary[what]}, but {store.location} has "
                f"{of_store}; pass the cache that the run was trained from with --cache",
                code="run-input-differs",
            )
    model = load_student(run, weights).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    normalize = Normalize(tuple(summary["mean"]), tuple(summary["std"]), device)
    return Student(run, model, normalize, device)


def find_corruptions(
    test: Split, store: TeacherCache, data_root: str, make: bool, folder: str | None, seed: int
) -> Corruptions | None:
    """Return the published corruptions in `folder` or else, if `make`, in the data root.

    If neither has them and `make`, corruptions are made from the test images; otherwise None.
    """
    name = PUBLISHED.get(store.manifest["dataset"]["name"])
    if folder is None and make and name is not None and (Path(data_root) / name).is_dir():
        folder = str(Path(data_root) / name)
    if folder is not None:
        return PublishedCorruptions(Path(folder), test.labels, store.manifest["image_size"])
    return MadeCorruptions(test.images, seed) if make else None


@dataclass(frozen=True)
class Shift:
    """Other images of some of the cache's classes."""

    images: ImageFiles
    views: Tensor  # [N,5], clean
    labels: Tensor  # [N], classes of the cache
    classes: Tensor  # the classes that have images, ascending


def load_shift(folder: Path, store: TeacherCache, test: Split, report: Report) -> Shift:
    """Load other images of the same classes from a folder with one folder per class.

    A folder belongs to the class whose training folder has the same name, else to the class of that
    name. If all folder names are numbers, they are class numbers. Images are framed as the
    cache's own are: small ones whole, photographs by their central crop.

    Raises:
        RichKDError: the folder is missing, or a folder in it matches no class or several.
    """
    if not folder.is_dir():
        raise RichKDError(
            f"no folder {folder}; pass a folder that has one folder of images per class",
            code="shift-folder-missing",
        )
    found = find_images(folder)
    numbers = shift_classes(found.classes, folder, store, test)
    for line in found.tally.lines():
        report.log(line)
    listing = list_images(folder, "refuse", found=found, remedy="remove such files")
    decoding = shift_decoding(listing, store)
    origin = "as in the cache, else by their values"
    for line in describe_decoding(decoding, [listing.values], listing.traits, origin):
        report.log(line)
    split = files_split(listing, store.manifest["image_size"], decoding)
    assert isinstance(split.images, ImageFiles)
    space = ResizedCropFlip(split.images.sizes, split.images.image_size)
    views = space.clean(len(split), 1 if store.manifest["dataset"]["embedded"] else CLEAN_SHARE)
    present = torch.tensor(sorted({*numbers}))
    return Shift(split.images, views_tensor(views), torch.tensor(numbers)[split.labels], present)


def shift_classes(
    found: Sequence[str], folder: Path, store: TeacherCache, test: Split
) -> list[int]:
    """Return the class of each folder of other images; raise as `load_shift`."""
    names = store.manifest["class_names"]
    by_folder: dict[str, set[int]] = defaultdict(set)  # normalised: without a number, …
    by_name: dict[str, set[int]] = defaultdict(set)
    recorded = store.manifest["dataset"].get("class_folders", ())
    own = class_folders(test) or dict(enumerate(recorded))
    for number, name in enumerate(names):
        by_name[text_key(name)].add(number)
        by_name[normalised(name)].add(number)
    for number, name in own.items():
        by_folder[normalised(name)].add(number)
    exact = {name: {number} for number, name in own.items()}
    numbers = {str(number): {number} for number in range(len(names))}
    if {*found} == {*numbers} and not {*found} & {*exact, *by_name}:
        exact = numbers  # as in ImageNet-V2
    classes = [
        exact.get(name)
        or by_name.get(text_key(name))
        or by_name.get(normalised(name))
        or by_folder[normalised(name)]
        for name in found
    ]
    unknown = [name for name, matches in zip(found, classes, strict=True) if not matches]
    if unknown:
        more = f" (and {len(unknown) - 1} more folders)" if len(unknown) > 1 else ""
        raise RichKDError(
            f"{folder / unknown[0]}: {store.location} has no class of this name{more}, "
            f"{nearest(normalised(unknown[0]), by_name)}; name the folders after the classes, or "
            f"all of them by class number from 0",
            code="shift-class-unknown",
        )
    for name, matches in zip(found, classes, strict=True):
        if len(matches) > 1:
            which = " and ".join(
                f"{number} ({own.get(number, names[number])})" for number in sorted(matches)
            )
            raise RichKDError(
                f"{folder / name} matches the classes {which} of {store.location}; give the folder "
                f"the name of the class's training folder",
                code="shift-class-ambiguous",
            )
    return [min(matches) for matches in classes]


def class_folders(split: Split) -> dict[int, str]:
    """Return the folder of each class that the split's files are in; empty for arrays."""
    if not isinstance(split.images, ImageFiles) or not isinstance(split.images.source, FolderFiles):
        return {}
    labels, first = np.unique(split.labels.numpy(), return_index=True)
    return {
        int(label): split.images.source.paths[int(index)].split("/")[0]
        for label, index in zip(labels, first, strict=True)
    }


def shift_decoding(listing: Listing, store: TeacherCache) -> Decoding:
    """Return the decoding of the cache's own files; files of other kinds decode by their values."""
    own = Decoding.of("white", None, [listing.values])
    entry = store.manifest["dataset"].get("decoding")
    if entry is None:
        return own
    known = Decoding.from_entry(entry)
    return replace(known, ranges={**own.ranges, **known.ranges})


def normalised(name: str) -> str:
    """Return a class name without case, numbers and separators, in which folders differ."""
    return text_key(class_words(name))


# --- robustness ----------------------------------------------------------------------------------


@dataclass
class Mistakes:
    """The mistakes of one student under corruptions."""

    wrong: dict[str, list[int]] = field(default_factory=lambda: {name: [] for name in NAMES})
    right: list[Tensor] = field(default_factory=list)  # [M] bool, by cell


def under_corruptions(
    parts: list[dict[str, Any]],
    students: Sequence[Student],
    corruptions: Corruptions,
    tested: Tensor,
    labels: Tensor,
    logits: Sequence[Tensor],
    report: Report,
) -> None:
    """Add each student's accuracies by corruption and severity; students share the images."""
    found = [Mistakes() for _ in students]
    total = len(NAMES) * SEVERITIES * len(tested)
    with report.track("corruptions", total, "images") as tick:
        for name, _, batches in corruptions.cells(tested, students[0].device):
            right: list[list[Tensor]] = [[] for _ in students]
            for batch, own_labels in zip(batches, torch.split(labels, EVAL_BATCH), strict=True):
                for own, student in zip(right, students, strict=True):
                    own.append(metrics.right_of(student.logits(iter([batch])), own_labels))
                tick(len(own_labels))
            for mistakes, own in zip(found, right, strict=True):
                mistakes.right.append(torch.cat(own))
                mistakes.wrong[name].append(int((~mistakes.right[-1]).sum()))
    clean = [int((~metrics.right_of(own, labels)).sum()) for own in logits]
    for part, mistakes, own_clean in zip(parts, found, clean, strict=True):
        top1 = {
            name: [1 - count / len(tested) for count in each]
            for name, each in mistakes.wrong.items()
        }
        mean_error = sum(map(sum, mistakes.wrong.values())) / total
        part["corruptions"] = {"source": corruptions.about, "top1": top1, "mean_error": mean_error}
        mce, relative = relative_errors(mistakes.wrong, own_clean, found[0].wrong, clean[0])
        part["comparison"] |= {"mce": mce, "relative_mce": relative}
    compare(
        parts,
        "corrupted_top1",
        [torch.stack(mistakes.right).double().mean(0) for mistakes in found],
    )


def under_shift(
    parts: list[dict[str, Any]],
    students: Sequence[Student],
    shift: Shift,
    logits: Sequence[Tensor],
    labels: Tensor,
    threshold: float,
    report: Report,
) -> None:
    """Add each student's scores on other images, and its accuracy on clean ones of these classes.

    Only classes that the other images have can be predicted, in both.
    """
    count = len(shift.labels)
    column = torch.full((logits[0].shape[1],), -1)  # class -> column of the logits kept
    column[shift.classes] = torch.arange(len(shift.classes))
    kept = column[labels] >= 0
    right = []
    with report.track("shift", len(students) * count, "images") as tick:
        for part, student, own in zip(parts, students, logits, strict=True):
            images = make_inputs(shift.images, student.device)
            batches = images.batches(torch.arange(count), shift.views, EVAL_BATCH)
            shifted = student.logits(batches)[:, shift.classes]
            right.append(metrics.right_of(shifted, column[shift.labels]))
            part["shift"] = {
                "samples": count,
                "classes": len(shift.classes),
                **metrics.score(shifted, column[shift.labels], threshold),
                "clean_top1": metrics.right_of(own[kept][:, shift.classes], column[labels[kept]])
                .double()
                .mean()
                .item()
                if kept.any()
                else None,
            }
            tick(count)
    compare(parts, "shifted_top1", right)


# --- comparison ----------------------------------------------------------------------------------


def compare(parts: list[dict[str, Any]], name: str, right: Sequence[Tensor]) -> None:
    """Add the difference of every other run's accuracy to the first run's, paired by image."""
    for part, own in zip(parts[1:], right[1:], strict=True):
        difference = paired_difference((own.double() - right[0].double()).tolist())
        part["comparison"][name] = difference and finite(difference)


# --- evaluations in run folders ------------------------------------------------------------------


class Scores(TypedDict):
    """The part of an evaluation that reports read."""

    samples: int
    held_out: float
    ece: float


class Robustness(TypedDict):
    """The part of an evaluation's corruptions that reports read."""

    source: str
    mean_error: float


def evaluation_file(folder: Path, weights: str) -> Path:
    """Return the file for the evaluation of a run's last or best weights."""
    return folder / ("evaluation.json" if weights == "last" else f"evaluation-{weights}.json")


def keep(part: Mapping[str, Any], path: Path) -> None:
    """Write an evaluation without its comparison.

    Results under corruptions of an earlier evaluation on the same images are kept.
    """
    kept = {key: value for key, value in part.items() if key != "comparison"}
    earlier = read_json(path) or {}
    alike = all(earlier.get(key) == part[key] for key in ("samples", "held_out"))
    if "corruptions" not in kept and alike and "corruptions" in earlier:
        kept["corruptions"] = earlier["corruptions"]
    write_json(path, kept)


def read_evaluation(folder: Path) -> tuple[Scores, Robustness | None] | None:
    """Return the evaluation of a run's last weights and its corruptions; None without one.

    Raises:
        RichKDError: the file is damaged.
    """
    path = evaluation_file(folder, "last")
    if not path.is_file():
        return None
    found = read_json(path) or {}
    robustness = found.get("corruptions")
    fault = find_fault(found, Scores) or find_fault(robustness, Robustness | None, "corruptions")
    if fault:
        raise RichKDError(
            f"{path} is damaged ({fault}); run richkd evaluate again, or remove it",
            code="evaluation-damaged",
        )
    return found, robustness  # type: ignore[return-value]
