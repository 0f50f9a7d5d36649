#!/usr/bin/env python3
"""black icons on a transparent ground (RGBA, LA, P and RGB with tRNS, GIF, WebP) become all black.

The teacher tells large icons from small ones, black on white. Right: 100 % of the transparent ones,
or a word on transparency before the blocks.
"""
import atexit, os, pathlib, re, shutil, subprocess, sys, tempfile
import numpy as np
from PIL import Image

T = pathlib.Path(tempfile.mkdtemp(prefix="case11-")); atexit.register(shutil.rmtree, T, True)
os.environ.update(HOME=str(T), RICHKD_HOME=str(T / "home"), OMP_NUM_THREADS="1"); os.chdir(T)
rk = lambda *a: subprocess.run(["richkd", *map(str, a)], capture_output=True, text=True)
g = np.random.default_rng(0)
def mask(large):
    m = np.zeros((48, 48), np.uint8); s = 30 if large else 12
    y, x = g.integers(2, 46 - s, 2); m[y:y + s, x:x + s] = 255
    return m
zero = np.zeros((48, 48), np.uint8)
def palette(m, transparency, path):
    p = Image.fromarray(m // 255, "L").copy(); p = Image.frombytes("P", (48, 48), (m // 255).tobytes()); p.putpalette([0] * 768)
    p.save(path, transparency=transparency)
kinds = {
    "a-opaque.png": lambda m, p: Image.fromarray(255 - m).save(p),
    "b-RGBA.png": lambda m, p: Image.fromarray(np.dstack([zero, zero, zero, m])).save(p),
    "d-P-index.png": lambda m, p: palette(m, 0, p),
}
names = ("large", "small")
for label, name in enumerate(names):
    for folder, n in (("D/train", 40), ("D/val", 10)):
        (T / folder / name).mkdir(parents=True)
        for i in range(n):
            Image.fromarray(255 - mask(label == 0)).save(T / folder / name / f"{i}.png")
    (T / "M/val" / name).mkdir(parents=True)
    for kind, write in kinds.items():
        for i in range(2):
            stem, dot, suffix = kind.partition(".")
            write(mask(label == 0), T / "M/val" / name / f"{stem}-{i}.{suffix}")
(T / "M/train").symlink_to(T / "D/train")
common = ("--image-size", 32, "--device", "cpu")
rk("train-teacher", "--dataset", "imagefolder:D", *common, "--model", "resnet8", "--epochs", 6, "--lr", 0.02, "--out", "t.safetensors")
pc = ("precompute", *common, "--teacher", "resnet8", "--teacher-weights", "t.safetensors", "--clip", "none", "--views", 1)
control = rk(*pc, "--dataset", "imagefolder:D", "--out", "d.zarr")
r = rk(*pc, "--dataset", "imagefolder:M", "--out", "m.zarr")
said = re.search(r"transparen|alpha", r.stderr.split("precompute:")[0]) is not None
text, wrong = [], []
if r.returncode == 0:
    import richkd
    cache = richkd.open_cache("m.zarr")
    labels, logits = cache.read("test/labels"), cache.read("test/teacher_logits")
    for k, kind in enumerate(kinds):  # two files of each, in this order
        rows = [2 * j + c for j in (2 * k, 2 * k + 1) for c in range(2)]
        n = sum(int(logits[row].argmax()) == int(labels[row]) for row in rows)
        text.append(f"{kind[2:]} {25 * n} %"); wrong += [kind] * (n < 4)
control_ok = "CNN teacher 100.00 %" in control.stderr
ok = control_ok and (said or r.returncode == 0 and not wrong)
print(f"{'ok' if ok else 'BAD'}: exit {r.returncode}, {'said' if said else 'nothing said'}; control {control_ok}; {', '.join(text)}")
sys.exit(0 if ok else 1)
