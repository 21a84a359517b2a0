"""From images alone to images: a first run, and one over images of another size and other classes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers.commands import only, run

pytestmark = pytest.mark.usefixtures("ray_here")


def test_no_network_and_no_autoencoder(tmp_path: Path, digits_folder: Path) -> None:
    flags = ["--dataset", digits_folder, "--outdir", tmp_path, "--epochs", 1, "--T", 10, "--device", "cpu"]
    output = run("train", *flags)
    assert "training one first (mlp)" in output
    assert only(tmp_path, "checkpoints/ae-mlp-*/latest.pt")
    assert only(tmp_path, "checkpoints/latent-diffusion-*/latest.pt")


def shapes(folder: Path) -> Path:
    """Folders of small pictures that are not square, of three classes."""
    random = np.random.default_rng(0)
    for split, count in (("train", 20), ("test", 6)):
        for name in ("bar", "ring", "square"):
            where = folder / split / name
            where.mkdir(parents=True)
            for i in range(count):
                picture = np.zeros((20, 24), np.uint8)
                top, left = random.integers(1, 6, 2)
                picture[top : top + 12, left : left + (4 if name == "bar" else 12)] = 255
                if name == "ring":
                    picture[top + 3 : top + 9, left + 3 : left + 9] = 0
                Image.fromarray(picture).save(where / f"{i:02d}.png")
    return folder


def test_three_classes_of_another_size_from_folders_to_images(tmp_path: Path) -> None:
    folder, out = shapes(tmp_path / "shapes"), tmp_path / "out"
    common = ["--dataset", folder, "--outdir", out, "--device", "cpu"]
    run("train_autoencoder", "--model", "conv", "--epochs", 2, "--latent-dim", 6, *common)
    flags = ["--epochs", 2, "--T", 20, "--generate-images", "--samples-per-epoch", 4, *common]
    assert "60 images of" in run("train", *flags)
    ckpt = only(out, "checkpoints/latent-diffusion-*/latest.pt")
    content = torch.load(ckpt, weights_only=True)
    assert content["num_classes"] == 3 and content["data"]["class_names"] == ["bar", "ring", "square"]
    assert content["autoencoder"]["image_size"] == [20, 24] and content["model"]["class_emb.weight"].shape == (3, 256)
    assert np.asarray(Image.open(only(out, "samples/latent-diffusion-*/epoch_000002.png"))).shape == (46, 54)
    shown = run("inspect", ckpt)
    assert "bar, ring, square" in shown
    picture = tmp_path / "ring.png"
    run("infer", "--ckpt", ckpt, "--digit", "Ring", "--num-images", 1, "--output", picture)
    assert np.asarray(Image.open(picture)).shape == (20, 24)
    assert "nothing left to do" in run("train", *flags, "--auto-resume")
