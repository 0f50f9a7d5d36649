"""Test images under 15 corruptions at five severities (Hendrycks and Dietterich, 2019).

The images are the published files of CIFAR-10-C and CIFAR-100-C, which hold the whole test split in
order, or made here by the library imagecorruptions. It uses ImageNet-C's severities, which
on images of 32 pixels are harsher than CIFAR-C's: results on the two are not comparable.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from richkd.core.errors import RichKDError
from richkd.core.seeds import derive_seed
from richkd.data.datasets import ImageFiles
from richkd.data.framing import Framing
from richkd.data.inputs import ArrayInputs, Batches
from richkd.data.views import CLEAN_VIEW_ID
from richkd.data.workers import load, num_workers
from richkd.training.loop import EVAL_BATCH

NAMES = (
    "gaussian_noise",
    "shot_noise",
    "impulse_noise",
    "defocus_blur",
    "glass_blur",
    "motion_blur",
    "zoom_blur",
    "snow",
    "frost",
    "fog",
    "brightness",
    "contrast",
    "elastic_transform",
    "pixelate",
    "jpeg_compression",
)
PUBLISHED = {"cifar10": "CIFAR-10-C", "cifar100": "CIFAR-100-C"}  # folders of the archives
SEVERITIES = 5
SMALLEST = 32  # pixels; imagecorruptions refuses smaller images

Cell = tuple[str, int, Batches]  # corruption, severity from 1, batches of images


class PublishedCorruptions:
    """A folder of NAME.npy [5·N,H,W,3] uint8, severity after severity, and labels.npy [5·N]."""

    def __init__(self, folder: Path, labels: Tensor, side: int) -> None:
        """Open the files of a folder.

        Args:
            folder: the unpacked archive.
            labels: labels [N] of the whole test split, in order.
            side: height and width of the images.

        Raises:
            RichKDError: a file is missing, has another shape, or other labels.
        """
        self.folder = folder
        self.about = f"the files in {folder}"
        count = SEVERITIES * len(labels)
        found = _array(folder / "labels.npy", (count,))
        if not np.array_equal(found, np.tile(labels.numpy(), SEVERITIES)):
            raise RichKDError(
                f"{folder / 'labels.npy'} differs from the labels of the test images, repeated "
                f"{SEVERITIES} times; pass the corruptions of this dataset, in its order",
                code="corruption-labels-differ",
            )
        shape = (count, side, side, 3)
        self.arrays = {name: _array(folder / f"{name}.npy", shape) for name in NAMES}

    def cells(self, tested: Tensor, device: torch.device) -> Iterator[Cell]:
        """Yield every corruption and severity of the samples `tested`."""
        for name, array in self.arrays.items():
            each = len(array) // SEVERITIES
            for severity in range(1, SEVERITIES + 1):
                part = np.array(array[(severity - 1) * each : severity * each])  # one read
                inputs = ArrayInputs(torch.from_numpy(part), device)
                clean = torch.full((each,), CLEAN_VIEW_ID)
                yield name, severity, inputs.batches(tested, clean, EVAL_BATCH)


def _array(path: Path, shape: tuple[int, ...]) -> Any:
    """Map a .npy file of this shape; pickled objects are refused."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise RichKDError(
            f"{path} is missing: CIFAR-10-C and CIFAR-100-C have one file per corruption "
            f"({len(NAMES)}) and labels.npy; complete the folder, or move it away to make "
            f"corruptions here",
            code="corruption-file-missing",
        ) from None
    except (OSError, ValueError, EOFError) as error:
        raise RichKDError(
            f"cannot read {path}: {error}; download it again", code="corruption-file-unreadable"
        ) from None
    if not isinstance(array, np.ndarray):
        raise RichKDError(
            f"cannot read {path}: it is an archive, not an array; download it again",
            code="corruption-file-unreadable",
        )
    if array.shape[:1] != shape[:1]:
        raise RichKDError(
            f"{path} has {array.shape[0] if array.ndim else 0:,} rows instead of {shape[0]:,}, "
            f"{SEVERITIES} severities of {shape[0] // SEVERITIES:,} test images; pass the "
            f"corruptions of this dataset",
            code="corruption-file-mismatch",
        )
    if array.shape != shape or (len(shape) > 1 and array.dtype != np.uint8):
        raise RichKDError(
            f"{path} is {array.dtype} {array.shape} instead of uint8 {shape}; pass the corruptions "
            f"of this dataset",
            code="corruption-file-mismatch",
        )
    return array


class MadeCorruptions:
    """Corruptions made by data-loader workers; seed and sample determine every byte."""

    def __init__(
        self,
        images: Tensor | ImageFiles,
        seed: int,
        *,
        names: Sequence[str] = NAMES,
        workers: int | None = None,
    ) -> None:
        """Prepare to corrupt images.

        Args:
            images: the whole test split.
            seed: seed of the noise.
            names: the corruptions to make.
            workers: processes of the data loader; by default as many as the work needs.

        Raises:
            RichKDError: imagecorruptions is not installed, or the images are too small for it.
        """
        try:
            import imagecorruptions
        except ImportError as error:
            remedy = (
                "install Debian's libgl1, or opencv-python-headless in place of opencv-python"
                if "libGL" in str(error)
                else "pip install 'richkd[corruptions]'"
            )
            raise RichKDError(
                f"making corrupted images needs imagecorruptions ({error}); {remedy}, or pass the "
                f"published files with --corruption-files",
                code="extra-missing",
            ) from None
        side = images.image_size if isinstance(images, ImageFiles) else min(images.shape[1:3])
        if side < SMALLEST:
            raise RichKDError(
                f"the test images have {side} pixels and imagecorruptions needs at least "
                f"{SMALLEST}; pass corrupted images with --corruption-files",
                code="corruption-images-too-small",
            )
        self.images = images
        self.image_bytes = 3 * side**2 if isinstance(images, ImageFiles) else images[0].nbytes
        self.seed = seed
        self.names = names
        self.workers = workers
        self.about = f"made by imagecorruptions, severities of ImageNet-C, seed {seed}"
        # compiles the inner loop of glass_blur once, before workers start
        imagecorruptions.corrupt(np.zeros((SMALLEST, SMALLEST, 3), np.uint8), 1, "glass_blur")

    def cells(self, tested: Tensor, device: torch.device) -> Iterator[Cell]:
        """Yield every corruption and severity of the samples `tested`."""
        chunks = torch.split(tested.cpu(), EVAL_BATCH)
        order = [(name, s) for name in self.names for s in range(1, SEVERITIES + 1)]
        keys = ([(*cell, int(sample)) for sample in chunk] for cell in order for chunk in chunks)
        workers = self.workers
        if workers is None:
            workers = num_workers(len(order) * len(tested), EVAL_BATCH)
        batches = load(
            _Corrupted(self.images, self.seed),
            keys,
            workers,
            EVAL_BATCH * self.image_bytes,
            pin_memory=device.type == "cuda",
        )
        for name, severity in order:
            yield (
                name,
                severity,
                (
                    (index.to(device), images.to(device))
                    for index, images in islice(batches, len(chunks))
                ),
            )


class _Corrupted(TorchDataset[tuple[int, Tensor]]):
    def __init__(self, images: Tensor | ImageFiles, seed: int) -> None:
        self.images = images
        self.seed = seed

    def __getitem__(self, at: tuple[str, int, int]) -> tuple[int, Tensor]:
        name, severity, sample = at
        seed = derive_seed(self.seed, NAMES.index(name), severity, sample)
        return sample, torch.from_numpy(corrupt(self._clean(sample), name, severity, seed))

    def _clean(self, sample: int) -> np.ndarray[Any, Any]:
        if not isinstance(self.images, ImageFiles):
            return self.images[sample].numpy()
        framing = Framing(size=self.images.image_size)
        return framing.clean(self.images.photograph(sample))[0].numpy()


def corrupt(
    image: np.ndarray[Any, Any], name: str, severity: int, seed: int
) -> np.ndarray[Any, Any]:
    """Corrupt an image [H,W,3] uint8; the same seed gives the same bytes."""
    import imagecorruptions

    seed %= 2**32
    before = np.random.get_state()
    np.random.seed(seed)  # the library draws from numpy's own stream
    parameters = inspect.signature(imagecorruptions.corruption_dict[name]).parameters
    own_stream = {"seed": seed} if "seed" in parameters else {}  # of two corruptions
    corrupted = np.array(imagecorruptions.corrupt(image, severity, name, **own_stream))
    np.random.set_state(before)
    return corrupted


Corruptions = PublishedCorruptions | MadeCorruptions


def relative_errors(
    wrong: Mapping[str, Sequence[int]],
    clean: int,
    base: Mapping[str, Sequence[int]],
    base_clean: int,
) -> tuple[float | None, float | None]:
    """Compare the robustness of two models (Hendrycks and Dietterich, 2019, section 4).

    Args:
        wrong: number of mistakes by corruption and severity.
        clean: number of mistakes on the clean images.
        base: mistakes of the other model, on the same images.
        base_clean: mistakes of the other model on the clean images.

    Returns:
        The mean corruption error: mistakes over all severities divided by the other model's,
        averaged over corruptions; and the relative one, of the mistakes that corruptions add to
        those on clean images. Either is None if it would divide by 0 for one of the corruptions.
    """
    ratios, relative = [], []
    for name, each in wrong.items():
        count, other = sum(each), sum(base[name])
        added, others = count - len(each) * clean, other - len(each) * base_clean
        ratios.append(count / other if other else None)
        relative.append(added / others if others > 0 else None)
    return _mean(ratios), _mean(relative)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if len(known) == len(values) else None
