"""TensorBoard event files of runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from richkd.core.errors import RichKDError
from richkd.core.ownership import EVENTS
from richkd.training.run_folder import Run


def write_tensorboard(runs: Sequence[Run], folder: Path) -> None:
    """Write losses, accuracies and learning rate by epoch: one log directory per run.

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
        for old in logs.glob(EVENTS):  # a writer adds a file and never replaces one
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
