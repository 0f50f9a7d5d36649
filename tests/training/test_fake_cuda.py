"""Stage one's computing as on a GPU, without one: on the right device, and never waiting for it.

Fake tensors have a device and a shape and no values. Whatever mixes devices or needs a value fails
on them, and what copies between devices is looked at here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from helpers import TINY_CLIP
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode

from richkd.config.settings import Precompute
from richkd.core import fusion
from richkd.data.framing import NetworkInput
from richkd.data.inputs import FileInputs
from richkd.data.views import views_tensor
from richkd.models import create_model
from richkd.store.schema import Block
from richkd.store.writer import PendingBlock
from richkd.teachers.clip import ClipTeacher
from richkd.teachers.cnn import CNNTeacher
from richkd.teachers.rows import BlockRows, Preview, Teachers
from richkd.tools.bench import random_dataset

CUDA = torch.device("cuda", 0)
CLASSES, TRAIN, TEST, VIEWS = 7, 40, 24, 3
LARGER_CLIP: dict[str, Any] = {
    **TINY_CLIP,
    "vision_cfg": {**TINY_CLIP["vision_cfg"], "image_size": 48},  # type: ignore[dict-item]
}
# autocast warns wherever there is no GPU, also where it is switched off
pytestmark = pytest.mark.filterwarnings("ignore:.*CUDA is not available")


class Waits(AssertionError):
    pass


class NeverWaits(TorchDispatchMode):
    """Refuses copies between devices for which the host would wait."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default:
            self.look(args[0], kwargs.get("device") or args[0].device, kwargs.get("non_blocking"))
        elif func is torch.ops.aten.copy_.default:
            self.look(args[1], args[0].device, args[2] if len(args) > 2 else False)
        return func(*args, **kwargs)

    def look(self, source: Tensor, target: torch.device, non_blocking: bool | None) -> None:
        if source.device.type == target.type:
            return
        pinned = source.device.type == "cuda" or getattr(source, "pinned", False)
        if not non_blocking or not pinned:
            raise Waits(f"a copy of {tuple(source.shape)} from {source.device} to {target}")


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fake tensors, with which alone one can pretend to pin memory and to record events."""

    def pin(tensor: Tensor) -> Tensor:
        copy = tensor.clone()
        copy.pinned = True  # type: ignore[attr-defined]
        return copy

    monkeypatch.setattr(Tensor, "pin_memory", pin)
    for name in ("__enter__", "__exit__"):  # inside, copies reach no dispatch mode as such
        monkeypatch.setattr(torch.inference_mode, name, lambda *_: None)
    monkeypatch.setattr(torch.cuda, "Event", lambda **_: type("E", (), {"record": lambda *_: 0})())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: device)
    properties = type("Properties", (), {"total_memory": 80 * 2**30})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def read_written(name: str, start: int, stop: int) -> Tensor:
    """Rows that an earlier phase wrote."""
    assert name.endswith("/clip_similarity")
    return torch.zeros(stop - start, CLASSES)


def make_rows(size: int = 32, preview: Preview | None = None, **settings: Any) -> BlockRows:
    """The computing of stage one on fake teachers."""
    with CUDA:
        model: Any = create_model("resnet8", CLASSES).eval().requires_grad_(False)
        tower: Any = open_clip.CLIP(**LARGER_CLIP).eval().requires_grad_(False)
    framing = NetworkInput(
        size=size, crop=0.9 if size != 32 else 1.0, mean=(0.5,) * 3, std=(0.2,) * 3
    )
    outputs = tuple(reversed(range(CLASSES)))
    cnn = CNNTeacher("resnet8", model, "", model.num_features, framing, CUDA, outputs)
    config = {**open_clip.transform.PreprocessCfg(size=48).__dict__}
    clip = ClipTeacher("tiny", tower, None, None, config, "", CUDA)
    vars(clip)["logit_scale"] = 14.3  # a value, which fake weights do not have
    dataset = random_dataset(TRAIN, TEST, CLASSES)
    views = views_tensor(dataset.train.view_space.draw(0, TRAIN, VIEWS))
    given = {"dataset": "shapes", "batch_size": 16, "views": VIEWS, **settings}
    text = F.normalize(torch.ones(CLASSES, 2, LARGER_CLIP["embed_dim"], device=CUDA), dim=-1)
    teachers = Teachers(Precompute(**given), cnn, clip, text)
    # what stage one holds on the device for its whole length
    vars(cnn)["normalize"], vars(cnn)["_columns"] = cnn.normalize, cnn._columns
    vars(clip)["_constants"] = clip._constants
    return BlockRows(dataset, views, CUDA, teachers, read_written, preview)


BLOCKS = [
    Block("test", None, 0, TEST),
    Block("train", None, 0, 32),
    Block("train", 0, 0, 32),
    Block("train", 2, 32, TRAIN),
]


def compute(rows: BlockRows, blocks: list[Block] = BLOCKS) -> list[tuple[Block, dict[str, Tensor]]]:
    phases = rows.phases(blocks)
    return [found for units in phases for found in rows(units, lambda _: None, lambda: None)]


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize("settings", [{}, {"size": 40}, {"keep": "top-3"}, {"batch_size": None}])
def test_blocks_are_computed_without_waiting(settings: dict[str, Any]) -> None:
    rows = make_rows(**settings)
    with NeverWaits():
        found = compute(rows)
        handed = [
            PendingBlock.of(block, each, dict.fromkeys(each, np.dtype(np.float16)))
            for block, each in found
        ]
    wanted = {"teacher_features", "teacher_logits", "fused_logits"}
    for (block, each), one in zip(found, handed, strict=True):
        names = {name.removesuffix(end) for name in each for end in ("_top", "_rest", "_classes")}
        assert names >= wanted if block != BLOCKS[1] else "clip_similarity" in each
        given = {"labels", "images"}
        assert all(tensor.is_cuda for name, tensor in each.items() if name not in given)
        lengths = {name: len(tensor) for name, tensor in each.items()}
        assert lengths == dict.fromkeys(each, block.stop - block.start)
        assert all(tensor.device.type == "cpu" for tensor in one.rows.values())
        floats = {name for name, tensor in each.items() if tensor.is_floating_point()}
        assert one.finite.keys() == floats
        assert all(one.rows[name].dtype == torch.float16 for name in floats)


@pytest.mark.usefixtures("fake")
def test_batches_of_the_preview_are_not_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, features = torch.ones(16, CLASSES, device=CUDA), torch.ones(16, 64, device=CUDA)
    clip = torch.ones(16, LARGER_CLIP["embed_dim"], device=CUDA)
    asked: list[int] = []
    ask = CNNTeacher.rows
    monkeypatch.setattr(
        CNNTeacher, "rows", lambda self, x, *rest: asked.append(len(x)) or ask(self, x, *rest)
    )
    rows = make_rows(preview=Preview(((logits, features),), (clip,)))
    with NeverWaits():
        compute(rows, BLOCKS[:2])
    assert asked == [8]  # of 24 test images


@pytest.mark.usefixtures("fake")
def test_image_files_are_computed_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = make_rows()
    inputs = FileInputs.__new__(FileInputs)

    def decoded(spans: list[range], views: Any, *_: Any, **__: Any) -> Iterator[tuple[Tensor, ...]]:
        for span in spans:
            for start in range(span.start, span.stop, 16):
                count = min(16, span.stop - start)
                crops = torch.zeros(count, VIEWS, 32, 32, 3, dtype=torch.uint8, device=CUDA)
                yield torch.arange(count), crops, torch.zeros(count, 3, 48, 48, device=CUDA)

    inputs.decode_once = decoded  # type: ignore[method-assign, assignment]
    rows.inputs["train"], rows.views = inputs, rows.views.new_zeros(VIEWS, TRAIN, 5, device="cpu")
    views = (None, *range(VIEWS))
    units = [tuple(Block("train", v, start, start + 20) for v in views) for start in (0, 20)]
    with NeverWaits():
        found = list(rows(units, lambda _: None, lambda: None))
    assert len(found) == 2 * (1 + VIEWS)
    assert all(len(tensor) == 20 for _, each in found for tensor in each.values())


# --- it can fail ---------------------------------------------------------------------------------

PLANTED: dict[str, Callable[[Tensor], object]] = {
    "cpu": lambda x: x.cpu(),
    "item": lambda x: x.sum().item(),
    "if": lambda x: bool((x > 0).all()),
    "mask": lambda x: x[x > 0],
    "list": lambda x: x.tolist(),
    "constants": lambda x: x + torch.tensor([1.0], device=x.device),
    "from the host": lambda x: x + torch.ones(x.shape[-1]).to(x.device),
    "unpinned": lambda x: x + torch.ones(x.shape[-1]).to(x.device, non_blocking=True),
    "other device": lambda x: x + torch.ones(x.shape[-1]),
}


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize("place", ["cnn", "clip", "blend"])
@pytest.mark.parametrize("fault", sorted(PLANTED))
def test_whatever_waits_is_found(monkeypatch: pytest.MonkeyPatch, fault: str, place: str) -> None:
    owner, name = {
        "cnn": (CNNTeacher, "rows"),
        "clip": (ClipTeacher, "encode"),
        "blend": (fusion, "fuse_logits"),
    }[place]
    right: Any = getattr(owner, name)

    def planted(*arguments: Any) -> Any:
        found = right(*arguments)
        PLANTED[fault](found[0] if isinstance(found, tuple) else found)
        return found

    monkeypatch.setattr(owner, name, planted)
    rows = make_rows()
    values = (Waits, DataDependentOutputException, DynamicOutputShapeException)
    mixed = pytest.RaisesExc(RuntimeError, match="same device")
    with pytest.raises(values) if fault != "other device" else mixed, NeverWaits():
        compute(rows)
