"""What a search keeps: its trials, one line each, from which it can go on, and what comes out of them."""

from __future__ import annotations

import dataclasses
import json
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ldm_ray.files.records import read_records, write_records
from ldm_ray.settings.diffusion import canonical
from ldm_ray.settings.errors import ConfigError
from ldm_ray.settings.training import TrainConfig

SHOWN = 10


@dataclass
class Trial:
    """curve: the metrics after each epoch. status: running, finished (all epochs), stopped (by ASHA), failed
    (reason says why), or interrupted (the search was)."""

    number: int
    settings: dict[str, Any]
    status: str = "running"
    curve: list[dict[str, Any]] = field(default_factory=list)
    reason: str = ""

    @property
    def objective(self) -> float | None:
        """After its last epoch, smaller is better; None where it failed or has none."""
        return self.curve[-1]["objective"] if self.curve and self.status != "failed" else None

    @property
    def seconds(self) -> float:
        return sum(point["seconds"] for point in self.curve)


@dataclass(frozen=True)
class SearchPaths:
    """The files of one search."""

    folder: Path

    @property
    def search(self) -> Path:
        """The search's own settings and what it was run on."""
        return self.folder / "search.json"

    @property
    def trials(self) -> Path:
        return self.folder / "trials.jsonl"

    @property
    def best_config(self) -> Path:
        return self.folder / "best_config.json"

    @property
    def table(self) -> Path:
        return self.folder / "table.txt"

    @property
    def stop(self) -> Path:
        return self.folder / "stop"

    def picture(self, name: str) -> Path:
        return self.folder / f"{name}.png"


class Records:
    """The trials of a search, in the order of their start, kept in a file that is always whole.

    Methods may be called from any thread.
    """

    def __init__(self, file: Path, trials: list[Trial]) -> None:
        self.file, self.trials, self.lock = file, trials, threading.RLock()

    @classmethod
    def read(cls, file: Path) -> Records:
        """Of a file that an earlier search left; trials that were running then are interrupted."""
        trials = [Trial(**record) for record in read_records(file)]
        for trial in trials:
            trial.status = "interrupted" if trial.status == "running" else trial.status
        return cls(file, trials)

    @property
    def settled(self) -> list[Trial]:
        return [trial for trial in self.trials if trial.status not in ("running", "interrupted")]

    @property
    def interrupted(self) -> list[Trial]:
        return [trial for trial in self.trials if trial.status == "interrupted"]

    def start(self, settings: dict[str, Any], again: Trial | None = None) -> Trial:
        """A new trial; or ``again``, or an interrupted one of the same settings, from its beginning."""
        with self.lock:
            again = again or next((trial for trial in self.interrupted if trial.settings == settings), None)
            if again is None:
                again = Trial(len(self.trials) + 1, settings)
                self.trials.append(again)
            again.status, again.curve, again.reason = "running", [], ""
            self.write()
            return again

    def point(self, trial: Trial, metrics: dict[str, Any]) -> None:
        with self.lock:
            trial.curve.append(metrics)
            self.write()

    def settle(self, trial: Trial, status: str, reason: str = "") -> None:
        with self.lock:
            trial.status, trial.reason = status, reason
            self.write()

    def close(self) -> None:
        """What is still running is interrupted."""
        with self.lock:
            for trial in self.trials:
                if trial.status == "running":
                    self.settle(trial, "interrupted")
            self.write()

    def write(self) -> None:
        write_records(self.file, map(dataclasses.asdict, self.trials), finite=True)

    def ranked(self) -> list[Trial]:
        """The best first; failed trials and those without an epoch left out."""
        with self.lock:
            scored = [trial for trial in self.trials if trial.objective is not None]
        return sorted(scored, key=lambda trial: (trial.objective, trial.number))

    @property
    def best(self) -> Trial | None:
        return next(iter(self.ranked()), None)


def best_config(config: TrainConfig, searched: dict[str, Any]) -> dict[str, Any]:
    """What ``ldm_ray.train --config`` takes: the searched settings, and the others that are not the default."""
    defaults = TrainConfig().to_dict()
    kept = {name: value for name, value in config.to_dict().items() if value != defaults[name] or name in searched}
    return kept | {"epochs": config.epochs}


def table(trials: list[Trial], floor: float) -> str:
    """The best trials, a line each, and what real latents score."""
    names = list(trials[0].settings) if trials else []
    rows = [["trial", "objective", "epochs", "status", *names]]
    for trial in trials[:SHOWN]:
        known = canonical(trial.settings)
        cells = [
            f"{known[name]:.4g}" if isinstance(known.get(name), float) else str(known.get(name, "-")) for name in names
        ]
        rows.append([str(trial.number), f"{trial.objective:.4f}", str(len(trial.curve)), trial.status, *cells])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([*lines, f"real training latents, as many: {floor:.4f}"])


def read_search(paths: SearchPaths) -> dict[str, Any]:
    """``search.json``. ConfigError when it cannot be used."""
    try:
        found = json.loads(paths.search.read_text())
        assert isinstance(found["config"], dict) and isinstance(found["data"], dict)
        return found
    except (OSError, ValueError, KeyError, TypeError, AssertionError):
        raise ConfigError(f"--resume: {paths.search} is not there or not whole; start a new search") from None
