"""Where to go in the whitened latent space: from one latent to another, along its axes, a plane through it.

Shapes: N latents, D numbers of each, S steps. Latents are whitened: mean 0 and covariance 1 over the training images.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def interpolate(start: Tensor, end: Tensor, count: int, method: str = "spherical") -> Tensor:
    """(S, D) float32 from ``start`` (D,) to ``end`` (D,), both ends among the S = ``count``.

    spherical: the angle grows evenly (Shoemake 1985), so that the path keeps the length that latents have and a
    straight one loses in the middle. Between ends in one line through the origin it is straight.
    """
    a, b = start.double(), end.double()
    steps = torch.linspace(0, 1, count, dtype=torch.float64)[:, None]
    if method == "spherical" and float(a.norm() * b.norm()) > 0:
        angle = torch.acos((a @ b / (a.norm() * b.norm())).clamp(-1, 1))
        if float(angle.sin()) > 1e-6:
            path = torch.sin((1 - steps) * angle) / angle.sin() * a + torch.sin(steps * angle) / angle.sin() * b
            return path.float()
    return ((1 - steps) * a + steps * b).float()


def traverse(latent: Tensor, axes: Sequence[int], values: Tensor) -> Tensor:
    """(A, S, D): for each of A ``axes`` the latent (D,) with that number set to each of the values (S,) in turn."""
    latents = latent.repeat(len(axes), len(values), 1)
    for row, axis in enumerate(axes):
        latents[row, :, axis] = values
    return latents


def plane(latents: np.ndarray, labels: Sequence[int | None]) -> tuple[np.ndarray, np.ndarray]:
    """(origin (D,), axes (2, D), orthonormal) of the plane that holds most of what tells the classes apart.

    latents (N, D) float64 with their labels. With fewer than three classes: most of what tells the latents apart.
    A point (x, y) of the plane is the latent ``origin + x·axes[0] + y·axes[1]``.
    """
    origin = np.median(latents, axis=0)  # a few latents may lie far out
    kinds = sorted({label for label in labels if label is not None})
    centres = [np.median(latents[[label == kind for label in labels]], axis=0) for kind in kinds]
    spread = np.stack(centres) - origin if len(kinds) > 2 else latents - origin
    axes = np.linalg.svd(spread, full_matrices=False)[2][:2]  # (2, D)
    axes *= np.where(axes[np.arange(len(axes)), np.abs(axes).argmax(axis=1)] < 0, -1.0, 1.0)[:, None]
    return origin, axes
