"""Students under the lens: what their test accuracy does not say.

    run folders ─▶ students ┐
    test images ────────────┴▶ logits ─▶ scores, classes, confusions
    corrupted, shifted images ─▶ logits ─▶ robustness

Several runs see the very same images, so what sets them apart is paired, sample by sample.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypedDict

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
    mean_corruption_error,
    relative_errors,
)
from richkd.data.datasets import Split, class_folders
from richkd.data.inputs import Batches, Normalize, make_inputs
from richkd.data.views import views_tensor
from richkd.distill import load_images
from richkd.errors import RichKDError, nearest
from richkd.files import write
from richkd.progress import Report
from richkd.recipe import Distill, resolve
from richkd.results import Difference, paired_difference
from richkd.run_folders import Run, complete_run, load_student
from richkd.store.reader import TeacherCache, open_cache
from richkd.targets import held_out
from richkd.training.device import choose_device, half_precision
from richkd.training.loop import EVAL_BATCH, accuracy, predict
from richkd.typecheck import misfit

EVALUATION = "evaluation.json"  # in a run folder


@dataclass(frozen=True)
class Student:
    """A run's student, ready to predict."""

    run: Run
    model: nn.Module
    normalize: Normalize
    device: torch.device
    half: bool

    def logits(self, batches: Batches) -> Tensor:
        """[N,C] f32 on the CPU."""
        return predict(self.model, batches, self.normalize, self.device, self.half).cpu()


def evaluate(
    folders: Sequence[str | Path],
    *,
    weights: str = "last",
    threshold: float = 0.8,
    limit: int | None = None,
    cache: str | None = None,
    data_root: str | None = None,
    corruptions: bool = False,
    corruption_files: str | None = None,
    shift: str | None = None,
    seed: int = 0,
    device: str = "auto",
    report: Report | None = None,
) -> dict[str, Any]:
    """Evaluate the students of one or several runs on the test images of their data set.

    Args:
        folders: of complete runs on one data set; the others are compared with the first.
        weights: last or best.
        threshold: the top probability from which a prediction counts as confident.
        limit: only the first so many test images.
        cache: the store, where it is not at the place that the run names.
        data_root: where the data set is, likewise.
        corruptions: evaluate under corruptions: the published ones, where they lie beside the data
            set (data/CIFAR-100-C), else some that are made here.
        corruption_files: evaluate under those of CIFAR-10-C or CIFAR-100-C in this folder.
        shift: a folder with a folder of other images a class, whose names are classes.
        seed: of the noise in corruptions.
        device: to predict on.
        report: where progress goes.

    Returns:
        A dictionary as it is in evaluation.json of the first run, with a part for each run; each
        run's own part is written to its folder. Accuracies and shares are in 0..1.

    Raises:
        RichKDError: anything the user can mend, before anything long.
    """
    report = report or Report(quiet=True)
    if not 0 < threshold < 1:
        raise RichKDError(f"threshold = {threshold}: must be between 0 and 1")
    if limit is not None and limit < 1:
        raise RichKDError(f"limit = {limit}: must be 1 or more")
    runs = [complete_run(Path(folder)) for folder in dict.fromkeys(map(str, folders))]
    settings = [resolve(Distill, dict(run.settings), {}) for run in runs]
    store = open_store_of(runs, cache)
    root = data_root or settings[0].data_root
    test = load_images(store, replace(settings[0], data_root=root))[1]
    tested = tested_by_all(len(test), settings)[:limit]
    chosen = choose_device(device)
    dataset = store.manifest["dataset"]["name"]
    corrupted = find_corruptions(test, dataset, root, corruptions, corruption_files, seed)
    shifted = load_shift(Path(shift), store) if shift else None
    students = [prepare(run, own, store, weights, chosen)
                for run, own in zip(runs, settings, strict=True)]  # fmt: skip

    labels = test.labels[tested]
    images = make_inputs(test.images, chosen)
    clean_views = views_tensor(test.view_space.clean(len(test)))
    logits = []
    with report.track("evaluate", len(students), "students") as tick:
        for student in students:
            logits.append(student.logits(images.batches(tested, clean_views, EVAL_BATCH)))
            tick(1)
    names = store.manifest["class_names"]
    parts = [
        {
            "run": str(student.run.path),
            "student": student.run.complete["student"],
            "method": student.run.complete["method"],
            "seed": student.run.complete["seed"],
            "weights": weights,
            "samples": len(labels),
            "threshold": threshold,
            **metrics.score(own, labels, threshold),
            "reliability": [asdict(bin) for bin in metrics.reliability(own, labels)],
            "classes": metrics.class_table(own, labels, names),
            "confusions": metrics.confusion_pairs(own, labels, names),
        }
        for student, own in zip(students, logits, strict=True)
    ]
    if corrupted is not None:
        under_corruptions(parts, students, corrupted, tested, labels, chosen, report)
    if shifted is not None:
        under_shift(parts, students, *shifted, names, chosen, threshold, report)
    add_differences(parts, logits, labels)
    for part, run in zip(parts, runs, strict=True):
        write(run.path / EVALUATION, json.dumps(part, indent=2) + "\n")
    return {"dataset": dataset, "runs": parts}


# --- what to evaluate, and on what ---------------------------------------------------------------


def open_store_of(runs: Sequence[Run], cache: str | None) -> TeacherCache:
    """The store that the first run names, or `cache`; it and all runs are of the same data.

    Raises:
        RichKDError: it is gone, or of other data than a run.
    """
    named = cache or str(runs[0].settings["cache"])
    if not Path(named).exists():
        raise RichKDError(
            f"{runs[0].path} was trained from {named}, which is gone; say where the store is with "
            f"--cache"
        )
    store = open_cache(named)
    fingerprint = store.manifest["dataset"]["fingerprint"][:16]
    for run in runs:
        if run.identity.split(", ")[0] != fingerprint:
            raise RichKDError(
                f"{run.path} was trained on other data than {named} holds; evaluate runs of one "
                f"data set at a time, and with a store of it"
            )
    return store


def tested_by_all(num_test: int, settings: Sequence[Distill]) -> Tensor:
    """Test samples [M] that no run chose its α on; the held-out sets are nested in each other."""
    return held_out(num_test, max(own.held_out_share for own in settings))[1]


def prepare(
    run: Run, settings: Distill, store: TeacherCache, weights: str, device: torch.device
) -> Student:
    """Load a student as it was tested while it was trained."""
    summary = run.complete
    if summary["class_names"] != store.manifest["class_names"]:
        raise RichKDError(f"{run.path} knows other classes than {store.path}")
    model = load_student(run, weights).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    normalize = Normalize(tuple(summary["mean"]), tuple(summary["std"]), device)
    return Student(run, model, normalize, device, half_precision(settings.precision, device))


def find_corruptions(
    test: Split, dataset: str, data_root: str, make: bool, folder: str | None, seed: int
) -> Corruptions | None:
    """The published files in the folder that is named; or, if corruptions are asked for at all,
    those beside the data set's own files, else corruptions made here."""
    beside = Path(data_root) / PUBLISHED.get(dataset, "-")
    if folder is None and make and beside.is_dir():
        folder = str(beside)
    if folder is not None:
        return PublishedCorruptions(Path(folder), test.labels)
    return MadeCorruptions(test.images, seed) if make else None


def load_shift(folder: Path, store: TeacherCache) -> tuple[Split, list[int]]:
    """Other images of the same classes: a folder a class, by its name.

    Returns:
        The images, their labels among the store's classes, and which classes there are.

    Raises:
        RichKDError: no folder, or one in it that is no class of the store.
    """
    if not folder.is_dir():
        raise RichKDError(f"no folder {folder}; it should hold a folder of images a class")
    names = store.manifest["class_names"]
    number = {plain(name): place for place, name in enumerate(names)}
    found, split = class_folders(folder, store.manifest["image_size"])
    strange = [name for name in found if plain(name) not in number]
    if strange:
        raise RichKDError(
            f"{folder / strange[0]}: no class of {store.path} has this name "
            f"({nearest(plain(strange[0]), number)}), nor have {len(strange) - 1} more of "
            f"{len(found)}; name the folders as the classes"
        )
    classes = torch.tensor([number[plain(name)] for name in found])
    return Split(split.images, classes[split.labels]), sorted(set(classes.tolist()))


def plain(name: str) -> str:
    """A class name without what folders write differently."""
    return " ".join(name.replace("_", " ").split()).casefold()


# --- robustness ----------------------------------------------------------------------------------


def under_corruptions(
    parts: list[dict[str, Any]],
    students: Sequence[Student],
    corruptions: Corruptions,
    tested: Tensor,
    labels: Tensor,
    device: torch.device,
    report: Report,
) -> None:
    """Add each student's accuracies by corruption and severity; images are made once for all."""
    top1: list[dict[str, list[float]]] = [{name: [] for name in NAMES} for _ in students]
    total = len(NAMES) * SEVERITIES * len(tested)
    with report.track("corruptions", total, "images") as tick:
        for name, _, batches in corruptions.cells(tested, device):
            images = list(batches)
            for own, student in zip(top1, students, strict=True):
                own[name].append(accuracy(student.logits(iter(images)), labels, 1))
            tick(len(tested))
    for part, own in zip(parts, top1, strict=True):
        mce, relative = relative_errors(own, part["top1"], top1[0], parts[0]["top1"])
        part["corruptions"] = {
            "source": corruptions.about,
            "top1": own,
            "mean_error": mean_corruption_error(own),
            "mce": mce,
            "relative_mce": relative,
        }


def under_shift(
    parts: list[dict[str, Any]],
    students: Sequence[Student],
    split: Split,
    classes: list[int],
    names: Sequence[str],
    device: torch.device,
    threshold: float,
    report: Report,
) -> None:
    """Add each student's scores on other images; of classes that they lack, nobody guesses one."""
    images = make_inputs(split.images, device)
    views = views_tensor(split.view_space.clean(len(split)))
    kept = torch.tensor(classes)
    place = torch.full((len(names),), -1)
    place[kept] = torch.arange(len(kept))
    with report.track("shift", len(students) * len(split), "images") as tick:
        for part, student in zip(parts, students, strict=True):
            batches = images.batches(torch.arange(len(split)), views, EVAL_BATCH)
            logits = student.logits(batches)[:, kept]
            scores = metrics.score(logits, place[split.labels], threshold)
            part["shift"] = {"samples": len(split), "classes": len(kept), **scores}
            tick(len(split))


# --- comparison ----------------------------------------------------------------------------------


def add_differences(parts: list[dict[str, Any]], logits: list[Tensor], labels: Tensor) -> None:
    """Add to each run but the first the difference of its top-1, paired by test image."""
    right = [(own.argmax(1) == labels).double() for own in logits]
    for part, own in zip(parts, right, strict=True):
        difference = None if own is right[0] else paired_difference((own - right[0]).tolist())
        part["minus_first"] = difference and finite(difference)


def finite(difference: Difference) -> dict[str, float | int | None]:
    """A difference as JSON has it: without infinities."""
    known = difference.n > 1
    return {**asdict(difference), "low": difference.low if known else None,
            "high": difference.high if known else None}  # fmt: skip


# --- what reports show of it ---------------------------------------------------------------------


class Scores(TypedDict):
    """What a report reads of an evaluation."""

    weights: str
    samples: int
    ece: float


class Robustness(TypedDict):
    """And of its corruptions, where it has them."""

    source: str
    mean_error: float


def read_evaluation(folder: Path) -> tuple[Scores, Robustness | None] | None:
    """What an earlier evaluation of a run's last weights found; None where there is none.

    Raises:
        RichKDError: the file is damaged.
    """
    path = folder / EVALUATION
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        robustness = found.get("corruptions")
        fault = misfit(found, Scores) or misfit(robustness, Robustness | None, "corruptions")
    except (OSError, ValueError, AttributeError) as error:
        fault = str(error)
    if fault:
        raise RichKDError(f"{path} is damaged ({fault}); run richkd evaluate again, or remove it")
    return (found, robustness) if found["weights"] == "last" else None
