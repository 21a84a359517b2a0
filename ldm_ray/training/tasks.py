"""What is trained: an autoencoder or a denoiser. Each task knows its loss, its checkpoint and its picture."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_ray.checkpoints import checkpoint
from ldm_ray.checkpoints.restore import AutoencoderCheckpoint, from_embedded
from ldm_ray.data.classes import labels_in
from ldm_ray.data.examples import Examples
from ldm_ray.data.images import save_grid, to_float, to_uint8
from ldm_ray.diffusion.objective import denoising_loss
from ldm_ray.diffusion.schedule import Noiser, NoiseSchedule
from ldm_ray.engine.generator import Generator
from ldm_ray.files.paths import AnyPath
from ldm_ray.models import registry
from ldm_ray.models.codec import Codec, PixelCodec
from ldm_ray.models.conditioning import ConditionedDenoiser
from ldm_ray.models.denoiser import Denoiser
from ldm_ray.models.unet import UNet
from ldm_ray.settings.limits import MAX_SEED
from ldm_ray.settings.training import AutoencoderConfig, RunConfig, TrainConfig


class Task(ABC):
    """model is trained through ``loss(forward, …)``, where forward is the model or its DDP wrapper."""

    model: nn.Module
    ema_decay = 0.0

    @abstractmethod
    def prepare(self, examples: Examples) -> Tensor:
        """The examples as the training tensor (N, …)."""

    @abstractmethod
    def loss(self, forward: nn.Module, batch: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        """The mean loss of a batch (B, …) with labels (B,); all randomness is the generator's."""

    @abstractmethod
    def content(self, ema: nn.Module, **rest: Any) -> dict[str, Any]:
        """The checkpoint."""

    @abstractmethod
    def picture(self, ema: nn.Module, path: AnyPath, batch: Tensor) -> None:
        """Writes what the model makes now; batch is held-out data."""


class AutoencoderTask(Task):
    """Pixels in, pixels out. Binary cross-entropy on the logits: its gradient does not vanish where the
    sigmoid saturates, which is how a squared error on the sigmoid's output lets the Conv one collapse to a
    constant picture; a warm-up keeps the first steps from killing ReLUs."""

    def __init__(self, config: AutoencoderConfig, image_size: tuple[int, int], device: torch.device) -> None:
        self.config = config
        self.autoencoder = registry.build(config.model, config.latent_dim, image_size).to(device)
        if device.type == "cpu" and config.model == "conv":
            self.autoencoder.to(memory_format=torch.channels_last)
        self.model: nn.Module = Logits(self.autoencoder)

    def prepare(self, examples: Examples) -> Tensor:
        return examples.vectors.reshape(-1, 1, *self.autoencoder.image_size)  # (N, 1, H, W) uint8

    def loss(self, forward: nn.Module, batch: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        images = to_float(batch)
        return F.binary_cross_entropy_with_logits(forward(images).float(), images)

    def content(self, ema: nn.Module, **rest: Any) -> dict[str, Any]:
        return checkpoint.autoencoder_content(self.autoencoder, self.config.model, self.config.to_dict(), **rest)

    @torch.no_grad()
    def picture(self, ema: nn.Module, path: AnyPath, batch: Tensor) -> None:
        """Images above, reconstructions below, eight columns."""
        images = batch[:32]
        reconstructions = to_uint8(self.autoencoder.eval()(to_float(images)).float())
        self.autoencoder.train()
        rows = [part for pair in zip(images.split(8), reconstructions.split(8), strict=True) for part in pair]
        save_grid(torch.cat(rows).cpu(), path, columns=8)


class Logits(nn.Module):
    """DDP wraps ``forward`` alone."""

    def __init__(self, autoencoder: nn.Module) -> None:
        super().__init__()
        self.autoencoder: Any = autoencoder

    def forward(self, images: Tensor) -> Tensor:
        return self.autoencoder.logits(images)


class DenoiserTask(Task):
    """Whitened latents, or pixels, and labels in; noise, v or x0 out. autoencoder: None in pixel space. data: as in
    ``build_task``."""

    def __init__(
        self,
        config: TrainConfig,
        codec: Codec,
        autoencoder: AutoencoderCheckpoint | None,
        data: dict[str, Any],
        device: torch.device,
    ) -> None:
        num_classes = len(data.get("class_names", range(10)))
        self.config, self.codec, self.autoencoder = config, codec, autoencoder
        self.schedule = NoiseSchedule(
            config.num_train_timesteps, config.beta_start, config.beta_end, config.beta_schedule
        )
        self.noiser = Noiser(self.schedule, device)
        self.denoiser: ConditionedDenoiser
        if autoencoder is None:
            self.denoiser = UNet(codec.image_size, config.hidden_dim, num_classes)
            self.denoiser.to(memory_format=torch.channels_last)
        else:
            sizes = {"latent_dim": codec.latent_dim, "hidden_dim": config.hidden_dim, "num_blocks": config.num_blocks}
            self.denoiser = Denoiser(num_classes=num_classes, **sizes)
        self.denoiser.to(device)
        self.model: nn.Module = self.denoiser
        self.device, self.ema_decay = device, config.ema_decay
        self.labels = labels_in({"data": data}, num_classes)

    def prepare(self, examples: Examples) -> Tensor:
        return self.codec.cpu().whiten(examples.vectors)  # (N, D)

    def loss(self, forward: nn.Module, batch: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        null, config = self.denoiser.null_label, self.config
        how = (config.label_dropout, generator, config.prediction_type, config.stratified)
        return denoising_loss(forward, self.noiser, batch, labels, null, *how)

    def content(self, ema: nn.Module, **rest: Any) -> dict[str, Any]:
        assert isinstance(ema, ConditionedDenoiser)
        return checkpoint.diffusion_content(
            self.denoiser, ema, self.schedule, self.autoencoder, self.config.to_dict(), **rest
        )

    def picture(self, ema: nn.Module, path: AnyPath, batch: Tensor) -> None:
        assert isinstance(ema, ConditionedDenoiser)
        make = Generator(ema, self.codec, self.schedule, self.device, self.config.prediction_type)
        count, digit = self.config.samples_per_epoch, self.config.only_digit
        seeds = [(self.config.seed + i) % (MAX_SEED + 1) for i in range(count)]
        make.labels = self.labels
        save_grid(make(seeds, make.in_turn(count, digit)), path)


def build_task(
    config: RunConfig, device: torch.device, autoencoder: dict[str, Any] | None, data: dict[str, Any] | None = None
) -> Task:
    """The task of a configuration; autoencoder is the embedded one of a denoiser.

    data: the run's record, whose ``image_size``, ``class_names`` and ``without_images`` count; without it 28×28
    and ten classes.
    """
    record = data or {}
    torch.manual_seed(config.seed)  # initial weights, the same on every worker
    if isinstance(config, AutoencoderConfig):
        height, width = record.get("image_size", registry.IMAGE_SIZE)
        return AutoencoderTask(config, (height, width), device)
    assert isinstance(config, TrainConfig)
    if config.space == "pixel":
        height, width = record.get("image_size", registry.IMAGE_SIZE)
        return DenoiserTask(config, PixelCodec((height, width)), None, record, device)
    assert autoencoder is not None
    encoder = from_embedded(autoencoder, str(autoencoder.get("path")))
    assert encoder is not None
    return DenoiserTask(config, encoder.codec, encoder, record, device)
