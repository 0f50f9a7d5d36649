#!/usr/bin/env python3
"""16-bit, 32-bit and float images (I;16, I, F) become white or black.

A teacher learns dark from bright on 8-bit files; the same pictures are its test images in other depths.
Right: each format read as bright as it is (accuracy 100 %), or the files refused or named with their depth.
"""
import atexit, os, pathlib, re, shutil, subprocess, sys, tempfile
import numpy as np
from PIL import Image

T = pathlib.Path(tempfile.mkdtemp(prefix="case05-")); atexit.register(shutil.rmtree, T, True)
os.environ.update(HOME=str(T), RICHKD_HOME=str(T / "home"), OMP_NUM_THREADS="1"); os.chdir(T)
rk = lambda *a: subprocess.run(["richkd", *map(str, a)], capture_output=True, text=True)
g = np.random.default_rng(0)
save = lambda a: lambda path: Image.fromarray(a).save(path)
def pgm(a):
    return lambda path: path.write_bytes(b"P5 48 48 65535\n" + a.astype(">u2").tobytes())
formats = {  # name -> (suffix, what writes v in 0..1)
    "png8": (".png", lambda v: save((255 * v).astype(np.uint8))),
    "png16": (".png", lambda v: save((65535 * v).astype(np.uint16))),
    "float0-1": (".tif", lambda v: save(v.astype(np.float32))),
}
def picture(bright):
    return np.clip((0.66 if bright else 0.33) + 0.12 * g.standard_normal((48, 48)), 0, 1)
for label, name in enumerate(("dark", "light")):
    for folder, n in (("D/train", 40), ("D/val", 10)):
        (T / folder / name).mkdir(parents=True)
        for i in range(n):
            save((255 * picture(label)).astype(np.uint8))(T / folder / name / f"{i}.png")
common = ("--image-size", 32, "--device", "cpu")
rk("train-teacher", "--dataset", "imagefolder:D", *common, "--model", "resnet8", "--epochs", 4, "--out", "t.safetensors")
(T / "M").mkdir(); (T / "M/train").symlink_to(T / "D/train")
for label, name in enumerate(("dark", "light")):
    (T / "M/val" / name).mkdir(parents=True)
    for kind, (suffix, write) in formats.items():
        for i in range(2):
            write(picture(label))(T / "M/val" / name / f"{kind}-{i}{suffix}")
pc = ("precompute", *common, "--teacher", "resnet8", "--teacher-weights", "t.safetensors", "--clip", "none", "--views", 1)
control = rk(*pc, "--dataset", "imagefolder:D", "--out", "d.zarr")
r = rk(*pc, "--dataset", "imagefolder:M", "--out", "m.zarr")
before = r.stderr.split("precompute:")[0]
said = re.search(r"16.bit|bits|I;16|float|mode|depth", before) is not None
text = []
if r.returncode == 0:
    import richkd
    cache = richkd.open_cache("m.zarr")
    labels, logits = cache.read("test/labels"), cache.read("test/teacher_logits")
    kinds = sorted(f"{kind}-{i}{suffix}" for kind, (suffix, _) in formats.items() for i in range(2))
    for kind in formats:  # file j of class c is row 2 j + c
        rows = [2 * j + c for j, file in enumerate(kinds) if file.startswith(f"{kind}-") for c in range(2)]
        right = sum(int(logits[row].argmax()) == int(labels[row]) for row in rows)
        text.append(f"{kind} {100 * right // len(rows)} %")
wrong = [t for t in text if not t.endswith(" 100 %")]
control_ok = "CNN teacher 100.00 %" in control.stderr
ok = control_ok and ((r.returncode == 0 and (not wrong or said)) or (r.returncode == 2 and said))
print(f"{'ok' if ok else 'BAD'}: exit {r.returncode}, {'said' if said else 'nothing said'}; control {control_ok}; {', '.join(text)}")
sys.exit(0 if ok else 1)
