"""Classifier-free guidance (Ho and Salimans, arXiv:2207.12598). B batch, D latent."""

from __future__ import annotations

import torch
from torch import Tensor

from ldm_ray.diffusion.samplers import Denoise


def guided(denoise: Denoise, guidance_scale: float | Tensor, null_label: int) -> Denoise:
    """uncond + s·(cond − uncond), both halves in one pass; a scale of 1 is the denoiser itself.

    A scale for each image is a column (B, 1) float32.
    """
    if not isinstance(guidance_scale, Tensor) and guidance_scale == 1:
        return denoise

    def denoise_guided(latents: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        both = torch.cat([labels, torch.full_like(labels, null_label)])  # (2B,)
        t = t[:1].expand(len(both)) if t.stride(0) == 0 else t.repeat(2)  # one timestep for all stays recognisable
        cond, uncond = denoise(latents.repeat(2, 1), t, both).chunk(2)
        return uncond + guidance_scale * (cond - uncond)

    return denoise_guided
