"""The same runs as TensorBoard's event files, for people who have it open."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from richkd.core.errors import RichKDError
from richkd.core.ownership import EVENTS
from richkd.training.run_folder import Run


def write_tensorboard(runs: Sequence[Run], folder: Path) -> None:
    """A log directory a run, named as its folder: losses, accuracies and learning rate by epoch.

    Raises:
        RichKDError: TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard.writer import SummaryWriter
    except ImportError:
        raise RichKDError(
            "--tensorboard needs TensorBoard; pip install 'richkd[tensorboard]'",
            code="extra-missing",
        ) from None
    for run in runs:
        logs = folder / run.path.name
        for old in logs.glob(EVENTS):  # event files only ever grow
            old.unlink()
        with SummaryWriter(logs) as writer:
            for record in run.metrics:
                scalars = {
                    "loss/total": record["loss"],
                    **{f"loss/{name}": value for name, value in record["terms"].items()},
                    "accuracy/train": record["train_accuracy"],
                    "accuracy/validation": record.get("validation_accuracy"),
                    "accuracy/test": record["test_accuracy"],
                    "lr": record["lr"],
                }
                for name, value in scalars.items():
                    if value is not None:
                        writer.add_scalar(name, value, record["epoch"])
