"""How far the images of a request are. n images of a request, D latent."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum

from torch import Tensor

from ldm_ray.engine.request import Course, ImageRequest


class Outcome(Enum):
    """What became of an image."""

    DONE = "done"
    FAILED = "failed"  # numbers that are not finite, or an error in its tile
    CANCELLED = "cancelled"
    EXPIRED = "expired"  # the deadline came first


OnImage = Callable[[int, int, Tensor], None]


class Job:
    """The progress of one request. The slots alone write to it; ``cancel`` of the slots ends it early."""

    images: Tensor  #  (n, H, W) uint8, zeros where there is none; like the latents, from the first round on
    latents: Tensor  # (n, D) float32, whitened

    def __init__(
        self,
        request: ImageRequest,
        course: Course,
        deadline: float | None = None,
        on_image: OnImage | None = None,
        on_done: Callable[[Job], None] | None = None,
    ) -> None:
        count, steps = len(request.seeds), len(course.plan)
        self.request, self.course, self.steps = request, course, steps
        self.deadline, self.on_image, self.on_done = deadline, on_image, on_done
        self.work = request.rows(course.plan)
        self.guided_from = steps if request.guidance_scale == 1 else course.guided_from  # the first guided step
        self.outcomes: list[Outcome | None] = [None] * count
        self.open = count  # images without an outcome
        self.steps_done = 0  # of all images together
        self.cancelled = False
