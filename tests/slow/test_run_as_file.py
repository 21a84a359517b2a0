"""Commands that are run as files, as by an editor's run button: ``python ldm_ray/train.py``."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.data import ROOT

COMMANDS = sorted(file for file in (ROOT / "ldm_ray").glob("*.py") if "    cli.run(main, PROG)\n" in file.read_text())


def python(*words: object, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("file", COMMANDS, ids=lambda file: file.stem)
def test_a_command_as_a_file(file: Path, tmp_path: Path) -> None:
    done = python(file, "--help", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"usage: python -m ldm_ray.{file.stem}" in done.stdout and done.stderr == ""


def test_all_commands_are_tried() -> None:
    assert {"train", "train_autoencoder", "infer", "inspect", "generate", "evaluate"} <= {
        file.stem for file in COMMANDS
    }


def test_work_is_done_as_a_file_and_in_the_folder_of_the_files(ae_file: Path, tmp_path: Path) -> None:
    for words in ([ROOT / "ldm_ray" / "inspect.py"], ["inspect.py"], ["-m", "inspect"]):
        done = python(
            *words, ae_file, folder=ROOT / "ldm_ray" if len(words) > 1 or words == ["inspect.py"] else tmp_path
        )
        assert done.returncode == 0, done.stderr
        assert "autoencoder" in done.stdout
