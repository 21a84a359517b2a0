"""The denoiser: an MLP over latents, conditioned on time and class by FiLM (Perez et al., arXiv:1709.07871).

State-dict names are a file format: keep them. Shapes: B batch, D latent, H hidden, E embedding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCKS = ("b1", "b2", "b3", "b4")
MAX_PERIOD = 10_000.0


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """(B,) timesteps → (B, dim): [sin, cos] of t at dim/2 frequencies from 1 down towards 1/10,000
    (Vaswani et al., arXiv:1706.03762, section 3.5)."""
    half = dim // 2
    rates = torch.exp(torch.arange(half, device=t.device) * (-math.log(MAX_PERIOD) / half))
    angles = t[:, None].float() * rates  #                (B, dim/2)
    return torch.cat([angles.sin(), angles.cos()], dim=1)  # (B, dim)


class TimeMLP(nn.Module):
    def __init__(self, input_dim: int, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(input_dim, dim)
        self.fc2 = nn.Linear(dim, dim)

    def forward(self, t: Tensor) -> Tensor:
        e = timestep_embedding(t, self.fc1.in_features)
        return F.silu(self.fc2(F.silu(self.fc1(e))))  # (B, E)


class FiLMLayer(nn.Module):
    """h = (1 + γ)·LayerNorm(x) + β, then SiLU and a linear map; γ, β linear in the embedding."""

    def __init__(self, hidden_dim: int, embedding_dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden_dim)
        self.proj = nn.Linear(embedding_dim, 2 * hidden_dim)
        self.fc = nn.Linear(hidden_dim, hidden_dim)
        nn.init.zeros_(self.proj.weight)  # FiLM starts as the identity: γ = β = 0
        nn.init.zeros_(self.proj.bias)

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        gamma, beta = self.proj(e).chunk(2, dim=1)  # (B, H) each
        h = torch.addcmul(beta, 1 + gamma, self.norm(x))
        return self.fc(F.silu(h))


class Denoiser(nn.Module):
    """Predicts from noised latents, timestep and label; the same for every autoencoder.

    label ``num_classes`` (``null_label``) means unconditional: nothing is added for the class.
    """

    def __init__(
        self,
        latent_dim: int = 16,
        hidden_dim: int = 256,
        num_classes: int = 10,
        embedding_dim: int = 256,
        sinusoid_dim: int = 128,
    ) -> None:
        super().__init__()
        self.latent_dim, self.hidden_dim, self.num_classes = latent_dim, hidden_dim, num_classes
        self.time = TimeMLP(sinusoid_dim, embedding_dim)
        # Its own initialisation imports the compiler when it meets the meta device of from_state: 1.6 s
        self.class_emb = nn.Embedding(num_classes, embedding_dim, _weight=torch.randn(num_classes, embedding_dim))
        self.in_proj = nn.Linear(latent_dim, hidden_dim)
        for block in BLOCKS:
            for half in "ab":
                self.add_module(block + half, FiLMLayer(hidden_dim, embedding_dim))
        self.out_norm = nn.LayerNorm(hidden_dim)
        self.out_proj = nn.Linear(hidden_dim, latent_dim)
        nn.init.zeros_(self.out_proj.weight)  # starts by predicting zero, the mean of the noise
        nn.init.zeros_(self.out_proj.bias)

    @property
    def null_label(self) -> int:
        return self.num_classes

    def film_layers(self) -> Iterator[FiLMLayer]:
        """In the order in which they run; each two have a residual connection around them."""
        for block in BLOCKS:
            for half in "ab":
                layer = self.get_submodule(block + half)
                assert isinstance(layer, FiLMLayer)
                yield layer

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> Denoiser:
        """Builds the denoiser whose sizes the state dict has, with its weights. RuntimeError when they do not fit."""
        hidden_dim, latent_dim = state["in_proj.weight"].shape
        embedding_dim, sinusoid_dim = state["time.fc1.weight"].shape
        if sinusoid_dim < 2 or sinusoid_dim % 2:
            raise RuntimeError(f"time.fc1.weight has {sinusoid_dim} columns, not an even number of them")
        with torch.device("meta"):  # no memory is taken for sizes that the other weights may not have
            model = cls(latent_dim, hidden_dim, state["class_emb.weight"].shape[0], embedding_dim, sinusoid_dim)
        model.load_state_dict({name: value.detach().clone() for name, value in state.items()}, assign=True)
        return model

    def embed(self, t: Tensor, labels: Tensor | None) -> Tensor:
        """(B,) int64 timesteps, (B,) int64 labels in 0..num_classes → (B, E)."""
        e = self.time(t)
        if labels is None:
            return e
        known = (labels < self.num_classes).to(e.dtype)[:, None]
        return torch.addcmul(e, self.class_emb(labels.clamp_max(self.num_classes - 1)), known)

    def forward(self, xt: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """xt (B, D), t (B,), labels (B,) or None → prediction (B, D)."""
        e = self.embed(t, labels)
        h = F.silu(self.in_proj(xt))  # (B, H)
        layers = self.film_layers()
        for a, b in zip(layers, layers, strict=True):
            h = h + b(a(h, e), e)
        return self.out_proj(F.silu(self.out_norm(h)))  # (B, D)
