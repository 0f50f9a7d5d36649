"""Verify that a cache is what stage one wrote, and repair one that is not.

Checks run from the manifest's seal to the metadata files, every chunk, the values in the chunks,
and a sample of rows that the CNN teacher computes again.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from richkd.config import catalog
from richkd.config.settings import Precompute, resolve
from richkd.core import fusion
from richkd.core.accuracy import accuracy
from richkd.core.errors import RichKDError
from richkd.core.memory import spans
from richkd.core.progress import Report
from richkd.data.views import PadCropFlip, view_faults
from richkd.store.added import added_names, place_of, unknown_teacher, write_again
from richkd.store.checksums import (
    block_files,
    chunk_files,
    chunks_digest,
    intact,
    metadata_digest,
    num_chunks,
    read_chunk,
    sealed,
    views_of,
)
from richkd.store.folder import Folder
from richkd.store.location import METADATA, Location
from richkd.store.locations import open_location
from richkd.store.manifest import copy_of, open_store, read_manifest
from richkd.store.reader import TeacherCache, open_cache
from richkd.store.schema import (
    ADDED,
    LOGITS,
    SIZES,
    TEACHER_NAME,
    Block,
    Manifest,
    array_specs,
    blocks,
    describe_precision,
    teacher_accuracies,
)
from richkd.store.topk import Rows, TopKRows, keep_classes, kl_errors
from richkd.store.writer import written

SAMPLED_ROWS = 256
LOST = "teachers"  # the check for manifests of added teachers
FILES = "files"  # the check of every byte
TEACHER = "teacher"  # the check of rows that are computed again
OF_IMAGES = ("labels", "views")  # checks of what an added teacher does not have


@dataclass(frozen=True)
class Check:
    """One check: what was checked, and the faults that were found."""

    name: str
    looked_at: str
    faults: tuple[str, ...]


@dataclass(frozen=True)
class Damage:
    """A file of the cache that is not what was written, and the blocks that it belongs to."""

    file: str
    reason: str
    blocks: tuple[Block, ...] = ()


def verify_store(path: str | Path, teacher: str | None, report: Report) -> list[Check]:
    """Run every check on a cache.

    Args:
        path: of a complete cache.
        teacher: weights of the CNN teacher, or the name of its pretrained weights, to compute a
            random sample of its rows again; or NAME=WEIGHTS for an added teacher.
        report: receives progress.

    Raises:
        RichKDError: there is no complete cache, or its manifest was changed, without which
            nothing else can be checked.
    """
    location = open_location(path)
    checks, files = check_bytes(location, report), location.sizes()
    added = added_names(files)
    if lost := lost_teachers(files):
        checks.append(Check(LOST, f"{ADDED}/", tuple(f"{each}: missing" for each in lost)))
    for name in added:
        checks += check_bytes(place_of(location, name), report, f"{name}: ")
    if any(check.faults for check in checks):
        return checks  # values cannot be read any more
    cache = open_cache(path)
    checks += check_values(cache, cache.read("test/labels"))
    for name in added:
        checks += check_values(cache.addition(name), cache.read("test/labels"), f"{name}: ")
    if teacher is not None:
        name, named, weights = teacher.partition("=")
        if named and name not in added and not Path(teacher).exists():
            raise unknown_teacher(location, name, cache.teachers)
        group = cache.addition(name) if named and name in added else cache
        again = check_teacher(cache, group, Path(teacher if group is cache else weights), report)
        checks.append(Check(TEACHER, f"{SAMPLED_ROWS} rows again", tuple(again)))
    return checks


def check_bytes(location: Location, report: Report, prefix: str = "") -> list[Check]:
    """Check seal and files of a cache or an added teacher; `prefix` begins the checks' names."""
    manifest = sealed_manifest(location)
    folder = f"{ADDED}/{manifest['addition']}/" if "addition" in manifest else ""
    damage = [
        f"{folder}{each.file}: {each.reason}" for each in find_damage(location, manifest, report)
    ]
    files = sum(map(num_chunks, array_specs(manifest).values()))
    return [
        Check(f"{prefix}manifest", "the seal", ()),
        Check(f"{prefix}{FILES}", f"{files:,} chunks", tuple(damage)),
    ]


def lost_teachers(files: Iterable[str]) -> list[str]:
    """Return the manifests that added teachers have lost."""
    folders = {file.split("/")[1] for file in files if file.startswith(f"{ADDED}/")}
    named = {name for name in folders if TEACHER_NAME.fullmatch(name)}
    return [f"{ADDED}/{name}/{METADATA}" for name in sorted(named - {*added_names(files)})]


def check_values(group: TeacherCache, labels: Tensor, prefix: str = "") -> list[Check]:
    """Check the values in a cache or an added teacher, given the labels of the test images."""
    values = (*VALUES, KEPT) if group.kept else VALUES
    if "addition" in group.manifest:  # without images, and perhaps without a CLIP
        left_out = OF_IMAGES if group.manifest["clip"] else (*OF_IMAGES, "features", "blend")
        values = tuple(
            (name, "cosines of features" if name == "blend" else what, check)
            for name, what, check in values
            if name not in left_out
        )
    checks = [Check(f"{prefix}{name}", what, tuple(check(group))) for name, what, check in values]
    counted = tuple(check_accuracies(group, labels))
    checks.append(Check(f"{prefix}accuracies", "as counted from rows", counted))
    clip = group.manifest["clip"]
    if clip is not None and "precision_error" in clip:  # measured by stage one
        shown = describe_precision(clip.get("precision", "float32"), clip["precision_error"])
        checks.append(Check(f"{prefix}CLIP", shown, ()))
    return checks


def raise_faults(path: str | Path, checks: list[Check]) -> None:
    """Raise RichKDError with the first fault and its remedy if a check found one."""
    faults = [(check.name, fault) for check in checks for fault in check.faults]
    if not faults:
        return
    state, remedy = "is damaged", "write it again with richkd precompute --overwrite"
    if ": " in faults[0][0]:  # of an added teacher
        remedy = "add the teacher again with richkd add-teacher --overwrite"
    if faults[0][0] == LOST:
        remedy = "restore the file, or delete the folder and add the teacher again"
    elif faults[0][0] == TEACHER:
        state = "is not what this teacher gives"
        remedy = f"pass the weights that it was written with; if these are they, {remedy}"
    elif faults[0][0].endswith(FILES):
        remedy = "richkd repair computes the damaged blocks again"
    else:
        remedy = f"it was written this way: {remedy}"
    more = f" and {len(faults) - 1} more" if len(faults) > 1 else ""
    raise RichKDError(f"{path} {state}: {faults[0][1]}{more}; {remedy}", code="cache-verify-failed")


def show_checks(path: str | Path, checks: list[Check], report: Report, most: int = 8) -> None:
    """Print a table of the checks, with the first faults of each."""
    rows = []
    for check in checks:
        state = f"{len(check.faults)} wrong" if check.faults else "right"
        rows.append((check.name, check.looked_at, state))
        rows += [("", fault, "") for fault in check.faults[:most]]
        if len(check.faults) > most:
            rows.append(("", f"and {len(check.faults) - most} more", ""))
    report.table(f"{path}", ("", "looked at", ""), rows, left=2)


def repair_store(path: str | Path, report: Report) -> list[str]:
    """Compute the damaged blocks of a cache again, by its own settings; return their names.

    If the cache or an added teacher is incomplete, e.g. because a repair was interrupted, compute
    the missing blocks.

    Raises:
        RichKDError: as `verify_store` and `precompute`; the images and the teachers must still be
            where they were, and be the same.
    """
    location = open_location(path)
    redone = repair_group(location, report)
    for name in added_names(location.sizes()):
        redone += [f"{name}: {block}" for block in repair_group(place_of(location, name), report)]
    return redone


def repair_group(location: Location, report: Report) -> list[str]:
    """Repair a cache without its added teachers, or one of these; as `repair_store`."""
    manifest = read_manifest(location.name)
    complete = manifest["complete"]
    if complete:
        manifest = sealed_manifest(location)
        damage = list(find_damage(location, manifest, report))
        if not damage:
            report.log(f"{location}: every byte is as it was written; nothing to repair")
            return []
        for one in damage:
            report.log(f"{one.file}: {one.reason}")
        damaged = {block for one in damage for block in one.blocks}
        redo = [block for block in blocks(manifest) if block in damaged]
    else:
        done = written(location, manifest)
        redo = [block for block, good in zip(blocks(manifest), done, strict=True) if not good]
    report.log(f"computing {len(redo)} of {len(blocks(manifest))} blocks again")
    compute_again(manifest, location, redo if complete else None, report)
    return [block.name for block in redo]


def compute_again(
    manifest: Manifest, location: Location, damaged: Sequence[Block] | None, report: Report
) -> None:
    """Recompute blocks from the images and teachers that the manifest names."""
    from richkd.precompute import recompute
    from richkd.training.images import load_again, load_dataset_of

    name = manifest.get("addition")
    out = location.name if name is None else location.name.removesuffix(f"/{ADDED}/{name}")
    settings = resolve(Precompute, manifest["recipe"], {"out": out})
    dataset = None
    if name is not None:
        dataset = load_dataset_of(open_cache(out), settings.dataset, settings.data_root, report)
    elif catalog.is_own(settings.dataset) or not manifest["dataset"]["embedded"]:
        dataset = replace(
            load_again(manifest, settings.dataset, settings.data_root, report),
            class_names=tuple(manifest["class_names"]),
        )
    recompute(manifest, settings, damaged, dataset=dataset, report=report)


def sealed_manifest(location: Location) -> Manifest:
    """Return the manifest of a complete cache; raise RichKDError if it does not match its seal."""
    copy = copy_of(location)
    _, manifest = open_store(copy)
    if not sealed(Folder(copy.path)) or manifest["checksums"] is None:
        raise RichKDError(
            f"{location}: the manifest does not match its seal (zarr.json was changed), so "
            f"nothing in it can be trusted; {write_again(location)}",
            code="cache-unsealed",
        )
    claimed = sum(map(num_chunks, array_specs(manifest).values()))
    present = sum("/c/" in file for file in location.sizes())
    if claimed > 2 * present + 1000:  # too many to be lost chunks, or to check
        raise RichKDError(
            f"{location}: the manifest claims {claimed:,} chunks, but there are {present:,}; "
            f"{write_again(location)}",
            code="manifest-damaged",
        )
    return manifest


def find_damage(location: Location, manifest: Manifest, report: Report) -> Iterator[Damage]:
    """Yield files that are missing, damaged, or swapped; every byte is read once."""
    checksums = manifest["checksums"]
    assert checksums is not None
    specs = array_specs(manifest)
    for file, recorded in checksums["metadata"].items():
        try:
            found = metadata_digest(location, file)
        except OSError:
            found = ""
        if found != recorded:
            yield Damage(file, "changed" if found else "missing")
    block_of = {file: block for block in blocks(manifest) for file in block_files(manifest, block)}
    total = sum(spec.nbytes for spec in specs.values())
    with report.track("verify", total, "bytes") as tick:
        for name, spec in specs.items():
            for number, view in enumerate(views_of(spec)):
                files = list(chunk_files(name, spec, view))
                bad = False
                for file, fault in zip(
                    files, location.map(partial(chunk_fault, location), files), strict=True
                ):
                    if fault is not None:
                        bad = True
                        yield Damage(file, fault, (block_of[file],) if file in block_of else ())
                recorded = checksums["chunks"][name][number]
                if not bad and chunks_digest(location, name, spec, view) != recorded:
                    where = name if view is None else f"{name} view {view}"
                    own = tuple(block_of[file] for file in files if file in block_of)
                    yield Damage(where, "the chunks are not those that were written here", own)
                tick(spec.nbytes // len(views_of(spec)))


def chunk_fault(location: Location, file: str) -> str | None:
    """Return what is wrong with a chunk, or None."""
    try:
        return None if intact(read_chunk(location, file)) else "damaged"
    except OSError:
        return "missing"


# --- values --------------------------------------------------------------------------------------


def check_labels(cache: TeacherCache) -> Iterator[str]:
    """Check that labels are classes."""
    for split in cache.splits:
        labels = cache.read(f"{split}/labels")
        wrong = ((labels < 0) | (labels >= cache.num_classes)).sum()
        if wrong:
            yield f"{split}/labels: {wrong} are not in 0..{cache.num_classes - 1}"


def check_views(cache: TeacherCache) -> Iterator[str]:
    """Check that view ids are in range and not repeated, and that other parameters are valid."""
    name, manifest = f"train/{cache.views_array}", cache.manifest
    views, space = cache.read(name), manifest["views"]["space"]
    sizes = cache.read(f"train/{SIZES}").numpy() if "pixels" in manifest else None
    for fault in view_faults(space, cache.augment, views.numpy(), cache.num_samples, sizes):
        yield f"{name}: {fault}"
    if space == PadCropFlip.name:
        ids = (views[..., 0] if cache.augment else views).int()
        repeated = (ids.sort(0).values.diff(dim=0) == 0).any(0).sum()
        if repeated:
            yield f"{name}: {repeated} samples have a view twice"


def check_finite(cache: TeacherCache) -> Iterator[str]:
    """Check that no value is NaN or infinity."""
    for name, spec in cache.specs.items():
        if spec.dtype.startswith("float"):
            for view in views_of(spec):
                values = cache.read(name, view)
                if not all(torch.isfinite(values[span]).all() for span in spans(len(values))):
                    yield f"{name}: NaN or infinity" + ("" if view is None else f" in view {view}")


def check_units(cache: TeacherCache) -> Iterator[str]:
    """Check that CLIP's features and the text embeddings have unit length, up to rounding."""
    if cache.manifest["clip"] is None:
        return
    names = [*(f"{split}/clip_features" for split in cache.splits), "text/embeddings"]
    for name in filter(cache.has, names):
        features, far = cache.read(name), 0
        for span in spans(len(features)):
            lengths = features[span].float().norm(dim=-1)
            far += int(((lengths - 1).abs() > 4 * rounding(cache)).sum())
        if far:
            yield f"{name}: {far} are not of unit length"


def check_blend(cache: TeacherCache) -> Iterator[str]:
    """Check that cosines match the features, and fused logits their parts, where both are kept."""
    if cache.manifest["clip"] is None:
        return
    classes = fusion.class_embeddings(cache.text_embeddings)
    for split in cache.splits:
        similarity = cache.read(f"{split}/clip_similarity")
        kept, wrong = cache.has(f"{split}/clip_features"), 0
        features = cache.read(f"{split}/clip_features") if kept else torch.empty(0)
        for span in spans(len(features)):
            again = fusion.clip_similarity(features[span], classes)
            wrong += int(((similarity[span] - again).abs() > 4 * rounding(cache)).sum())
        if wrong:
            yield f"{split}/clip_similarity does not match the features and the text embeddings"
        views = range(cache.num_views) if split == "train" else (None,)
        for view in views if cache.has(f"{split}/fused_logits") else ():
            logits, wrong = [cache.rows(f"{split}/{name}", view) for name in LOGITS], 0
            for span in spans(len(similarity)):
                rows = [each[span] for each in logits]
                teacher, fused = (each.float() for each in rows)
                parts = cache.blend(teacher, similarity[span], alpha=None, scale=None)
                # both were rounded, by at most half a unit in the last place
                room = 2 * rounding(cache) * (teacher.abs() + fused.abs() + 1e-3)
                wrong += int((((fused - parts).abs() > room) & known(rows)).any(1).sum())
            if wrong:
                where = "" if view is None else f" view {view}"
                yield f"{split}/fused_logits{where}: {wrong} rows are not the blend of their parts"


def known(rows: Sequence[Rows]) -> Tensor:
    """Return where all rows have the class's own logit: [N,C], or a single True for everywhere."""
    everywhere = torch.tensor(True)
    for each in rows:
        if isinstance(each, TopKRows):
            own = torch.zeros(each.shape, dtype=torch.bool)
            everywhere = everywhere & own.scatter_(1, each.class_index(), True)
    return everywhere


def check_kept(cache: TeacherCache) -> Iterator[str]:
    """Check that kept logits descend, are of distinct classes, and have the recorded error."""
    for name, view in itertools.product(sorted(cache.kept), range(cache.num_views)):
        rows = cache.rows(name, view)
        assert isinstance(rows, TopKRows)
        least = rows.top[:, -1].float()
        room = 2 * rounding(cache) * least.abs() + 1e-3
        for fault, wrong in (
            ("are not in descending order", (rows.top.diff(dim=1) > 0).any(1)),
            ("have a class twice", (rows.class_index().sort(1).values.diff(dim=1) == 0).any(1)),
            ("have others above those that are kept", rows.rest.float() > least + room),
        ):
            if wrong.any():
                yield f"{name} view {view}: {wrong.sum()} rows {fault}"
    manifest = cache.manifest
    logits = cache.read(f"test/{LOGITS[-1] if manifest['clip'] else LOGITS[0]}")
    stored = manifest.get("keep_kl", {})
    counted = kl_errors(logits, manifest["keep"], manifest["keep_temperature"])
    for tau, error in counted.items():
        if abs(stored.get(tau, math.inf) - error) > 1e-3 * error + 1e-6:
            yield f"manifest: KL error at τ {tau} is {stored.get(tau)}, the test rows have {error}"


def check_accuracies(cache: TeacherCache, labels: Tensor) -> Iterator[str]:
    """Check that the accuracies in the manifest match the rows."""
    arrays = {"cnn": "teacher_logits", "clip": "clip_similarity", "fused": "fused_logits"}
    for kind, stored in teacher_accuracies(cache.manifest).items():
        if stored is not None and kind in arrays:
            counted = accuracy(cache.read(f"test/{arrays[kind]}"), labels, 1)
            if abs(counted - stored) > 1e-6:
                yield f"manifest: accuracy of {kind} is {stored}, its rows have {counted}"


VALUES: tuple[tuple[str, str, Callable[[TeacherCache], Iterator[str]]], ...] = (
    ("labels", "are classes", check_labels),
    ("views", "in range, none twice", check_views),
    ("numbers", "finite", check_finite),
    ("features", "of unit length", check_units),
    ("blend", "fused logits = blend of parts", check_blend),
)
KEPT = ("kept logits", "descend, classes differ", check_kept)  # if a cache has them


def check_teacher(
    cache: TeacherCache, group: TeacherCache, weights: Path, report: Report
) -> Iterator[str]:
    """Check that a random sample of training rows is what the CNN teacher gives on their views."""
    from richkd.data.inputs import make_inputs
    from richkd.data.mixing import joined
    from richkd.teachers.find import load_again
    from richkd.training.device import choose_device
    from richkd.training.images import load_images

    manifest = group.manifest
    if "teacher" not in manifest:
        raise RichKDError(
            f"{group.location} is a CLIP, and verify computes only rows of CNN teachers again; "
            f"leave --teacher out",
            code="verify-of-clip",
        )
    device = choose_device("auto")
    train = load_images(cache, report=report)["train"]
    teacher = load_again(group, weights, device, report)
    inputs = make_inputs(train.images, device, teacher.input, cache.augment)
    if teacher.sha256 != manifest["teacher"]["sha256"]:
        yield (
            f"{weights} are not the weights of the cache: SHA-256 {teacher.sha256[:12]} instead of "
            f"{manifest['teacher']['sha256'][:12]}"
        )
    each = -(-SAMPLED_ROWS // cache.num_views)
    for view in range(cache.num_views):
        views = joined(cache.augment, cache.slab(view, ()).views)
        index = torch.randperm(cache.num_samples)[:each].sort().values
        batches = inputs.batches(index, views, 256)
        found = [teacher.rows(images, numbers) for numbers, images in batches]
        for number, name in enumerate(("teacher_logits", "teacher_features")):
            if not group.has(f"train/{name}"):
                continue
            rows = group.rows(f"train/{name}", view)[index]
            again = torch.cat([row[number] for row in found])
            if isinstance(rows, TopKRows):
                tau = manifest["keep_temperature"]
                again = keep_classes(again.cpu(), rows.class_index(), tau).dense()
            stored = rows.float()
            far = (stored - again.cpu()).abs() > another_device(cache) * largest(stored)
            if far.any():
                sample = int(index[far.any(1).nonzero()[0, 0]])
                yield f"train/{name} view {view}: sample {sample} is not what the teacher gives"


def rounding(cache: TeacherCache) -> float:
    """Return the relative error of a stored row: half a unit in its last place."""
    bits = cache.manifest["keep_bits"]
    return 2.0 ** -(1 + (bits or (10 if cache.manifest["dtype"] == "float16" else 23)))


def another_device(cache: TeacherCache) -> float:
    """Return how far rows may differ, relative to their largest, by rounding and another device."""
    return max(4 * rounding(cache), 0.01)


def largest(rows: Tensor) -> Tensor:
    """Return the largest magnitude of each row, [N,1]."""
    return rows.abs().amax(1, keepdim=True).clamp(min=1e-3)
