#!/usr/bin/env python3
"""train/valid/test (Roboflow), train/validation and train/dev.

Right: valid is what is looked at while choosing (or it is said that test is); other names are taken,
or the refusal names the folder that is there.
"""
import atexit, os, pathlib, re, shutil, subprocess, sys, tempfile
import numpy as np
from PIL import Image

T = pathlib.Path(tempfile.mkdtemp(prefix="case09-")); atexit.register(shutil.rmtree, T, True)
os.environ.update(HOME=str(T), RICHKD_HOME=str(T / "home"), OMP_NUM_THREADS="1"); os.chdir(T)
rk = lambda *a: subprocess.run(["richkd", *map(str, a)], capture_output=True, text=True)
g = np.random.default_rng(0)
def images(root, split, n):
    for name in ("cat", "dog"):
        d = T / root / split / name; d.mkdir(parents=True)
        for i in range(n):
            Image.fromarray(g.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(d / f"{i}.png")
for root, split in (("robo", "valid"), ("other", "validation"), ("plain", "val")):
    images(root, "train", 8), images(root, split, 5)
images("robo", "test", 7)
rk("train-teacher", "--dataset", "imagefolder:plain", "--image-size", 32, "--device", "cpu", "--model", "resnet8", "--epochs", 1, "--out", "t.safetensors")
def precompute(root):
    return rk("precompute", "--dataset", f"imagefolder:{root}", "--image-size", 32, "--device", "cpu", "--teacher", "resnet8",
              "--teacher-weights", "t.safetensors", "--clip", "none", "--views", 1, "--out", f"{root}.zarr")
control, robo = precompute("plain").returncode == 0, precompute("robo")
count = re.search(r"and (\d+) test images", robo.stderr)
named = re.search(r"\bvalid\b", robo.stderr) is not None
texts = [(named or count is not None and count[1] == "10", f"train/valid/test: exit {robo.returncode}, "
          f"{'a word' if named else 'no word'} on valid/, {count[1] if count else '-'} test images (valid has 10, test 14)")]
for root, folder in (("other", "validation"),):
    r = precompute(root)
    last = (r.stderr.strip().splitlines() or [""])[-1]
    texts.append((r.returncode == 0 or bool(re.search(rf"\b{folder}\b(?!\.zarr)", last.replace(f"imagefolder:{root}", "").replace(f"{root}/train", "").replace(f"{root}/val/", ""))),
                  f"train/{folder}: exit {r.returncode}, {last[-60:]!r}"))
print("; ".join(f"{'ok' if ok else 'BAD'} {text}" for ok, text in texts))
sys.exit(0 if control and all(ok for ok, _ in texts) else 1)
