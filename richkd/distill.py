"""Stage two: train a student from a cache, one slab per epoch. No teacher is loaded here.

`Source` holds what runs can share: cache, images, slabs and targets. `StudentRun` holds what one
run owns: student, method, optimizer and run folder. `distill` has one run, a sweep has many.
"""

from __future__ import annotations

from typing import Any

from richkd.config.settings import Distill, check_resume
from richkd.core.progress import Report
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
    report: Report | None = None,
) -> dict[str, Any]:
    """Train one student to the end and write its run folder.

    An interrupted run is resumed; a complete run is left as it is.

    Args:
        settings: cache, student, method and training.
        resume: has no effect, since resuming is the default; contradicts `overwrite`.
        overwrite: start over if there is a run; other files in its folder are kept.
        report: receives progress.

    Returns:
        The content of the run's summary.json. Accuracies are in 0..1.

    Raises:
        RichKDError: anything the user can fix; raised before training starts, unless the
            student diverges.
    """
    check_resume(resume, overwrite)
    report = report or Report(quiet=True)
    source = Source(settings, report)
    check_every_teacher(source.cache, settings)
    if not overwrite and (summary := completed(settings, source.cache, report)):
        return summary
    with StudentRun(source, settings, overwrite=overwrite) as run:
        report.log(run.opening())
        log_few_views([run.settings], source.cache, report)
        describe_precision(run, report)
        with report.track("distill", run.images_to_go, "images", run.waits) as tick:
            for rows, waited in source.epochs(run.rows.values(), run.done + 1, run.settings.epochs):
                record = run.train_epoch(rows, waited, tick)
                report.log(epoch_line(record, run.settings.epochs, run.epoch_waits))
        return run.finish()
