"""One trial of a search: the training loop of ``fitter.py`` on given latents, scored after every epoch.

A trial of some settings trains exactly as ``ldm_ray.train`` does with them; only checkpoints, records and
workers are left out. N rows, M samples, D latent, S sampling steps.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ldm_ray.config import TrainConfig
from ldm_ray.diffusion.samplers import Transition, ddpm
from ldm_ray.diffusion.schedule import NoiseSchedule
from ldm_ray.metrics.latent_frechet import ClassFrechet
from ldm_ray.training.fitter import Fitter, mix
from ldm_ray.training.tasks import DenoiserTask, build_task

CHECK_EVERY = 20  # steps between looks for a stop request


@dataclass(frozen=True)
class TrialData:
    """train and held (N, D) whitened float32 with labels (N,) int64; autoencoder: the embedded one."""

    train: Tensor
    train_labels: Tensor
    held: Tensor
    held_labels: Tensor
    autoencoder: dict[str, Any]


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
    task = build_task(config, device, data.autoencoder)
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
        self.fitter, self.metric, self.schedule = fitter, metric, task.schedule
        self.shape = (samples, task.denoiser.latent_dim)
        self.labels = metric.balanced_labels(samples).to(fitter.device)
        self.transitions = log_snr_transitions(task.schedule, steps)

    @torch.inference_mode()
    def __call__(self) -> float:
        device = self.fitter.device
        generator = torch.Generator(device).manual_seed(mix(0, 0, -3, 0))  # whatever the seed of the search is
        noise = partial(torch.randn, self.shape, generator=generator, device=device)
        made = noise()
        for latents, _ in ddpm(self.fitter.averaged, self.schedule, made, self.labels, self.transitions, noise):
            made = latents
        return self.metric(made, self.labels)


def log_snr_transitions(schedule: NoiseSchedule, steps: int) -> list[Transition]:
    """At most S transitions whose timesteps are equally far apart in log SNR, as near as whole timesteps are."""
    alphas_cumprod = schedule.alphas_cumprod
    log_snr = ((alphas_cumprod / (1 - alphas_cumprod)).log() / 2).contiguous()  # (T,), falling
    wanted = torch.linspace(float(log_snr[-1]), float(log_snr[0]), min(steps, len(log_snr)), dtype=torch.float64)
    nearest = (log_snr[None] - wanted[:, None]).abs().argmin(dim=1)
    timesteps = sorted(set(nearest.tolist()), reverse=True)
    return list(zip(timesteps, [*timesteps[1:], None], strict=True))
