"""The CLIP teacher against open_clip's own paths."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from helpers import refusal, refuses, write_clip
from PIL import Image

from richkd.core.errors import RichKDError
from richkd.core.fusion import class_embeddings
from richkd.data.inputs import ArrayInputs
from richkd.data.prompts import load_prompts
from richkd.models.hub_access import hub_fault, offline
from richkd.teachers.clip import blank_clip, check_clip, load_clip, local_folder

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
    ("name", "code", "value"),
    [
        ("ViT-L-14:openai", "clip-activation", "ViT-L-14-quickgelu:openai"),
        ("ViT-B-32-quickgelu:laion2b_s34b_b79k", "clip-tag-unknown", "ViT-B-32-quickgelu:TAG"),
        ("ViT-B-33:openai", "unknown-name", "ViT-B-32"),
        ("ViT-B-32", "clip-tag-unknown", "ViT-B-32:TAG"),
        ("ViT-B-32:opnai", "clip-tag-unknown", "openai"),
        ("./nowhere", "clip-directory", "open_clip_config.json"),
        ("local-dir:nowhere", "clip-directory", "open_clip_config.json"),
    ],
)
def test_names_that_cannot_be(name: str, code: str, value: str) -> None:
    with refuses(code, value):
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
    with refuses("clip-cannot-be-loaded", "ViT-B-32:openai", "--clip DIRECTORY"):
        load_clip("ViT-B-32:openai", CPU, fault=lambda: None)


def test_damaged_local_clips(tmp_path: Path) -> None:
    folder = write_clip(tmp_path / "clip")
    weights = folder / "open_clip_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with refuses("clip-cannot-be-loaded", folder):
        load_clip(str(folder), CPU)
    weights.rename(folder / "weights.bin")
    with refuses("clip-directory", folder, ".safetensors"):
        check_clip(str(folder))


# --- the hub -------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache on this disk, with one CLIP in it, and no network."""
    from huggingface_hub import constants

    repository = tmp_path / "hub" / "models--us--tiny-clip"
    write_clip(repository / "snapshots" / "abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return repository / "snapshots" / "abc"


def no_network() -> str:
    return "there is no network here"


@pytest.mark.parametrize("scheme", ["hf-hub:", "HF-HUB:"])
def test_a_clip_of_the_hub_is_read_from_its_cache(hub: Path, scheme: str) -> None:
    check_clip(f"{scheme}us/tiny-clip")
    assert local_folder(f"{scheme}us/tiny-clip") is None
    loaded = load_clip(f"{scheme}us/tiny-clip", CPU, fault=no_network)
    assert loaded.sha256 == load_clip(str(hub), CPU).sha256
    assert loaded.text_embeddings(["cat"], ["a {}"]).shape == (1, 1, 24)


def test_what_a_clip_of_the_hub_needs_is_named_before_its_weights(hub: Path) -> None:
    file = hub / "open_clip_config.json"
    config = json.loads(file.read_text())
    config["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = "some/tokenizer"
    file.write_text(json.dumps(config))
    (hub / "open_clip_model.safetensors").unlink()
    with refuses("clip-tokenizer-missing", "some/tokenizer", "transformers"):
        load_clip("hf-hub:us/tiny-clip", CPU, fault=no_network, find=lambda name: None)


def test_a_clip_that_is_not_in_the_cache(hub: Path) -> None:
    for name in ("hf-hub:us/other", "ViT-B-32:laion2b_s34b_b79k"):
        with refuses("clip-cannot-be-loaded", name, no_network(), "--clip DIRECTORY"):
            load_clip(name, CPU, fault=no_network)
    with refuses("clip-config-missing", "hf-hub:us/other"):
        blank_clip("hf-hub:us/other", CPU)
    assert blank_clip("hf-hub:us/tiny-clip", CPU).sha256 == ""


@pytest.mark.parametrize(
    "name", ["hf-hub:", "hf-hub:tiny-clip", "hf-hub:a/b/c", "hf-hub:../x", "HF-HUB:a b/c"]
)
def test_names_of_the_hub_that_are_none(name: str) -> None:
    with refuses("clip-name-malformed", repr(name), "hf-hub:OWNER/NAME"):
        check_clip(name)


def test_a_repository_without_its_scheme_is_pointed_to(tmp_path: Path) -> None:
    with refuses("clip-directory", "hf-hub:laion/CLIP-ViT-B-32-laion2B-s34B-b79K"):
        check_clip("laion/CLIP-ViT-B-32-laion2B-s34B-b79K")
    with pytest.raises(RichKDError, match="open_clip_config") as refused:
        check_clip(str(tmp_path))
    assert "hf-hub" not in str(refused.value)


class Session:
    """An HTTP client whose requests end in the given ways, in order."""

    def __init__(self, *ends: Exception | None) -> None:
        self.ends = [*ends]

    def head(self, url: str, timeout: float) -> None:
        assert url.startswith("http") and timeout >= 1
        end = self.ends.pop(0)
        if end is not None:
            raise end


class NetworkError(Exception):
    pass


class ConnectError(NetworkError):
    pass


class ConnectTimeout(Exception):
    pass


class ReadTimeout(Exception):
    pass


class ProxyError(Exception):
    pass


DNS = ConnectError("[Errno -2] Name or service not known")


@pytest.mark.parametrize(
    ("ends", "values"),
    [
        ([None], None),
        ([ReadTimeout()], None),  # slow, but there
        ([DNS, None], None),
        ([DNS, DNS], ["[Errno -2] Name or service not known"]),
        ([ConnectTimeout("timed out")], ["timed out"]),
        ([ProxyError("403 Forbidden")] * 2, ["403 Forbidden"]),
        ([ConnectError("")] * 2, ["ConnectError"]),
    ],
)
def test_whether_the_hub_can_be_reached(
    ends: list[Exception | None], values: list[str] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    session = Session(*ends)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    fault = hub_fault(session, pause_s=0)
    assert not session.ends and (fault is None) == (values is None)
    assert all(value in (fault or "") for value in values or ()), fault


def test_a_proxy_is_named_without_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("https_proxy", "http://me:secret@proxy:3128")
    fault = hub_fault(Session(DNS, DNS), pause_s=0) or ""
    assert "HTTPS_PROXY" in fault and "secret" not in fault
    with offline():
        assert "HF_HUB_OFFLINE" in (hub_fault(Session()) or "")


@pytest.mark.slow
def test_no_network_is_one_line_and_soon(tmp_path: Path) -> None:
    """As a user sees it: a name server that knows nothing, in a process of its own."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "richkd",
            "precompute",
            "--dataset",
            "shapes",
            "--limit",
            "32",
            "--teacher",
            "resnet8",
            "--clip",
            "ViT-B-32:laion2b_s34b_b79k",
            "--out",
            "s.zarr",
        ],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        timeout=300,
        env={
            **os.environ,
            "HF_ENDPOINT": "http://127.0.0.1:9",
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_OFFLINE": "0",
            "no_proxy": "127.0.0.1",
        },
    )
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2 and len(lines) == 2, done.stderr  # the dataset, and this
    refused = refusal(done.stderr)
    assert refused.code == "clip-cannot-be-loaded"
    assert "127.0.0.1" in refused and "--clip DIRECTORY" in refused
    assert [path.name for path in tmp_path.iterdir()] in ([], ["hf"])  # no teacher was trained
