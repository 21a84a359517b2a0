"""Per-image batching: images of many requests denoised together, each at a timestep of its own.

A thread goes round and round: it takes in new jobs, picks images, lays them in tiles of the generator's fixed
sizes, takes some steps with each tile, decodes what is finished and hands it out. Images join and leave between
steps, so a job of few steps never waits for one of many. An image's bytes are those that ``Generator`` makes of
the same seed, label and settings, whatever else is in its tile. No Ray here. n images of a job, D latent, S steps.
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

from ldm_ray.diffusion.samplers import Plan, plan_of
from ldm_ray.engine.board import Board, Image, Leg, Tile, tiles_of
from ldm_ray.engine.generator import Generator
from ldm_ray.engine.jobs import Job, Outcome
from ldm_ray.settings.errors import ConfigError
from ldm_ray.settings.limits import MAX_SEED
from ldm_ray.settings.sampling import SamplingConfig

PLANS_KEPT = 256
RECENT_S = 5.0  # seconds of work that the rate is measured over
LEG = 64  # most steps that a tile takes in one go, while nothing else happens
LEG_CROWDED = 4  # the same where there are more tiles than threads
log = logging.getLogger(__name__)


class Closed(Exception):
    """The slots take no more jobs."""


@dataclass
class Figures:
    """Counters since the start; they only grow."""

    steps: int = 0  # of images
    rows: int = 0  # steps with the rows that only fill tiles up
    images: int = 0
    busy_s: float = 0.0
    work: int = 0  # denoiser rows of jobs


class Slots:
    """The scheduler over one generator. ``close`` it at the end."""

    def __init__(self, generator: Generator, capacity: int | None = None) -> None:
        """capacity: images that advance in one round; [four of the largest tiles, two for each thread]."""
        self.generator = generator
        tiles = generator.tiles
        self.capacity = capacity or tiles.sizes[-1] * max(4, 2 * tiles.threads)
        self.board = Board(generator)
        self.figures = Figures()
        self.live: list[Image] = []
        self._waiting: list[Job] = []
        self._plans: dict[SamplingConfig, tuple[int, Plan]] = {}
        self._plan_count = 0
        self._work: Counter[int] = Counter()  # denoiser rows of the jobs that are not finished, by their steps
        self._open = 0
        self._recent = (0.0, 0.0)  # (denoiser rows, seconds) of the last rounds
        self._closed = self._stopping = False
        self._wake = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="slots", daemon=True)
        self._thread.start()

    # --- from any thread ---

    def plan(self, sampling: SamplingConfig) -> Plan:
        """The plan of some settings. ConfigError: more steps than the model has timesteps."""
        return self._plan(sampling)[1]

    def submit(self, job: Job) -> None:
        """Takes a job in. ConfigError: seeds, labels or settings that cannot be. Closed: while shutting down."""
        count = len(job.seeds)
        if not count or count != len(job.labels):
            raise ConfigError(f"{count} seeds and {len(job.labels)} labels: as many of each, at least one")
        if any(seed not in range(MAX_SEED + 1) for seed in job.seeds):
            raise ConfigError(f"a seed is 0 to {MAX_SEED}")
        classes = self.generator.num_classes
        if any(label is not None and label not in range(classes) for label in job.labels):
            raise ConfigError(f"a label is 0 to {classes - 1}, or None")
        dim = self.generator.codec.latent_dim
        if job.start is not None and (job.start.shape != (count, dim) or not bool(torch.isfinite(job.start).all())):
            raise ConfigError(f"start latents are {count} times {dim} finite numbers")
        if job.sampling is None and job.start is None:
            raise ConfigError("a job without settings only decodes: it needs its latents")
        if job.sampling is not None:
            if job.sampling.precision != "fp32":
                raise ConfigError("images of many requests are made in fp32: the precision is one for all of them")
            job.plan_id, job.plan = self._plan(job.sampling)
            job.noisy = any(step.sigma for step in job.plan)
            guided = [i for i, step in enumerate(job.plan) if step.guided and job.scale != 1]
            job.guided_from = min(guided, default=len(job.plan))
        job.outcomes, job.open = [None] * count, count
        with self._wake:
            if self._closed:
                raise Closed
            self._work[len(job.plan)] += job.work
            self._open += count
            self._waiting.append(job)
            self.board.changed = True
            self._wake.notify_all()

    def cancel(self, job: Job) -> None:
        """Ends a job after the step that is being taken; its open images come out as cancelled."""
        with self._wake:
            job.cancelled = True
            self.board.changed = True
            self._wake.notify_all()

    @property
    def outstanding(self) -> int:
        """Denoiser rows of the jobs taken in and not finished."""
        with self._wake:
            return self._work.total()

    def wait(self, steps: int, work: int) -> float:
        """Seconds by which a new job of so many steps and denoiser rows would be finished, at the rate of late.

        As ``choose`` has it: among jobs of the same steps it waits for those before it. It passes what takes more
        steps, with half of the capacity. What takes fewer may go on passing it for as long as such jobs come, and
        then half of the capacity works off all that is there in its order.
        """
        with self._wake:
            every, same = self._work.total(), self._work[steps]
            shorter = sum(there for taken, there in self._work.items() if taken < steps)
        before, share = (every, 0.5) if shorter else (same, 0.5 if every > same else 1.0)
        return (before + work) / (share * self.rate) if self.rate else 0.0

    @property
    def alive(self) -> bool:
        """Whether jobs are being worked on; False after ``close``."""
        return self._thread.is_alive()

    @property
    def open(self) -> int:
        """Images of the jobs taken in that have no outcome."""
        return self._open

    @property
    def rate(self) -> float:
        """Denoiser rows per second while busy, lately; 0 before the first."""
        work, busy = self._recent
        return work / busy if busy else 0.0

    def close(self, drain_s: float = 0.0) -> None:
        """Takes no more jobs, gives the running ones ``drain_s`` seconds, cancels the rest, ends the thread."""
        with self._wake:
            self._closed = True
            self._wake.wait_for(lambda: not self._work.total(), timeout=drain_s)
            self._stopping = self.board.changed = True
            self._wake.notify_all()
        self._thread.join()

    # --- in the thread of the slots ---

    def _run(self) -> None:
        from ldm_ray.engine.tiles import single_threaded

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
        """Waits for something to do; False at the end, when all that was open has been cancelled."""
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
        for job in jobs:  # here rather than in submit: what a caller's thread does with torch waits for the tiles
            count = len(job.seeds)
            job.images = torch.zeros(count, *self.generator.codec.image_size, dtype=torch.uint8)
            job.latents = torch.zeros(count, self.generator.codec.latent_dim)
        joined = [Image(job, i, job.seeds[i]) for job in jobs for i in range(len(job.seeds))]
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
        """Counts what was done, shows and settles what came of it."""
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
                    called(image.job.on_image, image.index, image.step, picture)
        self._settle(done, Outcome.DONE)
        self._settle(failed, Outcome.FAILED)

    def _settle(self, images: list[Image], outcome: Outcome) -> None:
        """Gives images their outcome and takes them out."""
        if not images:
            return
        gone = set(images)
        self.live = [image for image in self.live if image not in gone]
        self.board.leave(images)
        done: list[Job] = []
        for image in images:
            image.outcome = image.job.outcomes[image.index] = outcome
            image.job.open -= 1
            if not image.job.open:
                done.append(image.job)
        with self._wake:
            for job in done:
                self._work[len(job.plan)] -= job.work
            self._open -= len(images)
            self._wake.notify_all()
        for job in done:
            if job.on_done is not None:
                called(job.on_done, job)

    def _plan(self, sampling: SamplingConfig) -> tuple[int, Plan]:
        found = self._plans.get(sampling)
        if found is None:
            if len(self._plans) >= PLANS_KEPT:
                self._plans.clear()
            alone = sampling.sampling_at(1.0)  # guidance changes nothing in a plan
            found = self._plans.get(alone)
            if found is None:
                plan = plan_of(self.generator.schedule, sampling, self.generator.prediction_type)
                self._plan_count += 1
                found = self._plans[alone] = (self._plan_count, plan)
            self._plans[sampling] = found
        return found


def called(function: Callable[..., None], *given: object) -> None:
    """Calls what belongs to a job; an error in it is logged and goes no further."""
    try:
        function(*given)
    except Exception:
        log.exception("a job's callback failed")


def choose(live: list[Image], capacity: int) -> list[Image]:
    """The images of a round: all, or, where there are too many, half by fewest steps left and half by who came first.

    Both halves finish jobs one after the other. Shares for all would finish all of them late.
    """
    if len(live) <= capacity:
        return live
    short = sorted(live, key=lambda image: len(image.job.plan) - image.step)[: capacity // 2]
    there = set(short)
    rest = (image for image in live if image not in there)  # in the order in which they came
    return short + list(itertools.islice(rest, capacity - len(short)))
