"""What the runs from one cache share: its images, slabs and targets, each read once."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from richkd.config.settings import Distill, shown_weights
from richkd.core.choices import CROP
from richkd.core.progress import Report
from richkd.core.ranks import ALONE, Ranks
from richkd.core.seeds import derive_seed
from richkd.data.datasets import ImageFiles, Split
from richkd.data.inputs import Normalize, make_inputs
from richkd.data.kept import KeptImages
from richkd.data.mixing import Mix, joined
from richkd.data.on_device import check_device
from richkd.data.views import views_tensor
from richkd.losses import Task, method_class, method_options
from richkd.losses.method import EVERY, TARGET, Method
from richkd.models import check_fit, check_trainable, create_model
from richkd.store import pages
from richkd.store.added import array_of
from richkd.store.reader import SLAB_ARRAYS, TeacherCache, open_cache
from richkd.store.schema import augment_of
from richkd.store.topk import Rows, TopKRows
from richkd.training.data import (
    Data,
    EpochRows,
    EvalSet,
    OfSamples,
    all_rows,
    part_of,
    timed,
    with_partners,
)
from richkd.training.device import choose_device, cuda, free_memory
from richkd.training.images import PixelCheck, student_images
from richkd.training.initial import PRETRAINED, Initial
from richkd.training.loop import Trainer, training_order
from richkd.training.parallel import Parallel, device_of, slices_of
from richkd.training.targets import Target, choice_samples, choose_target, held_out

KINDS = {"cnn": "teacher"}  # the targets of teachers whose names differ from them


class Source:
    """A cache and what all runs from it share: images, slabs and targets.

    Runs whose settings differ in `cache`, `dataset`, `data_root`, `decode`, `device` or
    `crops_per_decode` need different sources. A run that several processes share has one in each of
    them, which reads the rows of that process's samples only.
    """

    def __init__(
        self,
        settings: Distill,
        report: Report,
        cache: TeacherCache | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        """Open the cache that the settings name, unless it is given."""
        self.settings = settings
        self.report = report
        self.ranks = ranks
        self.device = choose_device(device_of(ranks, settings.device))
        self.cache = cache or open_cache(settings.cache)
        self._targets: dict[str, Target] = {}  # by the name of their rows
        self._on_gpu: dict[str, Rows] = {}  # rows of the current epoch, at the same address in each
        self._chosen: dict[tuple[Any, ...], str] = {}
        self._fixed: dict[str, Rows] = {}
        self._pixel_check: PixelCheck | None = None

    @cached_property
    def data(self) -> Data:
        """Images and labels of all splits on the device, with all test samples in `test`."""
        splits = self.splits
        manifest = self.cache.manifest
        return Data(
            train=make_inputs(splits["train"].images, self.device, augment=self.cache.augment),
            train_labels=splits["train"].labels.to(self.device),
            test=EvalSet.of(splits["test"], self.device),
            choice=EvalSet.of(splits["validation"], self.device)
            if "validation" in splits
            else None,
            normalize=Normalize(tuple(manifest["mean"]), tuple(manifest["std"]), self.device),
            num_classes=self.cache.num_classes,
        )

    @cached_property
    def splits(self) -> dict[str, Split]:
        """Images and labels of all splits, on the host; raise as `student_images`."""
        given = self.settings
        if given.decode == "gpu":
            check_device(self.device, augment_of(self.cache.manifest) is not None)
        found = student_images(
            self.cache, given.dataset, given.data_root, given.decode, self.report
        )
        if isinstance(found["train"].images, KeptImages):
            self._pixel_check = PixelCheck(self.cache, found, self.ranks)
        return found

    def check_pixels(self) -> None:
        """Wait until all kept pixels, if images are read from them, were compared with their CRCs.

        Raises:
            RichKDError: the cache is damaged.
        """
        if self._pixel_check is not None:
            self._pixel_check.wait()

    def data_for(self, settings: Distill) -> Data:
        """Return `data` for a run, which may hold out test images, or normalise in its own way."""
        data, initial = self.data, initial_of(settings, self.cache)
        # what a file expects is not known to a run that resumes without it
        if initial is not None and initial.weights == PRETRAINED and initial.constants:
            data = replace(data, normalize=Normalize(*initial.constants, self.device))
        if not settings.holdout:
            return data
        test = data.test
        split, chosen = choice_samples(self.cache, settings.holdout)
        assert split == "test"
        _, tested = held_out(len(test.labels), settings.holdout)
        return replace(
            data,
            test=replace(test, ids=tested.to(self.device)),
            choice=replace(test, ids=chosen.to(self.device)),
        )

    def task(self, student_dim: int, target: Target | None = None, *, every: bool = False) -> Task:
        """Return what a method is built for.

        Args:
            student_dim: width of the student's features.
            target: the blend that the method takes, if it takes one.
            every: the method reads the logits of every teacher.
        """
        clip = self.cache.manifest["clip"]
        weights = {} if target is None else dict(target.weights)
        return Task(
            labels=self.data.train_labels.cpu(),
            student_dim=student_dim,
            teacher_dim=self.cache.manifest["teacher"]["num_features"],
            clip_dim=clip["num_features"] if clip else 0,
            alpha=1.0 if target is None else target.alpha,
            teachers=self.cache.teachers if every else (),
            others={
                name: num_features(self.cache.addition(name))
                for name in weights
                if name in self.cache.added
            },
            weights=weights,
            mixed=self.cache.augment is not None and self.cache.augment.mixes,
        )

    def target(self, settings: Distill, kind: str) -> tuple[str, Target]:
        """Choose a run's target, once for all runs; return the name of its rows, and the target.

        Raises as `choose_target`.
        """
        blend = (
            settings.alpha,
            shown_weights(settings.weights),
            settings.balance,
            settings.scale,
            settings.prompts,
            settings.clip_head,
            settings.holdout,
        )
        key = (settings.target or kind, *blend)
        if key not in self._chosen:
            target = choose_target(self.cache, settings, kind, self.report)
            self._chosen[key] = f"{TARGET}/{len(self._chosen)}"
            self._targets[self._chosen[key]] = target
        return self._chosen[key], self._targets[self._chosen[key]]

    def trainer(
        self, settings: Distill, log: Callable[[str], None] = lambda _: None
    ) -> tuple[Trainer, dict[str, str], Target | None]:
        """Create a student and its method from a run's settings.

        Args:
            settings: resolved by `with_defaults`.
            log: called with a message about how its steps run.

        Returns:
            The trainer; of each array that its method reads, the name for `epochs`; the target.
        """
        method_type, options = method_of(settings)
        reads = method_type.reads(options)
        data = self.data_for(settings)
        target: Target | None = None
        own = ""  # the name of the target's rows
        if TARGET in reads or "clip_features" in reads:
            own, target = self.target(settings, method_type.target)
        model, width = build_student(settings, self.cache)
        task = self.task(width, target, every=EVERY in reads)
        method = method_type(options, replace(task, label_smoothing=settings.label_smoothing))
        rows = {
            name: own if name == TARGET else self.row_of(name, settings)
            for name in method_type.row_names(options, task)
        }
        parallel = (
            Parallel(self.ranks, settings, self.device, self.cache.num_samples)
            if self.ranks.world > 1
            else None
        )
        return Trainer(model, method, data, settings, self.device, log, parallel), rows, target

    def row_of(self, name: str, settings: Distill) -> str:
        """Return the name for `epochs` of the rows that a method calls `name`."""
        teacher, of_teacher, what = name.rpartition("/")
        if not of_teacher:
            return name
        if what == "logits":
            alone = replace(settings, target=KINDS.get(teacher, teacher), alpha=None, weights=None)
            return self.target(replace(alone, balance=""), "teacher")[0]
        clip = self.cache.addition(teacher).manifest["clip"]
        return f"{teacher}/{'teacher' if clip is None else 'clip'}_features"

    def own(self, shared: EpochRows, rows: Mapping[str, str], seed: int, epoch: int) -> EpochRows:
        """Select the rows of an epoch that a run's method reads.

        A method that reads none is not limited to the cached views: it sees fresh views, as in
        plain training. Over the M epochs of a group they are those that it would see without reuse
        of decoded images.

        Args:
            shared: the rows of all runs.
            rows: their names by the method's names, as `trainer` returned them.
            seed: the run's.
            epoch: from 1.
        """
        augment, labels = self.cache.augment, self.data.train_labels
        if rows:
            chosen = {name: shared.rows[given] for name, given in rows.items()}
            return with_partners(replace(shared, rows=chosen), labels, augment)
        space = self.splits["train"].views(CROP if augment is None else augment.text)

        def fresh(epoch: int, samples: Tensor | None) -> Tensor:
            views = views_tensor(space.fresh(seed, epoch, self.cache.num_samples))
            return joined(augment, views, samples)

        if shared.samples is None:
            return with_partners(EpochRows(fresh(epoch, None), {}), labels, augment)
        first = epoch - (epoch - 1) % shared.each
        parts = enumerate(self.own_pieces(epoch)[0])
        views = torch.cat([fresh(first + number, part) for number, (_, part) in parts])
        return with_partners(replace(shared, views=views, rows={}), labels, augment)

    def epochs(
        self, names: Collection[str], first: int, last: int
    ) -> Iterator[tuple[EpochRows, float]]:
        """Yield views and named rows of epochs first..last, and the seconds spent waiting for them.

        A thread reads an epoch's slab while the epoch before trains. On a GPU, the rows of an epoch
        overwrite those of the epoch before. Names are arrays of the cache (`teacher_features`) and
        those that `target` returned.
        """
        augment = self.cache.augment
        alone = self.ranks.world == 1 or (augment is not None and augment.mixes)
        fixed_names = {name for name in names if alone and self._is_fixed(name)}
        place = self._place(sorted({*names} - fixed_names), sorted(fixed_names))
        fixed = {name: self._fixed_rows(name, place) for name in sorted(fixed_names)}
        slab_rows = self._slab_rows(sorted({*names} - fixed_names), place)
        for slab, waited in timed(all_rows(slab_rows, first, last)):
            source = slab.to(self.device, self._on_gpu) if cuda(self.device) else slab
            yield replace(source, rows={**source.rows, **self._of_entries(fixed, source)}), waited

    def _of_entries(self, fixed: Mapping[str, Rows], source: EpochRows) -> Mapping[str, Rows]:
        """Return rows that are the same in every view, by sample, as those of its entries.

        Those of mixed images are mixed likewise: CLIP saw each of them alone.
        """
        device = torch.device("cpu") if source.on_host else self.device
        mix = Mix.of(self.cache.augment, source.views, source.samples)
        if mix is not None:
            mix = mix.to(device)
            return {name: mix.all_rows(_dense(row)) for name, row in fixed.items()}
        if source.samples is None:
            return fixed
        samples = source.samples.to(device)
        return {name: cast(Rows, OfSamples(row, samples)) for name, row in fixed.items()}

    def _is_fixed(self, name: str) -> bool:
        """Return whether rows are the same in every epoch: CLIP's, which saw the clean images."""
        target = self._targets.get(name)
        return not target.reads if target else name.rpartition("/")[2] not in SLAB_ARRAYS

    def _place(self, slab: Collection[str], fixed: Collection[str]) -> Placement:
        """Choose where rows are kept: in memory, on the disk or on the device.

        Slabs are kept on the disk if two of them would take more than half of the available memory.
        Rows go to a GPU as a whole, unless they are on the disk or an epoch's rows would take
        more than half of its free memory.
        """
        share = self.ranks.world
        on_disk = pages.beyond_memory(self._nbytes(slab) * self.ranks.here // share)
        if self.device.type != "cuda":
            return Placement(on_disk, on_host=False)
        too_much = 2 * self._nbytes([*slab, *fixed]) // share > free_memory(self.device)
        return Placement(on_disk, on_host=on_disk or too_much)

    def _nbytes(self, names: Collection[str]) -> int:
        """Return the bytes of the rows of an epoch, with those that blends are computed from."""
        arrays = {name for name in names if name not in self._targets}
        targets = [self._targets[name] for name in names if name in self._targets]
        arrays |= {array for target in targets for array in target.reads}
        blends = sum(not target.is_stored for target in targets)
        return self.cache.nbytes([array_of("train", array) for array in arrays]) + (
            4 * blends * self.cache.num_samples * self.cache.num_classes
        )

    def _fixed_rows(self, name: str, place: Placement) -> Rows:
        if name not in self._fixed:
            target = self._targets.get(name)
            self._fixed[name] = (
                target.logits("train", {}, place.empty)
                if target
                else self.cache.read(array_of("train", name))
            )
        device = torch.device("cpu") if place.on_host else self.device
        self._fixed[name] = self._fixed[name].to(device)
        return self._fixed[name]

    @property
    def entries(self) -> int:
        """E, the entries of an epoch: the samples, or the largest multiple of M below."""
        each = self.settings.crops_per_decode
        return self.cache.num_samples // each * each

    def pieces(self, epoch: int) -> list[tuple[int, Tensor | None]]:
        """Return the views and samples (None: all) of an epoch, from 1: view (epoch − 1) mod V.

        With M views of a decode, the samples are cut into M parts anew for every M epochs. Each of
        these epochs has one part, in the views that all M epochs would have had.
        """
        each, views = self.settings.crops_per_decode, self.cache.num_views
        if each == 1:
            return [((epoch - 1) % views, None)]
        group, part = divmod(epoch - 1, each)
        samples = part_of(group, part, each, self.cache.num_samples)
        return [((group * each + number) % views, samples) for number in range(each)]

    def own_pieces(
        self, epoch: int
    ) -> tuple[list[tuple[int, Tensor | None]], Tensor | None, int | None]:
        """Return this process's part of `pieces`.

        Returns:
            The views and samples, and of several processes the order of training of their entries,
            and how many entries all processes train on.
        """
        pieces, settings = self.pieces(epoch), self.settings
        if self.ranks.world == 1:
            return pieces, None, None
        each, shape = len(pieces), self.data.train.shape
        order = training_order(settings, epoch, self.entries, each, shape)
        own = slices_of(self.ranks, settings).of(order)
        mine, count = own.sort().values, self.entries // each
        parts: list[tuple[int, Tensor | None]] = []
        for number, (view, samples) in enumerate(pieces):
            which = mine[mine // count == number] - number * count
            parts.append((view, which if samples is None else samples[which]))
        return parts, own.argsort().argsort(), len(order)

    def _slab_rows(self, names: Collection[str], place: Placement) -> Callable[[int], EpochRows]:
        """Return a function that reads the rows of an epoch, from 1.

        Blended logits are rounded to the cache's dtype; logits of which the cache keeps the K
        largest are not filled up.
        """
        targets = {name: self._targets[name] for name in names if name in self._targets}
        features = {name for name in names if name not in targets}
        fixed = {name for name in features if self._is_fixed(name)}
        logits = {array for target in targets.values() for array in target.reads}
        empty = partial(place.empty, dtype=self.cache.manifest["dtype"])
        pin = self.device.type == "cuda" and not place.on_host

        @lru_cache(maxsize=1)  # with one view, every epoch has the same slab
        def read(epoch: int) -> EpochRows:
            """Read the rows of an epoch."""
            pieces, order, whole = self.own_pieces(epoch)
            clean: list[tuple[int | None, Tensor | None]] = [(None, part) for _, part in pieces]
            given = [samples for _, samples in pieces if samples is not None]
            samples = torch.cat(given) if given else None
            stored = {
                name: self.cache.rows_of(
                    array_of("train", name),
                    clean if name in fixed else pieces,
                    place.on_disk,
                )
                for name in sorted(logits | features)
            }
            views = self._views(pieces, place.on_disk)
            rows: dict[str, Rows] = {name: stored[name] for name in sorted(features)}
            for name, target in targets.items():
                mix = Mix.of(self.cache.augment, views, samples)
                into = place.empty if self._is_fixed(name) else empty
                rows[name] = target.logits("train", stored, into, samples, mix)
            epoch_rows = EpochRows(views, rows, place.on_host, samples, len(pieces), order, whole)
            return epoch_rows.pinned() if pin else epoch_rows

        if self.settings.crops_per_decode > 1 or self.ranks.world > 1:
            return read
        return lambda epoch: read(1 + (epoch - 1) % self.cache.num_views)

    def _views(self, pieces: Sequence[tuple[int, Tensor | None]], on_disk: bool) -> Tensor:
        """Return the views of an epoch; mixed ones with their partners', who may be any samples."""
        augment, images = self.cache.augment, self.splits["train"].images
        sizes = images.sizes if isinstance(images, ImageFiles) else None
        if augment is None or not augment.mixes:
            return self.cache.views(pieces, on_disk, sizes)
        every = (self.cache.views([(view, None)], on_disk, sizes) for view, _ in pieces)
        return torch.cat(
            [
                joined(augment, views, samples)
                for views, (_, samples) in zip(every, pieces, strict=True)
            ]
        )


def _dense(rows: Rows) -> Tensor:
    return rows.dense() if isinstance(rows, TopKRows) else rows


@dataclass(frozen=True)
class Placement:
    """Where the rows of an epoch are kept."""

    on_disk: bool  # in a temporary file that is mapped into memory
    on_host: bool  # not on the device: each batch is gathered and copied there

    def empty(self, shape: tuple[int, ...], dtype: str = "float32") -> Tensor:
        """Return uninitialised rows."""
        return torch.from_numpy(pages.empty(shape, np.dtype(dtype), self.on_disk))


def num_features(group: TeacherCache) -> int:
    """Return the width of an added teacher's features."""
    clip = group.manifest["clip"]
    return group.manifest["teacher"]["num_features"] if clip is None else clip["num_features"]


def method_of(settings: Distill) -> tuple[type[Method], Any]:
    """Return class and options of the settings' method; raise as `method_class`."""
    return method_class(settings.method, method_options(settings.options, settings.method))


def initial_of(settings: Distill, cache: TeacherCache) -> Initial | None:
    """Return the weights that the student starts from, or None for random ones."""
    if not settings.student_weights:
        return None
    return Initial(
        weights=settings.student_weights,
        name=settings.student,
        num_classes=cache.num_classes,
        image_size=cache.manifest["image_size"],
        settings=settings.student_options,
        key=settings.student_weights_key,
    )


def build_student(settings: Distill, cache: TeacherCache) -> tuple[torch.nn.Module, int]:
    """Create the student, with weights drawn from the seed; return it with its feature width."""
    check_trainable(settings.student, settings.student_weights)
    torch.manual_seed(derive_seed(settings.seed, 0, 2))
    size = cache.manifest["image_size"]
    model = create_model(
        settings.student, cache.num_classes, image_size=size, **settings.student_options
    )
    width = check_fit(model, settings.student, size, cache.num_classes, **settings.student_options)
    return model, width
