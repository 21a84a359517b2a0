"""Workers that are killed, and a disk that is full."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
import torch

from ldm_ray.checkpoints.checkpoint import load_autoencoder
from ldm_ray.data.sources import load_source
from ldm_ray.distributed.encode import encode
from tests.helpers.commands import below, call, meanwhile, only, run
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


def fill(folder: Path) -> Path:
    """Takes all space that is left."""
    path = folder / "filler"
    with path.open("wb", buffering=0) as stream:
        for size in (1 << 20, 1 << 12):
            with contextlib.suppress(OSError):
                while True:
                    stream.write(bytes(size))
    return path


def test_a_full_disk_ends_training_at_once_and_it_goes_on_later(
    digits_folder: Path, ae_file: Path, small_disk: Callable[[str], Path]
) -> None:
    disk = small_disk("size=300m")
    flags = ["--dataset", digits_folder, "--ae-ckpt", ae_file, *SMALL, "--epochs", 20, "--checkpoint-every", 5]
    flags += ["--max-failures", 20, "--outdir", disk]
    fillers: list[Path] = []
    with meanwhile(lambda: epochs(disk)[5:], lambda _: fillers.append(fill(disk))):
        code, output, errors = call("train", *flags)
    assert code == 2 and output == ""
    [line] = [line for line in errors.splitlines() if "No space left" in line]
    assert str(disk) in line and "is kept: go on with --auto-resume" in line and "Traceback" not in errors
    assert not [file for file in disk.rglob("*") if "partial" in file.name]
    kept = torch.load(only(disk, "checkpoints/*/latest.pt"), weights_only=True)
    assert f"after epoch {kept['epoch']} of 20" in line
    fillers[0].unlink()
    run("train", *flags, "--auto-resume")
    assert torch.load(only(disk, "checkpoints/*/latest.pt"), weights_only=True)["epoch"] == 20
    assert [epoch["epoch"] for epoch in epochs(disk)] == list(range(1, 21))


def test_a_disk_that_is_full_before_there_is_a_checkpoint(
    digits_folder: Path, ae_file: Path, small_disk: Callable[[str], Path]
) -> None:
    disk = small_disk("size=1m")
    flags = ["--dataset", digits_folder, "--ae-ckpt", ae_file, *SMALL, "--epochs", 2, "--outdir", disk]
    code, _, errors = call("train", *flags)
    [line] = [line for line in errors.splitlines() if "No space left" in line]
    assert code == 2 and "no checkpoint was written yet" in line and "is kept" not in errors
    assert not list(disk.glob("checkpoints/*/*"))


def test_a_disk_too_small_for_the_encoded_images(
    digits_folder: Path, ae_file: Path, small_disk: Callable[[str], Path]
) -> None:
    disk = small_disk("size=12k")
    code, _, errors = call("train", "--dataset", digits_folder, "--ae-ckpt", ae_file, *SMALL, "--outdir", disk)
    assert code == 2 and "Traceback" not in errors
    assert "No space left" in errors.splitlines()[-1]
    assert not list(disk.rglob("manifest.json"))
