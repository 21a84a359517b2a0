"""Noise per image: a counter-based generator, so that no image's noise depends on another's.

Philox4x64-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), vectorised over images
and steps. A seed's words are those of ``numpy.random.Philox(key=seed)``; step s begins at word s·W, where W is 8
for 16 numbers. The words are the same on every device. B batch, D latent, S steps.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
KEY_STEPS = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)
ROUNDS = 10
AHEAD = 64  # steps
LOW = 0xFFFFFFFF


def philox(seeds: Tensor, blocks: Tensor) -> Tensor:
    """Words (B, N, 4) int64 (the bits of uint64): block b of a seed has words 4b … 4b + 3 of its stream.

    seeds (B,), blocks (N,), int64. numpy counts from 1: block b is Philox of counter (b + 1, 0, 0, 0), key (seed, 0).
    """
    device = seeds.device
    multipliers, key_steps = (
        # made on the device, so that nobody waits for a copy
        torch.stack([torch.full((1, 1), signed(word), device=device) for word in pair])
        for pair in (MULTIPLIERS, KEY_STEPS)
    )
    even = torch.zeros(2, len(seeds), len(blocks), dtype=torch.int64, device=device)  # words 0 and 2
    even[0] = blocks + 1
    odd = torch.zeros_like(even)  # words 1 and 3
    keys = torch.stack([seeds, torch.zeros_like(seeds)]).unsqueeze(-1)  # (2, B, 1)
    for _ in range(ROUNDS):
        high, low = multiply(even, multipliers)
        even, odd = high.flip(0) ^ odd ^ keys, low.flip(0)
        keys = keys + key_steps
    return torch.stack([even[0], odd[0], even[1], odd[1]], dim=-1)


def multiply(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """(high, low) 64 bits of the unsigned product, by halves: int64 wraps, and >> needs its sign bits taken off."""
    a_low, a_high = a & LOW, (a >> 32) & LOW
    b_low, b_high = b & LOW, (b >> 32) & LOW
    upper = a_high * b_low + ((a_low * b_low >> 32) & LOW)
    lower = a_low * b_high + (upper & LOW)
    return a_high * b_high + ((upper >> 32) & LOW) + ((lower >> 32) & LOW), a * b


def signed(word: int) -> int:
    """A uint64 as the int64 of the same bits."""
    return word - 2**64 if word >= 2**63 else word


def words(seeds: Tensor, first: int, count: int) -> Tensor:
    """(B, 4·count) int64: words of ``count`` blocks from block ``first`` on of each seed's stream.

    On a CPU numpy's generator makes them, in C. It is one generator that is set to each seed in turn: a new one for
    each seed would cost six times as much.
    """
    if seeds.device.type != "cpu":
        return philox(seeds, torch.arange(first, first + count, device=seeds.device)).flatten(1)
    stream = np.random.Philox(key=0, counter=first)
    state = stream.state  # with no words left over
    drawn = np.empty((len(seeds), 4 * count), np.uint64)
    for row, seed in zip(drawn, seeds.tolist(), strict=True):
        state["state"]["key"][0] = seed
        stream.state = state
        row[:] = stream.random_raw(4 * count)
    return torch.from_numpy(drawn.view(np.int64))


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
    """``noise(i)`` → (B, D) float32 of step i for the images of some seeds; sampling starts from step 0.

    Noise is drawn for ``ahead`` steps at a time: for a short plan, all of it together with that of step 0.
    """

    def __init__(self, seeds: Tensor, dim: int, ahead: int = AHEAD) -> None:
        self.seeds, self.dim, self.ahead = seeds, dim, ahead
        self.first, self.drawn = 0, torch.empty(0)

    def __call__(self, step: int) -> Tensor:
        if not self.first <= step < self.first + len(self.drawn):
            self.first, self.drawn = step, gaussian(self.seeds, step, self.dim, self.ahead)
        return self.drawn[step - self.first]
