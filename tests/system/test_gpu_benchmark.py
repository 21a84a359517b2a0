"""What is run first where there is a GPU, rehearsed on a CPU: the command and the tests that it starts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.helpers.data import ROOT

PARTS = {"device", "company", "training", "encoder", "sampling", "quality"}


def test_a_minute_on_a_cpu_has_every_part_and_a_file_after_every_line(tmp_path: Path) -> None:
    """Started elsewhere and with nothing on Python's path; each part has figures, none failed."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    flags = ["--device", "cpu", "--minutes", "0.25", "--images", "400", "--timed", "2"]
    flags += ["--only", "facts", "company", "training", "encoder", "sampling", "full_training"]
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "gpu.py", *flags],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert len(done.stdout.splitlines()) == len(rows) + 1
    assert {row["part"] for row in rows} == PARTS
    values = [row["value"] for row in rows]
    assert "FAILED" not in values and "OTHER BYTES" not in values, done.stdout
    assert any(isinstance(row["value"], float) for row in rows if row["part"] == "quality")


def test_tests_of_a_gpu_pass_in_the_rehearsal() -> None:
    """Some of each kind; ``benchmarks/gpu.py --device cpu`` runs all."""
    some = "pinned or noise or (repeats and denoiser) or (wait and denoiser) or (company and mlp) or (slots and mlp)"
    plain = ["--noconftest", "-o", "addopts=", "-p", "no:cacheprovider", "-p", "tests.helpers.pretend_cuda"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *plain, "-m", "gpu", "-k", some, "tests/unit/test_gpu.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout
    assert "skipped" not in done.stdout and int(done.stdout.split(" passed")[0].split()[-1]) >= 12
