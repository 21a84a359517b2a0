"""Gaussian mixtures with full covariances, fitted by expectation and maximisation (Dempster, Laird and Rubin 1977).

A step is two matrix products: with x expanded to its products x_i·x_j (i ≤ j), x and 1, the log density of a component
is linear in it, and so are the sums that mean and covariance are made of. N rows, D numbers of each, K components,
F = D(D + 1)/2 + D + 1 numbers of an expanded row.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

MOST_STEPS, TOLERANCE = 200, 1e-3  # the fit ends where a step gains less in the mean log likelihood
START_ROWS = 10_000  # of the rows, for the k-means that a fit starts from
SMALLEST = 1e-4  # variance of a component in any direction
BLOCK = 2**24  # numbers of expanded rows at a time


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """weights (K,), means (K, D), covariances by their eigenvalues (K, D) and eigenvectors (K, D, D); float64, CPU.

    likelihood: the mean log likelihood of the rows before the last step.
    """

    weights: Tensor
    means: Tensor
    values: Tensor
    vectors: Tensor
    likelihood: float = -math.inf

    @property
    def covariances(self) -> Tensor:
        """(K, D, D)"""
        return (self.vectors * self.values[:, None]) @ self.vectors.mT

    def sample(self, count: int, seed: int) -> Tensor:
        """(count, D) float32 that follow from the seed."""
        random = torch.Generator().manual_seed(seed)
        which = torch.multinomial(self.weights, count, replacement=True, generator=random)
        noise = torch.randn(count, self.means.shape[1], generator=random, dtype=torch.float64)
        scaled = noise * self.values[which].sqrt()
        drawn = torch.empty_like(scaled)
        for k in which.unique().tolist():
            rows = which == k
            drawn[rows] = self.means[k] + scaled[rows] @ self.vectors[k].mT
        return drawn.float()


def fit(rows: Tensor, components: int, seed: int, step: Callable[[], None] = lambda: None) -> Mixture:
    """The mixture of so many components (at most N) for rows (N, D) float32, best of about unit variance, on any
    device; the same every time on one machine. ``step`` is called after each of at most MOST_STEPS steps."""
    mixture = of_sums(start(rows, components, seed), rows.shape[1])
    for _ in range(MOST_STEPS):
        sums, likelihood = pass_over(rows, mixture)
        gained = likelihood - mixture.likelihood
        mixture = of_sums(sums, rows.shape[1], likelihood)
        step()
        if gained < TOLERANCE or components == 1:
            break
    return mixture


def start(rows: Tensor, components: int, seed: int) -> Tensor:
    """Sums (K, F) with each row given to its nearest centre by k-means over some of the rows."""
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    some = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:START_ROWS].to(rows.device)
    with threadpool_limits(1):  # sums over several threads are added in any order
        centres = KMeans(components, n_init=1, max_iter=20, random_state=seed).fit(rows[some].cpu().numpy())
    means = torch.from_numpy(centres.cluster_centers_).to(rows)
    sums: Tensor | float = 0.0
    for part in blocks(rows):
        near = torch.cdist(part, means).argmin(dim=1)
        shares = torch.nn.functional.one_hot(near, components).to(part.dtype)
        sums = sums + (shares.T @ expanded(part)).double().cpu()
    assert isinstance(sums, Tensor)
    return sums


def pass_over(rows: Tensor, mixture: Mixture) -> tuple[Tensor, float]:
    """(sums (K, F) of the expanded rows by each component's share in them, mean log likelihood)."""
    linear = coefficients(mixture).to(rows)
    sums: Tensor | float = 0.0
    total = 0.0
    for part in blocks(rows):
        wide = expanded(part)
        logits = wide @ linear.T  # (n, K)
        norm = torch.logsumexp(logits, dim=1, keepdim=True)
        sums = sums + ((logits - norm).exp_().T @ wide).double().cpu()
        total += float(norm.cpu().double().sum())
    assert isinstance(sums, Tensor)
    return sums, total / len(rows)


def blocks(rows: Tensor) -> tuple[Tensor, ...]:
    return rows.split(max(1, BLOCK // (rows.shape[1] + 2) ** 2))


def expanded(rows: Tensor) -> Tensor:
    """(n, D) → (n, F)"""
    first, second = pairs(rows.shape[1], rows.device)
    return torch.cat([rows[:, first] * rows[:, second], rows, torch.ones_like(rows[:, :1])], dim=1)


def pairs(dim: int, device: torch.device | None = None) -> Tensor:
    return torch.triu_indices(dim, dim, device=device)


def of_sums(sums: Tensor, dim: int, likelihood: float = -math.inf) -> Mixture:
    """The mixture that fits sums (K, F) best."""
    counts = sums[:, -1].clamp_min(1e-9)
    means = sums[:, -1 - dim : -1] / counts[:, None]
    first, second = pairs(dim)
    squares = torch.zeros(len(sums), dim, dim, dtype=torch.float64)
    squares[:, first, second] = squares[:, second, first] = sums[:, : -1 - dim] / counts[:, None]
    values, vectors = torch.linalg.eigh(squares - means[:, :, None] * means[:, None])
    return Mixture(
        weights=counts / counts.sum(),
        means=means,
        values=values.clamp_min(SMALLEST),
        vectors=vectors,
        likelihood=likelihood,
    )


def coefficients(mixture: Mixture) -> Tensor:
    """(K, F): the log of weight times density of each component, as a linear function of an expanded row."""
    dim = mixture.means.shape[1]
    precisions = (mixture.vectors / mixture.values[:, None]) @ mixture.vectors.mT
    slopes = (precisions @ mixture.means[:, :, None])[:, :, 0]
    constant = mixture.weights.log() - 0.5 * (
        dim * math.log(2 * math.pi) + mixture.values.log().sum(dim=1) + (mixture.means * slopes).sum(dim=1)
    )
    first, second = pairs(dim)
    squares = precisions[:, first, second] * torch.where(first == second, -0.5, -1.0)
    return torch.cat([squares, slopes, constant[:, None]], dim=1)
