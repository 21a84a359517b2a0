"""Fréchet distance in whitened latent space, class by class: an objective that noise schedules share.

The training loss of another schedule is another question; the distribution of the samples is not. One Gaussian
over all classes is near N(0, I) by whitening alone, so a model that ignores the label would look good; within a
class it is not. N, M rows, D latent.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ldm_ray.metrics.frechet import FeatureStatistics, frechet_distance
from ldm_ray.settings.errors import DataError


class ClassFrechet:
    """Mean over classes of the Fréchet distance between samples and held-out latents of the class.

    held (N, D) whitened, labels (N,). ``classes`` are those compared. Where one of them has too few rows for a
    covariance of full rank (fewer than D + 1), all are compared as one, and ``pooled`` is True. DataError with
    fewer than 2 rows.
    """

    def __init__(self, held: Tensor, labels: Tensor) -> None:
        if len(held) < 2:
            raise DataError(f"{len(held)} held-out image is too few to compare samples with: raise --val-fraction")
        found, counts = labels.unique(return_counts=True)
        self.classes: list[int] = found.tolist()
        self.pooled = len(found) > 1 and int(counts.min()) <= held.shape[1]
        self.references = {key: FeatureStatistics.of(rows) for key, rows in self.groups(held, labels).items()}

    def groups(self, rows: Tensor, labels: Tensor) -> dict[int, Tensor]:
        """The rows of each class, or all of them under −1 where classes are pooled."""
        if self.pooled or len(self.classes) == 1:
            return {-1: rows}
        return {label: rows[labels == label] for label in self.classes}

    def balanced_labels(self, count: int) -> Tensor:
        """(count,) int64: the classes in turn, as equally often as count allows."""
        return torch.tensor(self.classes).repeat(-(-count // len(self.classes)))[:count]

    def __call__(self, samples: Tensor, labels: Tensor) -> float:
        """Of samples (M, D) made for labels (M,), at least 2 of each class; infinite where a sample is not finite."""
        if not bool(torch.isfinite(samples).all()):
            return math.inf
        groups = self.groups(samples.cpu(), labels.cpu())
        distances = [frechet_distance(self.references[key], FeatureStatistics.of(rows)) for key, rows in groups.items()]
        return sum(distances) / len(distances)
