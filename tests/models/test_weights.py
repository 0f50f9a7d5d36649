"""One network in the wrappings of common trainers, and what is no file of weights at all."""

import argparse
import collections
import datetime
import io
import pathlib
import pickle
import re
import tarfile
import types
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import optional
import pytest
import timm
import torch
from helpers import refuses
from safetensors.torch import save_file
from torch import Tensor, nn

import richkd
from richkd.core.errors import RichKDError
from richkd.models.weights import (
    load_into,
    read_note,
    read_safetensors,
    read_weights,
    save_tensors,
    state_sha256,
)

State = dict[str, Tensor]
CLASSES = 3


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = richkd.create_model("resnet8", CLASSES)
    with torch.no_grad():
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer.uniform_(0.5, 1.5)
    return model


@pytest.fixture(scope="module")
def good() -> State:
    return network(1).state_dict()


@pytest.fixture(scope="module")
def raw() -> State:
    """Other weights of the same network, which must not be taken."""
    return network(2).state_dict()


def under(prefix: str, state: State) -> State:
    return {prefix + key: value for key, value in state.items()}


def inside(part: str, state: State) -> State:
    """As where a part of a network is wrapped."""
    return {key.replace("layer1.", f"layer1.{part}."): value for key, value in state.items()}


def timm_checkpoint(state: State, ema: Any = None) -> dict[str, Any]:
    """As timm's CheckpointSaver writes it."""
    return {
        "epoch": 3,
        "arch": "resnet8",
        "state_dict": state,
        "optimizer": {"state": {0: {"momentum_buffer": torch.ones(3)}}, "param_groups": []},
        "version": 2,
        "args": argparse.Namespace(lr=0.1, amp=None, aa="rand-m9"),
        "amp_scaler": {"scale": 65536.0},
        "metric": 93.75,
        **({} if ema is None else {"state_dict_ema": ema}),
    }


def lightning_checkpoint(state: State) -> dict[str, Any]:
    return {
        "epoch": 3,
        "global_step": 99,
        "pytorch-lightning_version": "2.6.0",
        "state_dict": state,
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 3}}}},
        "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_model_score": torch.tensor(0.9)}},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(3)}}}],
        "lr_schedulers": [{"milestones": collections.Counter([30])}],
        "hparams_name": "kwargs",
        "hyper_parameters": {"lr": 0.1, "root": pathlib.Path("data")},
    }


def numpy(state: State) -> dict[str, Any]:
    return {key: value.numpy() for key, value in state.items()}


def mmpretrain(good: State, head: str) -> Any:
    renamed = {
        head + key.removeprefix("fc.") if key.startswith("fc.") else f"backbone.{key}": value
        for key, value in good.items()
    }
    return {"meta": {"epoch": 100, "experiment": "x"}, "state_dict": renamed}


Made = Callable[[State, State], Any]
# name: the content of the file, and words of the line about it; "" if there is no such line
WRAPPINGS: dict[str, tuple[Made, str]] = {
    "bare": (lambda good, _: good, ""),
    "parameters": (
        lambda good, _: {
            k: nn.Parameter(v) if v.is_floating_point() else v for k, v in good.items()
        },
        "",
    ),
    "state_dict": (lambda good, _: {"state_dict": good, "epoch": 3}, "state_dict"),
    "model": (lambda good, _: {"model": good, "best_acc": np.float64(79.4)}, "model"),
    "net": (lambda good, _: {"net": good, "acc": 93.0, "epoch": 3}, "net"),
    "network": (lambda good, _: {"network": good}, "network"),
    "model_state_dict": (
        lambda good, _: {"model_state_dict": good, "loss": torch.tensor(0.1)},
        "model_state_dict",
    ),
    "module": (lambda good, _: {"module": good, "ds_version": "0.14"}, "module"),
    "weights": (lambda good, _: {"weights": good}, "weights"),
    "params": (lambda good, _: {"params": good}, "params"),
    "a key of their own": (lambda good, _: {"my_teacher": good}, "my_teacher"),
    "keys in keys": (
        lambda good, _: {"checkpoint": {"model": {"state_dict": good}}},
        "checkpoint.model.state_dict",
    ),
    "module.": (lambda good, _: under("module.", good), "module.*"),
    "_orig_mod.": (lambda good, _: under("_orig_mod.", good), "_orig_mod.*"),
    "module._orig_mod.": (lambda good, _: under("module._orig_mod.", good), "module._orig_mod.*"),
    "_orig_mod.module.": (lambda good, _: under("_orig_mod.module.", good), "_orig_mod.module.*"),
    "model._orig_mod.": (lambda good, _: under("model._orig_mod.", good), "model._orig_mod.*"),
    "net.": (lambda good, _: under("net.", good), "net.*"),
    "backbone.": (
        lambda good, _: {"state_dict": under("backbone.", good)},
        "backbone.* state_dict",
    ),
    "timm_model.": (lambda good, _: under("timm_model.", good), "timm_model.*"),
    "a part compiled": (lambda good, _: inside("_orig_mod", good), "wrappers"),
    "a part in parallel": (
        lambda good, _: under("module.", inside("module", good)),
        "wrappers",
    ),
    "FSDP": (
        lambda good, _: under(
            "_fsdp_wrapped_module.", inside("_fsdp_wrapped_module._checkpoint_wrapped_module", good)
        ),
        "wrappers",
    ),
    "timm": (lambda good, _: timm_checkpoint(good), "state_dict"),
    "timm, EMA": (
        lambda good, raw: timm_checkpoint(raw, good),
        "state_dict_ema averaged state_dict",
    ),
    "timm, EMA of DDP": (
        lambda good, raw: timm_checkpoint(under("module.", raw), under("module.", good)),
        "module.* state_dict_ema averaged state_dict",
    ),
    "timm, EMA without weights": (lambda good, _: timm_checkpoint(good, {}), "state_dict"),
    "deit": (
        lambda good, raw: {
            "model": raw,
            "model_ema": good,
            "epoch": 3,
            "scaler": {},
            "args": argparse.Namespace(output_dir=pathlib.Path("out")),
        },
        "model_ema averaged model",
    ),
    "deit without EMA": (lambda good, _: {"model": good, "model_ema": None}, "model"),
    "torchvision": (
        lambda good, raw: {
            "model": raw,
            "epoch": 3,
            "args": argparse.Namespace(lr=0.5),
            "model_ema": {"n_averaged": torch.tensor(9), **under("module.", good)},
        },
        "module.* model_ema averaged model n_averaged",
    ),
    "ema": (lambda good, raw: {"model": raw, "ema": good}, "ema"),
    "ema_state_dict": (
        lambda good, raw: {"state_dict": raw, "ema_state_dict": good},
        "ema_state_dict",
    ),
    "params_ema": (lambda good, raw: {"params": raw, "params_ema": good}, "params_ema"),
    "EMA as a list": (
        lambda good, _: {"model": good, "ema": {"decay": 0.9, "shadow_params": [torch.ones(3)]}},
        "model",
    ),
    "EMA of parameters only": (
        lambda good, raw: {
            "model": good,
            "ema": {k: v for k, v in raw.items() if "running" not in k and "tracked" not in k},
        },
        "model",
    ),
    "AveragedModel": (
        lambda good, _: {"n_averaged": torch.tensor(9), **under("module.", good)},
        "module.*",
    ),
    "Lightning": (
        lambda good, _: lightning_checkpoint(under("model.", good)),
        "model.* state_dict",
    ),
    "Lightning, itself": (lambda good, _: lightning_checkpoint(good), "state_dict"),
    "Lightning, a loss": (
        lambda good, _: lightning_checkpoint(
            {**under("model.", good), "criterion.weight": torch.ones(3)}
        ),
        "model.* state_dict criterion.weight",
    ),
    "Lightning, itself and a loss": (
        lambda good, _: lightning_checkpoint(
            {**good, "criterion.weight": torch.ones(3), "train_acc.tp": torch.ones(3)}
        ),
        "state_dict criterion.weight train_acc.tp",
    ),
    "Lightning, EMA": (
        lambda good, raw: lightning_checkpoint(
            {**under("model.", raw), **under("ema_model.module.", good)}
        ),
        "ema_model.module.* state_dict",
    ),
    "Lightning, compiled": (
        lambda good, _: lightning_checkpoint(under("model._orig_mod.", good)),
        "model._orig_mod.* state_dict",
    ),
    "RepDistiller": (
        lambda good, _: {
            "opt": argparse.Namespace(lr=0.05),
            "model": good,
            "accuracy": torch.tensor(79.4),
            "optimizer": {},
        },
        "model",
    ),
    "thop": (
        lambda good, _: {
            **good,
            "total_ops": torch.zeros(1),
            "layer1.0.total_params": torch.zeros(1),
        },
        "layer1.0.total_params total_ops",
    ),
    "old PyTorch": (lambda good, _: {k: v for k, v in good.items() if "tracked" not in k}, ""),
    "f64": (
        lambda good, _: {k: v.double() if v.is_floating_point() else v for k, v in good.items()},
        "",
    ),
    "NumPy": (lambda good, _: numpy(good), ""),
    "NumPy, other machines": (
        lambda good, _: {
            "model": {k: v.astype(v.dtype.newbyteorder(">")) for k, v in numpy(good).items()}
        },
        "model",
    ),
    "NumPy, by columns": (
        lambda good, _: {
            k: np.asfortranarray(v) for k, v in numpy(good).items()
        },  # counters are [1]
        "",
    ),
    "numbers": (
        lambda good, _: {
            k: (int(v) if "conv" in k else np.int64(v)) if v.ndim == 0 else v
            for k, v in good.items()
        },
        "",
    ),
    "sparse": (lambda good, _: good | {"fc.weight": good["fc.weight"].to_sparse()}, ""),
    "weights and optimizer": (lambda good, _: (good, {"lr": 0.1}), "0"),
    "mmpretrain": (
        lambda good, _: mmpretrain(good, "head.fc."),
        "backbone.* and head.* in state_dict",
    ),
    "a backbone and a linear layer": (
        lambda good, _: mmpretrain(good, "classifier."),
        "backbone.* and classifier.* in state_dict",
    ),
    "a student beside it": (
        lambda good, raw: {"model": good, "student": raw},
        "model rather than student --teacher-weights-key",
    ),
    "the same twice": (lambda good, _: {"last": good, "best": good}, "last"),
    "one of two": (
        lambda good, raw: {"state_dict": good, "first_state_dict": raw},
        "state_dict first_state_dict",
    ),
    "plain values": (
        lambda good, _: {
            "model": good,
            "at": datetime.datetime(2024, 5, 17),
            "took": datetime.timedelta(1),
            "torch": torch.__version__,
            "cfg": types.SimpleNamespace(a=1),
            "out": pathlib.Path("a"),
            "log": collections.defaultdict(list, loss=[0.1]),
            "top1": np.float32(0.9),
            "classes": np.uint16(3),
            "steps": collections.defaultdict(int, a=1),
            "better": np.bool_(True),
            "day": datetime.date(2024, 5, 17),
            "there": datetime.datetime(2024, 5, 17, tzinfo=datetime.UTC),
            "losses": collections.deque([0.1, 0.2], maxlen=2),
            "rng": np.random.get_state(),
            "mean": np.array([0.5, 0.5, 0.5]),
            "names": np.array(["cat", "dog"]),
            "layers": [range(3), slice(1, 2), frozenset({1})],
        },
        "model",
    ),
}


@pytest.mark.parametrize("name", WRAPPINGS)
def test_a_state_dict_is_found_and_what_was_unwrapped_is_said(
    tmp_path: Path, good: State, raw: State, name: str
) -> None:
    make, words = WRAPPINGS[name]
    path = tmp_path / "w.pth"
    torch.save(make(good, raw), path)
    model = network(3)
    line = load_into(model, read_weights(path), "resnet8", path)
    for key, value in model.state_dict().items():
        assert torch.equal(value, good[key]) or (name == "old PyTorch" and "tracked" in key), key
    assert {*words.split()} <= {*re.findall(r"[^\s,;()]+", line)}, line
    assert (line == "") == (words == "") and line.count("\n") == 0


@pytest.mark.parametrize("prefix", ["", "module.model."])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_the_precision_is_read(
    tmp_path: Path, good: State, dtype: torch.dtype, prefix: str
) -> None:
    path = tmp_path / "w.safetensors"
    half = {k: v.to(dtype) if v.is_floating_point() else v for k, v in good.items()}
    save_file(under(prefix, half), path)
    model = network(3)
    assert prefix in load_into(model, read_weights(path), "resnet8", path)
    for key, value in model.state_dict().items():
        assert value.dtype == good[key].dtype
        torch.testing.assert_close(value, good[key], atol=0.01, rtol=0.01)


def test_arrays_of_another_numpy_are_read(tmp_path: Path, good: State) -> None:
    """NumPy 1 and 2 have other names for the module that makes arrays."""
    path = tmp_path / "w.pth"
    content = {"net": numpy(good), "top1": np.float32(0.9)}
    torch.save(content, path, _use_new_zipfile_serialization=False)
    saved = path.read_bytes()
    for core in (b"core", b"_core"):
        path.write_bytes(re.sub(rb"numpy\._?core\.", b"numpy." + core + b".", saved))
        load_into(model := network(3), read_weights(path), "resnet8", path)
        assert state_sha256(model) == state_sha256(network(1))


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".ckpt", ".pth.tar", "", ".safetensors"])
@pytest.mark.parametrize("saved", ["zip", "legacy", "safetensors"])
def test_the_content_says_the_format(tmp_path: Path, good: State, suffix: str, saved: str) -> None:
    path = tmp_path / f"w{suffix}"
    if saved == "safetensors":
        save_file(good, path)
    else:
        torch.save({"model": good}, path, _use_new_zipfile_serialization=saved == "zip")
    model = network(3)
    load_into(model, read_weights(path), "resnet8", path)
    assert state_sha256(model) == state_sha256(network(1))
    assert read_note(path) == {}


def test_real_prefixes_are_kept(tmp_path: Path) -> None:
    """Names that look like wrappers may be a network's own."""

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Linear(2, 2)
            self.model = nn.ModuleDict({"module": nn.Linear(2, 2), "fc": nn.Linear(2, 2)})

    theirs = Wrapped().state_dict()
    for prefix in ("", "module.", "model.", "module._orig_mod."):
        model = Wrapped()
        line = load_into(model, under(prefix, theirs), "Wrapped", tmp_path)
        assert all(torch.equal(value, theirs[key]) for key, value in model.state_dict().items())
        assert (line == "") == (prefix == "")


def test_a_network_with_one_name_for_all(tmp_path: Path) -> None:
    model, theirs = nn.Linear(2, 2), nn.Linear(2, 2)
    load_into(model, under("head.fc.", theirs.state_dict()), "linear", tmp_path)
    assert torch.equal(model.weight, theirs.weight)


def blank(name: str, classes: int) -> State:
    return richkd.create_model(name, classes).state_dict()


NARROW, WIDE = "mobilenetv3_small_050", "mobilenetv3_small_075"
ARCHITECTURE = "weights-other-architecture"
# name: the content of the file, the code of the error and values in its message
OTHERS: dict[str, tuple[Callable[[State, State], Any], str, list[str]]] = {
    "a layer between backbone and head": (
        lambda good, _: {
            **under("backbone.", {k: v for k, v in good.items() if "fc." not in k}),
            "head.fc.weight": good["fc.weight"],
            "head.fc.bias": good["fc.bias"],
            "neck.fc.weight": torch.ones(64, 64),
        },
        ARCHITECTURE,
        ["resnet8", "2", "0", "backbone.*", "'fc.bias'", "'head.fc"],
    ),
    "a classifier less": (
        lambda good, raw: {
            **under("student.", {k: v for k, v in raw.items() if "fc." not in k}),
            "teacher.fc.weight": good["fc.weight"],
            "teacher.conv1.weight": good["conv1.weight"],
        },
        ARCHITECTURE,
        ["resnet8", "2", "student.*", "'fc.bias'"],
    ),
    "another network": (
        lambda *_: {"state_dict": under("module.", blank("resnet32x4", 100))},
        ARCHITECTURE,
        ["resnet32x4 with 100 classes"],
    ),
    "a network of timm that is named": (
        lambda *_: timm_checkpoint(blank("test_vit", 7)) | {"arch": "test_vit"},
        ARCHITECTURE,
        ["test_vit with 7 classes"],
    ),
    "a network that is named as users write it": (
        lambda *_: timm_checkpoint(blank("test_vit", 7)) | {"arch": "timm/test_vit"},
        ARCHITECTURE,
        ["timm/test_vit with 7 classes"],
    ),
    "a network of timm that its arguments name": (
        lambda *_: {"model": blank("test_vit", 7), "args": argparse.Namespace(model="test_vit")},
        ARCHITECTURE,
        ["test_vit with 7 classes"],
    ),
    "a network of timm that nothing names": (
        lambda *_: blank("timm/resnet18", 5),
        ARCHITECTURE,
        ["timm/resnet18 with 5 classes"],
    ),
    "a network that is only named": (
        lambda *_: {"state_dict": {"a.weight": torch.ones(3)}, "arch": "my_net"},
        ARCHITECTURE,
        ["my_net"],
    ),
    "nearly another network": (
        lambda *_: {k.replace("fc.", "linear."): v for k, v in blank("resnet20", 100).items()},
        ARCHITECTURE,
        ["resnet20 but for 'fc.bias'"],
    ),
    "the same keys, another width": (
        lambda *_: {"arch": WIDE, "model": blank(WIDE, 3)},
        "weights-do-not-fit",
        [f"{WIDE} with 3 classes"],
    ),
    "transformers": (
        lambda good, _: under(
            "resnet.embedder.",
            {
                k.replace("conv", "convolution").replace("fc", "classifier.1"): v
                for k, v in good.items()
            },
        ),
        ARCHITECTURE,
        ["resnet8"],
    ),
    "a head more": (
        lambda good, _: {**good, "head_dist.weight": torch.ones(3, 64)},
        ARCHITECTURE,
        ["0", "1", "'head_dist.weight'"],
    ),
    "a part less": (
        lambda good, _: {k: v for k, v in good.items() if k != "fc.bias"},
        ARCHITECTURE,
        ["1", "'fc.bias'"],
    ),
    "teacher and student": (
        lambda good, raw: {"student": raw, "teacher": good},
        "weights-ambiguous",
        ["resnet8", "student, teacher", "--teacher-weights-key student"],
    ),
    "two averages": (
        lambda good, raw: {"ema_0.99": raw, "ema_0.999": good},
        "weights-ambiguous",
        ["ema_0.99, ema_0.999"],
    ),
    "other classes": (
        lambda good, _: {**good, "fc.weight": torch.ones(10, 64), "fc.bias": torch.ones(10)},
        "weights-do-not-fit",
        ["fc.weight", "(10, 64)", "10 classes", "3"],
    ),
    "another width": (
        lambda good, _: {**good, "conv1.weight": torch.ones(8, 3, 3, 3)},
        "weights-do-not-fit",
        ["conv1.weight", "(8, 3, 3, 3)"],
    ),
    "integers": (
        lambda good, _: {**good, "fc.weight": torch.ones(3, 64, dtype=torch.int8)},
        "weights-quantized",
        ["fc.weight", "int8"],
    ),
    "no tensors": (
        lambda *_: {"epoch": 3, "lr": 0.1},
        "weights-no-state-dict",
        ["'epoch', 'lr'"],
    ),
    "a list": (lambda good, _: list(good.values()), "weights-no-state-dict", ["list"]),
    "a tensor": (lambda good, _: good["fc.weight"], "weights-no-state-dict", ["Tensor"]),
    "nothing": (lambda *_: {}, "weights-no-state-dict", []),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_such_network_is_refused_by_name(
    tmp_path: Path, good: State, raw: State, name: str
) -> None:
    make, code, values = OTHERS[name]
    path = tmp_path / "w.pth"
    torch.save(make(good, raw), path)
    asked = NARROW if name == "the same keys, another width" else "resnet8"
    model = richkd.create_model(asked, CLASSES)
    before = state_sha256(model)
    with refuses(code, "w.pth", *values):
        load_into(model, read_weights(path), asked, path)
    assert state_sha256(model) == before


def test_a_mapping_at_many_keys_is_looked_at_once(tmp_path: Path, good: State) -> None:
    """A small file may unfold to any number of ways to one mapping."""
    content: Any = {"fc.weight": good["fc.weight"]}
    for _ in range(4):
        content = {f"key{number}": content for number in range(200)}
    with refuses("weights-other-architecture", "resnet8"):
        load_into(network(), content, "resnet8", tmp_path)


# --- what is no file of weights ------------------------------------------------------------------


def zipped(**members: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, text in members.items():
            archive.writestr(name.replace("__", "/").replace("_dot_", "."), text)
    return buffer.getvalue()


def tarred() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("w.pth"))
    return buffer.getvalue()


def numpy_archive() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, weight=np.ones(3))
    return buffer.getvalue()


FORMAT, DAMAGED = "weights-format", "weights-damaged"
FILES: dict[str, tuple[bytes, str, str]] = {
    "empty": (b"", FORMAT, "empty"),
    "HTML": (b"\n<!DOCTYPE html>\n<html><body>Sign in</body></html>", FORMAT, "web page"),
    "XML": (b'<?xml version="1.0"?><Error>AccessDenied</Error>', FORMAT, "web page"),
    "git-lfs": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n",
        FORMAT,
        "git lfs pull",
    ),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + bytes(99), FORMAT, "HDF5"),
    "gzip": (b"\x1f\x8b\x08" + bytes(99), FORMAT, "compressed"),
    "tar": (tarred(), FORMAT, "tar"),
    "zip": (zipped(w_dot_pth="x"), FORMAT, "ZIP"),
    "npy": (b"\x93NUMPY\x01\0" + bytes(99), FORMAT, "NumPy"),
    "npz": (numpy_archive(), FORMAT, "NumPy"),
    "JSON": (b'{"message": "Not Found"}', DAMAGED, ""),
    "text": (b"hello " * 99, DAMAGED, ""),
    "cut short": (b"PK\x03\x04" + bytes(99), DAMAGED, ""),
}


@pytest.mark.parametrize("suffix", [".pth", ".bin", ".safetensors"])
@pytest.mark.parametrize("name", FILES)
def test_files_of_other_kinds(tmp_path: Path, name: str, suffix: str) -> None:
    content, code, kind = FILES[name]
    path = tmp_path / f"w{suffix}"
    path.write_bytes(content)
    with pytest.raises(RichKDError) as refused:
        read_weights(path)
    text = str(refused.value)
    assert refused.value.code == code and kind in text
    assert text.startswith(f"{path} ") and "\x1b" not in text and "weights_only" not in text


def test_a_file_has_the_same_bytes_twice(tmp_path: Path) -> None:
    metadata = {f"key {number}": "ä" * number for number in range(20)}
    tensors = {"b": torch.arange(5), "a": torch.ones(2, 3)}
    files = [tmp_path / f"{number}.safetensors" for number in range(8)]
    for file in files:
        save_tensors(file, tensors, metadata)
    assert len({file.read_bytes() for file in files}) == 1
    read, note = read_safetensors(files[0])
    assert metadata.items() <= note.items()
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())


def test_a_directory_is_refused_by_what_is_in_it(tmp_path: Path) -> None:
    with refuses("weights-is-directory", tmp_path):
        read_weights(tmp_path)
    save_tensors(tmp_path / "model.safetensors", {"a": torch.ones(1)})
    with refuses("weights-is-directory", tmp_path / "model.safetensors"):
        read_weights(tmp_path)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_programs_are_refused(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    torch.jit.script(model).save(str(tmp_path / "script.pt"))  # type: ignore[no-untyped-call]
    program = torch.export.export(model, (torch.ones(1, 2),))
    torch.export.save(program, tmp_path / "program.pt2")
    for file, kind in (("script.pt", "TorchScript"), ("program.pt2", "exported program")):
        with refuses("weights-format", file, kind, "state_dict()"):
            read_weights(tmp_path / file)


def test_onnx_is_refused(tmp_path: Path) -> None:
    onnx, helper = optional.load("onnx"), optional.load("onnx.helper")

    graph = helper.make_graph([], "g", [], [])
    for producer in ("pytorch", "onnx-example"):
        onnx.save(helper.make_model(graph, producer_name=producer), str(tmp_path / "w.onnx"))
        with refuses("weights-format", "w.onnx", "ONNX"):
            read_weights(tmp_path / "w.onnx")


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_pickled_networks_are_refused_by_their_class(tmp_path: Path, legacy: bool) -> None:
    path = tmp_path / "w.pth"
    for content in (network(), {"model": network()}):
        torch.save(content, path, _use_new_zipfile_serialization=not legacy)
        with pytest.raises(RichKDError) as refused:
            read_weights(path)
        text = str(refused.value)
        assert refused.value.code == "weights-unsafe" and text.count(str(path)) == 1
        assert "richkd.models.resnet_cifar" in text
        assert "torch.save(model.state_dict(), FILE)" in text
        assert "\x1b" not in text and "weights_only" not in text


class Crater:
    """What a pickle may make."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return (Path.touch, (self.target,))


class Listed:
    """The same through what is read as plain values."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return (collections.defaultdict, (self.target.touch,))


class Arrayed(Crater):
    """The same through an array of objects."""

    def __reduce__(self) -> Any:
        return np.array([Crater(self.target)], dtype=object).__reduce__()


@pytest.mark.parametrize("bomb", [Crater, Listed, Arrayed])
@pytest.mark.parametrize("saved", ["zip", "legacy", "pickle"])
def test_nothing_in_a_file_is_run(tmp_path: Path, bomb: Any, saved: str) -> None:
    path, target = tmp_path / "w.pth", tmp_path / "crater"
    content = {"model": {"a": torch.ones(1)}, "args": bomb(target)}
    if saved == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=saved == "zip")
    with refuses("weights-unsafe", path):
        read_weights(path)
    assert not target.exists()


def planted(content: Any, bomb: object) -> Iterator[Any]:
    """Yield the content of a file with something beside the weights, and among them."""
    if isinstance(content, tuple):
        yield (*content, bomb)
        return
    yield {**content, "hidden": bomb}
    key = next((key for key, value in content.items() if isinstance(value, dict)), None)
    if key is not None:
        yield {**content, key: {"hidden": bomb, **content[key]}}


TWELVE = (
    "bare",
    "model",
    "state_dict",
    "net",
    "model_state_dict",
    "module",
    "_orig_mod.module.",
    "timm, EMA",
    "deit",
    "Lightning",
    "NumPy",
    "weights and optimizer",
)


@pytest.mark.parametrize("name", TWELVE)
def test_nothing_in_a_wrapping_is_run(tmp_path: Path, good: State, raw: State, name: str) -> None:
    path, target = tmp_path / "w.pth", tmp_path / "crater"
    for bomb in (Crater, Listed, Arrayed):
        for number, content in enumerate(planted(WRAPPINGS[name][0](good, raw), bomb(target))):
            torch.save(content, path, _use_new_zipfile_serialization=number == 0)
            with refuses("weights-unsafe", path):
                read_weights(path)
    assert not target.exists()


class Pickled:
    """What calls a function when it is read, and then sets a state."""

    def __init__(self, *reduced: Any) -> None:
        self.reduced = reduced

    def __reduce__(self) -> Any:
        return self.reduced


MADE = np.zeros(1).__reduce__()[0]  # makes arrays
LOOSE = Pickled(np.dtype, ("f8", False, True), (3, "<", None, None, None, -1, -1, 63))


@pytest.mark.parametrize(
    ("value", "code"),
    [
        (np.array([1, "a"], dtype=object), "weights-unsafe"),
        (np.zeros(2, dtype=[("a", "f8"), ("b", "O")]), "weights-unsafe"),
        (np.array(["2024-05-17"], dtype="M8[D]"), "weights-unsafe"),
        (
            Pickled(MADE, (np.ndarray, (0,), b"b"), (1, (1,), "f8", False, b"A" * 8)),
            "weights-unsafe",
        ),
        (
            Pickled(MADE, (np.ndarray, (0,), b"b"), (1, (9**9,), np.dtype("f8"), False, b"A" * 8)),
            "weights-damaged",
        ),
        (
            Pickled(MADE, (np.ndarray, (0,), b"b"), (1, (-1,), np.dtype("f8"), False, b"A" * 8)),
            "weights-damaged",
        ),
        (Pickled(np.ndarray, ((2,), "O", b"A" * 16)), None),  # no array at all
        (Pickled(MADE, (np.ndarray, (0,), b"b"), (1, (1,), LOOSE, False, b"A" * 8)), None),
    ],
)
def test_forged_arrays_are_refused_or_plain_numbers(
    tmp_path: Path, value: object, code: str | None
) -> None:
    """NumPy itself would take the bytes of some of them for pointers."""
    path = tmp_path / "w.pth"
    torch.save({"a": torch.ones(1), "b": value}, path)
    if code is not None:
        with refuses(code, path):
            read_weights(path)
        return
    found = read_weights(path)["b"]
    assert found.dtype == np.float64 and not found.dtype.hasobject
    assert found.tobytes() == b"A" * found.nbytes


def test_timms_own_saver(tmp_path: Path, good: State) -> None:
    """A file that timm itself writes, with averaged weights."""
    from timm.utils.checkpoint_saver import CheckpointSaver
    from timm.utils.model_ema import ModelEmaV3

    model = network(2)
    ema = ModelEmaV3(network(1))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    args = argparse.Namespace(model="resnet8", lr=0.1)
    create: Any = CheckpointSaver
    saver = create(model, optimizer, args, ema, checkpoint_dir=str(tmp_path))
    saver.save_checkpoint(1, metric=93.0)
    path = tmp_path / "last.pth.tar"
    line = load_into(loaded := network(3), read_weights(path), "resnet8", path)
    assert "state_dict_ema" in line and "averaged" in line
    assert all(torch.equal(value, good[key]) for key, value in loaded.state_dict().items())


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_efficientnet"])
def test_networks_of_timm(tmp_path: Path, name: str) -> None:
    theirs, model = (timm.create_model(name, num_classes=4) for _ in range(2))
    path = tmp_path / "w.pth"
    torch.save({"state_dict": under("module._orig_mod.", theirs.state_dict())}, path)
    load_into(model, read_weights(path), name, path)
    assert state_sha256(model) == state_sha256(theirs)
