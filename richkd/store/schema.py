"""The schema of a cache: its arrays, its manifest, and the blocks in which it is written.

cache/README.md documents the same for people without richkd. Chunks are (1, block, last axis) for
arrays with a view axis and (block, …) for the others, so that a block is a whole chunk of each.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

from richkd.core.choices import CLIP_PRECISIONS, CNN_ROWS, ROWS, read_augment
from richkd.core.errors import RichKDError
from richkd.core.progress import percent
from richkd.core.validation import find_fault
from richkd.data.augment import GEOMETRY, Augment
from richkd.data.boxes import CLEAN_SHARE
from richkd.data.entries import DecodingEntry, PixelsEntry
from richkd.data.framing import InputEntry, NetworkInput, input_fault

SCHEMA = 2
FORMAT = "richkd-cache"
CHUNK_BYTES = 4 * 2**20
MOST_CHUNK_BYTES = 2**31 - 17  # the most that zarr's codec compresses
PART_BYTES = 64 * 2**20  # per chunk of the text embeddings, if they are larger than that
MAX_BLOCK = 8192
MOST = 2**40  # bound on every number in a manifest
LOGITS = ("teacher_logits", "fused_logits")
SIZES, PIXEL_SIZES = "sizes", "pixel_sizes"  # height and width of photographs, before and after
KNOWN = {"view_ids", "view_params", SIZES, PIXEL_SIZES}  # written before the first block
PROBE_ARRAYS = ("probe/weights", "probe/folds")
TEXT_ARRAY = "text/embeddings"
ADDED = "teachers"  # the folder of a cache that holds a group for each added teacher
TEACHER_NAME = re.compile("[A-Za-z0-9][A-Za-z0-9_-]{0,39}")


class DatasetEntry(TypedDict):
    """The images that the rows belong to."""

    name: str
    fingerprint: str
    num_train: int
    num_test: int
    embedded: bool
    skipped: NotRequired[list[str]]  # keys of damaged images
    decoding: NotRequired[DecodingEntry]  # of files, if it changes pixels
    validation: NotRequired[float]  # share of the training images held out for choices
    num_validation: NotRequired[int]  # images held out for choices; not in num_train
    class_folders: NotRequired[list[str]]  # of embedded images of an image folder, by class
    folders: NotRequired[dict[str, str]]  # folder names of the splits, or their names in a table
    columns: NotRequired[dict[str, str]]  # of a table or of shards: `image` and `label`


class ViewsEntry(TypedDict):
    """The augmentation, and how its views are drawn."""

    space: str
    count: int
    seed: int
    augment: NotRequired[str]  # its components besides a crop and flip, e.g. rand+erase+mix
    columns: NotRequired[list[str]]  # of train/view_params, if there are such components


class HeadEntry(TypedDict):
    """The head of a teacher of other classes: `probe`, fitted here, or `rows` of its own."""

    kind: str
    folds: NotRequired[int]  # of a probe: its number of heads
    penalty: NotRequired[float]
    accuracy: NotRequired[float]  # of the training images, out of fold, in 0..1


class TeacherEntry(TypedDict):
    """The CNN teacher; accuracy is top-1 on the test split, in 0..1, None until complete."""

    name: str
    sha256: str
    weights_key: NotRequired[str]  # where in the file the weights are, if the user says so
    num_features: int
    input: NotRequired[InputEntry]  # absent from older caches (`teacher_input`)
    outputs: NotRequired[list[int]]  # the output of each class, if the teacher's order differs
    head: NotRequired[HeadEntry]  # if its own outputs are of other classes
    accuracy: float | None


class PrecisionError(TypedDict):
    """The error of CLIP's precision, against float32 on some test images."""

    images: int
    cosine_max: float  # the largest difference of a cosine of an image and a class
    cosine_mean: float
    same_class: float  # the share of images with the same zero-shot class


class ClipEntry(TypedDict):
    """CLIP; accuracy is zero-shot top-1 on the test split, in 0..1, None until complete."""

    model: str
    sha256: str
    logit_scale: float
    logit_bias: NotRequired[float]  # SigLIP's; absent without one
    num_features: int
    precision: NotRequired[str]  # of the image tower; absent if float32
    precision_error: NotRequired[PrecisionError]  # absent if float32
    accuracy: float | None


class Checksums(TypedDict):
    """Digests of everything beside the manifest (store/checksums.py)."""

    metadata: dict[str, str]  # by file
    chunks: dict[str, list[str]]  # by array; one per view, or one


class Manifest(TypedDict):
    """The group attributes of a cache, or of a teacher that was added to one.

    An added teacher is a group of its own (store/added.py), with either `teacher` or `clip` and
    only the arrays of its rows. It repeats what its rows depend on: images, classes and views.
    """

    format: str
    schema: int
    complete: bool
    addition: NotRequired[str]  # the name of an added teacher; absent from the cache itself
    dataset: DatasetEntry
    class_names: list[str]
    image_size: int
    mean: list[float]
    std: list[float]
    pixels: NotRequired[PixelsEntry]  # if decoded photographs are kept
    views: ViewsEntry
    teacher: NotRequired[TeacherEntry]  # absent if the group is an added CLIP
    clip: ClipEntry | None
    prompts: list[str]
    alpha: float
    scale: float | str
    fused_accuracy: float | None
    dtype: str
    keep_bits: int | None  # mantissa bits that teacher rows are rounded to
    keep: NotRequired[int]  # K, if only the K largest training logits are kept (store/topk.py)
    keep_temperature: NotRequired[float]  # τ at which the others keep their mass
    keep_kl: NotRequired[dict[str, float]]  # nats by τ on the test rows, once complete
    rows: NotRequired[list[str]]  # those that are kept, sorted; absent if all are
    block: int
    recipe: dict[str, Any]
    versions: dict[str, str]
    checksums: Checksums | None  # None until complete
    seal: str | None  # of the manifest's own file


# What may differ between an interrupted run and the one that resumes it.
NOT_IDENTITY = frozenset(
    {"complete", "fused_accuracy", "keep_kl", "recipe", "versions", "checksums", "seal"}
)
SPLITS = {"train", "test", "validation"}


@dataclass(frozen=True)
class ArraySpec:
    """Shape, dtype and chunk of one array."""

    shape: tuple[int, ...]
    dtype: str
    chunks: tuple[int, ...]
    dimensions: tuple[str, ...]
    compressed: bool = True

    @property
    def nbytes(self) -> int:
        """Uncompressed size."""
        width = {"bool": 1, "uint8": 1, "uint16": 2, "float16": 2, "float32": 4, "int64": 8}
        return math.prod(self.shape) * {**width, "int32": 4}[self.dtype]


@dataclass(frozen=True)
class Block:
    """The unit of work of stage one: samples start..stop of a split.

    `view` is None for what depends on the clean image only (test and validation rows; training
    images, labels and CLIP features) and the view index for the CNN teacher's training rows.
    The kept pixels of a block of samples are several blocks, one for each of their chunks.
    """

    split: str
    view: int | None
    start: int
    stop: int
    pixels: bool = False  # nothing but kept pixels

    @property
    def name(self) -> str:
        """The block as messages name it."""
        view = " pixels" * self.pixels if self.view is None else f" view {self.view}"
        return f"{self.split}{view} samples {self.start}..{self.stop - 1}"


def choose_block(widest: int, dtype: str) -> int:
    """Return the rows per block: a power of two, so that the widest chunk is about 4 MiB."""
    row = widest * (2 if dtype == "float16" else 4)
    return min(MAX_BLOCK, 1 << max(4, int(math.log2(CHUNK_BYTES / row))))


def split_sizes(manifest: Manifest) -> dict[str, int]:
    """Return the number of samples of each split."""
    dataset = manifest["dataset"]
    sizes = {"train": dataset["num_train"], "test": dataset["num_test"]}
    if "num_validation" in dataset:
        sizes["validation"] = dataset["num_validation"]
    return sizes


def describe_errors(errors: Mapping[str, float]) -> str:
    """Describe KL errors."""
    return ", ".join(f"{error:.2g} nats at τ {tau}" for tau, error in errors.items())


def describe_precision(precision: str, error: PrecisionError | None) -> str:
    """Describe CLIP's precision and its error, if it was measured."""
    if error is None:
        return precision
    return (
        f"{precision}: on {error['images']} test images cosines are within "
        f"{error['cosine_max']:.1e} of float32's ({error['cosine_mean']:.1e} on average), and "
        f"{percent(error['same_class'])} % get the same class"
    )


def blocks(manifest: Manifest) -> list[Block]:
    """Return all blocks in the order of their flags: test, validation, then training.

    The blocks of kept pixels follow those of the rows of the same samples.
    """
    counts = split_sizes(manifest)

    def of(split: str, views: Collection[int | None]) -> Iterator[Block]:
        for start, stop in _spans(0, counts.get(split, 0), manifest["block"]):
            yield from (Block(split, view, start, stop) for view in views)
            if "pixels" in manifest:
                for span in _spans(start, stop, manifest["pixels"]["images"]):
                    yield Block(split, None, *span, pixels=True)

    views = (*[None] * has_clean_rows(manifest), *range(num_teacher_views(manifest)))
    return [*of("test", [None]), *of("validation", [None]), *of("train", views)]


def _spans(start: int, stop: int, size: int) -> Iterator[tuple[int, int]]:
    return ((first, min(first + size, stop)) for first in range(start, stop, size))


def has_clean_rows(manifest: Manifest) -> bool:
    """Return whether a training image has rows that do not depend on the view."""
    return "addition" not in manifest or manifest["clip"] is not None


def num_teacher_views(manifest: Manifest) -> int:
    """Return the number of views of a training image that have rows of a CNN teacher."""
    return manifest["views"]["count"] if "teacher" in manifest else 0


def num_blocks(manifest: Manifest) -> int:
    """Return the number of blocks without listing them: a manifest may claim absurd sizes."""
    counts, size = split_sizes(manifest), manifest["block"]
    per_split = {split: -(-count // size) for split, count in counts.items()}
    each = has_clean_rows(manifest) + num_teacher_views(manifest)
    kept = sum(num_pixel_chunks(manifest, count) for count in counts.values())
    return sum(per_split.values()) + per_split["train"] * (each - 1) + kept


def num_pixel_chunks(manifest: Manifest, count: int) -> int:
    """Return the number of chunks that the kept pixels of `count` images take."""
    return -(-count // manifest["pixels"]["images"]) if "pixels" in manifest else 0


def view_array(manifest: Manifest) -> tuple[Any, ...]:
    """Return the name, dtype and axes of the array that has the views of the training split."""
    axes = ("view", manifest["views"]["count"]), ("sample", manifest["dataset"]["num_train"])
    augment = augment_of(manifest)
    space = manifest["views"]["space"]
    if augment is None and space == "pad-crop-flip":
        return "train/view_ids", "uint16", *axes
    columns = GEOMETRY[space] if augment is None else augment.columns
    return "train/view_params", "float32", *axes, ("parameter", len(columns))


def augment_of(manifest: Manifest) -> Augment | None:
    """Return what views are besides a crop and flip; None for nothing."""
    return Augment.recorded(manifest["views"])


def array_specs(manifest: Manifest) -> dict[str, ArraySpec]:
    """Return the spec of every array of a cache with this manifest."""
    dataset, clip, dtype = manifest["dataset"], manifest["clip"], manifest["dtype"]
    num_classes, own_images = len(manifest["class_names"]), "addition" not in manifest
    views, block, side = manifest["views"]["count"], manifest["block"], manifest["image_size"]
    kept, absent = kept_logits(manifest), absent_rows(manifest)
    specs: dict[str, ArraySpec] = {}

    def add(name: str, dtype: str, *axes: tuple[str, int]) -> None:
        if name in absent:
            return
        names, shape = zip(*axes, strict=True)
        chunk = {"view": 1, "sample": block}
        specs[name] = ArraySpec(
            shape, dtype, tuple(min(chunk.get(axis, size), size) for axis, size in axes), names
        )

    def add_logits(name: str, *rows: tuple[str, int]) -> None:
        if name not in kept:
            add(name, dtype, *rows, ("class", num_classes))
            return
        top, classes, rest = part_names(name)
        add(top, dtype, *rows, ("rank", manifest["keep"]))
        add(classes, "uint16", *rows, ("rank", manifest["keep"]))
        add(rest, dtype, *rows)

    for split, count in split_sizes(manifest).items():
        sample = ("sample", count)
        if dataset["embedded"] and own_images:
            add(f"{split}/images", "uint8", sample, ("row", side), ("column", side), ("channel", 3))
        if own_images:
            add(f"{split}/labels", "int64", sample)
        rows = (("view", views), sample) if split == "train" else (sample,)
        if "teacher" in manifest:
            add_logits(f"{split}/teacher_logits", *rows)
            width = manifest["teacher"]["num_features"]
            add(f"{split}/teacher_features", dtype, *rows, ("feature", width))
        if clip is not None:
            if own_images:
                add_logits(f"{split}/fused_logits", *rows)
            add(f"{split}/clip_features", dtype, sample, ("clip_feature", clip["num_features"]))
            add(f"{split}/clip_similarity", "float32", sample, ("class", num_classes))
    if own_images:
        add(*view_array(manifest))
    specs |= _pixel_specs(manifest)
    if clip is not None:
        texts = ("class", num_classes), ("prompt", len(manifest["prompts"]))
        add(TEXT_ARRAY, "float32", *texts, ("clip_feature", clip["num_features"]))
        specs[TEXT_ARRAY] = _in_parts(specs[TEXT_ARRAY])
    if "teacher" in manifest and manifest["teacher"].get("head", {}).get("kind") == "probe":
        width = manifest["teacher"]["num_features"] + 1  # the last input is 1
        heads = ("fold", manifest["teacher"]["head"]["folds"])
        add(PROBE_ARRAYS[0], "float32", heads, ("input", width), ("class", num_classes))
        add(PROBE_ARRAYS[1], "uint8", ("sample", dataset["num_train"]))
    specs["complete"] = ArraySpec((num_blocks(manifest),), "bool", (1,), ("block",))
    return specs


def _in_parts(spec: ArraySpec) -> ArraySpec:
    """Split an array, which is one chunk, along its first axis if it is too large for one."""
    if spec.nbytes <= MOST_CHUNK_BYTES:
        return spec
    rows = max(1, PART_BYTES * spec.shape[0] // spec.nbytes)
    return replace(spec, chunks=(rows, *spec.chunks[1:]))


def _pixel_specs(manifest: Manifest) -> dict[str, ArraySpec]:
    """Return the specs of the kept pixels: one chunk a row, and uncompressed, to read images."""
    specs: dict[str, ArraySpec] = {}
    for split, count in split_sizes(manifest).items() if "pixels" in manifest else ():
        chunk = manifest["pixels"]["bytes"][split]
        shape = num_pixel_chunks(manifest, count), chunk
        specs[f"{split}/pixels"] = ArraySpec(
            shape, "uint8", (1, chunk), ("chunk", "byte"), compressed=False
        )
        for name in (SIZES, PIXEL_SIZES):
            rows = min(manifest["block"], count)
            specs[f"{split}/{name}"] = ArraySpec((count, 2), "int32", (rows, 2), ("sample", "side"))
    return specs


def kept_logits(manifest: Manifest) -> set[str]:
    """Return the logits that are stored by their K largest, as the arrays of `part_names`."""
    if "keep" not in manifest:
        return set()
    names = ("teacher_logits",) if manifest["clip"] is None else LOGITS
    return {f"train/{name}" for name in names} - absent_rows(manifest)


def left_out(rows: Collection[str] | None, split: str) -> set[str]:
    """Return the rows that a split does not keep, given those that are kept; None keeps all.

    The blend's test and validation rows, one per image, are kept for its accuracy.
    """
    absent = set() if rows is None else {*ROWS} - {*rows}
    return absent if split == "train" else absent - {"fused_logits"}


def absent_rows(manifest: Manifest) -> set[str]:
    """Return the arrays that a cache was asked not to keep."""
    rows = manifest.get("rows")
    return {f"{split}/{name}" for split in split_sizes(manifest) for name in left_out(rows, split)}


def part_names(name: str) -> tuple[str, str, str]:
    """Return the arrays that stand for logits of which the K largest are kept."""
    return f"{name}_top", f"{name}_classes", f"{name}_rest"


def block_arrays(manifest: Manifest, block: Block) -> list[str]:
    """Return the arrays that a block is written to."""
    pixels = f"{block.split}/pixels"
    if block.pixels:
        return [pixels]
    return [
        name
        for name, spec in array_specs(manifest).items()
        if name.startswith(f"{block.split}/")
        and name != pixels
        and name.partition("/")[2] not in KNOWN
        and (spec.dimensions[0] == "view") == (block.view is not None)
    ]


def raw_bytes(manifest: Manifest) -> int:
    """Return the bytes of all arrays before compression."""
    return sum(spec.nbytes for spec in array_specs(manifest).values())


def manifest_fault(attributes: Mapping[str, Any]) -> str | None:
    """Return what is wrong with an untrusted manifest, in types or ranges; None if nothing is."""
    fault = find_fault(attributes, Manifest)
    return str(fault) if fault else next(_out_of_range(cast(Manifest, attributes)), None)


def _out_of_range(manifest: Manifest) -> Iterator[str]:
    for name, value in _flat("", {**manifest, "recipe": {}}):
        if isinstance(value, float) and not math.isfinite(value):
            yield f"{name} is not finite"
        if isinstance(value, int) and not 0 <= value < MOST:
            yield f"{name} is {value!r}"
    dtype = manifest["dtype"]
    if dtype not in ("float16", "float32"):
        yield f"dtype is {dtype!r}"
    yield from _wrong_views(manifest["views"])
    if manifest["block"] < 1 or manifest["image_size"] < 1:
        yield f"block is {manifest['block']}, image_size {manifest['image_size']}"
    if manifest.keys() & {"keep", "keep_temperature"}:
        keep, temperature = manifest.get("keep", 0), manifest.get("keep_temperature", 0)
        if not 1 <= keep < len(manifest["class_names"]) or temperature <= 0:
            yield f"keep is {keep}, keep_temperature {temperature}"
    clip, rows = manifest["clip"], manifest.get("rows", ["teacher_logits"])
    known = {*(ROWS if clip else CNN_ROWS)}
    if rows != sorted({*rows}) or not {"teacher_logits"} <= {*rows} <= known:
        yield f"rows is {rows!r}"
    if clip is not None and clip.get("precision", "float32") not in CLIP_PRECISIONS:
        yield f"clip.precision is {clip['precision']!r}"
    yield from _out_of_place(manifest)
    yield from _wrong_pixels(manifest)
    yield from _out_of_order(manifest)
    mean, std = manifest["mean"], manifest["std"]
    if not len(mean) == len(std) == 3 or min(std) <= 0:
        yield f"mean is {mean!r}, std {std!r}"
    elif "teacher" in manifest and (fault := input_fault(teacher_input(manifest))) is not None:
        yield f"of teacher.input, {fault}"


def _wrong_views(views: ViewsEntry) -> Iterator[str]:
    """Yield what is wrong with the space of the views, or with their components."""
    if views["space"] not in GEOMETRY:
        yield f"views.space is {views['space']!r}"
        return
    if not {"augment", "columns"} & views.keys():
        return
    text = views.get("augment", "")
    try:
        known = text == read_augment(text) and Augment.of(views["space"], text)
    except RichKDError:
        known = None
    if not known:
        yield f"views.augment is {text!r}"
    elif views.get("columns") != [*known.columns]:
        yield f"views.columns are not those of {text}: {shown(views.get('columns'))}"


def _out_of_place(manifest: Manifest) -> Iterator[str]:
    """Yield what is wrong with the teachers of a cache, or of a group for one of them."""
    if "addition" not in manifest and "teacher" not in manifest:
        yield "teacher is missing"
    if not TEACHER_NAME.fullmatch(manifest.get("addition", "x")):
        yield f"addition is {manifest['addition']!r}"
    if "addition" in manifest and ("teacher" in manifest) == (manifest["clip"] is not None):
        yield "an added teacher is either a CNN or a CLIP"


def _out_of_order(manifest: Manifest) -> Iterator[str]:
    """Yield what is wrong with the entries on folders, decoding and class order."""
    dataset = manifest["dataset"]
    folders = dataset.get("folders")
    if folders is not None:
        plain = all(name == Path(name).name not in ("", "..") for name in folders.values())
        if not {"train", "test"} <= folders.keys() <= SPLITS or not plain:
            yield f"dataset.folders is {folders!r}"
    if len(dataset.get("class_folders", manifest["class_names"])) != len(manifest["class_names"]):
        yield f"dataset.class_folders has {len(dataset['class_folders'])} names"
    if "decoding" in dataset:
        if re.fullmatch("#[0-9a-f]{6}", dataset["decoding"]["background"]) is None:
            yield f"dataset.decoding.background is {dataset['decoding']['background']!r}"
        for kind, ends in dataset["decoding"]["ranges"].items():
            if len(ends) != 2 or not -math.inf < ends[0] < ends[1] < math.inf:
                yield f"dataset.decoding.ranges of {kind} is {ends!r}"
    teacher, count = manifest.get("teacher"), len(manifest["class_names"])
    outputs = teacher and teacher.get("outputs")
    if teacher is not None and "head" in teacher:
        yield from _wrong_head(teacher["head"], outputs, count)
    elif outputs is not None and sorted(outputs) != [*range(count)]:
        yield f"teacher.outputs is not a permutation of {count} classes"


def _wrong_pixels(manifest: Manifest) -> Iterator[str]:
    """Yield what is wrong with the entry on kept pixels."""
    pixels = manifest.get("pixels")
    if pixels is None:
        return
    if min(pixels["side"], pixels["images"], *pixels["bytes"].values()) < 1:
        yield f"pixels is {shown(pixels)}"
    elif manifest["block"] % pixels["images"]:
        yield f"pixels.images is {pixels['images']} for blocks of {manifest['block']}"
    if pixels["bytes"].keys() != split_sizes(manifest).keys():
        yield f"pixels.bytes is {shown(pixels['bytes'])}"
    photographs = manifest["views"]["space"] == "resized-crop-flip"
    if manifest["dataset"]["embedded"] or not photographs or "addition" in manifest:
        yield "pixels are kept of images that are no photographs"


def _wrong_head(head: HeadEntry, outputs: list[int] | None, count: int) -> Iterator[str]:
    if head["kind"] == "rows":
        if outputs is None or not len(outputs) == len({*outputs}) == count:
            yield f"teacher.outputs are not {count} different rows"
    elif head["kind"] != "probe" or not {"penalty", "accuracy"} <= head.keys():
        yield f"teacher.head is {head!r}"
    elif not 2 <= head.get("folds", 0) <= 255 or outputs is not None:
        yield f"teacher.head is {head!r}, teacher.outputs {shown(outputs)}"


def teacher_input(manifest: Manifest) -> InputEntry:
    """Return the CNN teacher's input; in older caches it is the students'."""
    return manifest["teacher"].get("input") or student_input(manifest)


def student_input(manifest: Manifest) -> InputEntry:
    """Return the input of students that are trained from a cache."""
    photographs = manifest["views"]["space"] == "resized-crop-flip"
    return NetworkInput(
        size=manifest["image_size"],
        mean=tuple(manifest["mean"]),
        std=tuple(manifest["std"]),
        crop=CLEAN_SHARE if photographs else 1.0,
    ).entry


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str | None:
    """Return the first setting by which two manifests describe different caches, or None."""

    def filled(manifest: Mapping[str, Any]) -> Mapping[str, Any]:
        """Fill in the teacher's input and CLIP's precision, which older caches leave out."""
        if manifest_fault(manifest) is not None:
            return manifest
        clip = manifest["clip"]
        whole = {
            **manifest,
            "rows": manifest.get("rows", "all"),
            "clip": clip and {"precision": "float32", **clip},
        }
        if "teacher" in manifest:
            found = teacher_input(cast(Manifest, manifest))
            whole["teacher"] = {**manifest["teacher"], "input": found}
        return whole

    was, now = (
        {
            name: value
            for name, value in _flat("", filled(manifest))
            if name.partition(".")[0] not in NOT_IDENTITY
            and not name.endswith(".accuracy")
            and not name.startswith("clip.precision_error.")  # measured, maybe on another machine
            and not name.startswith("dataset.folders.")  # their content is in the fingerprint
        }
        for manifest in (old, new)
    )
    for name in sorted(was.keys() | now.keys()):
        if was.get(name) != now.get(name):
            return f"{name} was {shown(was.get(name))} and is now {shown(now.get(name))}"
    return None


def _flat(prefix: str, value: object) -> Iterator[tuple[str, object]]:
    """Yield the innermost entries of a manifest with their dotted names."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(f"{prefix}.{key}" if prefix else key, inner)
    else:
        yield prefix, value


def shown(value: object) -> str:
    """Format a setting for a message."""
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "…"


def teacher_accuracies(manifest: Manifest) -> dict[str, float | None]:
    """Return top-1 of the CNN teacher, CLIP and their blend on the test split, in 0..1."""
    clip, teacher = manifest["clip"], manifest.get("teacher")
    return {
        "cnn": teacher["accuracy"] if teacher else None,
        "clip": clip["accuracy"] if clip else None,
        "fused": manifest["fused_accuracy"],
    }
