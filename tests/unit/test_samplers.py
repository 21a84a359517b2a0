"""Samplers against closed forms and an exact denoiser."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ldm_ray.diffusion.prediction import PREDICTION_TYPES, x0_weights
from ldm_ray.diffusion.samplers import WEIGHTS, Plan, Step, ddim, ddpm, dpmpp_2m, half_log_snr, plan_of, sample, unipc
from ldm_ray.diffusion.schedule import NoiseSchedule
from ldm_ray.diffusion.timesteps import spaced_timesteps, transitions_of
from ldm_ray.settings.errors import ConfigError
from ldm_ray.settings.sampling import SAMPLERS, SPACINGS, SamplingConfig

SCHEDULES = [NoiseSchedule(), NoiseSchedule(10, 0.01, 0.3), NoiseSchedule(2, 0.5, 0.5)]
dpmpp_2m_sde = partial(dpmpp_2m, eta=1.0)
PLANNERS = [unipc, dpmpp_2m, dpmpp_2m_sde, ddim, ddpm]


def every(schedule: NoiseSchedule) -> list[tuple[int, int | None]]:
    return transitions_of(range(schedule.num_train_timesteps - 1, -1, -1))


# --- timesteps ---


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_timesteps_are_different_fall_and_stay_inside(schedule: NoiseSchedule, spacing: str) -> None:
    total = schedule.num_train_timesteps
    for steps in {1, 2, min(7, total), total // 2 or 1, total - 1, total}:
        found = spaced_timesteps(schedule, steps, spacing)
        assert len(found) == steps and all(a > b for a, b in itertools.pairwise(found))
        assert found[-1] >= 0 and found[0] < total
        if spacing != "leading":
            assert found[0] == total - 1  # sampling starts from pure noise
    assert spaced_timesteps(schedule, total, spacing) == list(range(total - 1, -1, -1))


def test_spacings_are_those_of_the_papers() -> None:
    schedule = NoiseSchedule()
    assert spaced_timesteps(schedule, 10, "leading") == list(range(900, -1, -100))
    assert spaced_timesteps(schedule, 10, "trailing") == list(range(999, 0, -100))
    assert spaced_timesteps(schedule, 4, "linspace") == [999, 666, 333, 0]
    alpha_bar = schedule.alphas_cumprod
    even = [half_log_snr(float(alpha_bar[t])) for t in spaced_timesteps(schedule, 12, "logsnr")]
    gaps = np.diff(even)
    assert gaps[:-4] == pytest.approx(gaps[0], rel=0.03)  # near t = 0 timesteps are far apart in λ
    sigma = ((1 - alpha_bar) / alpha_bar).sqrt().numpy()
    ramp = sigma[spaced_timesteps(schedule, 12, "karras")] ** (1 / 7)
    assert np.diff(ramp)[:-3] == pytest.approx(np.diff(ramp)[0], rel=0.05)


def test_transitions_go_from_each_to_the_next_and_to_the_end() -> None:
    assert transitions_of([9, 4, 0]) == [(9, 4), (4, 0), (0, None)]


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_impossible_numbers_of_steps_are_refused(steps: int) -> None:
    with pytest.raises(ConfigError, match="1 to 1000"):
        spaced_timesteps(NoiseSchedule(), steps, "trailing")
    with pytest.raises(ConfigError, match="'even' is unknown; known are leading"):
        spaced_timesteps(NoiseSchedule(), 5, "even")


# --- closed forms ---


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_x0_comes_back_from_every_kind_of_prediction(kind: str) -> None:
    x0, eps = torch.randn(2, 1000, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for t, now in enumerate(NoiseSchedule().alphas_cumprod.tolist()):
        signal, sigma = now**0.5, (1 - now) ** 0.5
        xt = signal * x0[t] + sigma * eps[t]
        output = {"epsilon": eps[t], "v_prediction": signal * eps[t] - sigma * x0[t], "sample": x0[t]}[kind]
        a, b = x0_weights(kind, now)
        torch.testing.assert_close(a * xt + b * output, x0[t], rtol=0, atol=1e-11)
    with pytest.raises(ConfigError, match="'score' is unknown; known are epsilon"):
        x0_weights("score", 0.5)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_ddpm_is_the_textbook_posterior(schedule: NoiseSchedule) -> None:
    betas = schedule.betas.numpy()
    alphas, alpha_bar = 1 - betas, np.cumprod(1 - betas)
    for step in ddpm(schedule, every(schedule)):
        t = step.t
        before = alpha_bar[t - 1] if t else 1.0
        assert step.x0 == pytest.approx(math.sqrt(before) * betas[t] / (1 - alpha_bar[t]), rel=1e-9)
        assert step.keep == pytest.approx(math.sqrt(alphas[t]) * (1 - before) / (1 - alpha_bar[t]), rel=1e-9)
        assert step.sigma**2 == pytest.approx((1 - before) / (1 - alpha_bar[t]) * betas[t], rel=1e-9, abs=1e-15)


def test_a_long_ddpm_step_is_the_posterior_of_the_product_of_its_steps() -> None:
    """q(x_s | xt, x0) by Bayes' rule on q(x_s | x0) q(xt | x_s), for a step over 37 timesteps."""
    schedule = NoiseSchedule()
    now, before = schedule.alphas_cumprod[[500, 463]].tolist()
    step = ddpm(schedule, [(500, 463)])[0]
    ratio = now / before
    precision = 1 / (1 - before) + ratio / (1 - ratio)
    assert step.sigma**2 == pytest.approx(1 / precision, rel=1e-9)
    assert step.x0 == pytest.approx(before**0.5 / (1 - before) / precision, rel=1e-9)
    assert step.keep == pytest.approx(ratio**0.5 / (1 - ratio) / precision, rel=1e-9)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_ddim_with_all_its_noise_is_ddpm(schedule: NoiseSchedule) -> None:
    for ours, theirs in zip(ddim(schedule, every(schedule), eta=1.0), ddpm(schedule, every(schedule)), strict=True):
        assert (ours.keep, ours.x0, ours.sigma) == pytest.approx((theirs.keep, theirs.x0, theirs.sigma), abs=1e-9)


@pytest.mark.parametrize("planner", PLANNERS, ids=["unipc", "dpmpp_2m", "dpmpp_2m_sde", "ddim", "ddpm"])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_every_plan_ends_with_x0_itself(planner: Callable[..., Plan], spacing: str) -> None:
    schedule = NoiseSchedule()
    for steps in (1, 2, 10, 1000):
        plan = planner(schedule, transitions_of(spaced_timesteps(schedule, steps, spacing)))
        last = plan[-1]
        assert len(plan) == steps and last.keep == pytest.approx(0, abs=1e-12) and last.x0 == pytest.approx(1)
        assert last.before == last.earlier == last.sigma == 0
        assert all(math.isfinite(number) for step in plan for number in vars(step).values())


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_first_order_dpm_step_is_ddim(eta: float) -> None:
    """Lu et al., arXiv:2211.01095: DDIM is DPM-Solver++ of order one; with all its noise, that of the SDE."""
    plans = (planner(NoiseSchedule(), [(800, 500)], eta=eta) for planner in (dpmpp_2m, ddim))
    for ours, theirs in zip(*plans, strict=True):
        wanted = theirs.keep, theirs.x0, 0, theirs.sigma
        assert (ours.keep, ours.x0, ours.before, ours.sigma) == pytest.approx(wanted, rel=1e-9)


def test_the_loop_does_what_a_step_says() -> None:
    plan = (
        Step(7, 1.0, -0.5, 0.9, 0.2, sigma=0.3),
        Step(3, 2.0, 0.1, 0.5, 0.4, before=-0.25),
        Step(0, 1.0, 0.0, 0.0, 1.0, before=0.125, earlier=-2.0),
    )
    seen: list[Any] = []

    def denoise(latents: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        seen.append((t.tolist(), labels.tolist()))
        return latents * 3

    drawn: list[int] = []

    def noise(i: int) -> Tensor:
        drawn.append(i)
        return torch.full((2, 1), 10.0)

    start = torch.tensor([[1.0], [2.0]])
    (first, x0), (second, x0_second), (third, x0_third) = list(
        sample(denoise, plan, start, torch.tensor([4, 5]), noise)
    )
    assert seen == [([7, 7], [4, 5]), ([3, 3], [4, 5]), ([0, 0], [4, 5])] and drawn == [1]
    torch.testing.assert_close(x0, start - 1.5 * start)
    torch.testing.assert_close(first, 0.9 * start + 0.2 * x0 + 3.0)
    torch.testing.assert_close(x0_second, 2 * first + 0.3 * first)
    torch.testing.assert_close(second, 0.5 * first + 0.4 * x0_second - 0.25 * x0)
    torch.testing.assert_close(x0_third, second)
    torch.testing.assert_close(third, x0_third + 0.125 * x0_second - 2 * x0)


# --- the oracle: x0 ~ N(μ, Σ) has the exact denoiser ε* = √(1 − ᾱ) (ᾱ Σ + (1 − ᾱ) I)⁻¹ (xt − √ᾱ μ) ---

MEAN = torch.tensor([1.5, -0.7, 0.2], dtype=torch.float64)
ROOT = torch.tensor([[1.2, 0.0, 0.0], [0.5, 0.6, 0.0], [-0.4, 0.3, 0.3]], dtype=torch.float64)
COVARIANCE = ROOT @ ROOT.T


def exact(schedule: NoiseSchedule) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    alpha_bar, eye = schedule.alphas_cumprod, torch.eye(3, dtype=torch.float64)
    maps = torch.linalg.inv(alpha_bar[:, None, None] * COVARIANCE + (1 - alpha_bar)[:, None, None] * eye)

    def denoise(xt: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        now = alpha_bar[t[0]]
        return (1 - now).sqrt() * (xt - now.sqrt() * MEAN) @ maps[t[0]]

    return denoise


def finish(plan: Plan, schedule: NoiseSchedule, start: Tensor, generator: torch.Generator) -> Tensor:
    labels = torch.zeros(len(start), dtype=torch.int64)

    def noise(_: int) -> Tensor:
        return torch.randn(start.shape, dtype=torch.float64, generator=generator)

    return list(sample(exact(schedule), plan, start, labels, noise))[-1][0]


@pytest.mark.parametrize(
    ("settings", "bias"),
    [
        ({"sampler": "ddpm"}, 0.01),
        ({"sampler": "ddim", "num_inference_steps": 200}, 0.03),
        ({"sampler": "ddim", "num_inference_steps": 200, "eta": 0.5}, 0.03),
        ({"sampler": "unipc", "num_inference_steps": 20}, 0.03),
        ({"sampler": "dpmpp_2m", "num_inference_steps": 20}, 0.03),
        ({"sampler": "dpmpp_2m_sde", "num_inference_steps": 50}, 0.03),
    ],
    ids=str,
)
def test_samplers_reach_the_gaussian(settings: dict[str, Any], bias: float) -> None:
    schedule, count = NoiseSchedule(), 20_000
    generator = torch.Generator().manual_seed(3)
    start = torch.randn(count, 3, dtype=torch.float64, generator=generator)
    made = finish(plan_of(schedule, SamplingConfig(**settings)), schedule, start, generator)
    five = 5 / count**0.5  # five standard errors, and the discretisation's share
    deviation = COVARIANCE.diagonal().sqrt()
    assert bool(((made.mean(dim=0) - MEAN).abs() < (five + bias) * deviation).all())
    error = (made.T.cov() - COVARIANCE).abs()
    assert bool((error < (2**0.5 * five + bias) * torch.outer(deviation, deviation)).all())


@pytest.mark.parametrize(
    ("planner", "order"), [(ddim, 1), (dpmpp_2m, 2), (unipc, 3)], ids=["ddim", "dpmpp_2m", "unipc"]
)
def test_samplers_converge_at_their_order(planner: Callable[..., Plan], order: int) -> None:
    """Between two timesteps on a fine schedule, where the probability-flow ODE of a Gaussian has the exact
    solution x(s) = √ᾱ_s μ + Σ_s^½ Σ_t^−½ (x(t) − √ᾱ_t μ) with Σ_t = ᾱ Σ + (1 − ᾱ) I."""
    schedule, variance = NoiseSchedule(64_000, 1e-4 / 64, 2e-2 / 64), 0.25
    alpha_bar = schedule.alphas_cumprod

    def denoise(xt: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        now = alpha_bar[t[0]]
        return (1 - now).sqrt() * (xt - now.sqrt() * 2) / (now * variance + 1 - now)

    start_t, end_t = 48_000, 8_000
    now, then = float(alpha_bar[start_t]), float(alpha_bar[end_t])
    start = torch.tensor([[0.7]], dtype=torch.float64)
    ratio = ((then * variance + 1 - then) / (now * variance + 1 - now)) ** 0.5
    wanted = 2 * then**0.5 + ratio * (float(start) - 2 * now**0.5)
    errors = []
    for steps in (16, 32, 64, 128):
        lambdas = torch.linspace(half_log_snr(now), half_log_snr(then), steps + 1, dtype=torch.float64)
        table = 0.5 * (alpha_bar / (1 - alpha_bar)).log()
        timesteps = [int((table - value).abs().argmin()) for value in lambdas]
        plan = planner(schedule, list(itertools.pairwise(timesteps)))
        labels = torch.zeros(1, dtype=torch.int64)
        *_, (made, _) = sample(denoise, plan, start, labels, lambda _: start)
        errors.append(abs(float(made) - wanted))
    slopes = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert slopes[-1] == pytest.approx(order, abs=0.25), (errors, slopes)


# --- parts of a plan ---


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_plan_in_parts_and_in_columns_gives_the_bits_of_the_whole(sampler: str) -> None:
    plan = plan_of(NoiseSchedule(), SamplingConfig(sampler=sampler, num_inference_steps=6))
    noise = torch.randn(7, 4, 5, generator=torch.Generator().manual_seed(0))  # (S + 1, B, D)
    labels = torch.zeros(4, dtype=torch.int64)

    def denoise(latents: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return latents.sin() + t[:, None] / 1000

    def column(step: Step) -> Step:
        weights: dict[str, Any] = {name: torch.tensor(getattr(step, name)).expand(4, 1) for name in WEIGHTS}
        return Step(torch.tensor(step.t).repeat(4), **weights, guided=step.guided)

    *_, (whole, _) = sample(denoise, plan, noise[0], labels, noise.__getitem__)
    for steps, split in itertools.product((plan, [column(step) for step in plan]), range(1, 6)):
        latents, x0s = noise[0], (torch.zeros(4, 5), torch.zeros(4, 5))
        for first, part in ((0, steps[:split]), (split, steps[split:])):
            for state in sample(denoise, part, latents, labels, noise[first:].__getitem__, x0s=x0s):
                x0s = state[1], x0s[0]
            latents = state[0]
        assert torch.equal(latents, whole), (type(steps), split)


# --- settings ---


def test_defaults_of_a_plan() -> None:
    schedule = NoiseSchedule()
    assert len(plan_of(schedule, SamplingConfig(sampler="ddpm"))) == 1000
    assert len(plan_of(schedule, SamplingConfig())) <= 20
    assert len(plan_of(NoiseSchedule(4, 0.1, 0.5), SamplingConfig())) == 4  # a model of fewer timesteps
    assert plan_of(schedule, SamplingConfig(timestep_spacing="leading", num_inference_steps=2))[0].t == 500


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"sampler": "euler"}, "--sampler is one of dpmpp_2m_sde, unipc, dpmpp_2m, ddim, ddpm, not 'euler'"),
        ({"num_inference_steps": 0}, "--num-inference-steps is at least 1"),
        ({"guidance_scale": float("nan")}, "--guidance-scale is a finite number"),
        ({"guidance_scale": 21}, "--guidance-scale is at most 20"),
        ({"eta": 0.5}, "--eta 0.5 belongs to --sampler ddim"),
        ({"sampler": "ddim", "eta": 1.5}, "--eta is at most 1"),
        ({"timestep_spacing": "even"}, "--timestep-spacing is one of leading"),
    ],
)
def test_wrong_settings_get_one_line(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        SamplingConfig(**settings)
    assert "\n" not in str(caught.value)
