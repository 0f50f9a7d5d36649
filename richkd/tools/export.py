"""A trained student as a file that runs without richkd: ONNX, or PyTorch's exported program.

The file takes pixels in 0..1, and normalises them itself; it is checked against the student.
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
from richkd.training.run_folders import complete_run, load_student

SUFFIXES = {"onnx": ".onnx", "torch": ".pt2"}
TOLERANCE = 1e-3  # of logits, relative to the largest


class Pixels(nn.Module):
    """A student that takes pixels in 0..1 [B,3,H,W] and gives logits [B,C]."""

    mean: Tensor
    std: Tensor

    def __init__(self, student: nn.Module, mean: list[float], std: list[float]) -> None:
        super().__init__()
        self.student = student
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits [B,C]."""
        logits: Tensor = self.student((pixels - self.mean) / self.std)
        return logits


def export(
    run: str, kind: str = "onnx", *, weights: str = "last", out: str | None = None
) -> dict[str, Any]:
    """Write a run's student to a file, and check that the file gives the student's logits.

    Args:
        run: its folder.
        kind: onnx or torch (torch.export).
        weights: last or best.
        out: the file; default student.onnx or student.pt2 in the run folder.

    Returns:
        The file, and the largest difference of its logits from the student's, relative to the
        largest logit, over two sizes of batch.

    Raises:
        RichKDError: no complete run, a package that is not installed, or logits that differ.
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
        if not error <= TOLERANCE:
            raise RichKDError(
                f"{path}: the exported student's logits differ by {error:.1e} of the largest; "
                f"try --format {'torch' if kind == 'onnx' else 'onnx'}",
                code="export-differs",
            )
    return {"file": str(path), "format": kind, "image_size": side, "relative_error": error}


def write_onnx(
    student: Pixels, batches: list[Tensor], path: Path, labels: list[str]
) -> list[Tensor]:
    """ONNX with a free batch size; the logits that ONNX Runtime gives for the batches."""
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
    """An exported program with a free batch size; the logits that it gives for the batches."""
    batch = torch.export.Dim("batch", min=1)
    with warnings.catch_warnings(action="ignore"):
        program = torch.export.export(student, (batches[0],), dynamic_shapes={"pixels": {0: batch}})
        torch.export.save(program, path)
    with torch.no_grad():
        return [program.module()(b) for b in batches]
