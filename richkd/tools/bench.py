"""Benchmarks: paired measurements in one process, A B A B, as medians and ratios.

Steps and passes are timed on random bytes and weights, which cost the same as real ones. Only
compression depends on the rows, and can be measured on a real cache (`--cache`). Ratios are medians
of the ratios of each round, so a machine that slows down slows both sides.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
import zarr
from torch import Tensor
from zarr.codecs import BloscCodec, ZstdCodec
from zarr.storage import MemoryStore

from richkd.config import catalog
from richkd.config.settings import Distill, Precompute
from richkd.core import fusion
from richkd.core.cpus import usable_cpus
from richkd.core.interrupts import mark_work_started
from richkd.core.progress import Report
from richkd.core.versions import versions
from richkd.data.datasets import Dataset, Split
from richkd.data.inputs import ArrayInputs, Normalize
from richkd.data.views import PadCropFlip, views_tensor
from richkd.losses import CRDLoss, Task, kd_loss, method_class
from richkd.losses.method import TARGET
from richkd.models import create_model, forward
from richkd.models.weights import save_tensors
from richkd.precompute import precompute
from richkd.store import schema
from richkd.store.encoding import round_bits
from richkd.store.reader import SLAB_ARRAYS, TeacherCache, open_cache
from richkd.teachers.clip import load_clip
from richkd.training.data import Data, EpochRows, EvalSet
from richkd.training.device import (
    choose_device,
    cuda,
    hardware,
    has_bfloat16,
    wait_for,
)
from richkd.training.loop import Trainer
from richkd.training.source import Source
from richkd.training.student import StudentRun

CLIP_WIDTH = 768  # of ViT-L/14's image features
EMBEDDING = 128
SMALL_STUDENTS = (
    "resnet8",
    "resnet14",
    "resnet20",
    "resnet32",
    "resnet8x4",
    "wrn_16_1",
    "wrn_16_2",
    "vgg8",
)
TINY_CLIP: dict[str, Any] = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 128, "patch_size": 8, "head_width": 64},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 1},
}


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much is measured; quick runs use the same students, teachers and batches."""

    student: str = "resnet8x4"
    teacher: str = "resnet32x4"
    batch_size: int = 64
    num_samples: int = 50_000
    num_classes: int = 100
    negatives: int = 16_384
    rounds: int = 9
    steps: int = 4  # per round; more on a GPU, where one is too short to time
    stage_one: int = 1024  # images in stage one, each clean and in two views
    streamed: int = 20_000  # samples per epoch that streams its slab
    streaming_student: str = "resnet8"  # fast, so that slabs are a large share of its time


FULL = Sizes()
QUICK = Sizes(rounds=3, steps=2, stage_one=512, streamed=3000)


def run_bench(
    sizes: Sizes, report: Report, *, device: str = "auto", cache: str | None = None
) -> dict[str, Any]:
    """Measure everything; return JSON-ready results with hardware, versions and `ratios`.

    Args:
        sizes: `FULL`, `QUICK` or others.
        report: receives progress and tables.
        device: as in every command.
        cache: a real cache, for bytes and their errors; by default one of random weights.
    """
    where = choose_device(device)
    if where.type == "cuda":
        sizes = replace(sizes, steps=10 * sizes.steps, stage_one=100 * sizes.stage_one)
    started = time.perf_counter()
    seconds: dict[str, list[float]] = {}
    mark_work_started()
    with tempfile.TemporaryDirectory(prefix="richkd-bench-") as folder:
        seconds |= time_crd(sizes, where, report)
        seconds |= time_steps(sizes, where, report)
        seconds |= time_together(sizes, where, report)
        seconds |= time_stage_one(sizes, where, report, Path(folder))
        streamed, store = time_slabs(sizes, where, report, Path(folder))
        seconds |= streamed
        stored = store_bytes(open_cache(cache) if cache else store, report)
    ratios = {
        "logits_step_over_vanilla": ratio(seconds, "logits step", "vanilla step"),
        "full_step_over_vanilla": ratio(seconds, "full step", "vanilla step"),
        "full_step_over_published": ratio(seconds, "full step", "published step"),
        "logits_step_over_in_loop": ratio(seconds, "logits step", "in-loop step"),
        "fast_step_over_vanilla": ratio(seconds, "fast step", "vanilla step"),
        "fast_full_step_over_published": ratio(seconds, "fast full step", "published step"),
        "together_over_apart": ratio(seconds, "eight together", "eight apart"),
        "crd_scores_over_vectors": ratio(seconds, "CRD scores", "CRD vectors"),
        "crd_shared_over_vectors": ratio(seconds, "CRD shared", "CRD vectors"),
        "crd_bank_over_vectors": ratio(seconds, "CRD bank", "CRD vectors"),
        "precompute_over_forward": ratio(seconds, "stage one", "its forward passes"),
        "streamed_over_memory": ratio(seconds, "epoch streamed", "epoch in memory"),
        "slab_wait_share": ratio(seconds, "slab wait", "epoch streamed"),
        "store_over_raw": stored["as stored"]["over_raw"],
    }
    if cuda(where):
        for name in ("logits", "full"):
            ratios[f"captured_{name}_over_plain"] = ratio(
                seconds, f"captured {name} step", "captured plain step"
            )
    result = {
        "sizes": asdict(sizes),
        "hardware": hardware(where),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "cache": cache,
        "ratios": {name: round(value, 4) for name, value in ratios.items()},
        "seconds": {
            name: {"median": statistics.median(times), "rounds": times}
            for name, times in seconds.items()
        },
        "bytes": stored,
        "took": time.perf_counter() - started,
    }
    show(result, report)
    return result


def paired(
    measures: Mapping[str, Callable[[], None]],
    rounds: int,
    device: torch.device,
    report: Report,
    *,
    warm: bool = False,
) -> dict[str, list[float]]:
    """Return the seconds of each measure in each round, A B … A B …, after a warm-up round."""
    times: dict[str, list[float]] = {name: [] for name in measures}
    numbers = range(0 if warm else -1, rounds)
    with report.track(", ".join(measures), len(numbers) * len(measures), "runs") as tick:
        for number in numbers:
            for name, measure in measures.items():
                wait_for(device)
                start = time.perf_counter()
                measure()
                wait_for(device)
                if number >= 0:
                    times[name].append(time.perf_counter() - start)
                tick(1)
    return times


def ratio(seconds: Mapping[str, Sequence[float]], a: str, b: str) -> float:
    """Return the median over the rounds of a's time divided by b's."""
    return statistics.median(x / y for x, y in zip(seconds[a], seconds[b], strict=True))


# --- CRD -----------------------------------------------------------------------------------------


class VectorCRD(CRDLoss):
    """CRD as published: gather K+1 vectors per sample and multiply with each; same numbers.

    `numpy_draws` also draws them as published: for each sample separately, without replacement.
    """

    numpy_draws: list[np.ndarray[Any, Any]] | None = None  # by class, the samples of all others

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        index: Tensor,
        negative_index: Tensor | None = None,
    ) -> Tensor:
        """Compute the loss of CRDLoss, with [B,K+1,D] vectors in memory for each side."""
        if negative_index is None and self.numpy_draws is not None:
            draws = [
                np.random.choice(others, self.num_negatives, len(others) < self.num_negatives)
                for others in (self.numpy_draws[c] for c in self._class[index].tolist())
            ]
            negative_index = torch.from_numpy(np.stack(draws)).to(index.device)
        if negative_index is None:
            negative_index = self.draw_negatives(index)
        self._pending = (student.detach(), teacher.detach(), index)
        columns = torch.cat([index[:, None], negative_index], dim=1)
        total = student.new_zeros(())
        sides = ((student, self.teacher_bank), (teacher, self.student_bank))
        for side, (embedding, bank) in enumerate(sides):
            vectors = bank[columns.flatten()].view(*columns.shape, -1)
            scores = torch.bmm(vectors, embedding[:, :, None])[:, :, 0] / self.temperature
            weights = scores.exp()
            with torch.no_grad():
                z = self.normalizers[side]
                z = torch.where(z > 0, z, weights.mean() * self.num_samples)
                self.normalizers[side] = z
            p = weights / z
            noise = (columns.shape[1] - 1) / self.num_samples
            positive = (p[:, 0] / (p[:, 0] + noise + 1e-7)).log().sum()
            negative = (noise / (p[:, 1:] + noise + 1e-7)).log().sum()
            total = total - (positive + negative) / len(embedding)
        return total


def time_crd(sizes: Sizes, device: torch.device, report: Report) -> dict[str, list[float]]:
    """Time the loss, gradient and bank update of each kind of contrast, on unit embeddings."""
    labels = torch.arange(sizes.num_samples) % sizes.num_classes
    shape = sizes.num_samples, EMBEDDING, sizes.negatives
    kinds = {
        "CRD vectors": VectorCRD(*shape, labels=labels, contrast="exact").to(device),
        "CRD scores": CRDLoss(*shape, labels=labels, contrast="exact").to(device),
        "CRD shared": CRDLoss(*shape, labels=labels, contrast="shared").to(device),
        "CRD bank": CRDLoss(*shape, labels=labels, contrast="bank").to(device),
    }
    sides = [
        F.normalize(torch.randn(sizes.batch_size, EMBEDDING, device=device), dim=1).requires_grad_()
        for _ in range(2)
    ]
    index = torch.randperm(sizes.num_samples)[: sizes.batch_size].to(device)

    def run(loss: CRDLoss) -> Callable[[], None]:
        def measure() -> None:
            for _ in range(sizes.steps):
                loss(*sides, index).backward()
                loss.update()

        return measure

    measures = {name: run(loss) for name, loss in kinds.items()}
    return paired(measures, sizes.rounds, device, report)


# --- steps ---------------------------------------------------------------------------------------


def time_steps(sizes: Sizes, device: torch.device, report: Report) -> dict[str, list[float]]:
    """Time training steps: vanilla, from cached rows, and with the CNN teacher in the loop.

    All are eager and in f32, except the fast ones, which are compiled, and in bfloat16 if the
    device supports it.
    """
    n, c = sizes.num_samples, sizes.num_classes
    data = noise_data(sizes, device)
    normalize = data.normalize
    teacher: Any = create_model(sizes.teacher, c).eval()
    teacher = teacher.to(device, memory_format=torch.channels_last)
    rows: dict[str, Tensor] = {
        TARGET: torch.randn(n, c).half().to(device),
        "teacher_features": torch.rand(n, teacher.num_features).half().to(device),
        "clip_features": F.normalize(torch.randn(n, CLIP_WIDTH)).half().to(device),
    }
    cosines = torch.rand(n, c, device=device)
    views = views_tensor(PadCropFlip().draw(0, n, 1))[0]

    def trainer(method: str, vectors: bool = False, **settings: Any) -> Trainer:
        given = {"negatives": sizes.negatives} if method == "richkd" else {}
        made = new_trainer(sizes.student, method, given, data, sizes, device, **settings)
        if vectors:
            labels = data.train_labels.cpu()
            contrast = VectorCRD(n, EMBEDDING, sizes.negatives, labels=labels)
            numbers = labels.numpy()
            contrast.numpy_draws = [np.flatnonzero(numbers != k) for k in range(c)]
            made.method.contrast = contrast.to(device)
        return made

    @torch.no_grad()
    def asked(batch: Tensor, x: Tensor) -> dict[str, Tensor]:
        logits, features = forward(teacher, normalize(x))
        fused = fusion.fuse_logits(logits, cosines[batch], 0.7, 1.0)
        return {
            TARGET: fused,
            "teacher_features": features,
            "clip_features": rows["clip_features"][batch].float(),
        }

    def cached(made: Trainer, names: Sequence[str]) -> Callable[[], None]:
        source = EpochRows(views, {name: rows[name] for name in names})
        return some_steps(endless(made, source), sizes.steps)

    def in_loop(made: Trainer) -> Callable[[], None]:
        made.model.train()
        batches = endless_batches(made, views)

        def measure() -> None:
            for _ in range(sizes.steps):
                batch, x = next(batches)
                made.step(batch, x, asked(batch, x))

        return measure

    def vanilla() -> Callable[[], None]:
        """Train as one would without richkd, with the defaults of PyTorch."""
        model = create_model(sizes.student, c).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
        made = trainer("ce", step="eager", precision="float32")
        model.train()
        batches = endless_batches(made, views)

        def measure() -> None:
            for _ in range(sizes.steps):
                batch, x = next(batches)
                loss = F.cross_entropy(model(normalize(x)), data.train_labels[batch])
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()

        return measure

    eager: dict[str, Any] = {"step": "eager", "precision": "float32"}
    fast: dict[str, Any] = {
        "step": "compiled",
        "precision": "bfloat16" if has_bfloat16(device) else "float32",
    }
    captured: dict[str, Any] = {"step": "captured"}
    graphs = (
        {
            "captured plain step": cached(trainer("ce", **captured), ()),
            "captured logits step": cached(trainer("richkd-l", **captured), (TARGET,)),
            "captured full step": cached(trainer("richkd", **captured), tuple(rows)),
        }
        if cuda(device)
        else {}
    )
    return paired(
        {
            "vanilla step": vanilla(),
            **graphs,
            "logits step": cached(trainer("richkd-l", **eager), (TARGET,)),
            "full step": cached(trainer("richkd", **eager), tuple(rows)),
            "fast step": cached(trainer("richkd-l", **fast), (TARGET,)),
            "fast full step": cached(trainer("richkd", **fast), tuple(rows)),
            "in-loop step": in_loop(trainer("richkd-l", **eager)),
            "published step": in_loop(trainer("richkd", vectors=True, **eager)),
        },
        sizes.rounds,
        device,
        report,
    )


def noise_data(sizes: Sizes, device: torch.device) -> Data:
    """Return random bytes in the shape of CIFAR, on the device."""
    labels = (torch.arange(sizes.num_samples) % sizes.num_classes).to(device)
    images = torch.randint(0, 256, (sizes.num_samples, 32, 32, 3), dtype=torch.uint8)
    inputs, none = ArrayInputs(images, device), torch.empty(0)
    return Data(
        train=inputs,
        train_labels=labels,
        normalize=Normalize((0.5,) * 3, (0.25,) * 3, device),
        num_classes=sizes.num_classes,
        test=EvalSet(images=inputs, labels=labels, views=none, ids=none),
    )


def new_trainer(
    student: str,
    method: str,
    options: Mapping[str, Any],
    data: Data,
    sizes: Sizes,
    device: torch.device,
    **settings: Any,
) -> Trainer:
    """Return the trainer of a randomly initialised student; settings are as in `Distill`."""
    model = create_model(student, sizes.num_classes)
    task = Task(
        labels=data.train_labels.cpu(),
        student_dim=model.num_features,  # type: ignore[arg-type]
        teacher_dim=create_model(sizes.teacher, sizes.num_classes).num_features,  # type: ignore[arg-type]
        clip_dim=CLIP_WIDTH,
        alpha=0.7,
    )
    kind, resolved = method_class(method, options)
    rate = catalog.learning_rate(student)
    chosen = Distill(
        cache="bench",
        student=student,
        batch_size=sizes.batch_size,
        lr=rate,
        epochs=10**6,
        eval_every=10**6,
        **settings,
    )
    return Trainer(model, kind(resolved, task), data, chosen, device)


def endless(trainer: Trainer, source: EpochRows) -> Iterator[int]:
    """Yield the steps of epoch after epoch."""
    for epoch in count(1):
        yield from trainer.steps(epoch, source)


def some_steps(steps: Iterator[int], number: int) -> Callable[[], None]:
    """Return a function that runs the next `number` steps."""

    def measure() -> None:
        for _ in range(number):
            next(steps)

    return measure


def endless_batches(trainer: Trainer, views: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield index and images of batches forever, gathering each batch again."""
    order = torch.randperm(len(views))
    while True:
        for index, images, _ in trainer.batches(order, EpochRows(views, {})):
            yield index, images


def time_together(sizes: Sizes, device: torch.device, report: Report) -> dict[str, list[float]]:
    """Time a step of each of several small students, side by side and one after the other."""
    data = noise_data(sizes, device)
    n, c = sizes.num_samples, sizes.num_classes
    source = EpochRows(
        views_tensor(PadCropFlip().draw(0, n, 1))[0], {TARGET: torch.randn(n, c).half().to(device)}
    )
    step = "captured" if cuda(device) else "eager"
    rounds = sizes.steps if cuda(device) else 1  # on a CPU steps only alternate
    made = [new_trainer(name, "kd", {}, data, sizes, device, step=step) for name in SMALL_STUDENTS]
    steps = [endless(trainer, source) for trainer in made]

    def together() -> None:
        for _ in range(rounds):
            for each in steps:
                next(each)

    def apart() -> None:
        for each in steps:
            for _ in range(rounds):
                next(each)
            wait_for(device)

    times = paired({"eight together": together, "eight apart": apart}, sizes.rounds, device, report)
    return {name: [each / rounds for each in seconds] for name, seconds in times.items()}


# --- stage one -----------------------------------------------------------------------------------


def random_dataset(num_train: int, num_test: int, num_classes: int) -> Dataset:
    """Return a dataset of random bytes in CIFAR's shape."""
    rng = np.random.default_rng(0)
    train, test = (
        Split(
            torch.from_numpy(rng.integers(0, 256, (count, 32, 32, 3), np.uint8)),
            torch.arange(count) % num_classes,
        )
        for count in (num_train, num_test)
    )
    names = tuple(f"class {number}" for number in range(num_classes))
    return Dataset("shapes", names, train, test, (0.5,) * 3, (0.25,) * 3, 32)


def write_teachers(folder: Path, teacher: str, num_classes: int) -> tuple[Path, Path]:
    """Write a CNN teacher and a small CLIP of random weights to files."""
    weights, clip = folder / f"{teacher}.safetensors", folder / "clip"
    torch.manual_seed(0)
    save_tensors(weights, create_model(teacher, num_classes).state_dict())
    if not clip.exists():
        clip.mkdir()
        model: Any = open_clip.CLIP(**TINY_CLIP)
        config = {"model_cfg": TINY_CLIP, "preprocess_cfg": {}}
        (clip / "open_clip_config.json").write_text(json.dumps(config))
        save_tensors(clip / "open_clip_model.safetensors", model.state_dict())
    return weights, clip


def time_stage_one(
    sizes: Sizes, device: torch.device, report: Report, folder: Path
) -> dict[str, list[float]]:
    """Time all of `precompute` against the same forward passes alone."""
    views, batch_size = 2, 256
    dataset = random_dataset(sizes.stage_one, sizes.stage_one // 4, sizes.num_classes)
    weights, clip_folder = write_teachers(folder, sizes.teacher, sizes.num_classes)
    settings = Precompute(
        dataset="shapes",
        teacher=sizes.teacher,
        teacher_weights=str(weights),
        views=views,
        clip=str(clip_folder),
        prompts="single",
        batch_size=batch_size,
        device=str(device),
        out=str(folder / "stage-one.zarr"),
    )
    clip = load_clip(str(clip_folder), device)
    teacher: Any = create_model(sizes.teacher, sizes.num_classes).eval()
    teacher = teacher.to(device, memory_format=torch.channels_last)
    normalize = Normalize(dataset.mean, dataset.std, device)

    def everything(data: Dataset) -> None:
        precompute(settings, overwrite=True, dataset=data)

    @torch.inference_mode()
    def passes(data: Dataset) -> None:
        for split, times in ((data.train, views), (data.test, 1)):
            assert isinstance(split.images, Tensor)
            for batch in torch.split(split.images.to(device), batch_size):
                for _ in range(times):
                    forward(teacher, normalize(batch))
                clip.model.encode_image(clip.preprocess(batch))

    few = random_dataset(32, 16, sizes.num_classes)
    everything(few)
    passes(few)
    return paired(
        {"stage one": lambda: everything(dataset), "its forward passes": lambda: passes(dataset)},
        max(2, sizes.rounds // 3),
        device,
        report,
        warm=True,
    )


# --- slabs ---------------------------------------------------------------------------------------


def time_slabs(
    sizes: Sizes, device: torch.device, report: Report, folder: Path
) -> tuple[dict[str, list[float]], TeacherCache]:
    """Time epochs of RichKD L+F with slabs read from disk meanwhile, and with slabs in memory."""
    n, views = sizes.streamed, 4
    weights, clip = write_teachers(folder, "resnet8", sizes.num_classes)
    cache = precompute(
        Precompute(
            dataset="shapes",
            teacher="resnet8",
            teacher_weights=str(weights),
            clip=str(clip),
            views=views,
            device=str(device),
            prompts="single",
            out=str(folder / "slabs.zarr"),
        ),
        dataset=random_dataset(n, 64, sizes.num_classes),
    )
    settings = Distill(
        cache=cache.location.name,
        student=sizes.streaming_student,
        batch_size=sizes.batch_size,
        options={"richkd": {"negatives": min(sizes.negatives, n)}},
        epochs=10**6,
        eval_every=10**6,
        device=str(device),
        out=str(folder / "slabs"),
    )
    source = Source(settings, Report(quiet=True))
    run = StudentRun(source, settings)
    rounds = max(3, sizes.rounds // 3)
    kept, _ = next(source.epochs(run.rows.values(), 1, 1))
    slabs = source.epochs(run.rows.values(), 1, 2 * rounds + 10)
    waits: list[float] = []
    epoch = iter(range(1, 10**6))

    def train(rows: EpochRows) -> None:
        number = next(epoch)
        own = source.own(rows, run.rows, run.settings.seed, number)
        run.trainer.train_epoch(number, own)

    def streamed() -> None:
        rows, waited = next(slabs)
        waits.append(waited)
        train(rows)

    times = paired(
        {"epoch streamed": streamed, "epoch in memory": lambda: train(kept)},
        rounds,
        device,
        report,
    )
    slabs.close()  # type: ignore[attr-defined]
    return {**times, "slab wait": waits[1:]}, cache


# --- bytes ---------------------------------------------------------------------------------------


def store_bytes(cache: TeacherCache, report: Report) -> dict[str, dict[str, float]]:
    """Return bytes per (view, sample) by codec, relative to raw f16, and the KL error of decoding.

    The error is measured on the fused logits (without CLIP, the CNN teacher's) at τ = 1, against
    the stored ones; for caches with `--dtype float32` it includes rounding to f16. Logits of which
    the K largest are kept count as dense, except in the bytes "as stored".
    """
    names = [name for name in SLAB_ARRAYS if cache.has(f"train/{name}")]
    slab = cache.slab(0, names)
    arrays = {name: getattr(slab, name).numpy() for name in names}
    logits = "fused_logits" if "fused_logits" in arrays else "teacher_logits"
    raw = sum(2 * array[0].size for array in arrays.values())
    block = cache.manifest["block"]

    def bitshuffle(cname: str, level: int) -> BloscCodec:
        return BloscCodec(typesize=2, cname=cname, clevel=level, shuffle="bitshuffle")  # type: ignore[arg-type]

    codecs: dict[str, tuple[Any, int]] = {
        "raw f16": (None, 10),
        "lz4, bit shuffle": (bitshuffle("lz4", 5), 10),
        "zstd 3": (ZstdCodec(level=3), 10),
        "zstd 3, bit shuffle": (bitshuffle("zstd", 3), 10),
        "zstd 9, bit shuffle": (bitshuffle("zstd", 9), 10),
        **{
            f"zstd 3, bit shuffle, {bits} bits": (bitshuffle("zstd", 3), bits)
            for bits in (9, 8, 7, 6, 5)
        },
    }
    table: dict[str, dict[str, float]] = {}
    for name, (codec, bits) in codecs.items():
        stored, write, read = 0, 0.0, 0.0
        for key, array in arrays.items():
            values = round_bits(array.astype(np.float16), bits)
            target = zarr.create_array(
                MemoryStore(),
                shape=values.shape,
                dtype="float16",
                chunks=(min(block, len(values)), values.shape[1]),
                compressors=codec,
                config={"write_empty_chunks": True},
            )
            start = time.perf_counter()
            target[...] = values
            write += time.perf_counter() - start
            start = time.perf_counter()
            back = np.asarray(target[...])
            read += time.perf_counter() - start
            stored += target.nbytes_stored()
            if key == logits:
                error = kd_loss(torch.from_numpy(back), torch.from_numpy(array), 1.0).item()
        each = stored / len(array)
        table[name] = {
            "bytes": round(each, 1),
            "over_raw": round(each / raw, 4),
            "kl": error,
            "write_s": write,
            "read_s": read,
        }
    folders = [
        folder
        for name in (f"train/{name}" for name in names)
        for folder in (schema.part_names(name) if name in cache.kept else (name,))
    ]
    on_disk = sum(sum(cache.location.sizes(folder).values()) for folder in folders)
    each = on_disk / cache.num_views / cache.num_samples
    table["as stored"] = {"bytes": round(each, 1), "over_raw": round(each / raw, 4)}
    return table


# --- output --------------------------------------------------------------------------------------


def show(result: Mapping[str, Any], report: Report) -> None:
    """Print seconds, ratios and bytes as tables."""
    sizes = result["sizes"]
    steps = sizes["steps"]
    timed = [
        (
            name,
            f"{1000 * entry['median'] / (steps if 'step' in name or 'CRD' in name else 1):,.1f}",
            str(len(entry["rounds"])),
        )
        for name, entry in result["seconds"].items()
    ]
    report.table(
        f"{sizes['student']} student, {sizes['teacher']} teacher, batch {sizes['batch_size']}, "
        f"{result['hardware']}",
        ("", "ms, median", "rounds"),
        timed,
    )
    report.table(
        "",
        ("ratio", "median"),
        [(name, f"{value:.3f}") for name, value in result["ratios"].items()],
    )
    report.table(
        "bytes a (view, sample) of " + (result["cache"] or "random weights; see --cache"),
        ("codec", "bytes", "of raw f16", "KL error"),
        [
            (
                name,
                f"{entry['bytes']:,.0f}",
                f"{entry['over_raw']:.3f}",
                f"{entry['kl']:.1e}" if "kl" in entry else "",
            )
            for name, entry in result["bytes"].items()
        ],
    )
    report.log(f"{usable_cpus()} cores, {result['threads']} threads; took {result['took']:.0f} s")
