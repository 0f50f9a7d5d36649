"""The CLIP called `demo`: a tiny open_clip model, trained on drawings when it is first needed.

It is kept in the user's cache folder (RICHKD_HOME, by default ~/.cache/richkd). Its drawings have a
seed of their own, so it has seen none of the images that teachers and students train on.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from richkd.core.errors import RichKDError
from richkd.core.files import home, locked
from richkd.core.progress import Report
from richkd.data import shapes
from richkd.teachers.tiny_clip import train_tiny_clip
from richkd.training.checkpoint import Checkpoints

DRAWINGS = 20_000
DRAWINGS_SEED = 3
EPOCHS = 3
BATCH_SIZE = 64
NAME = "demo-clip-1"  # a new number whenever the drawings or the training change


def demo_clip(report: Report) -> Path:
    """Return the directory of the demo CLIP; train it, or resume its training, if needed.

    Raises:
        RichKDError: another process is training it.
    """
    folder = home() / NAME
    checkpoints = Checkpoints(folder.with_name(f"{NAME}.training"))
    if folder.is_dir() and not checkpoints.folder.exists():
        return folder
    with locked(folder):
        if not folder.is_dir():
            train(folder, checkpoints, report)
        for path in (checkpoints.folder, *home().glob(f".{NAME}-*")):  # also of killed processes
            shutil.rmtree(path, ignore_errors=True)
    return folder


def train(folder: Path, checkpoints: Checkpoints, report: Report) -> None:
    """Train the demo CLIP into a folder, from its last checkpoint if there is one."""
    try:
        done = checkpoints.progress().epoch
    except RichKDError as error:  # training again is quick
        reason = str(error).partition("; ")[0]
        report.log(f"{reason}; training the demo CLIP from its first epoch")
        checkpoints.remove()
        done = 0
    resuming = f"; resuming after epoch {done} of {EPOCHS}" if done else ""
    report.log(f"training the demo CLIP on {DRAWINGS:,} drawn captions, kept in {folder}{resuming}")
    drawing = shapes.draw(DRAWINGS, seed=DRAWINGS_SEED)
    steps = (EPOCHS - done) * (DRAWINGS // BATCH_SIZE)
    with report.track("demo CLIP", steps * BATCH_SIZE, "captions") as tick:
        train_tiny_clip(
            torch.from_numpy(drawing.images),
            drawing.captions,
            folder,
            epochs=EPOCHS,
            batch_size=BATCH_SIZE,
            progress=lambda step, total: tick(BATCH_SIZE),
            checkpoints=checkpoints,
        )
