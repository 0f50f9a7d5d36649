"""Read a cache: slabs in bulk, and other blends computed from the cached parts."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from richkd.core import fusion
from richkd.core.choices import Scale, check_blend
from richkd.core.errors import RichKDError
from richkd.core.memory import spans
from richkd.data.augment import Augment
from richkd.data.mixing import Mix
from richkd.data.views import view_faults, views_tensor
from richkd.store import pages, schema
from richkd.store.added import (
    added_names,
    belongs,
    is_complete,
    place_of,
    remedy,
    unknown_teacher,
    write_again,
)
from richkd.store.checksums import (
    chunk_files,
    chunks_digest,
    intact_file,
    num_chunks,
    views_of,
)
from richkd.store.copy import LocalCopy
from richkd.store.folder import Folder
from richkd.store.location import METADATA, Location
from richkd.store.locations import open_location
from richkd.store.manifest import check_sealed, copy_of, open_store
from richkd.store.schema import ADDED, ArraySpec, Manifest
from richkd.store.topk import Rows, TopKRows

if TYPE_CHECKING:
    import zarr

Piece = tuple[int | None, Tensor | None]  # a view (None: of an array without) and samples (all)
SLAB_ARRAYS = ("teacher_logits", "teacher_features", "fused_logits")


@dataclass(frozen=True)
class Slab:
    """One epoch's worth of the training split: view v of every sample; None if not requested.

    Shapes: view_ids [N] (pad-crop-flip) or view_params [N,5] (photographs; with `--augment` [N,k],
    of the columns that the manifest's `views` names), teacher_logits and fused_logits [N,C],
    teacher_features [N,F], in the stored dtype, on the CPU.
    """

    view_ids: Tensor | None = None
    view_params: Tensor | None = None
    teacher_logits: Tensor | None = None
    teacher_features: Tensor | None = None
    fused_logits: Tensor | None = None

    @property
    def views(self) -> Tensor:
        """The views, as ids or as parameters."""
        views = self.view_ids if self.view_params is None else self.view_params
        assert views is not None
        return views


class TeacherCache:
    """An open, complete cache, from `open_cache`.

    `location` is its path or URL, `path` the folder on this disk that is read: the cache itself, or
    a copy of what was read so far. `added` names the teachers that were added to it and are
    complete; the arrays of one of them have its folder in their names, as in
    `teachers/vit/train/teacher_logits`.
    """

    def __init__(
        self,
        copy: LocalCopy,
        group: zarr.Group,
        manifest: Manifest,
        memory: int | None = None,
        added: Sequence[str] = (),
        unfinished: Sequence[str] = (),
    ) -> None:
        self.location = copy.location
        self.path = copy.path
        self.manifest = manifest
        self.specs = schema.array_specs(manifest)
        self._copy = copy
        self.kept = schema.kept_logits(manifest)
        self.added = tuple(added)
        self._unfinished = unfinished
        self._group = group
        self._memory = memory
        self._additions: dict[str, TeacherCache] = {}  # those that are open

    def __repr__(self) -> str:
        dataset = self.manifest["dataset"]
        return (
            f"TeacherCache({self.location.name!r}: {dataset['name']}, {dataset['num_train']} "
            f"samples, {self.num_views} views, {self.num_classes} classes)"
        )

    @property
    def num_views(self) -> int:
        """V, the number of slabs."""
        return self.manifest["views"]["count"]

    @property
    def views_array(self) -> str:
        """The name of the array of the training split that has the views."""
        name: str = schema.view_array(self.manifest)[0]
        return name.removeprefix("train/")

    @property
    def augment(self) -> Augment | None:
        """What views are besides a crop and flip; None for nothing."""
        return schema.augment_of(self.manifest)

    @property
    def num_classes(self) -> int:
        """C, the number of classes."""
        return len(self.manifest["class_names"])

    @property
    def num_samples(self) -> int:
        """N, the number of training samples."""
        return self.manifest["dataset"]["num_train"]

    @property
    def splits(self) -> list[str]:
        """The splits: train, test, and validation if images were held out."""
        return list(schema.split_sizes(self.manifest))

    @property
    def teachers(self) -> tuple[str, ...]:
        """The names of all teachers: cnn, clip unless there is none, and the added ones."""
        return ("cnn", *["clip"] * (self.manifest["clip"] is not None), *self.added)

    def addition(self, name: str) -> TeacherCache:
        """Return the rows of an added teacher.

        Raises:
            RichKDError: there is no such teacher, it is incomplete or damaged, or its rows are of
                other images or views.
        """
        if name not in (*self.added, *self._unfinished):
            raise unknown_teacher(self.location, name, self.teachers)
        if name not in self._additions:
            self._additions[name] = open_addition(self, name, self._memory)
        return self._additions[name]

    def _at(self, name: str) -> tuple[TeacherCache, str]:
        """Return the group that an array is in, and its name there."""
        folder, _, rest = name.partition("/")
        if folder != ADDED:
            return self, name
        teacher, _, array = rest.partition("/")
        return self.addition(teacher), array

    def read(self, name: str, view: int | None = None, on_disk: bool | None = None) -> Tensor:
        """Return an array by its name in the cache (`train/labels`), or one view of it.

        Args:
            name: of the array; logits of which the cache keeps the K largest are returned dense,
                [N,C] per view.
            view: which of its views; None for all of them, or if it has none.
            on_disk: whether it is placed in a temporary file that is mapped into memory; None if
                it would take more than a quarter of the available memory.

        Raises:
            RichKDError: no such array, no such view, or bytes that fail their checksum.
        """
        rows = self.rows(name, view, on_disk)
        return rows.dense() if isinstance(rows, TopKRows) else rows

    def rows(
        self,
        name: str,
        view: int | None = None,
        on_disk: bool | None = None,
        samples: Tensor | None = None,
    ) -> Rows:
        """Return the same, but leave logits of which the cache keeps the K largest compact.

        Args:
            name: of the array.
            view: as in `read`.
            on_disk: likewise.
            samples: ids [E] of the samples whose rows to return, in this order; None for all. Only
                the chunks that they are in are read.

        Raises:
            RichKDError: as `read`, or stored classes are out of range.
        """
        return self.rows_of(name, [(view, samples)], on_disk)

    def rows_of(self, name: str, pieces: Sequence[Piece], on_disk: bool | None = None) -> Rows:
        """Return the rows of several pieces of an array, one after the other; as `rows`.

        Args:
            name: of the array.
            pieces: of each, the view and the samples.
            on_disk: as in `read`.
        """
        group, name = self._at(name)
        if group is not self:
            return group.rows_of(name, pieces, on_disk)
        self.require(name)
        if name not in self.kept:
            return views_tensor(self._values(name, pieces, on_disk))
        top, classes, rest = (
            self._values(part, pieces, on_disk) for part in schema.part_names(name)
        )
        if int(classes.max()) >= self.num_classes:
            raise RichKDError(
                f"{self.location}: {name} has classes beyond 0..{self.num_classes - 1}; "
                f"{write_again(self.location)}",
                code="cache-damaged",
            )
        return TopKRows.from_numpy(top, classes, rest, self.num_classes)

    def _values(self, name: str, pieces: Sequence[Piece], on_disk: bool | None) -> NDArray[Any]:
        """Return the checked values of an array in one array, piece by piece."""
        for view, _ in pieces:
            if view is not None and not 0 <= view < self.num_views:
                raise RichKDError(
                    f"{self.location} has no view {view}; choose one of 0..{self.num_views - 1}",
                    code="view-out-of-range",
                )
        spec = self.specs[name]
        axes = 1 if pieces[0][0] is None else 2
        count, *rest = spec.shape[axes - 1 :]
        counts = [count if samples is None else len(samples) for _, samples in pieces]
        if on_disk is None:
            row = spec.nbytes // math.prod(spec.shape[:axes])
            on_disk = pages.beyond_memory(sum(counts) * row, self._memory)
        values = pages.empty((sum(counts), *rest), np.dtype(spec.dtype), on_disk)
        parts = np.split(values, np.cumsum(counts)[:-1])
        for part, (view, samples) in zip(parts, pieces, strict=True):
            self._fill(part, name, view, samples)
        return values

    def _fill(
        self, values: NDArray[Any], name: str, view: int | None, samples: Tensor | None
    ) -> None:
        """Read the checked values of one piece of an array into `values`."""
        files = [f"{name}/{METADATA}", *chunk_files(name, self.specs[name], view)]
        self._copy.fetch(files)
        try:
            self._read_here(values, name, view, samples)
        except RichKDError:
            if not self._copy.drop(files):
                raise
            self._copy.fetch(files)  # once more: only the copy may be damaged
            self._read_here(values, name, view, samples)

    def _read_here(
        self, values: NDArray[Any], name: str, view: int | None, samples: Tensor | None
    ) -> None:
        at = () if view is None else (view,)
        count, step = self.specs[name].shape[len(at)], self.specs[name].chunks[len(at)]
        try:
            array = cast("zarr.Array[Any]", self._group[name])
            # chunk by chunk, so that temporary memory stays small beside the slab
            if samples is None:
                for start in range(0, count, step):
                    values[start : start + step] = array[(*at, slice(start, start + step))]
            else:
                for start, into, which in _by_chunk(samples, count, step):
                    values[into] = np.asarray(array[(*at, slice(start, start + step))])[which]
        except Exception as error:  # codecs raise errors of many kinds
            raise RichKDError(
                f"{self.location}: {name} is damaged ({type(error).__name__}: {error}); "
                f"{remedy(self.location)}",
                code="cache-damaged",
            ) from error
        self._check_chunks(name, view)

    def _check_chunks(self, name: str, view: int | None) -> None:
        """Raise RichKDError if a chunk of an array (of a view) is not the one written there."""
        checksums = self.manifest["checksums"]
        assert checksums is not None
        spec, here = self.specs[name], Folder(self.path)
        for number, one in enumerate(views_of(spec)):
            if view is not None and one != view:
                continue
            try:
                found = chunks_digest(here, name, spec, one)
            except OSError:
                found = "a chunk is missing"
            if found != checksums["chunks"][name][number]:
                where = name if one is None else f"{name}, view {one}"
                raise RichKDError(
                    f"{self.location}: {where} is not what was written; {remedy(self.location)}",
                    code="cache-damaged",
                )

    def chunk_folder(self, name: str) -> Path:
        """Return the folder on this disk of all chunks of an array, to read them in place.

        Their bytes are not read, only the CRCs that they end with (`check_content` reads them).

        Raises:
            RichKDError: there is no such array, or a chunk is missing or is another one.
        """
        self.require(name)
        self._copy.fetch(chunk_files(name, self.specs[name]))
        self._check_chunks(name, None)
        return self.path / name / "c"

    def check_content(self, name: str, share: slice = slice(None)) -> None:
        """Read the chunks of an array in `chunk_folder`, or a share of them.

        Raises:
            RichKDError: the bytes of one do not match its CRC.
        """
        for file in [*chunk_files(name, self.specs[name])][share]:
            try:
                intact = intact_file(self.path / file)
            except OSError:
                intact = False
            if not intact:
                raise RichKDError(
                    f"{self.location}: {file} is damaged; {remedy(self.location)}",
                    code="cache-damaged",
                )

    def has(self, name: str) -> bool:
        """Return whether the cache has an array of this name, dense or by its K largest."""
        group, name = self._at(name)
        return name in group.specs or name in group.kept

    def require(self, name: str) -> None:
        """Raise RichKDError if the cache has no array of this name."""
        if not self.has(name):
            raise RichKDError(
                f"{self.location} has no array {name!r}" + self._why_absent(name),
                code="array-absent",
            )

    def nbytes(self, names: Collection[str]) -> int:
        """Return the bytes of one view of some arrays, uncompressed."""
        total = 0
        for name in names:
            self.require(name)
            group, own = self._at(name)
            parts = schema.part_names(own) if own in group.kept else (own,)
            specs = [group.specs[part] for part in parts]
            total += sum(spec.nbytes // len(views_of(spec)) for spec in specs)
        return total

    def slab(
        self, view: int, arrays: Collection[str] = SLAB_ARRAYS, on_disk: bool | None = None
    ) -> Slab:
        """Return view `view` of every training sample.

        Args:
            view: the index of the slab.
            arrays: which arrays to read; by default all that the cache has.
            on_disk: as in `read`; None decides by the size of the whole slab.

        Raises:
            RichKDError: as `read`, or a requested array is not in the cache.
        """
        if arrays is SLAB_ARRAYS:
            arrays = [name for name in SLAB_ARRAYS if self.has(f"train/{name}")]
        if on_disk is None:
            count = self.nbytes([f"train/{name}" for name in arrays])
            on_disk = pages.beyond_memory(count, self._memory)
        return Slab(
            **{self.views_array: self.views([(view, None)], on_disk)},
            **{name: self.read(f"train/{name}", view, on_disk) for name in arrays},
        )

    def views(
        self,
        pieces: Sequence[Piece],
        on_disk: bool | None = None,
        sizes: NDArray[np.int64] | None = None,
    ) -> Tensor:
        """Return the views of training samples, piece by piece.

        Args:
            pieces: as of `rows_of`.
            on_disk: as in `read`.
            sizes: height and width of all photographs [N,2], if they are known.

        Raises:
            RichKDError: as `read`, or some are not views of the images.
        """
        views = self.rows_of(f"train/{self.views_array}", pieces, on_disk)
        assert isinstance(views, Tensor)
        counts = [self.num_samples if samples is None else len(samples) for _, samples in pieces]
        for part, (view, samples) in zip(torch.split(views, counts), pieces, strict=True):
            ids = slice(None) if samples is None else samples.numpy()
            for fault in view_faults(
                self.manifest["views"]["space"],
                self.augment,
                part.numpy(),
                self.num_samples,
                None if sizes is None else sizes[ids],
                None if samples is None else samples.numpy(),
            ):
                raise RichKDError(
                    f"{self.location}: train/{self.views_array}, view {view}: {fault}; "
                    f"{write_again(self.location)}",
                    code="cache-damaged",
                )
        return views

    def fuse(
        self,
        view: int,
        *,
        alpha: float | None = None,
        scale: Scale | None = None,
        prompts: Sequence[int] | None = None,
    ) -> Tensor:
        """Return the fused logits [N,C] f32 of another blend; None means the cache's own setting.

        Of mixed images, CLIP's part is the mean of both by their shares.

        Raises:
            RichKDError: the cache has no CLIP, or a setting is out of range.
        """
        similarity = self.similarity("train", prompts)
        mix = None
        if self.augment is not None:
            mix = Mix.of(self.augment, self.slab(view, ()).views)
        return self.blend(
            self.read("train/teacher_logits", view),
            similarity if mix is None else mix.rows(similarity),
            alpha=alpha,
            scale=scale,
        )

    def blend(
        self,
        teacher_logits: Tensor,
        similarity: Tensor,
        *,
        alpha: float | None,
        scale: Scale | None,
    ) -> Tensor:
        """Return the fused logits of given rows; alpha and scale default to the cache's."""
        alpha = self.manifest["alpha"] if alpha is None else alpha
        scale = cast(Scale, self.manifest["scale"]) if scale is None else scale
        check_blend(alpha, scale)
        number = fusion.resolve_scale(scale, self._clip["logit_scale"])
        bias = fusion.resolve_bias(scale, self._clip.get("logit_bias"))
        return fusion.fuse_logits(teacher_logits, similarity, alpha, number, bias)

    def similarity(self, split: str, prompts: Sequence[int] | None = None) -> Tensor:
        """Return CLIP's cosines [N,C] f32 of a split, with all prompts or some of them."""
        if prompts is None:
            return self.read(f"{split}/clip_similarity")
        classes = fusion.class_embeddings(self.text_embeddings, prompts)
        features = self.read(f"{split}/clip_features")
        shape = len(features), len(classes)
        on_disk = pages.beyond_memory(4 * len(features) * len(classes), self._memory)
        cosines = torch.from_numpy(pages.empty(shape, np.dtype(np.float32), on_disk))
        for span in spans(len(features)):
            cosines[span] = fusion.clip_similarity(features[span], classes)
        return cosines

    @cached_property
    def text_embeddings(self) -> Tensor:
        """One embedding per class and prompt: [C,P,D], unit length."""
        return self.read("text/embeddings")

    @property
    def _clip(self) -> schema.ClipEntry:
        clip = self.manifest["clip"]
        if clip is None:
            raise RichKDError(
                f"{self.location} was written with --clip none, so there is nothing to blend with "
                f"the CNN teacher; use --method kd, or precompute with a CLIP",
                code="cache-without-clip",
            )
        return clip

    def _why_absent(self, name: str) -> str:
        if self.manifest["clip"] is None and ("clip" in name or "fused" in name or "text" in name):
            return ": it was written with --clip none; use --method kd, or precompute with a CLIP"
        if name == "train/fused_logits":
            return ", as --rows left it out; use cache.fuse, or precompute again with all --rows"
        if name in schema.absent_rows(self.manifest):
            return ": it was written with --features none; precompute again with --features all"
        return "; richkd inspect lists its arrays"


def _by_chunk(
    samples: Tensor, count: int, step: int
) -> Iterator[tuple[int, NDArray[np.int64], NDArray[np.int64]]]:
    """Yield the start of each chunk that has some of the samples, where they go, and their rows."""
    ids = samples.numpy()
    order = ids.argsort(kind="stable")
    ascending = ids[order]
    for start in range(0, count, step):
        first, last = np.searchsorted(ascending, (start, start + step))
        if first < last:
            yield start, order[first:last], ascending[first:last] - start


def open_cache(path: str | Path, *, memory: int | None = None) -> TeacherCache:
    """Open a complete cache: a folder, or a URL (s3://, gs://, az://, hf://).

    Args:
        path: where the cache is.
        memory: bytes of memory to assume available, which decides what is read into temporary
            files; None measures it.

    Raises:
        RichKDError: there is no cache, or it is incomplete, of another schema, or damaged: arrays
            or chunks are missing, or differ from the manifest; or the location cannot be reached.
    """
    cache = _open(open_location(path), memory)
    if "addition" in cache.manifest:
        raise RichKDError(
            f"{cache.location} holds one of the teachers of a cache, without its images; name the "
            f"cache itself",
            code="not-a-cache",
        )
    return cache


def open_addition(cache: TeacherCache, name: str, memory: int | None = None) -> TeacherCache:
    """Open the rows of a teacher that was added to a cache; raise as `TeacherCache.addition`."""
    found = _open(place_of(cache.location, name), memory)
    other = belongs(found.manifest, cache.manifest)
    if other is not None or found.manifest.get("addition") != name:
        raise RichKDError(
            f"{found.location} was made for another cache than {cache.location} (another "
            f"{other or 'name'}); add the teacher again with richkd add-teacher --overwrite",
            code="teacher-of-other-cache",
        )
    return found


def _open(location: Location, memory: int | None) -> TeacherCache:
    """Open a complete cache or added teacher."""
    copy = copy_of(location)
    group, manifest = open_store(copy)
    check_sealed(copy, manifest)
    files = location.sizes()
    present = Counter(file.partition("/c/")[0] for file in files if "/c/" in file)
    for name, spec in schema.array_specs(manifest).items():
        _check_array(location, group, name, spec)
        missing = num_chunks(spec) - present[name]
        if missing > 0:
            raise RichKDError(
                f"{location}: {missing} of {num_chunks(spec)} chunks of {name} are missing; "
                f"{remedy(location)}",
                code="cache-damaged",
            )
    added = added_names(files)
    unfinished = [name for name in added if not is_complete(place_of(location, name))]
    whole = [name for name in added if name not in unfinished]
    return TeacherCache(copy, group, manifest, memory, whole, unfinished)


def _check_array(location: Location, group: zarr.Group, name: str, spec: ArraySpec) -> None:
    import zarr

    try:
        array = group[name]
    except Exception:  # absent, or its metadata is damaged
        raise RichKDError(
            f"{location}: array {name} is missing or damaged; {remedy(location)}",
            code="cache-damaged",
        ) from None
    if not isinstance(array, zarr.Array):
        raise RichKDError(
            f"{location}: {name} is not an array; {remedy(location)}", code="cache-damaged"
        )
    if array.shape != spec.shape or str(array.dtype) != spec.dtype or array.chunks != spec.chunks:
        raise RichKDError(
            f"{location}: {name} is {array.dtype} {array.shape}, but the manifest has "
            f"{spec.dtype} {spec.shape}; {remedy(location)}",
            code="cache-damaged",
        )
