#!/usr/bin/env python3
"""photos whose EXIF orientation says how to turn them; every viewer shows them upright.

Classes are "bright above" and "bright below", of 60 x 40 px. Right: all orientations 100 %, as 1.
"""
import atexit, os, pathlib, re, shutil, subprocess, sys, tempfile
import numpy as np
from PIL import Image, ImageOps

T = pathlib.Path(tempfile.mkdtemp(prefix="case08-")); atexit.register(shutil.rmtree, T, True)
os.environ.update(HOME=str(T), RICHKD_HOME=str(T / "home"), OMP_NUM_THREADS="1"); os.chdir(T)
rk = lambda *a: subprocess.run(["richkd", *map(str, a)], capture_output=True, text=True)
g = np.random.default_rng(0)
undone = {1: None, 3: Image.ROTATE_180, 6: Image.ROTATE_90}
def picture(below):
    a = g.integers(0, 60, (40, 60, 3), dtype=np.uint8)
    a[20 * below:20 * below + 20] += 150
    return Image.fromarray(a)
names = ("above", "below")
for label, name in enumerate(names):
    for folder, n in (("D/train", 40), ("D/val", 10)):
        (T / folder / name).mkdir(parents=True)
        for i in range(n):
            picture(label).save(T / folder / name / f"{i}.png")
common = ("--image-size", 32, "--device", "cpu")
rk("train-teacher", "--dataset", "imagefolder:D", *common, "--model", "resnet8", "--epochs", 5, "--out", "t.safetensors")
(T / "M").mkdir(); (T / "M/train").symlink_to(T / "D/train")
kinds = [f"{suffix}-{k}.{suffix}" for suffix in ("jpg",) for k in undone]
for label, name in enumerate(names):
    (T / "M/val" / name).mkdir(parents=True)
    for kind in kinds:
        suffix, k = kind.split(".")[1], int(kind.split("-")[1][0])
        upright = picture(label)
        exif = Image.Exif(); exif[0x0112] = k
        upright.transpose(undone[k]).save(T / "M/val" / name / kind, exif=exif) if k > 1 else upright.save(T / "M/val" / name / kind, exif=exif)
        with Image.open(T / "M/val" / name / kind) as image:
            shown = np.asarray(ImageOps.exif_transpose(image).convert("L"), int)
        assert np.abs(shown - np.asarray(upright.convert("L"), int)).mean() < 15, kind
pc = ("precompute", *common, "--teacher", "resnet8", "--teacher-weights", "t.safetensors", "--clip", "none", "--views", 1)
control = rk(*pc, "--dataset", "imagefolder:D", "--out", "d.zarr")
r = rk(*pc, "--dataset", "imagefolder:M", "--out", "m.zarr")
said = re.search(r"orientation|EXIF|rotat|turned", r.stderr.split("precompute:")[0]) is not None
right = {k: 0 for k in undone}
if r.returncode == 0:
    import richkd
    cache = richkd.open_cache("m.zarr")
    labels, logits = cache.read("test/labels"), cache.read("test/teacher_logits")
    for j, kind in enumerate(sorted(kinds)):  # file j of class c is row 2 j + c
        for c in range(2):
            right[int(kind.split("-")[1][0])] += int(logits[2 * j + c].argmax()) == int(labels[2 * j + c]) == c
control_ok = "CNN teacher 100.00 %" in control.stderr
ok = control_ok and (r.returncode == 2 and said or all(n == 2 for n in right.values()))
print(f"{'ok' if ok else 'BAD'}: exit {r.returncode}, {'said' if said else 'nothing said'}; control {control_ok}; right of 2 by orientation "
      + ", ".join(f"{k}: {n}" for k, n in right.items()))
sys.exit(0 if ok else 1)
