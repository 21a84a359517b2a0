"""Schedule, objective, guidance and weight averaging against closed forms and numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ldm_ray.diffusion.ema import EMA
from ldm_ray.diffusion.guidance import guided
from ldm_ray.diffusion.objective import denoising_loss
from ldm_ray.diffusion.schedule import Noiser, NoiseSchedule
from ldm_ray.models.conditioning import timestep_embedding
from ldm_ray.settings.errors import ConfigError

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


def test_noiser_gives_each_row_its_own_timestep() -> None:
    schedule = NoiseSchedule()
    t = torch.tensor([0, 500, 999])
    x0, eps = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1))
    xt = Noiser(schedule).add_noise(x0, eps, t)
    for row, step in enumerate(t.tolist()):
        now = float(schedule.alphas_cumprod[step])
        torch.testing.assert_close(xt[row], now**0.5 * x0[row] + (1 - now) ** 0.5 * eps[row])


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
    shared = guided(by_label, scale, 10)(latents, torch.tensor(9).expand(4), labels)
    assert torch.equal(shared, made)


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

    assert denoising_loss(perfect, noiser, x0, labels, 10, 0.1, generator).item() < 1e-10
    nothing = denoising_loss(lambda xt, t, y: torch.zeros_like(xt), noiser, x0, labels, 10, 0.1, generator)
    assert nothing.item() == pytest.approx(1, abs=5 * (2 / 16_000) ** 0.5)


@pytest.mark.parametrize("dropout", [0.0, 0.1, 1.0])
def test_the_loss_hides_that_share_of_the_labels(dropout: float) -> None:
    labels, seen = torch.arange(10).repeat(1000), []

    def watching(xt: Tensor, t: Tensor, y: Tensor) -> Tensor:
        seen.extend([t, y])
        return xt

    generator = torch.Generator().manual_seed(5)
    denoising_loss(watching, Noiser(NoiseSchedule()), torch.zeros(10_000, 2), labels, 10, dropout, generator)
    t, y = seen
    hidden = y == 10
    assert torch.equal(y[~hidden], labels[~hidden])
    assert hidden.float().mean().item() == pytest.approx(dropout, abs=5 * (dropout * (1 - dropout) / 10_000) ** 0.5)
    assert t.min() < 10 and t.max() > 989 and t.min() >= 0 and t.max() <= 999


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_the_loss_of_a_perfect_prediction_of_each_kind_is_zero(kind: str) -> None:
    """x0 is known, so xt tells the noise."""
    noiser, x0 = Noiser(NoiseSchedule()), torch.randn(500, 4, generator=torch.Generator().manual_seed(1))

    def perfect(xt: Tensor, t: Tensor, _: Tensor) -> Tensor:
        signal, sigma = noiser.signal[t][:, None], noiser.sigma[t][:, None]
        noise = (xt - signal * x0) / sigma
        return {"epsilon": noise, "v_prediction": signal * noise - sigma * x0, "sample": x0}[kind]

    generator, labels = torch.Generator().manual_seed(0), torch.zeros(500, dtype=torch.int64)
    assert denoising_loss(perfect, noiser, x0, labels, 10, 0.1, generator, kind).item() < 1e-8
    wrong = denoising_loss(lambda xt, t, y: perfect(xt, t, y) + 1, noiser, x0, labels, 10, 0.1, generator, kind)
    assert wrong.item() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(("batch", "timesteps"), [(64, 64), (500, 1000), (1000, 50)])
def test_stratified_timesteps_are_spread_evenly(batch: int, timesteps: int) -> None:
    seen: list[torch.Tensor] = []

    def watching(xt: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        seen.append(t)
        return xt

    noiser, labels = Noiser(NoiseSchedule(timesteps, 1e-4, 0.2)), torch.zeros(batch, dtype=torch.long)
    for seed in (0, 1):
        generator = torch.Generator().manual_seed(seed)
        denoising_loss(watching, noiser, torch.zeros(batch, 2), labels, 10, 0.0, generator, stratified=True)
    for t in seen:
        counts = torch.bincount(t // max(1, timesteps // batch), minlength=min(batch, timesteps))
        assert counts.tolist() == [max(1, batch // timesteps)] * min(batch, timesteps)
    assert batch >= timesteps or not torch.equal(seen[0], seen[1])
