"""The numbers behind ``slots.py``: the state of every image, and the steps that a tile of images takes.

B rows of a tile (its size), n ≤ B images in it, D latent, N places on the board, K steps of a leg.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from ldm_ray.devices.device import sent
from ldm_ray.diffusion.guidance import guided
from ldm_ray.diffusion.noise import gaussian
from ldm_ray.diffusion.samplers import WEIGHTS, Step, sample
from ldm_ray.engine.generator import Generator, filled
from ldm_ray.engine.jobs import Job

AHEAD = 32, 4096  # at most so many steps of noise, and so many numbers, are drawn for an image at a time
log = logging.getLogger(__name__)


class Image:
    """An image between two steps: it has taken ``step`` of its plan's, and its state is at ``place`` of the board."""

    __slots__ = ("drawn", "index", "job", "place", "step")

    def __init__(self, job: Job, index: int) -> None:
        self.job, self.index = job, index
        self.step = self.place = 0
        self.drawn = -1  # the first step whose noise is on the board; −1: none

    @property
    def seed(self) -> int:
        return self.job.request.seeds[self.index]


@dataclass
class Tile:
    """Images that are computed together. Either all begin guided, or all begin unguided, or all have taken their
    last step and are only decoded."""

    images: list[Image]
    size: int
    limit: int = 1  # the most steps it may take; 0: only decoded


@dataclass
class Leg:
    """What a tile did."""

    taken: int = 0  # steps of each image
    guided: int = 0  # how many of these were guided
    done: list[Image] = field(default_factory=list)  # finished; pixels and latents are in their jobs
    failed: list[Image] = field(default_factory=list)  # finished, but as numbers that are not finite
    shown: list[tuple[Image, Tensor]] = field(default_factory=list)  # with the pixels (H, W) uint8 predicted so far


def tiles_of(images: Sequence[Image], size_for: Callable[[int], int], limit: int = 1) -> list[Tile]:
    """Images in tiles, those at the same step of the same course side by side."""
    tiles: list[Tile] = []
    still = [image for image in images if image.step == image.job.steps]
    moving = [image for image in images if image.step < image.job.steps]
    unguided = [image for image in moving if image.step < image.job.guided_from]
    guided = [image for image in moving if image.step >= image.job.guided_from]
    for chosen, steps in ((still, 0), (unguided, limit), (guided, limit)):
        if not chosen:
            continue
        chosen.sort(key=course_and_step)
        size = size_for(len(chosen))
        tiles += [Tile(chosen[i : i + size], size, steps) for i in range(0, len(chosen), size)]
    return tiles


def course_and_step(image: Image) -> tuple[int, int]:
    return id(image.job.course), image.step


class Board:
    """The state of all images, each at a place of its own; places are used again."""

    def __init__(self, generator: Generator) -> None:
        self.generator, self.device, self.dim = generator, generator.device, generator.codec.latent_dim
        self.ahead = max(2, min(AHEAD[0], AHEAD[1] // self.dim))
        self.changed = False  # set from any thread: running legs end after their step
        self.next_deadline: float | None = None
        self._free: list[int] = []
        with torch.inference_mode():
            self.latents = torch.zeros(0, self.dim, device=self.device)  #       (N, D)
            self.x0s = torch.zeros(0, 2, self.dim, device=self.device)  #     (N, 2, D) predicted one and two steps ago
            self.labels = torch.zeros(0, dtype=torch.int64, device=self.device)  # (N,)
            self.noise = torch.zeros(0, self.ahead, self.dim, device=self.device)  # (N, ahead, D)
        self._grow(generator.tiles.sizes[-1])

    @torch.inference_mode()
    def join(self, images: list[Image]) -> None:
        """Gives images places, labels and the latents that they start from; noise is drawn in their first leg."""
        while len(self._free) < len(images):
            self._grow(2 * len(self.latents))
        for image in images:
            image.place = self._free.pop()
        places = self._places(images)
        self.x0s[places] = 0.0
        self.labels[places] = self.generator.labels_of([image.job.request.labels[image.index] for image in images])
        for image in images:
            start = image.job.request.start
            if start is not None:
                self.latents[image.place] = sent(start[image.index], self.device)

    def leave(self, images: list[Image]) -> None:
        self._free += [image.place for image in images]

    def leg(self, tile: Tile) -> Leg | None:
        """Takes steps with a tile's images and decodes those that are finished or shown. None: an error, logged.

        It takes at least one step, at most the tile's limit, and ends earlier when an image is finished or shown,
        when some images become guided and others do not, when something changed, and at a deadline.
        """
        try:
            leg = self._steps(tile) if tile.limit else Leg()
            for image in tile.images:
                image.step += leg.taken
            self._decode(tile, leg)
            return leg
        except Exception:
            log.exception("a tile of %d images failed", len(tile.images))
            return None

    @torch.inference_mode()
    def _steps(self, tile: Tile) -> Leg:
        images, size = tile.images, tile.size
        limit = min(tile.limit, min(self._until_stop(image) for image in images))
        unguided = {max(0, image.job.guided_from - image.step) for image in images}  # steps before guidance
        if len(unguided) > 1:
            limit = min(limit, *unguided)
        switch = min(unguided)
        self._draw(images)
        noisy = [image for image in images if image.job.course.noisy]
        limit = min([limit, *(image.drawn + self.ahead - image.step - 1 for image in noisy)])
        places = self._places(images)
        rows = filled(places, size)
        noise = self._noise_of(images, rows, limit) if noisy else []
        runs = [list(run) for _, run in groupby(images, key=course_and_step)]
        first = images[0]
        alike = len(runs) == 1
        steps = first.job.course.plan[first.step :][:limit] if alike else self._side_by_side(runs, limit, switch, size)
        plain = self.generator.denoiser
        denoise_guided = guided(plain, self._scale(tile), self.generator.null_label) if switch < limit else None
        latents, (before, earlier) = self.latents[rows], self.x0s[rows].unbind(dim=1)  # (B, D) each
        x0s = before, earlier
        path = sample(plain, steps, latents, self.labels[rows], lambda i: noise[i - 1], denoise_guided, x0s)
        for taken, (latents, x0) in enumerate(path, 1):  # noqa: B007
            before, earlier = x0, before
            if self.changed or (self.next_deadline is not None and time.monotonic() >= self.next_deadline):
                break
        self.latents[places] = latents[: len(images)]
        self.x0s[places] = torch.stack([before, earlier], dim=1)[: len(images)]
        return Leg(taken, guided=max(0, taken - switch))

    @torch.inference_mode()
    def _decode(self, tile: Tile, leg: Leg) -> None:
        """Decodes what is finished or shown, in the thread of the tile, and gives it to the jobs."""
        finished = [image for image in tile.images if image.step == image.job.steps]
        shown = [image for image in tile.images if image.step in image.job.request.show and image.step]
        if not finished and not shown:
            return
        latents = torch.cat([self.latents[self._places(finished)], self.x0s[self._places(shown), 0]])
        parts = [self.generator.decode_tile(part, tile.size) for part in latents.split(tile.size)]
        decoded, are_finite = (torch.cat(part) for part in zip(*parts, strict=True))
        finite, pictures, latents = are_finite.tolist(), decoded[:, 0].cpu(), latents.cpu()
        fine = [i for i in range(len(finished)) if finite[i]]
        for _, run in groupby(fine, key=lambda i: id(finished[i].job)):
            rows = list(run)
            job, indices = finished[rows[0]].job, [finished[i].index for i in rows]
            job.images[indices], job.latents[indices] = pictures[rows], latents[rows]
        leg.done = [finished[i] for i in fine]
        leg.failed = [image for image, good in zip(finished, finite, strict=False) if not good]
        leg.shown = list(zip(shown, pictures[len(finished) :], strict=True))

    def _until_stop(self, image: Image) -> int:
        """Steps until an image is finished or shown."""
        stops = [*image.job.request.show, image.job.steps]
        return min(step for step in stops if step > image.step) - image.step

    def _draw(self, images: list[Image]) -> None:
        """Draws the latents that images begin with, and noise for the coming steps of those that have none left.

        It runs in the thread of the tile, and draws both in one call: for a few images the call itself is what
        takes the time.
        """

        def needs(image: Image) -> tuple[bool, bool, int]:
            """(whether it begins with noise, whether it needs more, its step)"""
            empty = image.drawn < 0 or image.step + 1 >= image.drawn + self.ahead
            return image.step == 0 and image.job.request.start is None, image.job.course.noisy and empty, image.step

        for (start, noise, step), run in groupby(sorted(images, key=needs), key=needs):
            if not start and not noise:
                continue
            group = list(run)
            seeds = self._sent([image.seed for image in group])
            count = min(self.ahead, max(image.job.steps for image in group) - step) if noise else 0
            numbers = gaussian(seeds, step if start else step + 1, self.dim, count + start)
            if start:
                self.latents[self._places(group)] = numbers[0]
            if noise:
                self.noise[self._places(group), :count] = numbers[int(start) :].transpose(0, 1)
                for image in group:
                    image.drawn = step + 1

    def _noise_of(self, images: list[Image], rows: Tensor, limit: int) -> Sequence[Tensor]:
        """Noise (B, D) of each of ``limit`` steps; images without noise get any numbers, to be multiplied by 0."""
        first = self._sent([image.step + 1 - image.drawn if image.job.course.noisy else 0 for image in images])
        offsets = filled(first, len(rows))[:, None] + torch.arange(limit, device=self.device)  # (B, K)
        return self.noise[rows[:, None], offsets.clamp_(max=self.ahead - 1)].unbind(dim=1)

    def _side_by_side(self, runs: list[list[Image]], limit: int, switch: int, size: int) -> list[Step]:
        """``limit`` steps with timesteps (B,) and weights in columns (B, 1), guided from the ``switch``-th on."""
        rows, weights = [], []
        for run in runs:
            timesteps, table = run[0].job.course.table
            coming = slice(run[0].step, run[0].step + limit)
            rows.append(timesteps[coming].expand(len(run), limit))
            weights.append(table[coming].expand(len(run), limit, len(WEIGHTS)))
        times = sent(filled(torch.cat(rows), size).T.contiguous(), self.device)  # (K, B)
        columns = filled(torch.cat(weights), size).permute(1, 2, 0).unsqueeze(-1)  # (K, 7, B, 1)
        used = columns.flatten(2).any(dim=2).tolist()  # a weight that is 0 for all is the number 0: no term
        columns = sent(columns, self.device)
        steps = []
        for k in range(limit):
            named: dict[str, Any] = {
                name: columns[k, j] if used[k][j] or j < 4 else 0.0 for j, name in enumerate(WEIGHTS)
            }
            steps.append(Step(times[k], **named, guided=k >= switch))
        return steps

    def _scale(self, tile: Tile) -> float | Tensor:
        """The guidance of a tile: one number, or a column (B, 1)."""
        scales = [image.job.request.guidance_scale for image in tile.images]
        if min(scales) == max(scales):
            return scales[0]
        return filled(sent(torch.tensor(scales, dtype=torch.float32), self.device)[:, None], tile.size)

    def _places(self, images: Sequence[Image]) -> Tensor:
        return self._sent([image.place for image in images])

    def _sent(self, numbers: Sequence[int]) -> Tensor:
        return sent(torch.tensor(numbers, dtype=torch.int64), self.device)

    @torch.inference_mode()
    def _grow(self, places: int) -> None:
        """Makes room; called between rounds only."""
        old = len(self.labels)
        self.latents, self.x0s, self.labels, self.noise = (
            torch.cat([kept, kept.new_zeros(places - old, *kept.shape[1:])])
            for kept in (self.latents, self.x0s, self.labels, self.noise)
        )
        self._free += list(range(old, places))
