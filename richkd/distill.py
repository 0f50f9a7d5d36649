"""Stage two: train a student from a store, one slab an epoch. No teacher is ever loaded here."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from richkd.data import catalog
from richkd.data.datasets import Split, load_dataset
from richkd.data.inputs import Normalize, make_inputs
from richkd.data.views import views_tensor
from richkd.errors import RichKDError
from richkd.losses import Widths, method_class, method_options
from richkd.losses.method import TARGET
from richkd.models import check_fit, create_model
from richkd.progress import Report, percent
from richkd.recipe import Distill, Images, to_table
from richkd.results import teacher_accuracies
from richkd.store.reader import SLAB_ARRAYS, TeacherCache, open_cache
from richkd.targets import Target, choose_target, describe_target, held_out
from richkd.training.checkpoint import Best, RunFolder
from richkd.training.device import choose_device, hardware, versions
from richkd.training.loop import (
    Data,
    EpochRecord,
    EpochRows,
    Trainer,
    all_rows,
    derive_seed,
    timed,
)


def distill(
    settings: Distill,
    *,
    resume: bool = False,
    overwrite: bool = False,
    report: Report | None = None,
) -> dict[str, Any]:
    """Train one student to the end and write its run folder.

    Returns:
        The run's summary, which is also in its summary.json. Accuracies are in 0..1.

    Raises:
        RichKDError: anything the user can mend; found before training starts, unless the
            student diverges.
    """
    report = report or Report(quiet=True)
    device = choose_device(settings.device)
    cache = open_cache(settings.cache)
    settings = with_defaults(settings, cache)
    method_type, options = method_class(
        settings.method, method_options(settings.options, settings.method)
    )
    reads = method_type.reads(options)
    check_reads(cache, reads, settings)
    run = RunFolder(Path(settings.out))
    recorded = to_table(settings), identity(cache)
    run.check(*recorded, resume=resume, overwrite=overwrite)
    model, num_features = build_student(settings, cache)
    splits = load_images(cache, settings)
    target = None
    if TARGET in reads or "clip_features" in reads:
        target = choose_target(cache, settings, method_type.target, report)
    clip = cache.manifest["clip"]
    method = method_type(
        options,
        Widths(
            labels=splits[0].labels,
            student=num_features,
            teacher=cache.manifest["teacher"]["num_features"],
            clip=clip["num_features"] if clip else 0,
            alpha=1.0 if target is None else target.alpha,
        ),
    )
    going_on = run.begin(*recorded, resume=resume, overwrite=overwrite)

    data = to_device(cache, splits, settings, device)
    trainer = Trainer(model, method, data, settings, device)
    done, best = resume_from(run, trainer) if going_on else (0, Best())
    started = time.perf_counter()
    report.say(opening(settings, cache, trainer, device, done))
    rows = row_source(cache, reads, target, pin=device.type == "cuda")
    fixed = {name: row.to(device) for name, row in fixed_rows(cache, reads, target).items()}
    record = None
    with report.track(
        "distill", (settings.epochs - done) * len(data.train_labels), "images"
    ) as tick:
        slabs = all_rows(rows, done + 1, settings.epochs)
        for epoch, (slab, waited) in enumerate(timed(slabs), done + 1):
            source = EpochRows(slab.views, {**slab.rows, **fixed})
            record = trainer.train_epoch(epoch, source, tick)
            check_finite(record, settings)
            if record.test_accuracy is not None and record.test_accuracy > best.accuracy:
                best = Best(epoch, record.test_accuracy)
            run.save_epoch(
                epoch,
                {**record.as_dict(), "slab_wait_s": waited},
                best,
                trainer.state(),
                trainer.model.state_dict(),
            )
            report.say(epoch_line(record, settings.epochs))
    if record is None:  # cut off between the last epoch and the summary
        top1, top5 = trainer.evaluate()
    else:
        assert record.test_accuracy is not None and record.test_top5 is not None
        top1, top5 = record.test_accuracy, record.test_top5
    summary = {
        **describe_run(settings, cache, trainer),
        "target": target and describe_target(target, cache, data.tested.cpu()),
        "top1_last": top1,
        "top5_last": top5,
        "top1_best": best.accuracy,
        "epoch_best": best.epoch,
        "seconds": time.perf_counter() - started,
        "images_per_second": None if record is None else record.images_per_second,
        "run": str(run.path),
    }
    run.finish(trainer.model.state_dict(), summary)
    return summary


def with_defaults(settings: Distill, cache: TeacherCache) -> Distill:
    """The student that the data set suggests and a name for the run, where none were given."""
    name = cache.manifest["dataset"]["name"]
    student = settings.student or catalog.defaults(name).student
    out = settings.out or (f"runs/{cache.path.stem}-{student}-{settings.method}-s{settings.seed}")
    return replace(settings, student=student, out=out)


def check_reads(cache: TeacherCache, reads: tuple[str, ...], settings: Distill) -> None:
    """Refuse a store without what a method reads, and a target for a method that takes none.

    Raises:
        RichKDError: either of these.
    """
    for name in reads:
        if name != TARGET:
            cache.require(f"train/{name}")
    if settings.target and TARGET not in reads:
        raise RichKDError(
            f"target = {settings.target!r}: method {settings.method} takes no target logits; leave "
            f"--target out"
        )


def row_source(
    cache: TeacherCache, reads: tuple[str, ...], target: Target | None, *, pin: bool = False
) -> Callable[[int], EpochRows]:
    """What reads the rows of an epoch, from 1: view (epoch − 1) mod V, only what has a view axis.

    Blended logits are rounded as stage one would have stored them; `pin` is for GPUs.
    """
    features = tuple(name for name in reads if name in SLAB_ARRAYS)
    logits = target.reads if target is not None and TARGET in reads else ()
    dtype = torch.float16 if cache.manifest["dtype"] == "float16" else torch.float32

    @lru_cache(maxsize=1)  # with one view, every epoch is the same slab
    def read(view: int) -> EpochRows:
        slab = cache.slab(view, (*logits, *features))
        rows = {name: getattr(slab, name) for name in features}
        if target is not None and logits:
            stored = {name: getattr(slab, name) for name in logits}
            rows[TARGET] = target.logits("train", stored).to(dtype)
        epoch_rows = EpochRows(slab.views, rows)
        return epoch_rows.pinned() if pin else epoch_rows

    return lambda epoch: read((epoch - 1) % cache.num_views)


def fixed_rows(
    cache: TeacherCache, reads: tuple[str, ...], target: Target | None
) -> dict[str, Tensor]:
    """The rows that are the same in every epoch: CLIP's, which are of the clean images."""
    rows = {name: cache.read(f"train/{name}") for name in reads
            if name != TARGET and name not in SLAB_ARRAYS}  # fmt: skip
    if target is not None and TARGET in reads and not target.reads:
        rows[TARGET] = target.logits("train", {})
    return rows


def build_student(settings: Distill, cache: TeacherCache) -> tuple[torch.nn.Module, int]:
    """The student, its weights drawn from the seed, and its feature width."""
    torch.manual_seed(derive_seed(settings.seed, 0, 2))
    size = cache.manifest["image_size"]
    model = create_model(
        settings.student, cache.num_classes, image_size=size, **settings.student_options
    )
    width = check_fit(model, settings.student, size, cache.num_classes, **settings.student_options)
    return model, width


def load_images(cache: TeacherCache, settings: Distill) -> tuple[Split, Split]:
    """Images and labels of both splits, from the store or from the data set that it names.

    Raises:
        RichKDError: the data set is gone, has other classes, or changed since stage one.
    """
    entry = cache.manifest["dataset"]
    train_labels, test_labels = (cache.read(f"{split}/labels") for split in ("train", "test"))
    for split, labels in (("train", train_labels), ("test", test_labels)):
        if len(labels) == 0 or not 0 <= int(labels.min()) <= int(labels.max()) < cache.num_classes:
            raise RichKDError(
                f"{cache.path}: {split}/labels are not in 0..{cache.num_classes - 1}; make the "
                f"store again with richkd precompute --overwrite"
            )
    if entry["embedded"]:
        return (
            Split(cache.read("train/images"), train_labels),
            Split(cache.read("test/images"), test_labels),
        )
    dataset = load_dataset(
        Images(
            dataset=settings.dataset or entry["name"],
            limit=entry["num_train"],
            data_root=settings.data_root,
            image_size=cache.manifest["image_size"],
        )
    )
    if list(dataset.class_names) != cache.manifest["class_names"]:
        raise RichKDError(
            f"{cache.path} is for other classes than {dataset.name}: "
            f"{len(cache.manifest['class_names'])} against {len(dataset.class_names)}, or by other "
            f"names; pass the --dataset that it was made from"
        )
    if dataset.fingerprint != entry["fingerprint"]:
        raise RichKDError(
            f"{dataset.name} is not what {cache.path} was made from (its fingerprint differs); "
            f"restore the files, or make the store again with richkd precompute"
        )
    return dataset.train, dataset.test


def to_device(
    cache: TeacherCache, splits: tuple[Split, Split], settings: Distill, device: torch.device
) -> Data:
    """Both splits where the student is trained; held-out test images are not tested on."""
    train, test = splits
    return Data(
        train=make_inputs(train.images, device),
        train_labels=train.labels.to(device),
        test=make_inputs(test.images, device),
        test_labels=test.labels.to(device),
        test_views=views_tensor(test.view_space.clean(len(test))),
        tested=held_out(len(test), settings.held_out_share)[1].to(device),
        normalize=Normalize(tuple(cache.manifest["mean"]), tuple(cache.manifest["std"]), device),
        num_classes=cache.num_classes,
    )


def resume_from(run: RunFolder, trainer: Trainer) -> tuple[int, Best]:
    """Load the run's checkpoint into the trainer; epochs done and the best of them."""
    done, best, tensors = run.load()
    try:
        trainer.load_state(tensors)
    except (RuntimeError, KeyError, IndexError) as error:
        reason = str(error).splitlines()[0]
        raise RichKDError(
            f"the checkpoint in {run.path} does not fit this run ({reason}); begin anew with "
            f"--overwrite"
        ) from None
    return done, best


def identity(cache: TeacherCache) -> str:
    """What a run trains on: the data, the teachers and the views."""
    manifest = cache.manifest
    clip = manifest["clip"]
    parts = (
        manifest["dataset"]["fingerprint"][:16],
        manifest["teacher"]["sha256"][:16],
        clip["sha256"][:16] if clip else "none",
        f"{manifest['views']['count']} views of seed {manifest['views']['seed']}",
        f"alpha {manifest['alpha']} scale {manifest['scale']} {manifest['dtype']}",
    )
    return ", ".join(parts)


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
        "teacher": teacher_accuracies(cache.manifest),
        "hardware": hardware(trainer.device),
        "versions": versions(),
    }


def opening(
    settings: Distill, cache: TeacherCache, trainer: Trainer, device: torch.device, done: int
) -> str:
    """The lines that say what is about to run."""
    count = sum(parameter.numel() for parameter in trainer.model.parameters())
    going_on = f", going on after epoch {done}" if done else ""
    return (
        f"{settings.student} ({count / 1e6:.2f} M) by {settings.method} from "
        f"{cache.num_views} views, seed {settings.seed}, on {device}\n"
        f"{settings.epochs} epochs of {cache.num_samples:,} images, batch {settings.batch_size}, "
        f"lr {settings.lr}{going_on}"
    )


def epoch_line(record: EpochRecord, epochs: int) -> str:
    """One epoch in one line."""
    tested = "" if record.test_accuracy is None else f", test {percent(record.test_accuracy)} %"
    return (
        f"epoch {record.epoch}/{epochs}: loss {record.loss:.3f}, train "
        f"{percent(record.train_accuracy)} %{tested} ({record.images_per_second:,.0f} images/s)"
    )
