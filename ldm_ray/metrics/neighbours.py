"""Figures from nearest neighbours: precision, recall, density, coverage, and closeness to the training images.

Distances are Euclidean, computed in blocks of rows: memory is that of one block against the other side, however
many images there are. Shapes: N real, M samples (or rows and others), F features.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ldm_ray.settings.errors import DataError

BLOCK = 2**22  # distances at a time: 32 MB in float64
PRECISION_K, DENSITY_K = 3, 5  # as the papers have them


def distance_blocks(rows: Tensor, others: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """(slice of rows, squared distances (rows of the slice, others)), block by block, in the rows' dtype."""
    size = max(1, BLOCK // max(1, len(others)))
    norms = others.square().sum(dim=1)
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        squared = torch.addmm(norms[None], part, others.T, alpha=-2).add_(part.square().sum(dim=1, keepdim=True))
        yield slice(start, start + len(part)), squared.clamp_min_(0)


def radii(features: Tensor, ks: tuple[int, ...] = (PRECISION_K, DENSITY_K)) -> Tensor:
    """Squared distance of each of (N, F) to its k-th nearest other, for each k: (len(ks), N).

    DataError when there are not more than the largest k.
    """
    most = max(ks)
    if len(features) <= most:
        raise DataError(f"{len(features)} images are too few for {most} nearest others of each: at least {most + 1}")
    squares = torch.empty(len(ks), len(features), dtype=features.dtype, device=features.device)
    for rows, squared in distance_blocks(features, features):
        own = torch.arange(rows.start, rows.stop, device=features.device)
        squared[own - rows.start, own] = torch.inf  # not its own neighbour
        nearest = squared.topk(most, dim=1, largest=False).values  # (rows, most), ascending
        squares[:, rows] = torch.stack([nearest[:, k - 1] for k in ks])
    return squares


def neighbour_figures(real: Tensor, samples: Tensor, real_radii: Tensor | None = None) -> dict[str, float]:
    """precision, recall (k = 3), density and coverage (k = 5) of samples (M, F) against real (N, F), both float64.

    With B_k(x) the closed ball around x to its k-th nearest other of its own side:

    - precision: share of samples in the union of B₃ of real; recall: share of real in the union of B₃ of samples
      (Kynkäänniemi et al., arXiv:1904.06991, eq. 1–2);
    - density: mean over samples of the number of B₅ of real that it lies in, over 5; may exceed 1;
    - coverage: share of real whose B₅ holds a sample (Naeem et al., arXiv:2002.09797, eq. 3–4).

    real_radii: ``radii(real)`` where it is known. DataError with fewer than 6 images on a side.
    """
    real_radii = radii(real) if real_radii is None else real_radii
    (sample_radius,) = radii(samples, (PRECISION_K,))
    precise, dense, recalled, covered = 0, 0, 0, torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for _, squared in distance_blocks(samples, real):  # sample rows against all real
        precise += int((squared <= real_radii[0]).any(dim=1).sum())
        inside = squared <= real_radii[1]
        dense += int(inside.sum())
        covered |= inside.any(dim=0)
    for _, squared in distance_blocks(real, samples):
        recalled += int((squared <= sample_radius).any(dim=1).sum())
    return {
        "precision": precise / len(samples),
        "recall": recalled / len(real),
        "density": dense / (DENSITY_K * len(samples)),
        "coverage": float(covered.double().mean()),
    }


def nearest(images: Tensor, among: Tensor) -> tuple[Tensor, Tensor]:
    """For each image its nearest among others, pixel by pixel: (distance (B,) float64, row (B,) int64), on the CPU.

    images (B, …) and among (N, …) uint8; the distance is that of pixels in [0, 1]. The row is found in
    float32, where images at distances closer than about 0.01 to each other may be taken for one another; its
    distance is then computed exactly.
    """
    others = among.flatten(1).float()
    rows = []
    for chunk in images.flatten(1).split(1000):
        for _, squared in distance_blocks(chunk.float(), others):
            rows.append(squared.argmin(dim=1))
    neighbours = torch.cat(rows)
    difference = images.flatten(1).float() - others[neighbours]
    return (difference.double().square().sum(dim=1).sqrt() / 255).cpu(), neighbours.cpu()
