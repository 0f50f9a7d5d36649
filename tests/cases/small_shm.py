#!/usr/bin/env python3
"""a small /dev/shm, as Docker's 64 MB: 8 MB here, for 96 px and 8 views (needs root, for a mount of its own).

Right: it runs, or one line names /dev/shm and --shm-size; never a traceback.
"""
import atexit, os, pathlib, re, shlex, shutil, subprocess, sys, tempfile
import numpy as np
from PIL import Image

T = pathlib.Path(tempfile.mkdtemp(prefix="case06-")); atexit.register(shutil.rmtree, T, True)
os.environ.update(HOME=str(T), RICHKD_HOME=str(T / "home"), OMP_NUM_THREADS="1"); os.chdir(T)
rk = lambda *a: subprocess.run(["richkd", *map(str, a)], capture_output=True, text=True)
g = np.random.default_rng(0)
for split, n in (("train", 48), ("val", 8)):
    for name in ("cat", "dog"):
        d = T / "D" / split / name; d.mkdir(parents=True)
        for i in range(n):
            Image.fromarray(g.integers(0, 255, (48, 48, 3), dtype=np.uint8)).save(d / f"{i}.png")
common = ("--dataset", "imagefolder:D", "--image-size", 96, "--device", "cpu")
rk("train-teacher", *common, "--limit", 16, "--model", "resnet8", "--epochs", 1, "--out", "t.safetensors")
command = shlex.join(map(str, ("richkd", "precompute", *common, "--teacher", "resnet8", "--teacher-weights", "t.safetensors",
                               "--clip", "none", "--views", 8, "--out", "c.zarr")))
r = subprocess.run(["unshare", "-m", "sh", "-c", f"mount -t tmpfs -o size=8m t /dev/shm && exec {command}"], capture_output=True, text=True)
tracebacks = r.stderr.count("Traceback")
last = (r.stderr.strip().splitlines() or [""])[-1]
ok = tracebacks == 0 and (r.returncode == 0 or r.returncode == 2 and re.search(r"/dev/shm|shared memory|shm-size", last) is not None)
print(f"{'ok' if ok else 'BAD'}: exit {r.returncode}, {tracebacks} tracebacks, {len(r.stderr.splitlines())} lines, the last: {last[:110]!r}")
sys.exit(0 if ok else 1)
