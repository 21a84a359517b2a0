"""Diffusion of pixels through the commands, on Ray."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from ldm_ray import compare
from ldm_ray.checkpoints import checkpoint
from ldm_ray.diffusion.schedule import NoiseSchedule
from ldm_ray.engine.generator import Generator
from ldm_ray.settings.training import TrainConfig
from tests.helpers.checkpoints import same_weights
from tests.helpers.commands import only, run
from tests.helpers.networks import busy_denoiser

pytestmark = pytest.mark.usefixtures("ray_here")
TRAIN = ["--space", "pixel", "--hidden-dim", "8", "--batch-size", "64", "--T", "50", "--beta-end", "0.2"]
TRAIN += ["--device", "cpu", "--lr-schedule", "constant"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, digits_folder: Path) -> Path:
    out = tmp_path_factory.mktemp("trained")
    flags = ["--dataset", digits_folder, "--outdir", out, "--epochs", 2, "--generate-images"]
    run("train", *flags, *TRAIN)
    return out


def test_training_from_images_to_images(trained: Path, tmp_path: Path) -> None:
    folder = only(trained / "checkpoints", "pixel-diffusion-dall-bs64-lr0.001-T50-seed42-*")
    assert Image.open(only(trained / "samples", f"{folder.name}/epoch_000002.png")).size == (122, 122)
    lines = [json.loads(line) for line in (trained / "runs" / folder.name / "metrics.jsonl").read_text().splitlines()]
    assert lines[1]["train_loss"] < lines[0]["train_loss"]
    assert not list((trained / "checkpoints").glob("ae-*"))
    run("infer", "--outdir", trained, "--output", tmp_path / "a.png", "--num-images", 4)
    assert Image.open(tmp_path / "a.png").size == (62, 62)
    summary = run("inspect", folder / "latest.pt", "--json")
    assert json.loads(summary)["kind"] == "pixel_diffusion" and json.loads(summary)["image_size"] == [28, 28]


def test_a_stopped_run_goes_on_to_the_same_weights(trained: Path, tmp_path: Path, digits_folder: Path) -> None:
    flags = ["--dataset", digits_folder, "--outdir", tmp_path, *TRAIN]
    shutil.copytree(trained / "latents", tmp_path / "latents")
    run("train", *flags, "--epochs", 1)
    run("train", *flags, "--epochs", 2, "--auto-resume")
    resumed, whole = (only(out / "checkpoints", "*/latest.pt") for out in (tmp_path, trained))
    assert same_weights(resumed, whole)
    assert not same_weights(resumed, resumed.with_name("checkpoint_epoch_000001.pt"))


def test_a_dataset_of_generated_images(trained: Path, tmp_path: Path) -> None:
    path = only(trained / "checkpoints", "*/latest.pt")
    flags = ["--ckpt", path, "--seeds", "0-19", "--outdir", tmp_path / "out", "--shard-size", 10, "--save-latents"]
    run("generate", *flags, "--device", "cpu")
    rows = pq.read_table(sorted((tmp_path / "out").rglob("*.parquet"))[0])
    generator = Generator.open(path)
    latents = np.stack(rows["latent"].to_numpy(zero_copy_only=False))
    assert latents.shape == (10, 784)
    wanted = generator(range(10), [i % 10 for i in range(10)])
    assert torch.equal(generator.decode(torch.tensor(latents)), wanted)
    assert "it diffuses pixels" in (tmp_path / "out" / "README.md").read_text()
    run("generate", "verify", tmp_path / "out", "--sample", 5)


def test_compare_puts_latents_and_pixels_side_by_side(
    trained: Path, tmp_path: Path, ae_file: Path, digits_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pixels, latents = only(trained / "checkpoints", "*/latest.pt"), tmp_path / "latents.pt"
    model, settings = busy_denoiser(), TrainConfig(batch_size=64).to_dict()
    about = checkpoint.diffusion_content(
        model, model, NoiseSchedule(), checkpoint.load_autoencoder(ae_file), settings, epoch=4, train_seconds=8.0
    )
    checkpoint.write(latents, about)
    flags = ["--ckpt", str(latents), str(pixels), "--dataset", str(digits_folder), "--output", str(tmp_path / "out")]
    flags += ["--outdir", str(tmp_path), "--samples", "20", "--batches", "1,3", "--repeats", "1", "--device", "cpu"]
    assert compare.main(flags) == 0
    rows = json.loads((tmp_path / "out" / "comparison.json").read_text())["checkpoints"]
    assert [row["space"] for row in rows] == ["latent", "pixel"]
    assert rows[0]["operations_per_step"] == 2 * 532_480  # 16·256 + 8·256² + 256·16 multiplications and additions
    assert rows[0]["parameters"] > rows[1]["parameters"]
    assert rows[0]["operations_per_image"] < rows[1]["operations_per_image"]
    assert rows[0]["seconds_per_epoch"] == 2.0
    for row in rows:
        assert set(row["ms_per_image"]) == {"1", "3"} and min(row["ms_per_image"].values()) > 0
        assert row["train_images_per_s"] > 0 and row["quality"]["mean"]["fd_lenet"] > 0 and row["floor"] > 0
    assert list(rows[1]["floors"]) == ["train"]
    text = (tmp_path / "out" / "comparison.md").read_text()
    assert "| FD-LeNet ↓ |" in text and text in capsys.readouterr().out
    assert [row["name"] for row in rows] == ["latent, 4 epochs", "pixel, 2 epochs"]
    assert min(row["training_mb"] for row in rows) > 100
    picture = np.asarray(Image.open(tmp_path / "out" / "comparison.png"))
    assert picture.ndim == 3 and picture.std() > 10
