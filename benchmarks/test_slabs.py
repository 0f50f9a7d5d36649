"""Peak memory of stage two: two slabs, and no teacher."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from helpers import write_random_store

import richkd
from richkd.store import schema

FRESH = """
import json, sys
from richkd.data.inputs import Normalize
from richkd.distill import Placement, Source, distill
from richkd.core.progress import Report
from richkd.config.settings import Distill
from richkd.store import pages, schema
distill(Distill(**json.loads(sys.argv[1])))
# not ru_maxrss, which a process inherits from the one that started it
peak = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if "VmHWM" in line)
teachers = [n for n in sys.modules
            if n.split(".")[0] == "open_clip" or n.startswith("richkd.teachers")
            or n == "richkd.store.writer" or n == "richkd.precompute"]
print(json.dumps({"peak": peak, "teachers": teachers}))
"""


def in_a_fresh_process(**settings: Any) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", FRESH, json.dumps({"device": "cpu", **settings})],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "MALLOC_ARENA_MAX": "2"},
    )
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def test_stage_two_loads_no_teacher_and_at_most_two_slabs(store: Path, tmp_path: Path) -> None:
    """Slabs of 76 MiB over small images, so that a third one would stand out.

    Beside the slabs there is room for chunks of 4 MiB in flight while a slab is read (compressed,
    decoded, copied) and, for the contrastive loss, for what a step makes by sample and negative:
    two matrices of indices and eight of scores.
    """
    num_samples, num_classes, room = 20_000, 1000, 64 * 2**20
    scores = 64 * (16384 + 1) * (2 * 8 + 8 * 4)
    path = write_random_store(tmp_path / "s.zarr", store, num_samples, num_classes, image_size=8)
    specs = schema.array_specs(richkd.open_cache(path).manifest)

    def nbytes(*names: str) -> int:
        """Of one view of these arrays."""
        return sum(
            spec.nbytes // (spec.shape[0] if "view" in spec.dimensions else 1)
            for spec in (specs[f"train/{name}"] for name in names)
        )

    common = {
        "cache": str(path),
        "student": "resnet8",
        "epochs": 3,
        "batch_size": 64,
        "eval_every": 3,
    }
    vanilla = [
        in_a_fresh_process(**common, method="ce", out=str(tmp_path / f"ce{i}")) for i in range(2)
    ]
    noise = abs(vanilla[0]["peak"] - vanilla[1]["peak"])
    for method, slab, besides in (
        ("richkd-l", nbytes("fused_logits"), 0),
        (
            "richkd",
            nbytes("fused_logits", "teacher_features"),
            nbytes("clip_features") + 2 * num_samples * 128 * 4 + scores,
        ),
    ):
        done = in_a_fresh_process(**common, method=method, out=str(tmp_path / method))
        assert done["teachers"] == vanilla[0]["teachers"] == []
        more = done["peak"] - min(run["peak"] for run in vanilla)
        sizes = [f"{count / 2**20:.1f}" for count in (more, noise, 2 * slab, besides)]
        print("{}: +{} MiB (± {}); two slabs {}, CRD {}".format(method, *sizes))
        assert more > slab / 2  # the measurement sees slabs at all
        assert more <= 2 * slab + besides + noise + room
