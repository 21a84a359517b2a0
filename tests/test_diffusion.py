"""The diffusion mathematics against closed forms, an exact denoiser, diffusers and numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ldm_ray.diffusion.ema import EMA
from ldm_ray.diffusion.guidance import guided
from ldm_ray.diffusion.noise import ImageNoise
from ldm_ray.diffusion.objective import epsilon_loss
from ldm_ray.diffusion.samplers import all_transitions, ddpm, ddpm_coefficients
from ldm_ray.diffusion.schedule import Noiser, NoiseSchedule, x0_from_epsilon
from ldm_ray.errors import ConfigError
from ldm_ray.models.denoiser import timestep_embedding

SCHEDULES = [NoiseSchedule(), NoiseSchedule(10, 0.01, 0.3), NoiseSchedule(2, 0.5, 0.5), NoiseSchedule(4000, 1e-5, 1e-2)]
SHAPES = [NoiseSchedule(1000, 8.5e-4, 1.2e-2, "scaled_linear"), NoiseSchedule(500, beta_schedule="squaredcos_cap_v2")]


@pytest.mark.parametrize("schedule", SCHEDULES + SHAPES, ids=str)
def test_alpha_bar_falls_within_its_bounds(schedule: NoiseSchedule) -> None:
    alpha_bar = schedule.alphas_cumprod
    assert alpha_bar.dtype == torch.float64 and alpha_bar.shape == (schedule.num_train_timesteps,)
    assert alpha_bar.min() > 0 and alpha_bar.max() < 1
    snr = alpha_bar / (1 - alpha_bar)
    assert bool((snr.diff() < 0).all())


def test_schedule_is_the_linear_one_of_the_paper() -> None:
    schedule = NoiseSchedule()
    betas = np.linspace(1e-4, 2e-2, 1000)
    np.testing.assert_allclose(schedule.betas.numpy(), betas, rtol=1e-12)
    np.testing.assert_allclose(schedule.alphas_cumprod.numpy(), np.cumprod(1 - betas), rtol=1e-10)
    assert schedule.alphas_cumprod[-1].item() == pytest.approx(4.0358e-5, rel=1e-4)


@pytest.mark.parametrize("schedule", SCHEDULES + SHAPES, ids=str)
def test_schedules_are_those_of_diffusers(schedule: NoiseSchedule) -> None:
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDPMScheduler(**schedule.to_dict())  # float32
    torch.testing.assert_close(schedule.betas.float(), theirs.betas, rtol=2e-5, atol=1e-8)
    torch.testing.assert_close(schedule.alphas_cumprod.float(), theirs.alphas_cumprod, rtol=1e-3, atol=1e-8)


def test_a_cosine_schedule_goes_by_its_timesteps_alone() -> None:
    shape = "squaredcos_cap_v2"
    assert torch.equal(NoiseSchedule(50, 1e-4, 2e-2, shape).betas, NoiseSchedule(50, 1e-3, 0.1, shape).betas)
    assert NoiseSchedule(50, beta_schedule=shape).betas[-1] == 0.999


def test_an_unknown_shape_of_schedule_is_refused() -> None:
    with pytest.raises(ConfigError, match="of linear, scaled_linear, squaredcos_cap_v2, not 'sigmoid'"):
        NoiseSchedule(beta_schedule="sigmoid")


@pytest.mark.parametrize("bad", [(1, 1e-4, 2e-2), (10, 0.0, 0.1), (10, 0.2, 0.1), (10, 0.1, 1.0)])
def test_impossible_schedules_are_refused(bad: tuple[int, float, float]) -> None:
    with pytest.raises(ConfigError, match="noise schedule"):
        NoiseSchedule(*bad)


def test_x0_survives_noising_and_its_inverse() -> None:
    schedule, generator = NoiseSchedule(), torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 1000, 5, dtype=torch.float64, generator=generator)
    alpha_bar = schedule.alphas_cumprod[:, None]
    xt = alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * eps
    for t in range(1000):
        back = x0_from_epsilon(xt[t], eps[t], float(alpha_bar[t]))
        torch.testing.assert_close(back, x0[t], rtol=0, atol=1e-11)


def test_noiser_gives_each_row_its_own_timestep() -> None:
    schedule = NoiseSchedule()
    t = torch.tensor([0, 500, 999])
    x0, eps = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1))
    xt = Noiser(schedule).add_noise(x0, eps, t)
    for row, step in enumerate(t.tolist()):
        now = float(schedule.alphas_cumprod[step])
        torch.testing.assert_close(xt[row], now**0.5 * x0[row] + (1 - now) ** 0.5 * eps[row])


@pytest.mark.parametrize("schedule", SCHEDULES[:3], ids=str)
def test_ddpm_coefficients_are_the_textbook_posterior(schedule: NoiseSchedule) -> None:
    betas = schedule.betas.numpy()
    alphas, alpha_bar = 1 - betas, np.cumprod(1 - betas)
    for t, t_prev in all_transitions(schedule.num_train_timesteps):
        now, weight_x0, weight_xt, sigma = ddpm_coefficients(schedule.alphas_cumprod, (t, t_prev))
        before = alpha_bar[t - 1] if t else 1.0
        assert now == pytest.approx(alpha_bar[t], rel=1e-10)
        assert weight_x0 == pytest.approx(math.sqrt(before) * betas[t] / (1 - alpha_bar[t]), rel=1e-9)
        assert weight_xt == pytest.approx(math.sqrt(alphas[t]) * (1 - before) / (1 - alpha_bar[t]), rel=1e-9)
        assert sigma**2 == pytest.approx((1 - before) / (1 - alpha_bar[t]) * betas[t], rel=1e-9, abs=1e-15)


def test_a_long_step_is_the_posterior_of_the_product_of_its_steps() -> None:
    """q(x_s | xt, x0) by Bayes' rule on q(x_s | x0) q(xt | x_s), for a step over 37 timesteps."""
    alpha_bar = NoiseSchedule().alphas_cumprod
    now, before = float(alpha_bar[500]), float(alpha_bar[463])
    _, weight_x0, weight_xt, sigma = ddpm_coefficients(alpha_bar, (500, 463))
    ratio = now / before
    precision = 1 / (1 - before) + ratio / (1 - ratio)
    assert sigma**2 == pytest.approx(1 / precision, rel=1e-9)
    assert weight_x0 == pytest.approx(before**0.5 / (1 - before) / precision, rel=1e-9)
    assert weight_xt == pytest.approx(ratio**0.5 / (1 - ratio) / precision, rel=1e-9)


def test_transitions_visit_every_timestep_and_end_without_noise() -> None:
    steps = all_transitions(1000)
    assert [t for t, _ in steps] == list(range(999, -1, -1))
    assert all(
        t_prev == (following if following is not None else None)
        for (_, t_prev), following in zip(steps, [t for t, _ in steps[1:]] + [None], strict=True)
    )
    _, weight_x0, weight_xt, sigma = ddpm_coefficients(NoiseSchedule().alphas_cumprod, steps[-1])
    assert (weight_x0, weight_xt, sigma) == (pytest.approx(1, abs=1e-9), 0, 0)


def test_the_last_step_draws_no_noise() -> None:
    schedule, drawn = NoiseSchedule(10, 0.01, 0.3), []

    def noise() -> Tensor:
        drawn.append(1)
        return torch.full((2, 3), 100.0)

    steps = list(ddpm(lambda x, t, y: x, schedule, torch.ones(2, 3), torch.zeros(2), all_transitions(10), noise))
    assert len(steps) == 10 and len(drawn) == 9
    torch.testing.assert_close(steps[-1][0], steps[-1][1])  # the sample is the last x0 prediction


def test_ddpm_with_the_exact_denoiser_reaches_the_gaussian() -> None:
    """x0 ~ N(μ, Σ): ε*(xt, t) = √(1 − ᾱ) (ᾱ Σ + (1 − ᾱ) I)⁻¹ (xt − √ᾱ μ)."""
    schedule, count = NoiseSchedule(), 20_000
    generator = torch.Generator().manual_seed(3)
    mean = torch.tensor([1.5, -0.7, 0.2], dtype=torch.float64)
    root = torch.tensor([[1.2, 0.0, 0.0], [0.5, 0.6, 0.0], [-0.4, 0.3, 0.3]], dtype=torch.float64)
    covariance = root @ root.T
    alpha_bar, eye = schedule.alphas_cumprod, torch.eye(3, dtype=torch.float64)
    maps = torch.linalg.inv(alpha_bar[:, None, None] * covariance + (1 - alpha_bar)[:, None, None] * eye)

    def exact(xt: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        now = alpha_bar[t[0]]
        return (1 - now).sqrt() * (xt - now.sqrt() * mean) @ maps[t[0]]

    def noise() -> Tensor:
        return torch.randn(count, 3, dtype=torch.float64, generator=generator)

    labels = torch.zeros(count, dtype=torch.int64)
    for latents, _ in ddpm(exact, schedule, noise(), labels, all_transitions(1000), noise):  # noqa: B007
        pass
    five = 5 / count**0.5  # five standard errors; 1 % more for the discretisation of 1000 steps
    deviation = covariance.diagonal().sqrt()
    assert bool(((latents.mean(dim=0) - mean).abs() < (five + 0.01) * deviation).all())
    error = (latents.T.cov() - covariance).abs()
    assert bool((error < (2**0.5 * five + 0.01) * torch.outer(deviation, deviation)).all())


@pytest.mark.parametrize("t", [999, 700, 123, 2, 1, 0])
def test_one_step_is_that_of_diffusers(t: int) -> None:
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDPMScheduler(
        num_train_timesteps=1000, beta_start=1e-4, beta_end=2e-2, beta_schedule="linear", clip_sample=False
    )
    theirs.set_timesteps(1000)
    xt, eps = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(t))
    wanted = theirs.step(eps, t, xt, generator=torch.Generator().manual_seed(7))
    ours, x0 = next(
        ddpm(
            lambda *_: eps,
            NoiseSchedule(),
            xt,
            torch.zeros(6, dtype=torch.int64),
            [(t, t - 1 if t else None)],
            lambda: torch.randn(6, 16, generator=torch.Generator().manual_seed(7)),
        )
    )
    torch.testing.assert_close(x0, wanted.pred_original_sample, rtol=2e-4, atol=2e-4)  # theirs is float32 throughout
    torch.testing.assert_close(ours, wanted.prev_sample, rtol=1e-4, atol=3e-4)


def by_label(latents: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    return latents * (labels[:, None] + 1) + t[:, None]


def test_guidance_of_one_is_the_conditional_denoiser() -> None:
    assert guided(by_label, 1.0, 10) is by_label


@pytest.mark.parametrize("scale", [0.0, 0.5, 2.0, 7.5])
def test_guidance_extrapolates_from_the_null_label(scale: float) -> None:
    latents = torch.randn(4, 3, generator=torch.Generator().manual_seed(2))
    t, labels = torch.full((4,), 9), torch.tensor([0, 3, 9, 10])
    made = guided(by_label, scale, 10)(latents, t, labels)
    cond, uncond = by_label(latents, t, labels), by_label(latents, t, torch.full((4,), 10))
    torch.testing.assert_close(made, uncond + scale * (cond - uncond))
    torch.testing.assert_close(made[3], uncond[3])  # an unconditional image is not guided


def test_image_noise_does_not_depend_on_its_batch() -> None:
    batch = ImageNoise([7, 8, 2**32 - 1], 16)
    alone, other_order = ImageNoise([8], 16), ImageNoise([8, 7], 16, ahead=3)
    for _ in range(150):  # over the end of several blocks
        wanted = batch()
        assert wanted.shape == (3, 16) and wanted.dtype == torch.float32
        assert wanted[1].numpy().tobytes() == alone()[0].numpy().tobytes()
        assert wanted[[1, 0]].numpy().tobytes() == other_order().numpy().tobytes()


def test_image_noise_is_numpys_philox() -> None:
    stream = np.random.Generator(np.random.Philox(key=42)).standard_normal((100, 16), dtype=np.float32)
    noise = ImageNoise([42], 16)
    np.testing.assert_array_equal(np.stack([noise()[0].numpy() for _ in range(100)]), stream)


def test_ema_is_its_closed_form() -> None:
    model = nn.Linear(3, 2).double()
    ema = EMA(model, decay=0.6)
    wanted = model.weight.detach().clone()
    for n in range(40):
        with torch.no_grad():
            model.weight.add_(torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(n)))
        ema.update()
        d = min(0.6, (1 + n) / (10 + n))
        wanted = d * wanted + (1 - d) * model.weight.detach()
    torch.testing.assert_close(ema.model.weight, wanted, rtol=1e-12, atol=1e-12)
    assert not ema.model.training and not any(p.requires_grad for p in ema.model.parameters())


def test_timestep_embedding_is_sin_then_cos() -> None:
    t = [0, 1, 500, 999]
    made = timestep_embedding(torch.tensor(t), 128)
    angles = np.array(t)[:, None] * 10_000.0 ** (-np.arange(64) / 64)
    np.testing.assert_allclose(made.numpy(), np.concatenate([np.sin(angles), np.cos(angles)], axis=1), atol=2e-4)


def test_the_loss_of_known_denoisers() -> None:
    noiser, generator = Noiser(NoiseSchedule()), torch.Generator().manual_seed(0)
    x0, labels = torch.zeros(4000, 4), torch.arange(4000) % 10

    def perfect(xt: Tensor, t: Tensor, _: Tensor) -> Tensor:  # x0 = 0, so that xt = √(1 − ᾱ) ε
        return xt / noiser.sigma[t][:, None]

    assert epsilon_loss(perfect, noiser, x0, labels, 10, 0.1, generator).item() < 1e-10
    nothing = epsilon_loss(lambda xt, t, y: torch.zeros_like(xt), noiser, x0, labels, 10, 0.1, generator)
    assert nothing.item() == pytest.approx(1, abs=5 * (2 / 16_000) ** 0.5)


@pytest.mark.parametrize("dropout", [0.0, 0.1, 1.0])
def test_the_loss_hides_that_share_of_the_labels(dropout: float) -> None:
    labels, seen = torch.arange(10).repeat(1000), []

    def watching(xt: Tensor, t: Tensor, y: Tensor) -> Tensor:
        seen.extend([t, y])
        return xt

    generator = torch.Generator().manual_seed(5)
    epsilon_loss(watching, Noiser(NoiseSchedule()), torch.zeros(10_000, 2), labels, 10, dropout, generator)
    t, y = seen
    hidden = y == 10
    assert torch.equal(y[~hidden], labels[~hidden])
    assert hidden.float().mean().item() == pytest.approx(dropout, abs=5 * (dropout * (1 - dropout) / 10_000) ** 0.5)
    assert t.min() < 10 and t.max() > 989 and t.min() >= 0 and t.max() <= 999
