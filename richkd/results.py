"""Results as people compare them: teachers and students in one table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from richkd.progress import Report, duration, percent
from richkd.store.schema import Manifest


def teacher_accuracies(manifest: Manifest) -> dict[str, float | None]:
    """Top-1 of the CNN teacher, CLIP and their blend on the test split, in 0..1."""
    clip = manifest["clip"]
    return {
        "cnn": manifest["teacher"]["accuracy"],
        "clip": clip["accuracy"] if clip else None,
        "fused": manifest["fused_accuracy"],
    }


def results_table(report: Report, title: str, summaries: Sequence[Mapping[str, Any]]) -> None:
    """Teachers, then students, with their test accuracies in percent."""
    teachers = summaries[0]["teacher"]
    names = {"cnn": "CNN teacher", "clip": "CLIP zero-shot", "fused": "fused teacher"}
    rows: list[tuple[str, ...]] = [
        (names[kind], percent(value), "", "", "", "")
        for kind, value in teachers.items()
        if value is not None
    ]
    rows += [row for summary in summaries for row in _own_target(summary)]
    for summary in summaries:
        rate = summary["images_per_second"]
        rows.append((
            f"{summary['student']} by {summary['method']}",
            percent(summary["top1_last"]),
            f"{percent(summary['top1_best'])} @{summary['epoch_best']}",
            percent(summary["top5_last"]),
            f"{rate:,.0f}" if rate else "–",
            duration(summary["seconds"]),
        ))  # fmt: skip
    header = ("test accuracy, %", "top-1 last", "best @epoch", "top-5", "images/s", "time")
    report.table(title, header, rows)


def _own_target(summary: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """A row for logits that are not the store's own: another blend, CLIP head, or test images."""
    target = summary.get("target")
    if target is None or target["top1"] in summary["teacher"].values():
        return []
    blend = [f"{key} {target[key]:.3g}" for key in ("alpha", "scale") if key in target]
    head = ["probe"] if target.get("head") == "probe" else []
    return [(", ".join([target["kind"], *head, *blend]), percent(target["top1"]), "", "", "", "")]
