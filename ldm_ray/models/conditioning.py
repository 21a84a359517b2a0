"""What every denoiser gets beside its input: timestep and class, as one embedding.

State-dict names are a file format: keep them. Shapes: B batch, D numbers of an input, E embedding.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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


class ConditionedDenoiser(nn.Module):
    """``forward(xt (B, D), t (B,), labels (B,) or None)`` → prediction (B, D), whatever D numbers are diffused.

    label ``num_classes`` (``null_label``) means unconditional: nothing is added for the class. A subclass sets
    ``latent_dim``, which is D, and ``hidden_dim``, its width.
    """

    latent_dim: int
    hidden_dim: int

    def __init__(self, num_classes: int, embedding_dim: int, sinusoid_dim: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.time = TimeMLP(sinusoid_dim, embedding_dim)
        # Its own initialisation imports the compiler when it meets the meta device of from_state: 1.6 s
        self.class_emb = nn.Embedding(num_classes, embedding_dim, _weight=torch.randn(num_classes, embedding_dim))

    @property
    def null_label(self) -> int:
        return self.num_classes

    def embed(self, t: Tensor, labels: Tensor | None) -> Tensor:
        """(B,) int64 timesteps, (B,) int64 labels in 0..num_classes → (B, E)."""
        e = self.time(t)
        if labels is None:
            return e
        known = (labels < self.num_classes).to(e.dtype)[:, None]
        return torch.addcmul(e, self.class_emb(labels.clamp_max(self.num_classes - 1)), known)


def zeroed(layer: Any) -> Any:
    """A linear map or convolution that begins with giving 0."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def sizes_of(state: Any) -> tuple[int, int, int]:
    """(classes, embedding, sinusoid) of a state dict. KeyError, RuntimeError: it has none, or none that can be."""
    embedding_dim, sinusoid_dim = state["time.fc1.weight"].shape
    if sinusoid_dim < 2 or sinusoid_dim % 2:
        raise RuntimeError(f"time.fc1.weight has {sinusoid_dim} columns, not an even number of them")
    return state["class_emb.weight"].shape[0], embedding_dim, sinusoid_dim


def filled_with(model: Any, state: Any) -> Any:
    """A model of the meta device with copies of these weights. RuntimeError when they do not fit."""
    model.load_state_dict({name: value.detach().clone() for name, value in state.items()}, assign=True)
    return model
