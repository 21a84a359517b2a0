"""Samplers: free functions from a schedule and a list of transitions to a plan, and the loop that follows it.

Every sampler here is linear in what it knows: the latents xt, the predicted x0, those predicted one and two steps
before, and fresh noise. So a plan is a table of numbers, one row per step, and one loop runs all samplers;
images at different steps of different plans can share a batch. No model, device policy, Ray or image is
known here. B batch, D latent, S steps.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from torch import Tensor

from ldm_ray.devices.device import sent
from ldm_ray.diffusion.prediction import x0_weights
from ldm_ray.diffusion.schedule import NoiseSchedule
from ldm_ray.diffusion.timesteps import Transition, spaced_timesteps, transitions_of
from ldm_ray.settings.sampling import DEFAULT_STEPS, SamplingConfig

Denoise = Callable[[Tensor, Tensor, Tensor], Tensor]
Noise = Callable[[int], Tensor]
DEFAULT_SPACING = "trailing"  # chosen with the steps by measurement: docs/sampling.md
PLANS_KEPT = 256


@dataclass(frozen=True)
class Step:
    """x0 = x0_from_xt·xt + x0_from_output·output; next = keep·xt + x0·x0 + before·(x0 a step ago) + earlier·(x0 two
    steps ago) + sigma·noise.

    In a plan all are numbers. For images at different steps t is a row (B,) int64 and the weights are columns (B, 1)
    float32, which give the bits of the numbers.
    """

    t: int | Tensor
    x0_from_xt: float | Tensor
    x0_from_output: float | Tensor
    keep: float | Tensor
    x0: float | Tensor
    before: float | Tensor = 0.0
    earlier: float | Tensor = 0.0
    sigma: float | Tensor = 0.0
    guided: bool = True  # where there is guidance


Plan = tuple[Step, ...]
WEIGHTS = ("x0_from_xt", "x0_from_output", "keep", "x0", "before", "earlier", "sigma")  # the fields that are floats


def ddpm(schedule: NoiseSchedule, transitions: Sequence[Transition], prediction_type: str = "epsilon") -> Plan:
    """Ancestral sampling, DDPM (arXiv:2006.11239, eq. 6–7 and algorithm 2), for steps of any length.

    q(x_prev | xt, x0): with β = 1 − ᾱ_t/ᾱ_prev and α = 1 − β, mean = √ᾱ_prev β/(1 − ᾱ_t) x0 +
    √α (1 − ᾱ_prev)/(1 − ᾱ_t) xt, σ² = β (1 − ᾱ_prev)/(1 − ᾱ_t); ᾱ_prev = 1 at the end.
    """
    plan = []
    for t, now, prev in levels(schedule, transitions):
        beta = 1 - now / prev
        plan.append(
            Step(
                t,
                *x0_weights(prediction_type, now),
                keep=(1 - beta) ** 0.5 * (1 - prev) / (1 - now),
                x0=prev**0.5 * beta / (1 - now),
                sigma=(beta * (1 - prev) / (1 - now)) ** 0.5,
            )
        )
    return tuple(plan)


def ddim(
    schedule: NoiseSchedule, transitions: Sequence[Transition], prediction_type: str = "epsilon", eta: float = 0.0
) -> Plan:
    """DDIM (Song et al., arXiv:2010.02502, eq. 12 and 16): η = 0 is deterministic, η = 1 has DDPM's variance.

    x_prev = √ᾱ_prev x0 + √(1 − ᾱ_prev − σ²) ε + σ noise, where ε = (xt − √ᾱ x0)/√(1 − ᾱ).
    """
    plan = []
    for t, now, prev in levels(schedule, transitions):
        sigma = eta * ((1 - prev) / (1 - now) * (1 - now / prev)) ** 0.5
        direction = (max(0.0, 1 - prev - sigma**2) / (1 - now)) ** 0.5
        plan.append(
            Step(
                t,
                *x0_weights(prediction_type, now),
                keep=direction,
                x0=prev**0.5 - direction * now**0.5,
                sigma=sigma,
            )
        )
    return tuple(plan)


def dpmpp_2m(
    schedule: NoiseSchedule, transitions: Sequence[Transition], prediction_type: str = "epsilon", eta: float = 0.0
) -> Plan:
    """DPM-Solver++(2M) (Lu et al., arXiv:2211.01095): second order, one evaluation a step. η = 0 solves the
    probability flow (algorithm 2), η = 1 the reverse SDE (SDE-DPM-Solver++(2M)), whose noise mends earlier errors.

    With λ = log(α/σ), h = λ_prev − λ_t and r = h_before/h: x_prev = (σ_prev/σ_t) e^(−ηh) xt +
    α_prev (1 − e^(−(1 + η)h)) D + σ_prev √(1 − e^(−2ηh)) noise, D = (1 + 1/(2r)) x0 − 1/(2r) x0_before. The first
    step has no step before it, and the last, to σ = 0, has h = ∞: both are of first order, D = x0; the last gives
    x0 itself.
    """
    plan: list[Step] = []
    h_before = 0.0
    for t, now, prev in levels(schedule, transitions):
        weights = x0_weights(prediction_type, now)
        if prev == 1.0:
            plan.append(Step(t, *weights, keep=0.0, x0=1.0))
            continue
        h = half_log_snr(prev) - half_log_snr(now)
        toward = -(prev**0.5) * math.expm1(-(1 + eta) * h)
        extra = h / (2 * h_before) if plan else 0.0
        plan.append(
            Step(
                t,
                *weights,
                keep=((1 - prev) / (1 - now)) ** 0.5 * math.exp(-eta * h),
                x0=toward * (1 + extra),
                before=-toward * extra,
                sigma=((1 - prev) * -math.expm1(-2 * eta * h)) ** 0.5,
            )
        )
        h_before = h
    return tuple(plan)


def unipc(schedule: NoiseSchedule, transitions: Sequence[Transition], prediction_type: str = "epsilon") -> Plan:
    """UniPC (Zhao et al., arXiv:2302.04867) of second order with B₂(h) = e^h − 1: third-order accurate, one evaluation
    a step.

    The predictor is DPM-Solver++(2M). The x0 it leads to then corrects the latents it was predicted from, which costs
    no evaluation: xt + α_t (1 − e^(−h)) (ρ₁ D₁ + ρ₂ (x0 − x0_before) − ½ D₁), D₁ = (x0_earlier − x0_before)/r, where
    h is the step that led to t and r = −h_before/h. The ρ solve ρ₁ + ρ₂ = b₁, r ρ₁ + ρ₂ = b₂ with b₁ = 1/(1 − e^(−h))
    − 1/h and b₂ = 2/h² − (2/h − 1)/(1 − e^(−h)); after the first step, which has no D₁, ρ₂ = ½ (algorithm 1 and the
    paper's R_p ρ = φ_p/B). Corrected latents enter the next step times its ``keep``.
    """
    plan = list(dpmpp_2m(schedule, transitions, prediction_type))
    alphas_cumprod = [now for _, now, _ in levels(schedule, transitions)]
    lambdas = [half_log_snr(now) for now in alphas_cumprod]
    for i in range(1, len(plan)):
        step, h = plan[i], lambdas[i] - lambdas[i - 1]
        share = -math.expm1(-h)
        weight = float(step.keep) * alphas_cumprod[i] ** 0.5 * share
        now, earlier = weight / 2, 0.0
        if i > 1:
            r = -(lambdas[i - 1] - lambdas[i - 2]) / h
            b1, b2 = 1 / share - 1 / h, 2 / h**2 - (2 / h - 1) / share
            rho = (b1 - b2) / (1 - r)
            now, earlier = weight * (b1 - rho), weight * (rho - 0.5) / r
        plan[i] = dataclasses.replace(step, x0=step.x0 + now, before=step.before - now - earlier, earlier=earlier)
    return tuple(plan)


@lru_cache(maxsize=PLANS_KEPT)
def plan_of(schedule: NoiseSchedule, sampling: SamplingConfig, prediction_type: str = "epsilon") -> Plan:
    """The plan of some settings, with their defaults filled in. ConfigError: more steps than timesteps.

    Guided are the last step and those whose middle is past the share ``guidance_start``: a few late steps are enough
    for the class, and early guidance costs variety (Kynkäänniemi et al., arXiv:2404.07724).
    """
    full = with_defaults(schedule, sampling)
    assert full.num_inference_steps is not None and full.timestep_spacing is not None
    transitions = transitions_of(spaced_timesteps(schedule, full.num_inference_steps, full.timestep_spacing))
    planners: dict[str, Callable[..., Plan]] = {
        "dpmpp_2m_sde": partial(dpmpp_2m, eta=1.0),
        "unipc": unipc,
        "dpmpp_2m": dpmpp_2m,
        "ddim": partial(ddim, eta=full.eta),
        "ddpm": ddpm,
    }
    plan = planners[full.sampler](schedule, transitions, prediction_type)
    first = min(full.guidance_start * len(plan) - 0.5, len(plan) - 1)
    return tuple(dataclasses.replace(step, guided=i >= first) for i, step in enumerate(plan))


def denoiser_rows(plan: Plan, guidance_scale: float) -> int:
    """Rows that the denoiser computes for one image: one a step, two under guidance; at least 1."""
    return max(1, len(plan) + (guidance_scale != 1) * sum(step.guided for step in plan))


def with_defaults(schedule: NoiseSchedule, sampling: SamplingConfig) -> SamplingConfig:
    """The settings with the sampler's own steps and spacing where none are given."""
    sampler, timesteps = sampling.sampler, schedule.num_train_timesteps
    return dataclasses.replace(
        sampling.sampling,
        num_inference_steps=sampling.num_inference_steps or min(DEFAULT_STEPS[sampler] or timesteps, timesteps),
        timestep_spacing=sampling.timestep_spacing or DEFAULT_SPACING,
    )


def levels(schedule: NoiseSchedule, transitions: Sequence[Transition]) -> Iterator[tuple[int, float, float]]:
    """(t, ᾱ_t, ᾱ_prev) of each transition; ᾱ = 1 at the end."""
    alphas_cumprod = schedule.alphas_cumprod
    for t, t_prev in transitions:
        yield t, float(alphas_cumprod[t]), 1.0 if t_prev is None else float(alphas_cumprod[t_prev])


def half_log_snr(alpha_cumprod: float) -> float:
    """λ = log(α/σ)."""
    return 0.5 * math.log(alpha_cumprod / (1 - alpha_cumprod))


X0s = tuple[Tensor | None, Tensor | None]  # (B, D) each: those predicted one and two steps ago


def advance(step: Step, latents: Tensor, output: Tensor, x0s: X0s, noise: Tensor | None) -> tuple[Tensor, Tensor]:
    """(latents after the step, x0 predicted in it), (B, D) each.

    Products and sums stay apart: each is rounded as IEEE 754 says, so the bits do not depend on whether a
    device or a batch size would have fused them.
    """
    x0 = latents * step.x0_from_xt + output * step.x0_from_output
    total = latents * step.keep + x0 * step.x0
    for term, weight in ((x0s[0], step.before), (x0s[1], step.earlier), (noise, step.sigma)):
        if counts(weight):
            assert term is not None
            total = total + term * weight
    return total, x0


def counts(weight: float | Tensor) -> bool:
    """Whether a term is added at all; a column is never looked into, which would wait for the device."""
    return isinstance(weight, Tensor) or weight != 0


def sample(
    denoise: Denoise,
    steps: Sequence[Step],
    latents: Tensor,
    labels: Tensor,
    noise: Noise,
    denoise_guided: Denoise | None = None,
    x0s: X0s = (None, None),
) -> Iterator[tuple[Tensor, Tensor]]:
    """Takes steps, of a whole plan or of a part of it, from latents (B, D), labels (B,); unit Gaussian latents are
    where a plan begins. The only loop that steps: whole plans and images at different steps both follow it.

    ``denoise(latents, t (B,) int64, labels)`` gives the model's output (B, D), in guided steps ``denoise_guided``;
    ``noise(i)`` unit Gaussian noise (B, D) for step i = 1…S; ``x0s`` what was predicted before a part of a plan.
    Yields (latents after the step, x0 predicted in it); the last latents are the samples. Stop iterating to cancel.
    """
    for i, (step, t) in enumerate(zip(steps, timesteps_of(steps, latents), strict=True), 1):
        output = (denoise_guided if denoise_guided and step.guided else denoise)(latents, t, labels)
        latents, x0 = advance(step, latents, output, x0s, noise(i) if counts(step.sigma) else None)
        x0s = x0, x0s[0]
        yield latents, x0


def timesteps_of(steps: Sequence[Step], latents: Tensor) -> list[Tensor]:
    """The timesteps (B,) int64 of each step, on the device; numbers go there together and are seen as one for all."""
    rows = [step.t for step in steps if isinstance(step.t, Tensor)]
    return rows or [t.expand(len(latents)) for t in sent(torch.tensor([step.t for step in steps]), latents.device)]
