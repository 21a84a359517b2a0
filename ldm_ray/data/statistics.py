"""Mean and covariance of latents (N, D), and the whitening that follows from them."""

from __future__ import annotations

import torch
from torch import Tensor

SHRINKAGE = 1e-6  # of the mean variance: keeps a dead latent dimension from dividing by zero


class LatentStatistics:
    """Mean and covariance of raw latents, and the linear maps that follow from them.

    whitened = (raw − μ) W with W = Σ^(−1/2) symmetric (ZCA), so that each whitened number stays next to the
    raw one it came from; raw = whitened W⁻¹ + μ. All in float64. The identity statistics change nothing.
    """

    def __init__(self, mean: Tensor, covariance: Tensor) -> None:
        self.mean = mean.double().cpu()  #              (D,)
        self.covariance = covariance.double().cpu()  # (D, D)

    @classmethod
    def identity(cls, latent_dim: int) -> LatentStatistics:
        return cls(torch.zeros(latent_dim), torch.eye(latent_dim))

    @classmethod
    def of(cls, latents: Tensor) -> LatentStatistics:
        """Of raw latents (N, D)."""
        latents = latents.double()
        mean = latents.mean(dim=0)
        centred = latents - mean
        return cls(mean, centred.T @ centred / max(1, len(latents) - 1))

    def maps(self) -> tuple[Tensor, Tensor]:
        """(whitening, colouring): Σ^(−1/2) and Σ^(1/2), each (D, D) float64."""
        if torch.equal(self.covariance, torch.eye(len(self.mean), dtype=torch.float64)):
            return self.covariance, self.covariance
        values, vectors = torch.linalg.eigh(self.covariance)
        floor = SHRINKAGE * values.mean().clamp_min(1e-12)
        scale = values.clamp_min(floor).sqrt()
        return (vectors / scale) @ vectors.T, (vectors * scale) @ vectors.T
