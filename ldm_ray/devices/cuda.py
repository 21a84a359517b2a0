"""What torch's CUDA needs of a machine, and what is wrong where it does not work."""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path

import torch

from ldm_ray.settings.errors import ConfigError

# The oldest NVIDIA driver on Linux for each CUDA, by docs.nvidia.com/deploy/cuda-compatibility
DRIVERS = {11: (450, 80, 2), 12: (525, 60, 13), 13: (580, 65, 6)}
DRIVER_FILE = Path("/proc/driver/nvidia/version")


def driver_needed(cuda: str) -> tuple[int, ...]:
    """The oldest driver for a CUDA such as ``13.0``; that of the newest CUDA known here for a newer one."""
    return DRIVERS[min(int(cuda.partition(".")[0]), max(DRIVERS))]


def driver_here(file: Path = DRIVER_FILE) -> tuple[int, ...] | None:
    """The version of the machine's NVIDIA driver, as (580, 65, 6); None where there is none."""
    try:
        match = re.search(r"\b\d{3,}\.[\d.]*\d", file.read_text())
    except OSError:
        return None
    return tuple(map(int, match[0].split("."))) if match else None


def check_visible() -> None:
    """For a worker that was given a GPU. ConfigError in one line that says why, unless torch can use it."""
    if not torch.cuda.is_available():
        why = reason(torch.__version__, torch.version.cuda, driver_here(), os.environ.get("CUDA_VISIBLE_DEVICES"))
        raise ConfigError(f"the GPU worker on {socket.gethostname()} cannot use its GPU: {why}")


def reason(version: str, cuda: str | None, driver: tuple[int, ...] | None, visible: str | None) -> str:
    """Why torch of a version, built for a CUDA, sees no GPU beside a driver; with what to do."""
    if cuda is None:
        return f"torch {version} is built without CUDA; install the one of the lock (deploy/install.sh)"
    needed = driver_needed(cuda)
    if driver is None:
        return (
            f"there is no NVIDIA driver ({DRIVER_FILE}), and torch {version} needs {dotted(needed)} or newer; install "
            "one, start the container with --gpus all, or use --device cpu"
        )
    if driver < needed:
        older = "; or torch for CUDA 12, by LDM_RAY_CUDA (deploy/install.sh)" if driver >= DRIVERS[12] else ""
        return (
            f"NVIDIA driver {dotted(driver)} is too old, torch {version} of CUDA {cuda} needs {dotted(needed)} or "
            f"newer; take a newer driver{older} (docs/running.md)"
        )
    return (
        f"driver {dotted(driver)} suits torch {version}, which sees none with CUDA_VISIBLE_DEVICES={visible or ''}; "
        "look at nvidia-smi there, and whether the container was started with --gpus all"
    )


def dotted(version: tuple[int, ...]) -> str:
    """As NVIDIA writes it: 580.65.06."""
    return ".".join([str(version[0]), *(f"{part:02d}" for part in version[1:])])
