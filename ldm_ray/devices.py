"""Which device computes, and in which precision."""

from __future__ import annotations

import contextlib
import os
import re
from typing import Any

import torch

from ldm_ray.errors import ConfigError


def pick_device(given: str | None) -> torch.device:
    """The given device, or the best there is. ConfigError when the given one is not there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if given is None:
        return torch.device(next(name for name, available in there.items() if available))
    if not there.get(given, False):
        have = ", ".join(name for name, available in there.items() if available)
        raise ConfigError(f"--device {given} is not available here; available: {have}")
    return torch.device(given)


def cpu_threads(cores: int) -> int:
    """Threads of a computation on so many cores: one each, or as many as OMP_NUM_THREADS allows."""
    allowed = re.match(r"[1-9]\d*", os.environ.get("OMP_NUM_THREADS", ""))
    return min(cores, int(allowed[0])) if allowed else cores


def autocast(device: torch.device, enabled: bool) -> tuple[Any, torch.amp.GradScaler]:
    """(context, gradient scaler) of ``--amp``: bfloat16, or float16 with scaling on a GPU without it."""
    half = device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)
    dtype = torch.float16 if half else torch.bfloat16
    context = torch.autocast(device.type, dtype=dtype) if enabled else contextlib.nullcontext()
    return context, torch.amp.GradScaler(device.type, enabled=enabled and half)
