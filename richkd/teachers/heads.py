"""Heads for the dataset's classes on a teacher that was trained on others.

A probe is a linear head on the teacher's pooled features, fitted out of fold like CLIP's: K heads,
each on all folds of the training images but one. A training image's logits, in any view, come from
the head that did not see it; those of other images are the mean of the heads. The heads are in the
cache, so that resuming and repairing it give the same rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from richkd.core.errors import RichKDError
from richkd.core.progress import Report, percent
from richkd.data.datasets import Dataset
from richkd.store.location import Location
from richkd.store.reader import TeacherCache
from richkd.store.schema import PROBE_ARRAYS, HeadEntry
from richkd.teachers.kept import kept_arrays, known_manifest
from richkd.training.probe import apply_head, fit_probe

FOLDS = 5


@dataclass(frozen=True, eq=False)
class Probe:
    """K linear heads on pooled features, and the fold of every training image."""

    weights: Tensor  # [K,F+1,C] f32: the weights and, in the last row, the biases of each head
    folds: Tensor  # [N] u8: which head did not see the image
    penalty: float  # L2, of weights on standardised features
    accuracy: float  # of the training images, out of fold, in 0..1

    def logits(self, features: Tensor, index: Tensor | None) -> Tensor:
        """Return logits [B,C] of features [B,F].

        Args:
            features: of a batch of images.
            index: their positions among the training images [B]; None for other images.
        """
        if index is None:
            return apply_head(self._mean, features)
        # all heads on all images, so that a row does not depend on the folds of others in its batch
        each = torch.stack([apply_head(head, features) for head in self.weights])
        folds = self.folds[index.to(self.folds.device)].long()
        return each[folds, torch.arange(len(features), device=features.device)]

    @cached_property
    def _mean(self) -> Tensor:
        return self.weights.mean(0)

    def to(self, device: torch.device) -> Probe:
        """Return the same probe on a device."""
        weights, folds = self.weights.to(device), self.folds.to(device)
        return Probe(weights, folds, self.penalty, self.accuracy)

    @property
    def entry(self) -> HeadEntry:
        """The entry of the manifest."""
        return {
            "kind": "probe",
            "folds": len(self.weights),
            "penalty": self.penalty,
            "accuracy": self.accuracy,
        }

    @property
    def arrays(self) -> dict[str, NDArray[Any]]:
        """The arrays of a cache, by name."""
        values = self.weights.cpu().numpy(), self.folds.cpu().numpy()
        return dict(zip(PROBE_ARRAYS, values, strict=True))

    @classmethod
    def of(cls, entry: HeadEntry, weights: Tensor, folds: Tensor) -> Probe:
        """Restore from an entry and the arrays of a cache."""
        return cls(weights.float(), folds, entry["penalty"], entry["accuracy"])

    @classmethod
    def of_cache(cls, cache: TeacherCache) -> Probe | None:
        """Return the probe of a complete cache, or None if it has none."""
        entry = cache.manifest["teacher"].get("head")
        if entry is None or entry["kind"] != "probe":
            return None
        return cls.of(entry, *(cache.read(name) for name in PROBE_ARRAYS))


def fit(features: Tensor, dataset: Dataset, name: str, report: Report) -> Probe:
    """Fit a probe on the features of the training images, and log how good it is out of fold.

    Args:
        features: [N,F], of their evaluation views.
        dataset: the images.
        name: the teacher's name, for the log.
        report: where to log.
    """
    check_folds(dataset)
    classes = len(dataset.class_names)
    labels = dataset.train.labels.to(features.device)
    found = fit_probe(features, labels, features[:0], classes, FOLDS)
    accuracy = (found.train_logits.argmax(1) == labels).double().mean().item()
    report.log(
        f"a probe on {features.shape[1]:,} features of {name}: {percent(accuracy)} % of "
        f"{len(labels):,} training images, each by the heads that did not see it (chance "
        f"{percent(1 / classes)} %)"
    )
    if found.too_small:
        names = dataset.class_folders or dataset.class_names
        few = ", ".join(names[number] for number in found.too_small[:3])
        more = f" and {len(found.too_small) - 3} more" if len(found.too_small) > 3 else ""
        report.log(
            f"classes with fewer than {FOLDS} training images, which some heads hardly saw: "
            f"{few}{more}"
        )
    return Probe(found.heads.cpu(), found.fold.cpu().to(torch.uint8), found.penalty, accuracy)


def blank_probe(num_features: int, num_samples: int, num_classes: int) -> Probe:
    """Return a probe of random weights, as costly as a real one, for a plan."""
    weights = torch.randn(FOLDS, num_features + 1, num_classes)
    folds = torch.arange(num_samples) % FOLDS
    return Probe(weights / num_features, folds.to(torch.uint8), 1.0, 0.0)


def check_folds(dataset: Dataset) -> None:
    """Raise RichKDError if there are fewer training images than folds."""
    if len(dataset.train) < FOLDS:
        raise RichKDError(
            f"a probe of {FOLDS} folds needs at least {FOLDS} training images, but {dataset.name} "
            f"has {len(dataset.train)}; add images, or pass --teacher-head own",
            code="probe-too-few-samples",
        )


def kept(location: Location, manifest: Mapping[str, Any] | None, sha256: str) -> Probe | None:
    """Return the probe of a cache to resume or repair, or None if there is no intact one.

    Args:
        location: the cache.
        manifest: its manifest, if there is one.
        sha256: of the teacher's weights.
    """
    known = known_manifest(manifest)
    teacher = None if known is None else known.get("teacher")
    if known is None or teacher is None or teacher["sha256"] != sha256:
        return None
    entry = teacher.get("head")
    if entry is None or entry["kind"] != "probe":
        return None
    arrays = kept_arrays(location, known, PROBE_ARRAYS)
    return None if arrays is None else Probe.of(entry, *arrays)
