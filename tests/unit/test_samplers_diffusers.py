"""Samplers against those of diffusers."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm_ray.diffusion.prediction import PREDICTION_TYPES
from ldm_ray.diffusion.samplers import Plan, ddim, ddpm, dpmpp_2m, sample, unipc
from ldm_ray.diffusion.schedule import NoiseSchedule
from ldm_ray.diffusion.timesteps import spaced_timesteps, transitions_of

dpmpp_2m_sde = partial(dpmpp_2m, eta=1.0)


def output_of(latents: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    return (latents * 1.3 + 0.01 * t[:, None]).tanh()


def both(plan: Plan, theirs: Any, start: Tensor, **more: Any) -> tuple[Tensor, Tensor]:
    """(ours, theirs) after the whole plan, with the same noise drawn in the same order."""
    assert theirs.timesteps.tolist() == [step.t for step in plan]
    generator = torch.Generator().manual_seed(7)
    labels = torch.zeros(len(start), dtype=torch.int64)
    draw = lambda _: torch.randn(start.shape, generator=generator)  # noqa: E731
    ours = list(sample(output_of, plan, start, labels, draw))[-1][0]
    latents, generator = start, torch.Generator().manual_seed(7)
    draws = "generator" in inspect.signature(theirs.step).parameters
    given = more | ({"generator": generator} if draws else {})
    for t in theirs.timesteps:
        latents = theirs.step(output_of(latents, t.expand(len(start)), labels), t, latents, **given).prev_sample
    return ours, latents


GIVEN = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 2e-2, "beta_schedule": "linear"}


@pytest.fixture
def start() -> Tensor:
    return torch.randn(6, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@pytest.mark.parametrize("steps", [10, 100])
def test_ddpm_is_that_of_diffusers(start: Tensor, steps: int, kind: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDPMScheduler(**GIVEN, prediction_type=kind, clip_sample=False, timestep_spacing="leading")
    theirs.set_timesteps(steps)
    plan = ddpm(NoiseSchedule(), transitions_of(spaced_timesteps(NoiseSchedule(), steps, "leading")), kind)
    torch.testing.assert_close(*both(plan, theirs, start), rtol=2e-3, atol=2e-3)  # theirs is float32 throughout


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_ddim_is_that_of_diffusers(start: Tensor, eta: float, spacing: str, kind: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDIMScheduler(
        **GIVEN, prediction_type=kind, clip_sample=False, set_alpha_to_one=True, timestep_spacing=spacing
    )
    theirs.set_timesteps(20)
    plan = ddim(NoiseSchedule(), transitions_of(spaced_timesteps(NoiseSchedule(), 20, spacing)), kind, eta)
    torch.testing.assert_close(*both(plan, theirs, start, eta=eta), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@pytest.mark.parametrize("steps", [5, 10, 20])
@pytest.mark.parametrize(("planner", "algorithm"), [(dpmpp_2m, "dpmsolver++"), (dpmpp_2m_sde, "sde-dpmsolver++")])
def test_dpmpp_2m_is_that_of_diffusers(start: Tensor, planner: Any, algorithm: str, steps: int, kind: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DPMSolverMultistepScheduler(
        **GIVEN,
        prediction_type=kind,
        algorithm_type=algorithm,
        solver_order=2,
        timestep_spacing="trailing",
        final_sigmas_type="zero",
    )
    theirs.set_timesteps(steps)
    plan = planner(NoiseSchedule(), transitions_of(theirs.timesteps.tolist()), kind)
    torch.testing.assert_close(*both(plan, theirs, start), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@pytest.mark.parametrize("steps", [1, 2, 3, 9, 20])
def test_unipc_is_that_of_diffusers(start: Tensor, steps: int, kind: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.UniPCMultistepScheduler(
        **GIVEN, prediction_type=kind, solver_order=2, timestep_spacing="trailing", final_sigmas_type="zero"
    )
    theirs.set_timesteps(steps)
    plan = unipc(NoiseSchedule(), transitions_of(theirs.timesteps.tolist()), kind)
    ours, wanted = both(plan, theirs, start)
    torch.testing.assert_close(ours, wanted, rtol=1e-3, atol=1e-3)
