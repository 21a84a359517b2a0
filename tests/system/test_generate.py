"""``python -m ldm_ray.generate`` on real Ray: the same bytes on any number of workers, and whatever is killed."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import ray

from tests.helpers.checkpoints import write_small_checkpoint
from tests.helpers.commands import below, finish, meanwhile, run, start, wait_for

pytestmark = pytest.mark.usefixtures("ray_here")
COUNT, SHARDS = 1200, 24
FLAGS = ["--seeds", "100-1199,7,0-98", "--shard-size", "50", "--labels", "random", "--save-latents", "--device", "cpu"]
FLAGS += ["--sampler", "ddpm", "--num-inference-steps", "60"]


@pytest.fixture(scope="session")
def ckpt(tmp_path_factory: pytest.TempPathFactory, ae_file: Path) -> Path:
    return write_small_checkpoint(tmp_path_factory.mktemp("denoiser") / "latest.pt", ae_file)


WITHOUT_RAY = """
import sys
sys.modules["ray"] = None
from ldm_ray import generate
sys.exit(generate.main(sys.argv[1:]))
"""


def shards(folder: Path) -> list[Path]:
    return sorted((folder / "data").glob("*.parquet"))


def files(folder: Path) -> dict[str, bytes]:
    """Everything in a dataset's folder but the manifest, which says where the checkpoint was."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def wait_for_shards(folder: Path, count: int, process: subprocess.Popen[str]) -> None:
    wait_for(lambda: len(shards(folder)) >= count, process)


def whole(folder: Path) -> None:
    """What is there under a final name is what its record says."""
    for file in shards(folder):
        record = json.loads((folder / ".committed" / f"{file.stem}.json").read_text())
        assert hashlib.sha256(file.read_bytes()).hexdigest() == record["sha256"]


@pytest.fixture(scope="module")
def made(ckpt: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run on two workers."""
    out = tmp_path_factory.mktemp("made") / "set"
    output = run("generate", "--ckpt", ckpt, *FLAGS, "--outdir", out, "--num-workers", 2)
    assert f"{COUNT:,} images in {SHARDS} shards" in output and "by 2 workers" in output
    return out


def test_the_tree(made: Path) -> None:
    assert sorted(file.name for file in made.iterdir()) == [
        ".committed", "README.md", "SHA256SUMS", "data", "manifest.json", "preview.png"
    ]  # fmt: skip
    assert [file.name for file in shards(made)] == [f"train-{i:05d}-of-{SHARDS:05d}.parquet" for i in range(SHARDS)]
    subprocess.run(["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"], cwd=made, check=True)
    assert len((made / "SHA256SUMS").read_text().splitlines()) == SHARDS


def test_bytes_do_not_depend_on_workers_or_batches(made: Path, ckpt: Path, tmp_path: Path) -> None:
    run("generate", "--ckpt", ckpt, *FLAGS, "--outdir", tmp_path / "set", "--num-workers", 1, "--batch-size", 17)
    assert files(tmp_path / "set") == files(made)


def test_a_finished_dataset_is_not_touched_and_needs_no_ray(made: Path, ckpt: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in made.rglob("*")}
    output = finish(start("-c", WITHOUT_RAY, "--ckpt", ckpt, *FLAGS, "--outdir", made, "--num-workers", 1))
    assert "workers" not in output and f"{COUNT:,} images" in output
    assert {file: file.stat().st_mtime_ns for file in made.rglob("*")} == before


def test_stopped_and_killed_runs_are_finished_with_the_same_bytes(made: Path, ckpt: Path, tmp_path: Path) -> None:
    """SIGTERM, then SIGKILL of the command, then of a worker; each run goes on where the one before was."""
    out = tmp_path / "set"
    flags = ["--ckpt", ckpt, *FLAGS, "--outdir", out]
    command = ["-m", "ldm_ray.generate", *flags]

    with meanwhile(lambda: len(shards(out)) >= 2, lambda _: os.kill(os.getpid(), signal.SIGTERM)):
        output = run("generate", *flags, code=128 + signal.SIGTERM)
    assert "run the same command again to go on" in output and "Traceback" not in output
    assert not (out / ".partial").exists() and not (out / "SHA256SUMS").exists()
    whole(out)
    first = {file: file.stat().st_mtime_ns for file in shards(out)}
    assert 2 <= len(first) < SHARDS

    process = start(*command)
    wait_for_shards(out, len(first) + 2, process)
    process.kill()
    process.wait()
    process.communicate()
    time.sleep(1)  # Ray's processes notice
    whole(out)
    second = {file: file.stat().st_mtime_ns for file in shards(out)}
    assert first.items() <= second.items() and len(second) < SHARDS

    with meanwhile(
        lambda: len(shards(out)) >= len(second) + 2,
        lambda _: below(psutil.Process(), "MapBatches(Worker)")[0].kill(),
    ):
        run("generate", *flags)
    assert second.items() <= {file: file.stat().st_mtime_ns for file in shards(out)}.items()
    assert files(out) == files(made)


def test_ray_data_opens_it(made: Path) -> None:
    rows = ray.data.read_parquet(str(made / "data")).take_all()
    assert len(rows) == COUNT and sorted(rows[0]) == ["image", "label", "latent", "seed"]
    assert len({row["seed"] for row in rows}) == COUNT - 1  # 7 twice


def test_verify_regenerates(made: Path, ckpt: Path) -> None:
    output = run("generate", "verify", made, "--sample", 40, "--seed", 3)
    assert "24 shards with 1,200 images have the bytes that were written" in output
    assert "40 images made again have the same bytes" in output
