#!/usr/bin/env python3
"""folders that become one and the same name for CLIP: crane (bird and machine), 001.Cat and 002.Cat, …

Right: refused, or the classes named before the blocks, or names made that differ.
"""
import atexit, os, pathlib, re, shutil, subprocess, sys, tempfile
import numpy as np, torch
from PIL import Image

T = pathlib.Path(tempfile.mkdtemp(prefix="case12-")); atexit.register(shutil.rmtree, T, True)
os.environ.update(HOME=str(T), RICHKD_HOME=str(T / "home"), OMP_NUM_THREADS="1"); os.chdir(T)
rk = lambda *a: subprocess.run(["richkd", *map(str, a)], capture_output=True, text=True)
from richkd.data import shapes
from richkd.teachers.tiny_clip import train_tiny_clip
drawn = shapes.draw(64, seed=9)
train_tiny_clip(torch.from_numpy(drawn.images), drawn.captions, T / "clip", epochs=1, batch_size=32)
g = np.random.default_rng(0)
def trial(root, names, *more):
    for split in ("train", "val"):
        for name in names:
            d = T / root / split / name; d.mkdir(parents=True)
            for i in range(4):
                Image.fromarray(g.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(d / f"{i}.png")
    common = ("--dataset", f"imagefolder:{root}", "--image-size", 32, "--device", "cpu")
    rk("train-teacher", *common, "--model", "resnet8", "--epochs", 1, "--out", f"{root}.safetensors")
    r = rk("precompute", *common, "--teacher", "resnet8", "--teacher-weights", f"{root}.safetensors", "--clip", T / "clip",
           "--prompts", "single", "--views", 1, "--out", f"{root}.zarr", *more)
    said = re.search(r"same name|both|twice|identical|collide|duplicate|alike|share", r.stderr.split("precompute:")[0]) is not None
    alike = None
    if r.returncode == 0:
        import richkd
        rows = torch.as_tensor(richkd.open_cache(f"{root}.zarr").read("text/embeddings")).flatten(1)
        alike = len(rows) - len(rows.unique(dim=0))
    return r.returncode, said, alike
(T / "names.txt").write_text("heron\nheron\n")
trials = {
    "distinct": trial("A", ["cat", "dog"]), "n02012849 n03126707": trial("B", ["n02012849", "n03126707"]),
    "001.Cat 002.Cat": trial("C", ["001.Cat", "002.Cat"]), "polar_bear PolarBear": trial("D", ["polar_bear", "PolarBear"]),
    "10_euro 20_euro": trial("E", ["10_euro", "20_euro"]), "names file, heron twice": trial("F", ["x", "y"], "--class-names", "names.txt"),
}
ok = {name: (rc == 0 and not said and alike == 0) if name == "distinct" else (rc == 2 and said or said or alike == 0) for name, (rc, said, alike) in trials.items()}
print("; ".join(f"{'ok' if ok[n] else 'BAD'} {n}: exit {rc}, {'said' if said else 'nothing said'}, {alike} text rows like another" for n, (rc, said, alike) in trials.items()))
sys.exit(0 if all(ok.values()) else 1)
