"""Run names, what is the newest, the discovery of autoencoders, and how a stopped command is gone on with."""

from __future__ import annotations

import calendar
import json
import os
import re
import shlex
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ldm_ray.checkpoints import checkpoint, runs
from ldm_ray.files.hold import hold
from ldm_ray.models import registry
from ldm_ray.settings.errors import CheckpointError, ConfigError
from ldm_ray.settings.training import AutoencoderConfig, TrainConfig
from ldm_ray.terminal import cli, flags
from tests.helpers.commands import refusal, run


def parse(*argv: str) -> TrainConfig:
    return flags.parse_config(TrainConfig, flags.Parser(prog="test"), argv)


# --- run names ---


@pytest.mark.parametrize(("digit", "name"), [(None, "dall"), (7, "d7"), (0, "d0")])
def test_run_names_are_the_contract(tmp_path: Path, digit: int | None, name: str) -> None:
    with ExitStack() as held:
        paths = runs.new_run(TrainConfig(recipe="classic", only_digit=digit), tmp_path, held)
        assert [folder.name for folder in (tmp_path / "checkpoints").iterdir()] == [paths.name]
    assert re.fullmatch(rf"latent-diffusion-{name}-bs128-lr0\.0002-T1000-seed42-\d{{8}}-\d{{6}}", paths.name)
    assert paths.checkpoint(1) == tmp_path / "checkpoints" / paths.name / "checkpoint_epoch_000001.pt"
    assert paths.latest == paths.checkpoints / "latest.pt"
    assert paths.sample(1) == tmp_path / "samples" / paths.name / "epoch_000001.png"
    assert paths.runs == tmp_path / "runs" / paths.name and paths.log == tmp_path / "logs" / f"{paths.name}.log"
    assert list((tmp_path / "checkpoints").iterdir()) == []  # nothing was written


def run_folder(base: Path, name: str, changed: int) -> Path:
    latest = base / "checkpoints" / name / "latest.pt"
    latest.parent.mkdir(parents=True)
    latest.touch()
    os.utime(latest, (changed, changed))
    return latest


def test_the_newest_is_what_was_begun_last_for_every_command(tmp_path: Path) -> None:
    """Whatever copying did to the files' times; the name of a folder without one counts for nothing."""
    stem = runs.run_stem(TrainConfig())
    older = run_folder(tmp_path, f"{stem}-20250101-235959", changed=1_900_000_000)
    newer = run_folder(tmp_path, f"{stem}-20250102-000000", changed=1_000_000_000)
    other = run_folder(tmp_path, "latent-diffusion-mine", changed=calendar.timegm((2025, 1, 2, 0, 0, 1)))
    oldest = run_folder(tmp_path, "pixel-diffusion-zzz", changed=calendar.timegm((2025, 1, 1, 23, 59, 58)))
    (tmp_path / "checkpoints" / "latent-diffusion-gone").mkdir()
    (tmp_path / "checkpoints" / "latent-diffusion-gone" / "latest.pt").symlink_to(tmp_path / "nowhere")
    assert runs.diffusion_checkpoints(tmp_path) == [other, newer, older, oldest]
    assert runs.newest_diffusion(tmp_path) == other
    resumed = runs.newest_run(TrainConfig(), tmp_path)
    assert resumed is not None and resumed.latest == newer


def test_the_newest_run_is_of_these_settings_and_has_a_checkpoint(tmp_path: Path) -> None:
    stem = runs.run_stem(TrainConfig())
    for name in (f"{stem}-20250101-000000", f"{stem}-20250102-000000", f"{stem}2-20250103-000000"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "latest.pt").touch()
    (tmp_path / "checkpoints" / f"{stem}-20250104-000000").mkdir()
    found = runs.newest_run(TrainConfig(), tmp_path)
    assert found is not None and found.name == f"{stem}-20250102-000000"
    assert runs.newest_run(TrainConfig(lr=0.1), tmp_path) is None


def test_an_output_directory_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be written") as error:
        runs.check_writable(tmp_path / "file" / "out")
    assert "\n" not in str(error.value)
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone" / "further")
    with pytest.raises(ConfigError, match="nowhere cannot be written"):
        runs.check_writable(tmp_path / "nowhere")


def test_a_look_at_an_output_directory_leaves_nothing(tmp_path: Path) -> None:
    runs.check_writable(tmp_path / "new" / "deeper")
    assert list(tmp_path.iterdir()) == []


# --- discovery ---


def autoencoder(path: Path, kind: str, age: int, only_digit: int | None = None, **rest: Any) -> Path:
    config = {"only_digit": only_digit, "epochs": 40}
    content = checkpoint.autoencoder_content(registry.build(kind, 4), kind, config, **{"epoch": 40, **rest})
    checkpoint.write(path, content)
    os.utime(path, (1_700_000_000 - age,) * 2)
    return path


def found(*args: Any) -> str | None:
    result = runs.find_autoencoder(*args)
    return result.path if result else None


def test_discovery_takes_conv_before_mlp_and_the_newest(tmp_path: Path) -> None:
    assert found(tmp_path) is None
    mlp = autoencoder(tmp_path / "a" / "new.pt", "mlp", age=0)
    assert found(tmp_path) == str(mlp)
    autoencoder(tmp_path / "b" / "old.pt", "conv", age=500)
    conv = autoencoder(tmp_path / "c" / "d" / "newer.pt", "conv", age=100)
    assert found(tmp_path) == str(conv)
    assert found(tmp_path, None, ["mlp"]) == str(mlp)


def test_discovery_prefers_latest_within_a_run(tmp_path: Path) -> None:
    latest = autoencoder(tmp_path / "run" / "latest.pt", "mlp", age=50)
    autoencoder(tmp_path / "run" / "checkpoint_epoch_000001.pt", "mlp", age=0)
    assert found(tmp_path) == str(latest)


def test_discovery_takes_a_single_digit_only_for_that_digit(tmp_path: Path) -> None:
    every = autoencoder(tmp_path / "all.pt", "mlp", age=900)
    seven = autoencoder(tmp_path / "seven.pt", "mlp", age=0, only_digit=7)
    assert found(tmp_path) == str(every) and found(tmp_path, 3) == str(every)
    assert found(tmp_path, 7) == str(seven)


def test_discovery_passes_over_what_it_cannot_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good = autoencoder(tmp_path / "good.pt", "conv", age=900)
    (tmp_path / "cut.pt").write_bytes(good.read_bytes()[:5000])
    (tmp_path / "empty.pt").touch()
    autoencoder(tmp_path / ".latest.pt.partial.pt", "conv", age=0)
    with pytest.raises(CheckpointError):
        checkpoint.read(tmp_path / "cut.pt")
    assert found(tmp_path) == str(good)
    assert "cut.pt" in caplog.text and "empty.pt" in caplog.text


def test_discovery_never_takes_an_unfinished_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    half = autoencoder(tmp_path / "half" / "latest.pt", "conv", age=0, epoch=2, training={"finished": False})
    assert found(tmp_path) is None
    assert f"not taken: {half} is unfinished, epoch 2 of 40; --auto-resume" in caplog.text
    early = {"finished": True}
    stopped_early = autoencoder(tmp_path / "early" / "latest.pt", "mlp", age=5, epoch=9, training=early)
    assert found(tmp_path) == str(stopped_early)
    autoencoder(tmp_path / "epoch" / "checkpoint_epoch_000039.pt", "mlp", age=1, epoch=39)
    assert found(tmp_path) == str(stopped_early)
    whole = autoencoder(tmp_path / "whole" / "latest.pt", "conv", age=9, training={"finished": False})
    assert found(tmp_path) == str(whole)


@pytest.mark.parametrize(
    ("epoch", "training", "state"),
    [
        (2, {"finished": False}, "unfinished, epoch 2 of 40"),
        (0, {"finished": False}, "unfinished, epoch 0 of 40"),
        (2, None, "unfinished, epoch 2 of 40"),
        (9, {"finished": True}, "finished, epoch 9 of 40"),
        (40, {"finished": False}, "finished, epoch 40 of 40"),
        (None, None, None),
    ],
)
def test_inspect_says_how_far_the_training_had_come(
    epoch: Any, training: Any, state: str | None, tmp_path: Path
) -> None:
    path = autoencoder(tmp_path / "latest.pt", "mlp", age=0, epoch=epoch, training=training)
    assert json.loads(run("inspect", path, "--json")).get("state") == state
    assert state is None or re.search(rf"^trained +{state}$", run("inspect", path), re.MULTILINE)


# --- one command at a time in a folder ---


@pytest.mark.parametrize("command", ["train", "train_autoencoder"])
def test_a_run_that_another_command_trains_is_not_gone_on_with(command: str, tmp_path: Path) -> None:
    config = AutoencoderConfig() if command == "train_autoencoder" else TrainConfig()
    latest = run_folder(tmp_path, f"{runs.run_stem(config)}-20250101-000000", changed=1_700_000_000)
    flags = ["--outdir", tmp_path, "--auto-resume"]
    with hold(latest.parent):
        assert f"{latest.parent} is in use by process {os.getpid()}" in refusal(command, *flags)
    assert "is in use" not in refusal(command, *flags)  # it is an empty file


def test_commands_that_try_one_folder_together_do_not_disturb_each_other(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(runs.check_writable, [tmp_path / "out"] * 200))
    assert list(tmp_path.iterdir()) == []


# --- the line to go on with ---


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell without a python of this one's, in a folder that has no interpreter below."""
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("SCRATCH", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("given", "added"),
    [
        ([], ["--auto-resume"]),
        (["--dataset", "my digits/x", "--lr", "1e-3"], ["--auto-resume"]),
        (["--auto-resume", "--epochs", "3"], []),
        (["--no-auto-resume"], ["--auto-resume"]),
        (["--outdir", "a'b"], ["--auto-resume"]),
    ],
)
def test_the_line_to_go_on_with_can_be_copied(
    given: list[str], added: list[str], elsewhere: None, capsys: pytest.CaptureFixture[str]
) -> None:
    outcome = SimpleNamespace(code=130, paths=None)
    assert cli.close(outcome, "python -m ldm_ray.train", "", given, parse(*given)) == 130
    said, _, line = capsys.readouterr().out.partition(": ")
    assert said == "stopped; go on with"
    words = shlex.split(line)
    assert words == [sys.executable, "-m", "ldm_ray.train", *given, *added]
    assert parse(*words[3:]).auto_resume


def test_the_line_names_a_scratch_that_was_set_for_one_command(
    elsewhere: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SCRATCH", "/big disk")
    line = cli.again("python -m ldm_ray.train", [], TrainConfig())
    assert shlex.split(line)[3:] == ["--auto-resume", "--outdir", "/big disk"]
    line = cli.again("python -m ldm_ray.train", ["--outdir", "x"], TrainConfig(outdir="x"))
    assert shlex.split(line)[3:] == ["--outdir", "x", "--auto-resume"]


def test_the_line_has_the_shell_s_own_python_where_that_is_this_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder, at in ((tmp_path, "bin/python"), (tmp_path / "bin", "python")):
        python = tmp_path / "bin" / "python"
        python.parent.mkdir(exist_ok=True)
        python.touch(mode=0o755)
        monkeypatch.setattr(sys, "executable", str(python))
        monkeypatch.setenv("PATH", "/nowhere" if folder == tmp_path else str(folder))
        monkeypatch.chdir(tmp_path)
        assert cli.runnable("python -m ldm_ray.infer") == f"{at} -m ldm_ray.infer"


@pytest.mark.parametrize("command", ["infer", "evaluate", "explore", "generate", "compare", "inspect"])
def test_without_a_checkpoint_every_command_says_the_same(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SCRATCH", str(tmp_path / "none"))
    flag, by = " --space latent" if command == "compare" else "", "" if command == "inspect" else " by --ckpt"
    wanted = f"no checkpoint{flag and ' of' + flag} under {tmp_path / 'none'}: name one{by}, or make one with "
    assert f"{wanted}python -m ldm_ray.train{flag}" in refusal(command)
    assert not os.listdir(tmp_path)
