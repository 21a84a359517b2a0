"""The search: its objective against closed forms, its space, and the command on Ray with embedded digits."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image

from ldm_ray import checkpoint
from ldm_ray.config import TrainConfig, canonical
from ldm_ray.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tune"))
from pictures import schedule_of  # noqa: E402
from records import Records, SearchPaths, Trial, best_config  # noqa: E402
from space import SearchConfig, parse_values, planned  # noqa: E402

# --- the space ---


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
    made = planned(SearchConfig(search="random", num_samples=2000, seed=3))
    default = {"lr": 2e-3, "beta_start": 1e-4, "beta_end": 2e-2, "beta_schedule": "squaredcos_cap_v2"}
    assert made is not None and made[0] == default
    rates = np.log10([point["lr"] for point in made])
    assert rates.min() >= -4 and rates.max() <= -2
    assert np.histogram(rates, bins=4, range=(-4, -2))[0] == pytest.approx([500] * 4, abs=100)
    assert planned(SearchConfig(search="random", num_samples=10, seed=3)) == made[:10]
    assert planned(SearchConfig(search="random", num_samples=10, seed=4)) != made[:10]


def test_a_grid_has_no_two_points_of_one_effect() -> None:
    shapes = "linear,scaled_linear,squaredcos_cap_v2"
    made = planned(SearchConfig(search="grid", num_samples=1000, lr="1e-3,2e-3", beta_schedule=shapes))
    assert made is not None and len(made) == 2 * (3 * 3 * 2 + 1)  # a cosine schedule has no betas
    assert len({tuple(canonical(point).items()) for point in made}) == len(made)


def test_the_best_configuration_is_one_of_the_training_command(tmp_path: Path) -> None:
    config = SearchConfig(only_digit=7, seed=5).train_config(lr=3e-3, beta_schedule="scaled_linear", epochs=20)
    kept = best_config(config, {"lr": 3e-3, "beta_schedule": "scaled_linear"})
    assert TrainConfig.from_dict(json.loads(json.dumps(kept))) == config
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


# --- the command ---


def command(*flags: object, module: str | None = None, **settings: Any) -> subprocess.Popen[str]:
    program = ["-m", module] if module else [str(ROOT / "tune" / "search.py")]
    environment = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "PYTHONPATH")}
    if module:
        environment["PYTHONPATH"] = str(ROOT)
    return subprocess.Popen(
        [sys.executable, *program, *map(str, flags)],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment,
        **settings,
    )


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    output = process.communicate(timeout=240)[0]
    assert process.returncode == code, output
    return output


def trials_of(folder: Path) -> list[Trial]:
    return Records.read(SearchPaths(folder).trials).trials


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, digits_folder: Path, ae_file: Path) -> tuple[Path, list[object]]:
    """(output directory, flags that all searches share)."""
    out = tmp_path_factory.mktemp("tune")
    flags = ["--dataset", digits_folder, "--ae-ckpt", ae_file, "--outdir", out, "--device", "cpu"]
    return out, [
        *flags,
        "--hidden-dim",
        32,
        "--batch-size",
        8,
        "--T",
        50,
        "--beta-start",
        "1e-3:1e-2",
        "--beta-end",
        "0.1:0.3",
        "--eval-samples",
        100,
        "--eval-steps",
        10,
        "--val-fraction",
        0.2,
    ]


GRID = [
    "--search",
    "grid",
    "--lr",
    "1e-3,2e-3,3e-3,10",
    "--beta-schedule",
    "linear",
    "--beta-start",
    "1e-3",
    "--beta-end",
    "0.2",
    "--weight-decay",
    "10",
    "--no-asha",
    "--epochs",
    "12",
    "--max-concurrent",
    "1",
]


@pytest.fixture(scope="module")
def grid(base: tuple[Path, list[object]]) -> tuple[str, Path]:
    """(output, folder) of an undisturbed grid, one of whose four trials cannot but diverge: lr · decay = 100."""
    output = finish(command(*base[1], *GRID, "--name", "grid"))
    return output, base[0] / "tune" / "grid"


def test_a_search_from_another_directory_and_training_its_best(base: tuple[Path, list[object]], tmp_path: Path) -> None:
    out, flags = base
    search = ["--name", "first", "--num-samples", 8, "--epochs", 9, "--lr", "1e-4:1e-2", "--train-epochs", 9]
    output = finish(command(*flags, *search, "--train-best", cwd=tmp_path))
    folder = out / "tune" / "first"
    trials = trials_of(folder)
    assert len(trials) == 8 and all(trial.status in ("finished", "stopped") for trial in trials)
    assert all((trial.status == "finished") == (len(trial.curve) == 9) for trial in trials)
    assert sum(len(trial.curve) for trial in trials) < 8 * 9  # some were stopped early, at a rung
    assert all(len(trial.curve) in (1, 3, 9) for trial in trials)
    best = min(trials, key=lambda trial: trial.curve[-1]["objective"])
    table = (folder / "table.txt").read_text()
    assert table in output and table.splitlines()[1].split()[0] == str(best.number)
    config = json.loads((folder / "best_config.json").read_text())
    assert config.items() >= canonical(best.settings).items() and config["epochs"] == 9
    for name in ("objective", "schedules", "parallel", "curves"):
        assert min(Image.open(folder / f"{name}.png").size) > 300
    latest = next(out.glob("checkpoints/latent-diffusion-*/latest.pt"))
    assert str(latest) in output
    loaded = checkpoint.load_diffusion(latest)
    assert loaded.schedule == schedule_of(best.settings, 50)
    assert list(tmp_path.iterdir()) == []
    # The trial's first epoch and the run's, of as many epochs, are the same training; --config takes the file as it is
    first = json.loads(next(out.glob("runs/latent-diffusion-*/metrics.jsonl")).read_text().splitlines()[0])
    assert first["val_loss"] == pytest.approx(best.curve[0]["val_loss"], rel=1e-5)
    shown = finish(command("--config", folder / "best_config.json", "--seed", 43, module="ldm_ray.train", cwd=tmp_path))
    assert "reused" in shown and "latent-diffusion-dall-bs8" in shown


def test_a_diverging_trial_is_failed_and_never_best(grid: tuple[str, Path]) -> None:
    output, folder = grid
    trials = trials_of(folder)
    assert {trial.settings["lr"]: trial.status for trial in trials} == {
        1e-3: "finished",
        2e-3: "finished",
        3e-3: "finished",
        10.0: "failed",
    }
    failed = next(trial for trial in trials if trial.status == "failed")
    assert "not finite in epoch" in failed.reason and f"trial {failed.number} failed: diverged" in output
    assert json.loads((folder / "best_config.json").read_text())["lr"] < 10
    assert "Traceback" not in output


def kill_worker(driver: int) -> None:
    """Kills the process that runs trials, below the given driver."""
    for child in psutil.Process(driver).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "ImplicitFunc" in " ".join(child.cmdline()) or "run_trial" in " ".join(child.cmdline()):
                child.kill()
                return
    raise AssertionError("no worker with a trial found")


def wait_for_trials(folder: Path, count: int, process: subprocess.Popen[str], running: bool = False) -> None:
    """Until so many trials are settled; with ``running``, until the one after them has two epochs as well."""
    deadline = time.monotonic() + 120

    def there() -> bool:
        lines = (folder / "trials.jsonl").read_text().splitlines() if (folder / "trials.jsonl").exists() else []
        trials = [json.loads(line) for line in lines]
        done = sum(trial["status"] not in ("running", "interrupted") for trial in trials)
        return done >= count and (not running or any(len(t["curve"]) > 1 for t in trials if t["status"] == "running"))

    while not there():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


def test_killed_and_interrupted_searches_go_on_to_the_same_result(
    base: tuple[Path, list[object]], grid: tuple[str, Path]
) -> None:
    out, flags = base
    folder = out / "tune" / "cut"
    cut = [*flags, *GRID, "--name", "cut"]
    process = command(*cut, start_new_session=True)
    wait_for_trials(folder, 1, process)
    process.kill()
    finish(process, -signal.SIGKILL)
    kept = Records.read(SearchPaths(folder).trials).settled
    assert "is there already" in finish(command(*cut), 2)
    assert "--epochs 12 then, 3 now" in finish(command(*cut, "--resume", "--epochs", 3), 2)
    process = command(*cut, "--resume", start_new_session=True)
    wait_for_trials(folder, len(kept) + 1, process)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    output = finish(process, 130)
    assert "go on with: python tune/search.py" in output and output.rstrip().endswith("--resume")
    assert "Traceback" not in output and (folder / "best_config.json").exists()
    process = command(*cut, "--resume")
    wait_for_trials(folder, len(kept) + 1, process, running=True)
    kill_worker(process.pid)  # the trial begins anew elsewhere
    output = finish(process)
    assert "going on with cut" in output
    trials, undisturbed = trials_of(folder), trials_of(grid[1])
    assert trials[: len(kept)] == kept  # nothing that was done is done again

    def results(found: list[Trial]) -> dict[float, Any]:
        return {one.settings["lr"]: (one.status, [point["objective"] for point in one.curve]) for one in found}

    assert results(trials) == results(undisturbed) and len(trials) == 4


def test_mistakes_are_one_line(base: tuple[Path, list[object]], tmp_path: Path) -> None:
    for flags, said in (
        (["--lr", "1e-2:1e-4"], "--lr 1e-2:1e-4"),
        (["--outdir", tmp_path, "--ae-ckpt", tmp_path / "none.pt"], "none.pt"),
        (["--nonsense"], "--nonsense"),
    ):
        output = finish(command(*flags, cwd=tmp_path), 2)
        assert said in output and output.count("\n") == 1, output
