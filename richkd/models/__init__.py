"""Networks by name: the CIFAR zoo and all models of timm, behind two functions."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from richkd.core.errors import RichKDError, first_line, nearest
from richkd.data.framing import NetworkInput, input_fault

# importing a family registers its models
from richkd.models import mobilenetv2_cifar as mobilenetv2_cifar
from richkd.models import resnet_cifar as resnet_cifar
from richkd.models import resnet_deep as resnet_deep
from richkd.models import shufflenet_v1 as shufflenet_v1
from richkd.models import shufflenet_v2 as shufflenet_v2
from richkd.models import vgg_cifar as vgg_cifar
from richkd.models import wide_resnet as wide_resnet
from richkd.models.registry import CONSTRUCTORS, import_timm

# The names of the literature; timm uses those of the VGGs for its ImageNet networks.
_VGGS = {f"vgg{depth}": f"cifar_vgg{depth}" for depth in (8, 11, 13, 16, 19)}
ZOO = (
    "resnet8",
    "resnet14",
    "resnet20",
    "resnet32",
    "resnet44",
    "resnet56",
    "resnet110",
    "resnet8x4",
    "resnet32x4",
    "ResNet18",
    "ResNet50",
    "wrn_16_1",
    "wrn_16_2",
    "wrn_40_1",
    "wrn_40_2",
    *_VGGS,
    "MobileNetV2",
    "ShuffleV1",
    "ShuffleV2",
)

# Arguments of timm's constructors that make some models fit smaller images.
_FITTING = {"patch_size": (4, 2), "window_size": (4, 2), "output_stride": (16, 8)}
_MISFITS = (
    RuntimeError,
    AssertionError,
    ValueError,
    TypeError,
    IndexError,
    ArithmeticError,
)


def create_model(
    name: str, num_classes: int, in_chans: int = 3, image_size: int | None = None, **settings: Any
) -> nn.Module:
    """Create a network with random weights: `model(x) -> logits [B, num_classes]`.

    Args:
        name: a model of the zoo (`resnet8x4`) or of timm (`mobilenetv3_small_050`). The zoo wins
            if both have the name; `timm/vgg13` is timm's.
        num_classes: the number of logits.
        in_chans: the number of channels of the images.
        image_size: the side of the images in pixels, for timm models built for one size.
        settings: further arguments of timm's constructor, such as `patch_size`.

    Raises:
        RichKDError: no model has that name, or it does not accept the settings.
    """
    check_names([name])
    given = ", ".join(f"{key} = {value!r}" for key, value in settings.items())
    if settings and name in ZOO:
        raise RichKDError(
            f"model {name} takes no settings, got {given}; leave them out",
            code="model-takes-no-settings",
        )
    try:
        return _build(name, num_classes, in_chans, image_size, settings)
    except (KeyError, *_MISFITS) as error:
        hint = "" if image_size is None else f"; {remedy(name, image_size, settings)}"
        raise RichKDError(
            f"model {name} cannot be built{' with ' * bool(given)}{given}: "
            f"{first_line(error)}{hint}",
            code="model-cannot-be-built",
        ) from None


def check_names(names: Collection[str]) -> None:
    """Check that models of these names exist; raise RichKDError with all that do not."""
    for name in names:
        _check_not_on_hub(name)
    others = [name for name in names if _registered(name) not in CONSTRUCTORS]
    missing = [name for name in others if not import_timm().is_model(_registered(name))]
    if missing:
        known = {*ZOO, *import_timm().list_models()}
        if len(missing) == 1:
            hint = nearest(missing[0], known, fallback=ZOO)
            raise RichKDError(f"unknown model {missing[0]!r}; {hint}", code="unknown-model")
        hints = [f"{name!r} ({nearest(name, known, 3, fallback=ZOO[:3])})" for name in missing]
        raise RichKDError(f"unknown models {', '.join(hints)}", code="unknown-model")


def _registered(name: str) -> str:
    """Return the name under which a model is registered, here or in timm."""
    return _VGGS.get(name, name.removeprefix("timm/"))


def has_tag(name: str) -> bool:
    """Return whether a name has a tag of timm's pretrained weights, as in `resnet18.a1_in1k`."""
    return name not in ZOO and "." in _registered(name)


def hub_name(name: str) -> str | None:
    """Return the OWNER/NAME[@REVISION] of a network on the Hugging Face hub, or None.

    `hf_hub:` is timm's older spelling of `hf-hub:`.
    """
    source, colon, repository = name.partition(":")
    return repository if colon and source.lower() in ("hf-hub", "hf_hub") else None


def names_weights(name: str) -> bool:
    """Return whether a name means pretrained weights: by a tag, or by a repository on the hub."""
    return has_tag(name) or hub_name(name) is not None


def check_trainable(name: str, weights: str = "") -> None:
    """Check that a network to be trained from scratch is not named by its pretrained weights.

    Args:
        name: the network's name; may be empty.
        weights: weights to start from, with which a tag is allowed; may be empty.

    Raises:
        RichKDError: the name is a repository's, or has a tag and there are no weights.
    """
    _check_not_on_hub(name)
    if not name or weights or not has_tag(name):
        return
    plain, _, tag = _registered(name).partition(".")
    plain = f"timm/{plain}" if name.startswith("timm/") or plain in ZOO else plain
    raise RichKDError(
        f"model {name!r} names pretrained weights ({tag}); start from them with --student-weights "
        f"pretrained (distill) or --init pretrained (train-teacher), or use {plain} to train it "
        f"from scratch",
        code="model-names-weights",
    )


def _check_not_on_hub(name: str) -> None:
    """Raise RichKDError if a name is that of a repository, which names no network by itself."""
    if hub_name(name) is not None:
        raise RichKDError(
            f"model {name!r} names pretrained weights on the hub, which only --teacher of richkd "
            f"precompute loads; name the network itself, e.g. timm/resnet50, and start it from a "
            f"file of these weights with --student-weights (distill) or --init (train-teacher)",
            code="model-names-weights",
        )


def timm_config(name: str) -> Any | None:
    """Return timm's configuration of a network by name; None for networks without one.

    It belongs to the name's tag, or is timm's default; networks such as the CIFAR zoo's have none.

    Raises:
        RichKDError: the tag is unknown.
    """
    if _registered(name) in CONSTRUCTORS:
        return None
    timm = import_timm()
    try:
        return timm.models.get_pretrained_cfg(_registered(name))
    except RuntimeError:
        plain, _, tag = _registered(name).partition(".")
        tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{plain}.*")]
        raise RichKDError(
            f"teacher {name!r}: timm knows no weights {tag!r} of {plain}; "
            f"{nearest(tag, tags) if tags else 'it knows none'}; or leave the tag out",
            code="teacher-input-unsupported",
        ) from None


def input_of(name: str, config: Any) -> NetworkInput:
    """Return the input that a configuration of timm states.

    Raises:
        RichKDError: the network takes images that are not square, padded or resized in another
            way, or the configuration is damaged.
    """
    try:
        channels, height, width = config.input_size
        found = NetworkInput(
            size=height,
            mean=tuple(map(float, config.mean)),
            std=tuple(map(float, config.std)),
            crop=float(config.crop_pct),
            interpolation=config.interpolation,
            crop_mode=config.crop_mode,
        )
        fault = input_fault(found.entry)
    except (TypeError, ValueError) as error:
        raise RichKDError(
            f"teacher {name}: its configuration is damaged ({first_line(error)}); choose another "
            f"teacher",
            code="teacher-input-unsupported",
        ) from None
    if height != width or channels != 3 or fault is not None:
        raise RichKDError(
            f"teacher {name} takes images of {height}×{width} px, {channels} channels, crop mode "
            f"{config.crop_mode}, {config.interpolation}; only square RGB images without padding "
            f"are supported: choose another teacher",
            code="teacher-input-unsupported",
        )
    return found


def pretrained_input(name: str) -> NetworkInput | None:
    """Return the input that timm's configuration of a network states, or None without one.

    Raises:
        RichKDError: as `timm_config` and `input_of`.
    """
    config = timm_config(name)
    return None if config is None else input_of(name, config)


def _build(
    name: str, num_classes: int, in_chans: int, image_size: int | None, settings: Mapping[str, Any]
) -> nn.Module:
    """Create a network as `create_model` does; raise whatever the constructor raises."""
    own = CONSTRUCTORS.get(_registered(name))
    if own is not None:
        return own(num_classes=num_classes, in_chans=in_chans, **settings)
    timm = import_timm()
    config = timm.models.get_pretrained_cfg(_registered(name))
    if image_size is not None and config is not None and config.fixed_input_size:
        settings = {"img_size": image_size, **settings}
    model: nn.Module = timm.create_model(
        _registered(name), num_classes=num_classes, in_chans=in_chans, **settings
    )
    embeds = (part for path, part in model.named_modules() if path.split(".")[-1] == "patch_embed")
    embed = next(embeds, None)
    patch = getattr(embed, "patch_size", None)
    if image_size is not None and patch and not getattr(embed, "dynamic_img_pad", False):
        side = patch[0] if isinstance(patch, tuple) else patch
        if image_size % side:
            raise ValueError(
                f"images of {image_size} px are not a whole number of patches of {side} px"
            )
    return model


def create_pretrained(
    name: str, num_classes: int, image_size: int, settings: Mapping[str, Any]
) -> nn.Module:
    """Create a network of timm with pretrained weights; raise whatever timm or the hub raises."""
    return _build(name, num_classes, 3, image_size, {**settings, "pretrained": True})


def forward(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return logits [B,C] and the pooled features [B,F] that enter the classifier, in one pass.

    Under autocast the classifier still computes in f32, since many logits in bfloat16 would tie.
    """
    maps = model.forward_features(images)  # type: ignore[operator]
    features = model.forward_head(maps, pre_logits=True)  # type: ignore[operator]
    classifier = model.get_classifier()  # type: ignore[operator]
    # running the head again would update its batch norms twice (CPUBone)
    once = isinstance(classifier, nn.Linear | nn.Sequential) or hasattr(classifier, "linear")
    # otherwise, e.g., two heads whose logits are averaged, or a convolution before flattening
    enters = features if once else maps
    if torch.is_autocast_enabled(images.device.type):
        enters = _single(enters)
    with torch.autocast(images.device.type, enabled=False):
        logits = classifier(enters) if once else model.forward_head(enters)  # type: ignore[operator]
    return logits, features.flatten(1)


def _single(maps: Any) -> Any:
    """Convert a tensor, or a list or tuple of tensors, to f32."""
    if isinstance(maps, Tensor):
        return maps.float()
    return type(maps)(_single(each) for each in maps)


def check_fit(
    model: nn.Module, name: str, image_size: int, num_classes: int | None, **settings: Any
) -> int:
    """Run two images of noise through a model and return its feature width F.

    Args:
        model: a model of `create_model`.
        name: its name.
        image_size: the side of the images in pixels.
        num_classes: C; None for whatever the model has.
        settings: the settings it was created with.

    Raises:
        RichKDError: the model does not accept images of this size, or does not compute its logits
            from pooled features alone.
    """
    training = model.training
    images = torch.randn(2, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    model.eval()
    try:
        with torch.no_grad():
            whole = model(images)
    except _MISFITS as error:
        raise RichKDError(
            f"model {name} does not fit images of {image_size}×{image_size}: {first_line(error)}; "
            f"{remedy(name, image_size, settings)}",
            code="model-does-not-fit",
        ) from None
    try:
        with torch.no_grad():
            logits, features = forward(model, images)
        fits = features.ndim == 2 and torch.allclose(logits, whole, rtol=1e-3, atol=1e-4)
    except (AttributeError, *_MISFITS):
        fits = False
    model.train(training)
    expected = whole.shape[1:] if num_classes is None else (num_classes,)
    if not fits or whole.shape != (2, *expected):
        raise RichKDError(
            f"model {name} does not compute logits from one vector of pooled features, as "
            f"distillation needs; choose another, e.g. resnet8x4",
            code="model-without-features",
        )
    return features.shape[1]


def remedy(name: str, image_size: int, settings: Mapping[str, Any]) -> str:
    """Return the flags that make a model fit, found by trying them on the meta device."""
    found = []
    for key, values in {"img_size": (image_size,), **_FITTING}.items():
        for value in values:
            try:
                with torch.device("meta"), torch.no_grad():
                    model = _build(name, 2, 3, image_size, {**settings, key: value}).eval()
                    model(torch.empty(2, 3, image_size, image_size))
            except (KeyError, *_MISFITS):
                continue
            found.append(f"--student-set {key}={value}")
            break
    other = "choose a model with less downsampling, e.g. resnet8x4"
    return f"{' or '.join(found)} makes it fit; or {other}" if found else other
