"""Workers that are killed, and a disk that is full."""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
import torch

from ldm_ray.checkpoint import load_autoencoder
from ldm_ray.data.sources import load_source
from ldm_ray.distributed.encode import encode
from tests.helpers.commands import below, meanwhile, run
from tests.helpers.runs import SMALL, epochs

pytestmark = pytest.mark.usefixtures("ray_here")


def test_a_killed_encoder_changes_no_latent(ray_here: None, ae_file: Path, tmp_path: Path) -> None:
    source, autoencoder = load_source("digits", "train", tmp_path, 7), load_autoencoder(ae_file)

    def encoders() -> list[psutil.Process]:
        return below(psutil.Process(), "MapBatches(Encoder)")

    encode(source, autoencoder, tmp_path / "whole")
    before = {worker.pid for worker in encoders()}

    def new_encoders() -> list[psutil.Process]:
        return [worker for worker in encoders() if worker.pid not in before]

    with meanwhile(new_encoders, lambda workers: workers[0].kill()):
        encode(source, autoencoder, tmp_path / "killed")
    tables = [pq.read_table(next(tmp_path.glob(f"{name}/latents/*/*.parquet"))) for name in ("whole", "killed")]
    assert tables[0].num_rows > 2048 and tables[0].equals(tables[1])


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300m", "tmpfs", folder], capture_output=True)
    if done.returncode:
        pytest.skip(f"needs to mount a small disk: {done.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], capture_output=True)


def fill(folder: Path) -> Path:
    """Takes all space that is left."""
    path = folder / "filler"
    with path.open("wb", buffering=0) as stream:
        for size in (1 << 20, 1 << 12):
            with contextlib.suppress(OSError):
                while True:
                    stream.write(bytes(size))
    return path


def test_training_goes_on_after_a_disk_was_full(
    ray_here: None, digits_folder: Path, ae_file: Path, small_disk: Path
) -> None:
    def fill_the_disk(_: bool) -> None:
        """Until the worker that trains has ended of it."""
        worker = below(psutil.Process(), "TrainWorker")[0]
        filler = fill(small_disk)
        while worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.02)
        filler.unlink()

    flags = ["--dataset", digits_folder, "--ae-ckpt", ae_file, *SMALL, "--epochs", 20, "--checkpoint-every", 5]
    with meanwhile(lambda: len(epochs(small_disk)) >= 2, fill_the_disk):
        run("train", *flags, "--max-failures", 20, "--outdir", small_disk)
    assert torch.load(next(small_disk.glob("checkpoints/*/latest.pt")), weights_only=True)["epoch"] == 20
    assert [epoch["epoch"] for epoch in epochs(small_disk)] == list(range(1, 21))
