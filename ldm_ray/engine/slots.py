"""Per-image batching: images of many requests denoised together, each at a timestep of its own.

One thread works in rounds: it takes in new jobs, chooses images, lays them in tiles of the generator's fixed sizes,
takes some steps with each tile, decodes finished images and hands them out. Images join and leave between steps, so
a job of few steps never waits for one of many. An image's bytes are those that ``Generator`` makes of the same
seed, label and settings, whatever else is in its tile. No Ray here. n images of a job, D latent, S steps.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ldm_ray.engine.board import Board, Image, Leg, Tile, tiles_of
from ldm_ray.engine.generator import Generator
from ldm_ray.engine.jobs import Job, OnImage, Outcome
from ldm_ray.engine.request import ImageRequest
from ldm_ray.engine.tiles import single_threaded
from ldm_ray.settings.errors import ConfigError

RECENT_S = 5.0  # seconds of work that the rate is measured over
LEG = 64  # the most steps that a tile takes in a round
LEG_CROWDED = 4  # the same when there are more tiles than threads
log = logging.getLogger(__name__)


class Closed(Exception):
    """The slots take no more jobs."""


@dataclass
class Figures:
    """Counters since the start; they only grow."""

    steps: int = 0  # of all images
    rows: int = 0  # the same, with the rows that only fill tiles up
    images: int = 0
    busy_s: float = 0.0
    work: int = 0  # denoiser rows


class Slots:
    """The scheduler over one generator. ``close`` it at the end."""

    def __init__(self, generator: Generator, capacity: int | None = None) -> None:
        """capacity: images that advance in one round [four of the largest tiles, or two for each thread if more]."""
        self.generator = generator
        tiles = generator.tiles
        self.capacity = capacity or tiles.sizes[-1] * max(4, 2 * tiles.threads)
        self.board = Board(generator)
        self.figures = Figures()
        self.live: list[Image] = []
        self._waiting: list[Job] = []
        self._work: Counter[int] = Counter()  # denoiser rows of the unfinished jobs, by their steps
        self._open = 0
        self._recent = (0.0, 0.0)  # (denoiser rows, seconds) of the latest rounds
        self._closed = self._stopping = False
        self._wake = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="slots", daemon=True)
        self._thread.start()

    # --- from any thread ---

    def submit(
        self,
        request: ImageRequest,
        deadline: float | None = None,
        on_image: OnImage | None = None,
        on_done: Callable[[Job], None] | None = None,
    ) -> Job:
        """Takes a request in. ConfigError: the model cannot make it. Closed: no more are taken.

        deadline: a ``time.monotonic()``. ``on_image(i, step, pixels (H, W) uint8)`` comes after each of the request's
        shown steps, ``on_done(job)`` once, when every image has its outcome; both in the thread of the slots, which
        waits for them.
        """
        if request.sampling is not None and request.sampling.precision != "fp32":
            raise ConfigError("images of many requests are made in fp32: the precision is one for all of them")
        job = Job(request, self.generator.course(request), deadline, on_image, on_done)
        with self._wake:
            if self._closed:
                raise Closed
            self._work[job.steps] += job.work
            self._open += job.open
            self._waiting.append(job)
            self.board.changed = True
            self._wake.notify_all()
        return job

    def cancel(self, job: Job) -> None:
        """Ends a job after the step it is in; its open images come out as cancelled."""
        with self._wake:
            job.cancelled = True
            self.board.changed = True
            self._wake.notify_all()

    @property
    def outstanding(self) -> int:
        """Denoiser rows of the unfinished jobs."""
        with self._wake:
            return self._work.total()

    def wait(self, steps: int, work: int) -> float:
        """An estimate of the seconds in which a new job of so many steps and denoiser rows would be finished.

        It follows from how ``choose`` shares the capacity. Jobs of as many steps are finished in their order, so the
        new job waits for those; it overtakes jobs of more steps, with half of the capacity. Jobs of fewer steps may
        overtake it for as long as they come; then it gets the other half, in which all jobs come in their order.
        """
        with self._wake:
            total, same = self._work.total(), self._work[steps]
            shorter = any(rows for other, rows in self._work.items() if other < steps)
        before, share = (total, 0.5) if shorter else (same, 0.5 if total > same else 1.0)
        return (before + work) / (share * self.rate) if self.rate else 0.0

    @property
    def alive(self) -> bool:
        """Whether jobs are being worked on; False after ``close``."""
        return self._thread.is_alive()

    @property
    def open(self) -> int:
        """Images without an outcome."""
        return self._open

    @property
    def rate(self) -> float:
        """Denoiser rows per second of work, lately; 0 before the first round."""
        work, busy = self._recent
        return work / busy if busy else 0.0

    def close(self, drain_s: float = 0.0) -> None:
        """Takes no more jobs, gives the running ones ``drain_s`` seconds, cancels the rest and ends the thread."""
        with self._wake:
            self._closed = True
            self._wake.wait_for(lambda: not self._work.total(), timeout=drain_s)
            self._stopping = self.board.changed = True
            self._wake.notify_all()
        self._thread.join()

    # --- in the thread of the slots ---

    def _run(self) -> None:
        with single_threaded():
            while self._wait():
                started, before = time.perf_counter(), self.figures.work
                try:
                    self._round()
                except Exception:  # nothing may end this thread: what is live fails, later jobs go on
                    log.exception("a round of the slots failed")
                    self._settle(self.live, Outcome.FAILED)
                spent = time.perf_counter() - started
                self.figures.busy_s += spent
                keep = 1.0 if self._recent[1] < RECENT_S else 0.5
                self._recent = (self._recent[0] * keep + self.figures.work - before, self._recent[1] * keep + spent)

    def _wait(self) -> bool:
        """Waits for something to do; False at the end, when every open job has been cancelled."""
        with self._wake:
            self._wake.wait_for(lambda: self._stopping or self._waiting or self.live)
            jobs, self._waiting = self._waiting, []
            self.board.changed = False
        if self._stopping:
            for job in {id(image.job): image.job for image in self.live}.values():
                job.cancelled = True
            for job in jobs:
                job.cancelled = True
        self._join(jobs)
        return bool(self.live) or not self._stopping

    def _join(self, jobs: list[Job]) -> None:
        for job in jobs:  # not in submit: torch in the caller's thread would have to wait for the tiles
            job.images = torch.zeros(job.open, *self.generator.codec.image_size, dtype=torch.uint8)
            job.latents = torch.zeros(job.open, self.generator.codec.latent_dim)
        joined = [Image(job, i) for job in jobs for i in range(job.open)]
        if joined:
            self.board.join(joined)
            self.live += joined

    def _round(self) -> None:
        now = time.monotonic()
        self._settle([image for image in self.live if image.job.cancelled], Outcome.CANCELLED)
        self._settle([i for i in self.live if i.job.deadline is not None and i.job.deadline <= now], Outcome.EXPIRED)
        if not self.live:
            return
        self.board.next_deadline = min((i.job.deadline for i in self.live if i.job.deadline is not None), default=None)
        chosen = choose(self.live, self.capacity)
        tiles = tiles_of(chosen, self.generator.tiles.size_for, LEG)
        if len(tiles) > self.generator.tiles.threads:
            for tile in tiles:
                tile.limit = min(tile.limit, LEG_CROWDED)
        self._hand_out(tiles, self.generator.tiles.map(self.board.leg, tiles))

    def _hand_out(self, tiles: list[Tile], legs: list[Leg | None]) -> None:
        """Counts the work of a round, shows the images on their way and settles the finished ones."""
        done: list[Image] = []
        failed: list[Image] = []
        for tile, leg in zip(tiles, legs, strict=True):
            if leg is None:
                failed += tile.images
                continue
            done, failed = done + leg.done, failed + leg.failed
            for image in tile.images:
                image.job.steps_done += leg.taken
            self.figures.steps += leg.taken * len(tile.images)
            self.figures.rows += leg.taken * tile.size
            self.figures.work += (leg.taken + leg.guided) * len(tile.images)
            self.figures.images += len(leg.done) + len(leg.failed)
            for image, picture in leg.shown:
                if image.job.on_image is not None and not image.job.cancelled:
                    call(image.job.on_image, image.index, image.step, picture)
        self._settle(done, Outcome.DONE)
        self._settle(failed, Outcome.FAILED)

    def _settle(self, images: list[Image], outcome: Outcome) -> None:
        """Gives images an outcome and takes them off the board."""
        if not images:
            return
        settled = set(images)
        self.live = [image for image in self.live if image not in settled]
        self.board.leave(images)
        done: list[Job] = []
        for image in images:
            image.job.outcomes[image.index] = outcome
            image.job.open -= 1
            if not image.job.open:
                done.append(image.job)
        with self._wake:
            for job in done:
                self._work[job.steps] -= job.work
            self._open -= len(images)
            self._wake.notify_all()
        for job in done:
            if job.on_done is not None:
                call(job.on_done, job)


def call(callback: Callable[..., None], *arguments: object) -> None:
    """Calls a job's callback; an error in it is logged and goes no further."""
    try:
        callback(*arguments)
    except Exception:
        log.exception("a job's callback failed")


def choose(live: list[Image], capacity: int) -> list[Image]:
    """The images of a round: all of them; if they are too many, half of the capacity goes to those with the fewest
    steps left, half to those that came first.

    Both halves finish jobs one after another. An equal share for every job would finish all of them late.
    """
    if len(live) <= capacity:
        return live
    short = sorted(live, key=lambda image: image.job.steps - image.step)[: capacity // 2]
    taken = set(short)
    rest = (image for image in live if image not in taken)  # in the order in which they came
    return short + list(itertools.islice(rest, capacity - len(short)))
