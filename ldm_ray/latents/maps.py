"""Latents as points of a plane, and how well either keeps the classes apart.

Shapes: N points, D numbers of a latent.
"""

from __future__ import annotations

import numpy as np

from ldm_ray.settings.errors import ConfigError


def tsne(latents: np.ndarray, perplexity: float, seed: int) -> np.ndarray:
    """Latents (N, D) → points (N, 2) by t-SNE (van der Maaten and Hinton 2008) from their first two principal
    components. The same numbers every time on the same machine: one thread, since sums over several are added in
    any order. ConfigError: the perplexity is not below N, or the latents are all the same."""
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    if perplexity >= len(latents):
        raise ConfigError(f"--perplexity {perplexity:g} must be below the {len(latents)} points")
    if not np.ptp(latents, axis=0).max() > 0:
        raise ConfigError("all latents are the same: the autoencoder tells no images apart")
    wide = np.pad(latents, ((0, 0), (0, max(0, 2 - latents.shape[1]))))  # a latent of one number has one component
    with threadpool_limits(1):
        tsne = TSNE(2, perplexity=perplexity, init="random" if latents.shape[1] < 2 else "pca", random_state=seed)
        return tsne.fit_transform(wide)


def scores(points: np.ndarray, labels: np.ndarray) -> dict[str, float] | None:
    """How far apart the classes of points (N, ·) are; None unless there are two of them and fewer than points.

    silhouette: −1 to 1, 1 where every point is nearer to its own class than to any other (Rousseeuw 1987).
    calinski_harabasz: variance between classes over variance within them (Caliński and Harabasz 1974).
    """
    from sklearn.metrics import calinski_harabasz_score, silhouette_score

    if not 2 <= len(np.unique(labels)) < len(labels):
        return None
    return {
        "silhouette": float(silhouette_score(points, labels)),
        "calinski_harabasz": float(calinski_harabasz_score(points, labels)),
    }


def crowded(points: np.ndarray, cells: int) -> list[int]:
    """The points (N, 2) to show as images, the most crowded first: where a cell of a grid, ``cells`` along the longer
    side, holds more than its share of points, the one nearest to their mean, unless it is within a cell's size of one
    that is shown."""
    low, size = points.min(axis=0), max(float(np.ptp(points, axis=0).max()), 1e-12) / cells
    where = ((points - low) / size).astype(np.int64)
    _, cell, counts = np.unique(where, axis=0, return_inverse=True, return_counts=True)
    chosen: list[int] = []
    for key in np.argsort(-counts, kind="stable"):
        if counts[key] < max(2, counts.mean()):
            break
        rows = np.flatnonzero(cell.reshape(-1) == key)
        distance = np.square(points[rows] - points[rows].mean(axis=0)).sum(axis=1)
        row = int(rows[distance.argmin()])
        if all(np.abs(points[row] - points[other]).max() >= size for other in chosen):
            chosen.append(row)
    return chosen
