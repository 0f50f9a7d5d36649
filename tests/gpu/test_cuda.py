"""On a GPU: stage one and stage two give what the CPU gives, and evaluation is in f32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_distill import metrics, same, train, weights

import richkd
from richkd.losses import METHODS
from richkd.models import forward

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
Make = Callable[..., Path]
DRAWS = {"crd", "richkd", "richkd-f", "richkd-ls", "crd-kd"}  # negatives come from the device


def test_stage_one_gives_the_rows_of_the_cpu(make_store: Make) -> None:
    cpu, gpu = (richkd.open_cache(make_store(device=device)) for device in ("cpu", "cuda"))
    assert torch.equal(cpu.read("train/view_ids"), gpu.read("train/view_ids"))
    for name in ("teacher_logits", "teacher_features", "fused_logits", "clip_features"):
        for split in ("train", "test"):
            a, b = (cache.read(f"{split}/{name}").float() for cache in (cpu, gpu))
            assert (a - b).abs().max() < 0.01 * a.abs().max(), (split, name)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_stage_two_descends_as_on_the_cpu(store: Path, tmp_path: Path, method: str) -> None:
    losses = {}
    for device in ("cpu", "cuda"):
        train(store, tmp_path / device, method=method, device=device, precision="float32")
        losses[device] = [line["loss"] for line in metrics(tmp_path / device)]
    tolerance = 0.1 if method in DRAWS else 0.02
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=tolerance)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_summary_is_what_f32_gives(store: Path, tmp_path: Path, precision: str) -> None:
    summary = train(
        store, tmp_path / "a", method="kd", device="cuda", precision=precision, epochs=4, lr=0.1
    )
    model = richkd.create_model("resnet8", 16)
    model.load_state_dict(weights(tmp_path / "a"))
    cache = richkd.open_cache(store)
    mean, std = (torch.tensor(cache.manifest[key]) for key in ("mean", "std"))
    x = ((cache.read("test/images").float() / 255 - mean) / std).permute(0, 3, 1, 2)
    with torch.no_grad():
        hits = (model.eval()(x).argmax(1) == cache.read("test/labels")).float().mean().item()
    assert abs(summary["top1_last"] - hits) <= 1 / 40 + 1e-6  # one image of 40


def test_logits_are_of_f32_under_autocast() -> None:
    images = torch.randn(4096, 3, 32, 32, device="cuda")
    model = richkd.create_model("resnet8x4", 100).cuda().eval()
    with torch.autocast("cuda", torch.bfloat16), torch.no_grad():
        logits, features = forward(model, images)
    assert logits.dtype == torch.float32 and features.dtype == torch.bfloat16
    top2 = logits.topk(2).values
    assert (top2[:, 0] == top2[:, 1]).float().mean() < 0.001


def test_resumed_on_the_gpu(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from richkd.training.run_folder import RunFolder

    class CutOff(BaseException):
        pass

    whole = train(store, tmp_path / "whole", method="kd", device="cuda", epochs=4)
    saved = RunFolder.save_epoch

    def cut(self: Any, progress: Any, *arguments: Any) -> None:
        saved(self, progress, *arguments)
        if progress.epoch == 2:
            raise CutOff

    monkeypatch.setattr(RunFolder, "save_epoch", cut)
    with pytest.raises(CutOff):
        train(store, tmp_path / "cut", method="kd", device="cuda", epochs=4)
    monkeypatch.undo()
    again = train(store, tmp_path / "cut", method="kd", device="cuda", epochs=4, resume=True)
    assert again["top1_last"] == pytest.approx(whole["top1_last"], abs=0.11)
    for name, value in weights(tmp_path / "whole").items():
        other = weights(tmp_path / "cut")[name]
        assert torch.allclose(value.float(), other.float(), rtol=0.05, atol=0.02), name


def test_ce_sees_the_views_of_the_cpu(
    make_store: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from richkd.training.loop import Trainer

    stores = [make_store(views=2), make_store(views=3)]
    seen: list[np.ndarray[Any, Any]] = []
    steps = Trainer.steps

    def spy(self: Trainer, epoch: int, source: Any) -> Any:
        seen.append(source.views.cpu().numpy())
        return steps(self, epoch, source)

    monkeypatch.setattr(Trainer, "steps", spy)
    for store, device in zip(stores, ("cpu", "cuda"), strict=True):
        train(store, tmp_path / device, method="ce", device=device)
    assert len(seen) == 4 and all((a == b).all() for a, b in zip(seen[:2], seen[2:], strict=True))


def test_one_student_at_a_time_or_several_together(
    store: Path, tmp_path: Path, run: Callable[..., Any]
) -> None:
    common = [
        "--students",
        "resnet8",
        "--methods",
        "kd,dkd,ce",
        "--seeds",
        1,
        "--epochs",
        2,
        "--batch-size",
        16,
        "--device",
        "cuda",
        "--lr",
        0.02,
    ]
    for out, number in (("one", 1), ("three", 3)):
        done = run(
            "sweep", "--cache", store, "--out", tmp_path / out, "--concurrent", number, *common
        )
        assert done.code == 0, done.err
    for method in ("kd", "dkd", "ce"):
        a, b = (weights(tmp_path / out / f"shapes-resnet8-{method}-s0") for out in ("one", "three"))
        close = all(torch.allclose(a[n].float(), b[n].float(), rtol=1e-2, atol=1e-3) for n in a)
        assert same(a, b) or close


def test_nvjpeg_decodes_what_pillow_does(tmp_path: Path) -> None:
    """Its inverse transform rounds in another way."""
    from dataclasses import replace

    from PIL import Image

    from richkd.data.datasets import ImageFiles
    from richkd.data.decoding import Decoding
    from richkd.data.inputs import FileInputs
    from richkd.data.on_device import check_device
    from richkd.data.sources import FolderFiles, Paths

    device = torch.device("cuda")
    check_device(device, augmented=False)
    rng = np.random.default_rng(0)
    for number in range(9):
        coarse = Image.fromarray(rng.integers(0, 256, (9, 12, 3), np.uint8))
        photo = coarse.resize((400, 300), Image.Resampling.BICUBIC)
        photo.convert("L" if number == 4 else "RGB").save(tmp_path / f"{number}.jpg")
    source = FolderFiles(tmp_path, Paths.of(f"{number}.jpg" for number in range(9)))
    files = ImageFiles(source, np.tile([300, 400], (9, 1)), np.zeros(9, np.uint8), 64, Decoding())
    views = torch.tensor([[10.0, 20, 200, 250, number % 2] for number in range(9)])
    exact, decoded = (
        [
            *FileInputs(replace(files, decode=decode), device, workers=0).batches(
                torch.arange(9), views, 5
            )
        ]
        for decode in ("exact", "gpu")
    )
    for (_, images), (_, others) in zip(exact, decoded, strict=True):
        assert (images.float() - others.float()).abs().mean() < 2
