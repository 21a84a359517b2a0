"""Samplers: free functions over ``denoise(latents, t, labels)`` and a list of transitions.

They know no model, no device policy, no Ray, no image. A transition (t, t_prev) goes from timestep t to the
less noisy t_prev; ``None`` is the end, where ᾱ = 1. B batch, D latent, S steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ldm_ray.diffusion.schedule import NoiseSchedule, x0_from_epsilon

Transition = tuple[int, int | None]
Denoise = Callable[[Tensor, Tensor, Tensor], Tensor]


def all_transitions(num_train_timesteps: int) -> list[Transition]:
    """Every timestep, from T − 1 down to the end."""
    return [(t, t - 1 if t else None) for t in range(num_train_timesteps - 1, -1, -1)]


def ddpm_coefficients(alphas_cumprod: Tensor, transition: Transition) -> tuple[float, float, float, float]:
    """(ᾱ_t, weight of x0, weight of xt, σ) of q(x_prev | xt, x0) (DDPM, eq. 6–7), for steps of any length.

    With ᾱ_prev = 1 at the end, β = 1 − ᾱ_t/ᾱ_prev and α = 1 − β: mean = √ᾱ_prev β/(1 − ᾱ_t) x0 +
    √α (1 − ᾱ_prev)/(1 − ᾱ_t) xt, σ² = β (1 − ᾱ_prev)/(1 − ᾱ_t).
    """
    t, t_prev = transition
    now = float(alphas_cumprod[t])
    prev = 1.0 if t_prev is None else float(alphas_cumprod[t_prev])
    beta = 1 - now / prev
    weight_x0 = prev**0.5 * beta / (1 - now)
    weight_xt = (1 - beta) ** 0.5 * (1 - prev) / (1 - now)
    return now, weight_x0, weight_xt, (beta * (1 - prev) / (1 - now)) ** 0.5


def ddpm(
    denoise: Denoise,
    schedule: NoiseSchedule,
    latents: Tensor,
    labels: Tensor,
    transitions: Sequence[Transition],
    noise: Callable[[], Tensor],
) -> Iterator[tuple[Tensor, Tensor]]:
    """Ancestral sampling (DDPM, algorithm 2).

    latents (B, D) start as unit Gaussian noise; ``noise()`` gives (B, D) more of it per step. Yields
    (latents after the step, x0 predicted in it); the last latents are the samples. Stop iterating to cancel.
    """
    alphas_cumprod = schedule.alphas_cumprod
    steps = [(t, ddpm_coefficients(alphas_cumprod, (t, t_prev))) for t, t_prev in transitions]
    timesteps = torch.tensor([t for t, _ in steps], device=latents.device)
    for i, (_, (now, weight_x0, weight_xt, sigma)) in enumerate(steps):
        eps_pred = denoise(latents, timesteps[i].expand(len(latents)), labels)
        x0_pred = x0_from_epsilon(latents, eps_pred, now)
        latents = weight_x0 * x0_pred + weight_xt * latents
        if sigma > 0:
            latents = latents + sigma * noise()
        yield latents, x0_pred
