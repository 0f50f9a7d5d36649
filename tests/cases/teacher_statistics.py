#!/usr/bin/env python3
"""a timm teacher whose pretrained_cfg has mean = std = 0.5, trained outside with those, on a folder.

Right: fed as it was trained (or a word on the statistics before the blocks); a teacher that richkd
trained itself keeps its accuracy.
"""
import atexit, os, pathlib, re, shutil, subprocess, sys, tempfile
import numpy as np, timm, torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

T = pathlib.Path(tempfile.mkdtemp(prefix="case02-")); atexit.register(shutil.rmtree, T, True)
os.environ.update(HOME=str(T), RICHKD_HOME=str(T / "home"), OMP_NUM_THREADS="1"); os.chdir(T); torch.set_num_threads(1)
rk = lambda *a: subprocess.run(["richkd", *map(str, a)], capture_output=True, text=True)
g = np.random.default_rng(0)
for split, n in (("train", 40), ("val", 20)):
    for c, level in enumerate((60, 110, 160, 210)):  # classes are shades of grey
        d = T / "G" / split / f"grey{c}"; d.mkdir(parents=True)
        for i in range(n):
            Image.fromarray((level + g.integers(-15, 16, (48, 48, 3))).astype(np.uint8)).save(d / f"{i}.png")
torch.manual_seed(0)
model = timm.create_model("test_resnet", num_classes=4)
transform = timm.data.create_transform(**{**timm.data.resolve_data_config({}, model=model), "input_size": (3, 32, 32)})
def load(split):
    pairs = [(transform(Image.open(p)), c) for c in range(4) for p in sorted((T / "G" / split / f"grey{c}").iterdir())]
    return torch.stack([x for x, _ in pairs]), torch.tensor([y for _, y in pairs])
(x, y), (xv, yv) = load("train"), load("val")
optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
for _ in range(12):
    model.train()
    for batch in torch.randperm(len(x)).split(32):
        loss = F.cross_entropy(model(x[batch]), y[batch]); optimizer.zero_grad(); loss.backward(); optimizer.step()
model.eval()
with torch.no_grad():
    own = 100 * (model(xv).argmax(1) == yv).float().mean().item()
save_file({k: v.contiguous() for k, v in model.state_dict().items()}, "outside.safetensors")
common = ("--dataset", "imagefolder:G", "--image-size", 32, "--device", "cpu")
rk("train-teacher", *common, "--model", "test_resnet", "--epochs", 6, "--lr", 0.02, "--out", "inside.safetensors")
found = {}
for name in ("outside", "inside"):
    r = rk("precompute", *common, "--teacher", "test_resnet", "--teacher-weights", f"{name}.safetensors",
           "--clip", "none", "--views", 1, "--out", f"{name}.zarr")
    m = re.search(r"CNN teacher ([\d.]+) %", r.stderr)
    said = re.search(r"mean|normali[sz]|statistic", r.stderr.split("precompute:")[0]) is not None
    found[name] = r.returncode, float(m[1]) if m else None, said
rc, got, said = found["outside"]
from safetensors import safe_open
with safe_open("inside.safetensors", "pt") as f:
    inside = 100 * float(f.metadata()["test_accuracy"])
control = found["inside"][0] == 0 and abs((found["inside"][1] or 0) - inside) <= 5
right = control and own > 90 and (rc == 2 or said or (got or 0) >= own - 5)
print(f"{'ok' if right else 'BAD'}: CNN teacher {got} % in the store, {own:.2f} % as timm feeds it (mean 0.5, std 0.5); exit {rc}, "
      f"{'said' if said else 'nothing said'}; own teacher {found['inside'][1]} % of {inside:.2f} %")
sys.exit(0 if right else 1)
