"""Stage two: train a student from a cache, one slab per epoch. No teacher is loaded here.

Under torchrun the processes share every batch (training/parallel.py); the first of them owns the
run folder.

`Source` holds what runs can share: cache, images, slabs and targets. `StudentRun` holds what one
run owns: student, method, optimizer and run folder. `distill` has one run, a sweep has many.
"""

from __future__ import annotations

from typing import Any

from richkd.config.settings import Distill, check_resume
from richkd.core.progress import Report
from richkd.core.ranks import joined
from richkd.training.source import Source
from richkd.training.student import (
    StudentRun,
    check_every_teacher,
    completed,
    describe_precision,
    epoch_line,
    log_few_views,
)


def distill(
    settings: Distill,
    *,
    resume: bool = False,
    overwrite: bool = False,
    stop_after: int | None = None,
    report: Report | None = None,
) -> dict[str, Any]:
    """Train one student to the end and write its run folder.

    An interrupted run is resumed; a complete run is left as it is.

    Args:
        settings: cache, student, method and training.
        resume: has no effect, since resuming is the default; contradicts `overwrite`.
        overwrite: start over if there is a run; other files in its folder are kept.
        stop_after: stop once this epoch is done; a later call goes on.
        report: receives progress.

    Returns:
        The content of the run's summary.json. Accuracies are in 0..1. If it stopped before, the
        run folder and the number of the last epoch (`run`, `stopped_after`).

    Raises:
        RichKDError: anything the user can fix; raised before training starts, unless the
            student diverges.
    """
    check_resume(resume, overwrite)
    with joined(on_gpus=settings.device != "cpu") as ranks:
        report = report if report and ranks.first else Report(quiet=True)
        source = ranks.after_first(lambda: Source(settings, report, ranks=ranks))
        summary = ranks.from_first(lambda: check_run(source, settings, report, overwrite))
        return summary or train(source, settings, report, overwrite, stop_after)


def check_run(
    source: Source, settings: Distill, report: Report, overwrite: bool
) -> dict[str, Any] | None:
    """Return the summary of the run if it is complete; raise as `distill`."""
    check_every_teacher(source.cache, settings)
    return None if overwrite else completed(settings, source.cache, report)


def train(
    source: Source, settings: Distill, report: Report, overwrite: bool, stop_after: int | None
) -> dict[str, Any]:
    """Train the student of a run that is not complete; arguments and errors as of `distill`."""
    with StudentRun(source, settings, overwrite=overwrite) as run:
        report.log(run.opening())
        log_few_views([run.settings], source.cache, report)
        describe_precision(run, report)
        epochs = run.settings.epochs
        last = min(stop_after or epochs, epochs)
        images = (last - run.done) * source.entries
        with report.track("distill", images, "images", run.waits) as tick:
            for rows, waited in source.epochs(run.rows.values(), run.done + 1, last):
                record = run.train_epoch(rows, waited, tick)
                report.log(epoch_line(record, epochs, run.epoch_waits))
        if run.done < epochs:
            return {"run": str(run.folder.path), "stopped_after": run.done}
        return run.finish()
