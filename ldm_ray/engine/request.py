"""Which images to make: a frozen request, and the course of steps that it takes. n images, D latent, S steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from ldm_ray.diffusion.samplers import PLANS_KEPT, WEIGHTS, Plan, denoiser_rows, plan_of
from ldm_ray.diffusion.schedule import NoiseSchedule
from ldm_ray.settings.errors import ConfigError
from ldm_ray.settings.limits import MAX_SEED
from ldm_ray.settings.sampling import SamplingConfig


@dataclass(frozen=True)
class ImageRequest:
    """One image for each seed, of the label beside it; a label of None is unconditional.

    start: latents (n, D) float32 to begin from, in place of the seeds' noise; with ``sampling=None`` they are only
    decoded. show: the steps (1…S) after which the image predicted so far is wanted as well.
    """

    seeds: Sequence[int]
    labels: Sequence[int | None]
    sampling: SamplingConfig | None
    start: Tensor | None = None
    show: Sequence[int] = ()

    @property
    def guidance_scale(self) -> float:
        return 1.0 if self.sampling is None else self.sampling.guidance_scale

    def rows(self, plan: Plan) -> int:
        """Denoiser rows that all images take by this plan, at least n."""
        return len(self.seeds) * denoiser_rows(plan, self.guidance_scale)

    def check(self, classes: int, dim: int) -> None:
        """ConfigError: not a request to a model of so many classes, with latents of so many numbers."""
        count = len(self.seeds)
        if not count or count != len(self.labels):
            raise ConfigError(f"{count} seeds and {len(self.labels)} labels: as many of each, at least one")
        if any(not 0 <= seed <= MAX_SEED for seed in self.seeds):
            raise ConfigError(f"a seed is 0 to {MAX_SEED}")
        for label in self.labels:
            if label is not None and not 0 <= label < classes:
                raise ConfigError(f"label {label} is outside 0 to {classes - 1}")
        start = self.start
        if start is not None and (start.shape != (count, dim) or not bool(torch.isfinite(start).all())):
            raise ConfigError(f"start latents are {count} times {dim} finite numbers")
        if self.sampling is None and start is None:
            raise ConfigError("a request without settings only decodes: it needs latents to start from")


class Course:
    """A plan and what is worked out from it once. Requests that differ in guidance scale alone share one object,
    so their images can step side by side."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    @cached_property
    def noisy(self) -> bool:
        """Whether any step adds noise."""
        return any(step.sigma for step in self.plan)

    @cached_property
    def guided_from(self) -> int:
        """The first guided step, from 0; S where there is none."""
        return next((i for i, step in enumerate(self.plan) if step.guided), len(self.plan))

    @cached_property
    def table(self) -> tuple[Tensor, Tensor]:
        """(timesteps (S,) int64, weights (S, 7) float32 in the order of ``WEIGHTS``) on the CPU."""
        weights = torch.tensor([[getattr(step, name) for name in WEIGHTS] for step in self.plan])
        return torch.tensor([step.t for step in self.plan]), weights.float()


STILL = Course(())  # of latents that are only decoded


@lru_cache(maxsize=PLANS_KEPT)
def course_of(schedule: NoiseSchedule, sampling: SamplingConfig, prediction_type: str) -> Course:
    """ConfigError: more steps than timesteps."""
    unguided = sampling.sampling_at(1.0)
    if sampling != unguided:
        return course_of(schedule, unguided, prediction_type)
    return Course(plan_of(schedule, sampling, prediction_type))
