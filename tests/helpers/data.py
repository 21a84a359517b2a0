"""The project's folder, and the real data beside it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BESIDE = ROOT.parent / "shared"


@dataclass(frozen=True)
class Shared:
    """Real MNIST and checkpoints in the existing format, made by an independent program."""

    mnist: Path = BESIDE / "data" / "mnist"
    checkpoints: Path = BESIDE / "data" / "checkpoints"
