"""The numbers behind ``slots.py``: where the state of every image is, and how a tile of them takes steps.

B rows of a tile (its size), n ≤ B images in it, D latent, N places on the board, K steps.
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

from ldm_ray.data.images import to_uint8
from ldm_ray.devices.device import sent
from ldm_ray.diffusion.guidance import guided
from ldm_ray.diffusion.noise import gaussian
from ldm_ray.diffusion.samplers import Step, advance
from ldm_ray.engine.generator import Generator, filled
from ldm_ray.engine.jobs import Job, Outcome

TABLES_KEPT = 256
AHEAD = 32, 4096  # steps that an image's noise is drawn for at a time, and numbers; two steps at least
COEFFICIENTS = ("x0_from_xt", "x0_from_output", "keep", "x0", "before", "earlier", "sigma")
log = logging.getLogger(__name__)


class Image:
    """One image on its way: after ``step`` of its plan's steps, at ``place`` of the board."""

    __slots__ = ("drawn", "index", "job", "outcome", "place", "seed", "step")

    def __init__(self, job: Job, index: int, seed: int) -> None:
        self.job, self.index, self.seed = job, index, seed
        self.step = self.place = 0
        self.drawn = -1  # the first step whose noise is on the board; −1: none
        self.outcome: Outcome | None = None


@dataclass
class Tile:
    """Images that step together; all of them guided, or none at first; or still ones, which are only decoded."""

    images: list[Image]
    size: int
    limit: int = 1  # steps at most; 0: still


@dataclass
class Leg:
    """What became of a tile's images."""

    taken: int = 0  # steps, by every one
    guided: int = 0  # the last so many of them
    done: list[Image] = field(default_factory=list)  # finished; image and latent are with their jobs
    failed: list[Image] = field(default_factory=list)  # finished as numbers that are not finite
    shown: list[tuple[Image, Tensor]] = field(default_factory=list)  # with the image predicted so far (H, W) uint8


def tiles_of(images: Sequence[Image], size_for: Callable[[int], int], limit: int = 1) -> list[Tile]:
    """Images in tiles, those of one plan and step side by side."""
    tiles: list[Tile] = []
    still = [image for image in images if image.step == len(image.job.plan)]
    moving = [image for image in images if image.step < len(image.job.plan)]
    unguided = [image for image in moving if image.step < image.job.guided_from]
    guided = [image for image in moving if image.step >= image.job.guided_from]
    for chosen, steps in ((still, 0), (unguided, limit), (guided, limit)):
        if not chosen:
            continue
        chosen.sort(key=lambda image: (image.job.plan_id, image.step))
        size = size_for(len(chosen))
        tiles += [Tile(chosen[i : i + size], size, steps) for i in range(0, len(chosen), size)]
    return tiles


class Board:
    """The state of all images, a place each; places are used again."""

    def __init__(self, generator: Generator) -> None:
        self.generator, self.device, self.dim = generator, generator.device, generator.codec.latent_dim
        self.ahead = max(2, min(AHEAD[0], AHEAD[1] // self.dim))
        self.changed = False  # set from any thread: running legs end after their step
        self.next_deadline: float | None = None
        self._free: list[int] = []
        self._tables: dict[int, tuple[Tensor, Tensor]] = {}
        with torch.inference_mode():
            self.latents = torch.zeros(0, self.dim, device=self.device)  #       (N, D)
            self.x0s = torch.zeros(0, 2, self.dim, device=self.device)  #     (N, 2, D) predicted one and two steps ago
            self.labels = torch.zeros(0, dtype=torch.int64, device=self.device)  # (N,)
            self.noise = torch.zeros(0, self.ahead, self.dim, device=self.device)  # (N, ahead, D)
        self._grow(generator.tiles.sizes[-1])

    @torch.inference_mode()
    def join(self, images: list[Image]) -> None:
        """Gives images their places, labels and given latents; others' are drawn in their first leg."""
        while len(self._free) < len(images):
            self._grow(2 * len(self.latents))
        for image in images:
            image.place = self._free.pop()
        places = self._places(images)
        self.x0s[places] = 0.0
        self.labels[places] = self.generator.labels_of([image.job.labels[image.index] for image in images])
        for image in images:
            if image.job.start is not None:
                self.latents[image.place] = sent(image.job.start[image.index], self.device)

    def leave(self, images: list[Image]) -> None:
        self._free += [image.place for image in images]

    def leg(self, tile: Tile) -> Leg | None:
        """Steps of a tile's images, at least 1 and at most its limit: until an image is finished or to be shown,
        some but not all become guided, something changed, or a deadline came. What is finished or to be shown is
        decoded. None: an error, which is logged."""
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
        runs = [list(run) for _, run in groupby(images, key=lambda image: (image.job.plan_id, image.step))]
        self._draw(images)
        noisy = any(run[0].job.noisy for run in runs)
        if noisy:
            limit = min(limit, min(i.drawn + self.ahead - i.step - 1 for i in images if i.job.noisy))
        places = self._places(images)
        rows = filled(places, size)
        xt, labels = self.latents[rows], self.labels[rows]  # (B, D), (B,)
        before, earlier = self.x0s[rows].unbind(dim=1)  #     (B, D) each
        first = self._sent([i.step + 1 - i.drawn if i.job.noisy else 0 for i in images])
        offsets = filled(first, size)[:, None] + torch.arange(limit, device=self.device)  # (B, K)
        # of the images without noise any numbers are taken, times 0
        noise = self.noise[rows[:, None], offsets.clamp_(max=self.ahead - 1)].unbind(dim=1) if noisy else [None] * limit
        timesteps, steps = self._uniform(runs[0][0], limit, size) if len(runs) == 1 else self._mixed(runs, limit, size)
        plain = self.generator.denoiser
        denoise_guided = guided(plain, self._scale(tile), self.generator.null_label) if switch < limit else plain
        taken = 0
        while True:
            output = (plain if taken < switch else denoise_guided)(xt, timesteps[taken], labels)
            xt, x0 = advance(steps[taken], xt, output, (before, earlier), noise[taken])
            before, earlier = x0, before
            taken += 1
            if taken == limit or self.changed:
                break
            if self.next_deadline is not None and time.monotonic() >= self.next_deadline:
                break
        self.latents[places] = xt[: len(images)]
        self.x0s[places] = torch.stack([before, earlier], dim=1)[: len(images)]
        return Leg(taken, guided=max(0, taken - switch))

    @torch.inference_mode()
    def _decode(self, tile: Tile, leg: Leg) -> None:
        """Decodes what is finished or to be shown, in the thread of the tile, and gives it to the jobs."""
        finished = [image for image in tile.images if image.step == len(image.job.plan)]
        shown = [image for image in tile.images if image.step in image.job.show and image.step]
        if not finished and not shown:
            return
        latents = torch.cat([self.latents[self._places(finished)], self.x0s[self._places(shown), 0]])
        made = torch.cat([self.generator._decode(tile.size, part) for part in latents.split(tile.size)])
        finite = torch.isfinite(made).flatten(1).all(dim=1).tolist()
        pictures, latents = to_uint8(made.nan_to_num())[:, 0].cpu(), latents.cpu()
        fine = [i for i in range(len(finished)) if finite[i]]
        for _, run in groupby(fine, key=lambda i: id(finished[i].job)):
            rows = list(run)
            job, there = finished[rows[0]].job, [finished[i].index for i in rows]
            job.images[there], job.latents[there] = pictures[rows], latents[rows]
        leg.done = [finished[i] for i in fine]
        leg.failed = [image for image, good in zip(finished, finite, strict=False) if not good]
        leg.shown = list(zip(shown, pictures[len(finished) :], strict=True))

    def _until_stop(self, image: Image) -> int:
        """Steps until an image is finished or to be shown."""
        stops = [*image.job.show, len(image.job.plan)]
        return min(step for step in stops if step > image.step) - image.step

    def _draw(self, images: list[Image]) -> None:
        """Draws what images begin with, and the noise of the coming steps for noisy ones that have none left.

        In the thread of the tile, and both in one go: few seeds cost as much as their numbers.
        """

        def needs(image: Image) -> tuple[bool, bool, int]:
            """(what it begins with, noise, step)"""
            empty = image.drawn < 0 or image.step + 1 >= image.drawn + self.ahead
            return image.step == 0 and image.job.start is None, image.job.noisy and empty, image.step

        for (start, noise, step), run in groupby(sorted(images, key=needs), key=needs):
            if not start and not noise:
                continue
            group = list(run)
            seeds = self._sent([image.seed for image in group])
            count = min(self.ahead, max(len(image.job.plan) for image in group) - step) if noise else 0
            drawn = gaussian(seeds, step if start else step + 1, self.dim, count + start)
            if start:
                self.latents[self._places(group)] = drawn[0]
            if noise:
                self.noise[self._places(group), :count] = drawn[int(start) :].transpose(0, 1)
                for image in group:
                    image.drawn = step + 1

    def _uniform(self, image: Image, limit: int, size: int) -> tuple[list[Tensor], Sequence[Step]]:
        """Timesteps (B,) and coefficients for each of ``limit`` steps, all images at the same step of one plan."""
        steps = image.job.plan[image.step : image.step + limit]
        return [t.expand(size) for t in self._sent([step.t for step in steps])], steps

    def _mixed(self, runs: list[list[Image]], limit: int, size: int) -> tuple[list[Tensor], Sequence[Step]]:
        """The same with coefficients in columns (B, 1)."""
        t, table = [], []
        for run in runs:
            timesteps, coefficients = self._table(run[0].job)
            rows = slice(run[0].step, run[0].step + limit)
            t.append(timesteps[rows].expand(len(run), limit))
            table.append(coefficients[rows].expand(len(run), limit, len(COEFFICIENTS)))
        times = sent(filled(torch.cat(t), size).T.contiguous(), self.device)  # (K, B)
        columns = filled(torch.cat(table), size).permute(1, 2, 0).unsqueeze(-1)  # (K, 7, B, 1)
        used = columns.flatten(2).any(dim=2).tolist()  # where all are 0, the term is left out
        columns = sent(columns, self.device)
        steps = []
        for k in range(limit):
            named: dict[str, Any] = {
                name: columns[k, j] if used[k][j] or j < 4 else 0.0 for j, name in enumerate(COEFFICIENTS)
            }
            steps.append(Step(t=0, **named))
        return list(times), steps

    def _table(self, job: Job) -> tuple[Tensor, Tensor]:
        """(timesteps (S,), coefficients (S, 7) float32) of a job's plan, on the CPU, where tiles are put together."""
        found = self._tables.get(job.plan_id)
        if found is None:
            if len(self._tables) > TABLES_KEPT:
                self._tables = {}
            numbers = torch.tensor([[getattr(step, name) for name in COEFFICIENTS] for step in job.plan])
            times = torch.tensor([step.t for step in job.plan])
            found = self._tables[job.plan_id] = (times, numbers.float())
        return found

    def _scale(self, tile: Tile) -> float | Tensor:
        """The guidance of a tile: one number, or a column (B, 1)."""
        scales = [image.job.scale for image in tile.images]
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
