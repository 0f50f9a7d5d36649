#!/usr/bin/env python3
"""the teacher was trained with timm's class order (natural, case-insensitive), not sorted().

Right: said or refused before the blocks (or put right), and no alarm for a teacher in richkd's order.
"""
import atexit, os, pathlib, re, shutil, subprocess, sys, tempfile
import numpy as np
from PIL import Image
from safetensors.torch import load_file, save_file

T = pathlib.Path(tempfile.mkdtemp(prefix="case01-")); atexit.register(shutil.rmtree, T, True)
os.environ.update(HOME=str(T), RICHKD_HOME=str(T / "home"), OMP_NUM_THREADS="1"); os.chdir(T)
rk = lambda *a: subprocess.run(["richkd", *map(str, a)], capture_output=True, text=True)
g = np.random.default_rng(0)

def trial(root, names, timm_rows):
    for split, n in (("train", 40), ("val", 10)):
        for c, name in enumerate(names):
            d = pathlib.Path(root, split, name); d.mkdir(parents=True)
            for i in range(n):
                a = g.integers(0, 60, (48, 48, 3), dtype=np.uint8); a[:, :, c] += np.uint8(100)
                Image.fromarray(a).save(d / f"{i}.png")
    common = ("--dataset", f"imagefolder:{root}", "--image-size", 32, "--device", "cpu")
    rk("train-teacher", *common, "--model", "resnet8", "--epochs", 3, "--out", f"{root}.safetensors")
    own = load_file(f"{root}.safetensors")
    save_file({k: v[timm_rows].contiguous() if k.startswith("fc.") else v for k, v in own.items()}, f"{root}-timm.safetensors")
    found = []
    for weights in (f"{root}.safetensors", f"{root}-timm.safetensors"):
        r = rk("precompute", *common, "--teacher", "resnet8", "--teacher-weights", weights, "--clip", "none",
               "--views", 2, "--out", f"{weights}.zarr")
        before = r.stderr.split("precompute:")[0]
        said = re.search(r"order|chance|permut|disagree|agree", before) is not None
        m = re.search(r"CNN teacher ([\d.]+) %", r.stderr.split("complete")[-1])
        found.append((r.returncode, said, float(m[1]) if m else None))
    (rc, alarm, accuracy), (rc2, said, wrong) = found
    control = rc == 0 and accuracy is not None and accuracy > 95
    right = control and (rc2 == 2 or said or (wrong or 0) > 95)
    return right, f"{','.join(names)}: {wrong} % by rows in timm's order ({accuracy} % by those in richkd's), exit {rc2}, {'said' if said else 'nothing said'} before the blocks"

one = trial("D", sorted(["class1", "class2", "class10"]), [0, 2, 1])  # richkd: 1, 10, 2
print("; ".join(("ok " if ok else "BAD ") + text for ok, text in (one,)))
sys.exit(0 if one[0] else 1)
