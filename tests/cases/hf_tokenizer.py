#!/usr/bin/env python3
"""a CLIP whose config names a Hugging Face tokenizer, where `transformers` is not installed.

Right: refused with `pip install transformers` (and tokenizer files, for a directory), for names of
open_clip before anything is downloaded.
"""
import atexit, importlib.util, json, os, pathlib, shutil, subprocess, sys, tempfile
import torch

T = pathlib.Path(tempfile.mkdtemp(prefix="case03-")); atexit.register(shutil.rmtree, T, True)
os.environ.update(HOME=str(T), RICHKD_HOME=str(T / "home"), OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1"); os.chdir(T)
rk = lambda *a: subprocess.run(["richkd", *map(str, a)], capture_output=True, text=True)
from richkd.data import shapes
from richkd.teachers.tiny_clip import train_tiny_clip
drawn = shapes.draw(64, seed=9)
train_tiny_clip(torch.from_numpy(drawn.images), drawn.captions, T / "clip", epochs=1, batch_size=32)
config = json.loads((T / "clip/open_clip_config.json").read_text())
config["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = "some/tokenizer"
(T / "clip/open_clip_config.json").write_text(json.dumps(config))
rk("train-teacher", "--dataset", "shapes", "--limit", 32, "--model", "resnet8", "--epochs", 1, "--device", "cpu", "--out", "t.safetensors")
common = ("precompute", "--dataset", "shapes", "--limit", 32, "--teacher", "resnet8", "--teacher-weights", "t.safetensors",
          "--views", 1, "--device", "cpu", "--out", "s.zarr", "--clip")
absent = importlib.util.find_spec("transformers") is None
here, named = rk(*common, T / "clip"), rk(*common, "ViT-B-16-SigLIP2:webli")
last = lambda r: (r.stderr.strip().splitlines() or [""])[-1]
names = lambda r: r.returncode == 2 and ("pip install" in last(r) and "transformers" in last(r) or not absent)
right_here = names(here) and "check its config and weights" not in last(here)
right_named = names(named) and "download" not in last(named)
ok = right_here and right_named
print(f"{'ok' if ok else 'BAD'}: directory: exit {here.returncode}, {last(here)[-75:]!r}; ViT-B-16-SigLIP2:webli: exit {named.returncode}, "
      f"{'names' if 'transformers' in last(named) else 'does not name'} transformers before the download")
sys.exit(0 if ok else 1)
