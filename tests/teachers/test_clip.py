"""The CLIP teacher against open_clip's own paths."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from helpers import write_clip
from PIL import Image

from richkd.data.inputs import ArrayInputs
from richkd.data.prompts import load_prompts
from richkd.errors import RichKDError
from richkd.fusion import class_embeddings
from richkd.teachers.clip import check_clip, load_clip

CPU = torch.device("cpu")


def smooth_images(rng: np.random.Generator, count: int, height: int, width: int) -> torch.Tensor:
    """Images with structure at several scales, as photographs have."""
    total = np.zeros((count, height, width, 3))
    for cells in (2, 4, 8, 16):
        coarse = rng.uniform(0, 1, (count, cells, cells, 3))
        for i in range(count):
            for c in range(3):
                layer = Image.fromarray((coarse[i, :, :, c] * 255).astype(np.uint8))
                total[i, :, :, c] += np.asarray(
                    layer.resize((width, height), Image.Resampling.BICUBIC)
                )
    return torch.from_numpy((total / 4).round().clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize("size", [(32, 32), (64, 64), (40, 57), (20, 24)])
@pytest.mark.parametrize("resize_mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_preprocessing_in_batches_equals_the_pil_path(
    tmp_path: Path,
    rng: np.random.Generator,
    size: tuple[int, int],
    resize_mode: str,
    interpolation: str,
) -> None:
    folder = write_clip(tmp_path / "clip")
    file = folder / "open_clip_config.json"
    config = json.loads(file.read_text())
    config["preprocess_cfg"] |= {"resize_mode": resize_mode, "interpolation": interpolation}
    file.write_text(json.dumps(config))
    clip = load_clip(str(folder), CPU)
    images = smooth_images(rng, 4, *size)
    ours = clip.preprocess(images)
    theirs = torch.stack([clip.transform(Image.fromarray(image.numpy())) for image in images])
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() * 0.27 * 255 <= 2.5  # grey levels
    with torch.no_grad():
        a, b = (F.normalize(clip.model.encode_image(x), dim=-1) for x in (ours, theirs))
    assert (a * b).sum(-1).min() >= 0.999


def test_features_are_unit_and_in_order(clip_dir: Path, rng: np.random.Generator) -> None:
    clip = load_clip(str(clip_dir), CPU)
    images = smooth_images(rng, 7, 32, 32)
    features = clip.image_features(ArrayInputs(images, CPU), 2, 7, 3)
    assert features.shape == (5, 24)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(5))
    with torch.no_grad():
        one = F.normalize(clip.model.encode_image(clip.preprocess(images[4:5])), dim=-1)
    torch.testing.assert_close(features[2:3], one, atol=1e-5, rtol=1e-4)


def test_class_embeddings_equal_open_clips_own(clip_dir: Path) -> None:
    names, templates = ["cat", "tree frog", "t-shirt {odd}"], load_prompts("richkd")
    clip = load_clip(str(clip_dir), CPU)
    ours = class_embeddings(clip.text_embeddings(names, templates))
    model = open_clip.create_model(f"local-dir:{clip_dir}")
    theirs = open_clip.build_zero_shot_classifier(
        model,
        open_clip.get_tokenizer(f"local-dir:{clip_dir}"),
        names,
        [lambda name, t=template: t.replace("{}", name) for template in templates],
    )
    torch.testing.assert_close(ours, theirs.T.detach(), atol=1e-5, rtol=1e-4)


def test_scale_and_identity(clip_dir: Path, tmp_path: Path) -> None:
    clip = load_clip(f"local-dir:{clip_dir}", CPU)
    assert clip.logit_scale == pytest.approx(1 / 0.07, rel=1e-4)
    assert clip.sha256 == load_clip(str(clip_dir), CPU).sha256
    assert clip.sha256 != load_clip(str(write_clip(tmp_path / "b", seed=1)), CPU).sha256


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ViT-L-14:openai", r"quick-GELU.*use ViT-L-14-quickgelu:openai"),
        ("ViT-B-32-quickgelu:laion2b_s34b_b79k", r"say which weights|use ViT-B-32:laion2b"),
        ("ViT-B-33:openai", r"unknown CLIP.*ViT-B-32"),
        ("ViT-B-32", r"as ViT-B-32:TAG; 22 are known"),
        ("ViT-B-32:opnai", r"nearest: .*openai"),
        ("./nowhere", r"no open_clip_config.json"),
        ("local-dir:nowhere", r"no open_clip_config.json"),
    ],
)
def test_names_that_cannot_be(name: str, message: str) -> None:
    with pytest.raises(RichKDError, match=message):
        check_clip(name)


@pytest.mark.parametrize(
    "name", ["demo", "none", "ViT-L-14-quickgelu:openai", "ViT-B-32:laion2b_s34b_b79k"]
)
def test_names_that_can(name: str) -> None:
    check_clip(name)


def test_no_network_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr("open_clip.factory.download_pretrained", offline)
    with pytest.raises(RichKDError, match=r"cannot load CLIP ViT-B-32:openai.*--clip DIRECTORY"):
        load_clip("ViT-B-32:openai", CPU)


def test_damaged_local_clips(tmp_path: Path) -> None:
    folder = write_clip(tmp_path / "clip")
    weights = folder / "open_clip_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(RichKDError, match="cannot load CLIP.*check its config and weights"):
        load_clip(str(folder), CPU)
    weights.rename(folder / "weights.bin")
    with pytest.raises(RichKDError, match="holds no .safetensors"):
        check_clip(str(folder))
