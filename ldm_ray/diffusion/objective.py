"""What the denoiser learns (DDPM, arXiv:2006.11239, eq. 14). B batch, D latent, T timesteps."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm_ray.diffusion.schedule import Noiser


def denoising_loss(
    denoiser: Callable[[Tensor, Tensor, Tensor], Tensor],
    noiser: Noiser,
    x0: Tensor,
    labels: Tensor,
    null_label: int,
    label_dropout: float,
    generator: torch.Generator,
    prediction_type: str = "epsilon",
    stratified: bool = False,
) -> Tensor:
    """E‖target − f_θ(√ᾱ x0 + √(1 − ᾱ) ε, t, y)‖² as a mean over elements; the target is ε, v = √ᾱ ε − √(1 − ᾱ) x0
    (Salimans and Ho, arXiv:2202.00512) or x0, by ``prediction_type``.

    x0 (B, D), labels (B,). t is uniform: drawn for each row alone or, stratified, one from each of B equal parts of
    the timesteps, so that batches differ less (the idea of the low-discrepancy times of Kingma et al.,
    arXiv:2107.00630, appendix I.1). A share ``label_dropout`` of the labels becomes ``null_label`` (classifier-free
    guidance, Ho and Salimans, arXiv:2207.12598). All randomness is the generator's.
    """
    batch, device = len(x0), x0.device
    timesteps = len(noiser.signal)
    if stratified:
        parts = torch.arange(batch, device=device) + torch.rand(batch, device=device, generator=generator)
        t = (parts * (timesteps / batch)).long().clamp_max(timesteps - 1)
    else:
        t = torch.randint(0, timesteps, (batch,), device=device, generator=generator)
    noise = torch.randn(x0.shape, device=device, generator=generator)
    hidden = torch.rand(batch, device=device, generator=generator) < label_dropout
    labels = torch.where(hidden, null_label, labels)
    target = {"epsilon": noise, "sample": x0}.get(prediction_type)
    if target is None:
        target = noiser.velocity(x0, noise, t)
    output = denoiser(noiser.add_noise(x0, noise, t), t, labels)
    return F.mse_loss(output.float(), target)
