"""``python -m ldm_ray.inspect``: a few lines, or all of it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from ldm_ray import inspect
from ldm_ray.checkpoints import checkpoint
from ldm_ray.diffusion.schedule import NoiseSchedule
from ldm_ray.settings.training import TrainConfig
from tests.helpers.checkpoints import write_pixels
from tests.helpers.commands import refusal, run
from tests.helpers.networks import busy_denoiser


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory: pytest.TempPathFactory, ae_file: Path) -> Path:
    """With all that a training run records."""
    outdir = tmp_path_factory.mktemp("out")
    path, model = outdir / "checkpoints" / "latent-diffusion-x-20260101-000000" / "latest.pt", busy_denoiser(16)
    content = checkpoint.diffusion_content(
        model,
        model,
        NoiseSchedule(),
        checkpoint.load_autoencoder(ae_file),
        TrainConfig(hidden_dim=16).to_dict(),
        epoch=60,
        global_step=900,
        train_loss=0.25,
        val_loss=0.3,
        train_seconds=421.7,
        exp_name="latent-diffusion-x",
        quality={"epoch": 60, "fd_lenet": 2.0312, "accuracy": 0.98},
        data={"dataset": "ylecun/mnist", "revision": "abc", "class_names": [f"class {i}" for i in range(10)]},
    )
    checkpoint.write(path, content)
    return path


def test_twelve_lines_say_what_it_is(ckpt: Path) -> None:
    shown = run("inspect", ckpt)
    lines = dict(line.split(maxsplit=1) for line in shown.splitlines())
    assert len(shown.splitlines()) <= 12 and lines["kind"] == "latent_diffusion"
    assert lines["sha256"] == checkpoint.file_sha256(ckpt) and "ylecun/mnist" in lines["images"]
    assert lines["trained"].endswith("train loss 0.2500, validation loss 0.3000, 422 s") and "60" in lines["trained"]
    assert "2.0312" in lines["quality"] and "class 0, class 1" in lines["classes"] and "--all" in lines["more"]


def test_all_of_it_is_printed_once(ckpt: Path) -> None:
    shown = run("inspect", ckpt, "--all")
    names = [line.split()[0] for line in shown.splitlines()]
    assert {"batch_size", "global_step", "versions", "ae_model"} <= set(names) and names.count("batch_size") == 1
    whole = json.loads(run("inspect", ckpt, "--json"))
    assert whole["config"]["batch_size"] == 512 and whole["global_step"] == 900


def test_other_kinds_have_few_lines_too(ae_file: Path, tmp_path: Path) -> None:
    write_pixels(tmp_path / "pixels.pt")
    shown = run("inspect", tmp_path / "pixels.pt")
    assert len(shown.splitlines()) <= 12 and "784 pixels" in shown and "(28, 28)" in shown
    shown = run("inspect", ae_file)
    assert len(shown.splitlines()) <= 12 and "autoencoder, type mlp" in shown and "epoch 3" in shown


def test_the_newest_is_the_default(ckpt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SCRATCH", raising=False)
    monkeypatch.chdir(tmp_path)
    assert "no checkpoint under" in refusal("inspect") and not os.listdir(tmp_path)
    monkeypatch.setenv("SCRATCH", str(ckpt.parents[2]))
    assert str(ckpt) in run("inspect")


def test_a_file_may_say_anything(tmp_path: Path) -> None:
    assert inspect.phrases({"a": "x", "b": None, "c": 2}, {"a": "loss {:.4f}", "b": "{}", "c": "{} wide"}) == [
        "x",
        "2 wide",
    ]
