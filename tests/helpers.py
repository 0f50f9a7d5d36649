"""Writers of small real files, and what tests ask of folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch

import richkd
from richkd.data.views import PadCropFlip
from richkd.models.weights import save_tensors
from richkd.store import schema
from richkd.store.writer import StoreWriter

TINY_CLIP = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8, "head_width": 32},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


def write_clip(folder: Path, seed: int = 0, **model_cfg: Any) -> Path:
    """An open_clip model of random weights in the layout that open_clip reads from a directory."""
    folder.mkdir(parents=True)
    config = {**TINY_CLIP, **model_cfg}
    torch.manual_seed(seed)
    model = open_clip.CLIP(**config)
    preprocess = {"mean": [0.48, 0.45, 0.40], "std": [0.26, 0.26, 0.27]}
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": config, "preprocess_cfg": preprocess})
    )
    save_tensors(folder / "open_clip_model.safetensors", model.state_dict())
    return folder


def write_teacher(path: Path, name: str, num_classes: int, seed: int = 0) -> Path:
    """Weights of a network that was not trained but whose batch norms have seen some noise."""
    torch.manual_seed(seed)
    model = richkd.create_model(name, num_classes).train()
    with torch.no_grad():
        for _ in range(10):
            model(torch.randn(32, 3, 32, 32))
    save_tensors(path, model.state_dict())
    return path


def write_random_store(
    path: Path, like: Path, num_samples: int, num_classes: int, image_size: int
) -> Path:
    """A complete f32 store without CLIP features of its own sizes, filled with random rows."""
    rng = np.random.default_rng(0)
    manifest: Any = {**richkd.open_cache(like).manifest, "complete": False, "dtype": "float32"}
    manifest["dataset"] |= {"num_train": num_samples, "num_test": 100}
    manifest["class_names"] = [f"class {number}" for number in range(num_classes)]
    manifest |= {"image_size": image_size, "block": 2048}
    with StoreWriter.open(path, manifest, overwrite=False) as writer:
        writer.put("train/view_ids", PadCropFlip().draw(0, num_samples, manifest["views"]["count"]))
        writer.put("text/embeddings", np.ones((num_classes, 12, 24), np.float32))
        for block in writer.blocks:
            rows: dict[str, torch.Tensor] = {}
            specs = schema.array_specs(manifest)
            for name, spec in specs.items():
                split, _, short = name.partition("/")
                views = spec.dimensions[:1] == ("view",)
                if split != block.split or short == "view_ids":
                    continue
                if views != (block.view is not None):
                    continue
                shape = (block.stop - block.start, *spec.shape[2 if views else 1 :])
                if short == "labels":
                    rows[short] = torch.from_numpy(rng.integers(0, num_classes, shape))
                elif short == "images":
                    rows[short] = torch.from_numpy(rng.integers(0, 256, shape, np.uint8))
                else:
                    rows[short] = torch.from_numpy(rng.normal(size=shape).astype(np.float32))
            writer.write(block, rows)
    writer.finish(0.5, 0.5, 0.5)
    return path


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its bytes."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
