"""What a search tries: its flags, and the values of each setting."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
import re
from dataclasses import dataclass
from typing import Any

from ldm_ray.settings.diffusion import canonical
from ldm_ray.settings.errors import ConfigError
from ldm_ray.settings.gpu_share import gpus_option
from ldm_ray.settings.limits import MAX_STEPS
from ldm_ray.settings.options import Config, check_value, flag_of, kind_of, option
from ldm_ray.settings.training import TrainConfig
from ldm_ray.terminal.flags import number

TRAIN = {field.name: field for field in dataclasses.fields(TrainConfig)}
DEFAULTS = TrainConfig()
SEARCHED = (
    "lr",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "batch_size",
    "hidden_dim",
    "weight_decay",
    "prediction_type",
)
SHARED = (
    "only_digit",
    "num_train_timesteps",
    "ae_ckpt",
    "ae_ckpt_dir",
    "amp",
    "val_fraction",
    "encode_workers",
    "accelerator_type",
)
UNITS = {"": 1, "s": 1, "m": 60, "h": 3600}


def same(name: str) -> Any:
    """The field of ``ldm_ray.train``."""
    return option(TRAIN[name].default, TRAIN[name].metadata["help"], **without_help(TRAIN[name].metadata))


def values_of(name: str, default: str | None) -> Any:
    """A field whose text is the values to try for a setting of ``ldm_ray.train``."""
    shape = "a list with commas" if kind_of(TRAIN[name]) is str else "LOW:HIGH, or a list with commas"
    text = f"values to try: {shape} ({TRAIN[name].metadata['help']})"
    if default is None:
        text += f" [{getattr(DEFAULTS, name)}, not searched]"
    return option(default, text)


def without_help(rules: Any) -> dict[str, Any]:
    return {key: value for key, value in rules.items() if key != "help"}


@dataclass(frozen=True, kw_only=True)
class SearchConfig(Config):
    """``python tune/search.py``"""

    dataset: str = same("dataset")
    cache_dir: str | None = same("cache_dir")
    outdir: str | None = same("outdir")
    name: str | None = option(None, "folder of the search under OUTDIR/tune [search- and the time]", resume="free")
    lr: str = values_of("lr", "1e-4:1e-2")
    beta_start: str = values_of("beta_start", "1e-5:1e-3")
    beta_end: str = values_of("beta_end", "5e-3:5e-2")
    beta_schedule: str = values_of("beta_schedule", "linear,scaled_linear,squaredcos_cap_v2")
    batch_size: str | None = values_of("batch_size", None)
    hidden_dim: str | None = values_of("hidden_dim", None)
    weight_decay: str | None = values_of("weight_decay", None)
    prediction_type: str | None = values_of("prediction_type", None)
    search: str = option("optuna", "how values are chosen", choices=("optuna", "random", "grid"))
    grid_points: int = option(3, "values of a LOW:HIGH range in a grid", low=2, high=100)
    num_samples: int = option(32, "trials; a grid has all its points at most", low=1, high=100_000, resume="free")
    epochs: int = option(9, "epochs of a trial that is not stopped early", low=1)
    asha: bool = option(True, "stop the worse trials early (asynchronous successive halving)")
    grace_epochs: int = option(1, "epochs that every trial gets", low=1)
    reduction_factor: int = option(3, "the best one of so many goes on at each halving", low=2, high=100)
    eval_samples: int = option(1000, "latents sampled for the objective after an epoch", low=20, high=1_000_000)
    eval_steps: int = option(40, "sampling steps for them", low=1, high=MAX_STEPS)
    time_budget: str | None = option(
        None, "stop after so long: seconds, or a number with s, m or h [none]", resume="free"
    )
    max_concurrent: int | None = option(None, "trials at once [as many as fit the cluster]", low=1, resume="free")
    cpus_per_trial: int = option(1, "CPU cores of a trial", low=1, high=1024, resume="free")
    gpus_per_trial: float | None = gpus_option("a trial, 0 for the CPU", "0.25", above=None, low=0)
    accelerator_type: str | None = same("accelerator_type")
    resume: bool = option(False, "go on with the search --name, or the newest of these settings", resume="free")
    train_best: bool = option(False, "train the best configuration afterwards", resume="free")
    train_epochs: int = option(DEFAULTS.epochs, "epochs in best_config.json", low=1, resume="free")
    seed: int = same("seed")
    device: str | None = same("device")
    only_digit: int | None = same("only_digit")
    num_train_timesteps: int = same("num_train_timesteps")
    ae_ckpt: str | None = same("ae_ckpt")
    ae_ckpt_dir: str | None = same("ae_ckpt_dir")
    amp: bool = same("amp")
    val_fraction: float = same("val_fraction")
    encode_workers: int | None = same("encode_workers")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.name is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", self.name):
            raise ConfigError(f"--name is letters, digits, '.', '_' and '-' alone, not {self.name!r}")
        self.budget_s()
        planned(self)

    def budget_s(self) -> float | None:
        """Seconds of ``--time-budget``."""
        if self.time_budget is None:
            return None
        match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", self.time_budget.strip())
        seconds = float(match[1]) * UNITS[match[2]] if match else 0.0
        if not 0 < seconds < 1e8:
            raise ConfigError(f"--time-budget is above 0: seconds, 90s, 30m or 2h, not {self.time_budget!r}")
        return seconds

    def space(self) -> dict[str, Values]:
        """The values of each searched setting, in the order of the flags. ConfigError where one is impossible."""
        found = {name: parse_values(name, text) for name in SEARCHED if (text := getattr(self, name)) is not None}
        start, end = found["beta_start"], found["beta_end"]
        if start.high > end.low:
            raise ConfigError(
                f"--beta-start goes up to {start.high:g} and --beta-end down to {end.low:g}: the end must not be "
                "below the start; narrow one of them"
            )
        return found

    def train_config(self, **settings: Any) -> TrainConfig:
        """A run of ``ldm_ray.train`` with the given values of searched settings and these of all others."""
        shared = ("dataset", "cache_dir", "outdir", "seed", "device", *SHARED)
        return TrainConfig(**{**{name: getattr(self, name) for name in shared}, **canonical(settings)})


@dataclass(frozen=True)
class Values:
    """A range (log: uniform in the logarithm) or, where choices are given, one of them."""

    low: Any
    high: Any
    choices: tuple[Any, ...] = ()
    log: bool = False

    def draw(self, source: random.Random) -> Any:
        if self.choices:
            return source.choice(self.choices)
        if self.log:
            return math.exp(source.uniform(math.log(self.low), math.log(self.high)))
        return source.uniform(self.low, self.high)

    def points(self, count: int) -> tuple[Any, ...]:
        """The choices, or ``count`` equally spaced values of the range, both ends included."""
        if self.choices:
            return self.choices
        shares = [i / (count - 1) for i in range(count)]
        if self.log:
            return tuple(float(f"{self.low * (self.high / self.low) ** share:.6g}") for share in shares)
        return tuple(self.low + (self.high - self.low) * share for share in shares)

    def holds(self, value: Any) -> bool:
        return value in self.choices if self.choices else bool(self.low <= value <= self.high)


def parse_values(name: str, text: str) -> Values:
    """``1e-4:1e-2`` is a range, log-uniform; ``64,128`` a list; ``64:512`` in whole numbers every doubling.

    Raises ConfigError with what is allowed; every value is checked as ``ldm_ray.train`` would.
    """
    field = TRAIN[name]
    kind, flag = kind_of(field), f"--{flag_of(field)}"

    def value_of(part: str) -> Any:
        return check_value(field, part.strip() if kind is str else number(kind)(part.strip()))

    if ":" not in text:
        choices = tuple(dict.fromkeys(value_of(part) for part in text.split(",")))
        ordered = (0, 0) if kind is str else (min(choices), max(choices))
        return Values(ordered[0], ordered[1], choices=choices)
    parts = text.split(":")
    if kind is str or len(parts) != 2 or "," in text:
        raise ConfigError(f"{flag} is {'a list' if kind is str else 'LOW:HIGH or a list'} with commas, not {text!r}")
    low, high = (value_of(part) for part in parts)
    if not low < high:
        raise ConfigError(f"{flag} {text}: the lower end of a range comes first")
    if kind is int:
        doubled = [low * 2**i for i in range(64) if low * 2**i <= high]
        return Values(low, doubled[-1], choices=tuple(doubled))
    if low <= 0:
        raise ConfigError(f"{flag} {text}: a range is searched in its logarithm and starts above 0; or give a list")
    return Values(low, high, log=True)


def planned(config: SearchConfig) -> list[dict[str, Any]] | None:
    """The settings of every trial in order, for a random or a grid search; None where Optuna chooses as it goes."""
    space = config.space()
    if config.search == "optuna":
        return None
    if config.search == "random":
        source = random.Random(config.seed)
        drawn = [{name: values.draw(source) for name, values in space.items()} for _ in range(config.num_samples)]
        first = default_of(space)
        return ([first, *drawn] if first else drawn)[: config.num_samples]
    if math.prod(len(values.points(config.grid_points)) for values in space.values()) > 100_000:
        raise ConfigError("--search grid: the grid has more than 100,000 points; give fewer values")
    points = itertools.product(*(values.points(config.grid_points) for values in space.values()))
    grid, seen = [], set()
    for point in points:
        settings = dict(zip(space, point, strict=True))
        effective = tuple(canonical(settings).items())
        if effective not in seen:
            grid.append(settings)
            seen.add(effective)
    random.Random(config.seed).shuffle(grid)  # so that a part of it is a sample of all
    return grid[: config.num_samples]


def default_of(space: dict[str, Values]) -> dict[str, Any] | None:
    """The defaults of ``ldm_ray.train`` as a point of the space, where they are in it: the first trial. A setting
    with a single value has that."""
    point = {
        name: values.choices[0] if len(values.choices) == 1 else getattr(DEFAULTS, name)
        for name, values in space.items()
    }
    return point if all(values.holds(point[name]) for name, values in space.items()) else None
