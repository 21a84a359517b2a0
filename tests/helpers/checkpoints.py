"""Small checkpoints in the project's own format, and comparing two."""

from __future__ import annotations

from pathlib import Path

import torch

from ldm_ray.checkpoints import checkpoint
from ldm_ray.checkpoints.checkpoint import load_autoencoder
from ldm_ray.diffusion.schedule import NoiseSchedule
from ldm_ray.models import registry
from ldm_ray.models.denoiser import Denoiser
from tests.helpers.networks import busy_denoiser, busy_unet


def write_autoencoder(path: Path) -> None:
    """An untrained MLP autoencoder."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = registry.build("mlp", 16)
    checkpoint.write(path, checkpoint.autoencoder_content(model, "mlp", {"seed": 42, "only_digit": None}, epoch=3))


def write_checkpoint(path: Path, autoencoder: Path, shift: float = 0.0) -> None:
    """A denoiser of random weights with its autoencoder inside; another shift makes other images."""
    denoiser = busy_denoiser()
    with torch.no_grad():
        denoiser.out_proj.bias.add_(shift)
    content = checkpoint.diffusion_content(
        denoiser, denoiser, NoiseSchedule(), load_autoencoder(autoencoder), {"seed": 1}
    )
    checkpoint.write(path, content)


def write_small_checkpoint(path: Path, autoencoder: Path, **args: object) -> Path:
    """The same a quarter as wide."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        denoiser = Denoiser(16, 64)
        with torch.no_grad():
            for weight in denoiser.parameters():
                weight.add_(torch.randn_like(weight) * 0.05)
    inside = load_autoencoder(autoencoder)
    checkpoint.write(path, checkpoint.diffusion_content(denoiser, denoiser, NoiseSchedule(), inside, dict(args)))
    return path


def write_pixels(path: Path) -> None:
    """A U-Net of random weights."""
    model = busy_unet()
    checkpoint.write(path, checkpoint.diffusion_content(model, model, NoiseSchedule(), None, {"seed": 1}))


def weights(path: Path) -> dict[str, torch.Tensor]:
    content = torch.load(path, weights_only=True)
    return {f"{part}.{name}": tensor for part in ("model", "ema") for name, tensor in content.get(part, {}).items()}


def same_weights(one: Path, other: Path) -> bool:
    """Bit for bit, the trained and the averaged ones."""
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
