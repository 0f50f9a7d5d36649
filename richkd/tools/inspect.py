"""Show the content of a cache, complete or not, for people and scripts."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from richkd.core.progress import Report, percent, size
from richkd.data.entries import describe_splits
from richkd.data.framing import NetworkInput
from richkd.store import schema
from richkd.store.location import METADATA
from richkd.store.locations import open_location
from richkd.store.manifest import read_manifest
from richkd.store.schema import teacher_accuracies


def summarize(path: str | Path) -> dict[str, Any]:
    """Return the manifest, the arrays with their shapes and sizes on disk, and the totals.

    Raises:
        RichKDError: there is nothing at the path, or no richkd cache.
    """
    location = open_location(path)
    manifest = read_manifest(path)
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
    dataset, views, teacher, clip = (manifest[k] for k in ("dataset", "views", "teacher", "clip"))
    accuracy = summary["accuracy"]
    state = "complete" if summary["complete"] else "INCOMPLETE: run the same precompute again"
    images = "embedded" if dataset["embedded"] else "not embedded, read from the dataset"
    rows = [
        ("state", state),
        ("data", f"{dataset['name']}: {describe_splits(schema.split_sizes(manifest))} images"),
        ("images", f"{manifest['image_size']}×{manifest['image_size']}, {images}"),
        ("fingerprint", dataset["fingerprint"][:16]),
        ("classes", f"{len(manifest['class_names'])}: {_some(manifest['class_names'])}"),
        ("views", f"{views['count']} of {views['space']}, seed {views['seed']}"),
        ("teacher", f"{teacher['name']}, sha256 {teacher['sha256'][:16]}"),
        ("  sees", f"{NetworkInput.of(schema.teacher_input(manifest))}"),
        ("  top-1", f"{percent(accuracy['cnn'])} %"),
    ]
    if clip:
        bias = f", bias {clip['logit_bias']:.4g}" if "logit_bias" in clip else ""
        rows += [
            ("CLIP", f"{clip['model']}, logit scale {clip['logit_scale']:.4g}{bias}"),
            (
                "  precision",
                schema.describe_precision(
                    clip.get("precision", "float32"), clip.get("precision_error")
                ),
            ),
            ("  zero-shot top-1", f"{percent(accuracy['clip'])} %"),
            ("prompts", f"{len(manifest['prompts'])}: {_some(manifest['prompts'])}"),
            ("blend", f"alpha {manifest['alpha']}, scale {manifest['scale']}"),
            ("  fused top-1", f"{percent(accuracy['fused'])} %"),
        ]
    else:
        rows.append(("CLIP", "none"))
    if "keep" in manifest:
        tau = manifest["keep_temperature"]
        rows.append(("logits", f"the {manifest['keep']} largest, the others alike at τ {tau:g}"))
    if "rows" in manifest:
        rows.append(("rows", f"{', '.join(manifest['rows'])}; no others of the teachers'"))
    if "keep_kl" in manifest:
        rows.append(("  KL error", schema.describe_errors(manifest["keep_kl"])))
    report.table(summary["path"], ("", ""), rows, left=2)
    report.table(
        f"{size(summary['stored_bytes'])} stored, {size(summary['raw_bytes'])} raw",
        ("array", "shape", "dtype", "stored"),
        [
            (
                name,
                "×".join(map(str, array["shape"])),
                array["dtype"],
                size(array["stored_bytes"]),
            )
            for name, array in summary["arrays"].items()
        ],
    )


def _some(names: list[str], limit: int = 3) -> str:
    return ", ".join(names[:limit]) + (", …" if len(names) > limit else "")
