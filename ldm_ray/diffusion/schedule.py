"""The noise schedule (Ho et al., "Denoising Diffusion Probabilistic Models", arXiv:2006.11239).

Timesteps run from 0 (least noise) to T − 1. Everything is built in float64. B batch, D latent, T timesteps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ldm_ray.errors import ConfigError


@dataclass(frozen=True)
class NoiseSchedule:
    """Linear β from beta_start to beta_end; betas and alphas_cumprod (ᾱ) are (T,) float64."""

    num_train_timesteps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 2e-2

    def __post_init__(self) -> None:
        if not (0 < self.beta_start <= self.beta_end < 1 and self.num_train_timesteps >= 2):
            raise ConfigError(
                f"a noise schedule needs 0 < beta_start <= beta_end < 1 and T >= 2, not {self.beta_start}, "
                f"{self.beta_end}, T = {self.num_train_timesteps}"
            )

    @property
    def betas(self) -> Tensor:
        return torch.linspace(self.beta_start, self.beta_end, self.num_train_timesteps, dtype=torch.float64)

    @property
    def alphas_cumprod(self) -> Tensor:
        return (1 - self.betas).cumprod(dim=0)

    def to_dict(self) -> dict[str, Any]:
        return {
            "beta_schedule": "linear",
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
