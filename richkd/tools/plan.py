"""Estimate what stage one would take: bytes, forward passes, hours, and the cost of storage.

Nothing is estimated from tables. Stage one itself runs on some of the images, in a temporary
folder, until its pace is known, and its rows are encoded as the cache would encode them. Missing
images are replaced by drawn ones, and missing weights by random ones, which cost the same.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import linear_regression
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from richkd.config import catalog
from richkd.config.settings import Precompute, TrainTeacher, resolve
from richkd.core.choices import CROP, MIXING
from richkd.core.errors import RichKDError
from richkd.core.interrupts import mark_work_started
from richkd.core.progress import Report, duration, size
from richkd.core.validation import find_fault, hints
from richkd.core.versions import versions
from richkd.data.datasets import Dataset, ImageFiles, Split, decode, introduce, load_dataset
from richkd.data.decoding import Decoding
from richkd.data.kept import pixels_entry
from richkd.data.prompts import load_prompts
from richkd.data.sources import FolderFiles, Paths
from richkd.models.hub_access import planning
from richkd.precompute import StageOne
from richkd.store import schema
from richkd.store.checksums import num_chunks
from richkd.store.encoding import ROUNDED, blank_files, encoded_bytes, round_bits
from richkd.store.folder import Folder
from richkd.store.reader import TeacherCache, open_cache
from richkd.store.schema import ArraySpec, Manifest
from richkd.store.topk import keep_top
from richkd.teachers.class_order import check_teacher_classes, given_outputs
from richkd.teachers.clip import (
    ClipTeacher,
    autocast,
    blank_clip,
    check_clip,
    load_clip,
    local_folder,
)
from richkd.teachers.cnn import CNNTeacher, load_pretrained, load_teacher
from richkd.teachers.demo_clip import demo_clip
from richkd.teachers.find import teacher_weights
from richkd.teachers.framing import check_unsaid, resolve_input
from richkd.teachers.heads import blank_probe
from richkd.teachers.matching import check_head, num_outputs, own_rows
from richkd.teachers.pretrained import by_name, check_teacher_name, named_input
from richkd.teachers.request import check_given, check_kept
from richkd.teachers.rows import Teachers
from richkd.training.device import choose_device, hardware, wait_for

ENOUGH_S = 5.0  # of stage one, to measure its pace
FIRST, MOST = 16, 16_384  # images in the first trial, and at most
VIEWS, KEPT = (1, 2, 4, 8, 16, 32, 64, 162), 50  # in the table besides what was requested
USD_A_GB_MONTH = 0.023  # S3 Standard's list price in us-east-1
DRAWN_FILES, DRAWN_SIZE = 64, (500, 375)  # JPEGs like ImageNet's, in width and height


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How fast a machine runs a pair of teachers, in seconds per image, and on what."""

    hardware: str
    teacher: str
    clip: str
    image_size: int
    teacher_size: int  # side of the CNN teacher's input
    files: bool  # images are decoded from files
    augment: str  # what views are besides a crop and flip
    clean_s: float  # CLIP, decoding, and all else that does not depend on views
    view_s: float  # the CNN teacher, per view
    text_s: float  # CLIP, per text


@dataclass(frozen=True, kw_only=True)
class Option:
    """One way to write the cache, and its costs."""

    views: int
    dtype: str
    keep: str
    keep_bits: int | None
    rows: tuple[str, ...] | None  # those that are kept; None for all
    raw_bytes: int
    stored_bytes: int
    seconds: float
    usd_a_month: float
    chosen: bool


def plan(
    settings: Precompute,
    report: Report,
    *,
    known: bool = False,
    measured: str | None = None,
    price: float = USD_A_GB_MONTH,
    enough: float = ENOUGH_S,
    most: int = MOST,
) -> dict[str, Any]:
    """Return what `precompute` would take with these settings, and with some alternatives.

    Args:
        settings: of stage one.
        report: receives progress.
        known: plan for ImageNet from its known counts, without its files.
        measured: JSON of a plan made on another machine; its pace is used instead.
        price: of storage, in USD per GB (10⁹ bytes) and month.
        enough: seconds of stage one after which its pace is known.
        most: the largest number of images to try it on.

    Returns:
        The dataset's counts, the passes, the pace, the bytes of each array, and the options.
    """
    device = choose_device(settings.device)
    mark_work_started()
    with tempfile.TemporaryDirectory(prefix="richkd-plan-") as folder:
        dataset, counts = sample_of(settings, known, Path(folder), most, report)
        settings = settings.for_size(dataset.image_size)
        check_kept(settings, dataset, report)
        tried = Trial(settings, dataset, device, Path(folder), report)
        report.log(f"{tried.about}; trying stage one on ever more images, for a few seconds each")
        pace = tried.pace(report, enough, most)
        if measured is not None:
            pace = read_pace(Path(measured), pace)
        blank = blank_manifest(tried, counts)
        sizes = dataset.file_sizes
        ratios = Ratios(tried.cache())
        options = [
            weigh(asked, variant(blank, asked, sizes), ratios, pace, price, asked == settings)
            for asked in alternatives(settings, dataset)
        ]
        chosen = next(each for each in options if each.chosen)
        arrays = ratios.of(variant(blank, settings, sizes))
    texts = len(dataset.class_names) * len(blank["prompts"])
    return {
        "dataset": catalog.IMAGENET if known else settings.dataset,
        "num_train": counts[0],
        "num_test": counts[1],
        "num_classes": len(dataset.class_names),
        "image_size": dataset.image_size,
        "about": tried.about,
        "passes": count_passes(counts, chosen.views, texts, settings.teacher_head),
        "pace": asdict(pace),
        "arrays": {name: round(count) for name, count in arrays.items()},
        **{key: value for key, value in asdict(chosen).items() if key != "chosen"},
        "usd_a_gb_month": price,
        "options": [asdict(each) for each in options],
        "versions": versions(),
    }


def count_passes(
    counts: tuple[int, int], views: int, texts: int, head: str = "own"
) -> dict[str, int]:
    """Return the forward passes of each network, given the sizes of both splits.

    A probe is fitted on one more view of the training images.
    """
    train, test = counts
    return {
        "cnn": train * (views + (head == "probe")) + test,
        "clip": train + test if texts else 0,
        "texts": texts,
    }


# --- the data ------------------------------------------------------------------------------------


def sample_of(
    settings: Precompute, known: bool, folder: Path, most: int, report: Report
) -> tuple[Dataset, tuple[int, int]]:
    """Return images to try stage one on, and the real size of each split."""
    kind, path = catalog.split_name(settings.dataset)
    here = kind == "shapes" or catalog.found(settings.dataset, Path(settings.data_root))
    if here and not known:
        dataset = load_dataset(settings, skipped=(), report=report, decoded=False)
        introduce(dataset, report)
        # a validation image costs as much as a test image
        sizes = len(dataset.train), len(dataset.test) + len(dataset.validation or ())
        dataset = replace(dataset, validation=None)
        if dataset.whole:
            few = replace(dataset, train=dataset.train.first(most), test=dataset.test.first(most))
            dataset = decode(few, report)
        return dataset, sizes
    if not known and kind in catalog.OWN:
        fault = "the dataset is not on this machine"
        if kind != catalog.HUGGING_FACE:
            fault = "the folder does not exist"
        raise RichKDError(
            f"{kind}:{path}: {fault}; use --dataset imagenet to plan for ImageNet without it",
            code="dataset-folder-missing",
        )
    counts = catalog.COUNTS[catalog.IMAGENET if known else kind]
    train = min(counts.train, settings.limit or counts.train)
    validation = round(train * settings.validation)
    side = settings.image_size or counts.image_size
    names = tuple(f"class {number}" for number in range(counts.classes))
    statistics = ((0.5,) * 3, (0.25,) * 3)
    if known:
        files = drawn_files(folder / "images", side, most)
        splits = [Split(files, torch.arange(len(files)) % counts.classes) for _ in range(2)]
        report.log(f"drawn JPEGs of {DRAWN_SIZE[0]}×{DRAWN_SIZE[1]} replace ImageNet's")
    else:
        rng = np.random.default_rng(0)
        images = torch.from_numpy(rng.integers(0, 256, (most, side, side, 3), np.uint8))
        splits = [Split(images, torch.arange(most) % counts.classes) for _ in range(2)]
        report.log(f"{kind} is not in {settings.data_root}; random pixels replace it")
    dataset = Dataset(settings.dataset, names, splits[0], splits[1], *statistics, side)
    return dataset, (train - validation, counts.test + validation)


def drawn_files(folder: Path, side: int, count: int) -> ImageFiles:
    """Draw a few JPEGs of some 110 kB, the mean of ImageNet's, and use them repeatedly."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(DRAWN_FILES):
        coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8))
        pixels = np.asarray(coarse.resize(DRAWN_SIZE, Image.Resampling.BICUBIC), np.int16)
        grain = rng.normal(0, 18, pixels.shape)
        drawn = Image.fromarray((pixels + grain).clip(0, 255).astype(np.uint8))
        drawn.save(folder / f"{number}.jpg", quality=80)
    paths = Paths.of(f"{number % DRAWN_FILES}.jpg" for number in range(count))
    sizes = np.tile(np.array(DRAWN_SIZE[::-1], np.int64), (count, 1))
    source = FolderFiles(folder, paths)
    return ImageFiles(source, sizes, np.zeros(count, np.uint8), side, Decoding())


# --- the trial -----------------------------------------------------------------------------------


class Trial:
    """Runs stage one on some images, in f32 and keeping all rows and logits."""

    def __init__(
        self,
        settings: Precompute,
        dataset: Dataset,
        device: torch.device,
        folder: Path,
        report: Report,
    ) -> None:
        self.settings = replace(settings, dtype="float32", keep="all", keep_bits=None, rows=None)
        self.dataset, self.device, self.folder = dataset, device, folder
        self.cnn, trained = planned_teacher(settings, dataset, device)
        autocast(device, settings.clip_precision)  # fails if the device lacks this precision
        self.clip = planned_clip(settings.clip, device, report)
        if self.clip is not None:
            self.clip = replace(self.clip, precision=settings.clip_precision)
        self.text: Tensor | None = None
        side, random = self.cnn.input.size, "" if trained else ", random weights"
        self.about = f"{settings.teacher} ({side}×{side}{random})"
        self.cache_folder: Folder | None = None  # of the last cache written
        if self.clip is None:
            self.about += ", no CLIP"
        else:
            prompts = len(load_prompts(settings.prompts))
            random = "" if self.clip.sha256 else " (random weights)"
            self.about += f", CLIP {settings.clip}{random}, {prompts} prompts a class"
            width = self.clip.encode(self._pixels(self.clip)).shape[-1]
            shape = len(dataset.class_names), prompts, width
            self.text = F.normalize(torch.randn(shape), dim=-1)

    def _pixels(self, clip: ClipTeacher) -> Tensor:
        blank = torch.zeros(1, 32, 32, 3, dtype=torch.uint8, device=self.device)
        return clip.preprocess(blank)

    def pace(self, report: Report, enough: float, most: int) -> Pace:
        """Measure the pace by stage one on ever more images, with one view and with more."""
        views = min(max(self.settings.views, 3), 8)
        self.run(FIRST, 1)  # warm
        one = self.seconds_an_image(1, enough, most)
        report.log(f"an image with 1 view takes {1000 * one:.3g} ms")
        many = self.seconds_an_image(views, enough, most)
        report.log(f"an image with {views} views takes {1000 * many:.3g} ms")
        view_s = max((many - one) / (views - 1), 0.0)
        return Pace(
            hardware=hardware(self.device),
            teacher=self.cnn.name,
            clip=self.settings.clip,
            image_size=self.dataset.image_size,
            teacher_size=self.cnn.input.size,
            files=isinstance(self.dataset.train.images, ImageFiles),
            augment=self.settings.augment,
            clean_s=max(one - view_s, 0.0),
            view_s=view_s,
            text_s=self.seconds_a_text(),
        )

    def seconds_an_image(self, views: int, enough: float, most: int) -> float:
        """Return the seconds of one more image, without the costs of any number of images."""
        most = min(most, len(self.dataset.train))
        counts = [min(FIRST, most)]
        seconds = [self.run(counts[0], views)]
        while counts[-1] < most and seconds[-1] < enough:
            counts.append(min(2 * counts[-1], most))
            seconds.append(self.run(counts[-1], views))
        if len(counts) == 1:
            return seconds[0] / counts[0]
        return max(linear_regression(counts, seconds).slope, 0.0)

    def seconds_a_text(self) -> float:
        """Return the seconds that CLIP takes for one prompt of one class."""
        if self.clip is None:
            return 0.0
        model = self.clip.model
        length = int(getattr(model, "context_length", 77))
        tokens = torch.randint(1, 400, (64, length), device=self.device)
        with torch.inference_mode():
            model.encode_text(tokens[:8])
            wait_for(self.device)
            start = time.perf_counter()
            model.encode_text(tokens)
            wait_for(self.device)
        return (time.perf_counter() - start) / len(tokens)

    def run(self, count: int, views: int) -> float:
        """Run stage one on the first training images and one test image; return its seconds."""
        first = replace(
            self.dataset, train=self.dataset.train.first(count), test=self.dataset.test.first(1)
        )
        cnn = self.cnn
        if cnn.head == "probe":
            probe = blank_probe(cnn.num_features, count, len(first.class_names))
            cnn = replace(cnn, probe=probe.to(self.device))
        teachers = Teachers(replace(self.settings, views=views), cnn, self.clip, self.text)
        stage = StageOne.of(first, teachers)
        if self.cache_folder is not None:
            shutil.rmtree(self.cache_folder.path)
        self.cache_folder = Folder(self.folder / f"{count}-{views}.zarr")
        start = time.perf_counter()
        with stage.open(self.cache_folder) as writer:
            stage.write(writer)
            seconds = time.perf_counter() - start
            stage.complete(writer)
        return seconds

    def cache(self) -> TeacherCache:
        """Open the cache of the largest trial."""
        assert self.cache_folder is not None
        return open_cache(self.cache_folder.path)


def planned_teacher(
    settings: Precompute, dataset: Dataset, device: torch.device
) -> tuple[CNNTeacher, bool]:
    """Return the CNN teacher that stage one would use, and whether it is already trained.

    One of published weights gets random ones, as nothing is downloaded.
    """
    check_given(settings)
    check_teacher_name(settings)
    check_teacher_classes(settings)
    check_unsaid(settings, Path(settings.teacher_weights))
    if settings.teacher_classes and dataset.class_folders:
        given_outputs(settings, dataset)
    training = resolve(
        TrainTeacher,
        {},
        {
            "dataset": settings.dataset,
            "limit": settings.limit,
            "model": settings.teacher,
            "validation": settings.validation,
        },
    )
    weights = teacher_weights(settings, training)
    head, classes = settings.teacher_head, len(dataset.class_names)
    known = head != "rows" or bool(dataset.class_folders)  # drawn images have no class names
    if known:
        check_head(settings, dataset, planning)
    count = classes if head == "own" else num_outputs(settings, weights, classes, planning)
    if by_name(settings):
        found = named_input(settings.teacher, planning)
        cnn = load_pretrained(settings.teacher, found, device, head=head, blank=True)
    else:
        found = resolve_input(settings, weights, dataset, Report(quiet=True), count)
        key = settings.teacher_weights_key
        cnn = load_teacher(settings.teacher, weights, count, found, device, key=key, head=head)
    if head == "rows":
        quiet = Report(quiet=True)
        rows = own_rows(settings, count, dataset, quiet, planning) if known else range(classes)
        cnn = replace(cnn, outputs=tuple(rows))
    return cnn, weights is not None


def planned_clip(name: str, device: torch.device, report: Report) -> ClipTeacher | None:
    """Return the CLIP that stage one would use, with random weights if it had to be downloaded."""
    if name == "none":
        return None
    name = str(demo_clip(report)) if name == "demo" else name
    if local_folder(name) is None:
        return blank_clip(name, device)
    check_clip(name)
    return load_clip(name, device)


def read_pace(file: Path, here: Pace) -> Pace:
    """Return the pace of another machine, from the JSON of a plan made there.

    Raises:
        RichKDError: the file is missing, not a plan, or a plan for other teachers or images.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))["pace"]
        found.setdefault("teacher_size", found["image_size"])  # older plans lack these two
        found.setdefault("augment", CROP)
        for name, hint in hints(Pace).items():
            if (fault := find_fault(found[name], hint, name)) is not None:
                raise ValueError(fault)
        there = Pace(**found)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise RichKDError(
            f"{file} is not a readable plan ({error}); make one on the other machine: richkd plan "
            f"… --json > FILE",
            code="plan-unreadable",
        ) from None
    for name in ("teacher", "clip", "image_size", "teacher_size", "files", "augment"):
        if getattr(there, name) != getattr(here, name):
            raise RichKDError(
                f"{file} was measured with {name} = {getattr(there, name)!r}, but this plan has "
                f"{getattr(here, name)!r}; measure it there with the same settings",
                code="plan-measured-differs",
            )
    return there


# --- the bytes -----------------------------------------------------------------------------------


class Ratios:
    """The compression ratio of each array, measured on the rows of a trial."""

    def __init__(self, cache: TeacherCache) -> None:
        self.cache = cache
        self._known: dict[tuple[Any, ...], float] = {}

    def of(self, manifest: Manifest) -> dict[str, float]:
        """Return the bytes on disk of each array of a cache with this manifest."""
        return {
            name: num_chunks(spec) * encoded_bytes(np.ones(1, bool))
            if name == "complete"
            else spec.nbytes * (self._ratio(name, spec, manifest) if spec.compressed else 1)
            for name, spec in schema.array_specs(manifest).items()
        }

    def _ratio(self, name: str, spec: ArraySpec, manifest: Manifest) -> float:
        kept = manifest.get("keep"), manifest.get("keep_temperature"), manifest["keep_bits"]
        key = (name, spec.dtype, *kept)
        if key not in self._known:
            values = self._values(name, spec, manifest)
            self._known[key] = encoded_bytes(values) / values.nbytes
        return self._known[key]

    def _values(self, name: str, spec: ArraySpec, manifest: Manifest) -> NDArray[Any]:
        """Return the trial's rows of one view, as a cache with this manifest would store them."""
        for logits in schema.kept_logits(manifest):
            if name in (parts := schema.part_names(logits)):
                rows = self.cache.read(logits, 0)
                kept = keep_top(rows, manifest["keep"], manifest["keep_temperature"])
                which = (kept.top, kept.class_index(), kept.rest)[parts.index(name)]
                return self._rounded(name, which.numpy().astype(spec.dtype), manifest)
        train = name.replace("test/", "train/")  # which has more rows of the same kind
        name = train if train in self.cache.specs else name
        view = 0 if self.cache.specs[name].dimensions[0] == "view" else None
        values = self.cache.read(name, view).numpy().astype(spec.dtype)
        return self._rounded(name, values, manifest)

    def _rounded(self, name: str, values: NDArray[Any], manifest: Manifest) -> NDArray[Any]:
        rounded = name.rpartition("/")[2] in ROUNDED
        return round_bits(values, manifest["keep_bits"]) if rounded else values


def blank_manifest(trial: Trial, counts: tuple[int, int]) -> Manifest:
    """Return the manifest of the cache of all images, as far as sizes depend on it."""
    manifest = deepcopy(trial.cache().manifest)
    manifest["dataset"] |= {"num_train": counts[0], "num_test": counts[1]}
    return manifest


def variant(
    blank: Manifest, settings: Precompute, sizes: Mapping[str, NDArray[np.int64]]
) -> Manifest:
    """Return the manifest that the cache would have with some settings.

    Args:
        blank: that of the trial, with the real counts.
        settings: of stage one.
        sizes: of the photographs of each split, from whose first ones chunks of pixels are sized.
    """
    manifest = deepcopy(blank)
    widest = max(len(manifest["class_names"]), manifest["teacher"]["num_features"])
    manifest |= {
        "dtype": settings.dtype,
        "keep_bits": settings.keep_bits,
        "block": schema.choose_block(widest, settings.dtype),
    }
    manifest["views"] |= {"count": settings.views}
    if settings.top_k is not None:
        manifest |= {"keep": settings.top_k, "keep_temperature": settings.keep_temperature}
    if settings.rows is not None:
        manifest["rows"] = sorted(settings.rows)
    if settings.keep_pixels is not None:
        manifest["pixels"] = pixels_entry(sizes, settings.keep_pixels, manifest["block"])
    return manifest


def alternatives(settings: Precompute, dataset: Dataset) -> list[Precompute]:
    """Return the settings, with other numbers of views, and with fewer, smaller or finer rows."""
    limit = dataset.train.view_space.limit
    counts = sorted(count for count in {*VIEWS, settings.views} if count <= (limit or count))
    found = [replace(settings, views=count) for count in counts]
    if settings.dtype == "float16":
        found.append(replace(settings, dtype="float32"))
        if settings.keep_bits is None:
            found.append(replace(settings, keep_bits=7))
    if settings.keep == "all" and len(dataset.class_names) > 2 * KEPT:
        found.append(replace(settings, keep=f"top-{KEPT}"))
    if settings.rows is None:
        fewer = [settings, *(each for each in found if each.keep != settings.keep)]
        found += [replace(each, features="none") for each in fewer]
    return found


def weigh(
    asked: Precompute, manifest: Manifest, ratios: Ratios, pace: Pace, price: float, chosen: bool
) -> Option:
    """Return what one way to write the cache takes."""
    dataset, texts = manifest["dataset"], len(manifest["class_names"]) * len(manifest["prompts"])
    files = sum(map(len, blank_files(manifest).values()))
    stored = files + sum(ratios.of(manifest).values())
    return Option(
        views=asked.views,
        dtype=asked.dtype,
        keep=asked.keep,
        keep_bits=asked.keep_bits,
        rows=asked.rows,
        raw_bytes=schema.raw_bytes(manifest),
        stored_bytes=round(stored),
        seconds=dataset["num_train"]
        * (pace.clean_s + (asked.views + (asked.teacher_head == "probe")) * pace.view_s)
        + dataset["num_test"] * (pace.clean_s + pace.view_s)
        + texts * pace.text_s,
        usd_a_month=stored / 1e9 * price,
        chosen=chosen,
    )


def show(result: Mapping[str, Any], report: Report) -> None:
    """Print the options as a table, and log what they are based on."""
    rows = []
    for option in result["options"]:
        absent = schema.left_out(option["rows"], "train")
        finer = f", {option['keep_bits']} bits" if option["keep_bits"] else ""
        finer += ", no features" if "teacher_features" in absent else ""
        finer += ", no blend" if "fused_logits" in absent and result["passes"]["clip"] else ""
        rows.append(
            (
                f"{option['views']}{' *' if option['chosen'] else ''}",
                f"{option['dtype']}{finer}",
                option["keep"],
                size(option["stored_bytes"]),
                f"{option['usd_a_month']:,.2f}",
                duration(option["seconds"]),
            )
        )
    passes, pace = result["passes"], result["pace"]
    report.table(
        f"{result['dataset']}: {result['num_train']:,} + {result['num_test']:,} images of "
        f"{result['image_size']}×{result['image_size']}, {result['num_classes']:,} classes",
        ("views", "rows", "logits", "store", "USD a month", "time"),
        rows,
        left=3,
    )
    report.log(
        f"* as asked: {passes['cnn']:,} passes of the CNN teacher, {passes['clip']:,} of CLIP and "
        f"{passes['texts']:,} of its texts"
    )
    if pace["augment"].endswith(MIXING) and pace["files"]:
        decoded = result["num_train"] * (result["views"] + 1)
        report.log(f"{decoded:,} decodes of training images: each, and the partner of each view")
    report.log(f"time on one device ({pace['hardware']}); {result['about']}")
    pixels = sum(n for name, n in result["arrays"].items() if name.endswith("/pixels"))
    if pixels:
        report.log(f"of each of these stores, {size(pixels)} are the kept pixels")
    report.log(f"kept at {result['usd_a_gb_month']:g} USD a GB and month")
