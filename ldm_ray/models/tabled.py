"""The denoiser for sampling: time and class conditioning read from tables instead of computed.

γ and β of every layer are linear in ``time(t) + class_emb(y)``, so each is a row of a table over t plus a row of
a table over y, exact. What is left per image is 1.065 of 3.36 MFLOP. The affine map of each LayerNorm is folded
in: (1 + γ)·(w·n + b) + β = [(1 + γ_t) w + γ_y w]·n + [(1 + γ_t) b + β_t + γ_y b + β_y], n = normalised x.

Shapes: B batch, D latent, H hidden, L layers, T timesteps, C classes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm_ray.models.conditioning import ConditionedDenoiser
from ldm_ray.models.denoiser import Denoiser, FiLMLayer


def for_sampling(denoiser: ConditionedDenoiser, num_train_timesteps: int) -> Any:
    """``denoise(xt (B, D), t (B,), labels (B,)) → (B, D)`` with ``num_classes`` and ``null_label``, in its fastest
    exact form: the tables for latents; a U-Net as it is, since its convolutions are nearly all of its work."""
    if isinstance(denoiser, Denoiser):
        return TabledDenoiser(denoiser, num_train_timesteps)
    return denoiser.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


class TabledDenoiser:
    """The same numbers as a denoiser in evaluation mode, to rounding. The tables take L·2H floats per timestep.

    A row's bits do not depend on whether its batch shares one timestep (``t`` expanded from one value) or mixes
    several: both add the same two numbers.
    """

    @torch.inference_mode()
    def __init__(self, denoiser: Denoiser, num_train_timesteps: int) -> None:
        layers: list[FiLMLayer] = list(denoiser.film_layers())
        self.num_classes, self.null_label = denoiser.num_classes, denoiser.null_label
        hidden = denoiser.hidden_dim
        device = denoiser.in_proj.weight.device
        self.shape = (hidden,)
        self.ones, self.zeros = torch.ones(hidden, device=device), torch.zeros(hidden, device=device)
        self.linears = [(layer.fc.weight, layer.fc.bias) for layer in layers]
        self.in_proj, self.out_norm, self.out_proj = (
            (part.weight, part.bias) for part in (denoiser.in_proj, denoiser.out_norm, denoiser.out_proj)
        )
        e = denoiser.time(torch.arange(num_train_timesteps, device=device))  # (T, E)
        known = denoiser.class_emb.weight  #                                   (C, E)
        by_time = [fold(layer, layer.proj(e), 1.0) for layer in layers]
        by_label = [fold(layer, F.linear(known, layer.proj.weight), 0.0) for layer in layers]
        self.by_time = torch.stack(by_time, dim=1)  #                               (T, L, 2H)
        self.by_label = F.pad(torch.stack(by_label), (0, 0, 0, 1))  # (L, C + 1, 2H): the null label adds nothing

    @torch.inference_mode()
    def __call__(self, xt: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """xt (B, D), t (B,) int64, labels (B,) int64 in 0..num_classes → the denoiser's output (B, D)."""
        shared = t.stride(0) == 0  # one timestep for all: add before looking the labels up
        tables = self.by_time[t[0]].unsqueeze(1) + self.by_label if shared else self.by_label
        h = F.silu(F.linear(xt, *self.in_proj))  # (B, H)
        x = h
        for i, (table, linear) in enumerate(zip(tables, self.linears, strict=True)):
            film = table.index_select(0, labels)  # (B, 2H): of one layer at a time it stays in the cache
            if not shared:
                film += self.by_time[:, i].index_select(0, t)
            scale, shift = film.chunk(2, dim=1)
            normed = torch.layer_norm(x, self.shape, self.ones, self.zeros)  # faster with weights than without
            x = F.linear(F.silu(torch.addcmul(shift, scale, normed), inplace=True), *linear)
            if i % 2:
                h = x = h + x
        normed = torch.layer_norm(h, self.shape, *self.out_norm)
        return F.linear(F.silu(normed, inplace=True), *self.out_proj)  # (B, D)


def fold(layer: FiLMLayer, film: Tensor, one: float) -> Tensor:
    """γ, β (N, 2H) and a layer's LayerNorm (w, b) → [(one + γ) w, (one + γ) b + β] (N, 2H); one is 1 or 0."""
    gamma, beta = film.chunk(2, dim=1)
    scale = one + gamma
    weight, bias = layer.norm.weight, layer.norm.bias
    offset = scale * bias + beta
    return torch.cat([scale * weight, offset], dim=1)
