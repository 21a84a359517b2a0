"""Sheets of latents, a row of pictures each: from ends to ends, along single numbers, over a plane.

Shapes: R rows, S columns, D numbers of a latent.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ldm_ray.engine.generator import Generator
from ldm_ray.latents.paths import interpolate, plane, traverse
from ldm_ray.settings.errors import ConfigError
from ldm_ray.settings.limits import MAX_SEED
from ldm_ray.settings.sampling import SamplingConfig

PLANE_POINTS = 256  # latents that a plane goes by
INNER = 0.02, 0.98  # share of them that its sheet shows, in each direction

End = tuple[int, int | None]  # seed and label


def ends_of(seeds: Sequence[int], labels: Sequence[int | None]) -> list[End]:
    """Seeds and labels paired; the shorter list starts again until the longer one ends."""
    return [(seeds[i % len(seeds)], labels[i % len(labels)]) for i in range(max(len(seeds), len(labels)))]


def between(generator: Generator, ends: Sequence[End], columns: int, method: str, sampling: SamplingConfig) -> Tensor:
    """(R, S, D): a row from each end to the next. ConfigError with fewer than two ends."""
    if len(ends) < 2:
        raise ConfigError("an interpolation needs two ends: name two --seeds or two --digits")
    latents = generator.latents([seed for seed, _ in ends], [label for _, label in ends], sampling).cpu()
    return torch.stack([interpolate(a, b, columns, method) for a, b in itertools.pairwise(latents)])


def along(generator: Generator, end: End, columns: int, span: float, rows: int, sampling: SamplingConfig) -> Tensor:
    """(R, S, D): a row for each of the first numbers of the latent, from −span to span; whitened, so in deviations."""
    latent = generator.latents([end[0]], [end[1]], sampling).cpu()[0]
    return traverse(latent, range(min(rows, len(latent))), torch.linspace(-span, span, columns))


def over_plane(
    generator: Generator, first_seed: int, labels: Sequence[int | None], columns: int, sampling: SamplingConfig
) -> tuple[Tensor, list[float], list[float]]:
    """((S, S, D), the S places of the columns and of the rows): a grid over the plane that tells these classes apart,
    where most of their latents are; the first axis to the right, the second upwards. ConfigError: latents of one
    number."""
    if generator.codec.latent_dim < 2:
        raise ConfigError("a plane needs latents of at least 2 numbers")
    if first_seed + PLANE_POINTS - 1 > MAX_SEED:
        raise ConfigError(f"--seeds {first_seed}: a plane goes by {PLANE_POINTS} seeds from it, the last is {MAX_SEED}")
    each = [labels[i % len(labels)] for i in range(PLANE_POINTS)]
    latents = generator.latents(range(first_seed, first_seed + PLANE_POINTS), each, sampling).cpu().double().numpy()
    origin, axes = plane(latents, each)
    low, high = np.quantile((latents - origin) @ axes.T, INNER, axis=0)
    right, up = np.linspace(low, high, columns).T
    lattice = torch.from_numpy(origin + up[::-1, None, None] * axes[1] + right[None, :, None] * axes[0]).float()
    return lattice, right.tolist(), up[::-1].tolist()
