"""What Ray Tune tells while a search runs: into the records, and onto the terminal."""

from __future__ import annotations

import logging
import math
import sys
import threading
import time
from pathlib import Path
from typing import Any

from ray.tune import Callback, Stopper

from ldm_ray.search.records import Records, Trial
from ldm_ray.settings.diffusion import canonical

log = logging.getLogger("ldm_ray.tune")
WATCH_S = 0.2
KEPT = ("epoch", "objective", "train_loss", "val_loss", "seconds")


class Scribe(Callback):
    """Writes every trial's start, epochs and end into the records."""

    def __init__(self, records: Records, epochs: int, stop: Path) -> None:
        self.records, self.epochs, self.stop = records, epochs, stop
        self.known: dict[str, Trial] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles its callbacks into its own state, which a resumed search does not read

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        lost = self.known.get(trial.trial_id)  # its worker died, and another begins it anew
        self.known[trial.trial_id] = self.records.start(dict(trial.config["settings"]), lost)

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:
        own = self.known[trial.trial_id]
        if "failed" in result:
            self.records.settle(own, "failed", result["failed"])
        elif "interrupted" not in result:
            self.records.point(own, {name: result[name] for name in KEPT})

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        own = self.known[trial.trial_id]
        if own.status == "running":
            finished = len(own.curve) >= self.epochs
            self.records.settle(own, "finished" if finished else "interrupted" if self.stop.exists() else "stopped")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        own = self.known[trial.trial_id]
        if self.stop.exists():
            self.records.settle(own, "interrupted")
        elif own.status == "running":
            self.records.settle(own, "failed", last_line(Path(trial.error_file)) if trial.error_file else "lost")


class StopFile(Stopper):
    """Ends all trials once the file is there."""

    def __init__(self, file: str) -> None:
        self.file = file

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return Path(self.file).exists()


class Watch:
    """Follows the search from the main thread: a line for each trial, on a terminal a progress line in between, and
    the time budget."""

    def __init__(self, records: Records, total: int, budget_s: float | None, stop: Path) -> None:
        self.records, self.total, self.budget_s, self.stop = records, total, budget_s, stop
        self.started, self.shown, self.out_of_time = time.monotonic(), "", False
        self.told = {trial.number for trial in records.settled}
        self.before = len(self.told)

    def until(self, thread: threading.Thread) -> None:
        """Returns when the thread has ended."""
        while thread.is_alive():
            thread.join(WATCH_S)
            if self.budget_s and not self.out_of_time and time.monotonic() - self.started > self.budget_s:
                self.out_of_time = True
                self.stop.touch()
            self.tell()
            if sys.stderr.isatty():
                self.line(self.text())
        self.tell()
        self.line("")

    def tell(self) -> None:
        """A line for each trial that has been settled since."""
        with self.records.lock:
            new = [trial for trial in self.records.settled if trial.number not in self.told]
        for trial in new:
            self.line("")
            log.info("%s", line_of(trial))
            self.told.add(trial.number)

    def text(self) -> str:
        """Trials done, the best so far, time left."""
        with self.records.lock:
            trials, best = list(self.records.trials), self.records.best
        settled = sum(trial.status not in ("running", "interrupted") for trial in trials)
        failed = sum(trial.status == "failed" for trial in trials)
        running = sum(trial.status == "running" for trial in trials)
        parts = [f"trials {settled}/{self.total} done, {running} running" + (f", {failed} failed" if failed else "")]
        if best is not None:
            parts.append(f"best {best.objective:.4f} (trial {best.number}, epoch {len(best.curve)})")
        elapsed, done = time.monotonic() - self.started, settled - self.before
        left = elapsed / done * (self.total - settled) if done > 0 else math.inf
        left = min(left, max(0.0, self.budget_s - elapsed)) if self.budget_s else left
        if math.isfinite(left):
            parts.append(time.strftime("%M:%S" if left < 3600 else "%H:%M:%S", time.gmtime(left)) + " left")
        return "  ".join(parts)

    def line(self, text: str) -> None:
        if text != self.shown:
            print("\r\033[K" + text, end="", file=sys.stderr, flush=True)
            self.shown = text


def line_of(trial: Trial) -> str:
    """A settled trial in words."""
    settings = "  ".join(
        f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in canonical(trial.settings).items()
    )
    score = trial.reason if trial.status == "failed" else f"{trial.objective:.4f}"
    return f"trial {trial.number:>3}  {trial.status:<8} after {len(trial.curve)} epochs  {score}  {settings}"


def last_line(file: Path) -> str:
    """The error itself, which is the last line of a traceback."""
    lines = [line for line in file.read_text().splitlines() if line.strip()] if file.exists() else []
    return lines[-1].strip()[:300] if lines else "lost"
