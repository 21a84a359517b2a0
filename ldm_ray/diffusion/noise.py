"""Noise per image: a counter-based generator, so that no image's noise depends on another's.

Philox4x64-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), vectorised over images
and steps: the words of ``numpy.random.Philox(key=seed)``, of which step s takes those from s·W on, W = 8 for
16 numbers. Integers are the same on every device. B batch, D latent, S steps.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
KEY_STEPS = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)
ROUNDS = 10
LOW = 0xFFFFFFFF
LONG = 32  # blocks from which numpy is faster


def philox(seeds: Tensor, blocks: Tensor) -> Tensor:
    """Words (B, N, 4) int64 (the bits of uint64): block b of a seed has words 4b … 4b + 3 of its stream.

    seeds (B,), blocks (N,), int64. numpy counts from 1: block b is Philox of counter (b + 1, 0, 0, 0), key (seed, 0).
    """
    zero = torch.zeros(len(seeds), len(blocks), dtype=torch.int64, device=seeds.device)
    c0, c1, c2, c3 = zero + blocks + 1, zero, zero, zero
    k0, k1 = seeds[:, None], zero
    for _ in range(ROUNDS):
        high0, low0 = multiply(c0, MULTIPLIERS[0])
        high1, low1 = multiply(c2, MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + signed(KEY_STEPS[0]), k1 + signed(KEY_STEPS[1])
    return torch.stack([c0, c1, c2, c3], dim=-1)


def multiply(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """(high, low) 64 bits of the unsigned product, by halves: int64 wraps, and >> needs its sign bits taken off."""
    a_low, a_high = a & LOW, (a >> 32) & LOW
    b_low, b_high = b & LOW, b >> 32
    low_high, high_low = a_low * b_high, a_high * b_low
    carry = (((a_low * b_low) >> 32) & LOW) + (low_high & LOW) + (high_low & LOW)
    high = a_high * b_high + ((low_high >> 32) & LOW) + ((high_low >> 32) & LOW) + (carry >> 32)
    return high, a * signed(b)


def signed(word: int) -> int:
    """A uint64 as the int64 of the same bits."""
    return word - 2**64 if word >= 2**63 else word


def words(seeds: Tensor, first: int, count: int) -> Tensor:
    """(B, 4·count) int64: words of ``count`` blocks from block ``first`` on of each seed's stream.

    Long stretches on a CPU come from numpy's generator, which is written in C and makes the same words.
    """
    if seeds.device.type == "cpu" and count >= LONG:
        streams = (np.random.Philox(key=seed, counter=first) for seed in seeds.tolist())
        return torch.from_numpy(np.stack([stream.random_raw(4 * count) for stream in streams]).view(np.int64))
    return philox(seeds, torch.arange(first, first + count, device=seeds.device)).flatten(1)


def gaussian(seeds: Tensor, step: int, dim: int, steps: int = 1) -> Tensor:
    """Unit Gaussian noise (S, B, dim) float32 of ``steps`` steps from ``step`` on, for seeds (B,) int64.

    Box and Muller (1958) in float64 on the two 32-bit halves of each word.
    """
    blocks = -(-dim // 8)  # of four words, two numbers each
    drawn = words(seeds, step * blocks, steps * blocks)
    drawn = drawn.view(len(seeds), steps, 4 * blocks)
    exact = torch.float32 if seeds.device.type == "mps" else torch.float64
    first = ((drawn >> 32) & LOW).to(exact).add_(0.5).mul_(2.0**-32)  # in (0, 1)
    second = (drawn & LOW).to(exact).mul_(2.0**-32 * 2 * math.pi)
    radius = first.log_().mul_(-2).sqrt_()
    both = torch.stack([radius * second.cos(), radius * second.sin()], dim=-1).flatten(2)[..., :dim]
    return both.float().transpose(0, 1).contiguous()


class ImageNoise:
    """noise(i) → (B, D) float32 of step i for the images of some seeds; step 0 is what sampling starts from.

    Numbers for ``ahead`` steps are drawn at a time.
    """

    def __init__(self, seeds: Tensor, dim: int, ahead: int = 64) -> None:
        self.seeds, self.dim, self.ahead = seeds, dim, ahead
        self.first, self.drawn = 0, torch.empty(0)

    def __call__(self, step: int) -> Tensor:
        if not self.first <= step < self.first + len(self.drawn):
            self.first = step  # deterministic samplers take no more than step 0
            self.drawn = gaussian(self.seeds, step, self.dim, self.ahead if step else 1)
        return self.drawn[step - self.first]
