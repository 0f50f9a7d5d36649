"""The CLIP teacher, through open_clip: image features, text embeddings of each prompt, the scale.

Images are resized, cropped and normalised by the model's own preprocessing: arrays in batches on
the device, files by open_clip's PIL transform in data-loader workers.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional

from richkd.core import fusion
from richkd.core.choices import CLIP_PRECISIONS
from richkd.core.errors import RichKDError, first_line, nearest, unknown
from richkd.core.progress import QUIET, Report
from richkd.core.ranks import ALONE, Ranks
from richkd.data.inputs import ArrayInputs, Inputs
from richkd.data.prompts import fill
from richkd.data.views import resize_bytes
from richkd.models.hub_access import hub_fault, offline, quiet
from richkd.models.weights import state_sha256
from richkd.store.schema import PrecisionError
from richkd.teachers.clip_text import (
    NOT_FETCHED,
    FindSpec,
    check_text,
    check_tokens,
    load_tokenizer,
    text_of,
)

LOCAL = "local-dir:"
HUB = "hf-hub:"
TEXT_BATCH = 256
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


@dataclass(frozen=True)
class ClipTeacher:
    """A CLIP in evaluation mode."""

    name: str
    model: Any
    tokenizer: Any
    transform: Any  # of open_clip, from a PIL image
    preprocessing: dict[str, Any]
    sha256: str
    device: torch.device
    precision: str = "float32"  # of the image tower; the few texts are always in float32

    @cached_property
    def logit_scale(self) -> float:
        """The factor by which CLIP's training scaled cosines."""
        return float(self.model.logit_scale.exp())

    @cached_property
    def logit_bias(self) -> float | None:
        """What CLIP's training added to scaled cosines, if its loss was a sigmoid's (SigLIP)."""
        bias = getattr(self.model, "logit_bias", None)
        return None if bias is None else float(bias)

    def preprocess(self, images: Tensor) -> Tensor:
        """Apply the PIL transform to a batch: [B,H,W,3] uint8 -> [B,3,S,S] f32."""
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
            # torchvision's Resize truncates, open_clip's own resizing rounds
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
        mean, std = self._constants
        return (pixels.float() / 255).sub_(mean).div_(std)

    @cached_property
    def _constants(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, each [3,1,1], on the device."""
        mean, std = (
            torch.tensor(self.preprocessing[name], device=self.device)[:, None, None]
            for name in ("mean", "std")
        )
        return mean, std

    @property
    def side(self) -> int:
        """The longer side of the images that the model takes, in pixels."""
        size = self.preprocessing["size"]
        return size if isinstance(size, int) else max(size)

    @torch.inference_mode()
    def image_features(self, inputs: Inputs, start: int, stop: int, batch_size: int) -> Tensor:
        """Return features of the clean images start..stop: [stop − start, D], unit length, f32."""
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
        """Encode preprocessed images: [B,3,S,S] -> [B,D], unit length, f32."""
        with autocast(self.device, self.precision):
            features = self.model.encode_image(pixels)
        return F.normalize(features.float(), dim=-1)

    @torch.inference_mode()
    def text_embeddings(
        self,
        class_names: Sequence[str],
        templates: Sequence[str],
        ranks: Ranks = ALONE,
        report: Report = QUIET,
    ) -> Tensor:
        """Return one embedding per class and prompt: [C,P,D] on the CPU, unit length, f32.

        There may be hundreds of thousands of texts, so they are tokenised and embedded batch by
        batch, and their embeddings are held once.

        Args:
            class_names: C names.
            templates: P prompts with a place for the name.
            ranks: the processes that share the work; each returns all embeddings.
            report: receives progress.

        Raises:
            RichKDError: the tokenizer is not the one that the CLIP was trained with.
        """
        count = len(class_names) * len(templates)
        embeddings = torch.empty(count, self.text_width)
        batches = torch.split(embeddings, TEXT_BATCH)
        own = ranks.own(range(len(batches)))
        total = sum(len(batches[number]) for number in own)
        with report.track(f"embedding the prompts{ranks.task}", total, "texts") as tick:
            for number in own:
                start = number * TEXT_BATCH
                pairs = (divmod(at, len(templates)) for at in range(start, count)[:TEXT_BATCH])
                texts = [fill(templates[prompt], class_names[name]) for name, prompt in pairs]
                batches[number].copy_(F.normalize(self._encode_texts(texts), dim=-1))
                tick(len(texts))
        ranks.share(batches)
        return embeddings.reshape(len(class_names), len(templates), -1)

    @cached_property
    def text_width(self) -> int:
        """The width D of its embeddings."""
        with torch.inference_mode():
            return self._encode_texts(["a"]).shape[-1]

    def _encode_texts(self, texts: list[str]) -> Tensor:
        """Return embeddings of texts [B,D] on the device, of any length, f32."""
        tokens = self.tokenizer(texts)
        check_tokens(self.name, self.model, self.tokenizer, tokens)
        encoded: Tensor = self.model.encode_text(tokens.to(self.device)).float()
        return encoded


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """Return PyTorch's autocast for a precision, or nothing for float32.

    Raises:
        RichKDError: the device does not support the precision.
    """
    if precision == "float32":
        return nullcontext()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # autocast warns and then ignores what it cannot do
        try:
            return torch.autocast(device.type, getattr(torch, precision))
        except (RuntimeError, UserWarning) as error:
            raise RichKDError(
                f"clip_precision = {precision!r}: not supported on {device} "
                f"({first_line(error)}); choose another of {', '.join(CLIP_PRECISIONS)}",
                code="clip-precision-unsupported",
            ) from None


@torch.inference_mode()
def precision_error(
    clip: ClipTeacher, inputs: Inputs, features: Tensor, classes: Tensor, batch_size: int
) -> PrecisionError:
    """Measure how cosines and zero-shot classes in a precision differ from those in float32.

    Args:
        clip: the teacher in its precision.
        inputs: some images.
        features: [N,D], the teacher's features of the first N of them.
        classes: class embeddings [C,D].
        batch_size: images per forward pass.
    """
    count = len(features)
    exact = replace(clip, precision="float32").image_features(inputs, 0, count, batch_size)
    cosines, expected = (fusion.clip_similarity(each, classes) for each in (features, exact))
    difference = (cosines - expected).abs()
    return {
        "images": count,
        "cosine_max": difference.max().item(),
        "cosine_mean": difference.mean().item(),
        "same_class": (cosines.argmax(1) == expected.argmax(1)).float().mean().item(),
    }


def check_clip(name: str, find: FindSpec = find_spec) -> None:
    """Check that a CLIP can be loaded, by its name or configuration alone.

    Args:
        name: `NAME:TAG` of open_clip, `hf-hub:OWNER/NAME`, a directory with
            open_clip_config.json, `demo` or `none`.
        find: finds a package, or returns None.

    Raises:
        RichKDError: there is no such model, tag or directory, the weights were trained with another
            GELU, or the text tower or tokenizer needs packages that are not installed.
    """
    folder, hub = local_folder(name), hub_name(name)
    if folder is not None:
        _check_folder(name, folder, find)
    elif hub is not None:  # load_clip checks its configuration, which has to be downloaded
        if not _REPOSITORY.fullmatch(hub):
            raise RichKDError(
                f"CLIP {name!r}: name a repository as {HUB}OWNER/NAME", code="clip-name-malformed"
            )
    elif name not in ("demo", "none"):
        _check_tag(name)
        check_text(name, open_clip.get_model_config(name.partition(":")[0]) or {}, find=find)


def _check_tag(name: str) -> None:
    """Check that open_clip has a model and tag, and that their activations agree."""
    model, colon, tag = name.partition(":")
    if model not in open_clip.list_models():
        raise unknown(
            "CLIP (neither a directory nor a model of open_clip):",
            model,
            [*open_clip.list_models(), "demo", "none"],
        )
    tags = open_clip.list_pretrained_tags_by_model(model)
    if not colon or tag not in tags:
        raise RichKDError(
            f"CLIP {name!r}: name its weights as {model}:TAG; {nearest(tag, tags)}",
            code="clip-tag-unknown",
        )
    wants = bool((open_clip.get_pretrained_cfg(model, tag) or {}).get("quick_gelu", False))
    has = bool((open_clip.get_model_config(model) or {}).get("quick_gelu", False))
    other = f"{model}-quickgelu" if wants else model.removesuffix("-quickgelu")
    # without another model for these weights, open_clip's configuration is right
    if wants != has and other != model and tag in open_clip.list_pretrained_tags_by_model(other):
        raise RichKDError(
            f"CLIP {name!r}: these weights were trained with "
            f"{'quick-GELU' if wants else 'GELU'}, but the model {model} uses "
            f"{'GELU' if wants else 'quick-GELU'}; use {other}:{tag}",
            code="clip-activation",
        )


def _check_folder(name: str, folder: Path, find: FindSpec) -> None:
    """Check that a directory has the files that open_clip reads."""
    file = folder / "open_clip_config.json"
    if not file.is_file():
        hint = (
            f"; for a repository on the Hugging Face hub, use {HUB}{name}"
            if _REPOSITORY.fullmatch(name) and not folder.exists()
            else ""
        )
        raise RichKDError(
            f"{folder} has no open_clip_config.json; a local CLIP is a directory with that file "
            f"and open_clip_model.safetensors{hint}",
            code="clip-directory",
        )
    if not any(folder.glob("*.safetensors")):
        raise RichKDError(
            f"{folder} has no .safetensors weights; save the CLIP's state_dict as "
            f"{folder / 'open_clip_model.safetensors'}",
            code="clip-directory",
        )
    try:
        config = json.loads(file.read_text(encoding="utf-8"))["model_cfg"]
        config["text_cfg"].get("hf_tokenizer_name")
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise RichKDError(
            f"{file} is damaged or not a configuration of open_clip ({error!r}); restore the file",
            code="clip-config-damaged",
        ) from None
    check_text(name, config, folder, find)


def load_clip(
    name: str,
    device: torch.device,
    precision: str = "float32",
    *,
    fault: Callable[[], str | None] = hub_fault,
    find: FindSpec = find_spec,
) -> ClipTeacher:
    """Load a CLIP that `check_clip` accepts, other than `demo` and `none`.

    Args:
        name: the CLIP's name.
        device: where it runs.
        precision: of its image tower.
        fault: returns why the Hugging Face hub cannot be reached, or None.
        find: finds a package, or returns None.

    Raises:
        RichKDError: its tokenizer or weights cannot be downloaded, or do not fit.
    """
    folder, hub = local_folder(name), hub_name(name)
    model_name, _, tag = name.partition(":")
    source: tuple[str, str | None] = (model_name, tag)
    if folder is not None:
        source = (f"{LOCAL}{folder}", None)
    elif hub is not None:
        source = (f"{HUB}{hub}", None)
    local, unreachable = _is_whole(folder), None
    if not local:
        unreachable = fault()
    try:
        with quiet(), offline(local or unreachable is not None), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            config = open_clip.get_model_config(source[0]) or {}
            if hub is not None:
                check_text(name, config, find=find)
            text = text_of(config, folder)
            # before its weights are downloaded
            tokenizer = load_tokenizer(name, source[0], text, folder, unreachable)
            changed = {} if text == config.get("text_cfg", {}) else {"text_cfg": text}
            model = open_clip.create_model(
                source[0], source[1], device=device, require_pretrained=True, **changed
            )
            return _teacher(name, model, device, tokenizer, state_sha256(model), precision)
    except RichKDError:
        raise
    except Exception as error:  # open_clip and the hub raise errors of many kinds
        reason = first_line(error)
        if unreachable is not None and any(part in str(error) for part in NOT_FETCHED):
            reason = f"it is not in the cache, and {unreachable}"
        raise RichKDError(
            f"cannot load CLIP {name}: {reason}; {_remedy(folder, local)}",
            code="clip-cannot-be-loaded",
        ) from None


def _remedy(folder: Path | None, local: bool) -> str:
    """Return what helps where a CLIP's weights cannot be loaded."""
    if local:
        return "check its configuration and weights"
    if folder is not None:
        return "its text model is downloaded from the Hugging Face hub"
    return (
        "without a network, copy the model's open_clip_config.json and open_clip_model.safetensors "
        "from elsewhere to a directory and pass --clip DIRECTORY"
    )


def _is_whole(folder: Path | None) -> bool:
    """Return whether a CLIP is in a directory, its text model included."""
    if folder is None:
        return False
    text = text_of(open_clip.get_model_config(f"{LOCAL}{folder}"), folder)
    return text.get("hf_model_name") in (None, "", str(folder))


def _teacher(
    name: str,
    model: Any,
    device: torch.device,
    tokenizer: Any = None,
    sha256: str = "",
    precision: str = "float32",
) -> ClipTeacher:
    preprocessing = open_clip.transform.PreprocessCfg(**model.visual.preprocess_cfg)
    return ClipTeacher(
        name=name,
        model=model.eval().requires_grad_(False),
        tokenizer=tokenizer,
        transform=open_clip.transform.image_transform_v2(preprocessing, is_train=False),
        preprocessing=dict(model.visual.preprocess_cfg),
        sha256=sha256,
        device=device,
        precision=precision,
    )


def blank_clip(name: str, device: torch.device, find: FindSpec = find_spec) -> ClipTeacher:
    """Create a CLIP of random weights, without a tokenizer, as costly as the real one.

    Nothing is downloaded.

    Args:
        name: NAME or NAME:TAG of open_clip, or a repository on the hub whose configuration is in
            the hub's cache.
        device: where it runs.
        find: finds a package, or returns None.

    Raises:
        RichKDError: as `check_clip`, except that no tag is needed.
    """
    hub, (model_name, colon, _) = hub_name(name), name.partition(":")
    if hub is not None:
        check_clip(name)
        model_name = f"{HUB}{hub}"
    elif colon or model_name not in open_clip.list_models():
        _check_tag(name)
    with quiet(), offline(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            config = open_clip.get_model_config(model_name) or {}
            if "hf_model_name" in config.get("text_cfg", {}):
                check_text(name, config, find=find)
            model = open_clip.create_model(
                model_name, None, load_weights=False, device=device, pretrained_text=False
            )
        except OSError:
            raise RichKDError(
                f"CLIP {name}: its configuration is not in the hub's cache, and a plan downloads "
                f"nothing; name another model of the same size",
                code="clip-config-missing",
            ) from None
    return _teacher(name, model, device)


def local_folder(name: str) -> Path | None:
    """Return the directory that a name means, or None for a name of open_clip or the hub."""
    if name.startswith(LOCAL):
        return Path(name.removeprefix(LOCAL))
    path = Path(name)
    if hub_name(name) is not None:
        return None
    return path if path.is_dir() or "/" in name or "\\" in name else None


def hub_name(name: str) -> str | None:
    """Return the OWNER/NAME after `hf-hub:`, or None for other names."""
    return name[len(HUB) :] if name.lower().startswith(HUB) else None
