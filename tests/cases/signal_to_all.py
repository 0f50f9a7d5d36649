#!/usr/bin/env python3
"""SIGTERM to all processes of a job (scancel, systemd, `timeout`) while data-loader workers run.

Right: exit 128 + 15, one last line that says how to go on, no traceback. Also SIGINT to all (Ctrl-C).
"""
import atexit, os, pathlib, re, shutil, signal, subprocess, sys, tempfile, time
import numpy as np
from PIL import Image

T = pathlib.Path(tempfile.mkdtemp(prefix="case07-")); atexit.register(shutil.rmtree, T, True)
os.environ.update(HOME=str(T), RICHKD_HOME=str(T / "home"), OMP_NUM_THREADS="1"); os.chdir(T)
rk = lambda *a: subprocess.run(["richkd", *map(str, a)], capture_output=True, text=True)
g = np.random.default_rng(0)
for split, n in (("train", 60), ("val", 8)):
    for name in ("cat", "dog"):
        d = T / "D" / split / name; d.mkdir(parents=True)
        for i in range(n):
            Image.fromarray(g.integers(0, 255, (48, 48, 3), dtype=np.uint8)).save(d / f"{i}.png")
common = ("--dataset", "imagefolder:D", "--device", "cpu")
rk("train-teacher", *common, "--image-size", 32, "--limit", 16, "--model", "resnet8", "--epochs", 1, "--out", "t.safetensors")
pc = ["precompute", *common, "--teacher", "resnet8", "--teacher-weights", "t.safetensors", "--clip", "none", "--out"]
rk(*pc, "small.zarr", "--image-size", 32, "--views", 2)

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
def told_to_stop(signum, *command):
    """The whole process group is signalled as soon as there are workers."""
    with open("said", "w") as said:
        process = subprocess.Popen(["richkd", *map(str, command)], stderr=said, stdout=subprocess.DEVNULL, start_new_session=True,
                                   preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
        while process.poll() is None and not children(process.pid):
            time.sleep(0.02)
        os.killpg(process.pid, signum)
        try:
            process.wait(120)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL); process.wait()
    text = pathlib.Path("said").read_text()
    last = (text.strip().splitlines() or [""])[-1]
    good = process.returncode == 128 + signum and "Traceback" not in text and "same command" in last
    return good, f"exit {process.returncode}, {text.count('Traceback')} tracebacks"
train = ("--epochs", 200, "--batch-size", 8, "--device", "cpu")
results = {}
for signum in (signal.SIGTERM, signal.SIGINT):
    for name, command in {
        "precompute": (*pc, f"c{signum}.zarr", "--image-size", 128, "--views", 32, "--batch-size", 16),
        "train-teacher": ("train-teacher", "--dataset", "imagefolder:D", "--image-size", 32, "--model", "resnet8", "--out", "u.safetensors", *train),
        "distill": ("distill", "--cache", "small.zarr", "--student", "resnet8", "--method", "kd", "--out", f"r{signum}", *train),
    }.items():
        results[f"{signum.name} {name}"] = told_to_stop(signum, *command)
print("; ".join(f"{'ok' if good else 'BAD'} {name}: {text}" for name, (good, text) in results.items()))
sys.exit(0 if all(good for good, _ in results.values()) else 1)
