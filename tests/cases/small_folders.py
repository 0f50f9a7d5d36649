#!/usr/bin/env python3
"""Small images as people have them: MNIST's as grey PNG files, Tiny ImageNet's JPEGs, CIFAR's with a stray file.

Right: the first two are taken whole at their own size, and the images are in the cache; the stray file is
named, and with it all are photographs.
"""
import atexit, json, os, pathlib, shutil, subprocess, sys, tempfile
import numpy as np
from PIL import Image

T = pathlib.Path(tempfile.mkdtemp(prefix="case32-")); atexit.register(shutil.rmtree, T, True)
os.environ.update(HOME=str(T), RICHKD_HOME=str(T / "home"), OMP_NUM_THREADS="1"); os.chdir(T)
rk = lambda *a: subprocess.run(["richkd", *map(str, a)], capture_output=True, text=True)
g = np.random.default_rng(0)
def images(root, split, names, side, mode, suffix, below=""):
    for c, name in enumerate(names):
        d = T / root / split / name / below; d.mkdir(parents=True)
        for i in range(6):
            a = g.integers(0, 60, (side, side, 3), dtype=np.uint8) + np.uint8(60 * c)
            Image.fromarray(a).convert("L" if i == 0 else mode).save(d / f"{name}_{i}.{suffix}")
for split in ("training", "testing"):
    images("mnist", split, ("0", "1", "10"), 28, "L", "png")
wnids = ("n01443537", "n01629819")
images("tiny", "train", wnids, 64, "RGB", "JPEG", "images"), images("tiny", "val", wnids, 64, "RGB", "JPEG")
for name in wnids:
    (T / "tiny/train" / name / f"{name}_boxes.txt").write_text("x\t0\t0\t63\t63\n")
for split in ("train", "test"):
    images("cifar", split, ("cat", "dog"), 32, "RGB", "png")
Image.new("RGB", (120, 32)).save(T / "cifar/test/dog/montage.png")
common = ("--device", "cpu", "--teacher", "resnet8", "--clip", "none", "--views", 1, "--recipe", "one.toml")
(T / "one.toml").write_text("[train-teacher]\nepochs = 1\n")
texts = []
for root, side, whole in (("mnist", 28, True), ("tiny", 64, True), ("cifar", 32, False)):
    r = rk("precompute", "--dataset", f"imagefolder:{root}", *common, "--out", f"{root}.zarr")
    about = json.loads(pathlib.Path(f"{root}.zarr/zarr.json").read_text())["attributes"] if r.returncode == 0 else {}
    found = about.get("image_size"), about.get("dataset", {}).get("embedded")
    said = f"all images have {side}×{side} pixels" in r.stderr if whole else "cifar/test/dog/montage.png has 120×32 pixels" in r.stderr
    texts.append((found == (side, whole) and said, f"{root}: exit {r.returncode}, {found}, {'said' if said else 'not said'}"))
d = rk("distill", "--cache", "mnist.zarr", "--student", "resnet8", "--method", "kd", "--epochs", 1, "--device", "cpu", "--out", "r")
texts.append((d.returncode == 0, f"a student of 28 pixels: exit {d.returncode}"))
print("; ".join(f"{'ok' if ok else 'BAD'} {text}" for ok, text in texts))
sys.exit(0 if all(ok for ok, _ in texts) else 1)
