"""Noise per image: no image's noise depends on another's."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


class ImageNoise:
    """A stream of unit Gaussian noise for each seed, from numpy's Philox keyed by the seed.

    Calling it gives the next (B, D) float32 of every image. Numbers are drawn ``ahead`` steps at a time.
    """

    def __init__(self, seeds: Sequence[int], dim: int, device: torch.device | str = "cpu", ahead: int = 64) -> None:
        self.streams = [np.random.Generator(np.random.Philox(key=seed)) for seed in seeds]
        self.dim, self.device, self.ahead = dim, device, ahead
        self.drawn: Tensor = torch.empty(0)
        self.used = 0

    def __call__(self) -> Tensor:
        if self.used == len(self.drawn):
            block = [stream.standard_normal((self.ahead, self.dim), dtype=np.float32) for stream in self.streams]
            self.drawn = torch.from_numpy(np.stack(block, axis=1)).to(self.device)  # (ahead, B, D)
            self.used = 0
        self.used += 1
        return self.drawn[self.used - 1]
