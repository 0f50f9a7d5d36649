"""The CLIP teacher, through open_clip: image features, per-prompt text embeddings, its scale.

Images are resized, cropped and normalised as the model's own preprocessing says: for arrays in
batches on the device, for files by open_clip's PIL transform in data-loader workers.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional

from richkd.data.inputs import ArrayInputs, Inputs
from richkd.data.prompts import fill
from richkd.data.views import resize_bytes
from richkd.errors import RichKDError, nearest, unknown
from richkd.models.weights import state_sha256

LOCAL = "local-dir:"
TEXT_BATCH = 256


@dataclass(frozen=True)
class ClipTeacher:
    """A CLIP in evaluation mode."""

    name: str
    model: Any
    tokenizer: Any
    transform: Any  # open_clip's, from a PIL image
    preprocessing: dict[str, Any]
    sha256: str
    device: torch.device

    @property
    def logit_scale(self) -> float:
        """The factor of cosines that CLIP was trained with."""
        return float(self.model.logit_scale.exp())

    def preprocess(self, images: Tensor) -> Tensor:
        """What the PIL transform does, for a batch: [B,H,W,3] uint8 -> [B,3,S,S] f32."""
        config = self.preprocessing
        size = config["size"]
        height, width = (size, size) if isinstance(size, int) else size
        interpolation = "bilinear" if config["interpolation"] == "bilinear" else "bicubic"
        pixels = images.permute(0, 3, 1, 2)
        rows, columns = pixels.shape[-2:]
        if config["resize_mode"] == "squash":
            target = [height, width]
        else:
            longest = config["resize_mode"] == "longest"
            ratio = (max if longest else min)(rows / height, columns / width)
            # torchvision's Resize cuts off where open_clip's own resizing rounds
            whole = int if not longest and height == width else round
            target = [whole(rows / ratio + 1e-9), whole(columns / ratio + 1e-9)]
        pixels = resize_bytes(pixels, target, interpolation)
        if target != [height, width]:
            if config["resize_mode"] == "longest":
                down, right = height - target[0], width - target[1]
                pads = [right // 2, down // 2, right - right // 2, down - down // 2]
                pixels = functional.pad(pixels, pads, fill=config["fill_color"])
            else:
                pixels = functional.center_crop(pixels, [height, width])
        normalized: Tensor = functional.normalize(
            pixels.float() / 255, list(config["mean"]), list(config["std"])
        )
        return normalized

    @torch.inference_mode()
    def image_features(self, inputs: Inputs, start: int, stop: int, batch_size: int) -> Tensor:
        """Features of the clean images start..stop: [stop − start, D], unit length, f32."""
        if isinstance(inputs, ArrayInputs):
            batches = (
                self.preprocess(images)
                for images in torch.split(inputs.images[start:stop], batch_size)
            )
        else:
            no_views = torch.empty(0, len(inputs.files), 5)
            decoded = inputs.decode_once([range(start, stop)], no_views, batch_size, self.transform)
            batches = (pixels for _, _, pixels in decoded if pixels is not None)
        return torch.cat([self.encode(pixels) for pixels in batches])

    @torch.inference_mode()
    def encode(self, pixels: Tensor) -> Tensor:
        """Features of preprocessed images: [B,3,S,S] -> [B,D], unit length, f32."""
        return F.normalize(self.model.encode_image(pixels).float(), dim=-1)

    @torch.inference_mode()
    def text_embeddings(self, class_names: Sequence[str], templates: Sequence[str]) -> Tensor:
        """One embedding a class and prompt: [C,P,D], unit length, f32."""
        texts = [fill(template, name) for name in class_names for template in templates]
        encoded = torch.cat([
            self.model.encode_text(tokens.to(self.device)).float()
            for tokens in torch.split(self.tokenizer(texts), TEXT_BATCH)
        ])  # fmt: skip
        shape = len(class_names), len(templates), encoded.shape[-1]
        embeddings: Tensor = F.normalize(encoded, dim=-1).reshape(shape)
        return embeddings


def check_clip(name: str) -> None:
    """Refuse, before anything long, a CLIP that cannot be: by name alone, nothing is loaded.

    `NAME:TAG` of open_clip, a directory with open_clip_config.json, `demo` or `none`.

    Raises:
        RichKDError: no such model, tag or directory, or a tag trained with another GELU.
    """
    if name in ("demo", "none"):
        return
    folder = local_folder(name)
    if folder is not None:
        if not (folder / "open_clip_config.json").is_file():
            raise RichKDError(
                f"{folder} holds no open_clip_config.json; a local CLIP is a directory with that "
                f"and open_clip_model.safetensors"
            )
        if not any(folder.glob("*.safetensors")):
            raise RichKDError(
                f"{folder} holds no .safetensors weights; save the CLIP's state_dict as "
                f"{folder / 'open_clip_model.safetensors'}"
            )
        return
    model, colon, tag = name.partition(":")
    if model not in open_clip.list_models():
        raise unknown("CLIP (neither a directory nor a model of open_clip):", model,
                      [*open_clip.list_models(), "demo", "none"])  # fmt: skip
    tags = open_clip.list_pretrained_tags_by_model(model)
    if not colon or tag not in tags:
        raise RichKDError(f"CLIP {name!r}: say which weights as {model}:TAG; {nearest(tag, tags)}")
    wants = bool((open_clip.get_pretrained_cfg(model, tag) or {}).get("quick_gelu", False))
    has = bool((open_clip.get_model_config(model) or {}).get("quick_gelu", False))
    if wants != has:
        other = f"{model}-quickgelu" if wants else model.removesuffix("-quickgelu")
        raise RichKDError(
            f"CLIP {name!r}: these weights were trained with "
            f"{'quick-GELU' if wants else 'GELU'}, the model {model} has "
            f"{'GELU' if wants else 'quick-GELU'}; use {other}:{tag}"
        )


def load_clip(name: str, device: torch.device) -> ClipTeacher:
    """Load a CLIP that `check_clip` has passed; `demo` and `none` are not loaded here.

    Raises:
        RichKDError: its weights cannot be fetched (no network) or do not fit.
    """
    folder = local_folder(name)
    model_name, _, tag = name.partition(":")
    source = (f"{LOCAL}{folder}", None) if folder is not None else (model_name, tag)
    try:
        with quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            model = open_clip.create_model(
                source[0], source[1], device=device, require_pretrained=True
            )
            tokenizer = open_clip.get_tokenizer(source[0])
            preprocessing = open_clip.transform.PreprocessCfg(**model.visual.preprocess_cfg)
            transform = open_clip.transform.image_transform_v2(preprocessing, is_train=False)
    except Exception as error:  # open_clip and the hub raise errors of many kinds
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        remedy = (
            "check its config and weights"
            if folder is not None
            else "without a network, copy the model's open_clip_config.json and "
            "open_clip_model.safetensors from elsewhere into a directory and pass --clip DIRECTORY"
        )
        raise RichKDError(f"cannot load CLIP {name}: {reason}; {remedy}") from None
    model.eval().requires_grad_(False)
    return ClipTeacher(
        name=name, model=model, tokenizer=tokenizer, transform=transform,
        preprocessing=dict(model.visual.preprocess_cfg), sha256=state_sha256(model), device=device,
    )  # fmt: skip


@contextmanager
def quiet() -> Iterator[None]:
    """open_clip logs to the root what it also raises, or what is known here."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        root.setLevel(level)


def blank_clip(name: str, device: torch.device) -> ClipTeacher:
    """A CLIP of random weights, without a tokenizer, that costs what the real one does.

    Args:
        name: NAME or NAME:TAG of open_clip; nothing is downloaded.
        device: where it is to run.

    Raises:
        RichKDError: as `check_clip`, but that no tag is needed.
    """
    model_name, colon, _ = name.partition(":")
    if colon or model_name not in open_clip.list_models():
        check_clip(name)
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = open_clip.create_model(
            model_name, None, load_weights=False, device=device, pretrained_text=False
        )
    model.eval().requires_grad_(False)
    preprocessing = open_clip.transform.PreprocessCfg(**model.visual.preprocess_cfg)
    return ClipTeacher(
        name=name, model=model, tokenizer=None,
        transform=open_clip.transform.image_transform_v2(preprocessing, is_train=False),
        preprocessing=dict(model.visual.preprocess_cfg), sha256="", device=device,
    )  # fmt: skip


def local_folder(name: str) -> Path | None:
    """The directory that a name means, or None for a name of open_clip's."""
    if name.startswith(LOCAL):
        return Path(name.removeprefix(LOCAL))
    path = Path(name)
    return path if path.is_dir() or "/" in name or "\\" in name else None
