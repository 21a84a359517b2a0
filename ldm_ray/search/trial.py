"""One trial of a search: the training loop of ``fitter.py`` on given latents, scored after every epoch.

A trial of some settings trains exactly as ``ldm_ray.train`` does with them; only checkpoints, records and
workers are left out. N rows, M samples, D latent, S sampling steps.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ldm_ray.data.classes import numbered
from ldm_ray.diffusion.samplers import ddpm, sample
from ldm_ray.diffusion.timesteps import spaced_timesteps, transitions_of
from ldm_ray.search.objective import ClassFrechet
from ldm_ray.settings.training import TrainConfig
from ldm_ray.training.fitter import Fitter, mix
from ldm_ray.training.tasks import DenoiserTask, build_task

CHECK_EVERY = 20  # steps between looks for a stop request


@dataclass(frozen=True)
class TrialData:
    """train and held (N, D) whitened float32 with labels (N,) int64; autoencoder: the embedded one;
    class_names: as many as there are classes."""

    train: Tensor
    train_labels: Tensor
    held: Tensor
    held_labels: Tensor
    autoencoder: dict[str, Any]
    class_names: tuple[str, ...] = numbered(10)


class Diverged(Exception):
    """The loss or a sample is not finite."""


def run(
    config: TrainConfig,
    data: TrialData,
    device: torch.device,
    samples: int,
    steps: int,
    stopped: Callable[[], bool],
) -> Iterator[dict[str, Any]]:
    """Trains for ``config.epochs`` epochs and yields after each: epoch, objective, train_loss, val_loss, seconds.

    objective: the ``ClassFrechet`` of M ``samples`` made in S ``steps``, smaller is better, with the same noise
    in every epoch of every trial. Ends early once ``stopped()``; raises Diverged, with the epoch.
    """
    torch.set_flush_denormal(True)  # as in fit.py
    task = build_task(config, device, data.autoencoder, {"class_names": data.class_names})
    assert isinstance(task, DenoiserTask)
    rows = len(data.train)
    fitter = Fitter(task, task.model, config, data.train, data.train_labels, rows, 0, 1, device)
    score = Score(task, fitter, ClassFrechet(data.held, data.held_labels), samples, steps)
    while fitter.epoch < config.epochs:
        started = time.perf_counter()
        if not fitter.run_epoch(lambda step: step % CHECK_EVERY == 0 and stopped()):
            return
        train_loss = fitter.end_epoch()
        if not math.isfinite(train_loss):
            raise Diverged(f"the loss is not finite in epoch {fitter.epoch}")
        val_loss, objective = fitter.validate(data.held, data.held_labels), score()
        if not math.isfinite(val_loss) or not math.isfinite(objective):
            raise Diverged(f"samples are not finite in epoch {fitter.epoch}")
        yield {
            "epoch": fitter.epoch,
            "objective": objective,
            "train_loss": train_loss,
            "val_loss": val_loss,
            "seconds": time.perf_counter() - started,
        }


class Score:
    """The objective of the averaged weights as they are now.

    Sampling is ancestral: its fresh noise makes up for a denoiser that is not good yet, as 1000 steps would, while
    a deterministic path carries its first errors to the end and so ranks schedules wrongly (docs/tune.md). It
    starts at the last timestep and x0 is not bounded, as in the images made later: a schedule whose end sets ε
    an impossible task is to lose by it.
    """

    def __init__(self, task: DenoiserTask, fitter: Fitter, metric: ClassFrechet, samples: int, steps: int) -> None:
        self.fitter, self.metric = fitter, metric
        self.shape = (samples, task.denoiser.latent_dim)
        self.labels = metric.balanced_labels(samples).to(fitter.device)
        timesteps = spaced_timesteps(task.schedule, min(steps, task.schedule.num_train_timesteps), "logsnr")
        self.plan = ddpm(task.schedule, transitions_of(timesteps), task.config.prediction_type)

    @torch.inference_mode()
    def __call__(self) -> float:
        device = self.fitter.device
        generator = torch.Generator(device).manual_seed(mix(0, 0, -3, 0))  # whatever the seed of the search is

        def noise(_: int) -> Tensor:
            return torch.randn(self.shape, generator=generator, device=device)

        *_, (made, _) = sample(self.fitter.averaged, self.plan, noise(0), self.labels, noise)
        return self.metric(made, self.labels)
