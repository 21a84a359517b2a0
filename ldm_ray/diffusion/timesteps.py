"""Which timesteps a sampler visits, and the transitions between them. T timesteps, S steps.

A transition (t, t_prev) goes from timestep t to the less noisy t_prev; ``None`` is the end, where ᾱ = 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ldm_ray.diffusion.schedule import NoiseSchedule
from ldm_ray.settings.errors import ConfigError
from ldm_ray.settings.sampling import SPACINGS

KARRAS_RHO = 7.0
Transition = tuple[int, int | None]


def spaced_timesteps(schedule: NoiseSchedule, num_inference_steps: int, spacing: str) -> list[int]:
    """S different timesteps, falling. ConfigError: S outside 1 to T, an unknown spacing.

    ``leading``, ``trailing`` and ``linspace`` are those of Lin et al. (arXiv:2305.08891, table 2); ``logsnr``
    is even in λ = log(α/σ) (Lu et al., arXiv:2206.00927, section 4.1) and ``karras`` in σ^(1/7) with
    σ = √((1 − ᾱ)/ᾱ) (Karras et al., arXiv:2206.00364, eq. 5), both from T − 1 to 0, to the nearest timestep.
    """
    total, steps = schedule.num_train_timesteps, num_inference_steps
    if not 1 <= steps <= total:
        raise ConfigError(f"{steps} inference steps: this model has {total} timesteps, so 1 to {total}")
    if spacing == "leading":
        return [i * (total // steps) for i in reversed(range(steps))]
    if spacing == "trailing":
        return [round(total - i * total / steps) - 1 for i in range(steps)]
    if spacing == "linspace":
        return apart(torch.linspace(total - 1, 0, steps, dtype=torch.float64).round(), total)
    alphas_cumprod = schedule.alphas_cumprod
    sigmas = ((1 - alphas_cumprod) / alphas_cumprod).sqrt()  # (T,) rising
    if spacing == "logsnr":
        ramp = sigmas.log()
    elif spacing == "karras":
        ramp = sigmas ** (1 / KARRAS_RHO)
    else:
        raise ConfigError(f"timestep spacing {spacing!r} is unknown; known are {', '.join(SPACINGS)}")
    wanted = torch.linspace(float(ramp[-1]), float(ramp[0]), steps, dtype=torch.float64)
    return apart((ramp[None] - wanted[:, None]).abs().argmin(dim=1), total)


def apart(timesteps: Tensor, total: int) -> list[int]:
    """Falling timesteps made strictly falling within 0 to T − 1, each moved as little as that takes."""
    falling = [int(t) for t in timesteps]
    for i in range(1, len(falling)):
        falling[i] = min(falling[i], falling[i - 1] - 1)
    for left, i in enumerate(reversed(range(len(falling)))):
        falling[i] = max(falling[i], left)
    assert falling[0] < total
    return falling


def transitions_of(timesteps: Sequence[int]) -> list[Transition]:
    """From each timestep to the next, and from the last to the end."""
    return list(zip(timesteps, [*timesteps[1:], None], strict=True))
