"""The denoiser of pixels: a small U-Net (Ronneberger et al., arXiv:1505.04597) of residual blocks, conditioned on
time and class by FiLM as the one of latents is.

Three resolutions, full, half and quarter, of H, 2H and 4H channels; what goes down is added, not appended, on the
way up. State-dict names are a file format: keep them. Shapes: B batch, D = h·w pixels, H hidden (channels at full
resolution), E embedding, C channels.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_ray.models.conditioning import ConditionedDenoiser, filled_with, sizes_of, zeroed
from ldm_ray.settings.errors import ConfigError

GROUPS = 8  # of each normalisation, and what the channels are a multiple of
SIZE_MULTIPLE = 4  # halved twice
MAX_SIDE = 256
MAX_WORK = 2**26  # height × width × channels², which the time of a step grows with


class ResidualBlock(nn.Module):
    """x + conv(SiLU((1 + γ)·GroupNorm(conv(SiLU(GroupNorm(x)))) + β)); γ, β linear in the embedding."""

    def __init__(self, channels_in: int, channels: int, embedding_dim: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(GROUPS, channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels, 3, padding=1)
        self.proj = zeroed(nn.Linear(embedding_dim, 2 * channels))  # starts as the identity: γ = β = 0
        self.norm2 = nn.GroupNorm(GROUPS, channels)
        self.conv2 = zeroed(nn.Conv2d(channels, channels, 3, padding=1))
        self.skip = nn.Conv2d(channels_in, channels, 1) if channels_in != channels else nn.Identity()

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        gamma, beta = self.proj(e)[:, :, None, None].chunk(2, dim=1)  # (B, C, 1, 1) each
        h = self.conv1(F.silu(self.norm1(x)))
        h = torch.addcmul(beta, 1 + gamma, self.norm2(h))
        return self.skip(x) + self.conv2(F.silu(h))


class UNet(ConditionedDenoiser):
    """Predicts from noised pixels (B, D), a row of the image after the other, as ``Denoiser`` does from latents."""

    def __init__(
        self,
        image_size: tuple[int, int] = (28, 28),
        hidden_dim: int = 32,
        num_classes: int = 10,
        embedding_dim: int = 256,
        sinusoid_dim: int = 128,
    ) -> None:
        """ConfigError: sizes that it cannot have."""
        super().__init__(num_classes, embedding_dim, sinusoid_dim)
        check_unet(image_size, hidden_dim)
        self.image_size, self.latent_dim, self.hidden_dim = image_size, image_size[0] * image_size[1], hidden_dim
        full, half, quarter = hidden_dim, 2 * hidden_dim, 4 * hidden_dim
        self.in_conv = nn.Conv2d(1, full, 3, padding=1)
        self.down1 = ResidualBlock(full, full, embedding_dim)
        self.down2 = ResidualBlock(full, half, embedding_dim)
        self.mid1 = ResidualBlock(half, quarter, embedding_dim)
        self.mid2 = ResidualBlock(quarter, quarter, embedding_dim)
        self.narrow2 = nn.Conv2d(quarter, half, 1)
        self.up2 = ResidualBlock(half, half, embedding_dim)
        self.narrow1 = nn.Conv2d(half, full, 1)
        self.up1 = ResidualBlock(full, full, embedding_dim)
        self.out_norm = nn.GroupNorm(GROUPS, full)
        self.out_conv = zeroed(nn.Conv2d(full, 1, 3, padding=1))  # predicts zero, the mean of the noise

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor], image_size: tuple[int, int]) -> UNet:
        """Builds the U-Net whose sizes the state dict has, with its weights. RuntimeError when they do not fit;
        ConfigError: sizes that it cannot have."""
        with torch.device("meta"):  # no memory is taken for sizes that the other weights may not have
            model = cls(image_size, state["in_conv.weight"].shape[0], *sizes_of(state))
        return filled_with(model, state)

    def forward(self, xt: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """xt (B, D), t (B,), labels (B,) or None → prediction (B, D)."""
        e = self.embed(t, labels)
        x = xt.view(-1, 1, *self.image_size).to(memory_format=torch.channels_last)
        h1 = self.down1(self.in_conv(x), e)  #                     (B, H, h, w)
        h2 = self.down2(F.avg_pool2d(h1, 2), e)  #                 (B, 2H, h/2, w/2)
        h = self.mid1(F.avg_pool2d(h2, 2), e)  #                   (B, 4H, h/4, w/4)
        h = self.mid2(h, e)
        h = self.up2(h2 + doubled(self.narrow2(h)), e)  #          (B, 2H, h/2, w/2)
        h = self.up1(h1 + doubled(self.narrow1(h)), e)  #          (B, H, h, w)
        return self.out_conv(F.silu(self.out_norm(h))).flatten(1)  # (B, D)


def doubled(h: Tensor) -> Tensor:
    """(B, C, h, w) → (B, C, 2h, 2w), nearest."""
    return F.interpolate(h, scale_factor=2)


def check_unet(image_size: tuple[int, int], hidden_dim: int) -> None:
    """ConfigError unless the U-Net can have this image size and this width."""
    height, width = image_size
    if height % SIZE_MULTIPLE or width % SIZE_MULTIPLE or not 0 < max(image_size) <= MAX_SIDE:
        raise ConfigError(
            f"images are {height}x{width}; --space pixel takes height and width multiples of {SIZE_MULTIPLE} up to "
            f"{MAX_SIDE}: resize them first, or take --space latent"
        )
    if hidden_dim % GROUPS or hidden_dim < GROUPS:
        raise ConfigError(f"--hidden-dim is a multiple of {GROUPS} with --space pixel, not {hidden_dim}")
    if height * width * hidden_dim**2 > MAX_WORK:
        raise ConfigError(
            f"--hidden-dim {hidden_dim} is too large for images of {height}x{width}; at most "
            f"{int((MAX_WORK / height / width) ** 0.5) // GROUPS * GROUPS} is possible"
        )
