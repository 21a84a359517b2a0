"""From a checked request to images: admission, deadlines, cancellation, what became of each image."""

import asyncio
import math
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from ldm_ray.diffusion.samplers import denoiser_rows
from ldm_ray.engine.items import Made, parameters, parameters_of_one
from ldm_ray.engine.jobs import Job, Outcome
from ldm_ray.engine.requests import (
    GenerationRequest,
    checked_labels,
    labels_of,
    sampling_of,
    scale_of,
    seeds_of,
)
from ldm_ray.engine.slots import Closed
from ldm_ray.service.encoder import Encoder
from ldm_ray.service.errors import ApiError, invalid
from ldm_ray.service.library import Library, Served
from ldm_ray.service.metrics import Metrics
from ldm_ray.service.settings import Settings
from ldm_ray.settings.limits import MAX_SEED, SIDE
from ldm_ray.settings.sampling import SamplingConfig

SURE = 0.7  # share of the deadline within which an image is promised: the rate is an estimate
CACHED = 4096  # permalink images
ANSWERS = 8  # largest answers that may be on their way at once
REASONS = {
    Outcome.FAILED: ApiError(500, "this image came out as numbers that are not finite", code="not_finite"),
    Outcome.EXPIRED: ApiError(408, "the deadline came before this image was finished"),
    Outcome.CANCELLED: ApiError(503, "the server stopped before this image was finished", headers={"Retry-After": "5"}),
}


def resolve(finished: asyncio.Future[None]) -> None:
    """Wakes who waits, if anybody still does."""
    if not finished.done():
        finished.set_result(None)


@dataclass(frozen=True)
class Order:
    """What is to be made, by which model."""

    served: Served
    seeds: Sequence[int]
    labels: Sequence[int | None]
    sampling: SamplingConfig | None
    start: torch.Tensor | None = None
    scale: int = 1  # pixels of the answer for each pixel
    show: Sequence[int] = ()  # after which steps the images so far are part of the answer

    @cached_property
    def steps(self) -> int:
        return 0 if self.sampling is None else len(self.served.slots.plan(self.sampling))

    @property
    def work(self) -> int:
        """Denoiser rows, at least one an image."""
        if self.sampling is None:
            return len(self.seeds)
        return len(self.seeds) * denoiser_rows(self.served.slots.plan(self.sampling), self.sampling.guidance_scale)

    @property
    def pixels_of_one(self) -> int:
        return (SIDE * self.scale) ** 2

    @property
    def pixels(self) -> int:
        """Pixels that the answer holds."""
        return len(self.seeds) * self.pixels_of_one * (1 + len(self.show))

    def text(self) -> dict[str, str]:
        """What every image's PNG says, beside seed and label."""
        served = self.served
        return parameters(served.name, served.generator.sha256, served.fingerprint, self.sampling, self.steps)


class Service:
    """One replica's state, shared by all routes."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.library = settings, Library(settings)
        self.metrics = Metrics(lambda: {name: served.slots for name, served in list(self.library.loaded.items())})
        self.encoder = Encoder()
        self.pixels = 0  # of the answers that are being made
        self.draining = False
        self.cache: OrderedDict[tuple[object, ...], bytes] = OrderedDict()

    def close(self) -> None:
        self.draining = True
        self.library.close()
        self.encoder.close()

    # --- from a request to an order ---

    async def order(self, request: GenerationRequest) -> Order:
        """Refused, or ApiError: what cannot be made."""
        served = await self.library.get(request.model)
        labels = self.labels(served, labels_of(request, served.generator.class_names))
        seeds = seeds_of(request, secrets.randbelow(MAX_SEED - request.n + 2))
        sampling = sampling_of(request, served.slots.plan)
        return Order(served, seeds, labels, sampling, scale=scale_of(request.size))

    def labels(self, served: Served, labels: Sequence[int | None]) -> list[int | None]:
        """Refused: a label that the model does not make."""
        return checked_labels(labels, served.generator.num_classes, served.only_digit, served.name)

    # --- from an order to images ---

    def admit(self, order: Order) -> None:
        """ApiError: 400 more than one request may be, 429 more than there is room for, 503 while draining."""
        if self.draining:
            raise ApiError(503, "the server is stopping", headers={"Retry-After": "5"})
        limits, slots = self.settings, order.served.slots
        work, pixels = order.work, order.pixels
        if work > limits.max_work:
            told = f"n × steps, guided ones twice, is {work:,}; at most {limits.max_work:,} is allowed"
            raise invalid("n", told, "too_much_work")
        if pixels > limits.max_pixels:
            frames = f" × {1 + len(order.show)} frames" if order.show else ""
            told = f"{len(order.seeds)} images × {order.pixels_of_one:,} pixels{frames} is {pixels:,} pixels; at most "
            told += f"{limits.max_pixels:,} are allowed: ask for fewer images, a smaller size or fewer frames (steps)"
            raise invalid("size", told, "too_many_pixels")
        queued = sum(served.slots.outstanding for served in self.library.loaded.values())
        images = sum(served.slots.open for served in self.library.loaded.values())
        rate = slots.rate or math.inf
        late = slots.wait(order.steps, work) - SURE * limits.deadline_s  # by so much it would be too late
        excess = queued + work - limits.max_queue
        crowded = queued and (late > 0 or excess > 0 or images + len(order.seeds) > limits.max_images)
        if crowded or (self.pixels and self.pixels + pixels > ANSWERS * limits.max_pixels):
            wait = math.ceil(min(60.0, max(1.0, late, excess / rate)))
            raise ApiError(429, f"the queue is full; try again in {wait} s", headers={"Retry-After": str(wait)})

    @contextmanager
    def taken(self, order: Order) -> Iterator[None]:
        """Counts an order among those that are being made, until its answer is encoded. ApiError as ``admit``."""
        self.admit(order)
        self.pixels += order.pixels
        try:
            yield
        finally:
            self.pixels -= order.pixels

    def deadline(self) -> float:
        """The ``time.monotonic()`` by which a request of now must have its answer."""
        return time.monotonic() + self.settings.deadline_s

    async def run(
        self,
        order: Order,
        on_image: Callable[[int, int, np.ndarray], None] | None = None,
        deadline: float | None = None,
    ) -> Job:
        """Makes an admitted order's images and waits for them; cancels them when the caller is cancelled.

        ``on_image(i, step, pixels (H, W))`` comes in the event loop.
        """
        loop = asyncio.get_running_loop()
        finished: asyncio.Future[None] = loop.create_future()

        def done(_: Job) -> None:
            loop.call_soon_threadsafe(resolve, finished)

        def shown(i: int, step: int, picture: torch.Tensor) -> None:
            if on_image is not None:
                loop.call_soon_threadsafe(on_image, i, step, picture.numpy())

        job = Job(
            seeds=order.seeds,
            labels=order.labels,
            sampling=order.sampling,
            start=order.start,
            show=order.show,
            deadline=self.deadline() if deadline is None else deadline,
            on_image=shown if order.show else None,
            on_done=done,
        )
        started = time.perf_counter()
        try:
            order.served.slots.submit(job)
        except Closed:  # replaced by a newer checkpoint a moment ago, or stopping
            raise ApiError(503, "the model has just changed; try again", headers={"Retry-After": "1"}) from None
        try:
            await finished
        finally:
            order.served.slots.cancel(job)
        self.metrics.stages.labels("sample").observe(time.perf_counter() - started)
        return job

    def made(self, order: Order, job: Job) -> list[Made]:
        """What became of each image. ApiError when there is not one."""
        common, pixels, found = order.text(), job.images.numpy(), []
        for i, (seed, label, outcome) in enumerate(zip(order.seeds, order.labels, job.outcomes, strict=True)):
            text = parameters_of_one(common, seed, label)
            if outcome is Outcome.DONE:
                found.append(Made(pixels[i], seed, label, text))
            else:
                assert outcome is not None
                found.append(Made(None, seed, label, text, REASONS[outcome].body()))
        if all(made.pixels is None for made in found):
            assert job.outcomes[0] is not None
            raise REASONS[job.outcomes[0]]
        return found
