"""python -m ldm_ray.evaluate, end to end and small: floors, samples, files, table, wrong values."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ldm_ray.checkpoints import checkpoint
from ldm_ray.data.sources import load_source
from ldm_ray.data.statistics import LatentStatistics
from ldm_ray.diffusion.schedule import NoiseSchedule
from ldm_ray.engine.generator import Generator
from ldm_ray.evaluate import main
from ldm_ray.metrics import evaluation
from ldm_ray.metrics.floors import autoencoder_hash, chosen, reconstruct
from ldm_ray.metrics.frechet import FeatureStatistics, frechet_distance
from ldm_ray.metrics.lenet import Classifiers
from ldm_ray.models.denoiser import Denoiser
from ldm_ray.settings.errors import ConfigError
from ldm_ray.settings.evaluation import EvaluateConfig
from ldm_ray.settings.sampling import SamplingConfig
from tests.helpers.commands import refusal


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory: pytest.TempPathFactory, ae_file: Path) -> Path:
    """A denoiser of 4 timesteps with its autoencoder inside, both untrained."""
    path = tmp_path_factory.mktemp("run") / "latest.pt"
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = Denoiser(16, 16)
    autoencoder = checkpoint.load_autoencoder(ae_file)
    content = checkpoint.diffusion_content(model, model, NoiseSchedule(4, 0.1, 0.9), autoencoder, {"only_digit": None})
    checkpoint.write(path, content)
    return path


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory, ckpt: Path, digits_folder: Path) -> tuple[Path, str, str]:
    """(folder, stdout, stderr) of the command in a process of its own."""
    out = tmp_path_factory.mktemp("evaluated")
    flags = ["--ckpt", ckpt, "--dataset", digits_folder, "--outdir", out, "--output", out / "made"]
    flags += ["--samples", 40, "--seeds", "3,5", "--guidance-scale", "1,2.5", "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, "-m", "ldm_ray.evaluate", *map(str, flags)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return out, done.stdout, done.stderr


@pytest.fixture(scope="module")
def metrics(evaluated: tuple[Path, str, str]) -> dict[str, Any]:
    return json.loads((evaluated[0] / "made" / "metrics.json").read_text())


def test_the_files_say_what_was_measured(evaluated: tuple[Path, str, str], metrics: dict[str, Any], ckpt: Path) -> None:
    assert sorted(file.name for file in (evaluated[0] / "made").iterdir()) == ["metrics.json", "samples.png"]
    assert metrics["checkpoint"] == {"path": str(ckpt), "sha256": checkpoint.file_sha256(ckpt)}
    assert metrics["dataset"]["test"]["count"] == 57 and metrics["dataset"]["train"]["count"] == 240
    assert list(metrics["floors"]) == ["train", "test_decoded", "train_decoded", "gaussian", "gmm_10"]  # 240 < 100·20
    assert [row["guidance_scale"] for row in metrics["samples"]] == [1.0, 2.5]
    for row in metrics["samples"]:
        assert [run["seed"] for run in row["runs"]] == [3, 5]
        assert all(run["count"] == 40 == sum(run["histogram"]) for run in row["runs"])
        values = [run["fd_lenet"] for run in row["runs"]]
        assert row["mean"]["fd_lenet"] == pytest.approx(np.mean(values))
        assert row["sd"]["fd_lenet"] == pytest.approx(np.std(values, ddof=1)) and row["sd"]["fd_lenet"] > 0
    assert metrics["floors"]["train"]["nearest_train"] == 0 and "accuracy" not in metrics["floors"]["gmm_10"]


def test_table_has_the_floors_beside_the_samples(evaluated: tuple[Path, str, str], metrics: dict[str, Any]) -> None:
    _, shown, progress = evaluated
    lines = {line[:29].strip(): line[29:].split() for line in shown.splitlines()}
    floor = metrics["floors"]["train_decoded"]
    assert float(lines["(c) training images, decoded"][0]) == pytest.approx(floor["fd_lenet"], abs=0.006)
    assert lines["(c) training images, decoded"][1] == "1.00"
    row = metrics["samples"][1]["mean"]
    assert float(lines["samples, guidance 2.5"][0]) == pytest.approx(row["fd_lenet"], abs=0.006)
    assert float(lines["samples, guidance 2.5"][1]) == pytest.approx(row["fd_lenet"] / floor["fd_lenet"], abs=0.006)
    assert len(lines["guidance 1: accuracy"]) == 10 and "±" in lines
    assert "sampling seed 5, dpmpp_2m_sde, guidance 2.5: 40 images" in progress and "guidance 2.5: 40" not in shown


def test_floors_are_those_of_this_autoencoder(metrics: dict[str, Any], ae_file: Path, digits_folder: Path) -> None:
    codec = checkpoint.load_autoencoder(ae_file).codec
    images, labels = load_source(str(digits_folder), "test", digits_folder).decode()
    some, _ = chosen((images, labels), 40)
    features = Classifiers.shipped().features
    expected = frechet_distance(
        FeatureStatistics.of(features(reconstruct(codec, some))), FeatureStatistics.of(features(images))
    )
    assert metrics["floors"]["test_decoded"]["fd_lenet"] == pytest.approx(expected, rel=1e-6)


def test_samples_are_those_of_the_generator(metrics: dict[str, Any], ckpt: Path, digits_folder: Path) -> None:
    """Image i of sampling seed s has seed s·samples + i and label i mod 10."""
    generator = Generator.open(ckpt)
    made = generator([5 * 40 + i for i in range(40)], [i % 10 for i in range(40)], SamplingConfig(guidance_scale=2.5))
    images, _ = load_source(str(digits_folder), "test", digits_folder).decode()
    features = Classifiers.shipped().features
    expected = frechet_distance(FeatureStatistics.of(features(made)), FeatureStatistics.of(features(images)))
    assert metrics["samples"][1]["runs"][1]["fd_lenet"] == pytest.approx(expected, rel=1e-6)


def test_picture_shows_samples_beside_training_images(evaluated: tuple[Path, str, str], ckpt: Path) -> None:
    picture = np.asarray(Image.open(evaluated[0] / "made" / "samples.png"))
    generator = Generator.open(ckpt)
    first = generator([3 * 40], [0])[0, 0].numpy()
    assert picture.shape[2] == 3
    np.testing.assert_array_equal(picture[6:62:2, 56:112:2, 0], first)  # twice as large, right of the row's name


def test_floors_are_kept_and_damaged_ones_measured_again(
    evaluated: tuple[Path, str, str], ckpt: Path, digits_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = evaluated[0]
    (kept,) = (out / "floors").iterdir()
    before = kept.read_text()
    flags = ["--ckpt", str(ckpt), "--dataset", str(digits_folder), "--outdir", str(out), "--output", str(out / "again")]
    flags += ["--samples", "40", "--seeds", "0", "--device", "cpu"]
    with caplog.at_level("INFO"):
        assert main(flags) == 0
    assert f"floors: from {kept}" in caplog.text and kept.read_text() == before
    kept.write_text(before[: len(before) // 2])
    assert main(flags) == 0
    assert "is damaged" in caplog.text and json.loads(kept.read_text()).keys() == json.loads(before).keys()
    assert json.loads((out / "again" / "metrics.json").read_text())["samples"][0]["sd"]["fd_lenet"] is None


def test_floors_do_not_depend_on_the_whitening(ae_file: Path) -> None:
    codec = checkpoint.load_autoencoder(ae_file).codec
    other = codec.with_statistics(LatentStatistics(torch.ones(16), 2 * torch.eye(16)))
    assert autoencoder_hash(codec) == autoencoder_hash(other)
    images = torch.randint(0, 256, (30, 1, 28, 28), generator=torch.Generator().manual_seed(0)).byte()
    difference = reconstruct(codec, images).int() - reconstruct(other, images).int()
    assert difference.abs().max() <= 1


def test_mean_and_spread_over_runs() -> None:
    runs = [{"a": 1.0, "b": [1, None]}, {"a": 3.0, "b": [5, None]}]
    assert evaluation.over_runs(runs, statistics.fmean) == {"a": 2.0, "b": [3.0, None]}
    assert evaluation.over_runs(runs, evaluation.sd) == {"a": 2**0.5, "b": [8**0.5, None]}


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("seeds", "0,0"), ("seeds", "-1"), ("seeds", "1,,2"), ("seeds", "9-0"), ("seeds", "4294967296"),
        ("guidance_scale", "1,x"), ("guidance_scale", "21"), ("guidance_scale", "nan"), ("guidance_scale", ""),
        ("samples", 9), ("samples", 10.5), ("seeds", "429497"),
    ],
)  # fmt: skip
def test_wrong_values(flag: str, value: object) -> None:
    values: dict[str, Any] = {flag: value}
    with pytest.raises(ConfigError, match="--" + flag.replace("_", "-")) as refused:
        EvaluateConfig(**values)
    assert "\n" not in str(refused.value)


def test_mistakes_are_one_line_and_exit_2(tmp_path: Path, ae_file: Path) -> None:
    (tmp_path / "file").touch()
    mistakes: list[tuple[list[object], str]] = [
        (["--outdir", tmp_path], "no checkpoint under"),
        (["--ckpt", ae_file, "--outdir", tmp_path], "holds an autoencoder, not a denoiser"),
        (["--output", tmp_path / "file"], "is a file; needed is a folder"),
        (["--seeds", "one"], "'one' is neither"),
        (["--output", tmp_path / "no" / "such"], "there is no folder"),
    ]
    for flags, said in mistakes:
        assert said in refusal("evaluate", *flags)
