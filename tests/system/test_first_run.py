"""From images alone to images: a first run, and one over images of another size and other classes."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from PIL import Image

from ldm_ray.checkpoints.checkpoint import load_diffusion
from tests.helpers.checkpoints import same_weights
from tests.helpers.commands import call, finish, meanwhile, only, run, start
from tests.helpers.runs import SMALL

pytestmark = pytest.mark.usefixtures("ray_here")
FLAGS = ["--epochs", 1, "--T", 10, "--device", "cpu"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, digits_folder: Path) -> tuple[Path, str]:
    """(output directory, what was printed) of a first run: no network, no autoencoder."""
    out = tmp_path_factory.mktemp("whole")
    return out, run("train", "--dataset", digits_folder, "--outdir", out, *FLAGS)


def test_no_network_and_no_autoencoder(whole: tuple[Path, str]) -> None:
    out, output = whole
    assert "training one first (mlp)" in output
    assert only(out, "checkpoints/ae-mlp-*/latest.pt")
    assert only(out, "checkpoints/latent-diffusion-*/latest.pt")


def test_a_stop_in_the_autoencoder_s_stage_changes_nothing(
    whole: tuple[Path, str], tmp_path: Path, digits_folder: Path
) -> None:
    """The printed line finishes the autoencoder first, with the same images from another place."""
    out, moved = tmp_path / "stopped here", tmp_path / "moved"

    def second_epoch() -> bool:
        return len(list(out.glob("checkpoints/ae-mlp-*/checkpoint_*.pt"))) > 1

    with meanwhile(second_epoch, lambda _: os.kill(os.getpid(), signal.SIGINT)):
        code, output, _ = call("train", "--dataset", digits_folder, "--outdir", out, *FLAGS)
    assert code == 130 and not list(out.glob("checkpoints/latent-*"))
    epoch = torch.load(only(out, "checkpoints/ae-*/latest.pt"), weights_only=True)["epoch"]
    assert f"unfinished, epoch {epoch} of 40" in run("inspect", only(out, "checkpoints/ae-*/latest.pt")) and epoch < 40
    shutil.copytree(digits_folder, moved)
    line = re.search(r"^stopped; go on with: (.* -m ldm_ray.train .*)$", output, re.MULTILINE)
    assert line
    output = run("train", *(moved if word == str(digits_folder) else word for word in shlex.split(line[1])[3:]))
    assert f"after epoch {epoch}" in output
    for pattern in ("checkpoints/latent-diffusion-*/latest.pt", "checkpoints/ae-mlp-*/latest.pt"):
        assert same_weights(only(out, pattern), only(whole[0], pattern))


def test_two_runs_begun_together_keep_apart(tmp_path: Path, digits_folder: Path, ae_file: Path) -> None:
    """Their settings give them the same name but for the time."""
    flags = ["--dataset", digits_folder, "--ae-ckpt", ae_file, "--outdir", tmp_path, *SMALL, "--epochs", 2]
    address = {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    both = [start("-m", "ldm_ray.train", *flags, "--hidden-dim", width, env=address) for width in (16, 24)]
    printed = [finish(process) for process in both]
    paths = sorted(tmp_path.glob("checkpoints/latent-diffusion-*/latest.pt"))
    contents = [torch.load(path, weights_only=True) for path in paths]
    assert {content["config"]["hidden_dim"] for content in contents} == {16, 24} and len(contents) == 2
    for content, path in zip(contents, paths, strict=True):
        assert load_diffusion(path).denoiser.hidden_dim == content["config"]["hidden_dim"]
        assert content["exp_name"] == path.parent.name and sum(str(path) in text for text in printed) == 1
        records = (tmp_path / "runs" / path.parent.name / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(record)["epoch"] for record in records] == [1, 2]
    only(tmp_path, "latents/*/manifest.json")


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
    conv = ["--model", "conv", "--latent-dim", 6, *common]
    run("train_autoencoder", *conv, "--epochs", 1)
    assert "after epoch 1, step 0" in run("train_autoencoder", *conv, "--epochs", 2, "--auto-resume")
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
