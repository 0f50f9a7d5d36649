"""The small CLIP: open_clip loads it, training learns, and a failure leaves nothing behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from helpers import slow
from torch import Tensor

from richkd.data.shapes import draw
from richkd.teachers.tiny_clip import train_tiny_clip
from richkd.training.checkpoint import Checkpoints

FILES = ["open_clip_config.json", "open_clip_model.safetensors"]


@pytest.fixture(scope="module")
def pairs() -> tuple[Tensor, list[str]]:
    drawing = draw(256, seed=0)
    return torch.from_numpy(drawing.images), list(drawing.captions)


@pytest.fixture(scope="module")
def trained(pairs: tuple[Tensor, list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("clip") / "deep" / "tiny"
    train_tiny_clip(*pairs, out, epochs=2)
    return out


def test_the_directory_holds_what_open_clip_needs_and_no_more(trained: Path) -> None:
    assert sorted(path.name for path in trained.iterdir()) == FILES
    assert [path.name for path in trained.parent.iterdir()] == ["tiny"]
    config = json.loads((trained / FILES[0]).read_text())
    assert set(config) == {"model_cfg", "preprocess_cfg"}


def test_open_clip_loads_it(trained: Path, pairs: tuple[Tensor, list[str]]) -> None:
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{trained}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{trained}")
    model.eval()
    from PIL import Image

    images, captions = pairs
    prepared = preprocess(Image.fromarray(images[0].numpy()))
    torch.testing.assert_close(prepared, ((images[0] / 255 - 0.5) / 0.25).permute(2, 0, 1))
    with torch.no_grad():
        image = model.encode_image(prepared[None], normalize=True)
        text = model.encode_text(tokenizer([captions[0], "a word nobody said"]), normalize=True)
    assert image.shape == (1, 64)
    assert text.shape == (2, 64)
    assert image.isfinite().all()
    assert not torch.allclose(text[0], text[1], atol=1e-3)


def test_the_same_seed_gives_the_same_bytes(
    trained: Path, pairs: tuple[Tensor, list[str]], tmp_path: Path
) -> None:
    torch.rand(7)  # whatever else has used the global generator
    before = torch.get_rng_state()
    train_tiny_clip(*pairs, tmp_path / "same", epochs=2)
    assert torch.equal(before, torch.get_rng_state())
    train_tiny_clip(*pairs, tmp_path / "other", epochs=2, seed=1)
    for name in FILES:
        assert (tmp_path / "same" / name).read_bytes() == (trained / name).read_bytes()
    assert (tmp_path / "other" / FILES[1]).read_bytes() != (trained / FILES[1]).read_bytes()


class CutOff(BaseException):
    pass


@pytest.mark.parametrize("damaged", [False, True])
@pytest.mark.parametrize("steps", [3, *slow(5, 6, 8)])
def test_an_interrupted_training_ends_in_the_same_bytes(
    pairs: tuple[Tensor, list[str]], tmp_path: Path, steps: int, damaged: bool
) -> None:
    images, captions = pairs
    settings: dict[str, Any] = {
        "epochs": 3,
        "batch_size": 85,
    }  # three steps each
    train_tiny_clip(images, captions, tmp_path / "whole", **settings)
    checkpoints = Checkpoints(tmp_path / "training")

    def cut(step: int, total: int) -> None:
        if step == steps:
            raise CutOff

    with pytest.raises(CutOff):
        train_tiny_clip(
            images, captions, tmp_path / "cut", progress=cut, checkpoints=checkpoints, **settings
        )
    done = (steps - 1) // 3
    assert checkpoints.progress().epoch == done and not (tmp_path / "cut").exists()
    if damaged and len(checkpoints.files) == 2:
        content = checkpoints.files[0].read_bytes()
        checkpoints.files[0].write_bytes(content[:-1] + bytes([content[-1] ^ 4]))
        done -= 1
    seen: list[int] = []
    train_tiny_clip(
        images,
        captions,
        tmp_path / "cut",
        checkpoints=checkpoints,
        progress=lambda step, total: seen.append(step),
        **settings,
    )
    assert seen == list(range(3 * done + 1, 10))
    for name in FILES:
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_the_loss_descends_and_progress_counts(
    pairs: tuple[Tensor, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses: list[float] = []
    forward: Callable[..., Tensor] = open_clip.ClipLoss.forward

    def recorded(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        loss = forward(self, *args, **kwargs)
        losses.append(loss.item())
        return loss

    monkeypatch.setattr(open_clip.ClipLoss, "forward", recorded)
    # Colours are learned first; four captions of them are enough to see the loss fall.
    images, _ = pairs
    colours = torch.tensor([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]])
    images = colours[torch.arange(250) % 4][:, None, None].expand(-1, 32, 32, -1).to(torch.uint8)
    names = ["red", "green", "blue", "white"]
    captions = [f"a photo of something {names[i % 4]}" for i in range(250)]
    steps: list[tuple[int, int]] = []
    train_tiny_clip(
        images,
        captions,
        tmp_path / "tiny",
        epochs=4,
        batch_size=32,
        progress=lambda step, total: steps.append((step, total)),
    )
    assert steps == [(step, 28) for step in range(1, 29)]  # 7 full batches a pass
    assert len(losses) == 28
    # 32 pairs of 4 kinds: log 32 = 3.5 knowing nothing, log 8 = 2.1 knowing all there is.
    assert losses[0] > 3.2
    assert sum(losses[-4:]) / 4 < 2.6

    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'tiny'}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'tiny'}")
    model.train()  # 28 steps are too few for the running statistics
    with torch.no_grad():
        pixels = ((images[:32] / 255 - 0.5) / 0.25).permute(0, 3, 1, 2)
        logits, _ = model.get_logits(pixels, tokenizer(captions[:4]))
    assert logits.argmax(1).tolist() == [0, 1, 2, 3] * 8


def test_a_failure_leaves_nothing_behind(
    pairs: tuple[Tensor, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(step: int, total: int) -> None:
        if step == total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_tiny_clip(*pairs, tmp_path / "tiny", epochs=1, progress=stop)
    assert not list(tmp_path.iterdir())

    def full(*_: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("richkd.teachers.tiny_clip.save_file", full)
    with pytest.raises(OSError, match="no space"):
        train_tiny_clip(*pairs, tmp_path / "tiny", epochs=1)
    assert not list(tmp_path.iterdir())


def test_an_existing_directory_is_kept(pairs: tuple[Tensor, list[str]], tmp_path: Path) -> None:
    with pytest.raises(FileExistsError, match="exists"):
        train_tiny_clip(*pairs, tmp_path, epochs=1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"captions": ["one"]}, "as many captions"),
        ({"images": torch.zeros(256, 3, 32, 32, dtype=torch.uint8)}, "uint8"),
        ({"images": torch.zeros(256, 32, 32, 3)}, "uint8"),
        ({"batch_size": 257}, "batch_size"),
        ({"batch_size": 1}, "batch_size"),
        ({"epochs": 0}, "epochs"),
        ({"lr": 0.0}, "lr"),
        ({"lr": float("nan")}, "lr"),
        ({"layers": 3}, "layers"),
        ({"width": 15}, "width"),
    ],
)
def test_bad_arguments_are_refused(
    pairs: tuple[Tensor, list[str]], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    arguments = {"images": pairs[0], "captions": pairs[1], "epochs": 1} | change
    with pytest.raises(ValueError, match=message):
        train_tiny_clip(**arguments, out=tmp_path / "tiny")
    assert not list(tmp_path.iterdir())
