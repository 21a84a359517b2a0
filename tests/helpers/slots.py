"""A job of the slots that can be waited for."""

from __future__ import annotations

import threading
import time

import torch

from ldm_ray.engine.jobs import Job
from ldm_ray.engine.slots import Slots
from ldm_ray.settings.sampling import SamplingConfig


class Waited:
    def __init__(
        self, slots: Slots, count: int, sampling: SamplingConfig | None, first: int = 0, **more: object
    ) -> None:
        self.finished = threading.Event()
        self.shown: list[tuple[int, int, torch.Tensor]] = []
        self.job = Job(
            seeds=range(first, first + count),
            labels=more.pop("labels", [i % 10 for i in range(count)]),  # type: ignore[arg-type]
            sampling=sampling,
            on_done=lambda job: self.finished.set(),
            on_image=lambda *shown: self.shown.append(shown),
            **more,  # type: ignore[arg-type]
        )
        slots.submit(self.job)

    def wait(self) -> Job:
        assert self.finished.wait(120), "the job did not end within 120 s"
        return self.job

    def moved(self) -> None:
        """Returns once the job has begun."""
        while not self.job.steps_done:
            time.sleep(0.001)
