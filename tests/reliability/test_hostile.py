"""Files from elsewhere run no code, write nowhere else and do not fill the memory."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import Forks, interrupted
from helpers import Refusal, refuses, tree

from richkd.models.weights import save_tensors
from richkd.store.checksums import metadata_digest, write_sealed
from richkd.store.locations import open_location
from richkd.store.manifest import read_manifest

Run = Callable[..., Any]
Fails = Callable[..., Refusal]
pytestmark = pytest.mark.fault


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.fixture
def bombs(tmp_path: Path) -> tuple[Path, Path, Path]:
    """A bare pickle, one by torch.save, and the folder that they make when they are loaded."""
    crater = tmp_path / "crater"
    bare, zipped = tmp_path / "bare.pth", tmp_path / "zipped.pth"
    bare.write_bytes(pickle.dumps({"model": Bomb(crater)}))
    torch.save({"model": Bomb(crater)}, zipped)
    pickle.loads(bare.read_bytes())
    assert crater.exists()  # they are bombs
    crater.rmdir()
    return bare, zipped, crater


def test_pickle_bombs_as_teacher_weights(
    fails: Fails, bombs: tuple[Path, Path, Path], store: Path, clip_dir: Path, tmp_path: Path
) -> None:
    *files, crater = bombs
    for file in files:
        line = fails(
            "precompute",
            "--dataset",
            "shapes",
            "--limit",
            16,
            "--teacher",
            "resnet8",
            "--teacher-weights",
            file,
            "--clip",
            clip_dir,
            "--out",
            tmp_path / "s.zarr",
        )
        assert line.code == "weights-unsafe" and str(file) in line
        fails("verify", store, "--teacher", file)
    assert not crater.exists() and not (tmp_path / "s.zarr").exists()


@pytest.mark.parametrize("name", ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"])
def test_pickle_bombs_as_clip_weights(
    fails: Fails,
    bombs: tuple[Path, Path, Path],
    clip_dir: Path,
    shapes_teacher: Path,
    tmp_path: Path,
    name: str,
) -> None:
    *files, crater = bombs
    for number, file in enumerate(files):
        clip = tmp_path / f"clip-{number}"
        clip.mkdir()
        shutil.copy(clip_dir / "open_clip_config.json", clip)
        shutil.copy(file, clip / name)
        fails(
            "precompute",
            "--dataset",
            "shapes",
            "--limit",
            16,
            "--teacher",
            "resnet8",
            "--teacher-weights",
            shapes_teacher,
            "--clip",
            clip,
            "--out",
            tmp_path / "s.zarr",
        )
    assert not crater.exists() and not (tmp_path / "s.zarr").exists()


def test_pickle_bombs_as_a_checkpoint_and_as_weights_of_a_run(
    run: Run, fails: Fails, bombs: tuple[Path, Path, Path], store: Path, tmp_path: Path
) -> None:
    *files, crater = bombs
    words = [
        "distill",
        "--cache",
        store,
        "--student",
        "resnet8",
        "--epochs",
        2,
        "--batch-size",
        16,
        "--device",
        "cpu",
        "--method",
        "kd",
        "--out",
        tmp_path / "run",
    ]

    with interrupted("richkd.training.run_folder:RunFolder.finish", before=True):
        assert run(*words).code == 130
    for name, file in zip(("checkpoint", "previous"), files, strict=True):
        shutil.copy(file, tmp_path / "run" / f"{name}.safetensors")
    assert fails(*words, "--resume").code == "checkpoint-unreadable"
    assert run(*words, "--overwrite").code == 0
    shutil.copy(files[1], tmp_path / "run" / "last.safetensors")
    assert fails("export", tmp_path / "run").code == "weights-damaged"
    assert not crater.exists()


NASTY = [
    "a\x1b[31mred",
    "[bold]markup[/bold]",
    "<script>alert(1)</script>",
    "../../outside",
    "</script><img src=x onerror=alert(1)>",
]


def test_names_with_markup_and_paths(run: Run, fails: Fails, store: Path, tmp_path: Path) -> None:
    """Class names in a cache and names in a recipe are text, wherever they are shown."""
    copy = tmp_path / "inside" / "nasty.zarr"
    shutil.copytree(store, copy)
    manifest: Any = read_manifest(copy)
    manifest["class_names"][: len(NASTY)] = NASTY
    manifest["dataset"]["name"] = "<script>alert(1)</script>/../x"
    write_sealed(open_location(copy), manifest)
    recipe = tmp_path / "inside" / "r.toml"
    recipe.write_text('about = "<script>alert(2)</script>"\n[distill]\nbatch_size = 16\n')
    runs = tmp_path / "inside" / "runs"
    before = set(tmp_path.iterdir())
    done = run(
        "distill",
        "--cache",
        copy,
        "--recipe",
        recipe,
        "--student",
        "resnet8",
        "--method",
        "kd",
        "--epochs",
        1,
        "--device",
        "cpu",
        "--out",
        runs / "<b>run<",
    )
    assert done.code == 0, done.err
    shown = run("inspect", copy)
    assert shown.code == 0 and "\x1b" not in shown.out and "[bold]markup" in shown.out
    assert run("report", runs).code == 0
    page = (runs / "report.html").read_text()
    body = page[page.index("<body>") :]
    assert "alert(1)" not in body and "<b>run" not in body
    assert set(tmp_path.iterdir()) == before
    line = fails("distill", "--cache", copy, "--recipe", "../../outside")
    assert "outside" in line


def test_archive_members_do_not_leave_their_folder(store: Path, tmp_path: Path) -> None:
    """Names of tensors are not paths: weights with such names belong to another network."""
    from richkd.models import create_model
    from richkd.models.weights import load_into, read_weights

    path = tmp_path / "w.safetensors"
    save_tensors(path, {"../../outside": torch.ones(2)})
    with refuses("weights-other-architecture", path):
        load_into(create_model("resnet8", 16), read_weights(path), "resnet8", path)
    assert list(tree(tmp_path)) == ["w.safetensors"]


LIMITED = """
import resource, sys
import richkd.distill, richkd.tools.inspect, richkd.analysis.results, richkd.tools.verify
from richkd.__main__ import main
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize() + 2 * 2**30
resource.setrlimit(resource.RLIMIT_AS, (used, used))
store, out = sys.argv[1:]
for words in (["distill", "--cache", store, "--out", out], ["verify", store], ["inspect", store]):
    sys.argv = ["richkd", *words]
    try:
        main()
    except SystemExit as end:
        print(words[0], end.code)
"""


@pytest.mark.parametrize("what", ["samples", "views", "classes", "prompts", "metadata too"])
def test_absurd_sizes_take_no_memory(forks: Forks, store: Path, tmp_path: Path, what: str) -> None:
    copy = Path(shutil.copytree(store, tmp_path / "s.zarr"))
    manifest: Any = read_manifest(copy)
    if what == "views":
        manifest["views"]["count"] = 10**11
    elif what == "classes":
        manifest["teacher"]["num_features"] = 10**11
    elif what == "prompts":
        manifest["clip"]["num_features"] = 10**11
    else:
        manifest["dataset"]["num_train"] = 10**12
    if what == "metadata too":
        for path in copy.glob("train/*/zarr.json"):
            document = json.loads(path.read_text())
            document["shape"] = [10**12 if size == 48 else size for size in document["shape"]]
            path.write_text(json.dumps(document))
            file = str(path.relative_to(copy))
            manifest["checksums"]["metadata"][file] = metadata_digest(open_location(copy), file)
    write_sealed(open_location(copy), manifest)
    done = forks.run_python(LIMITED, copy, tmp_path / "run")
    assert done.code == 0, done.err
    assert "distill 2\n" in done.out and "verify 2\n" in done.out and "inspect 1" not in done.out
    assert "Traceback" not in done.err and "MemoryError" not in done.err
    assert not (tmp_path / "run").exists()
