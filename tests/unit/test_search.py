"""The search: its space, the trials that it plans, its records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ldm_ray.search.records import Records, best_config
from ldm_ray.search.space import SearchConfig, parse_values, planned
from ldm_ray.settings.diffusion import canonical
from ldm_ray.settings.errors import ConfigError
from ldm_ray.settings.training import TrainConfig


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"lr": "1e-2:1e-4"}, "--lr 1e-2:1e-4: the lower end"),
        ({"lr": "0:1"}, "--lr is above 0"),
        ({"lr": "a:b"}, "--lr is a finite number"),
        ({"lr": "1e-4:100"}, "--lr is at most 10"),
        ({"lr": "1:2:3"}, "--lr is LOW:HIGH or a list"),
        ({"lr": "1e-3,"}, "--lr is a finite number"),
        ({"beta_start": "1e-3:1e-1"}, "the end must not be below the start"),
        ({"beta_schedule": "linear,cosine"}, "--beta-schedule is one of"),
        ({"beta_schedule": "linear:cosine"}, "--beta-schedule is a list"),
        ({"batch_size": "0:8"}, "--batch-size is at least 1"),
        ({"hidden_dim": "64.5"}, "--hidden-dim is a whole number"),
        ({"weight_decay": "0:0.1"}, "starts above 0"),
        ({"time_budget": "soon"}, "--time-budget is above 0"),
        ({"time_budget": "0m"}, "--time-budget is above 0"),
        ({"name": "../other"}, "--name is letters"),
        ({"search": "grid", "grid_points": 100}, "more than 100,000 points"),
        ({"epochs": 0}, "--epochs is at least 1"),
    ],
)
def test_bad_settings_are_one_line(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as error:
        SearchConfig(**settings)
    assert "\n" not in str(error.value)


def test_values() -> None:
    assert parse_values("lr", "1e-4:1e-2").points(3) == (1e-4, 1e-3, 1e-2)
    assert parse_values("lr", "1e-3").choices == (1e-3,)
    assert parse_values("batch_size", "64:512").choices == (64, 128, 256, 512)
    assert parse_values("weight_decay", "0, 0.01").choices == (0.0, 0.01)
    assert SearchConfig(time_budget="1.5h").budget_s() == 5400


def test_random_values_are_log_uniform_within_bounds_and_follow_from_the_seed() -> None:
    points = planned(SearchConfig(search="random", num_samples=2000, seed=3))
    default = {"lr": 2e-3, "beta_start": 1e-4, "beta_end": 2e-2, "beta_schedule": "squaredcos_cap_v2"}
    assert points is not None and points[0] == default
    rates = np.log10([point["lr"] for point in points])
    assert rates.min() >= -4 and rates.max() <= -2
    assert np.histogram(rates, bins=4, range=(-4, -2))[0] == pytest.approx([500] * 4, abs=100)
    assert planned(SearchConfig(search="random", num_samples=10, seed=3)) == points[:10]
    assert planned(SearchConfig(search="random", num_samples=10, seed=4)) != points[:10]


def test_a_grid_has_no_two_points_of_one_effect() -> None:
    shapes = "linear,scaled_linear,squaredcos_cap_v2"
    points = planned(SearchConfig(search="grid", num_samples=1000, lr="1e-3,2e-3", beta_schedule=shapes))
    assert points is not None and len(points) == 2 * (3 * 3 * 2 + 1)  # a cosine schedule has no betas
    assert len({tuple(canonical(point).items()) for point in points}) == len(points)


def test_the_best_configuration_is_one_of_the_training_command(tmp_path: Path) -> None:
    config = SearchConfig(only_digit=7, seed=5).train_config(lr=3e-3, beta_schedule="scaled_linear", epochs=20)
    kept = best_config(config, {"lr": 3e-3, "beta_schedule": "scaled_linear"})
    assert TrainConfig(**json.loads(json.dumps(kept))) == config
    assert "amp" not in kept and kept["epochs"] == 20


def test_failed_and_interrupted_trials_are_not_the_best(tmp_path: Path) -> None:
    records = Records(tmp_path / "trials.jsonl", [])
    point = {"epoch": 1, "objective": 1.0, "seconds": 1.0}
    for settings, value in (({"lr": 1.0}, 0.5), ({"lr": 2.0}, 0.1), ({"lr": 3.0}, 0.7)):
        records.point(records.start(settings), point | {"objective": value})
    records.settle(records.trials[1], "failed", "diverged")
    assert records.best is records.trials[0]
    back = Records.read(tmp_path / "trials.jsonl")
    assert [one.status for one in back.trials] == ["interrupted", "failed", "interrupted"]
    again = back.start({"lr": 3.0})  # from its beginning, under its number
    assert (again.number, again.curve, len(back.trials)) == (3, [], 3)
