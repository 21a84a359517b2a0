"""A training run that is stopped or killed ends with the weights of one that was not.

Signals go to more than the command, as they do from ``timeout`` (its process group) and from Slurm and systemd
(everything that belongs to it).
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch

from ldm_ray.distributed.local import clean
from tests.helpers.checkpoints import same_weights
from tests.helpers.commands import below, call, meanwhile, only, run, start, wait_for

pytestmark = pytest.mark.usefixtures("ray_here")
LONG = ["--epochs", "30", "--batch-size", "8", "--lr", "1e-3", "--T", "50", "--device", "cpu", "--hidden-dim", "32"]
SIGNALS = [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGKILL]
UNDER = {signal.SIGTERM: ["timeout", "--preserve-status", "-s", "TERM", "1000"], signal.SIGKILL: []}
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


@dataclass(frozen=True)
class Stop:
    code: int
    output: str
    epoch: int  # of the checkpoint that is left


@dataclass(frozen=True)
class Stops:
    """One run, stopped by each signal in turn and gone on with; at last to its end."""

    by: dict[signal.Signals, Stop]
    latest: Path


@pytest.fixture(scope="module")
def stops(tmp_path_factory: pytest.TempPathFactory, long_run: Path, digits_folder: Path, ae_file: Path) -> Stops:
    out = tmp_path_factory.mktemp("stopped")
    with_latents(out, long_run)
    flags = ["--dataset", digits_folder, "--ae-ckpt", ae_file, "--outdir", out, *LONG, "--auto-resume"]
    by = {}
    for number in SIGNALS:
        already = checkpoints(out)

        def begun(already: int = already) -> bool:
            return checkpoints(out) >= already + 2

        if number in UNDER:
            process = start("-m", "ldm_ray.train", *flags, under=UNDER[number], start_new_session=True)
            wait_for(begun, process)
            processes = psutil.Process(process.pid).children(recursive=True)
            os.kill(process.pid, signal.SIGALRM if UNDER[number] else number)  # time is up
            output, code = process.communicate(timeout=400)[0], process.returncode
            clean(Path(os.environ["RAY_TMPDIR"], "ray"))  # as the next command does that starts Ray
            assert psutil.wait_procs(processes, timeout=30)[1] == []
        else:
            with meanwhile(begun, partial(send, number)):
                code, *streams = call("train", *flags)
            output = "".join(streams)
        latest = only(out, f"checkpoints/{LONG_RUN}/latest.pt")
        by[number] = Stop(code, output, torch.load(latest, weights_only=True)["epoch"])
    assert "going on with" in run("train", *flags)
    return Stops(by, latest)


def send(number: signal.Signals, _: object) -> None:
    """To this process, which runs a command, and to all processes of its Ray."""
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "ray" in " ".join(process.cmdline()):
                process.send_signal(number)
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", SIGNALS)
def test_stop_and_resume_bit_for_bit(number: signal.Signals, stops: Stops, long_run: Path) -> None:
    stop, before = stops.by[number], [stops.by[each].epoch for each in SIGNALS[: SIGNALS.index(number)]]
    assert stop.code == (-number if number == signal.SIGKILL else 128 + number), stop.output
    if number != signal.SIGKILL:
        assert f"the last checkpoint, after epoch {stop.epoch} of 30" in stop.output and "--auto-resume" in stop.output
    assert max(before, default=0) < stop.epoch < 30
    assert not before or "going on with" in stop.output
    assert same_weights(long_run, stops.latest)
