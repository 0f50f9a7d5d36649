"""Networks by name, and reading of weights from files that others wrote."""

import argparse
import pickle
import signal
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forked import Forks
from helpers import refuses

import richkd
from richkd.core.files import GRACE_S, atomic_write, is_temporary
from richkd.models import check_fit
from richkd.models.weights import (
    file_sha256,
    load_into,
    read_weights,
    save_tensors,
    state_sha256,
)


@pytest.mark.parametrize(
    "name", ["resnet8", "resnet18", "mobilenetv3_small_050", "vit_tiny_patch16_224"]
)
def test_forward_gives_what_the_model_gives(name: str) -> None:
    model = richkd.create_model(name, 7, image_size=32).eval()
    width = check_fit(model, name, 32, 7)
    x = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        logits, features = richkd.forward(model, x)
        assert torch.allclose(logits, model(x), atol=1e-5)
    assert features.shape == (3, width)


def test_in_chans() -> None:
    assert richkd.create_model("resnet8", 4, in_chans=1)(torch.randn(2, 1, 32, 32)).shape == (2, 4)


def test_unknown_model_names_the_nearest() -> None:
    with refuses("unknown-model", "'resnet8x5'", "resnet8x4"):
        richkd.create_model("resnet8x5", 10)


def test_a_model_that_does_not_fit() -> None:
    model = richkd.create_model("inception_v3", 10)
    with refuses("model-does-not-fit", "inception_v3", "32×32"):
        check_fit(model, "inception_v3", 32, 10)


def published(model: torch.nn.Module, layout: str) -> Any:
    state = model.state_dict()
    return {
        "bare": state,
        "mdistiller": {"model": state, "epoch": 240, "best_acc": np.float64(79.4)},
        "RepDistiller": {
            "opt": argparse.Namespace(lr=0.05, path="x"),
            "model": state,
            "best_acc": torch.tensor(79.4),
        },
        "state_dict": {"state_dict": {f"module.{k}": v for k, v in state.items()}},
    }[layout]


@pytest.mark.parametrize("layout", ["bare", "mdistiller", "RepDistiller", "state_dict"])
def test_published_checkpoints_load(tmp_path: Path, layout: str) -> None:
    model = richkd.create_model("resnet8x4", 100)
    path = tmp_path / "teacher.pth"
    torch.save(published(model, layout), path)
    other = richkd.create_model("resnet8x4", 100)
    load_into(other, read_weights(path), "resnet8x4", path)
    assert state_sha256(other) == state_sha256(model)


def test_safetensors_round_trip(tmp_path: Path) -> None:
    model = richkd.create_model("resnet8", 10)
    path = tmp_path / "a" / "w.safetensors"
    save_tensors(path, model.state_dict())
    assert set(read_weights(path)) == set(model.state_dict())
    assert len(file_sha256(path)) == 64
    assert [p.name for p in path.parent.iterdir()] == ["w.safetensors"]


class Bomb:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return (Path.touch, (self.target,))


@pytest.mark.parametrize("saved_by", ["torch", "pickle"])
def test_pickled_code_is_refused_and_never_runs(tmp_path: Path, saved_by: str) -> None:
    path, target = tmp_path / "w.pth", tmp_path / "ran"
    if saved_by == "torch":
        torch.save({"model": {"a": torch.ones(1)}, "opt": Bomb(target)}, path)
    else:
        path.write_bytes(pickle.dumps(Bomb(target)))
    with refuses("weights-unsafe", path):
        read_weights(path)
    assert not target.exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x08\0\0\0\0\0\0\0{}", b"hello" * 9])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_damaged_files(tmp_path: Path, content: bytes, suffix: str) -> None:
    path = tmp_path / f"w{suffix}"
    path.write_bytes(content)
    with refuses("weights-format" if not content else "weights-damaged", path):
        read_weights(path)


def test_other_architecture_and_other_classes(tmp_path: Path) -> None:
    weights = richkd.create_model("resnet8", 10).state_dict()
    with refuses("weights-other-architecture", "resnet14", "36"):
        load_into(richkd.create_model("resnet14", 10), weights, "resnet14", tmp_path)
    with refuses("weights-do-not-fit", "fc.weight", "(10, 64)", "(12, 64)", "classes"):
        load_into(richkd.create_model("resnet8", 12), weights, "resnet8", tmp_path)


def test_nothing_is_left_where_writing_fails(tmp_path: Path) -> None:
    path = tmp_path / "w"
    path.write_text("old")
    with pytest.raises(ValueError, match="no"), atomic_write(path) as temporary:
        temporary.write_text("half")
        raise ValueError("no")
    assert [p.name for p in tmp_path.iterdir()] == ["w"] and path.read_text() == "old"


def test_what_a_killed_process_was_writing_is_removed_by_the_next(
    forks: Forks, tmp_path: Path
) -> None:
    """Killed by the system in the middle of a file, at a limit of its size."""
    path = tmp_path / "w.safetensors"
    write = textwrap.dedent(f"""
        import resource, signal, sys, torch
        from pathlib import Path
        from richkd.models.weights import save_tensors
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it otherwise
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), -1))
        save_tensors(Path({str(path)!r}), {{"a": torch.zeros(100_000)}})
    """)
    assert forks.run_python(write, 100_000).code == -signal.SIGXFSZ
    (left,) = tmp_path.iterdir()
    assert left.stat().st_size == 100_000 and is_temporary(left)

    time.sleep(2 * GRACE_S)
    assert forks.run_python(write, 1_000_000).code == 0
    assert [*tmp_path.iterdir()] == [path]
    assert read_weights(path)["a"].shape == (100_000,)


def test_weights_have_the_permissions_of_other_files(tmp_path: Path) -> None:
    save_tensors(tmp_path / "w.safetensors", {"a": torch.ones(2)})
    (tmp_path / "other").touch()
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1
