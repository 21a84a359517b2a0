"""Which images a checkpoint is measured against: its own, or others with a word about it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from ldm_ray import compare
from ldm_ray.checkpoints import checkpoint
from ldm_ray.data.recorded import dataset_of, is_of, load_own
from ldm_ray.data.sources import load_source
from ldm_ray.diffusion.schedule import NoiseSchedule
from ldm_ray.engine.generator import Generator
from ldm_ray.latents.cloud import gather
from ldm_ray.metrics.lenet import is_mnist
from ldm_ray.metrics.picture import side_by_side
from ldm_ray.settings.errors import ConfigError, DataError
from ldm_ray.settings.evaluation import CompareConfig
from ldm_ray.settings.latents import TsneConfig
from ldm_ray.settings.training import TrainConfig
from tests.helpers.commands import call, refusal
from tests.helpers.data import Shared
from tests.helpers.networks import busy_denoiser


def write(path: Path, autoencoder: Path, data: dict[str, Any], only_digit: int | None = None, **config: Any) -> Path:
    model = busy_denoiser(16)
    settings = TrainConfig(only_digit=only_digit, hidden_dim=16, **config).to_dict()
    inside = checkpoint.load_autoencoder(autoencoder)
    content = checkpoint.diffusion_content(model, model, NoiseSchedule(4, 0.1, 0.9), inside, settings, data=data)
    checkpoint.write(path, content)
    return path


@pytest.fixture
def folder(tmp_path: Path, digits_folder: Path) -> Path:
    """A data set of the test's own."""
    return Path(shutil.copytree(digits_folder, tmp_path / "own"))


@pytest.fixture
def ckpt(tmp_path: Path, ae_file: Path, folder: Path) -> Path:
    """Trained on the folder, by its own account."""
    revision = load_source(str(folder), "train", tmp_path).revision
    data = {"dataset": "folder", "revision": revision, "split": "train", "only_digit": None}
    return write(tmp_path / "latest.pt", ae_file, data, dataset=str(folder))


@pytest.fixture
def others(tmp_path: Path, digits_folder: Path) -> Path:
    """A folder with other images."""
    folder = tmp_path / "others"
    folder.mkdir()
    for split, rows in (("train", slice(10, 60)), ("test", slice(0, 50))):
        table = pq.read_table(digits_folder / "train-00000-of-00001.parquet")
        part = table.slice(rows.start, rows.stop - rows.start)
        pq.write_table(part, folder / f"{split}-00000-of-00001.parquet")
    return folder


def info_of(path: Path) -> dict[str, Any]:
    return checkpoint.load_diffusion(path).info


def test_the_recorded_images_are_the_default(ckpt: Path, folder: Path, tmp_path: Path) -> None:
    (train, test), notes = load_own(info_of(ckpt), ckpt, None, tmp_path)
    assert (train.name, train.split, test.name, test.split) == (str(folder), "train", str(folder), "test")
    assert notes == [] and is_of(train, info_of(ckpt)) is True
    named = {"data": {"dataset": "ylecun/mnist", "revision": "x"}, "config": {"dataset": "auto"}}
    assert dataset_of(named) == "ylecun/mnist" and dataset_of({}) is None
    (train, _), notes = load_own({"data": {"dataset": "digits"}}, "a.pt", None, tmp_path)
    assert train.name == "digits"


def test_the_same_images_elsewhere_are_its_own(ckpt: Path, folder: Path, tmp_path: Path) -> None:
    moved = folder.rename(tmp_path / "moved")
    assert load_own(info_of(ckpt), ckpt, str(moved), tmp_path)[1] == []
    with pytest.raises(ConfigError, match=r"latest.pt was trained on .*own, which is not there .* by --dataset"):
        load_own(info_of(ckpt), ckpt, None, tmp_path)


def test_images_that_changed_are_refused_and_others_that_are_named_noted(
    ckpt: Path, folder: Path, others: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (sources, notes) = load_own(info_of(ckpt), ckpt, str(others), tmp_path)
    assert sources[0].name == str(others) and len(notes) == 1 and "trained on other images" in notes[0]
    assert caplog.messages == [f"WARNING: {notes[0]}"]
    shutil.copytree(others, folder, dirs_exist_ok=True)
    with pytest.raises(ConfigError, match="have changed since") as error:
        load_own(info_of(ckpt), ckpt, None, tmp_path)
    assert "\n" not in str(error.value)


def test_a_checkpoint_that_does_not_say_is_told_of(tmp_path: Path, others: Path) -> None:
    assert load_own({}, "old.pt", str(others), tmp_path)[1] == []
    with pytest.raises(DataError, match="no folder here"):
        load_own({}, "old.pt", "nowhere/at/all", tmp_path)


def test_evaluate_says_what_it_compares_with(ckpt: Path, others: Path, tmp_path: Path) -> None:
    flags = ["--ckpt", ckpt, "--outdir", tmp_path, "--output", tmp_path / "made", "--samples", 20, "--seeds", "0"]
    flags += ["--device", "cpu", "--no-baselines"]
    code, shown, _ = call("evaluate", *flags)
    metrics = json.loads((tmp_path / "made" / "metrics.json").read_text())
    assert code == 0 and metrics["dataset"]["test"]["name"] == str(tmp_path / "own")
    (about,) = metrics["notes"]
    assert "classifiers behind the figures were trained on MNIST" in about and f"NOTE: {about}" in shown
    code, shown, errors = call("evaluate", *flags, "--dataset", others)
    metrics = json.loads((tmp_path / "made" / "metrics.json").read_text())
    assert code == 0 and metrics["dataset"]["test"]["name"] == str(others) and len(metrics["notes"]) == 2
    assert "trained on other images" in shown and "WARNING: " in errors and "trained on other images" in errors


def test_a_refused_evaluation_makes_no_folder(ckpt: Path, folder: Path, tmp_path: Path) -> None:
    shutil.rmtree(folder)
    new = tmp_path / "new"
    assert "which is not there" in refusal("evaluate", "--ckpt", ckpt, "--outdir", new, "--output", tmp_path / "made")
    assert not new.exists() and not (tmp_path / "made").exists()


def test_tsne_shows_the_denoisers_own_images(ckpt: Path, folder: Path, others: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"ckpt": str(ckpt), "samples": 8, "device": "cpu", "outdir": str(tmp_path)}
    shown = gather(TsneConfig(**settings))
    assert shown.source.name == str(folder) and shown.notes == []
    assert len(gather(TsneConfig(**settings, dataset=str(others))).notes) == 1


def test_compare_takes_one_set_of_images(ckpt: Path, folder: Path, others: Path, ae_file: Path, tmp_path: Path) -> None:
    revision = load_source(str(others), "train", tmp_path).revision
    second = write(tmp_path / "second.pt", ae_file, {"dataset": "folder", "revision": revision}, dataset=str(others))
    paths = [ckpt, second]
    loaded = [checkpoint.load_diffusion(path) for path in paths]
    with pytest.raises(ConfigError, match=r"different images \(.*latest.pt: .*own; .*second.pt: .*others\)"):
        compare.real_images(loaded, list(paths), CompareConfig())
    (one, notes), (other, noted) = compare.real_images(loaded, list(paths), CompareConfig(dataset=str(folder)))
    assert one[1].name == other[1].name == str(folder) and (len(notes), len(noted)) == (0, 1)


def test_compare_lays_a_model_of_one_digit_out_as_others(ae_file: Path, tmp_path: Path) -> None:
    paths = [write(tmp_path / f"{digit}.pt", ae_file, {}, digit) for digit in (None, 7)]
    config, cpu = CompareConfig(num_inference_steps=2), torch.device("cpu")
    panels = [compare.images_of(checkpoint.load_diffusion(path), cpu, config) for path in paths]
    assert [(len(images), columns) for images, columns in panels] == [(80, 10), (80, 10)]
    wanted = Generator.open(paths[1])(range(80), [7] * 80, config.sampling)
    assert torch.equal(panels[1][0], wanted)
    picture = side_by_side([(str(i), *panel) for i, panel in enumerate(panels)])
    assert picture.shape == (22 + 2 * 242, 2 * 604 + 16, 3)  # 8 rows of 10 in either, twice as large


def test_mnists_test_images_are_known_in_any_order(shared: Shared, tmp_path: Path, digits_folder: Path) -> None:
    images, labels = load_source(str(shared.mnist), "test", tmp_path).decode()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    assert is_mnist(images[order], labels[order])
    assert is_mnist(images[labels == 7], labels[labels == 7]) and not is_mnist(images[1:], labels[1:])
    assert not is_mnist(*load_source(str(digits_folder), "test", tmp_path).decode())
