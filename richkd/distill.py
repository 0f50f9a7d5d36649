"""Stage two: train a student from a store, one slab an epoch. No teacher is ever loaded here.

What runs may share (`Source`: store, images, slabs, targets) is apart from what is a run's own
(`StudentRun`: student, method, optimizer, run folder). `distill` has one run, a sweep has many.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from richkd.data import catalog
from richkd.data.datasets import Split, load_again
from richkd.data.framing import NetworkInput
from richkd.data.inputs import Normalize, make_inputs
from richkd.data.views import views_tensor
from richkd.errors import RichKDError
from richkd.files import held
from richkd.losses import Widths, method_class, method_options
from richkd.losses.method import TARGET, Method
from richkd.models import check_fit, check_trainable, create_model
from richkd.progress import Advance, Report, percent
from richkd.recipe import Distill, check_resume, to_table
from richkd.results import teacher_accuracies
from richkd.store import pages
from richkd.store.reader import SLAB_ARRAYS, TeacherCache, open_cache
from richkd.store.schema import student_input, teacher_input
from richkd.store.topk import Rows
from richkd.targets import Target, choice_samples, choose_target, describe_target, held_out
from richkd.training.checkpoint import Best, Progress, RunFolder, Saving
from richkd.training.device import choose_device, cuda, free_memory, hardware, versions
from richkd.training.loop import (
    Data,
    EpochRecord,
    EpochRows,
    EvalSet,
    Trainer,
    all_rows,
    derive_seed,
    timed,
)
from richkd.training.precision import advice, is_open, time_precisions

# Methods whose settings are others than those of runs whose recipes name no hold-out.
CHANGED = frozenset({"dist", "mlkd", "mlkd-ls"})


def distill(
    settings: Distill,
    *,
    resume: bool = False,
    overwrite: bool = False,
    report: Report | None = None,
) -> dict[str, Any]:
    """Train one student to the end and write its run folder.

    A run that was interrupted is resumed, and one that is complete is left as it is.

    Args:
        settings: store, student, method and training.
        resume: changes nothing, for resuming is the default; it contradicts `overwrite`.
        overwrite: begin anew where there is a run. Files of others in its folder stay.
        report: where progress goes.

    Returns:
        The run's summary, which is also in its summary.json. Accuracies are in 0..1.

    Raises:
        RichKDError: anything the user can mend; found before training starts, unless the
            student diverges.
    """
    check_resume(resume, overwrite)
    report = report or Report(quiet=True)
    source = Source(settings, report)
    if not overwrite and (summary := completed(settings, source.cache, report)):
        return summary
    with StudentRun(source, settings, overwrite=overwrite) as run:
        report.say(run.opening())
        say_few_views([run.settings], source.cache, report)
        say_precision(run, report)
        with report.track("distill", run.images_to_go, "images") as tick:
            for rows, waited in source.epochs(run.rows.values(), run.done + 1, run.settings.epochs):
                record = run.train_epoch(rows, waited, tick)
                report.say(epoch_line(record, run.settings.epochs))
        return run.finish()


class Source:
    """A store and what all runs from it share: images, slabs and targets, each once.

    Runs whose settings differ in `cache`, `dataset`, `data_root` or `device` have sources of
    their own.
    """

    def __init__(
        self, settings: Distill, report: Report, cache: TeacherCache | None = None
    ) -> None:
        """From the store that the settings name, or that store where it is open already."""
        self.settings = settings
        self.report = report
        self.device = choose_device(settings.device)
        self.cache = cache or open_cache(settings.cache)
        self._targets: dict[str, Target] = {}  # by the name of its rows
        self._on_gpu: dict[str, Rows] = {}  # of the epoch that trains: the same memory in each
        self._chosen: dict[tuple[Any, ...], str] = {}
        self._fixed: dict[str, Rows] = {}

    @cached_property
    def data(self) -> Data:
        """Images and labels of all splits on the device; all test samples are tested on."""
        splits = self.splits
        manifest = self.cache.manifest
        return Data(
            train=make_inputs(splits["train"].images, self.device),
            train_labels=splits["train"].labels.to(self.device),
            test=EvalSet.of(splits["test"], self.device),
            choice=EvalSet.of(splits["validation"], self.device)
            if "validation" in splits
            else None,
            normalize=Normalize(tuple(manifest["mean"]), tuple(manifest["std"]), self.device),
            num_classes=self.cache.num_classes,
        )

    @cached_property
    def splits(self) -> dict[str, Split]:
        """Images and labels of all splits; errors are those of `load_images`."""
        return load_images(self.cache, self.settings, self.report)

    def data_for(self, settings: Distill) -> Data:
        """The same for a run that may hold out test images, to make choices on them."""
        if not settings.holdout:
            return self.data
        test = self.data.test
        split, chosen = choice_samples(self.cache, settings.holdout)
        assert split == "test"
        _, tested = held_out(len(test.labels), settings.holdout)
        return replace(
            self.data,
            test=replace(test, ids=tested.to(self.device)),
            choice=replace(test, ids=chosen.to(self.device)),
        )

    def widths(self, student: int, alpha: float) -> Widths:
        """The sizes that a method depends on, for a student's feature width and a blend."""
        clip = self.cache.manifest["clip"]
        return Widths(
            labels=self.data.train_labels.cpu(),
            student=student,
            teacher=self.cache.manifest["teacher"]["num_features"],
            clip=clip["num_features"] if clip else 0,
            alpha=alpha,
        )

    def target(self, settings: Distill, kind: str) -> tuple[str, Target]:
        """What a run's settings make the target, and the name of its rows; chosen once for all.

        Errors are those of `choose_target`.
        """
        blend = (
            settings.alpha,
            settings.scale,
            settings.prompts,
            settings.clip_head,
            settings.holdout,
        )
        key = (settings.target or kind, *blend)
        if key not in self._chosen:
            target = choose_target(self.cache, settings, kind, self.report)
            self._chosen[key] = f"{TARGET}/{len(self._chosen)}"
            self._targets[self._chosen[key]] = target
        return self._chosen[key], self._targets[self._chosen[key]]

    def trainer(
        self, settings: Distill, say: Callable[[str], None] = lambda _: None
    ) -> tuple[Trainer, dict[str, str], Target | None]:
        """A new student with its method, as a run's settings ask for.

        Args:
            settings: resolved by `with_defaults`.
            say: is told how its steps are run.

        Returns:
            The trainer, the names of `epochs` by those of what its method reads, and the target.
        """
        method_type, options = method_of(settings)
        reads = method_type.reads(options)
        data = self.data_for(settings)
        rows = {name: name for name in reads}
        target: Target | None = None
        if TARGET in reads or "clip_features" in reads:
            name, target = self.target(settings, method_type.target)
            rows |= {TARGET: name} if TARGET in reads else {}
        model, num_features = build_student(settings, self.cache)
        alpha = 1.0 if target is None else target.alpha
        method = method_type(options, self.widths(num_features, alpha))
        return Trainer(model, method, data, settings, self.device, say), rows, target

    def own(self, shared: EpochRows, rows: Mapping[str, str], seed: int, epoch: int) -> EpochRows:
        """What a run's method reads of an epoch's rows.

        A method that reads none is not held to the views that were cached: it sees a fresh view of
        every image, as plain training does, whatever the store has.

        Args:
            shared: of all runs.
            rows: their names by those of the method, as `trainer` gave them.
            seed: the run's.
            epoch: from 1.
        """
        if not rows:
            space = self.splits["train"].view_space
            return EpochRows(views_tensor(space.fresh(seed, epoch, self.cache.num_samples)), {})
        return replace(shared, rows={name: shared.rows[given] for name, given in rows.items()})

    def epochs(
        self, names: Collection[str], first: int, last: int
    ) -> Iterator[tuple[EpochRows, float]]:
        """Views and named rows of epochs first..last, and the seconds spent waiting for them.

        On a GPU, rows of an epoch take the place of those of the epoch before. A thread reads an
        epoch's slab while the epoch before trains. Names are arrays of the store
        (`teacher_features`) and what `target` gave.
        """
        fixed_names = {name for name in names if self._is_fixed(name)}
        place = self._place(sorted({*names} - fixed_names), sorted(fixed_names))
        fixed = {name: self._fixed_rows(name, place) for name in sorted(fixed_names)}
        slab_rows = self._slab_rows(sorted({*names} - fixed_names), place)
        for slab, waited in timed(all_rows(slab_rows, first, last)):
            source = slab.to(self.device, self._on_gpu) if cuda(self.device) else slab
            yield replace(source, rows={**source.rows, **fixed}), waited

    def _is_fixed(self, name: str) -> bool:
        """Whether rows are the same in every epoch: those of CLIP, which saw the clean images."""
        target = self._targets.get(name)
        return not target.reads if target else name not in SLAB_ARRAYS

    def _place(self, slab: Collection[str], fixed: Collection[str]) -> Placement:
        """Where rows lie: the one choice between memory, disk and device.

        Slabs lie on the disk where two of them would take more than half of the memory that is
        available. Rows go to a GPU as a whole, but not from the disk, nor where those of an epoch
        would take more than half of what is free on it.
        """
        on_disk = pages.beyond_memory(self._nbytes(slab))
        if self.device.type != "cuda":
            return Placement(on_disk, on_host=False)
        too_much = 2 * self._nbytes([*slab, *fixed]) > free_memory(self.device)
        return Placement(on_disk, on_host=on_disk or too_much)

    def _nbytes(self, names: Collection[str]) -> int:
        """Bytes of the rows of an epoch, with those that blends are computed from."""
        arrays = {name for name in names if name not in self._targets}
        targets = [self._targets[name] for name in names if name in self._targets]
        arrays |= {array for target in targets for array in target.reads}
        blends = sum(bool(target.clip) for target in targets)
        return self.cache.nbytes([f"train/{array}" for array in arrays]) + (
            4 * blends * self.cache.num_samples * self.cache.num_classes
        )

    def _fixed_rows(self, name: str, place: Placement) -> Rows:
        if name not in self._fixed:
            target = self._targets.get(name)
            self._fixed[name] = (
                target.logits("train", {}, place.empty)
                if target
                else self.cache.read(f"train/{name}")
            )
        device = torch.device("cpu") if place.on_host else self.device
        self._fixed[name] = self._fixed[name].to(device)
        return self._fixed[name]

    def _slab_rows(self, names: Collection[str], place: Placement) -> Callable[[int], EpochRows]:
        """What reads the rows of an epoch, from 1: view (epoch − 1) mod V.

        Blended logits are rounded as stage one would have stored them; those that the store keeps
        by their K largest stay so.
        """
        targets = {name: self._targets[name] for name in names if name in self._targets}
        features = {name for name in names if name not in targets}
        logits = {array for target in targets.values() for array in target.reads}
        empty = partial(place.empty, dtype=self.cache.manifest["dtype"])
        pin = self.device.type == "cuda" and not place.on_host

        @lru_cache(maxsize=1)  # with one view, every epoch is the same slab
        def read(view: int) -> EpochRows:
            slab = self.cache.slab(view, sorted(features), place.on_disk)
            stored = {
                name: self.cache.rows(f"train/{name}", view, place.on_disk)
                for name in sorted(logits)
            }
            rows: dict[str, Rows] = {name: getattr(slab, name) for name in features}
            for name, target in targets.items():
                rows[name] = target.logits("train", stored, empty)
            epoch_rows = EpochRows(slab.views, rows, place.on_host)
            return epoch_rows.pinned() if pin else epoch_rows

        return lambda epoch: read((epoch - 1) % self.cache.num_views)


@dataclass(frozen=True)
class Placement:
    """Where the rows of an epoch lie."""

    on_disk: bool  # in a temporary file that is mapped into memory
    on_host: bool  # and not on the device: every batch is gathered and sent there

    def empty(self, shape: tuple[int, ...], dtype: str = "float32") -> Tensor:
        """Rows to be filled."""
        return torch.from_numpy(pages.empty(shape, np.dtype(dtype), self.on_disk))


class StudentRun:
    """One student on its way: its method, trainer and run folder, and how far it is.

    A context manager; the run folder is this process's until it ends.
    """

    def __init__(self, source: Source, settings: Distill, *, overwrite: bool = False) -> None:
        """Everything that can be refused is, before the run folder is touched.

        A run in the folder is resumed unless `overwrite` says to begin anew.

        Raises:
            RichKDError: anything the user can mend.
        """
        cache = source.cache
        self.source = source
        self.settings = settings = with_defaults(settings, cache)
        check_reads(cache, settings)
        self.folder = RunFolder(Path(settings.out))
        if not overwrite:
            check_version(self.folder, settings)
        recorded = to_table(settings), identity(cache)
        self.folder.check(*recorded, overwrite=overwrite)
        self.trainer, self.rows, self.target = source.trainer(settings, self._say)
        with ExitStack() as stack:
            stack.enter_context(held(self.folder.path))
            resumed = self.folder.begin(*recorded, overwrite=overwrite)
            self.progress = self._resume() if resumed else Progress()
            self._held = stack.pop_all()
        self._saving = Saving(beside=cuda(source.device))
        self.record: EpochRecord | None = None  # of the last epoch trained here
        self._before = self.progress  # what was done when this process began

    def __enter__(self) -> StudentRun:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                self.wait()
        finally:
            self.close()

    def wait(self) -> None:
        """Until the last checkpoint is written; raises what writing raised."""
        self._saving.wait()

    def close(self) -> None:
        """Give the run folder free, and what the student takes of a GPU."""
        self._saving.close()
        self._held.close()
        self.trainer.release()

    def _resume(self) -> Progress:
        """Load the run's checkpoint."""
        progress, tensors = self.folder.load(self.source.report.say)
        self.trainer.resume(tensors, self.folder.path, progress.step)
        return progress

    def _say(self, message: str) -> None:
        self.source.report.say(f"{self.folder.path.name}: {message}")

    @property
    def done(self) -> int:
        """Epochs."""
        return self.progress.epoch

    @property
    def epoch_s(self) -> float:
        """Seconds an epoch that was trained here, with its tests and its checkpoint."""
        return (self.progress.seconds - self._before.seconds) / (self.done - self._before.epoch)

    @property
    def images_to_go(self) -> int:
        """How many will have been trained on at the end."""
        return (self.settings.epochs - self.done) * self.source.cache.num_samples

    def train_epoch(
        self, source: EpochRows, waited: float, tick: Advance = lambda _: None
    ) -> EpochRecord:
        """The next epoch, with its checkpoint; `source` has the rows that `self.rows` names.

        Raises:
            RichKDError: the student diverged.
        """
        start = time.perf_counter()
        for count in self.steps(source):
            tick(count)
        return self.end_epoch(waited, start)

    def steps(self, source: EpochRows) -> Iterator[int]:
        """The steps of the next epoch; yields the size of each batch once its step is launched."""
        epoch = self.done + 1
        own = self.source.own(source, self.rows, self.settings.seed, epoch)
        return self.trainer.steps(epoch, own)

    def end_epoch(self, waited: float, start: float, runs: int = 1) -> EpochRecord:
        """The end of an epoch whose steps were launched, with its checkpoint.

        Args:
            waited: seconds for its rows.
            start: when it began, by time.perf_counter.
            runs: that trained side by side, between which the seconds are shared.

        Raises:
            RichKDError: the student diverged.
        """
        epoch = self.done + 1
        record = self.trainer.end_epoch()
        check_finite(record, self.settings)
        best, before = self.progress.best, self.progress.seconds
        step = self.trainer.ran_by
        if record.score is not None and record.score > best.accuracy:
            best = Best(epoch, record.score)
        progress = Progress(
            epoch, best, before + waited + (time.perf_counter() - start) / runs, step
        )
        state = self._saving.tensors(self.trainer.state())
        prefix = "student."
        student = {
            name.removeprefix(prefix): tensor
            for name, tensor in state.items()
            if name.startswith(prefix)
        }
        line = {**record.as_dict(), "slab_wait_s": waited}
        self._saving.submit(partial(self.folder.save_epoch, progress, line, state, student))
        # here with the time that its checkpoint took
        seconds = before + waited + (time.perf_counter() - start) / runs
        self.progress = Progress(epoch, best, seconds, step)
        self.record = record
        return record

    def finish(self) -> dict[str, Any]:
        """After the last epoch: weights and summary, with which the run is complete."""
        self._saving.wait()
        data = self.trainer.data
        if self.record is None:  # interrupted between the last epoch and the summary
            top1, top5 = self.trainer.evaluate(data.test)
        else:
            assert self.record.test_accuracy is not None and self.record.test_top5 is not None
            top1, top5 = self.record.test_accuracy, self.record.test_top5
        found = self.progress.best
        best = found.accuracy if data.choice is None else self.test_best(top1)
        last = self.folder.metrics()[-1:]  # none where somebody removed them
        tested = data.test.ids.cpu()
        summary = {
            **describe_run(self.settings, self.source.cache, self.trainer),
            "target": self.target and describe_target(self.target, self.source.cache, tested),
            "top1_last": top1,
            "top5_last": top5,
            "top1_best": best,
            "epoch_best": found.epoch,
            "best_chosen_on": choice_images(self.source.cache, self.settings),
            "choice_accuracy": None if data.choice is None else found.accuracy,
            "tested": len(tested),
            "views": self.source.cache.num_views if self.rows else "fresh",
            "seconds": self.progress.seconds,
            "images_per_second": last[0]["images_per_second"] if last else None,
            "run": str(self.folder.path),
        }
        self.folder.finish(self.trainer.model.state_dict(), summary)
        return summary

    def test_best(self, last: float) -> float:
        """Top-1 on the test images after the best epoch, which other images chose."""
        if self.progress.best.epoch == self.settings.epochs:
            return last
        model, state = self.trainer.model, self.trainer.model.state_dict()
        kept = {name: value.clone() for name, value in state.items()}
        model.load_state_dict(self.folder.best_weights())
        top1, _ = self.trainer.evaluate(self.trainer.data.test)
        model.load_state_dict(kept)
        return top1

    def opening(self) -> str:
        """The lines that say what is about to run."""
        settings, cache = self.settings, self.source.cache
        count = sum(parameter.numel() for parameter in self.trainer.model.parameters())
        resuming = f"; resuming after epoch {self.done} of {settings.epochs}" if self.done else ""
        return (
            f"{settings.student} ({count / 1e6:.2f} M) by {settings.method} from "
            f"{f'{cache.num_views} views' if self.rows else 'fresh views'}, seed {settings.seed}, "
            f"on {self.source.device}\n"
            f"{settings.epochs} epochs of {cache.num_samples:,} images, batch "
            f"{settings.batch_size}, lr {settings.lr}{resuming}"
        )


def completed(settings: Distill, cache: TeacherCache, report: Report) -> dict[str, Any] | None:
    """The summary of the run that the settings name, where it is complete.

    Raises:
        RichKDError: a complete run of other settings, or on another store, is in its place.
    """
    settings = with_defaults(settings, cache)
    run = RunFolder(Path(settings.out))
    if not run.complete:
        return None
    check_version(run, settings)
    run.check(to_table(settings), identity(cache), overwrite=False)
    run.tidy()
    report.say(f"{run.path} is complete already; --overwrite begins it anew")
    return run.summary()


def method_of(settings: Distill) -> tuple[type[Method], Any]:
    """The class and the options of the method that the settings name; errors of `method_class`."""
    return method_class(settings.method, method_options(settings.options, settings.method))


def with_defaults(settings: Distill, cache: TeacherCache, runs: str = "runs") -> Distill:
    """The student that the data set suggests, its learning rate, and a name, where none were given.

    Args:
        settings: as given.
        cache: the store.
        runs: the folder for a run without a name.
    """
    dataset = cache.manifest["dataset"]["name"]
    student = settings.student or catalog.networks(dataset, cache.manifest["image_size"])[1]
    alpha = "" if settings.alpha is None else f"-a{settings.alpha}"
    name = f"{cache.place.stem}-{student}-{settings.method}{alpha}-s{settings.seed}"
    out = settings.out or str(Path(runs) / name.replace("/", "-"))
    lr = catalog.learning_rate(student) if settings.lr is None else settings.lr
    settings = settings.with_holdout("validation" in cache.splits)
    return replace(settings, student=student, lr=lr, out=out)


def check_reads(cache: TeacherCache, settings: Distill) -> None:
    """Refuse a store without what a method reads, and a target for a method that takes none.

    Raises:
        RichKDError: either of these.
    """
    method_type, options = method_of(settings)
    reads = method_type.reads(options)
    for name in reads:
        if name != TARGET:
            cache.require(f"train/{name}")
    if cache.kept and method_type.needs_whole_rows(options):
        raise RichKDError(
            f"method {settings.method} standardises whole rows of logits, and {cache.place} keeps "
            f"the {cache.manifest['keep']} largest of {cache.num_classes}: choose a method that "
            f"does not, or make the store with --keep all"
        )
    if settings.target and TARGET not in reads:
        raise RichKDError(
            f"target = {settings.target!r}: method {settings.method} takes no target logits; leave "
            f"--target out"
        )


def build_student(settings: Distill, cache: TeacherCache) -> tuple[torch.nn.Module, int]:
    """The student, its weights drawn from the seed, and its feature width."""
    check_trainable(settings.student)
    torch.manual_seed(derive_seed(settings.seed, 0, 2))
    size = cache.manifest["image_size"]
    model = create_model(
        settings.student, cache.num_classes, image_size=size, **settings.student_options
    )
    width = check_fit(model, settings.student, size, cache.num_classes, **settings.student_options)
    return model, width


def load_images(
    cache: TeacherCache, settings: Distill, report: Report | None = None
) -> dict[str, Split]:
    """Images and labels of all splits, from the store or from the data set that it names.

    Raises:
        RichKDError: the data set is gone, has other classes, or changed since stage one.
    """
    entry = cache.manifest["dataset"]
    labels_of = {split: cache.read(f"{split}/labels") for split in cache.splits}
    for split, labels in labels_of.items():
        if len(labels) == 0 or not 0 <= int(labels.min()) <= int(labels.max()) < cache.num_classes:
            raise RichKDError(
                f"{cache.place}: {split}/labels are not in 0..{cache.num_classes - 1}; make the "
                f"store again with richkd precompute --overwrite"
            )
    if entry["embedded"]:
        return {
            split: Split(cache.read(f"{split}/images"), labels)
            for split, labels in labels_of.items()
        }
    dataset = load_again(cache.manifest, settings.dataset, settings.data_root, report)
    photographs = catalog.split_name(dataset.name)[0] == catalog.IMAGE_FOLDER  # named at will
    if len(dataset.class_names) != cache.num_classes or (
        not photographs and list(dataset.class_names) != cache.manifest["class_names"]
    ):
        raise RichKDError(
            f"{cache.place} is for other classes than {dataset.name}: "
            f"{len(cache.manifest['class_names'])} against {len(dataset.class_names)}, or by other "
            f"names; pass the --dataset that it was made from"
        )
    if {*dataset.splits} != {*labels_of} or dataset.fingerprint != entry["fingerprint"]:
        raise RichKDError(
            f"{dataset.name} is not what {cache.place} was made from (its fingerprint differs); "
            f"restore the files, or make the store again with richkd precompute"
        )
    for split, labels in labels_of.items():
        if not torch.equal(dataset.splits[split].labels, labels):
            raise RichKDError(
                f"the labels of {dataset.name} are not those in {cache.place}; make the store "
                f"again with richkd precompute --overwrite"
            )
    return dataset.splits


def identity(cache: TeacherCache) -> str:
    """What a run trains on: the data, the teachers and the views."""
    manifest = cache.manifest
    clip = manifest["clip"]
    parts = [
        manifest["dataset"]["fingerprint"][:16],
        manifest["teacher"]["sha256"][:16],
        clip["sha256"][:16] if clip else "none",
        f"{manifest['views']['count']} views of seed {manifest['views']['seed']}",
        f"alpha {manifest['alpha']} scale {manifest['scale']} {manifest['dtype']}",
    ]
    if (seen := teacher_input(manifest)) != student_input(manifest):
        parts.append(f"the teacher sees {NetworkInput.of(seen)}")
    if "keep" in manifest:
        parts.append(f"top {manifest['keep']} at {manifest['keep_temperature']:g}")
    return ", ".join(parts)


def choice_images(cache: TeacherCache, settings: Distill) -> str:
    """The images that a run's best epoch is chosen on: validation, held-out test, or test."""
    if "validation" in cache.splits:
        return "validation"
    return "held-out test" if settings.holdout else "test"


def check_version(folder: RunFolder, settings: Distill) -> None:
    """Refuse a run that an earlier version of richkd began and trained otherwise.

    Raises:
        RichKDError: the method's settings or its views changed since, or what choices are made on.
    """
    method_type, options = method_of(settings)
    changed = not method_type.reads(options) or settings.method in CHANGED or settings.holdout
    if changed and folder.of_earlier_version:
        raise RichKDError(
            f"the run in {folder.path} was begun by an earlier version of richkd, which trained "
            f"{settings.method} otherwise, or made choices on other images (see the changelog); "
            f"choose another --out, or remove it"
        )


def say_few_views(runs: Collection[Distill], cache: TeacherCache, report: Report) -> None:
    """Say which methods lose accuracy because the store has few views of an image, and how much."""
    said: dict[str, str] = {}
    for settings in runs:
        method_type, options = method_of(settings)
        few = method_type.few_views
        wanted = min(few.enough, settings.epochs)  # more than one an epoch is of no use
        if method_type.reads(options) and cache.num_views < wanted:
            said[settings.method] = (
                f"{settings.method} learns from {cache.num_views} views of each image and wants "
                f"{wanted}: {few.cost(cache.num_views)} (docs/comparisons.md); richkd precompute "
                f"--views {wanted} makes them"
            )
    for message in said.values():
        report.say(message)


def say_precision(run: StudentRun, report: Report) -> None:
    """Say what bfloat16 would save, where a CPU has it and the training is long."""
    trainer, settings = run.trainer, run.settings
    if is_open(settings, trainer.device, run.images_to_go // settings.batch_size):
        batch = min(settings.batch_size, run.source.cache.num_samples)
        side = run.source.cache.manifest["image_size"]
        times = time_precisions(trainer.model, torch.randn(batch, 3, side, side))
        if line := advice({settings.student: times}):
            report.say(line)


def check_finite(record: EpochRecord, settings: Distill) -> None:
    """Stop a student that diverged."""
    if not abs(record.loss) < float("inf"):
        raise RichKDError(
            f"the student diverged: the loss of epoch {record.epoch} is {record.loss}; lower --lr "
            f"(it is {settings.lr}) or the weights of the method's terms (--set)"
        )


def describe_run(settings: Distill, cache: TeacherCache, trainer: Trainer) -> dict[str, Any]:
    """What a summary says besides the results."""
    return {
        "student": settings.student,
        "method": settings.method,
        "seed": settings.seed,
        "epochs": settings.epochs,
        "parameters": sum(parameter.numel() for parameter in trainer.model.parameters()),
        "dataset": cache.manifest["dataset"]["name"],
        "num_classes": cache.num_classes,
        "image_size": cache.manifest["image_size"],
        "mean": cache.manifest["mean"],
        "std": cache.manifest["std"],
        "class_names": cache.manifest["class_names"],
        "teacher": teacher_accuracies(cache.manifest),
        "hardware": hardware(trainer.device),
        "step": trainer.ran,
        "versions": versions(),
    }


def epoch_line(record: EpochRecord, epochs: int) -> str:
    """One epoch in one line."""
    accuracies = {
        "train": record.train_accuracy,
        "validation": record.validation_accuracy,
        "test": record.test_accuracy,
    }
    known = ", ".join(
        f"{name} {percent(value)} %" for name, value in accuracies.items() if value is not None
    )
    return (
        f"epoch {record.epoch}/{epochs}: loss {record.loss:.3f}, {known} "
        f"({record.images_per_second:,.0f} images/s)"
    )
