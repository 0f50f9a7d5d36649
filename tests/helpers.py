"""Writers of small real files, and comparisons of folders."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import re
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import load_file

import richkd
from richkd.core.errors import RichKDError
from richkd.data.datasets import Dataset
from richkd.data.views import PadCropFlip
from richkd.models.weights import save_tensors
from richkd.store import schema
from richkd.store.locations import open_location
from richkd.store.reader import TeacherCache
from richkd.store.writer import open_writer


class Refusal(str):
    """The line of an error that the user can fix, and its `code`, which may be empty."""

    code: str


def refusal(err: str) -> Refusal:
    """Return the error that ended a command, from its standard error."""
    line = err.strip().splitlines()[-1]
    assert line.startswith("richkd: "), err
    found = re.search(r" \[([a-z0-9-]+)\]$", line)
    error = Refusal(line)
    error.code = found[1] if found else ""
    return error


@contextmanager
def refuses(code: str, *values: object) -> Iterator[None]:
    """Check that the block raises a RichKDError of this code whose message contains the values."""
    with pytest.raises(RichKDError) as caught:
        yield
    error = caught.value
    assert error.code == code, (error.code, str(error))
    assert all(str(value) in str(error) for value in values), str(error)


def slow(*values: object) -> list[Any]:
    """Return values to parametrize a test with that are left to CI."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


# folders that name classes of ImageNet in every way, and their rows in its head of 1,000
FOLDERS = {
    "n01440764": 0,
    "Goldfish": 1,
    "great_white-shark": 2,
    "tiger shark": 3,
    "hen": 8,
    "Struthio camelus": 9,
    "brambling": 10,
    "bullfrog": 30,
}

TINY_CLIP = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8, "head_width": 32},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


def write_clip(folder: Path, seed: int = 0, **model_cfg: Any) -> Path:
    """Write an open_clip model of random weights to a directory that open_clip can read."""
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
    """Write weights of an untrained network whose batch norms have seen some noise."""
    torch.manual_seed(seed)
    model = richkd.create_model(name, num_classes).train()
    with torch.no_grad():
        for _ in range(10):
            model(torch.randn(32, 3, 32, 32))
    save_tensors(path, model.state_dict())
    return path


def published(hub: Path, name: str, architecture: str = "", **config: Any) -> torch.nn.Module:
    """Write a network with random weights in all of its parts to a cache of the hub, and return it.

    Args:
        hub: the cache, in the layout of the hub's client.
        name: as users write it.
        architecture: the network's name in timm; by default the same.
        config: its `num_classes`, and what its published configuration states.
    """
    import timm

    torch.manual_seed(len(name))
    classes = {"num_classes": config.pop("num_classes")} if "num_classes" in config else {}
    model = timm.create_model(architecture or name.removeprefix("timm/"), **classes).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                assert module.running_mean is not None and module.running_var is not None
                module.running_mean.normal_(0, 0.2)
                module.running_var.uniform_(0.5, 2)
        for parameter in model.get_classifier().parameters():
            parameter.normal_()
    plain = name.removeprefix("hf-hub:")
    repository = plain if "/" in plain else f"timm/{plain}"
    folder, revision = hub / f"models--{repository.replace('/', '--')}", "0123456789" * 4
    (folder / "refs").mkdir(parents=True)
    (folder / "refs/main").write_text(revision)
    snapshot = folder / "snapshots" / revision
    timm.models.save_for_hf(model, str(snapshot), safe_serialization=True)
    written = json.loads((snapshot / "config.json").read_text())
    written["pretrained_cfg"] |= config
    (snapshot / "config.json").write_text(json.dumps(written))
    return model


def stage_one_of(out: Path, dataset: str, teacher: str, **settings: Any) -> TeacherCache:
    """Write a small cache of one teacher; settings as of Precompute, and `block`."""
    from richkd.config.settings import Precompute
    from richkd.precompute import precompute

    given: dict[str, Any] = {"clip": "none", "views": 2, "device": "cpu"}
    if dataset.startswith("imagefolder:"):
        given["image_size"] = 32
    given |= {"dataset": dataset, "teacher": teacher, "out": str(out), **settings}
    block = given.pop("block", None)
    return precompute(Precompute(**given), block=block)


def write_photos(
    folder: Path, classes: Iterable[str], rng: np.random.Generator, *, train: int, test: int
) -> Path:
    """Write a folder of photographs in odd sizes: fields of colour, of another range a class."""
    for split, count in (("train", train), ("test", test)):
        for number, name in enumerate(classes):
            (folder / split / name).mkdir(parents=True)
            low = 20 * number % 160
            for photo in range(count):
                width, height = map(int, rng.integers(40, 200, 2))
                coarse = Image.fromarray(rng.integers(low, low + 90, (5, 6, 3), np.uint8))
                field = coarse.resize((width, height), Image.Resampling.BICUBIC)
                field.save(folder / split / name / f"{photo}.png")
    return folder


def write_cifar100(root: Path, monkeypatch: pytest.MonkeyPatch, train: int, test: int) -> None:
    """Write an archive in CIFAR-100's layout, and replace the published checksums by its own."""
    rng = np.random.default_rng(0)
    names = [f"class_{number:02d}" for number in range(100)]
    files = {"meta": {"fine_label_names": names, "coarse_label_names": ["x"]}}
    for part, count in (("train", train), ("test", test)):
        files[part] = {
            "data": rng.integers(0, 256, (count, 3072), np.uint8),
            "fine_labels": rng.permutation(np.arange(count) % 100).tolist(),
            "coarse_labels": [0] * count,
            "filenames": [f"{i}.png" for i in range(count)],
        }
    content = {name: pickle.dumps(value, protocol=2) for name, value in files.items()}
    root.mkdir(parents=True, exist_ok=True)
    archive = root / "cifar-100-python.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for name, data in content.items():
            entry = tarfile.TarInfo(f"cifar-100-python/{name}")
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))

    def md5(data: bytes) -> str:
        return hashlib.md5(data).hexdigest()

    reader = torchvision.datasets.CIFAR100
    monkeypatch.setattr(reader, "tgz_md5", md5(archive.read_bytes()))
    monkeypatch.setattr(reader, "train_list", [["train", md5(content["train"])]])
    monkeypatch.setattr(reader, "test_list", [["test", md5(content["test"])]])
    monkeypatch.setattr(reader, "meta", {**reader.meta, "md5": md5(content["meta"])})


def write_random_store(
    path: Path,
    like: Path,
    num_samples: int,
    num_classes: int,
    image_size: int,
    dataset: Dataset | None = None,
) -> Path:
    """Write a complete float32 cache of the given sizes, filled with random rows.

    Args:
        path: of the new cache.
        like: a cache whose manifest is copied but for the sizes.
        num_samples: of the training split.
        num_classes: in place of those of `like`.
        image_size: in pixels.
        dataset: an image folder for the labels and views; random images are embedded without one.
    """
    rng = np.random.default_rng(0)
    manifest: Any = {**richkd.open_cache(like).manifest, "complete": False, "dtype": "float32"}
    manifest["dataset"] |= {"num_train": num_samples, "num_test": 100}
    manifest["class_names"] = [f"class {number}" for number in range(num_classes)]
    manifest |= {"image_size": image_size, "block": schema.choose_block(num_classes, "float32")}
    space: Any = PadCropFlip()
    labels = {}
    if dataset is not None:
        space = dataset.train.view_space
        labels = {"train": dataset.train.labels, "test": dataset.test.labels}
        manifest["views"] |= {"space": space.name}
        manifest["dataset"] |= {
            "name": dataset.name,
            "fingerprint": dataset.fingerprint,
            "embedded": False,
            "num_test": len(dataset.test),
        }
    views = f"train/{space.array}"
    known = {
        views: space.draw(0, num_samples, manifest["views"]["count"]),
        "text/embeddings": np.ones((num_classes, 12, 24), np.float32),
    }
    with open_writer(open_location(path), manifest, known) as writer:
        for block in writer.blocks:
            rows: dict[str, torch.Tensor] = {}
            specs = schema.array_specs(manifest)
            for name, spec in specs.items():
                split, _, short = name.partition("/")
                with_views = spec.dimensions[:1] == ("view",)
                if split != block.split or name == views:
                    continue
                if with_views != (block.view is not None):
                    continue
                shape = (block.stop - block.start, *spec.shape[2 if with_views else 1 :])
                if short == "labels" and labels:
                    rows[short] = labels[split][block.start : block.stop]
                elif short == "labels":
                    rows[short] = torch.from_numpy(rng.integers(0, num_classes, shape))
                elif short == "images":
                    rows[short] = torch.from_numpy(rng.integers(0, 256, shape, np.uint8))
                else:
                    rows[short] = torch.from_numpy(rng.normal(size=shape).astype(np.float32))
            writer.write(block, rows)
        writer.finish(0.5, 0.5, 0.5)
    return path


def tree(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder with its bytes."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def changed(was: dict[str, bytes], now: dict[str, bytes]) -> list[str]:
    """Return the names of files that differ between two trees."""
    return sorted(name for name in {*was, *now} if was.get(name) != now.get(name))


def exact(run: Path) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]], dict[str, Any]]:
    """Return what two runs of one command have in common: weights, metrics and summary."""
    timed = {"seconds", "images_per_second", "slab_wait_s", "image_wait_s", "run"}
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    metrics = [{key: value for key, value in line.items() if key not in timed} for line in lines]
    summary = json.loads((run / "summary.json").read_text())
    return (
        load_file(run / "last.safetensors"),
        metrics,
        {key: value for key, value in summary.items() if key not in timed},
    )


def assert_same_run(a: Path, b: Path) -> None:
    (weights, *rest), (other, *others) = exact(a), exact(b)
    assert weights.keys() == other.keys()
    assert all(torch.equal(weights[name], other[name]) for name in weights), (a, b)
    assert rest == others
