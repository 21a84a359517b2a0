"""A training run that is stopped or killed ends with the weights of one that was not."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import psutil
import pytest
import torch

from tests.helpers.checkpoints import same_weights
from tests.helpers.commands import below, finish, meanwhile, only, run, start, wait_for

pytestmark = pytest.mark.usefixtures("ray_here")
LONG = ["--epochs", "30", "--batch-size", "8", "--lr", "1e-3", "--T", "50", "--device", "cpu", "--hidden-dim", "32"]
LONG_RUN = "latent-diffusion-dall-bs8-lr0.001-T50-seed42-*"


@pytest.fixture(scope="module")
def long_run(tmp_path_factory: pytest.TempPathFactory, digits_folder: Path, ae_file: Path) -> Path:
    out = tmp_path_factory.mktemp("long")
    run("train", "--dataset", digits_folder, "--ae-ckpt", ae_file, "--outdir", out, *LONG)
    return only(out, f"checkpoints/{LONG_RUN}/latest.pt")


def with_latents(out: Path, run: Path) -> None:
    """Gives an output directory the encoded images of a run."""
    shutil.copytree(run.parents[2] / "latents", out / "latents")


def checkpoints(out: Path) -> int:
    return len(list(out.glob(f"checkpoints/{LONG_RUN}/checkpoint_*.pt")))


def test_killed_worker_ends_with_the_same_weights(
    long_run: Path, digits_folder: Path, ae_file: Path, tmp_path: Path
) -> None:
    with_latents(tmp_path, long_run)
    with meanwhile(lambda: checkpoints(tmp_path) >= 3, lambda _: below(psutil.Process(), "TrainWorker")[0].kill()):
        run("train", "--dataset", digits_folder, "--ae-ckpt", ae_file, "--outdir", tmp_path, *LONG)
    assert same_weights(long_run, only(tmp_path, f"checkpoints/{LONG_RUN}/latest.pt"))
    lines = only(tmp_path, f"runs/{LONG_RUN}/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == list(range(1, 31))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGKILL])
def test_stop_and_resume_bit_for_bit(
    number: signal.Signals, long_run: Path, digits_folder: Path, ae_file: Path, tmp_path: Path
) -> None:
    flags = ["--dataset", digits_folder, "--ae-ckpt", ae_file, "--outdir", tmp_path, *LONG, "--auto-resume"]
    with_latents(tmp_path, long_run)
    process = start("-m", "ldm_ray.train", *flags, start_new_session=True)
    wait_for(lambda: checkpoints(tmp_path) >= 2, process)
    os.kill(process.pid, number)
    output = finish(process, -number if number == signal.SIGKILL else 128 + number)
    assert number == signal.SIGKILL or "--auto-resume" in output
    latest = only(tmp_path, f"checkpoints/{LONG_RUN}/latest.pt")
    assert torch.load(latest, weights_only=True)["epoch"] < 30
    assert "going on with" in run("train", *flags)
    assert same_weights(long_run, latest)
