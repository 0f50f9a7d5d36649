"""The rows that stage one writes: the teachers' outputs for the images of each block."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import torch
from torch import Tensor

from richkd.config.settings import Precompute
from richkd.core import fusion
from richkd.core.accuracy import accuracy
from richkd.core.progress import Advance, Report, percent
from richkd.data.augment import Augment
from richkd.data.datasets import Dataset, Split
from richkd.data.entries import PixelsEntry
from richkd.data.inputs import ArrayInputs, FileInputs, make_inputs, send
from richkd.data.kept import Packer
from richkd.store.schema import Block, PrecisionError, left_out
from richkd.store.topk import compact
from richkd.teachers.clip import ClipTeacher
from richkd.teachers.cnn import CNNTeacher

FORWARD_BATCH = 256  # images
FORWARD_PIXELS = 2**21  # per forward pass on a GPU, if images are small
PIXEL_BYTES = 2**14  # GPU memory per pixel, several times what networks for CIFAR need
DECODED = 16  # files per batch of a loader, which holds the crops of all their views
Unit = tuple[Block, ...]  # blocks that are computed together
Read = Callable[[str, int, int], Tensor]  # rows start..stop of an array that is already written


@dataclass(frozen=True)
class Teachers:
    """Both teachers and the settings of their blend; one of them if it is added to a cache."""

    settings: Precompute
    cnn: CNNTeacher | None
    clip: ClipTeacher | None
    text: Tensor | None  # one embedding per class and prompt [C,P,D], on the CPU; None without CLIP

    @cached_property
    def classes(self) -> Tensor | None:
        """The class embeddings [C,D]; None without CLIP."""
        if self.text is None:
            return None
        return fusion.class_embeddings(self.text, device=self.device)

    @property
    def cnn_batch(self) -> int:
        """Images per forward pass of the CNN teacher."""
        assert self.cnn is not None
        return batch_size(self.settings, self.cnn.device, self.cnn.input.size)

    @property
    def clip_batch(self) -> int:
        """Images per forward pass of CLIP, whose images may be larger."""
        assert self.cnn is not None or self.clip is not None
        if self.cnn is None and self.clip is not None:
            return batch_size(self.settings, self.clip.device, self.clip.side)
        if self.clip is None or self.clip.device.type != "cuda":
            return self.cnn_batch
        return min(self.cnn_batch, forward_batch(self.clip.device, self.clip.side))

    @property
    def device(self) -> torch.device:
        """The device of the teachers."""
        one = self.cnn or self.clip
        assert one is not None
        return one.device

    def clip_rows(self, features: Tensor) -> dict[str, Tensor]:
        """Return CLIP's rows, given its image features [B,D]."""
        assert self.classes is not None
        return {
            "clip_features": features,
            "clip_similarity": fusion.clip_similarity(features, self.classes),
        }

    def cnn_rows(
        self, parts: Sequence[tuple[Tensor, Tensor]], similarity: Tensor | None
    ) -> dict[str, Tensor]:
        """Return the CNN teacher's rows, given by batch, and their blend with CLIP's cosines."""
        logits, features = (torch.cat(part) for part in zip(*parts, strict=True))
        rows = {"teacher_logits": logits, "teacher_features": features}
        if self.clip is not None and similarity is not None:
            scale = fusion.resolve_scale(self.settings.scale, self.clip.logit_scale)
            bias = fusion.resolve_bias(self.settings.scale, self.clip.logit_bias)
            rows["fused_logits"] = fusion.fuse_logits(
                logits, similarity, self.settings.alpha, scale, bias
            )
        return rows


@dataclass(frozen=True)
class Preview:
    """Outputs for the first test images, computed before stage one starts, by batch.

    If the test split starts with the same batches, they are not computed again.
    """

    cnn: Sequence[tuple[Tensor, Tensor]] = ()  # logits and features
    clip: Sequence[Tensor] = ()  # features
    precision_error: PrecisionError | None = None  # CLIP's, unless it runs in float32

    def of(self, block: Block, batch: int) -> Preview:
        """Return the batches that a block starts with, if they are what `batch` would give."""
        if (block.split, block.start) != ("test", 0):
            return Preview()
        cnn = same_batches([len(logits) for logits, _ in self.cnn], batch, block.stop)
        clip = same_batches([len(features) for features in self.clip], batch, block.stop)
        return Preview(self.cnn[:cnn], self.clip[:clip])


class BlockRows:
    """Computes the rows of blocks with both teachers.

    Images in an array are gathered view by view. CLIP's rows are computed before the views, which
    read CLIP's cosines back through `read`. Image files are decoded once, for CLIP and all views;
    once more for each view that they are mixed into.

    Args:
        dataset: the images.
        views: the views of the training split, [V,N,…].
        device: where rows are computed.
        teachers: both teachers.
        read: returns rows of an array that was written in an earlier phase, or by an earlier run.
        preview: outputs that are already known.
        augment: what views are besides a crop and flip.
        with_images: whether the rows include labels, and images that are in an array.
        pixels: how decoded image files are kept; None if they are not.
    """

    def __init__(
        self,
        dataset: Dataset,
        views: Tensor,
        device: torch.device,
        teachers: Teachers,
        read: Read,
        preview: Preview | None = None,
        augment: Augment | None = None,
        *,
        with_images: bool = True,
        pixels: PixelsEntry | None = None,
    ) -> None:
        self.splits: dict[str, Split] = dataset.splits
        self.pixels = pixels
        self.with_images = with_images
        framing = teachers.cnn.input if teachers.cnn else None
        self.inputs = {
            name: make_inputs(split.images, device, framing, augment if name == "train" else None)
            for name, split in self.splits.items()
        }
        self.views = views.to(device) if self.inputs["train"].gathers else views
        self.device = device
        self.teachers = teachers
        self.read = read
        self.preview = preview or Preview()
        self._similarity: tuple[tuple[str, int], Tensor] | None = None  # of the span read last

    def phases(self, todo: Sequence[Block]) -> list[list[Unit]]:
        """Split the work into phases; each may read what the phases before it wrote."""
        test, validation, train = (
            [block for block in todo if block.split == split]
            for split in ("test", "validation", "train")
        )
        if isinstance(self.inputs["train"], FileInputs):
            return [overlapping(part) for part in (test, validation, train)]
        clean = [block for block in train if block.view is None]
        views = [block for block in train if block.view is not None]
        return [[(block,) for block in part] for part in (test, validation, clean, views)]

    def __call__(
        self, units: Sequence[Unit], tick: Advance, check: Callable[[], None]
    ) -> Iterator[tuple[Block, dict[str, Tensor]]]:
        """Yield each block of the units with its rows by name, without the split.

        Args:
            units: the units of one phase.
            tick: called with the number of images that were done.
            check: called where an interruption loses no more than one block.
        """
        keep, temperature = self.teachers.settings.top_k, self.teachers.settings.keep_temperature
        for block, rows in self._whole(units, tick, check):
            for name in left_out(self.teachers.settings.rows, block.split) & rows.keys():
                del rows[name]
            if keep is not None and block.view is not None:
                yield block, compact(rows, keep, temperature)
            else:
                yield block, rows

    def _whole(
        self, units: Sequence[Unit], tick: Advance, check: Callable[[], None]
    ) -> Iterator[tuple[Block, dict[str, Tensor]]]:
        """Yield the same with all logits."""
        for _, alike in groupby(units, kinds):
            some = list(alike)
            inputs = self.inputs[some[0][0].split]
            if isinstance(inputs, FileInputs):
                yield from self._decoded(inputs, some, tick, check)
            else:
                for block in (block for unit in some for block in unit):
                    yield block, self._gathered(inputs, block)
                    tick(block.stop - block.start)

    def _gathered(self, inputs: ArrayInputs, block: Block) -> dict[str, Tensor]:
        """Return the rows of one block of images in an array."""
        rows: dict[str, Tensor] = {}
        teachers = self.teachers
        if block.view is None:
            rows |= self._given(block)
            if teachers.clip is not None:
                features = [*self.preview.of(block, teachers.clip_batch).clip]
                start = block.start + sum(map(len, features))
                if start < block.stop:
                    features.append(
                        teachers.clip.image_features(inputs, start, block.stop, teachers.clip_batch)
                    )
                rows |= teachers.clip_rows(torch.cat(features))
        if (cnn := teachers.cnn) is not None and (view := cnn_view(block)) is not None:
            parts = [*self.preview.of(block, teachers.cnn_batch).cnn]
            start = block.start + sum(len(logits) for logits, _ in parts)
            if start < block.stop:
                order = torch.arange(start, block.stop, device=self.views.device)
                views = self.views[view] if block.split == "train" else None
                batches = inputs.batches(order, views, teachers.cnn_batch)
                parts += [
                    cnn.rows(images, index if block.split == "train" else None)
                    for index, images in batches
                ]
            rows |= teachers.cnn_rows(parts, self._similarity_of(block, rows))
        return rows

    def _decoded(
        self, inputs: FileInputs, units: Sequence[Unit], tick: Advance, check: Callable[[], None]
    ) -> Iterator[tuple[Block, dict[str, Tensor]]]:
        """Yield the rows of spans of image files, of the same views each, in one pass over them."""
        first = rows_of(units[0])
        teachers, split = self.teachers, units[0][0].split
        cnn_teacher = teachers.cnn
        wanted = [view for block in first if cnn_teacher and (view := cnn_view(block)) is not None]
        clip = teachers.clip if any(block.view is None for block in first) else None
        views: Tensor | None = torch.empty(0, len(self.splits[split]), 5)
        if wanted:
            views = self.views[wanted] if split == "train" else None
        spans = [range(unit[0].start, unit[0].stop) for unit in units]
        chunks = {block.start: block for unit in units for block in unit if block.pixels}
        packer = self._packer(inputs, split, chunks) if chunks else None
        transform = clip.transform if clip else None
        decoded = inputs.decode_once(spans, views, DECODED, transform, packer=packer)
        for unit, span in zip(units, spans, strict=True):
            features: list[Tensor] = []
            cnn: list[list[tuple[Tensor, Tensor]]] = [[] for _ in wanted]
            for numbers, crops, pixels in batched(decoded, len(span), teachers.clip_batch):
                if clip is not None and pixels is not None:
                    features.append(clip.encode(pixels))
                for number, parts in enumerate(cnn):
                    images = torch.cat([part[:, number] for part in crops])
                    assert cnn_teacher is not None
                    parts.append(cnn_teacher.rows(images, numbers if split == "train" else None))
                tick(sum(map(len, crops)) * len(rows_of(unit)))
                check()
                for start, pixels_of_chunk in packer.finished() if packer else ():
                    block = chunks[start]
                    tick(block.stop - block.start)
                    yield block, {"pixels": pixels_of_chunk}
            shared = teachers.clip_rows(torch.cat(features)) if features else {}
            for block in rows_of(unit):
                rows = {**self._given(block), **shared} if block.view is None else {}
                if cnn_teacher and (view := cnn_view(block)) is not None:
                    similarity = self._similarity_of(block, shared)
                    rows |= teachers.cnn_rows(cnn[wanted.index(view)], similarity)
                yield block, rows

    def _packer(self, inputs: FileInputs, split: str, starts: Collection[int]) -> Packer:
        """Return what packs the kept pixels of chunks, given by their first images."""
        assert self.pixels is not None
        return Packer(self.pixels, split, inputs.files.sizes, inputs.files.name, starts)

    def _given(self, block: Block) -> dict[str, Tensor]:
        """Return what needs no teacher: labels, and images that are in an array."""
        if not self.with_images:
            return {}
        split = self.splits[block.split]
        rows = {"labels": split.labels[block.start : block.stop]}
        if isinstance(split.images, Tensor):
            rows["images"] = split.images[block.start : block.stop]
        return rows

    def _similarity_of(self, block: Block, computed: Mapping[str, Tensor]) -> Tensor | None:
        """Return CLIP's cosines of a block, computed or read back; None if there is no blend."""
        if "fused_logits" in left_out(self.teachers.settings.rows, block.split):
            return None
        if self.teachers.clip is None or "clip_similarity" in computed:
            return computed.get("clip_similarity")
        span = (block.split, block.start)
        if self._similarity is None or self._similarity[0] != span:
            name = f"{block.split}/clip_similarity"
            similarity = self.read(name, block.start, block.stop)
            self._similarity = (span, send(similarity, self.device))
        return self._similarity[1]

    def log_zero_shot(self, report: Report) -> None:
        """Log CLIP's accuracy on the test images, once they are written."""
        if self.teachers.clip is not None:
            count = len(self.splits["test"])
            similarity = self.read("test/clip_similarity", 0, count)
            top1 = accuracy(similarity, self.splits["test"].labels, 1)
            report.log(f"CLIP zero-shot: {percent(top1)} % of the test images")


def overlapping(todo: Sequence[Block]) -> list[Unit]:
    """Group the blocks of a split by the samples that they share, the largest blocks first."""
    units: list[list[Block]] = []
    for block in todo:
        if units and block.start < units[-1][0].stop:
            units[-1].append(block)
        else:
            units.append([block])
    return [tuple(unit) for unit in units]


def rows_of(unit: Unit) -> Unit:
    """Return the blocks of a unit but those of kept pixels."""
    return tuple(block for block in unit if not block.pixels)


def kinds(unit: Unit) -> tuple[list[int | None], bool]:
    """Return what a unit computes: which views, and whether it keeps pixels."""
    rows = rows_of(unit)
    return [block.view for block in rows], len(rows) < len(unit)


def batch_size(settings: Precompute, device: torch.device, side: int) -> int:
    """Return the images per forward pass of a CNN teacher: as set, or chosen by their side."""
    return settings.batch_size or forward_batch(device, side)


def forward_batch(device: torch.device, side: int) -> int:
    """Return the images per forward pass; small ones need larger batches to keep a GPU busy."""
    if device.type != "cuda":
        return FORWARD_BATCH
    room = torch.cuda.get_device_properties(device).total_memory // PIXEL_BYTES
    return max(FORWARD_BATCH, min(FORWARD_PIXELS, room) // side**2)


def same_batches(found: Sequence[int], batch: int, count: int) -> int:
    """Return how many leading batches, of sizes `found`, `count` images would be split into."""
    done = number = 0
    for size in found:
        if done == count or size != min(batch, count - done):
            break
        done, number = done + size, number + 1
    return number


def cnn_view(block: Block) -> int | None:
    """Return which view of its split a block needs from the CNN teacher; None for none."""
    return block.view if block.split == "train" else 0


def batched(
    decoded: Iterator[tuple[Tensor, Tensor, Tensor | None]], count: int, batch_size: int
) -> Iterator[tuple[Tensor, list[Tensor], Tensor | None]]:
    """Yield the next `count` images in batches: index, crops [b,V,S,S,3] in parts, CLIP's pixels.

    The parts are not concatenated: that would hold the crops of all views twice.
    """
    done = 0
    parts: list[tuple[Tensor, Tensor, Tensor | None]] = []
    while done < count:
        parts.append(next(decoded))
        done += len(parts[-1][1])
        if done == count or sum(len(crops) for _, crops, _ in parts) >= batch_size:
            every = [pixels for _, _, pixels in parts if pixels is not None]
            index = torch.cat([numbers for numbers, _, _ in parts])
            yield index, [crops for _, crops, _ in parts], torch.cat(every) if every else None
            parts = []
