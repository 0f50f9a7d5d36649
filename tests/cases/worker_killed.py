#!/usr/bin/env python3
"""a data-loader worker is killed (as by the kernel, short of memory) in precompute and in distill.

Right: it goes on without it, or one line says so and how to go on; never a traceback.
"""
import atexit, os, pathlib, re, shutil, signal, subprocess, sys, tempfile, time
import numpy as np
from PIL import Image

T = pathlib.Path(tempfile.mkdtemp(prefix="case06b-")); atexit.register(shutil.rmtree, T, True)
os.environ.update(HOME=str(T), RICHKD_HOME=str(T / "home"), OMP_NUM_THREADS="1"); os.chdir(T)
rk = lambda *a: subprocess.run(["timeout", "-s", "KILL", "150", "richkd", *map(str, a)], capture_output=True, text=True)
g = np.random.default_rng(0)
for split, n in (("train", 60), ("val", 8)):
    for name in ("cat", "dog"):
        d = T / "D" / split / name; d.mkdir(parents=True)
        for i in range(n):
            Image.fromarray(g.integers(0, 255, (48, 48, 3), dtype=np.uint8)).save(d / f"{i}.png")
common = ("--dataset", "imagefolder:D", "--image-size", 128, "--device", "cpu")
rk("train-teacher", *common, "--limit", 16, "--model", "resnet8", "--epochs", 1, "--out", "t.safetensors")
pc = ["precompute", *common, "--teacher", "resnet8", "--teacher-weights", "t.safetensors", "--clip", "none", "--out"]
rk(*pc, "whole.zarr", "--views", 2)

def children(pid):
    """Data-loader workers: forks of the process (same command line) that are still there a moment later."""
    def forks():
        found = set()
        for p in pathlib.Path("/proc").iterdir():
            if p.name.isdigit():
                try:
                    state = (p / "stat").read_text().rsplit(")", 1)[1].split()
                    if state[0] != "Z" and int(state[1]) == pid and (p / "cmdline").read_bytes() == own:
                        found.add(int(p.name))
                except OSError:
                    continue
        return found
    try:
        own = pathlib.Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return []
    before = forks()
    if before:
        time.sleep(0.2)
    return sorted(before & forks())
def with_a_worker_killed(*command):
    with open("said", "w") as said:
        process = subprocess.Popen(["richkd", *map(str, command)], stderr=said, stdout=subprocess.DEVNULL)
        while process.poll() is None and not (found := children(process.pid)):
            time.sleep(0.02)
        if process.poll() is None:
            os.kill(found[0], signal.SIGKILL)
        try:
            process.wait(150)
        except subprocess.TimeoutExpired:
            process.kill(); process.wait()
    text = pathlib.Path("said").read_text()
    return process.returncode, text.count("Traceback"), (text.strip().splitlines() or [""])[-1], process.poll()

results = {
    "precompute": with_a_worker_killed(*pc, "c.zarr", "--views", 16),
    "distill": with_a_worker_killed("distill", "--cache", "whole.zarr", "--student", "resnet8", "--method", "kd", "--batch-size", 16, "--epochs", 6, "--device", "cpu"),
}
good = {name: tracebacks == 0 and rc in (0, 2) for name, (rc, tracebacks, _, _) in results.items()}
print("; ".join(f"{'ok' if good[n] else 'BAD'} {n}: exit {rc}, {t} tracebacks, {last[:90]!r}" for n, (rc, t, last, _) in results.items()))
sys.exit(0 if all(good.values()) else 1)
