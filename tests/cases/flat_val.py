#!/usr/bin/env python3
"""ImageNet's val as it comes (no class folders), and tiny-imagenet's (val/images/* with val_annotations.txt).

Right: refused by a line that says what is wrong with val and how it should be (a folder a class).
"""
import atexit, os, pathlib, re, shutil, subprocess, sys, tempfile
import numpy as np
from PIL import Image

T = pathlib.Path(tempfile.mkdtemp(prefix="casex2-")); atexit.register(shutil.rmtree, T, True)
os.environ.update(HOME=str(T), RICHKD_HOME=str(T / "home"), OMP_NUM_THREADS="1"); os.chdir(T)
rk = lambda *a: subprocess.run(["richkd", *map(str, a)], capture_output=True, text=True)
g = np.random.default_rng(0)
def image(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(g.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(path)
for root in ("flat", "tiny"):
    for name in ("n01440764", "n02012849"):
        for i in range(4):
            image(T / root / "train" / name / f"{i}.JPEG")
for i in range(4):
    image(T / f"flat/val/ILSVRC2012_val_{i + 1:08d}.JPEG")
    image(T / f"tiny/val/images/val_{i}.JPEG")
(T / "tiny/val/val_annotations.txt").write_text("val_0.JPEG\tn01440764\t0\t0\t31\t31\n")
texts = []
for root in ("flat", "tiny"):
    r = rk("train-teacher", "--dataset", f"imagefolder:{root}", "--image-size", 32, "--device", "cpu", "--model", "resnet8", "--epochs", 1, "--out", "t.safetensors")
    last = (r.stderr.strip().splitlines() or [""])[-1]
    says_how = re.search(r"a folder a class|folder (for|of) each class|/CLASS|valprep|one folder per class|class folders, val/", last) is not None
    texts.append((r.returncode == 2 and says_how, f"{root} val: exit {r.returncode}, {last[:110]!r}"))
print("; ".join(f"{'ok' if ok else 'BAD'} {text}" for ok, text in texts))
sys.exit(0 if all(ok for ok, _ in texts) else 1)
