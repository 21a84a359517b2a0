"""An exponential moving average of weights."""

from __future__ import annotations

import copy

import torch
from torch import nn


class EMA:
    """Follows a model: ema ← d·ema + (1 − d)·weights, with d = min(decay, (1 + n)/(10 + n)) after n updates,
    so that the first, useless weights are soon forgotten."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = copy.deepcopy(model).requires_grad_(False).eval()
        self.decay, self.updates = decay, 0
        self._source = [p.detach() for p in model.parameters()]
        self._target = [p.detach() for p in self.model.parameters()]

    @torch.no_grad()
    def update(self) -> None:
        """Takes the model's weights as they are now."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self._target, self._source, 1 - decay)
        self.updates += 1
