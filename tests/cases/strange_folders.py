#!/usr/bin/env python3
"""what NAS, Jupyter, macOS and Windows leave in folders of images, and a link to the folder itself.

Right: 40 training images of 2 classes as without it, or the count differs and the path is named, or refused by its name.
"""
import atexit, os, pathlib, re, shutil, subprocess, sys, tempfile
import numpy as np
from PIL import Image

T = pathlib.Path(tempfile.mkdtemp(prefix="case13-")); atexit.register(shutil.rmtree, T, True)
os.environ.update(HOME=str(T), RICHKD_HOME=str(T / "home"), OMP_NUM_THREADS="1"); os.chdir(T)
rk = lambda *a: subprocess.run(["richkd", *map(str, a)], capture_output=True, text=True)
g = np.random.default_rng(0)
for split, n in (("train", 20), ("val", 5)):
    for name in ("cat", "dog"):
        d = T / "D" / split / name; d.mkdir(parents=True)
        for i in range(n):
            Image.fromarray(g.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(d / f"{i}.jpg")
rk("train-teacher", "--dataset", "imagefolder:D", "--image-size", 32, "--device", "cpu", "--model", "resnet8", "--epochs", 1, "--out", "t.safetensors")
fork = b"\0\5\x16\7\0\2\0\0Mac OS X        " + bytes(100)  # as the beginning of an AppleDouble file
def add(path, content=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes((T / "D/train/cat/0.jpg").read_bytes() if content is None else content)
strange = {  # path in train (and val, where it starts with both:)
    "cat/@eaDir/0.jpg/THUMB.jpg": None, "both:.ipynb_checkpoints/0.jpg": None,
}
texts = []
for number, (where, content) in enumerate(strange.items()):
    root = T / f"X{number}"; shutil.copytree(T / "D", root)
    path = where.removeprefix("both:")
    for split in ("train", "val") if where.startswith("both:") else ("train",):
        if content == "link":
            (root / split / path).symlink_to("../cat")
        else:
            add(root / split / path, content)
    r = rk("precompute", "--dataset", f"imagefolder:{root.name}", "--image-size", 32, "--device", "cpu", "--teacher", "resnet8",
           "--teacher-weights", "t.safetensors", "--clip", "none", "--views", 1, "--out", f"{root.name}.zarr")
    m = re.search(r"([\d,]+) training .*, (\d+) classes", r.stderr)
    same = r.returncode == 0 and m is not None and m.groups() == ("40", "2")
    first = path.split("/")[0] if where.startswith("both:") else path.split("/")[1]
    named = first in r.stderr.replace(f"cat/0.jpg", "")
    # a word on what was left in is enough for pictures, not for a loop of links that repeats a class
    ok = same or named and (r.returncode == 2 if content == "link" else content is None)
    texts.append((ok, f"{path}{' in both' * where.startswith('both:')}: exit {r.returncode}, {m[1] + ' images of ' + m[2] if m else 'refused'}{', named' * named}"))
print("; ".join(f"{'ok' if ok else 'BAD'} {text}" for ok, text in texts))
sys.exit(0 if all(ok for ok, _ in texts) else 1)
