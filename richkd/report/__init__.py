"""Reports: run folders as one self-contained HTML page, with CSV and JSON beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from richkd.core.files import check_replaceable, write, write_json
from richkd.core.ownership import Ours, has_keys, is_leaderboard, is_page
from richkd.core.progress import Report
from richkd.report.rows import as_record, read_rows, write_csv
from richkd.report.sweep import render
from richkd.report.tensorboard import write_tensorboard
from richkd.training.run_folder import load_runs

FILES: dict[str, Ours] = {
    "report.html": is_page,
    "leaderboard.csv": is_leaderboard,
    "report.json": has_keys("store", "leaderboard", "incomplete"),
}


def write_report(
    folders: list[Path],
    report: Report,
    *,
    out: Path | None = None,
    cache: str | None = None,
    tensorboard: bool = False,
) -> dict[str, Any]:
    """Write report.html, leaderboard.csv and report.json.

    Args:
        folders: folders that contain run folders, at any depth.
        report: receives progress.
        out: folder for the three files; the first of `folders` by default.
        cache: include only runs that were trained from this cache.
        tensorboard: also write TensorBoard event files, to `out`/tensorboard.

    Returns:
        The content of report.json, and the paths of the files.

    Raises:
        RichKDError: there are no runs, or runs of several caches.
    """
    runs = load_runs(folders, cache)
    out = out or folders[0]
    check_files(out)

    rows, note = read_rows(runs, report)
    result = {
        "store": runs[0].settings["cache"],
        "leaderboard": [as_record(row) for row in rows],
        "evaluation": note,
        "teachers": next((run.summary["teacher"] for run in runs if run.summary), None),
        "incomplete": [
            {
                "run": str(run.path),
                "epochs_done": len(run.metrics),
                "epochs": run.settings["epochs"],
            }
            for run in runs
            if run.summary is None
        ],
    }

    out.mkdir(parents=True, exist_ok=True)
    files = {name: out / name for name in FILES}
    write(files["report.html"], render(rows, len(runs), result))
    write_csv(files["leaderboard.csv"], result["leaderboard"])
    if tensorboard:
        files["tensorboard"] = out / "tensorboard"
        write_tensorboard(runs, files["tensorboard"])
    write_json(files["report.json"], result)
    return {**result, "files": {name: str(path) for name, path in files.items()}}


def check_files(out: Path) -> None:
    """Raise RichKDError if the report would replace a file that no report wrote."""
    for name, ours in FILES.items():
        check_replaceable(out / name, ours)
