"""What the benchmarks of a GPU share: a report that is written line by line, and the clock of a figure."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROW_S = 1 / 150  # share of the minutes that one figure may take


@dataclass
class Report:
    """What was measured, on the screen and in a file, line by line."""

    output: Path
    minutes: float
    began: float = field(default_factory=time.perf_counter)
    rows: list[dict[str, Any]] = field(default_factory=list)

    @property
    def left(self) -> float:
        """Seconds."""
        return 60 * self.minutes - (time.perf_counter() - self.began)

    @property
    def limit(self) -> float:
        """Seconds that a figure may take."""
        return 60 * self.minutes * ROW_S

    def note(self, part: str, name: str, value: Any, unit: str = "", **more: Any) -> None:
        """A figure."""
        self.rows.append({"part": part, "name": name, "value": value, "unit": unit, **more})
        shown = f"{value:,.{2 if abs(value) < 100 else 0}f}" if isinstance(value, float) else str(value)
        beside = "  ".join(f"{key} {round(told, 3) if isinstance(told, float) else told}" for key, told in more.items())
        seconds = time.perf_counter() - self.began
        print(f"{seconds:6.1f} s  {part:<10} {name:<38} {shown:>14} {unit:<10} {beside}".rstrip(), flush=True)
        self.output.write_text(json.dumps({"minutes": self.minutes, "seconds": seconds, "rows": self.rows}, indent=1))

    def attempt(self, part: str, name: str, work: Callable[[], Any], keep: float = 0.0) -> Any:
        """What ``work`` returns; None, with a line that says why, where it fails or the time is up."""
        if self.left < 60 * self.minutes * keep:
            self.note(part, name, "left out", why="no time left")
            return None
        try:
            return work()
        except Exception as error:  # the next part may still be worth its time
            self.note(part, name, "FAILED", why=f"{type(error).__name__}: {str(error).strip()[:300]}")
            return None


@dataclass
class Bench:
    report: Report
    device: torch.device
    images: Tensor  # (N, 1, H, W) uint8, of the training split
    labels: Tensor
    test: Tensor
    timed: int
    scratch: Path

    def done(self) -> None:
        """Waits for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def rate(self, work: Callable[[], object], count: int) -> float:
        """Of ``count`` things a call, per second: the median of calls until the figure's time is up."""
        work()
        self.done()
        took: list[float] = []
        started = time.perf_counter()
        while not took or time.perf_counter() - started < self.report.limit:
            before = time.perf_counter()
            work()
            self.done()
            took.append(time.perf_counter() - before)
        return count / statistics.median(took)


def memory(device: torch.device) -> dict[str, Any]:
    return {"peak_mb": round(torch.cuda.max_memory_allocated() / 1e6)} if device.type == "cuda" else {}
