"""``python -m ldm_ray.generate`` on real Ray: the same bytes on any number of workers, and whatever is killed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from ldm_ray import checkpoint
from ldm_ray.checkpoint import load_autoencoder
from ldm_ray.diffusion.schedule import NoiseSchedule
from ldm_ray.models.denoiser import Denoiser

COUNT, SHARDS = 1200, 24
FLAGS = ["--seeds", "100-1199,7,0-98", "--shard-size", "50", "--labels", "random", "--save-latents", "--device", "cpu"]
FLAGS += ["--sampler", "ddpm", "--num-inference-steps", "60"]


def busy_checkpoint(path: Path, ae_file: Path, **args: object) -> Path:
    """A denoiser of random weights with the autoencoder inside."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        denoiser = Denoiser(16, 64)
        with torch.no_grad():
            for weight in denoiser.parameters():
                weight.add_(torch.randn_like(weight) * 0.05)
    checkpoint.write(
        path, checkpoint.diffusion_content(denoiser, denoiser, NoiseSchedule(), load_autoencoder(ae_file), dict(args))
    )
    return path


@pytest.fixture(scope="session")
def ckpt(tmp_path_factory: pytest.TempPathFactory, ae_file: Path) -> Path:
    return busy_checkpoint(tmp_path_factory.mktemp("denoiser") / "latest.pt", ae_file)


def start(*flags: object) -> subprocess.Popen[str]:
    arguments = [sys.executable, "-m", "ldm_ray.generate", *map(str, flags)]
    return subprocess.Popen(arguments, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    output = process.communicate(timeout=300)[0]
    assert process.returncode == code, output
    return output


def shards(folder: Path) -> list[Path]:
    return sorted((folder / "data").glob("*.parquet"))


def files(folder: Path) -> dict[str, bytes]:
    """Everything in a dataset's folder but the manifest, which says where the checkpoint was."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def wait_for(folder: Path, count: int, process: subprocess.Popen[str]) -> None:
    while len(shards(folder)) < count:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)


def whole(folder: Path) -> None:
    """What is there under a final name is what its record says."""
    import hashlib

    for file in shards(folder):
        record = json.loads((folder / ".committed" / f"{file.stem}.json").read_text())
        assert hashlib.sha256(file.read_bytes()).hexdigest() == record["sha256"]


@pytest.fixture(scope="module")
def made(ckpt: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run on two workers."""
    out = tmp_path_factory.mktemp("made") / "set"
    told = finish(start("--ckpt", ckpt, *FLAGS, "--outdir", out, "--num-workers", 2))
    assert f"{COUNT:,} images in {SHARDS} shards" in told and "by 2 workers" in told
    return out


def test_the_tree(made: Path) -> None:
    assert sorted(file.name for file in made.iterdir()) == [
        ".committed", "README.md", "SHA256SUMS", "data", "manifest.json", "preview.png"
    ]  # fmt: skip
    assert [file.name for file in shards(made)] == [f"train-{i:05d}-of-{SHARDS:05d}.parquet" for i in range(SHARDS)]
    subprocess.run(["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"], cwd=made, check=True)
    assert len((made / "SHA256SUMS").read_text().splitlines()) == SHARDS


def test_bytes_do_not_depend_on_workers_or_batches(made: Path, ckpt: Path, tmp_path: Path) -> None:
    finish(start("--ckpt", ckpt, *FLAGS, "--outdir", tmp_path / "set", "--num-workers", 1, "--batch-size", 17))
    assert files(tmp_path / "set") == files(made)


def test_a_finished_dataset_is_not_touched_and_needs_no_ray(made: Path, ckpt: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in made.rglob("*")}
    told = finish(start("--ckpt", ckpt, *FLAGS, "--outdir", made, "--num-workers", 1))
    assert "workers" not in told and f"{COUNT:,} images" in told
    assert {file: file.stat().st_mtime_ns for file in made.rglob("*")} == before


def test_stopped_and_killed_runs_are_finished_with_the_same_bytes(made: Path, ckpt: Path, tmp_path: Path) -> None:
    """SIGTERM, then SIGKILL of the command, then of a worker; each run goes on where the one before was."""
    out = tmp_path / "set"
    flags = ["--ckpt", ckpt, *FLAGS, "--outdir", out]

    process = start(*flags)
    wait_for(out, 2, process)
    process.send_signal(signal.SIGTERM)
    told = finish(process, 128 + signal.SIGTERM)
    assert "run the same command again to go on" in told and "Traceback" not in told
    assert not (out / ".partial").exists() and not (out / "SHA256SUMS").exists()
    whole(out)
    first = {file: file.stat().st_mtime_ns for file in shards(out)}
    assert 2 <= len(first) < SHARDS

    process = start(*flags)
    wait_for(out, len(first) + 2, process)
    process.kill()
    process.wait()
    process.communicate()
    time.sleep(1)  # Ray's processes notice
    whole(out)
    second = {file: file.stat().st_mtime_ns for file in shards(out)}
    assert first.items() <= second.items() and len(second) < SHARDS

    process = start(*flags)
    wait_for(out, len(second) + 2, process)
    workers = [
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if any("Worker" in part for part in child.cmdline()[:1]) and "ray::" in child.cmdline()[0]
    ]
    assert workers
    workers[0].kill()
    finish(process)
    assert second.items() <= {file: file.stat().st_mtime_ns for file in shards(out)}.items()
    assert files(out) == files(made)


def test_ray_data_opens_it(made: Path) -> None:
    code = (
        "import ray, sys, logging; ray.init(address='local', num_cpus=1, log_to_driver=False)\n"
        "rows = ray.data.read_parquet(sys.argv[1]).take_all()\n"
        "print(len(rows), sorted(rows[0]), len({row['seed'] for row in rows}))"
    )
    shown = subprocess.run([sys.executable, "-c", code, made / "data"], capture_output=True, text=True, timeout=200)
    assert shown.stdout.splitlines()[-1] == f"{COUNT} ['image', 'label', 'latent', 'seed'] {COUNT - 1}", (
        shown.stderr
    )  # 7 twice


def test_verify_regenerates(made: Path, ckpt: Path) -> None:
    told = finish(start("verify", made, "--sample", 40, "--seed", 3))
    assert "24 shards with 1,200 images have the bytes that were written" in told
    assert "40 images made again have the same bytes" in told


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--seeds", "5-3"], "--seeds 5-3: a range rises"),
        (["--seeds", "a"], "'a' is neither"),
        (["--labels", "11"], "--labels 11: a range rises, and a label is 0 to 9"),
        (["--outdir", "nowhere://x"], "nowhere://x cannot be opened by pyarrow"),
        (["--num-inference-steps", "1001"], "this model has 1000 timesteps"),
        (["verify", "."], "is no dataset"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(flags: list[str], said: str, ckpt: Path, tmp_path: Path) -> None:
    given = flags if flags[0] == "verify" else ["--ckpt", str(ckpt), "--outdir", str(tmp_path / "x"), *flags]
    arguments = [sys.executable, "-m", "ldm_ray.generate", *given]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=100, cwd=Path(__file__).parent)
    assert done.returncode == 2 and done.stdout == "" and not (tmp_path / "x").exists()
    assert said in done.stderr and len(done.stderr.splitlines()) == 1
