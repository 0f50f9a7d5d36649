"""Show the content of a cache, complete or not, for people and scripts."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from richkd.core.progress import Report, percent, size
from richkd.data.entries import describe_splits
from richkd.data.framing import NetworkInput
from richkd.store import schema
from richkd.store.added import added_names, place_of
from richkd.store.location import METADATA, Location
from richkd.store.locations import open_location
from richkd.store.manifest import read_manifest
from richkd.store.schema import Manifest, TeacherEntry, teacher_accuracies


def summarize(path: str | Path) -> dict[str, Any]:
    """Return the manifest, the arrays with their shapes and sizes on disk, and the totals.

    Raises:
        RichKDError: there is nothing at the path, or no richkd cache.
    """
    location = open_location(path)
    manifest = read_manifest(path)
    summary = _summary(location, manifest)
    added = [_summary(place_of(location, n)) for n in added_names(location.sizes())]
    return {**summary, "added": {each["manifest"]["addition"]: each for each in added}}


def _summary(location: Location, manifest: Manifest | None = None) -> dict[str, Any]:
    """Return the summary of a cache without its added teachers, or of one of these."""
    manifest = manifest or read_manifest(location.name)
    stored = Counter[str]()
    for file, count in location.sizes().items():
        stored[file.partition("/c/")[0].removesuffix(f"/{METADATA}")] += count
    arrays = {
        name: {
            "shape": list(spec.shape),
            "dtype": spec.dtype,
            "chunks": list(spec.chunks),
            "raw_bytes": spec.nbytes,
            "stored_bytes": stored[name],
        }
        for name, spec in schema.array_specs(manifest).items()
    }
    return {
        "path": location.name,
        "complete": manifest["complete"],
        "accuracy": teacher_accuracies(manifest),
        "raw_bytes": sum(array["raw_bytes"] for array in arrays.values()),
        "stored_bytes": sum(array["stored_bytes"] for array in arrays.values()),
        "arrays": arrays,
        "manifest": manifest,
    }


def show(summary: dict[str, Any], report: Report) -> None:
    """Print the summary as two tables."""
    manifest = summary["manifest"]
    dataset, views = manifest["dataset"], manifest["views"]
    command = "add-teacher" if "addition" in manifest else "precompute"
    state = "complete" if summary["complete"] else f"INCOMPLETE: run the same {command} again"
    images = "embedded" if dataset["embedded"] else "not embedded, read from the dataset"
    if "pixels" in manifest:
        images = f"kept with {manifest['pixels']['side']} pixels on the shorter side"
    rows = [
        ("state", state),
        ("data", f"{dataset['name']}: {describe_splits(schema.split_sizes(manifest))} images"),
        ("images", f"{manifest['image_size']}×{manifest['image_size']}, {images}"),
        ("fingerprint", dataset["fingerprint"][:16]),
        ("classes", f"{len(manifest['class_names'])}: {_some(manifest['class_names'])}"),
        ("views", f"{views['count']} of {views['space']}{_augment(views)}, seed {views['seed']}"),
        *_teachers(summary),
    ]
    for name, added in summary["added"].items():
        rows.append((f"added: {name}", "" if added["complete"] else "INCOMPLETE"))
        rows += [(f"  {key.strip()}", value) for key, value in _teachers(added)]
    if "keep" in manifest:
        tau = manifest["keep_temperature"]
        rows.append(("logits", f"the {manifest['keep']} largest, the others alike at τ {tau:g}"))
    if "rows" in manifest:
        rows.append(("rows", f"only {', '.join(manifest['rows'])}"))
    if "keep_kl" in manifest:
        rows.append(("  KL error", schema.describe_errors(manifest["keep_kl"])))
    report.table(summary["path"], ("", ""), rows, left=2)
    groups = {"": summary, **{f"{schema.ADDED}/{n}/": g for n, g in summary["added"].items()}}
    stored = sum(group["stored_bytes"] for group in groups.values())
    raw = sum(group["raw_bytes"] for group in groups.values())
    report.table(
        f"{size(stored)} stored, {size(raw)} raw",
        ("array", "shape", "dtype", "stored"),
        [
            (
                f"{folder}{name}",
                "×".join(map(str, array["shape"])),
                array["dtype"],
                size(array["stored_bytes"]),
            )
            for folder, group in groups.items()
            for name, array in group["arrays"].items()
        ],
    )


def _augment(views: schema.ViewsEntry) -> str:
    return f" with {views['augment']}" if "augment" in views else ""


def _teachers(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the rows on the teachers of a cache, or on an added one."""
    manifest, accuracy = summary["manifest"], summary["accuracy"]
    teacher, clip = manifest.get("teacher"), manifest["clip"]
    rows = []
    if teacher:
        rows += [
            ("teacher", f"{teacher['name']}, sha256 {teacher['sha256'][:16]}"),
            ("  sees", f"{NetworkInput.of(schema.teacher_input(manifest))}"),
            *_head(teacher),
            ("  top-1", f"{percent(accuracy['cnn'])} %"),
        ]
    if clip:
        bias = f", bias {clip['logit_bias']:.4g}" if "logit_bias" in clip else ""
        precision, error = clip.get("precision", "float32"), clip.get("precision_error")
        rows += [
            ("CLIP", f"{clip['model']}, logit scale {clip['logit_scale']:.4g}{bias}"),
            ("  precision", schema.describe_precision(precision, error)),
            ("  zero-shot top-1", f"{percent(accuracy['clip'])} %"),
            ("prompts", f"{len(manifest['prompts'])}: {_some(manifest['prompts'])}"),
        ]
    if "addition" in manifest:
        return rows
    if not clip:
        return [*rows, ("CLIP", "none")]
    return [
        *rows,
        ("blend", f"alpha {manifest['alpha']}, scale {manifest['scale']}"),
        ("  fused top-1", f"{percent(accuracy['fused'])} %"),
    ]


def _head(teacher: TeacherEntry) -> list[tuple[str, str]]:
    """Return the row on a teacher's head, unless it is its own."""
    head = teacher.get("head")
    if head is None:
        return []
    if head["kind"] == "rows":
        return [("  head", "the rows of its own that match the classes")]
    found = f"{percent(head['accuracy'])} % of the training images out of fold"
    return [("  head", f"a probe of {head['folds']} folds, {found}")]


def _some(names: list[str], limit: int = 3) -> str:
    return ", ".join(names[:limit]) + (", …" if len(names) > limit else "")
