"""Measure what each component of `--augment` costs a data-loader worker, in CPU time per image.

    python benchmarks/augment.py

Small images are those of an array at 32×32; photographs are JPEGs of 500×375, seen at 224×224.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from richkd.config.settings import Images
from richkd.core.choices import AUGMENT, CROP
from richkd.data.datasets import Split, load_dataset
from richkd.data.inputs import image_views
from richkd.data.mixing import joined
from richkd.data.views import AugmentedViews, views_tensor
from richkd.tools.plan import drawn_files

COUNT, ROUNDS = 64, 9
TEXTS = (CROP, *AUGMENT, "rand+erase+mix")


def milliseconds(split: Split, text: str, seed: int) -> float:
    """Return the CPU time of one view of an image, alone in one thread."""
    space: Any = split.views(text)
    augment = space.augment if isinstance(space, AugmentedViews) else None
    rows = joined(augment, views_tensor(space.draw(seed, len(split), 1)[0]))
    start = time.process_time()
    for number in range(len(split)):
        index = torch.tensor([number])
        image_views(split.images, index, rows[index], augment)
    return 1000 * (time.process_time() - start) / len(split)


def main() -> None:
    """Print a table, of medians over rounds in which the components alternate."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        small = load_dataset(Images(dataset="shapes", limit=COUNT)).train
        files = drawn_files(Path(folder) / "photos", 224, COUNT)
        splits = {"32×32": small, "224×224": Split(files, torch.zeros(COUNT, dtype=torch.int64))}
        taken: dict[tuple[str, str], list[float]] = {}
        for number in range(ROUNDS + 1):
            for name, split in splits.items():
                for text in TEXTS:
                    found = milliseconds(split, text, number)
                    if number:  # the first round warms up
                        taken.setdefault((name, text), []).append(found)
    for text in TEXTS:
        print(text, *(f"{name}: {median(taken[name, text]):.2f} ms" for name in splits), sep="\t")


if __name__ == "__main__":
    main()
