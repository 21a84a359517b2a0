"""Fréchet distance between two sets of features (Heusel et al., arXiv:1706.08500, eq. 6), in float64.

Shapes: N images, F features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ldm_ray.settings.errors import DataError


class FeatureStatistics:
    """Count, mean and covariance of features that come in batches of any size; no feature is kept.

    Batches are joined by the exact update of Chan, Golub and LeVeque (1983, eq. 2.1), so that the order and
    the sizes of the batches change the result by rounding alone.
    """

    def __init__(self, dim: int) -> None:
        self.count = 0
        self.mean = torch.zeros(dim, dtype=torch.float64)  #         (F,)
        self.scatter = torch.zeros(dim, dim, dtype=torch.float64)  # (F, F), sum of (x − mean)(x − mean)ᵀ

    @classmethod
    def of(cls, features: Tensor) -> FeatureStatistics:
        """Of features (N, F) at once."""
        statistics = cls(features.shape[1])
        statistics.update(features)
        return statistics

    def update(self, features: Tensor) -> None:
        """Takes in features (n, F). DataError when one of them is not finite."""
        features = features.detach().double().cpu()
        if not bool(torch.isfinite(features).all()):
            raise DataError("features are not finite: the images cannot be measured")
        if not len(features):
            return
        mean = features.mean(dim=0)
        centred = features - mean
        total, shift = self.count + len(features), mean - self.mean
        self.scatter += centred.T @ centred + torch.outer(shift, shift) * (self.count * len(features) / total)
        self.mean += shift * (len(features) / total)
        self.count = total

    @property
    def covariance(self) -> Tensor:
        """(F, F), unbiased; zero for a single image."""
        return self.scatter / max(1, self.count - 1)


def frechet_distance(one: FeatureStatistics, other: FeatureStatistics) -> float:
    """‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2 (Σ₁Σ₂)^½), at least 0.

    tr (Σ₁Σ₂)^½ is the sum of the singular values of Σ₁^½ Σ₂^½ with symmetric roots from eigendecompositions.
    Nothing here needs Σ₁Σ₂ to be invertible or of full rank, so few images or dead features are no trouble.
    DataError when a side has no image or the sides have different features.
    """
    if not one.count or not other.count or one.mean.shape != other.mean.shape:
        raise DataError(
            f"no Fréchet distance between {one.count} images of {len(one.mean)} features and {other.count} of "
            f"{len(other.mean)}: needed are images on both sides, with the same features"
        )
    shift = (one.mean - other.mean).square().sum()
    cross = torch.linalg.svdvals(symmetric_root(one.covariance) @ symmetric_root(other.covariance)).sum()
    return max(0.0, float(shift + one.covariance.trace() + other.covariance.trace() - 2 * cross))


def symmetric_root(matrix: Tensor) -> Tensor:
    """The symmetric S with S S = matrix (F, F) float64, symmetric and, up to rounding, not negative."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T
