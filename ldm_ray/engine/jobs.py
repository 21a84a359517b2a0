"""What the slots are given, and what comes of it. n images of a job, D latent."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from enum import Enum

from torch import Tensor

from ldm_ray.diffusion.samplers import Plan, denoiser_rows
from ldm_ray.settings.sampling import SamplingConfig


class Outcome(Enum):
    """What became of an image."""

    DONE = "done"
    FAILED = "failed"  # numbers that are not finite, or an error in its tile
    CANCELLED = "cancelled"
    EXPIRED = "expired"  # the deadline came first


@dataclass(eq=False, kw_only=True)
class Job:
    """The images of one request.

    start: latents (n, D) to begin from instead of the seeds' noise; with ``sampling=None`` they are only decoded.
    show: after which steps (1…S) the image predicted so far is handed to ``on_image(i, step, image (H, W) uint8)``.
    deadline: a ``time.monotonic()``. ``on_done(job)`` comes once, when every image has its outcome. Both are called
    in the thread of the slots and are to be quick.
    """

    seeds: Sequence[int]
    labels: Sequence[int | None]
    sampling: SamplingConfig | None
    start: Tensor | None = None
    show: Collection[int] = ()
    deadline: float | None = None
    on_image: Callable[[int, int, Tensor], None] | None = None
    on_done: Callable[[Job], None] | None = None

    outcomes: list[Outcome | None] = field(init=False)
    images: Tensor = field(init=False)  # (n, H, W) uint8, zeros where there is none
    latents: Tensor = field(init=False)  # (n, D) float32, whitened
    steps_done: int = field(default=0, init=False)  # of all images together
    cancelled: bool = field(default=False, init=False)
    open: int = field(default=0, init=False)  # images without an outcome
    plan: Plan = field(default=(), init=False, repr=False)
    plan_id: int = field(default=0, init=False, repr=False)
    noisy: bool = field(default=False, init=False)  # whether any step adds noise
    guided_from: int = field(default=0, init=False)  # the first guided step; the number of steps where there is none

    @property
    def scale(self) -> float:
        return 1.0 if self.sampling is None else self.sampling.guidance_scale

    @property
    def work(self) -> int:
        """Denoiser rows that the whole job takes, at least n."""
        return len(self.seeds) * denoiser_rows(self.plan, self.scale)
