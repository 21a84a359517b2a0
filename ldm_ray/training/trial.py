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
from ldm_ray.diffusion.samplers import Denoise, Transition, ddpm
from ldm_ray.diffusion.schedule import NoiseSchedule
from ldm_ray.metrics.latent_frechet import ClassFrechet
from ldm_ray.training.fitter import Fitter, mix
from ldm_ray.training.tasks import DenoiserTask, build_task

CHECK_EVERY = 20  # steps between looks for a stop request
LOWEST_LOG_SNR = -4.0  # half of log SNR where sampling starts: lower ones say nothing and amplify the error of ε


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
    metric, limit = ClassFrechet(data.held, data.held_labels), float(data.train.abs().max())
    score = Score(task, fitter, metric, samples, steps, limit)
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

    Sampling is ancestral: its fresh noise makes up for a denoiser that is not good yet, as 1000 steps would,
    while a deterministic path carries its first errors to the end and so ranks schedules wrongly (docs/tune.md).
    """

    def __init__(
        self, task: DenoiserTask, fitter: Fitter, metric: ClassFrechet, samples: int, steps: int, limit: float
    ) -> None:
        self.fitter, self.metric, self.schedule = fitter, metric, task.schedule
        self.shape = (samples, task.denoiser.latent_dim)
        self.labels = metric.balanced_labels(samples).to(fitter.device)
        self.transitions = log_snr_transitions(task.schedule, steps)
        self.limit = limit

    @torch.inference_mode()
    def __call__(self) -> float:
        device = self.fitter.device
        generator = torch.Generator(device).manual_seed(mix(0, 0, -3, 0))  # whatever the seed of the search is
        noise = partial(torch.randn, self.shape, generator=generator, device=device)
        denoise = bounded(self.fitter.averaged, self.schedule, self.limit)
        made = noise()
        for latents, _ in ddpm(denoise, self.schedule, made, self.labels, self.transitions, noise):
            made = latents
        return self.metric(made, self.labels)


def bounded(denoise: Denoise, schedule: NoiseSchedule, limit: float) -> Denoise:
    """The denoiser with its x0 held within ±limit. Where there is little signal, x0 is ε's error magnified; in the
    first epochs it throws a few samples so far out that they alone would decide a Fréchet distance."""
    alphas_cumprod = schedule.alphas_cumprod

    def denoise_bounded(latents: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        now = alphas_cumprod.to(latents)[t][:, None]  # (B, 1)
        eps_pred = denoise(latents, t, labels).float()
        x0_pred = ((latents - (1 - now).sqrt() * eps_pred) / now.sqrt()).clamp(-limit, limit)
        return (latents - now.sqrt() * x0_pred) / (1 - now).sqrt()

    return denoise_bounded


def log_snr_transitions(schedule: NoiseSchedule, steps: int) -> list[Transition]:
    """At most S transitions whose timesteps are equally far apart in log SNR, as near as whole timesteps are."""
    alphas_cumprod = schedule.alphas_cumprod
    log_snr = ((alphas_cumprod / (1 - alphas_cumprod)).log() / 2).contiguous()  # (T,), falling
    first = max(float(log_snr[-1]), min(LOWEST_LOG_SNR, float(log_snr[0])))
    wanted = torch.linspace(first, float(log_snr[0]), min(steps, len(log_snr)), dtype=torch.float64)
    nearest = (log_snr[None] - wanted[:, None]).abs().argmin(dim=1)
    timesteps = sorted(set(nearest.tolist()), reverse=True)
    return list(zip(timesteps, [*timesteps[1:], None], strict=True))
