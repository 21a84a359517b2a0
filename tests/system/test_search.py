"""``python tune/search.py`` on real Ray, with embedded digits."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from pathlib import Path
from typing import Any

import psutil
import pytest
from PIL import Image

from ldm_ray.checkpoints import checkpoint
from ldm_ray.search.pictures import schedule_of
from ldm_ray.search.records import Records, SearchPaths, Trial
from ldm_ray.settings.diffusion import canonical
from tests.helpers.commands import SEARCH, below, finish, meanwhile, refusal, run, start, wait_for
from tests.helpers.data import ROOT

pytestmark = pytest.mark.usefixtures("ray_here")


def start_search(*flags: object, **settings: Any) -> subprocess.Popen[str]:
    return start(ROOT / "tune" / "search.py", *flags, **settings)


def trials_of(folder: Path) -> list[Trial]:
    return Records.read(SearchPaths(folder).trials).trials


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, digits_folder: Path, ae_file: Path) -> tuple[Path, list[object]]:
    """(output directory, flags that all searches share)."""
    out = tmp_path_factory.mktemp("tune")
    flags = ["--dataset", digits_folder, "--ae-ckpt", ae_file, "--outdir", out, "--device", "cpu"]
    flags += ["--hidden-dim", 32, "--batch-size", 8, "--T", 50, "--val-fraction", 0.2]
    flags += ["--beta-start", "1e-3:1e-2", "--beta-end", "0.1:0.3", "--eval-samples", 100, "--eval-steps", 10]
    return out, flags


GRID = ["--search", "grid", "--lr", "1e-3,2e-3,3e-3,10", "--beta-schedule", "linear", "--beta-start", "1e-3"]
GRID += ["--beta-end", "0.2", "--weight-decay", "10", "--no-asha", "--epochs", "12", "--max-concurrent", "1"]


@pytest.fixture(scope="module")
def grid(base: tuple[Path, list[object]]) -> tuple[str, Path]:
    """(output, folder) of an undisturbed grid, one of whose four trials cannot but diverge: lr · decay = 100."""
    output = run(SEARCH, *base[1], *GRID, "--name", "grid")
    return output, base[0] / "tune" / "grid"


def test_a_search_from_another_directory_and_training_its_best(base: tuple[Path, list[object]], tmp_path: Path) -> None:
    out, flags = base
    search = ["--name", "first", "--num-samples", 8, "--epochs", 9, "--lr", "1e-4:1e-2", "--train-epochs", 9]
    output = finish(start_search(*flags, *search, "--train-best", cwd=tmp_path))
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
    shown = run("train", "--config", folder / "best_config.json", "--auto-resume")
    assert "has 9 epochs and --epochs is 9; nothing left to do" in shown
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


def settled(folder: Path, count: int) -> bool:
    """Whether so many trials are settled."""
    return sum(trial["status"] not in ("running", "interrupted") for trial in lines_of(folder)) >= count


def lines_of(folder: Path) -> list[dict[str, Any]]:
    file = folder / "trials.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def test_killed_and_interrupted_searches_go_on_to_the_same_result(
    base: tuple[Path, list[object]], grid: tuple[str, Path]
) -> None:
    out, flags = base
    folder = out / "tune" / "cut"
    cut = [*flags, *GRID, "--name", "cut"]
    process = start_search(*cut, start_new_session=True)
    wait_for(lambda: settled(folder, 1), process)
    process.kill()
    finish(process, -signal.SIGKILL)
    kept = Records.read(SearchPaths(folder).trials).settled
    assert "is there already" in run(SEARCH, *cut, code=2)
    assert "--epochs 12 then, 3 now" in run(SEARCH, *cut, "--resume", "--epochs", 3, code=2)
    process = start_search(*cut, "--resume", start_new_session=True)
    wait_for(lambda: settled(folder, len(kept) + 1), process)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    output = finish(process, 130)
    assert re.search(r"go on with: \S*python\S* tune/search\.py ", output) and output.rstrip().endswith("--resume")
    assert "Traceback" not in output and (folder / "best_config.json").exists()

    def workers_midway() -> list[psutil.Process]:
        """What runs trials, within a trial's second epoch or later."""
        begun = any(len(line["curve"]) > 1 for line in lines_of(folder) if line["status"] == "running")
        workers = [*below(psutil.Process(), "ImplicitFunc"), *below(psutil.Process(), "run_trial")]
        return workers if begun and settled(folder, len(kept) + 1) else []

    with meanwhile(workers_midway, lambda workers: workers[0].kill()):  # the trial begins anew elsewhere
        output = run(SEARCH, *cut, "--resume")
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
        assert said in refusal(SEARCH, *flags)
