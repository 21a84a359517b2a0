"""The denoiser for sampling: time and class conditioning read from tables instead of computed.

γ and β of every layer are linear in ``time(t) + class_emb(y)``, so each is a row of a table over t plus a row of
a table over y, exact. What is left per image is 1.065 of 3.36 MFLOP. The affine map of each LayerNorm is folded
in: (1 + γ)·(w·n + b) + β = [(1 + γ_t) w + γ_y w]·n + [(1 + γ_t) b + β_t + γ_y b + β_y], n = normalised x.

Shapes: B batch, D latent, H hidden, L layers, T timesteps, C classes.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm_ray.models.conditioning import ConditionedDenoiser
from ldm_ray.models.denoiser import Denoiser, FiLMLayer

TRACED_WITH = 4  # rows
# weight and bias in turn: of a LayerNorm without effect, in_proj, out_norm, out_proj, then each layer's linear map
Weights = tuple[Tensor, ...]
AROUND = 8  # tensors before those of the layers
graphs: dict[Any, Any] = {}
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
        e = denoiser.time(torch.arange(num_train_timesteps, device=denoiser.in_proj.weight.device))  # (T, E)
        known = denoiser.class_emb.weight  #                                                           (C, E)
        by_time = [fold(layer, layer.proj(e), 1.0) for layer in layers]
        by_label = [fold(layer, F.linear(known, layer.proj.weight), 0.0) for layer in layers]
        self.by_time = torch.stack(by_time, dim=1)  #                               (T, L, 2H)
        self.by_label = F.pad(torch.stack(by_label), (0, 0, 0, 1))  # (L, C + 1, 2H): the null label adds nothing
        unscaled = torch.ones_like(denoiser.out_norm.weight), torch.zeros_like(denoiser.out_norm.bias)
        parts = denoiser.in_proj, denoiser.out_norm, denoiser.out_proj, *(layer.fc for layer in layers)
        self._set(*unscaled, *(weight.detach() for part in parts for weight in (part.weight, part.bias)))

    def _set(self, *weights: Tensor) -> None:
        self.weights = weights
        self.one_timestep = in_one_call(one_timestep, self.by_time, self.by_label, weights)
        self.several_timesteps = in_one_call(several_timesteps, self.by_time, self.by_label, weights)

    @torch.inference_mode()
    def in_bf16(self) -> TabledDenoiser:
        """The same with the layers' H × H matrices and their inputs in bfloat16; all else stays float32, even the sums
        inside a product. The tables are shared."""
        other = copy.copy(self)
        other._set(*self.weights[:AROUND], *(weight.bfloat16() for weight in self.weights[AROUND:]))
        return other

    @torch.inference_mode()
    def __call__(self, xt: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """xt (B, D), t (B,) int64, labels (B,) int64 in 0..num_classes → the denoiser's output (B, D)."""
        run = self.one_timestep if t.stride(0) == 0 else self.several_timesteps
        return run(xt, t, labels, self.by_time, self.by_label, self.weights)


def one_timestep(xt: Tensor, t: Tensor, labels: Tensor, by_time: Tensor, by_label: Tensor, weights: Weights) -> Tensor:
    """t is the same for all rows, so its row of the table is added before the labels are looked up."""
    tables = by_time.index_select(0, t[:1])[0].unsqueeze(1) + by_label  # (L, C + 1, 2H)
    return run_layers(xt, (table.index_select(0, labels) for table in tables.unbind()), weights)


def several_timesteps(
    xt: Tensor, t: Tensor, labels: Tensor, by_time: Tensor, by_label: Tensor, weights: Weights
) -> Tensor:
    tables = zip(by_time.unbind(dim=1), by_label.unbind(), strict=True)
    return run_layers(xt, (time.index_select(0, t) + label.index_select(0, labels) for time, label in tables), weights)


def run_layers(xt: Tensor, films: Iterable[Tensor], weights: Weights) -> Tensor:
    """films: (B, 2H) each, computed one layer at a time so that each stays in the processor's cache."""
    unscaled, in_proj, out_norm, out_proj, *linears = zip(weights[::2], weights[1::2], strict=True)
    h = F.silu(F.linear(xt, *in_proj))  # (B, H)
    x, shape = h, h.shape[1:]
    for i, (film, linear) in enumerate(zip(films, linears, strict=True)):
        scale, shift = film.chunk(2, dim=1)
        normed = torch.layer_norm(x, shape, *unscaled)  # faster with weights than without
        x = product(F.silu(torch.addcmul(shift, scale, normed), inplace=True), *linear)
        if i % 2:
            h = x = h + x
    normed = torch.layer_norm(h, shape, *out_norm)
    return F.linear(F.silu(normed, inplace=True), *out_proj)  # (B, D)


def product(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x·weightᵀ + bias in the weight's precision, returned in x's."""
    if weight.dtype == x.dtype:
        return F.linear(x, weight, bias)
    return F.linear(x.to(weight.dtype), weight, bias).to(x.dtype)


def in_one_call(function: Callable[..., Tensor], by_time: Tensor, by_label: Tensor, weights: Weights) -> Any:
    """The function as a TorchScript graph on a CPU: the same operations, without Python between them.

    Threads that compute tiles side by side would otherwise pass Python's lock around at every operation, which
    doubles the time of small tiles. It stays the plain function on other devices, where PyTorch cannot trace it
    (TorchScript is deprecated) and where the graph's bits differ.

    PyTorch never frees a graph, so a graph holds no weights, and all networks of one shape and precision share it.
    """
    if by_time.device.type != "cpu":
        return function
    key = function, weights[-1].dtype, *(tensor.shape for tensor in (by_time, by_label, *weights))
    if key not in graphs:
        graphs[key] = traced(function, by_time, by_label, weights)
    return graphs[key]


def traced(function: Callable[..., Tensor], by_time: Tensor, by_label: Tensor, weights: Weights) -> Any:
    random = torch.Generator().manual_seed(0)
    zeros = torch.zeros(TRACED_WITH, dtype=torch.int64)
    inputs = torch.randn(TRACED_WITH, weights[2].shape[1], generator=random), zeros, zeros, by_time, by_label, weights
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is deprecated
            graph = torch.jit.trace(function, inputs, check_trace=False)
        wanted = function(*inputs)
        if all(torch.equal(graph(*inputs).nan_to_num(), wanted.nan_to_num()) for _ in range(3)):  # it optimises itself
            return graph
        log.info("TorchScript gives other bits than PyTorch here, so it is not used")
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
