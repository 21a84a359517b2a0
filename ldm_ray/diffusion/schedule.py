"""The noise schedule (Ho et al., "Denoising Diffusion Probabilistic Models", arXiv:2006.11239).

Timesteps run from 0 (least noise) to T − 1. Everything is built in float64. B batch, D latent, T timesteps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ldm_ray.settings.diffusion import BETA_SCHEDULES
from ldm_ray.settings.errors import ConfigError

MAX_BETA = 0.999  # of squaredcos_cap_v2
MIN_BETA, MIN_ALPHA_CUMPROD = 1e-10, 1e-300  # what samplers can divide by


@dataclass(frozen=True)
class NoiseSchedule:
    """betas and alphas_cumprod (ᾱ) are (T,) float64.

    beta_schedule: ``linear``, β from beta_start to beta_end; ``scaled_linear``, √β linear between their roots
    (Rombach et al., arXiv:2112.10752); ``squaredcos_cap_v2``, ᾱ a squared cosine whatever beta_start and
    beta_end are (Nichol and Dhariwal, arXiv:2102.09672, eq. 17).
    """

    num_train_timesteps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 2e-2
    beta_schedule: str = "linear"

    def __post_init__(self) -> None:
        if self.beta_schedule not in BETA_SCHEDULES:
            known = ", ".join(BETA_SCHEDULES)
            raise ConfigError(f"a noise schedule has a beta_schedule of {known}, not {self.beta_schedule!r}")
        if not (0 < self.beta_start <= self.beta_end < 1 and self.num_train_timesteps >= 2):
            raise ConfigError(
                f"a noise schedule needs 0 < beta_start <= beta_end < 1 and T >= 2, not {self.beta_start}, "
                f"{self.beta_end}, T = {self.num_train_timesteps}"
            )
        alphas_cumprod = self.alphas_cumprod
        if not (float(self.betas.min()) >= MIN_BETA and float(alphas_cumprod[-1]) >= MIN_ALPHA_CUMPROD):
            raise ConfigError(
                f"a noise schedule needs every β at least {MIN_BETA:g} and something left of the image at its end, not "
                f"beta_start {self.beta_start:g}, beta_end {self.beta_end:g}, T = {self.num_train_timesteps}"
            )

    @property
    def betas(self) -> Tensor:
        steps, first, last = self.num_train_timesteps, self.beta_start, self.beta_end
        if self.beta_schedule == "linear":
            return torch.linspace(first, last, steps, dtype=torch.float64)
        if self.beta_schedule == "scaled_linear":
            return torch.linspace(first**0.5, last**0.5, steps, dtype=torch.float64) ** 2
        time = torch.arange(steps + 1, dtype=torch.float64) / steps  # (T + 1,)
        alphas_cumprod = ((time + 0.008) / 1.008 * math.pi / 2).cos() ** 2
        return (1 - alphas_cumprod[1:] / alphas_cumprod[:-1]).clamp_max(MAX_BETA)

    @property
    def alphas_cumprod(self) -> Tensor:
        return (1 - self.betas).cumprod(dim=0)

    def to_dict(self) -> dict[str, Any]:
        return {
            "beta_schedule": self.beta_schedule,
            "num_train_timesteps": self.num_train_timesteps,
            "beta_start": self.beta_start,
            "beta_end": self.beta_end,
        }


class Noiser:
    """The forward process on a device: xt = √ᾱ x0 + √(1 − ᾱ) ε (DDPM, eq. 4)."""

    def __init__(self, schedule: NoiseSchedule, device: torch.device | str = "cpu") -> None:
        alphas_cumprod = schedule.alphas_cumprod
        self.signal = alphas_cumprod.sqrt().float().to(device)  #    (T,) √ᾱ
        self.sigma = (1 - alphas_cumprod).sqrt().float().to(device)  # (T,) √(1 − ᾱ)

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x0, noise (B, D), t (B,) → xt (B, D)."""
        return torch.addcmul(self.signal[t][:, None] * x0, self.sigma[t][:, None], noise)

    def velocity(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x0, noise (B, D), t (B,) → v = √ᾱ ε − √(1 − ᾱ) x0 (B, D)."""
        return self.signal[t][:, None] * noise - self.sigma[t][:, None] * x0
