"""Images ↔ what is diffused: the frozen autoencoder with its latent statistics, or the pixels as they are.

Shapes: B batch, D latent, which in pixel space is all pixels of an image, row by row.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from ldm_ray.data.statistics import LatentStatistics
from ldm_ray.models import autoencoders as autoencoders  # registers the types
from ldm_ray.models import registry


class Codec(nn.Module, ABC):
    """Nothing in it ever trains: no gradients, always in evaluation mode. ``mean`` (D,) says which device it is on."""

    kind: str
    latent_dim: int
    image_size: tuple[int, int]
    mean: Tensor

    def train(self, mode: bool = True) -> Codec:
        """Stays in evaluation mode, whatever ``mode`` is."""
        return super().train(False)

    @abstractmethod
    def encode(self, images: Tensor) -> Tensor:
        """(B, 1, H, W) float in [0, 1] → latents (B, D) of about unit size."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, D) → images (B, 1, H, W) float in [0, 1]."""

    @abstractmethod
    def whiten(self, raw: Tensor) -> Tensor:
        """What examples are kept as (B, D) → latents."""


class PixelCodec(Codec):
    """Pixels themselves, from −1 for 0 to 1 for 255 (DDPM, arXiv:2006.11239, section 3.3)."""

    kind = "pixels"

    def __init__(self, image_size: tuple[int, int] = registry.IMAGE_SIZE) -> None:
        super().__init__()
        self.image_size, self.latent_dim = image_size, image_size[0] * image_size[1]
        self.register_buffer("mean", torch.zeros(self.latent_dim), persistent=False)

    def encode(self, images: Tensor) -> Tensor:
        return images.flatten(1) * 2 - 1

    def decode(self, latents: Tensor) -> Tensor:
        return ((latents + 1) / 2).clamp(0, 1).view(-1, 1, *self.image_size)

    def whiten(self, raw: Tensor) -> Tensor:
        """uint8 (B, D) → (B, D) in [−1, 1]."""
        return self.encode(raw.float() / 255)


class LatentCodec(Codec):
    """A frozen autoencoder with the statistics of its latents.

    The statistics are buffers of its own; the autoencoder's weights are untouched by them.
    """

    model: Any
    whitening: Tensor
    colouring: Tensor

    def __init__(self, model: nn.Module, kind: str, statistics: LatentStatistics | None = None) -> None:
        super().__init__()
        self.kind = kind
        network: Any = model.requires_grad_(False).eval()
        self.model = network
        self.latent_dim: int = network.latent_dim
        self.image_size: tuple[int, int] = network.image_size
        self.statistics = statistics or LatentStatistics.identity(self.latent_dim)
        whitening, colouring = self.statistics.maps()
        self.register_buffer("whitening", whitening.float(), persistent=False)
        self.register_buffer("colouring", colouring.float(), persistent=False)
        self.register_buffer("mean", self.statistics.mean.float(), persistent=False)

    @classmethod
    def from_state(
        cls,
        kind: str,
        latent_dim: int,
        state: dict[str, Tensor],
        statistics: LatentStatistics | None = None,
        image_size: tuple[int, int] = registry.IMAGE_SIZE,
    ) -> LatentCodec:
        """Builds the registered type and loads the weights strictly. RuntimeError when they do not fit."""
        if image_size != registry.IMAGE_SIZE:
            with torch.device("meta"):  # no memory is taken for a size that the weights do not have
                registry.build(kind, latent_dim, image_size).load_state_dict(state, assign=True)
        model = registry.build(kind, latent_dim, image_size)
        model.load_state_dict(state)
        return cls(model, kind, statistics)

    def with_statistics(self, statistics: LatentStatistics) -> LatentCodec:
        """The same autoencoder with other statistics."""
        return LatentCodec(self.model, self.kind, statistics)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """(B, 1, H, W) float in [0, 1] → whitened latents (B, D)."""
        return self.whiten(self.model.encoder(images))

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Whitened latents (B, D) → images (B, 1, H, W) float in [0, 1]."""
        return self.model.decoder(self.colour(latents)).sigmoid()

    def whiten(self, raw: Tensor) -> Tensor:
        """Raw latents (B, D) → whitened ones."""
        return (raw - self.mean) @ self.whitening

    def colour(self, latents: Tensor) -> Tensor:
        """Whitened latents (B, D) → raw ones."""
        return latents @ self.colouring + self.mean
