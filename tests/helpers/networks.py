"""Networks of random weights: at the start of training the last ones are zero, and zero hides faults."""

from __future__ import annotations

import torch

from ldm_ray.models.denoiser import Denoiser
from ldm_ray.models.unet import UNet


def busy_denoiser(hidden_dim: int = 256) -> Denoiser:
    denoiser, generator = Denoiser(16, hidden_dim), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in denoiser.named_parameters():
            weight.normal_(std=0.04, generator=generator)
            if "norm.weight" in name:
                weight.add_(1)
    return denoiser.eval()


def busy_unet(image_size: tuple[int, int] = (28, 28)) -> UNet:
    model, generator = UNet(image_size, 8), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(std=0.1, generator=generator)
            if "norm" in name and name.endswith("weight"):
                weight.add_(1)
    return model.eval()
