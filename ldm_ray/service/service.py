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

from ldm_ray.diffusion.samplers import Plan
from ldm_ray.engine.items import Made, parameters, parameters_of_one
from ldm_ray.engine.jobs import Job, Outcome
from ldm_ray.engine.request import ImageRequest
from ldm_ray.engine.schema import (
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

SURE = 0.7  # share of the deadline within which an image is promised: the rate is an estimate
CACHED = 4096  # permalink images
ANSWERS = 8  # largest answers that may be on their way at once
REASONS = {
    Outcome.FAILED: ApiError(500, "this image came out as numbers that are not finite", code="not_finite"),
    Outcome.EXPIRED: ApiError(408, "the deadline came before this image was finished"),
    Outcome.CANCELLED: ApiError(503, "the server stopped before this image was finished", headers={"Retry-After": "5"}),
}


def resolve(finished: asyncio.Future[None]) -> None:
    """Wakes the waiting task, if it still waits."""
    if not finished.done():
        finished.set_result(None)


@dataclass(frozen=True, kw_only=True)
class Order(ImageRequest):
    """A request to one of the models."""

    served: Served
    scale: int = 1  # pixels of the answer for each pixel

    @cached_property
    def steps(self) -> int:
        return len(self.plan)

    @cached_property
    def plan(self) -> Plan:
        return () if self.sampling is None else self.served.generator.plan(self.sampling)

    @property
    def work(self) -> int:
        """Denoiser rows, at least one an image."""
        return self.rows(self.plan)

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
        sampling = sampling_of(request, served.generator.plan)
        return Order(seeds, labels, sampling, served=served, scale=scale_of(request.size))

    def labels(self, served: Served, labels: Sequence[int | None]) -> list[int | None]:
        """Refused: a label that the model does not make."""
        return checked_labels(labels, served.generator.num_classes, served.only_digit, served.name)

    # --- from an order to images ---

    def admit(self, order: Order) -> None:
        """ApiError: 400 too large for one request, 429 no room at present, 503 while draining."""
        if self.draining:
            raise ApiError(503, "the server is stopping", headers={"Retry-After": "5"})
        limits, slots = self.settings, order.served.slots
        work, pixels = order.work, order.pixels
        if work > limits.max_work:
            message = f"n × steps, guided ones twice, is {work:,}; at most {limits.max_work:,} is allowed"
            raise invalid("n", message, "too_much_work")
        if pixels > limits.max_pixels:
            frames = f" × {1 + len(order.show)} frames" if order.show else ""
            count, most = (
                f"{len(order.seeds)} images × {order.pixels_of_one:,} pixels{frames}",
                f"{limits.max_pixels:,}",
            )
            message = f"{count} is {pixels:,} pixels; at most {most} are allowed: "
            message += "ask for fewer images, a smaller size or fewer frames (steps)"
            raise invalid("size", message, "too_many_pixels")
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
        """Admits an order and counts its pixels until its answer is encoded. ApiError as ``admit``."""
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

        deadline = self.deadline() if deadline is None else deadline
        started = time.perf_counter()
        try:
            job = order.served.slots.submit(order, deadline, shown if order.show else None, done)
        except Closed:  # replaced by a newer checkpoint a moment ago, or stopping
            raise ApiError(503, "the model has just changed; try again", headers={"Retry-After": "1"}) from None
        try:
            await finished
        finally:
            order.served.slots.cancel(job)
        self.metrics.stages.labels("sample").observe(time.perf_counter() - started)
        return job

    def made(self, order: Order, job: Job) -> list[Made]:
        """What became of each image. ApiError when none came out."""
        common, pixels, images = order.text(), job.images.numpy(), []
        for i, (seed, label, outcome) in enumerate(zip(order.seeds, order.labels, job.outcomes, strict=True)):
            text = parameters_of_one(common, seed, label)
            if outcome is Outcome.DONE:
                images.append(Made(pixels[i], seed, label, text))
            else:
                assert outcome is not None
                images.append(Made(None, seed, label, text, REASONS[outcome].body()))
        if all(image.pixels is None for image in images):
            assert job.outcomes[0] is not None
            raise REASONS[job.outcomes[0]]
        return images
