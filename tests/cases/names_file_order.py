#!/usr/bin/env python3
"""folders 0..11 and --class-names, a line a class in numeric order: names go to other classes.

Right: refused, put right, or the preview shows which folder each name went to.
"""
import atexit, json, os, pathlib, re, shutil, subprocess, sys, tempfile
import numpy as np
from PIL import Image

T = pathlib.Path(tempfile.mkdtemp(prefix="case01b-")); atexit.register(shutil.rmtree, T, True)
os.environ.update(HOME=str(T), RICHKD_HOME=str(T / "home"), OMP_NUM_THREADS="1"); os.chdir(T)
rk = lambda *a: subprocess.run(["richkd", *map(str, a)], capture_output=True, text=True)
from richkd.data import shapes
from richkd.teachers.tiny_clip import train_tiny_clip
import torch
drawn = shapes.draw(64, seed=9)
train_tiny_clip(torch.from_numpy(drawn.images), drawn.captions, T / "clip", epochs=1, batch_size=32)
g = np.random.default_rng(0)
for split in ("train", "val"):
    for c in range(12):
        d = T / "N" / split / str(c); d.mkdir(parents=True)
        for i in range(4):
            Image.fromarray(g.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(d / f"{i}.png")
names = "zero one two three four five six seven eight nine ten eleven".split()
(T / "names.txt").write_text("\n".join(names) + "\n")
common = ("--dataset", "imagefolder:N", "--image-size", 32, "--device", "cpu", "--class-names", "names.txt")
rk("train-teacher", *common, "--model", "resnet8", "--epochs", 1, "--out", "t.safetensors")
r = rk("precompute", *common, "--teacher", "resnet8", "--teacher-weights", "t.safetensors", "--clip", T / "clip",
       "--prompts", "single", "--views", 1, "--out", "n.zarr")
before = r.stderr.split("precompute:")[0]
shown = next((l for l in before.splitlines() if l.startswith("classes:")), "(no line)")
got = json.loads(rk("inspect", "n.zarr", "--json").stdout or "{}") if r.returncode == 0 else {}
stored = json.loads((T / "n.zarr/zarr.json").read_text())["attributes"] if r.returncode == 0 else {}
text = json.dumps(stored)
found = re.search(r'"class_names": \[([^\]]*)\]', text)
listed = [n.strip(' "') for n in found[1].split(",")] if found else []
of_10 = dict(zip(sorted(map(str, range(12))), listed)).get("10")
pairs = re.search(r"\b10\b[^,;\n]{0,12}\b(two|ten)\b", before) is not None  # folder beside its name
refused = r.returncode == 2 and "order" in r.stderr
right = refused or of_10 == "ten" or pairs
print(f"{'ok' if right else 'BAD'}: exit {r.returncode}; folder 10 is called {of_10!r}; preview: {shown!r}")
sys.exit(0 if right else 1)
