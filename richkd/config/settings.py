"""Every setting of every stage: its name, type, limits, default and explanation.

A recipe is a TOML file with one table per command (`[train-teacher]`, `[precompute]`, `[distill]`,
`[sweep]`). CLI flags override the recipe, and the recipe overrides the defaults below. Does not
import torch.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from os import PathLike, fspath
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from richkd.config import catalog
from richkd.core.choices import (
    CNN_ROWS,
    CROP,
    MIXING,
    ROWS,
    ClipHead,
    ClipPrecision,
    Decode,
    Interpolation,
    Precision,
    Row,
    Scale,
    Step,
    TeacherHead,
    read_augment,
)
from richkd.core.errors import RichKDError, local_path, nearest, require
from richkd.core.validation import (
    Count,
    Limit,
    NotNegative,
    Positive,
    Share,
    at_least,
    check,
    from_to_below,
    hints,
    within,
)

NO_TEACHER = "none"  # the CNN teacher in the settings of a CLIP that is added to a cache
LEAST_SIDE = 8  # pixels per side of an image
AUTO_HOLDOUT = 0.2  # share of the test images, for alpha auto and halving

Alpha = Share | Literal["auto"]
ViewSpace = Literal["auto", "pad-crop-flip", "resized-crop-flip"]
Seed = Annotated[int, Limit("in 0..2³²−1", lambda seed: 0 <= seed < 2**32)]
Side = Annotated[int, at_least(LEAST_SIDE)]
BelowOne = Annotated[float, from_to_below(0, 1)]
Ascending = Limit(
    "two ascending numbers, as in 0,4095", lambda ends: len(ends) == 2 and ends[0] < ends[1]
)
Gpus = Annotated[
    float,
    Limit(
        "0, in [0.001, 1), or a whole number",
        lambda gpus: gpus == 0 or 0.001 <= gpus < 1 or (gpus >= 1 and float(gpus).is_integer()),
    ),
]
Keep = Annotated[
    str,
    Limit(
        "all, or top-K with K from 1, as in top-50",
        lambda keep: keep == "all" or re.fullmatch("top-[1-9][0-9]{0,8}", keep) is not None,
    ),
]


def three_channels(value: Any) -> tuple[float, ...]:
    """Return one number per channel; a single number stands for all three."""
    numbers = tuple(value) if isinstance(value, tuple | list) else (value,)
    return tuple(map(float, numbers * 3 if len(numbers) == 1 else numbers))


def _are_pixels(low: Callable[[float], bool]) -> Callable[[Any], bool]:
    def holds(value: Any) -> bool:
        channels = three_channels(value)
        return len(channels) == 3 and all(low(each) and each <= 1 for each in channels)

    return holds


Mean = Annotated[
    float | tuple[float, ...],
    Limit("one number or three, of pixels in 0..1", _are_pixels(lambda each: each >= 0)),
]
Deviation = Annotated[
    float | tuple[float, ...],
    Limit("one number or three, of pixels in 0..1, above 0", _are_pixels(lambda each: each > 0)),
]


def read_alpha(text: str) -> Alpha:
    """Read an alpha typed on the command line: a number or auto."""
    try:
        return "auto" if text == "auto" else float(text)
    except ValueError:
        raise RichKDError(
            f"alpha = {text!r}: must be a number in [0, 1], or auto", code="value-malformed"
        ) from None


def _read_alphas(text: str) -> tuple[Alpha, ...]:
    return tuple(read_alpha(part.strip()) for part in text.split(",") if part.strip())


def read_weights(text: str) -> dict[str, float] | Literal["auto"]:
    """Read the weights of teachers typed on the command line: NAME=NUMBER,… or auto."""
    if text == "auto":
        return "auto"
    weights: dict[str, float] = {}
    for part in text.split(","):
        name, _, number = part.partition("=")
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        if not name.strip() or not math.isfinite(value) or name.strip() in weights:
            raise RichKDError(
                f"weights = {text!r}: must name each teacher once, as in cnn=0.5,vit=0.2,clip=0.3, "
                f"or be auto",
                code="value-malformed",
            )
        weights[name.strip()] = value
    return weights


def shown_weights(weights: object) -> str:
    """Return weights as the command line takes them."""
    if isinstance(weights, Mapping):
        return ",".join(f"{name}={weight:.3g}" for name, weight in weights.items())
    return str(weights)


def used_weights(settings: Distill) -> dict[str, float] | Literal["auto"] | None:
    """Return the weights of a run without those of 0."""
    given = settings.weights
    return (
        {n: weight for n, weight in given.items() if weight} if isinstance(given, dict) else given
    )


def _read_stage_one_alpha(text: str) -> Alpha:
    if text == "auto":
        raise RichKDError(
            "alpha 'auto' belongs to stage two; pass it to richkd distill",
            code="alpha-auto-in-stage-one",
        )
    return read_alpha(text)


def setting(
    default: Any,
    help: str,
    *,
    path: bool = False,
    flag: str | None = None,
    read: Callable[[str], Any] | None = None,
    later: bool = False,
) -> Any:
    """Return a dataclass field that is a setting.

    Args:
        default: the default; a dict is copied.
        help: the explanation, for `--help` and the documentation.
        path: expand `~` at its start.
        flag: the CLI flag, if it is not the field's name.
        read: converts what is typed on the command line, if the type alone does not determine how
            (see config/flags.py).
        later: recipes of earlier versions do not have it, so it is recorded only if it differs
            from the default.
    """
    metadata = {"help": help, "path": path, "flag": flag, "read": read, "later": later}
    if isinstance(default, dict):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


class Settings:
    """A group of settings: checked field by field when it is made, then by `_complete`."""

    def __post_init__(self) -> None:
        for each in fields(self):  # type: ignore[arg-type]  # its subclasses are dataclasses
            value = getattr(self, each.name)
            if each.metadata["path"] and isinstance(value, str | PathLike):
                value = catalog.at_home(fspath(value))
            check(value, hints(type(self))[each.name], each.name)
            self._set(each.name, tuple(value) if isinstance(value, list) else value)
        self._complete()

    def _complete(self) -> None:
        """Fill in defaults that depend on other settings, and check rules that span several."""

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)


@dataclass(frozen=True, kw_only=True)
class Images(Settings):
    """Settings of the images and where they are."""

    dataset: str = setting(
        "",
        "shapes, fashion-mnist, cifar10, cifar100, imagefolder:PATH, hf:NAME[@CONFIG][:SPLIT] (of "
        "Hugging Face, or a folder of Parquet files; SPLIT to train on) or wds:PATH (WebDataset "
        "shards with an index)",
        path=True,
    )
    limit: Count | None = setting(None, "use only the first N training samples")
    data_root: str = setting(
        "data", "folder of the datasets; missing ones are downloaded to it", path=True
    )
    image_size: Side | None = setting(
        None, "pixels per side of your own images; default by their sizes"
    )
    view_space: ViewSpace = setting(
        "auto",
        "views of your own images: resized-crop-flip, for photographs; pad-crop-flip, for "
        "images of one size, which are taken whole; or auto (by their sizes)",
        later=True,
    )
    class_names: str = setting(
        "",
        "file with the names of your own classes, one per line; or curated (open_clip's, for "
        "ImageNet)",
        path=True,
    )
    image_column: str = setting(
        "", "column of hf:NAME, or extension in wds:PATH, of the images; default the only one"
    )
    label_column: str = setting(
        "",
        "column of hf:NAME, or extension or JSON key in wds:PATH, of the labels; default the only "
        "one, or label",
    )
    broken: Literal["refuse", "skip"] = setting(
        "refuse", "damaged files among your own images: refuse or skip"
    )
    background: str = setting(
        "white", "colour behind transparent pixels of your own images: a name, or #RRGGBB"
    )
    pixel_range: Annotated[tuple[float, ...], Ascending] | None = setting(
        None,
        "LOW,HIGH: the values of black and white in your own 16-bit, 32-bit and float "
        "images; default by their format or values",
    )
    validation: BelowOne = setting(
        0.0, "share of the training images to make choices on; no network is trained on them"
    )

    def _complete(self) -> None:
        super()._complete()
        if not self.dataset:
            raise RichKDError(
                "no dataset given; choose one, e.g. --dataset cifar100", code="dataset-not-given"
            )
        kind, _ = catalog.split_name(self.dataset)
        if kind not in catalog.OWN:
            self._check_plain(kind)
        if kind == catalog.IMAGE_FOLDER or kind not in catalog.OWN:
            for name in ("image_column", "label_column"):
                value = getattr(self, name)
                require(value == "", name, value, f"left out for {kind}, which has no columns")
        if self.background != "white":
            from richkd.core.colours import read_colour

            read_colour(self.background)
        if self.pixel_range is not None:
            self._set("pixel_range", tuple(map(float, self.pixel_range)))
        local_path(self.data_root, "--data-root")

    def _check_plain(self, kind: str) -> None:
        """Check that no setting is given that applies to the user's own images only."""
        for name, default, known in (
            ("image_size", None, "have one size"),
            ("view_space", "auto", "have one size"),
            ("class_names", "", "have classes with names"),
            ("background", "white", "are 8 bits deep and opaque"),
            ("pixel_range", None, "are 8 bits deep and opaque"),
        ):
            value = getattr(self, name)
            require(value == default, name, value, f"left out for {kind}, whose images {known}")


@dataclass(frozen=True, kw_only=True)
class Training(Settings):
    """Settings of training; the defaults follow the CIFAR distillation literature."""

    epochs: Count = setting(240, "passes over the training samples")
    batch_size: Count = setting(64, "samples per step")
    lr: Positive | None = setting(
        None,
        "initial learning rate; default 0.05, or 0.01 for MobileNetV2, ShuffleV1 and ShuffleV2; "
        "0.001 for the optimizers of Adam's family",
    )
    optimizer: str = setting(
        "sgd", "sgd, or another of timm's optimizers: adamw, lamb, nadamw, …", later=True
    )
    optimizer_options: dict[str, Any] = setting(
        {}, "NAME=VALUE: argument of the optimizer, e.g. eps=1e-6", flag="--optimizer-set"
    )
    momentum: BelowOne = setting(0.9, "momentum of SGD, and of other optimizers that have one")
    nesterov: bool = setting(False, "Nesterov's momentum, for sgd", later=True)
    weight_decay: BelowOne = setting(
        5e-4, "weight decay; optimizers other than sgd spare biases and norms, as in timm"
    )
    warmup: NotNegative = setting(
        0.0, "epochs in which the learning rate rises from 0, step by step", later=True
    )
    ema: BelowOne = setting(
        0.0,
        "decay per step of an average of the weights, which is then tested and saved; 0: none",
        later=True,
    )
    label_smoothing: BelowOne = setting(
        0.0, "share of a label that the cross-entropy spreads over all classes", later=True
    )
    schedule: Literal["step", "cosine"] = setting(
        "step", "step (÷10 after 62.5, 75 and 87.5 % of the epochs) or cosine"
    )
    milestones: tuple[int, ...] | None = setting(
        None,
        "epochs after which the step schedule divides by ten instead, e.g. 30,60,90",
    )
    eval_every: Count = setting(1, "test after every N epochs and after the last")
    seed: Seed = setting(0, "seed of the weights, the order of samples and the negatives")
    device: str = setting("auto", "auto, cpu, cuda, cuda:1, mps, …")
    precision: Precision = setting(
        "auto",
        "precision of the network: float32, bfloat16, or auto (bfloat16 on GPUs that support it)",
    )
    step: Step = setting(
        "auto", "how steps run: eager, captured (CUDA graphs), compiled, or auto (the fastest)"
    )

    def _complete(self) -> None:
        super()._complete()
        if self.milestones is not None:
            given = list(self.milestones)
            must = f"left out for schedule {self.schedule}"
            require(self.schedule == "step", "milestones", given, must)
            rising = all(low < high for low, high in itertools.pairwise([0, *given, self.epochs]))
            must = f"ascending epochs, from 1 to below epochs = {self.epochs}"
            require(rising and bool(given), "milestones", given, must)
        must = f"below epochs = {self.epochs}"
        require(self.warmup < self.epochs, "warmup", self.warmup, must)
        if self.nesterov:
            must = f"left out for optimizer {self.optimizer}"
            require(self.optimizer == "sgd", "nesterov", True, must)
            require(self.momentum > 0, "momentum", self.momentum, "above 0 with nesterov")


def _check_key(name: str, weights: str, key: str) -> None:
    """Check that a key is given only with a file of weights to start from."""
    must = f"left out without {name} FILE"
    require(not key or weights not in ("", "pretrained"), f"{name}_key", key, must)


@dataclass(frozen=True, kw_only=True)
class TrainTeacher(Images, Training):
    """Settings of `richkd train-teacher`."""

    model: str = setting("", "CNN of the zoo or of timm; default by dataset")
    init: str = setting(
        "",
        "weights to start from: a file, or pretrained (those that timm names for the model)",
        path=True,
    )
    init_key: str = setting(
        "", "which weights to take if the file of --init has several, e.g. state_dict or model_ema"
    )
    out: str = setting(
        "", "weights file (.safetensors); default in teachers/, by dataset and model", path=True
    )

    def _complete(self) -> None:
        super()._complete()
        self._set("model", self.model or catalog.defaults(self.dataset).teacher)
        if not self.out and self.model:
            limit = f"-{self.limit}" if self.limit else ""
            held_out = f"-val{self.validation:g}" if self.validation else ""
            source = f"-from-{Path(self.init).stem}" if self.init else ""
            dataset = catalog.short_name(self.dataset)
            name = f"{dataset}{limit}{held_out}-{self.model}{source}.safetensors"
            self._set("out", str(Path("teachers") / name.replace("/", "-")))
        local_path(self.out)
        _check_key("init", self.init, self.init_key)
        named = not self.out or self.out.endswith(".safetensors")
        require(named, "out", self.out, "a .safetensors file")

    def for_size(self, image_size: int) -> TrainTeacher:
        """Return settings with the network and learning rate for this image size filled in."""
        model = self.model or catalog.networks(self.dataset, image_size)[0]
        lr = self.lr or catalog.learning_rate(model, self.optimizer)
        return replace(self, model=model, lr=lr)


@dataclass(frozen=True, kw_only=True)
class Precompute(Images):
    """Settings of `richkd precompute`, stage one."""

    teacher: str = setting(
        "",
        "CNN teacher of the zoo or of timm; a tag (timm/resnet50.a1_in1k) or hf-hub:OWNER/NAME "
        "loads pretrained weights; default by dataset",
    )
    teacher_weights: str = setting(
        "", "weights of the CNN teacher (.safetensors, or a state dict .pt/.pth)", path=True
    )
    teacher_weights_key: str = setting(
        "", "which weights to take if the file has several, e.g. state_dict or model_ema"
    )
    teacher_size: Side | None = setting(
        None, "pixels per side of the images it was trained on; default by timm or dataset"
    )
    teacher_mean: Mean | None = setting(
        None, "mean of the pixels in 0..1 that it was trained with: one number, or R,G,B"
    )
    teacher_std: Deviation | None = setting(None, "standard deviation of the pixels, like the mean")
    teacher_crop: Annotated[float, Limit("in (0, 1]", lambda share: 0 < share <= 1)] | None = (
        setting(None, "share of an image's shorter side that its test crop covers, in (0, 1]")
    )
    teacher_interpolation: Interpolation | Literal[""] = setting(
        "", "how the images it was trained on were resized: bilinear, bicubic or nearest"
    )
    teacher_classes: str = setting(
        "",
        "order of its outputs: a file with one class folder per line, sorted, or natural (timm's)",
        path=True,
    )
    teacher_head: TeacherHead = setting(
        "own",
        "its head: own, probe (a linear head on its features, fitted here), or rows (those of its "
        "ImageNet head that match the classes)",
    )
    clip: str = setting(
        "", "open_clip NAME:TAG, hf-hub:OWNER/NAME, a local directory, demo or none", path=True
    )
    clip_precision: ClipPrecision = setting(
        "float32",
        "precision of CLIP's image encoder: float32, bfloat16 or float16; its error is measured",
    )
    prompts: str = setting(
        "richkd", "prompt set (richkd or single), or a file of templates with {}", path=True
    )
    views: Count = setting(
        32, "augmented views per training sample; students see a new one each epoch while they last"
    )
    augment: str = setting(
        CROP,
        "changes to a view besides crop and flip: some of jitter, trivial or rand, erase, and "
        "mixup, cutmix or mix, joined as in rand+erase+mix; crop: none",
        later=True,
    )
    alpha: Share = setting(
        0.7,
        "weight of the CNN teacher in the blend; CLIP has 1 − alpha",
        read=_read_stage_one_alpha,
    )
    scale: Scale = setting(
        "native", "scale of CLIP's cosines: native (CLIP's own), raw (1) or a number"
    )
    dtype: Literal["float16", "float32"] = setting(
        "float16", "data type of the cached rows: float16 or float32"
    )
    keep_bits: Count | None = setting(
        None, "mantissa bits of the cached rows; fewer take less disk space (float16 has 10)"
    )
    keep: Keep = setting(
        "all",
        "logits to keep of each row: all, or top-K, the K largest (the others' mass is spread)",
    )
    keep_temperature: Positive = setting(3.0, "temperature at which the others keep their mass")
    features: Literal["all", "none", ""] = setting(
        "", "features to keep: all, or none, for methods that read logits alone; default all"
    )
    rows: tuple[Row, ...] | None = setting(
        None,
        "rows to keep, e.g. teacher_logits,fused_logits; others: teacher_features, clip_features; "
        "default all",
    )
    keep_pixels: Side | None = setting(
        None,
        "keep decoded photographs too, with shorter sides of SIDE pixels, so that students train "
        "without decoding; twice the students' side is plenty",
        later=True,
    )
    seed: Seed = setting(0, "seed of the views")
    batch_size: Count | None = setting(
        None,
        "images per forward pass of the teachers; default 256, or more for small images on a GPU",
    )
    device: str = setting("auto", "auto, cpu, cuda, cuda:1, mps, …")
    out: str = setting(
        "",
        "location of the cache: a folder, s3://, gs://, az://, …; default cache/DATASET.zarr",
        path=True,
    )
    teachers: dict[str, Any] = setting(
        {}, "further teachers by name, each with its own teacher or clip, as in richkd add-teacher"
    )

    def _complete(self) -> None:
        super()._complete()
        suggested = catalog.defaults(self.dataset)
        self._set("teacher", self.teacher or suggested.teacher)
        self._set("clip", self.clip or suggested.clip)
        self._set("augment", read_augment(self.augment))
        must = f"own or rows with {self.augment}: each head of a probe knows some of the partners"
        unseen = self.teacher_head != "probe" or not self.augment.endswith(MIXING)
        require(unseen, "teacher_head", self.teacher_head, must)
        self._set("out", self.out or f"cache/{catalog.short_name(self.dataset)}.zarr")
        for name in ("teacher_mean", "teacher_std"):
            if getattr(self, name) is not None:
                self._set(name, three_channels(getattr(self, name)))
        most = 10 if self.dtype == "float16" else 23
        if self.teacher_weights_key and not self.teacher_weights:
            raise RichKDError(
                f"--teacher-weights-key {self.teacher_weights_key} is only for a file of weights; "
                f"pass --teacher-weights, or leave it out",
                code="teacher-weights-key-not-needed",
            )
        fits = self.keep_bits is None or self.keep_bits <= most
        require(fits, "keep_bits", self.keep_bits, f"in 1..{most} for {self.dtype}")
        self._choose_rows()

    def _choose_rows(self) -> None:
        """Merge `features` into `rows`: None if all are kept, else names in the order of ROWS."""
        known = {*(ROWS if self.clip != "none" else CNN_ROWS)}
        features = {name for name in known if name.endswith("features")}
        mixed = {"fused_logits"} & known if self.augment.endswith(MIXING) else set()
        rows: set[str] = known - features if self.features == "none" else known
        rows = rows - mixed  # computed from CLIP's rows of both images, which come later
        if self.rows is not None:
            rows, given = {*self.rows}, list(self.rows)
            require("teacher_logits" in rows, "rows", given, "names that include teacher_logits")
            must = f"among {', '.join(sorted(known))}, as there is no CLIP"
            require(rows <= known, "rows", given, must)
            must = f"names other than fused_logits, which mixed views ({self.augment}) have none of"
            require(not rows & mixed, "rows", given, must)
            same = {"none": not rows & features, "all": features <= rows, "": True}
            must = f"left out, or agree with rows = {given}"
            require(same[self.features], "features", self.features, must)
        self._set("features", "")
        self._set("rows", None if rows == known else tuple(each for each in ROWS if each in rows))

    @property
    def teacher_input(self) -> dict[str, Any]:
        """The settings of the teacher's input that were given, by the names of `NetworkInput`."""
        given = {
            name: getattr(self, f"teacher_{name}")
            for name in ("size", "mean", "std", "crop", "interpolation")
        }
        return {name: value for name, value in given.items() if value not in (None, "")}

    @property
    def top_k(self) -> int | None:
        """The number of logits kept of each row; None for all."""
        return None if self.keep == "all" else int(self.keep.removeprefix("top-"))

    def for_size(self, image_size: int) -> Precompute:
        """Return settings with the teacher for this image size filled in, if none was given."""
        return replace(self, teacher=self.teacher or catalog.networks(self.dataset, image_size)[0])


@dataclass(frozen=True, kw_only=True)
class Distill(Training):
    """Settings of `richkd distill`, stage two; the blend defaults to the cache's."""

    cache: str = setting("", "cache that richkd precompute wrote: a folder or a URL", path=True)
    student: str = setting("", "student of the zoo or of timm; default by dataset")
    student_options: dict[str, Any] = setting(
        {}, "NAME=VALUE: setting of the student, e.g. patch_size=4", flag="--student-set"
    )
    student_weights: str = setting(
        "",
        "weights to start from: a file, or pretrained (those that timm names for the student)",
        path=True,
    )
    student_weights_key: str = setting(
        "",
        "which weights to take if the file of --student-weights has several, e.g. state_dict or "
        "model_ema",
    )
    method: str = setting("richkd", "richkd, richkd-l, kd, dkd, ce, …; see richkd methods")
    options: dict[str, Any] = setting(
        {}, "NAME=VALUE: option of the method, e.g. temperature=4", flag="--set"
    )
    target: str = setting(
        "", "logits to match: teacher, clip, fused or an added teacher; default by method"
    )
    alpha: Alpha | None = setting(
        None,
        "weight of the CNN teacher in the blend, or auto (by likelihood); default the cache's",
        read=read_alpha,
    )
    weights: dict[str, NotNegative] | Literal["auto"] | None = setting(
        None,
        "weight of each teacher in the blend, as in cnn=0.5,vit=0.2,clip=0.3, or auto (by "
        "likelihood); default alpha",
        read=read_weights,
    )
    balance: Literal["", "spread", "none"] = setting(
        "", "how --weights puts logits on one scale: spread (equal spread, the default) or none"
    )
    scale: Scale | None = setting(
        None, "scale of CLIP's cosines: native, raw or a number; default the cache's"
    )
    prompts: tuple[int, ...] | None = setting(
        None, "use only these prompts of the cache, counted from 0, e.g. 0,3,5"
    )
    clip_head: ClipHead = setting(
        "zero-shot", "source of CLIP's logits: zero-shot, or probe (fitted on its features)"
    )
    holdout: Annotated[float, within(0, 0.9)] | None = setting(
        None,
        "share of the test images to make choices on instead of testing; default 0.2 for alpha "
        "auto and halving if the cache has no validation images, else 0",
    )
    batch_norm: Literal["sync", "local"] = setting(
        "sync",
        "under torchrun, the samples that batch norm spans: sync (those of all processes) or local "
        "(faster)",
        later=True,
    )
    crops_per_decode: Count = setting(
        1,
        "views of an image that enter training from one decode of its file; an epoch then shows M "
        "views of one image in M",
        later=True,
    )
    decode: Decode = setting(
        "auto",
        "pixels of photographs: exact (files, decoded in full), draft (JPEGs of the training split "
        "decoded at 1/2, 1/4 or 1/8 where their views allow it), gpu (likewise JPEGs, whole, by "
        "nvJPEG), or auto (the pixels that the cache keeps, else exact)",
        later=True,
    )
    dataset: str = setting(
        "", "where the images are now, e.g. imagefolder:PATH, if they have moved", path=True
    )
    data_root: str = setting("data", "folder of the datasets", path=True)
    out: str = setting("", "run folder; default runs/CACHE-STUDENT-METHOD-sSEED", path=True)

    def _complete(self) -> None:
        super()._complete()
        if not self.cache:
            raise RichKDError(
                "no cache given; choose one, e.g. --cache cache/cifar100.zarr",
                code="cache-not-given",
            )
        local_path(self.out)
        local_path(self.data_root, "--data-root")
        _check_key("student_weights", self.student_weights, self.student_weights_key)
        self._check_weights()

    def _check_weights(self) -> None:
        """Check that the weights of teachers agree with the other settings of the blend."""
        if self.weights is None:
            require(not self.balance, "balance", self.balance, "left out without weights")
            return
        require(self.alpha is None, "alpha", self.alpha, "left out with weights")
        if isinstance(self.weights, Mapping):
            given = shown_weights(self.weights)
            total = sum(self.weights.values())
            must = "above 0 for one teacher, and of a finite sum"
            require(0 < total < math.inf, "weights", given, must)
            self._set("weights", dict(sorted(self.weights.items())))
        balanced = self.balance != "none" and self.clip_head == "zero-shot"
        must = "left out with weights, whose balance sets the scales; or pass --balance none"
        require(self.scale is None or not balanced, "scale", self.scale, must)

    @property
    def chooses(self) -> bool:
        """Whether α or the weights are chosen on held-out images."""
        return "auto" in (self.alpha, self.weights)

    @property
    def reblends(self) -> bool:
        """Whether the fused logits differ from those in the cache."""
        given = (self.alpha, self.scale, self.prompts)
        return self.clip_head != "zero-shot" or any(value is not None for value in given)

    def with_holdout(self, validation: bool, choosing: bool = False) -> Distill:
        """Return settings with the default share of the test images to make choices on.

        Args:
            validation: the cache has validation images, on which choices are made instead.
            choosing: something besides α is chosen, e.g. which runs of a sweep continue.

        Raises:
            RichKDError: the share that was given contradicts this.
        """
        choosing = choosing or self.chooses
        if validation:
            require(
                not self.holdout,
                "holdout",
                self.holdout,
                "left out: choices are made on the validation images of the cache",
            )
        elif choosing:
            require(
                self.holdout is None or self.holdout > 0,
                "holdout",
                self.holdout,
                "above 0: auto and halving make their choices on those images",
            )
        default = AUTO_HOLDOUT if choosing and not validation else 0.0
        return self if self.holdout is not None else replace(self, holdout=default)


@dataclass(frozen=True, kw_only=True)
class Sweep(Settings):
    """Settings of `richkd sweep`, a grid of runs; the others are those of `[distill]`."""

    students: tuple[str, ...] = setting((), "students of the zoo or of timm, separated by commas")
    methods: tuple[str, ...] = setting(
        ("ce", "kd", "richkd"), "methods, separated by commas; see richkd methods"
    )
    seeds: Count = setting(3, "runs per configuration, with seeds 0..N−1")
    alpha: tuple[Alpha, ...] = setting(
        (),
        "alphas of the methods that have one: numbers or auto, separated by commas",
        read=_read_alphas,
    )
    concurrent: Count | Literal["auto"] = setting(
        "auto", "runs that train at the same time; auto: as many as fit"
    )
    halving: Annotated[int, Limit("0, or at least 2", lambda eta: eta == 0 or eta >= 2)] = setting(
        0,
        "η: stop all but the best 1/η configurations of a student at E/η² and E/η epochs; 0: never",
    )
    engine: Literal["local", "ray"] = setting(
        "local", "where the runs train: local (this process), or ray (a cluster)"
    )
    address: str = setting(
        "", "Ray cluster: HOST:PORT or auto; default $RAY_ADDRESS, else one on this machine"
    )
    gpus_per_run: Gpus | None = setting(
        None, "with ray: GPUs per run, e.g. 0.25; default 1 if the cluster has any"
    )
    cpus_per_run: Count | None = setting(None, "with ray: CPUs and threads per run; default 1")
    out: str = setting("runs", "folder of the run folders", path=True)

    def _complete(self) -> None:
        super()._complete()
        for name in ("students", "methods", "alpha"):
            self._set(name, tuple(dict.fromkeys(getattr(self, name))))
        for name, example in (("students", "resnet8,resnet20"), ("methods", "ce,kd,richkd")):
            if not getattr(self, name):
                raise RichKDError(
                    f"nothing to sweep: no {name} given; choose some, e.g. --{name} {example}",
                    code="sweep-empty",
                )
        local_path(self.out)
        ray = self.engine == "ray"
        must = f"left out with{'' if ray else 'out'} --engine ray"
        for name in ("concurrent",) if ray else ("address", "gpus_per_run", "cpus_per_run"):
            value = getattr(self, name)
            require(value in ("auto" if ray else "", None), name, value, must)


SECTIONS: dict[str, type] = {
    "sweep": Sweep,
    "train-teacher": TrainTeacher,
    "precompute": Precompute,
    "distill": Distill,
}
S = TypeVar("S", bound=Settings)


def check_resume(resume: bool, overwrite: bool) -> None:
    """Raise RichKDError if both `--resume` and `--overwrite` are given."""
    if resume and overwrite:
        raise RichKDError(
            "--resume and --overwrite contradict each other; leave out --overwrite to resume, or "
            "--resume to start over",
            code="resume-and-overwrite",
        )


def recorded_holdout(settings: Mapping[str, Any]) -> float:
    """Return the share of the test images that a run was not tested on, by its recipe.toml.

    Earlier versions recorded it only if the user had given it.
    """
    chosen = "auto" in (settings.get("alpha"), settings.get("weights"))
    default = AUTO_HOLDOUT if chosen else 0.0
    return float(settings.get("holdout", default))


def describe(settings: type, name: str) -> str:
    """Return the explanation of one setting, for `--help` and for the documentation."""
    return str(settings.__dataclass_fields__[name].metadata["help"])  # type: ignore[attr-defined]


def resolve(settings: type[S], recipe: Mapping[str, Any], flags: Mapping[str, Any]) -> S:
    """Return the defaults, overridden by a recipe's table, overridden by the flags given.

    A recipe's `options` are grouped by method; a flag's belong to the chosen method. A recipe's
    `student_options` apply to its own student only.

    Args:
        settings: which settings.
        recipe: the table of the recipe.
        flags: by name; None for those that were not given.

    Raises:
        RichKDError: an unknown name, or a value of the wrong type or out of range.
    """
    given = {name: value for name, value in flags.items() if value is not None}
    merged = {**recipe, **given}
    if "options" in given:
        method = merged.get("method", "richkd")
        by_method = recipe.get("options", {})
        merged["options"] = {**by_method, method: {**by_method.get(method, {}), **given["options"]}}
    if given.get("student", recipe.get("student")) != recipe.get("student"):
        merged["student_options"] = given.get("student_options", {})
    for name in merged:
        check_name(name, settings, "setting")
    return settings(**merged)


def to_table(settings: TrainTeacher | Precompute | Distill) -> dict[str, Any]:
    """Return resolved settings as a TOML table, without those that are not set."""
    table = dataclasses.asdict(settings)
    later = {each.name: each.default for each in fields(settings) if each.metadata["later"]}
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in table.items()
        if value is not None and value not in ("", {}) and value != later.get(name)
    }


def check_table(table: Mapping[str, Any], known: type, where: str) -> None:
    """Raise RichKDError if a table has a key that a dataclass lacks, or a value that does not fit.

    Args:
        table: as read from a recipe.
        known: the dataclass.
        where: the location of the table, for the message.
    """
    for name, value in table.items():
        check_name(name, known, where)
        check(value, hints(known)[name], name, f"{where}: ")


def check_name(name: str, known: type, where: str) -> None:
    """Raise RichKDError if a dataclass has no field of this name."""
    if name not in hints(known):
        raise RichKDError(
            f"{where}: unknown key {name!r}; {nearest(name, hints(known))}", code="unknown-setting"
        )
