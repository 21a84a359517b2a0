"""The denoiser for sampling: time and class conditioning read from tables instead of computed.

γ and β of every layer are linear in ``time(t) + class_emb(y)``, so each is a row of a table over t plus a row of
a table over y, exact. What is left per image is 1.065 of 3.36 MFLOP. The affine map of each LayerNorm is folded
in: (1 + γ)·(w·n + b) + β = [(1 + γ_t) w + γ_y w]·n + [(1 + γ_t) b + β_t + γ_y b + β_y], n = normalised x.

Shapes: B batch, D latent, H hidden, L layers, T timesteps, C classes.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_ray.models.conditioning import ConditionedDenoiser
from ldm_ray.models.denoiser import Denoiser, FiLMLayer

TRACED_WITH = 4  # rows
log = logging.getLogger(__name__)


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
        self.linears = [weights_of(layer.fc) for layer in layers]
        self.in_proj, self.out_norm, self.out_proj = (
            weights_of(part) for part in (denoiser.in_proj, denoiser.out_norm, denoiser.out_proj)
        )
        e = denoiser.time(torch.arange(num_train_timesteps, device=device))  # (T, E)
        known = denoiser.class_emb.weight  #                                   (C, E)
        by_time = [fold(layer, layer.proj(e), 1.0) for layer in layers]
        by_label = [fold(layer, F.linear(known, layer.proj.weight), 0.0) for layer in layers]
        self.by_time = torch.stack(by_time, dim=1)  #                               (T, L, 2H)
        self.by_label = F.pad(torch.stack(by_label), (0, 0, 0, 1))  # (L, C + 1, 2H): the null label adds nothing
        zeros = torch.zeros(TRACED_WITH, dtype=torch.int64, device=device)
        example = torch.zeros(TRACED_WITH, denoiser.latent_dim, device=device), zeros, zeros
        self.of_one_timestep = in_one_call(self._of_one_timestep, *example)
        self.of_several = in_one_call(self._of_several, *example)

    @torch.inference_mode()
    def __call__(self, xt: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """xt (B, D), t (B,) int64, labels (B,) int64 in 0..num_classes → the denoiser's output (B, D)."""
        return (self.of_one_timestep if t.stride(0) == 0 else self.of_several)(xt, t, labels)

    def _of_one_timestep(self, xt: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """t is the same for all rows: added before the labels are looked up."""
        tables = self.by_time.index_select(0, t[:1]).view(-1, 1, 2 * self.shape[0]) + self.by_label  # (L, C + 1, 2H)
        return self._layers(xt, (table.index_select(0, labels) for table in tables.unbind()))

    def _of_several(self, xt: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        pairs = zip(self.by_time.unbind(dim=1), self.by_label.unbind(), strict=True)
        return self._layers(xt, (label.index_select(0, labels) + time.index_select(0, t) for time, label in pairs))

    def _layers(self, xt: Tensor, films: Iterable[Tensor]) -> Tensor:
        """films: (B, 2H) each, of one layer at a time, so that it stays in the cache."""
        h = F.silu(F.linear(xt, *self.in_proj))  # (B, H)
        x = h
        for i, (film, linear) in enumerate(zip(films, self.linears, strict=True)):
            scale, shift = film.chunk(2, dim=1)
            normed = torch.layer_norm(x, self.shape, self.ones, self.zeros)  # faster with weights than without
            x = F.linear(F.silu(torch.addcmul(shift, scale, normed), inplace=True), *linear)
            if i % 2:
                h = x = h + x
        normed = torch.layer_norm(h, self.shape, *self.out_norm)
        return F.linear(F.silu(normed, inplace=True), *self.out_proj)  # (B, D)


def weights_of(part: nn.Linear | nn.LayerNorm) -> tuple[Tensor, Tensor]:
    return part.weight.detach(), part.bias.detach()


def in_one_call(function: Callable[..., Tensor], *example: Tensor) -> Callable[..., Tensor]:
    """The function as a TorchScript graph on a CPU: the same operations with no Python between them. Threads that
    run tiles side by side hand over Python's lock at every operation otherwise, which costs small tiles half their
    time. The function itself on other devices, and where PyTorch cannot (TorchScript is deprecated there) or
    makes other bits."""
    if example[0].device.type != "cpu":
        return function
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is deprecated
            graph = torch.jit.trace(function, example, check_trace=False)
        tried = torch.randn(example[0].shape, generator=torch.Generator().manual_seed(0)), *example[1:]
        wanted = function(*tried)
        if all(torch.equal(graph(*tried), wanted) for _ in range(3)):  # it optimises itself in the second call
            return graph
        log.info("TorchScript makes other bits than PyTorch here: it is left out")
    except (RuntimeError, AttributeError) as error:
        log.info("no TorchScript: %s", str(error).partition("\n")[0])
    return function


def fold(layer: FiLMLayer, film: Tensor, one: float) -> Tensor:
    """γ, β (N, 2H) and a layer's LayerNorm (w, b) → [(one + γ) w, (one + γ) b + β] (N, 2H); one is 1 or 0."""
    gamma, beta = film.chunk(2, dim=1)
    scale = one + gamma
    weight, bias = layer.norm.weight, layer.norm.bias
    offset = scale * bias + beta
    return torch.cat([scale * weight, offset], dim=1)
