"""Export a trained student to a file that runs without richkd: ONNX, or an exported program.

The exported network takes pixels in 0..1 and normalises them itself. It is checked against the
student.
"""

from __future__ import annotations

import contextlib
import io
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from richkd.core.errors import RichKDError, local_path
from richkd.core.files import atomic_write, check_replaceable
from richkd.core.ownership import is_export
from richkd.training.run_folder import complete_run, load_student

SUFFIXES = {"onnx": ".onnx", "torch": ".pt2"}
TOLERANCE = 1e-3  # of logits, relative to the largest


class Pixels(nn.Module):
    """A student that takes pixels in 0..1 [B,3,H,W] and returns logits [B,C]."""

    mean: Tensor
    std: Tensor

    def __init__(self, student: nn.Module, mean: list[float], std: list[float]) -> None:
        super().__init__()
        self.student = student
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))

    def forward(self, pixels: Tensor) -> Tensor:
        logits: Tensor = self.student((pixels - self.mean) / self.std)
        return logits


def export(
    run: str,
    kind: str = "onnx",
    *,
    weights: str = "last",
    out: str | None = None,
    tolerance: float = TOLERANCE,
) -> dict[str, Any]:
    """Export the student of a run to a file, and check that it computes the student's logits.

    Args:
        run: the run folder.
        kind: onnx or torch (torch.export).
        weights: last or best.
        out: the file; by default student.onnx or student.pt2 in the run folder.
        tolerance: the largest difference of logits that is accepted, relative to the largest logit.

    Returns:
        The file, and the largest relative difference of its logits, over two batch sizes.

    Raises:
        RichKDError: the run is not complete, a package is not installed, or the logits differ.
    """
    if kind not in SUFFIXES:
        raise RichKDError(
            f"unknown format {kind!r}; choose from {', '.join(SUFFIXES)}", code="unknown-name"
        )
    path = local_path(out) if out else Path(run) / f"student{SUFFIXES[kind]}"
    trained = complete_run(Path(run))
    about = trained.complete
    student = Pixels(load_student(trained, weights), about["mean"], about["std"]).eval()
    side, labels = about["image_size"], about["class_names"]
    check_replaceable(path, is_export)
    generator = torch.Generator().manual_seed(0)
    batches = [torch.rand(n, 3, side, side, generator=generator) for n in (2, 5)]
    with torch.no_grad():
        expected = [student(batch) for batch in batches]
    with atomic_write(path) as temporary:
        if kind == "onnx":
            found = write_onnx(student, batches, temporary, labels)
        else:
            found = write_program(student, batches, temporary)
        error = max(
            float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, expected, strict=True)
        )
        if not error <= tolerance:
            raise RichKDError(
                f"{path}: logits of the export differ from the student's by {error:.1e} of the "
                f"largest; try --format {'torch' if kind == 'onnx' else 'onnx'}",
                code="export-differs",
            )
    return {"file": str(path), "format": kind, "image_size": side, "relative_error": error}


def write_onnx(
    student: Pixels, batches: list[Tensor], path: Path, labels: list[str]
) -> list[Tensor]:
    """Write ONNX with any batch size; return ONNX Runtime's logits for the batches."""
    try:
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError:
        raise RichKDError(
            "--format onnx needs onnx, onnxscript and onnxruntime; pip install 'richkd[onnx]'",
            code="extra-missing",
        ) from None
    batch = torch.export.Dim("batch", min=1)
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings(action="ignore"):
        program = torch.onnx.export(
            student,
            (batches[0],),
            dynamo=True,
            input_names=["pixels"],
            output_names=["logits"],
            dynamic_shapes={"pixels": {0: batch}},
            verbose=False,
        )
    assert program is not None
    program.model.metadata_props["class_names"] = json.dumps(labels)
    program.save(str(path))
    session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    return [torch.from_numpy(session.run(None, {"pixels": b.numpy()})[0]) for b in batches]


def write_program(student: Pixels, batches: list[Tensor], path: Path) -> list[Tensor]:
    """Write an exported program with any batch size; return its logits for the batches."""
    batch = torch.export.Dim("batch", min=1)
    with warnings.catch_warnings(action="ignore"):
        program = torch.export.export(student, (batches[0],), dynamic_shapes={"pixels": {0: batch}})
        torch.export.save(program, path)
    with torch.no_grad():
        return [program.module()(b) for b in batches]
