"""Every setting of every stage: its name, default, meaning and limits. No torch in here.

A recipe is a TOML file with a table a command (`[train-teacher]`, `[precompute]`, `[distill]`).
What the command line says overrides the recipe, and the recipe overrides the defaults below.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

from richkd.config import catalog
from richkd.core.checks import fits, hints
from richkd.core.choices import (
    CLIP_HEADS,
    CLIP_PRECISIONS,
    INTERPOLATIONS,
    PRECISIONS,
    STEPS,
    TARGETS,
    Alpha,
    Scale,
    check_blend,
)
from richkd.core.errors import RichKDError, local_path, nearest, require, unknown

ENGINES = ("local", "ray")
AUTO_HOLDOUT = 0.2  # of the test images, for alpha auto and halving
PATHS = {
    "dataset",
    "data_root",
    "class_names",
    "teacher_weights",
    "teacher_classes",
    "clip",
    "prompts",
    "cache",
    "out",
}
TOP_K = re.compile("top-[1-9][0-9]{0,8}")


def _key(default: Any, help: str) -> Any:
    """A setting: its default and the one place where it is explained."""
    return field(default=default, metadata={"help": help})


def _expand_home(settings: Any) -> None:
    """Put the home folder for `~` in the settings that are paths."""
    for name in PATHS & {known.name for known in fields(settings)}:
        if isinstance(value := getattr(settings, name), str):
            object.__setattr__(settings, name, catalog.at_home(value))


@dataclass(frozen=True, kw_only=True)
class Images:
    """Which images, and where they lie."""

    dataset: str = _key("", "shapes, fashion-mnist, cifar10, cifar100 or imagefolder:PATH")
    limit: int | None = _key(None, "take the first N training samples")
    data_root: str = _key("data", "folder where data sets lie, or are downloaded to")
    image_size: int | None = _key(None, "side of an imagefolder's images; they suggest one")
    class_names: str = _key("", "file of an imagefolder's class names, a line a class")
    broken: str = _key("refuse", "an imagefolder's damaged files: refuse or skip")
    background: str = _key(
        "white", "colour behind an imagefolder's transparent pixels: a name, or #RRGGBB"
    )
    pixel_range: tuple[float, ...] | None = _key(
        None,
        "values of an imagefolder's 16-bit, 32-bit and float images that are black and white, as "
        "LOW,HIGH; their format or values suggest them",
    )
    validation: float = _key(
        0.0, "share of the training images to make choices on; no network trains on them"
    )

    def __post_init__(self) -> None:
        _expand_home(self)
        if not self.dataset:
            raise RichKDError(
                "no data set given: say which, e.g. --dataset cifar100", code="dataset-not-given"
            )
        kind, _ = catalog.split_name(self.dataset)
        require(self.limit is None or self.limit >= 1, "limit", self.limit, "at least 1")
        if self.image_size is not None:
            require(
                kind == catalog.IMAGE_FOLDER,
                "image_size",
                self.image_size,
                f"left out for {kind}, whose images have one size",
            )
            require(self.image_size >= 8, "image_size", self.image_size, "at least 8")
        require(
            not self.class_names or kind == catalog.IMAGE_FOLDER,
            "class_names",
            self.class_names,
            f"left out for {kind}, whose classes have names",
        )
        require(0 <= self.validation < 1, "validation", self.validation, "in [0, 1)")
        for name, default in (("background", "white"), ("pixel_range", None)):
            value = getattr(self, name)
            require(
                value == default or kind == catalog.IMAGE_FOLDER,
                name,
                value,
                f"left out for {kind}, whose images are 8 bits deep and opaque",
            )
        if self.background != "white":
            from richkd.core.colours import read_colour

            read_colour(self.background)
        if self.pixel_range is not None:
            given = tuple(map(float, self.pixel_range))
            object.__setattr__(self, "pixel_range", given)
            ascending = len(given) == 2 and given[0] < given[1]
            require(ascending, "pixel_range", given, "two ascending numbers, as in 0,4095")
        local_path(self.data_root, "--data-root")
        if self.broken not in ("refuse", "skip"):
            raise unknown("choice for --broken", self.broken, ["refuse", "skip"])


@dataclass(frozen=True, kw_only=True)
class Training:
    """How a network is trained: the settings of the CIFAR distillation literature by default."""

    epochs: int = _key(240, "passes over the training samples")
    batch_size: int = _key(64, "samples a step")
    lr: float | None = _key(
        None, "learning rate at the start; default 0.05, or 0.01 for MobileNetV2 and ShuffleV1, V2"
    )
    momentum: float = _key(0.9, "momentum of SGD")
    weight_decay: float = _key(5e-4, "weight decay of SGD")
    schedule: str = _key("step", "step (÷10 at 62.5, 75 and 87.5 % of the epochs) or cosine")
    milestones: tuple[int, ...] | None = _key(
        None, "epochs after which the step schedule divides by ten, instead of those shares"
    )
    eval_every: int = _key(1, "test after every N epochs, and after the last")
    seed: int = _key(0, "seed of weights, order and negatives")
    device: str = _key("auto", "auto, cpu, cuda, cuda:1, mps, …")
    precision: str = _key(
        "auto", "of the network: float32, bfloat16, or auto (bfloat16 on GPUs that have it)"
    )

    step: str = _key(
        "auto", "how steps run: eager, captured (CUDA graphs), compiled, or auto: what pays"
    )

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise unknown("precision", self.precision, PRECISIONS)
        if self.step not in STEPS:
            raise unknown("step", self.step, STEPS)
        require(self.epochs >= 1, "epochs", self.epochs, "at least 1")
        require(self.batch_size >= 1, "batch_size", self.batch_size, "at least 1")
        require(self.lr is None or 0 < self.lr < float("inf"), "lr", self.lr, "above 0")
        require(0 <= self.momentum < 1, "momentum", self.momentum, "in [0, 1)")
        require(0 <= self.weight_decay < 1, "weight_decay", self.weight_decay, "in [0, 1)")
        require(self.eval_every >= 1, "eval_every", self.eval_every, "at least 1")
        require(0 <= self.seed < 2**32, "seed", self.seed, "in 0..2³²−1")
        if self.schedule not in ("step", "cosine"):
            raise unknown("schedule", self.schedule, ["step", "cosine"])
        if self.milestones is not None:
            given = list(self.milestones)
            require(
                self.schedule == "step",
                "milestones",
                given,
                f"left out for schedule {self.schedule}",
            )
            rising = all(low < high for low, high in itertools.pairwise([0, *given, self.epochs]))
            require(
                rising and bool(given),
                "milestones",
                given,
                f"ascending epochs, from 1 to below epochs = {self.epochs}",
            )


@dataclass(frozen=True, kw_only=True)
class TrainTeacher(Images, Training):
    """`richkd train-teacher`."""

    model: str = _key("", "a CNN of the zoo or of timm; the data set suggests one")
    out: str = _key("", "weights file (.safetensors); default teachers/DATASET[-LIMIT]-MODEL")

    def __post_init__(self) -> None:
        Images.__post_init__(self)
        Training.__post_init__(self)
        object.__setattr__(self, "model", self.model or catalog.defaults(self.dataset).teacher)
        if not self.out and self.model:
            limit = f"-{self.limit}" if self.limit else ""
            held_out = f"-val{self.validation:g}" if self.validation else ""
            name = f"{catalog.short_name(self.dataset)}{limit}{held_out}-{self.model}.safetensors"
            object.__setattr__(self, "out", str(Path("teachers") / name.replace("/", "-")))
        local_path(self.out)
        require(
            not self.out or self.out.endswith(".safetensors"),
            "out",
            self.out,
            "a .safetensors file",
        )

    def for_size(self, image_size: int) -> TrainTeacher:
        """With the network that suits images of this size and its learning rate, if not given."""
        model = self.model or catalog.networks(self.dataset, image_size)[0]
        lr = catalog.learning_rate(model) if self.lr is None else self.lr
        return replace(self, model=model, lr=lr)


@dataclass(frozen=True, kw_only=True)
class Precompute(Images):
    """`richkd precompute`, stage one."""

    teacher: str = _key("", "CNN teacher, of the zoo or of timm; the data set suggests one")
    teacher_weights: str = _key("", "its weights (.safetensors, or a state dict .pt/.pth)")
    teacher_size: int | None = _key(
        None, "side of the images that its weights were trained on; timm or the data set knows one"
    )
    teacher_mean: float | tuple[float, ...] | None = _key(
        None, "mean of pixels in 0..1 that they were trained with: one number, or R,G,B"
    )
    teacher_std: float | tuple[float, ...] | None = _key(
        None, "their standard deviation, like the mean"
    )
    teacher_crop: float | None = _key(
        None, "share of an image's shorter side that the teacher is tested on, in (0, 1]"
    )
    teacher_interpolation: str = _key(
        "", "how its images were resized: bilinear, bicubic or nearest"
    )
    teacher_classes: str = _key(
        "", "order of its outputs: a file with a class folder a line, sorted, or natural (timm's)"
    )
    clip: str = _key("", "open_clip NAME:TAG, hf-hub:OWNER/NAME, a local directory, demo or none")
    clip_precision: str = _key(
        "float32", "of its image tower: float32, bfloat16 or float16; its error is measured"
    )
    prompts: str = _key("richkd", "prompt set (richkd, single) or a file of templates with {}")
    views: int = _key(32, "augmented views a training sample, a new one each epoch while they last")
    alpha: float = _key(0.7, "weight of the CNN teacher in the blend; CLIP has 1 − alpha")
    scale: Scale = _key("native", "of CLIP's cosines: native (CLIP's own), raw (1) or a number")
    dtype: str = _key("float16", "of the stored rows: float16 or float32")
    keep_bits: int | None = _key(
        None, "mantissa bits of the stored rows, fewer take less disk (float16 has 10)"
    )
    keep: str = _key(
        "all", "of each row of logits: all, or top-K, the K largest (the others' mass is spread)"
    )
    keep_temperature: float = _key(3.0, "temperature at which those others keep their mass")
    seed: int = _key(0, "seed of the views")
    batch_size: int | None = _key(
        None, "images a forward pass of the teachers; default 256, or more if small, on a GPU"
    )
    device: str = _key("auto", "auto, cpu, cuda, cuda:1, mps, …")
    out: str = _key("", "the store, a folder or s3://, gs://, az://…; default cache/DATASET.zarr")

    def __post_init__(self) -> None:
        super().__post_init__()
        suggested = catalog.defaults(self.dataset)
        object.__setattr__(self, "teacher", self.teacher or suggested.teacher)
        object.__setattr__(self, "clip", self.clip or suggested.clip)
        object.__setattr__(
            self, "out", self.out or f"cache/{catalog.short_name(self.dataset)}.zarr"
        )
        require(self.views >= 1, "views", self.views, "at least 1")
        self._check_teacher_input()
        check_blend(self.alpha, self.scale)
        require(
            self.batch_size is None or self.batch_size >= 1,
            "batch_size",
            self.batch_size,
            "at least 1",
        )
        require(0 <= self.seed < 2**32, "seed", self.seed, "in 0..2³²−1")
        if self.clip_precision not in CLIP_PRECISIONS:
            raise unknown("CLIP precision", self.clip_precision, CLIP_PRECISIONS)
        if self.dtype not in ("float16", "float32"):
            raise unknown("dtype", self.dtype, ["float16", "float32"])
        most = 10 if self.dtype == "float16" else 23
        require(
            self.keep_bits is None or 1 <= self.keep_bits <= most,
            "keep_bits",
            self.keep_bits,
            f"in 1..{most} for {self.dtype}",
        )
        require(
            self.keep == "all" or TOP_K.fullmatch(self.keep) is not None,
            "keep",
            self.keep,
            "all, or top-K with K from 1, as in top-50",
        )
        require(
            0 < self.keep_temperature < float("inf"),
            "keep_temperature",
            self.keep_temperature,
            "above 0",
        )

    def _check_teacher_input(self) -> None:
        """Check what is said of the teacher's images; one number stands for three channels."""
        for name in ("teacher_mean", "teacher_std"):
            given = getattr(self, name)
            if given is None:
                continue
            numbers = tuple(given) if isinstance(given, tuple | list) else (given,)
            numbers = tuple(map(float, numbers * 3 if len(numbers) == 1 else numbers))
            object.__setattr__(self, name, numbers)
            within = all(0 <= number <= 1 for number in numbers) and len(numbers) == 3
            positive = name == "teacher_mean" or 0 not in numbers
            must = "one number or three, of pixels in 0..1"
            must += ", above 0" if name == "teacher_std" else ""
            require(within and positive, name, ",".join(f"{n:g}" for n in numbers), must)
        size, crop = self.teacher_size, self.teacher_crop
        require(size is None or size >= 8, "teacher_size", size, "at least 8")
        require(crop is None or 0 < crop <= 1, "teacher_crop", crop, "in (0, 1]")
        if self.teacher_interpolation not in ("", *INTERPOLATIONS):
            raise unknown("interpolation", self.teacher_interpolation, INTERPOLATIONS)

    @property
    def teacher_input(self) -> dict[str, Any]:
        """What was said of the teacher's images, by the names of `NetworkInput`."""
        given = {
            name: getattr(self, f"teacher_{name}")
            for name in ("size", "mean", "std", "crop", "interpolation")
        }
        return {name: value for name, value in given.items() if value not in (None, "")}

    @property
    def top_k(self) -> int | None:
        """How many logits of a row are kept; None for all."""
        return None if self.keep == "all" else int(self.keep.removeprefix("top-"))

    def for_size(self, image_size: int) -> Precompute:
        """With the teacher that suits images of this size, where none was named."""
        return replace(self, teacher=self.teacher or catalog.networks(self.dataset, image_size)[0])


@dataclass(frozen=True, kw_only=True)
class Distill(Training):
    """`richkd distill`, stage two. `alpha`, `scale` and `prompts` default to the store's own."""

    cache: str = _key("", "the store that `richkd precompute` wrote: a folder or a URL")
    student: str = _key("", "student, of the zoo or of timm; the data set suggests one")
    student_options: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "NAME=VALUE of the student, e.g. patch_size=4"}
    )
    method: str = _key("richkd", "richkd, richkd-l, kd, dkd, ce, …: see richkd methods")
    options: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "NAME=VALUE of the method, e.g. temperature=4"}
    )
    target: str = _key("", "whose logits: teacher, clip or fused; the method has its own default")
    alpha: Alpha | None = _key(
        None, "another blend than the store's: the CNN teacher's weight, or auto (by likelihood)"
    )
    scale: Scale | None = _key(None, "another scale of CLIP's cosines: native, raw or a number")
    prompts: tuple[int, ...] | None = _key(None, "only these prompts of the store, from 0")
    clip_head: str = _key(
        "zero-shot", "CLIP's logits: zero-shot, or probe (fitted on its features)"
    )
    holdout: float | None = _key(
        None,
        "share of the test images to make choices on, not tested on; default 0.2 for alpha auto "
        "and halving where the store has no validation images, else 0",
    )
    dataset: str = _key("", "where the images are, if they moved (image folders only)")
    data_root: str = _key("data", "folder where data sets lie")
    out: str = _key("", "run folder; default runs/CACHE-STUDENT-METHOD-sSEED")

    def __post_init__(self) -> None:
        super().__post_init__()
        _expand_home(self)
        if not self.cache:
            raise RichKDError(
                "no store given: say which, e.g. --cache cache/cifar100.zarr",
                code="cache-not-given",
            )
        alpha = 0.0 if self.alpha is None or self.alpha == "auto" else self.alpha
        check_blend(alpha, "native" if self.scale is None else self.scale)
        if self.target not in ("", *TARGETS):
            raise unknown("target", self.target, TARGETS)
        if self.clip_head not in CLIP_HEADS:
            raise unknown("clip_head", self.clip_head, CLIP_HEADS)
        require(
            self.holdout is None or 0 <= self.holdout <= 0.9, "holdout", self.holdout, "in [0, 0.9]"
        )
        local_path(self.out)
        local_path(self.data_root, "--data-root")

    @property
    def reblends(self) -> bool:
        """Whether the fused logits differ from those in the store."""
        given = (self.alpha, self.scale, self.prompts)
        return self.clip_head != "zero-shot" or any(value is not None for value in given)

    def with_holdout(self, validation: bool, choosing: bool = False) -> Distill:
        """With the share of the test images that choices are made on, where none was given.

        Args:
            validation: the store has validation images, on which choices are made instead.
            choosing: something besides α is chosen, such as which runs of a sweep go on.

        Raises:
            RichKDError: a share is given that contradicts this.
        """
        choosing = choosing or self.alpha == "auto"
        if validation:
            require(
                not self.holdout,
                "holdout",
                self.holdout,
                "left out: the store has validation images to make choices on",
            )
        elif choosing:
            require(
                self.holdout is None or self.holdout > 0,
                "holdout",
                self.holdout,
                "above 0: alpha auto and halving choose on those images",
            )
        default = AUTO_HOLDOUT if choosing and not validation else 0.0
        return self if self.holdout is not None else replace(self, holdout=default)


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """`richkd sweep`: a grid of runs, whose other settings are those of `[distill]`."""

    students: tuple[str, ...] = _key((), "students, of the zoo or of timm")
    methods: tuple[str, ...] = _key(("ce", "kd", "richkd"), "methods: see richkd methods")
    seeds: int = _key(3, "runs of each, with seeds 0..N−1")
    alpha: tuple[Alpha, ...] = _key((), "blends, for the methods that have one; auto is one")
    concurrent: int | Literal["auto"] = _key(
        "auto", "runs that train at once; auto: as many as fit"
    )
    halving: int = _key(
        0, "η: stop all but the best 1/η configurations of a student at E/η², E/η epochs; 0: none"
    )
    engine: str = _key("local", "what trains the runs: local (this process), or ray (a cluster)")
    address: str = _key(
        "", "the Ray cluster, HOST:PORT or auto; default $RAY_ADDRESS, else one of this machine"
    )
    gpus_per_run: float | None = _key(
        None, "with ray: GPUs a run, e.g. 0.25; default 1 where the cluster has any"
    )
    cpus_per_run: int | None = _key(None, "with ray: CPUs and threads a run; default 1")
    out: str = _key("runs", "folder of the run folders")

    def __post_init__(self) -> None:
        _expand_home(self)
        for name in ("students", "methods", "alpha"):
            object.__setattr__(self, name, tuple(dict.fromkeys(getattr(self, name))))
        for name, example in (("students", "resnet8,resnet20"), ("methods", "ce,kd,richkd")):
            if not getattr(self, name):
                raise RichKDError(
                    f"nothing to sweep: no {name}; say which, e.g. --{name} {example}",
                    code="sweep-empty",
                )
        require(self.seeds >= 1, "seeds", self.seeds, "at least 1")
        local_path(self.out)
        if isinstance(self.concurrent, str):
            if self.concurrent != "auto":
                raise unknown("concurrent", self.concurrent, ["auto", "or a number"])
        else:
            require(self.concurrent >= 1, "concurrent", self.concurrent, "at least 1, or auto")
        require(self.halving == 0 or self.halving >= 2, "halving", self.halving, "0, or at least 2")
        if self.engine not in ENGINES:
            raise unknown("engine", self.engine, ENGINES)
        if self.engine == "ray":
            require(
                self.concurrent == "auto",
                "concurrent",
                self.concurrent,
                "left out with --engine ray, where the cluster's room decides",
            )
            gpus = float(self.gpus_per_run or 0)
            require(
                gpus == 0 or 0.001 <= gpus < 1 or (gpus >= 1 and gpus.is_integer()),
                "gpus_per_run",
                gpus,
                "0, in [0.001, 1), or a whole number",
            )
            cpus = self.cpus_per_run
            require(cpus is None or cpus >= 1, "cpus_per_run", cpus, "at least 1")
        else:
            for name in ("address", "gpus_per_run", "cpus_per_run"):
                require(
                    getattr(self, name) in ("", None),
                    name,
                    getattr(self, name),
                    "left out without --engine ray",
                )


SECTIONS: dict[str, type] = {
    "sweep": Sweep,
    "train-teacher": TrainTeacher,
    "precompute": Precompute,
    "distill": Distill,
}
Settings = TypeVar("Settings", TrainTeacher, Precompute, Distill, Sweep)


def check_resume(resume: bool, overwrite: bool) -> None:
    """Refuse to resume and to begin anew at once."""
    if resume and overwrite:
        raise RichKDError(
            "--resume and --overwrite contradict each other: leave --overwrite out to resume what "
            "was interrupted, or --resume to begin anew",
            code="resume-and-overwrite",
        )


def recorded_holdout(settings: Mapping[str, Any]) -> float:
    """The share of the test images that a run was not tested on, by its recipe.toml.

    Those of earlier versions name it only where the user did.
    """
    default = AUTO_HOLDOUT if settings.get("alpha") == "auto" else 0.0
    return float(settings.get("holdout", default))


def parse_scale(text: str) -> Scale:
    """A scale as typed: `native`, `raw` or a number."""
    try:
        return float(text)
    except ValueError:
        check_blend(0.0, cast(Scale, text))
        return cast(Scale, text)


def parse_numbers(text: str) -> tuple[float, ...]:
    """Numbers as typed, with commas."""
    try:
        return tuple(map(float, text.split(",")))
    except ValueError:
        raise RichKDError(
            f"{text!r}: must be numbers with commas between them, as in 0.5,0.5,0.5 or 0,4095",
            code="value-malformed",
        ) from None


def parse_alpha(text: str) -> Alpha:
    """An alpha as typed: `auto` or a number."""
    try:
        return "auto" if text == "auto" else float(text)
    except ValueError:
        raise RichKDError(
            f"alpha = {text!r}: must be a number in [0, 1], or auto", code="value-malformed"
        ) from None


def parse_epochs(text: str) -> tuple[int, ...]:
    """Milestones as typed: epochs with commas."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise RichKDError(
            f"milestones = {text!r}: must be epochs with commas, e.g. 30,60,90",
            code="value-malformed",
        ) from None


def describe(settings: type, name: str) -> str:
    """The explanation of one setting, for `--help` and for the documentation."""
    return next(str(f.metadata["help"]) for f in fields(settings) if f.name == name)


def resolve(
    settings: type[Settings], recipe: Mapping[str, Any], flags: Mapping[str, Any]
) -> Settings:
    """Defaults, then the recipe's table, then the flags that were given (those not None).

    A recipe has `options` by method; among the flags they are those of the chosen method. A
    recipe's `student_options` are of its own student.
    """
    given = {name: value for name, value in flags.items() if value is not None}
    merged = {**recipe, **given}
    if "options" in given:
        method = merged.get("method", "richkd")
        by_method = recipe.get("options", {})
        merged["options"] = {**by_method, method: {**by_method.get(method, {}), **given["options"]}}
    if given.get("student", recipe.get("student")) != recipe.get("student"):
        merged["student_options"] = given.get("student_options", {})
    for name, value in merged.items():
        check_key(settings, name, value, "setting")
    for name, value in merged.items():
        if isinstance(value, list):
            merged[name] = tuple(value)
    return settings(**merged)


def to_table(settings: TrainTeacher | Precompute | Distill) -> dict[str, Any]:
    """Resolved settings as a TOML table: what was not set is left out."""
    table = dataclasses.asdict(settings)
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in table.items()
        if value is not None and value not in ("", {})
    }


def check_key(settings: type, name: str, value: object, where: str) -> None:
    known = hints(settings)
    if name not in known:
        raise RichKDError(
            f"{where}: unknown key {name!r}; {nearest(name, known)}", code="unknown-setting"
        )
    if not fits(value, known[name]):
        wanted = getattr(known[name], "__name__", None) or str(known[name]).replace("typing.", "")
        raise RichKDError(f"{where}: {name} = {value!r} should be {wanted}", code="setting-type")
