"""One student in training: its method, trainer and run folder."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from richkd.config import catalog
from richkd.config.settings import Distill, shown_weights, to_table, used_weights
from richkd.core.errors import RichKDError
from richkd.core.files import locked
from richkd.core.progress import Advance, Report, duration, percent, size
from richkd.core.ranks import Ranks
from richkd.core.versions import versions
from richkd.data.reuse import buffer_bytes
from richkd.losses.method import EVERY, TARGET
from richkd.store.added import array_of
from richkd.store.reader import TeacherCache
from richkd.store.schema import left_out, student_input, teacher_accuracies
from richkd.training.checkpoint import Best, Progress, Saving
from richkd.training.data import EpochRows
from richkd.training.device import cuda, hardware
from richkd.training.identity import RunIdentity
from richkd.training.initial import Initial
from richkd.training.loop import EpochRecord, Trainer, describe_training
from richkd.training.optimizers import check_optimizer
from richkd.training.precision import advice, is_open, time_precisions
from richkd.training.run_folder import RECIPE, RunFolder
from richkd.training.source import Source, initial_of, method_of
from richkd.training.targets import describe_target, resolve_weights, run_identity

# Methods that changed since recipes began to record the hold-out.
CHANGED = frozenset({"dist", "mlkd", "mlkd-ls"})


class StudentRun:
    """A student in training: its method, trainer, run folder and progress.

    A context manager, which holds the lock of the run folder.
    """

    def __init__(self, source: Source, settings: Distill, *, overwrite: bool = False) -> None:
        """Check everything before the run folder is touched, then start or resume the run.

        Args:
            source: what runs of this cache share.
            settings: of the run.
            overwrite: start over if there is a run in the folder.

        Raises:
            RichKDError: anything the user can fix.
        """
        self.source = source
        ranks = source.ranks
        self.settings = settings = ranks.after_first(lambda: checked(settings, source.cache))
        self.folder = RunFolder(Path(settings.out))
        initial = initial_of(settings, source.cache)
        recorded = ranks.from_first(lambda: self._check(initial, overwrite))
        self.trainer, self.rows, self.target = ranks.after_first(
            lambda: source.trainer(settings, self._log)
        )
        ranks.wait()  # nothing is written unless all of them can train
        with ExitStack() as stack:
            self.progress = ranks.from_first(
                lambda: self._begin(stack, recorded, initial, overwrite)
            )
            self._lock = stack.pop_all()
        self.trainer.share()
        self._saving = Saving(threaded=cuda(source.device))
        self.record: EpochRecord | None = None  # of the last epoch that this process trained
        self._before = self.progress  # when this process started
        self._decodes = not self.trainer.data.train.gathers
        self._rows_waited = self._images_waited = 0.0  # seconds, up to the last epoch
        self._last_waits = 0.0, 0.0  # of the last epoch, for rows and images

    def __enter__(self) -> StudentRun:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                self.wait()
        finally:
            self.close()

    def wait(self) -> None:
        """Wait until the last checkpoint is written; raise what writing raised."""
        self._saving.wait()

    def close(self) -> None:
        """Unlock the run folder, and free the GPU memory of the student."""
        self._saving.close()
        self._lock.close()
        self.trainer.release()

    def _check(
        self, initial: Initial | None, overwrite: bool
    ) -> tuple[dict[str, Any], RunIdentity]:
        """Check the run folder, and return what its recipe.toml records."""
        if not overwrite:
            check_version(self.folder, self.settings)
        folder = None if overwrite else self.folder
        recorded = record(self.settings, self.source.cache, folder, initial)
        self.folder.check(*recorded, overwrite=overwrite)
        return recorded

    def _begin(
        self,
        stack: ExitStack,
        recorded: tuple[dict[str, Any], RunIdentity],
        initial: Initial | None,
        overwrite: bool,
    ) -> Progress:
        """Lock the run folder, and start or resume the run in it."""
        stack.enter_context(locked(self.folder.path))
        if self.folder.begin(*recorded, overwrite=overwrite):
            return self._resume()
        if initial is not None:
            self.trainer.start_from(initial)
        return Progress()

    def _resume(self) -> Progress:
        """Load the run's checkpoint."""
        progress, tensors = self.folder.load(self.source.report.log)
        self.trainer.resume(tensors, self.folder.path, progress.step)
        return progress

    def _log(self, message: str) -> None:
        self.source.report.log(f"{self.folder.path.name}: {message}")

    @property
    def done(self) -> int:
        """Epochs that are done."""
        return self.progress.epoch

    @property
    def epoch_s(self) -> float:
        """Seconds per epoch in this process, with tests and checkpoints."""
        return (self.progress.seconds - self._before.seconds) / (self.done - self._before.epoch)

    @property
    def images_to_go(self) -> int:
        """Images that are left to train on."""
        return (self.settings.epochs - self.done) * self.source.entries

    def waits(self) -> str:
        """Return how long this process has waited for rows and images; "" if none are decoded."""
        return describe_waits(self._rows_waited, self.trainer.waited) if self._decodes else ""

    @property
    def epoch_waits(self) -> str:
        """The same of the last epoch."""
        return describe_waits(*self._last_waits) if self._decodes else ""

    def train_epoch(
        self, source: EpochRows, waited: float, tick: Advance = lambda _: None
    ) -> EpochRecord:
        """Train the next epoch and save a checkpoint; `source` has the rows that `self.rows` names.

        Raises:
            RichKDError: the student diverged.
        """
        start = time.perf_counter()
        for count in self.steps(source):
            tick(count)
        return self.end_epoch(waited, start)

    def steps(self, source: EpochRows) -> Iterator[int]:
        """Run the steps of the next epoch; yield each batch's size once its step is launched."""
        epoch = self.done + 1
        own = self.source.own(source, self.rows, self.settings.seed, epoch)
        return self.trainer.steps(epoch, own)

    def end_epoch(self, waited: float, start: float, runs: int = 1) -> EpochRecord:
        """End an epoch whose steps were launched: evaluate, and save a checkpoint.

        Args:
            waited: seconds spent waiting for its rows.
            start: its start, by time.perf_counter.
            runs: how many trained side by side and share the seconds.

        Raises:
            RichKDError: the student diverged, or it was trained on damaged pixels.
        """
        epoch = self.done + 1
        ranks = self.source.ranks
        self.source.check_pixels()  # before anything of the first epoch is saved
        record = self.trainer.end_epoch()
        ranks.from_first(lambda: check_finite(record, self.settings))
        best, before = self.progress.best, self.progress.seconds
        step = self.trainer.ran_by
        shared = tuple(sorted({*self.progress.ranks, ranks.world}))
        if record.score is not None and record.score > best.accuracy:
            best = Best(epoch, record.score)
        progress = Progress(
            epoch, best, before + waited + (time.perf_counter() - start) / runs, step, shared
        )
        if ranks.first:
            self._save(progress, record, waited)
        # with the time that saving took
        seconds = before + waited + (time.perf_counter() - start) / runs
        self.progress = Progress(epoch, best, seconds, step, shared)
        self.record = record
        return record

    def _save(self, progress: Progress, record: EpochRecord, waited: float) -> None:
        """Save a checkpoint and the metrics of an epoch."""
        state = self._saving.tensors(self.trainer.state())
        prefix = self.trainer.prefix
        student = {
            name.removeprefix(prefix): tensor
            for name, tensor in state.items()
            if name.startswith(prefix)
        }
        line = {**record.as_dict(), **self._count_waits(waited)}
        self._saving.submit(partial(self.folder.save_epoch, progress, line, state, student))

    def _count_waits(self, rows: float) -> dict[str, float]:
        """Return an epoch's seconds of waiting for the line of metrics.jsonl, and add them up."""
        images = self.trainer.waited - self._images_waited
        self._rows_waited += rows
        self._images_waited = self.trainer.waited
        self._last_waits = rows, images
        return {"slab_wait_s": rows, **({"image_wait_s": images} if self._decodes else {})}

    def finish(self) -> dict[str, Any]:
        """Write the weights and the summary after the last epoch; the run is then complete."""
        self._saving.wait()
        data = self.trainer.data
        if self.record is None:  # interrupted between the last epoch and the summary
            top1, top5 = self.trainer.evaluate(data.test)
        else:
            assert self.record.test_accuracy is not None and self.record.test_top5 is not None
            top1, top5 = self.record.test_accuracy, self.record.test_top5
        found = self.progress.best
        best = found.accuracy if data.choice is None else self.test_best(top1)
        return self.source.ranks.from_first(lambda: self._write_summary(top1, top5, best))

    def _write_summary(self, top1: float, top5: float, best: float) -> dict[str, Any]:
        """Write the weights and the summary, given accuracies on the test images."""
        data, found = self.trainer.data, self.progress.best
        lines = self.folder.metrics()  # empty if somebody removed them
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
            "added": run_identity(self.source.cache, self.settings).added,
            "seconds": self.progress.seconds,
            "images_per_second": lines[-1]["images_per_second"] if lines else None,
            "run": str(self.folder.path),
        }
        if self._decodes:
            summary |= {
                name: sum(line.get(name, 0.0) for line in lines)
                for name in ("slab_wait_s", "image_wait_s")
            }
        if max(self.progress.ranks) > 1:
            summary["ranks"] = list(self.progress.ranks)
        self.folder.finish(self.trainer.result.state_dict(), summary)
        return summary

    def test_best(self, last: float) -> float:
        """Return top-1 on the test images after the best epoch; `last` is the last epoch's."""
        if self.progress.best.epoch == self.settings.epochs:
            return last
        model = self.trainer.result
        state = model.state_dict()
        kept = {name: value.clone() for name, value in state.items()}
        self.source.ranks.from_first(
            lambda: model.load_state_dict(self.folder.best_weights()) and None
        )
        self.trainer.share()
        top1, _ = self.trainer.evaluate(self.trainer.data.test)
        model.load_state_dict(kept)
        return top1

    def opening(self) -> str:
        """Describe the run that is about to start."""
        settings, cache, entries = self.settings, self.source.cache, self.source.entries
        count = sum(parameter.numel() for parameter in self.trainer.model.parameters())
        resuming = f"; resuming after epoch {self.done} of {settings.epochs}" if self.done else ""
        return (
            f"{settings.student} ({count / 1e6:.2f} M) by {settings.method} from "
            f"{f'{cache.num_views} views' if self.rows else 'fresh views'}, seed {settings.seed}, "
            f"on {self.source.device}{describe_ranks(self.source.ranks, settings)}\n"
            f"{settings.epochs} epochs of {entries:,} images, batch "
            f"{settings.batch_size}, {describe_training(settings, entries)}{resuming}"
            f"{describe_mixing(cache)}{self._reuse()}"
        )

    def _reuse(self) -> str:
        """Return a further line on several views of one decode; "" if there is one."""
        each, count = self.settings.crops_per_decode, self.source.cache.num_samples
        if each == 1:
            return ""
        height, width, channels = self.trainer.data.train.shape
        waiting = buffer_bytes(
            count // each, each, self.settings.batch_size, height * width * channels
        )
        rest = count % each
        left = f"; {rest} of {count:,} are left out in turn" if rest else ""
        if short := self.settings.epochs % each:
            left += f"; the last {short} of {self.settings.epochs} epochs show only some images"
        return (
            f"\neach image is decoded every {each} epochs, for {each} views; up to "
            f"{size(waiting)} of them wait in memory{left}"
        )


def checked(settings: Distill, cache: TeacherCache) -> Distill:
    """Fill in the defaults, and check that the cache has what the run reads; raise as these."""
    settings = with_defaults(settings, cache)
    check_reads(cache, settings)
    return settings


def completed(settings: Distill, cache: TeacherCache, report: Report) -> dict[str, Any] | None:
    """Return the summary of the run that the settings name, or None if it is not complete.

    Raises:
        RichKDError: the run is complete, but has other settings or another cache.
    """
    settings = with_defaults(settings, cache)
    run = RunFolder(Path(settings.out))
    if not run.complete:
        return None
    check_version(run, settings)
    run.check(*record(settings, cache, run), overwrite=False)
    run.tidy()
    report.log(f"{run.path} is already complete; --overwrite starts over")
    return run.summary()


def record(
    settings: Distill,
    cache: TeacherCache,
    folder: RunFolder | None,
    initial: Initial | None = None,
) -> tuple[dict[str, Any], RunIdentity]:
    """Return what recipe.toml records of a run: its settings, and what it learns from.

    Args:
        settings: resolved by `with_defaults`.
        cache: to train from.
        folder: of the run, which may need its initial weights no more; None if it starts over.
        initial: as `initial_of` returns it.

    Raises:
        RichKDError: the initial weights are needed, and cannot be read.
    """
    initial = initial or initial_of(settings, cache)
    recorded = None if folder is None else folder.initial()
    digest = None if initial is None else initial.digest(recorded)
    return to_table(settings), replace(run_identity(cache, settings), initial=digest)


def with_defaults(settings: Distill, cache: TeacherCache, runs: str = "runs") -> Distill:
    """Fill in the student that the dataset suggests, its learning rate and a run folder.

    Args:
        settings: as given.
        cache: to train from.
        runs: the folder of the run folder, if that has no name.
    """
    dataset = cache.manifest["dataset"]["name"]
    student = settings.student or catalog.networks(dataset, cache.manifest["image_size"])[1]
    alpha = "" if settings.alpha is None else f"-a{settings.alpha}"
    settings = replace(settings, weights=used_weights(settings))
    if settings.weights is not None:
        alpha = f"-w-{shown_weights(settings.weights).replace('=', '').replace(',', '-')}"
    name = f"{cache.location.stem}-{student}-{settings.method}{alpha}-s{settings.seed}"
    out = settings.out or str(Path(runs) / name.replace("/", "-"))
    check_optimizer(settings)
    lr = settings.lr or catalog.learning_rate(student, settings.optimizer)
    settings = settings.with_holdout("validation" in cache.splits)
    return replace(settings, student=student, lr=lr, out=out)


def check_every_teacher(cache: TeacherCache, settings: Distill, runs: str = "runs") -> None:
    """Check that weights name every teacher of a cache, unless they are those of an earlier run.

    Raises:
        RichKDError: a teacher of the cache has no weight, not even 0.
    """
    given = settings.weights
    missing = [name for name in cache.teachers if given != "auto" and name not in (given or {})]
    if given is None or not missing:
        return
    if Path(with_defaults(settings, cache, runs).out, RECIPE).exists():
        return  # a teacher was added since
    raise RichKDError(
        f"weights {shown_weights(given)}: {cache.location} also has the teacher {missing[0]}; "
        f"give it a weight, or {missing[0]}=0 to leave it out",
        code="weights-incomplete",
    )


def check_reads(cache: TeacherCache, settings: Distill) -> None:
    """Check that the cache has what a method reads, and that it takes the target.

    Raises:
        RichKDError: one of them does not hold.
    """
    method_type, options = method_of(settings)
    reads = method_type.reads(options)
    check_reuse(cache, settings)
    check_blend_of(cache, settings)
    check_kept(settings, cache.manifest.get("rows"), str(cache.location))
    if cache.kept and method_type.needs_whole_rows(options):
        raise RichKDError(
            f"method {settings.method} standardises whole rows of logits, but {cache.location} "
            f"keeps the {cache.manifest['keep']} largest of {cache.num_classes}; choose another "
            f"method, or make the cache with --keep all",
            code="method-needs-whole-rows",
        )
    if method_type.needs_one_label and cache.augment is not None and cache.augment.mixes:
        raise RichKDError(
            f"method {settings.method} needs the one class of an image, but {cache.location} has "
            f"mixed images (augment {cache.augment.text}); choose another method, e.g. kd, or make "
            f"the cache without {cache.augment.parts[-1]}",
            code="method-needs-one-label",
        )
    if settings.target and TARGET not in reads:
        raise RichKDError(
            f"target = {settings.target!r}: method {settings.method} takes no target logits; "
            f"remove --target",
            code="target-not-taken",
        )


def check_reuse(cache: TeacherCache, settings: Distill) -> None:
    """Check that a cache has images to decode, and enough views and images to reuse a decode.

    Raises:
        RichKDError: it has not.
    """
    each = settings.crops_per_decode
    if each == 1:
        return
    method_type, options = method_of(settings)
    if cache.manifest["dataset"]["embedded"]:
        raise RichKDError(
            f"crops_per_decode = {each}: {cache.location} contains its images, so that nothing is "
            f"decoded; leave out --crops-per-decode",
            code="crops-without-files",
        )
    if method_type.reads(options) and each > cache.num_views:
        raise RichKDError(
            f"crops_per_decode = {each}: {cache.location} has {cache.num_views} views of an image; "
            f"use --crops-per-decode {cache.num_views} or less, or precompute with --views {each}",
            code="crops-beyond-views",
        )
    if each > settings.epochs:
        raise RichKDError(
            f"crops_per_decode = {each}: an epoch shows one in {each} of the images, so that some "
            f"would never be seen in epochs = {settings.epochs}; use --crops-per-decode "
            f"{settings.epochs} or less",
            code="crops-beyond-epochs",
        )
    if 2 * each > cache.num_samples:
        raise RichKDError(
            f"crops_per_decode = {each}: {cache.location} has only {cache.num_samples} training "
            f"images, and an epoch shows one in {each}; use fewer",
            code="crops-beyond-images",
        )


def check_blend_of(cache: TeacherCache, settings: Distill) -> None:
    """Check that a cache has the teachers that a run blends, and that its method blends them.

    Raises:
        RichKDError: one of them does not hold.
    """
    method_type, options = method_of(settings)
    reads = method_type.reads(options)
    if settings.weights is not None:
        if not {TARGET, "clip_features"} & {*reads}:
            raise RichKDError(
                f"weights = {shown_weights(settings.weights)}: method {settings.method} takes no "
                f"blend of teachers; remove --weights",
                code="weights-not-taken",
            )
        for name in resolve_weights(cache, settings):
            check_features_of(cache, settings, name)
    elif cache.manifest["clip"] is None and "clip_features" in reads and cache.added:
        raise RichKDError(
            f"method {settings.method} blends teachers, but {cache.location} has no CLIP; name "
            f"those to blend, as in --weights {','.join(f'{n}=1' for n in cache.teachers)}",
            code="weights-needed",
        )
    elif cache.manifest["clip"] is None and "clip_features" in reads:
        cache.require("train/clip_features")
    if EVERY in reads and len(cache.teachers) < 2:
        raise RichKDError(
            f"method {settings.method} needs several teachers, but {cache.location} has one; add "
            f"another with richkd add-teacher",
            code="method-needs-teachers",
        )


def check_features_of(cache: TeacherCache, settings: Distill, name: str) -> None:
    """Raise RichKDError if a run reads features of an added teacher that the cache lacks."""
    method_type, options = method_of(settings)
    if name not in cache.added or "clip_features" not in method_type.reads(options):
        return
    kind = "teacher" if cache.addition(name).manifest["clip"] is None else "clip"
    if not cache.has(array_of("train", f"{name}/{kind}_features")):
        raise RichKDError(
            f"method {settings.method} reads the features of {name}, but {cache.location} keeps "
            f"no such rows; choose a method of logits alone, e.g. richkd-l, or precompute with "
            f"--features all",
            code="method-needs-features",
        )


def check_kept(settings: Distill, rows: Collection[str] | None, cache: str) -> None:
    """Check that a cache keeps the features that a run reads.

    Args:
        settings: of the run.
        rows: those that the cache keeps; None for all.
        cache: its name, for the message.

    Raises:
        RichKDError: it was made without them.
    """
    method_type, options = method_of(settings)
    reads, absent = {*method_type.reads(options)}, left_out(rows, "train")
    if isinstance(settings.weights, dict):  # a teacher of weight 0 is not read
        own = {"cnn": "teacher_features", "clip": "clip_features"}
        reads -= {row for name, row in own.items() if not settings.weights.get(name)}
    for name in sorted(absent.intersection(reads)):
        alone = "richkd-l" if method_type.target == "fused" else "kd"
        raise RichKDError(
            f"method {settings.method} reads {name}, but {cache} keeps no such rows; choose a "
            f"method of logits alone, e.g. {alone}, or precompute with --features all",
            code="method-needs-features",
        )
    blends = TARGET in reads and (settings.target or method_type.target) != "teacher"
    own_clip = settings.clip_head == "probe" or settings.prompts is not None
    if blends and own_clip and "clip_features" in absent:
        given = "clip_head" if settings.clip_head == "probe" else "prompts"
        raise RichKDError(
            f"{given} = {getattr(settings, given)!r} needs clip_features, but {cache} keeps no "
            f"such rows; leave it out, or precompute with --features all",
            code="blend-needs-features",
        )


def choice_images(cache: TeacherCache, settings: Distill) -> str:
    """Return which images a run's best epoch is chosen on: validation, held-out test, or test."""
    if "validation" in cache.splits:
        return "validation"
    return "held-out test" if settings.holdout else "test"


def check_version(folder: RunFolder, settings: Distill) -> None:
    """Check that this version trains a run as the version that started it did.

    Raises:
        RichKDError: the method's settings, its views or the images for choices have changed since.
    """
    method_type, options = method_of(settings)
    changed = not method_type.reads(options) or settings.method in CHANGED or settings.holdout
    if changed and folder.of_earlier_version:
        raise RichKDError(
            f"the run in {folder.path} was started by an earlier version of richkd, which trained "
            f"{settings.method} differently, or made choices on other images (see the changelog); "
            f"choose another --out, or remove the folder",
            code="run-of-earlier-version",
        )


def log_few_views(runs: Collection[Distill], cache: TeacherCache, report: Report) -> None:
    """Log which methods lose accuracy because the cache has few views, and how much."""
    messages: dict[str, str] = {}
    for settings in runs:
        method_type, options = method_of(settings)
        few = method_type.few_views
        wanted = min(few.enough, settings.epochs)  # more than one per epoch are of no use
        if method_type.reads(options) and cache.num_views < wanted:
            messages[settings.method] = (
                f"{settings.method} learns from {cache.num_views} views of each image and wants "
                f"{wanted}: {few.cost(cache.num_views)} (docs/comparisons.md); cache them with "
                f"richkd precompute --views {wanted}"
            )
    for message in messages.values():
        report.log(message)


def describe_precision(run: StudentRun, report: Report) -> None:
    """Log what bfloat16 would save, if a CPU has it and the training is long."""
    trainer, settings = run.trainer, run.settings
    alone = run.source.ranks.world == 1
    if alone and is_open(settings, trainer.device, run.images_to_go // settings.batch_size):
        batch = min(settings.batch_size, run.source.cache.num_samples)
        side = run.source.cache.manifest["image_size"]
        times = time_precisions(trainer.model, torch.randn(batch, 3, side, side))
        if line := advice({settings.student: times}):
            report.log(line)


def describe_ranks(ranks: Ranks, settings: Distill) -> str:
    """Describe how several processes train a student; "" for one."""
    if ranks.world == 1:
        return ""
    norms = {"sync": "spans all of them", "local": "is of each one's samples"}
    return (
        f", in {ranks.world} processes, whose steps are eager and whose batch norm "
        f"{norms[settings.batch_norm]}"
    )


def check_finite(record: EpochRecord, settings: Distill) -> None:
    """Check that the loss of an epoch is finite; raise RichKDError if not."""
    if not abs(record.loss) < float("inf"):
        raise RichKDError(
            f"the student diverged: the loss of epoch {record.epoch} is {record.loss}; lower --lr "
            f"(it is {settings.lr}) or the weights of the method's terms (--set)",
            code="student-diverged",
        )


def describe_run(settings: Distill, cache: TeacherCache, trainer: Trainer) -> dict[str, Any]:
    """Return the entries of a summary other than the results."""
    return {
        "student": settings.student,
        "method": settings.method,
        "seed": settings.seed,
        "epochs": settings.epochs,
        "parameters": sum(parameter.numel() for parameter in trainer.model.parameters()),
        "dataset": cache.manifest["dataset"]["name"],
        "num_classes": cache.num_classes,
        "image_size": cache.manifest["image_size"],
        "mean": list(trainer.data.normalize.mean),
        "std": list(trainer.data.normalize.std),
        "crop": student_input(cache.manifest)["crop"],
        "class_names": cache.manifest["class_names"],
        "teacher": teacher_accuracies(cache.manifest),
        "hardware": hardware(trainer.device),
        "step": trainer.ran,
        "versions": versions(),
    }


def describe_mixing(cache: TeacherCache) -> str:
    """Return a further line on what mixed images mean for a run; "" if the cache has none."""
    if cache.augment is None or not cache.augment.mixes:
        return ""
    return "\nimages are mixed: train accuracy counts the first label of each"


def describe_waits(rows: float, images: float) -> str:
    """Describe the seconds that were spent waiting for rows and for decoded images."""
    return f"waited {duration(rows)} for rows, {duration(images)} for images"


def epoch_line(record: EpochRecord, epochs: int, waits: str = "") -> str:
    """Format one epoch as one line; `waits` as `describe_waits` returns them."""
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
        f"({record.images_per_second:,.0f} images/s{waits and '; '}{waits})"
    )
