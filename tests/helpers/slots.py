"""A job of the slots that can be waited for."""

from __future__ import annotations

import threading
import time

import torch

from ldm_ray.engine.jobs import Job
from ldm_ray.engine.request import ImageRequest
from ldm_ray.engine.slots import Slots
from ldm_ray.settings.sampling import SamplingConfig


class Waited:
    def __init__(
        self,
        slots: Slots,
        count: int,
        sampling: SamplingConfig | None,
        first: int = 0,
        labels: list[int | None] | None = None,
        deadline: float | None = None,
        **more: object,
    ) -> None:
        self.finished = threading.Event()
        self.shown: list[tuple[int, int, torch.Tensor]] = []
        labels = [i % 10 for i in range(count)] if labels is None else labels
        self.job = slots.submit(
            ImageRequest(range(first, first + count), labels, sampling, **more),  # type: ignore[arg-type]
            deadline,
            on_image=lambda *shown: self.shown.append(shown),
            on_done=lambda job: self.finished.set(),
        )

    def wait(self) -> Job:
        assert self.finished.wait(120), "the job did not end within 120 s"
        return self.job

    def moved(self) -> None:
        """Returns once the job has begun."""
        while not self.job.steps_done:
            time.sleep(0.001)
