"""Which device computes, in which precision, and what makes a GPU repeat its own bits."""

from __future__ import annotations

import contextlib
import os
import re
from typing import Any

import torch
from torch import Tensor

from ldm_ray.settings.errors import ConfigError

CUBLAS_WORKSPACE = ":4096:8"  # of the two with which cuBLAS sums in one order, the faster


def pick_device(name: str | None) -> torch.device:
    """The named device, or the best one here. ConfigError when the named one is not available."""
    devices = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name is None:
        return torch.device(next(each for each, available in devices.items() if available))
    if not devices.get(name, False):
        have = ", ".join(each for each, available in devices.items() if available)
        raise ConfigError(f"--device {name} is not available here; available: {have}")
    return torch.device(name)


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


def settle(device: torch.device | str, training: bool = False) -> torch.device:
    """The device, with this process set up so that a GPU makes the same bits from the same numbers every time.

    Whatever computes calls it first. fp32 is IEEE 754's, not TF32's 10 bits of mantissa; products of half precision
    are summed in fp32; cuDNN takes kernels by rule rather than by a race. ``training`` takes deterministic kernels
    of PyTorch as well: backward passes have others, sampling has none. Changes nothing for a CPU. What this
    promises and what it does not: docs/gpu.md.
    """
    device = torch.device(device)
    if device.type != "cuda":
        return device
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", CUBLAS_WORKSPACE)  # read when cuBLAS is first used
    backends, matmul = torch.backends, torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):  # PyTorch 2.9
        matmul.fp32_precision = backends.cudnn.conv.fp32_precision = "ieee"  # type: ignore[attr-defined]
    else:
        matmul.allow_tf32 = backends.cudnn.allow_tf32 = False
    matmul.allow_bf16_reduced_precision_reduction = matmul.allow_fp16_reduced_precision_reduction = False
    backends.cudnn.deterministic, backends.cudnn.benchmark = True, False
    if training:
        torch.use_deterministic_algorithms(True, warn_only=True)  # a warning names what has no such kernel
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # costs time alone
    return device


def numerics_of(device: torch.device) -> dict[str, Any]:
    """What a device's bits follow from beside PyTorch's version and its kind: nothing more for a CPU or MPS."""
    if device.type != "cuda":
        return {}
    return {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(), "matrices": "ieee fp32"}


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on the device. A GPU gets it from pinned memory, so nobody waits for the copy."""
    if device.type != "cuda" or tensor.device.type == "cuda":
        return tensor.to(device)
    return (tensor if tensor.is_pinned() else tensor.pin_memory()).to(device, non_blocking=True)


def picked(data: Tensor, rows: Tensor, device: torch.device) -> Tensor:
    """``data[rows]`` on the device; rows lie where the data do. Data that stay beside a GPU go through pinned memory:
    indexing gives memory that is not, whatever the data lie in."""
    if device.type != "cuda" or data.device.type == "cuda":
        return data[rows].to(device)
    batch = torch.empty(len(rows), *data.shape[1:], dtype=data.dtype, pin_memory=True)
    return sent(torch.index_select(data, 0, rows, out=batch), device)
