"""The CLIP called `demo`: a tiny open_clip model that learns from drawn captions on the spot.

It is kept in the user's cache folder (RICHKD_HOME, else ~/.cache/richkd) for the next time. Its
drawings come from a seed of their own, so it has seen no image that a teacher or student trains on.
"""

from __future__ import annotations

from pathlib import Path

import torch

from richkd.data import shapes
from richkd.files import home
from richkd.progress import Report
from richkd.teachers.tiny_clip import train_tiny_clip

DRAWINGS = 20_000
DRAWINGS_SEED = 3
EPOCHS = 3
BATCH_SIZE = 64
NAME = "demo-clip-1"  # a new number whenever the drawings or the training change


def demo_clip(report: Report) -> Path:
    """The directory of the demo CLIP, trained first where it is not there."""
    folder = home() / NAME
    if not folder.is_dir():
        report.say(f"training the demo CLIP on {DRAWINGS:,} drawn captions, kept in {folder}")
        drawing = shapes.draw(DRAWINGS, seed=DRAWINGS_SEED)
        steps = EPOCHS * (DRAWINGS // BATCH_SIZE)
        with report.track("demo CLIP", steps * BATCH_SIZE, "captions") as tick:
            train_tiny_clip(
                torch.from_numpy(drawing.images),
                drawing.captions,
                folder,
                epochs=EPOCHS,
                batch_size=BATCH_SIZE,
                progress=lambda step, total: tick(BATCH_SIZE),
            )
    return folder
