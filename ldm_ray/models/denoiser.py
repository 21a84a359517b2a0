"""The denoiser of latents: an MLP, conditioned on time and class by FiLM (Perez et al., arXiv:1709.07871).

State-dict names are a file format: keep them. Shapes: B batch, D latent, H hidden, E embedding.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_ray.models.conditioning import ConditionedDenoiser, filled_with, sizes_of, zeroed
from ldm_ray.settings.diffusion import NUM_BLOCKS


class FiLMLayer(nn.Module):
    """h = (1 + γ)·LayerNorm(x) + β, then SiLU and a linear map; γ, β linear in the embedding."""

    def __init__(self, hidden_dim: int, embedding_dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden_dim)
        self.proj = zeroed(nn.Linear(embedding_dim, 2 * hidden_dim))  # starts as the identity: γ = β = 0
        self.fc = nn.Linear(hidden_dim, hidden_dim)

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        gamma, beta = self.proj(e).chunk(2, dim=1)  # (B, H) each
        h = torch.addcmul(beta, 1 + gamma, self.norm(x))
        return self.fc(F.silu(h))


def film_names(num_blocks: int) -> list[str]:
    """b1a, b1b, b2a, …"""
    return [f"b{block}{half}" for block in range(1, num_blocks + 1) for half in "ab"]


def blocks_in(state: Iterable[str]) -> int:
    """The residual blocks that the names of a state dict have, at least 1."""
    return max(1, sum(re.fullmatch(r"b\d+a\.fc\.weight", name) is not None for name in state))


class Denoiser(ConditionedDenoiser):
    """Predicts from noised latents, timestep and label; the same for every autoencoder."""

    def __init__(
        self,
        latent_dim: int = 16,
        hidden_dim: int = 256,
        num_classes: int = 10,
        embedding_dim: int = 256,
        sinusoid_dim: int = 128,
        num_blocks: int = NUM_BLOCKS,
    ) -> None:
        super().__init__(num_classes, embedding_dim, sinusoid_dim)
        self.latent_dim, self.hidden_dim, self.num_blocks = latent_dim, hidden_dim, num_blocks
        self.in_proj = nn.Linear(latent_dim, hidden_dim)
        for name in film_names(num_blocks):
            self.add_module(name, FiLMLayer(hidden_dim, embedding_dim))
        self.out_norm = nn.LayerNorm(hidden_dim)
        self.out_proj = zeroed(nn.Linear(hidden_dim, latent_dim))  # predicts zero, the mean of the noise

    def film_layers(self) -> Iterator[FiLMLayer]:
        """In the order in which they run; each two have a residual connection around them."""
        for name in film_names(self.num_blocks):
            layer = self.get_submodule(name)
            assert isinstance(layer, FiLMLayer)
            yield layer

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> Denoiser:
        """Builds the denoiser whose sizes the state dict has, with its weights. RuntimeError when they do not fit."""
        hidden_dim, latent_dim = state["in_proj.weight"].shape
        num_blocks = blocks_in(state)
        with torch.device("meta"):  # no memory is taken for sizes that the other weights may not have
            model = cls(latent_dim, hidden_dim, *sizes_of(state), num_blocks)
        return filled_with(model, state)

    def forward(self, xt: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """xt (B, D), t (B,), labels (B,) or None → prediction (B, D)."""
        e = self.embed(t, labels)
        h = F.silu(self.in_proj(xt))  # (B, H)
        layers = self.film_layers()
        for a, b in zip(layers, layers, strict=True):
            h = h + b(a(h, e), e)
        return self.out_proj(F.silu(self.out_norm(h)))  # (B, D)
