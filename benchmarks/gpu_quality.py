"""A full training on one device without Ray: autoencoder, latents, denoiser, its FD-LeNet on the way. For gpu.py."""

from __future__ import annotations

import time
from typing import Any

import torch
from gpu_report import Report
from torch import Tensor

from ldm_ray.checkpoints import checkpoint
from ldm_ray.checkpoints.checkpoint import AutoencoderCheckpoint
from ldm_ray.data.statistics import LatentStatistics
from ldm_ray.engine.generator import Generator
from ldm_ray.metrics import floors
from ldm_ray.metrics.lenet import Classifiers
from ldm_ray.metrics.quality import Reference, quality
from ldm_ray.models.codec import LatentCodec
from ldm_ray.settings.training import AutoencoderConfig, RunConfig, TrainConfig
from ldm_ray.training.fitter import Fitter
from ldm_ray.training.tasks import AutoencoderTask, DenoiserTask, Task, build_task

GOAL = 2.1  # FD-LeNet that is near the autoencoder's own on MNIST
SAMPLES = 10_000
AUTOENCODER, DENOISER = 0.35, 0.75  # shares of the time that is left, at most
LOOKS = 6  # measurements on the way, in the second half


def train(report: Report, device: torch.device, images: Tensor, labels: Tensor, test: Tensor) -> None:
    """The recipe of the commands; with fewer epochs, and saying so, where the time is too short."""
    reference = Reference.of(test, None, Classifiers.shipped(device))
    count = min(SAMPLES, 4 * len(test))
    kind = "conv" if device.type == "cuda" else "mlp"
    config = AutoencoderConfig(model=kind)
    task, seconds = fitted(report, config, None, images, labels, device, report.left * AUTOENCODER)
    assert isinstance(task, AutoencoderTask)
    codec = LatentCodec(task.autoencoder, kind).to(device)
    raw = floors.encode(codec, images)
    codec = codec.with_statistics(LatentStatistics.of(raw)).to(device)
    some, asked = floors.chosen((images, labels), count)
    floor = quality(floors.reconstruct(codec, some), asked, reference, neighbours=False)
    report.note("quality", f"{kind} autoencoder's floor (c)", floor["fd_lenet"], "FD-LeNet", train_s=seconds)
    inside = checkpoint.embed(AutoencoderCheckpoint(codec=codec.cpu(), path="none", sha256=""))
    data = codec.whiten(raw)
    reached: list[float] = []

    def look(task: Task, fitter: Fitter, spent: float) -> None:
        assert isinstance(task, DenoiserTask)
        ema: Any = fitter.averaged
        make = Generator(ema, task.codec, task.schedule, device, task.config.prediction_type)
        wanted = [i % make.num_classes for i in range(count)]
        figures = quality(make(range(count), wanted), torch.tensor(wanted), reference, neighbours=False)
        report.note("quality", f"denoiser after epoch {fitter.epoch}", figures["fd_lenet"], "FD-LeNet",
                    accuracy=figures["accuracy"], train_s=spent, images=count)  # fmt: skip
        if figures["fd_lenet"] <= GOAL and not reached:
            reached.append(spent)

    fitted(report, TrainConfig(), inside, data, labels, device, report.left * DENOISER, look)
    first = reached[0] if reached else "not reached"
    report.note("quality", f"seconds to FD-LeNet {GOAL}", first, autoencoder_s=seconds)


def fitted(
    report: Report,
    config: RunConfig,
    inside: dict[str, Any] | None,
    data: Tensor,
    labels: Tensor,
    device: torch.device,
    allowed: float,
    look: Any = None,
) -> tuple[Task, float]:
    """(the task with its trained model, seconds of training). Steps of a throw-away model say how many epochs fit."""

    def begun(config: RunConfig) -> tuple[Task, Fitter]:
        shape = {"image_size": list(data.shape[2:])} if inside is None else {}
        task = build_task(config, device, inside, shape)
        return task, Fitter(task, task.model, config, data, labels, len(data), 0, 1, device)

    _, trial = begun(config)
    steps = min(trial.steps_per_epoch, 100)
    batches = trial.order().to(trial.data.device).split(trial.batch)[:steps]
    float(trial.train_step(batches[0]))  # whatever is loaded first
    started = time.perf_counter()
    for rows in batches:
        loss = trial.train_step(rows)
    float(loss)
    epoch = (time.perf_counter() - started) * trial.steps_per_epoch / steps
    epochs = max(1, min(config.epochs, int(allowed / epoch)))
    name = "autoencoder" if inside is None else "denoiser"
    report.note("quality", f"{name}: epochs", epochs, f"of {config.epochs}", seconds_each=epoch)
    config = type(config)(**{**config.to_dict(), "epochs": epochs})
    task, fitter = begun(config)
    looks = {epochs} | {round(epochs * (0.5 + 0.5 * i / LOOKS)) for i in range(LOOKS)}
    spent, loss_of = 0.0, 0.0
    while fitter.epoch < epochs:
        started = time.perf_counter()
        fitter.run_epoch(lambda step: False)
        loss_of = fitter.end_epoch()
        spent += time.perf_counter() - started
        if look and fitter.epoch in looks and fitter.epoch:
            look(task, fitter, spent)
    report.note("quality", f"{name}: trained", spent, "s", loss=loss_of)
    task.model.eval()
    return task, spent
