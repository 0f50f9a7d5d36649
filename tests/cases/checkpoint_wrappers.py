#!/usr/bin/env python3
"""one state dict in the wrappings of common trainers.

Right: read as what it is, or refused by a line that names the key or prefix in the way. Where a file has
averaged weights too (timm's state_dict_ema, deit's model_ema), they are used, or it is said which are.
"""
import atexit, os, pathlib, re, shutil, subprocess, sys, tempfile
import numpy as np, torch
from PIL import Image
from safetensors.torch import load_file

T = pathlib.Path(tempfile.mkdtemp(prefix="case10-")); atexit.register(shutil.rmtree, T, True)
os.environ.update(HOME=str(T), RICHKD_HOME=str(T / "home"), OMP_NUM_THREADS="1"); os.chdir(T)
rk = lambda *a: subprocess.run(["richkd", *map(str, a)], capture_output=True, text=True)
g = np.random.default_rng(0)
for split, n in (("train", 40), ("val", 10)):
    for c, name in enumerate(("bird", "cat", "dog")):
        d = T / "D" / split / name; d.mkdir(parents=True)
        for i in range(n):
            a = g.integers(0, 60, (48, 48, 3), dtype=np.uint8); a[:, :, c] += np.uint8(100)
            Image.fromarray(a).save(d / f"{i}.png")
common = ("--dataset", "imagefolder:D", "--image-size", 32, "--device", "cpu")
rk("train-teacher", *common, "--model", "resnet8", "--epochs", 3, "--out", "t.safetensors")
good = load_file("t.safetensors")
other = {k: v[[1, 2, 0]] if k.startswith("fc.") else v for k, v in good.items()}  # 0 % right
under = lambda prefix: {prefix + k: v for k, v in good.items()}
wrappings = {  # name -> (content, what a refusal should name)
    "state_dict": ({"state_dict": good, "epoch": 3}, ""), "module.": (under("module."), ""),
    "net": ({"net": good, "acc": 93.0, "epoch": 3}, "net"), "_orig_mod.": (under("_orig_mod."), "_orig_mod"),
    "state_dict_ema": ({"state_dict": other, "state_dict_ema": good, "epoch": 3}, "ema"),
}
texts = []
for name, (content, names) in wrappings.items():
    torch.save(content, "w.pth")
    r = rk("precompute", *common, "--teacher", "resnet8", "--teacher-weights", "w.pth", "--clip", "none", "--views", 1, "--out", "w.zarr", "--overwrite")
    m = re.search(r"CNN teacher ([\d.]+) %", r.stderr)
    before = r.stderr.split("precompute:")[0]
    said = bool(names) and re.search(rf"(?<![\w]){re.escape(names)}" if names != "ema" else "(?i)ema", before.split("richkd:")[-1]) is not None
    ok = r.returncode == 0 and (float(m[1]) > 95 or said) or r.returncode == 2 and said
    texts.append((ok, f"{name} {m[1] + ' %' if m else 'exit ' + str(r.returncode)}"))
print(", ".join(f"{'ok' if ok else 'BAD'} {text}" for ok, text in texts))
sys.exit(0 if all(ok for ok, _ in texts) else 1)
