"""Fréchet distance, neighbour figures, classifiers and quality(): closed forms, hand-made sets, naive versions."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ldm_ray.data.digits import digits_table
from ldm_ray.data.images import decode_png
from ldm_ray.data.sources import load_source
from ldm_ray.metrics import lenet, neighbours
from ldm_ray.metrics.frechet import FeatureStatistics, frechet_distance
from ldm_ray.metrics.lenet import Classifiers
from ldm_ray.metrics.quality import Reference, quality
from ldm_ray.metrics.train_classifiers import accuracy, train_network
from ldm_ray.settings.errors import CheckpointError, DataError
from tests.helpers.data import Shared


def gaussian(count: int, dim: int, seed: int) -> Tensor:
    return torch.randn(count, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def known(mean: Tensor, covariance: Tensor) -> FeatureStatistics:
    """Statistics of exactly this mean and covariance."""
    made = FeatureStatistics(len(mean))
    made.count, made.mean, made.scatter = 101, mean.double(), covariance.double() * 100
    return made


# --- Fréchet distance ---


def test_frechet_of_diagonal_gaussians_is_the_closed_form() -> None:
    one = known(torch.tensor([0.0, 1.0, -2.0]), torch.diag(torch.tensor([1.0, 4.0, 9.0])))
    other = known(torch.tensor([3.0, 1.0, 2.0]), torch.diag(torch.tensor([16.0, 4.0, 1.0])))
    assert frechet_distance(one, other) == pytest.approx(25 + (1 - 4) ** 2 + 0 + (3 - 1) ** 2, rel=1e-12)


def test_frechet_of_two_correlated_gaussians_is_the_closed_form() -> None:
    """In two dimensions tr (Σ₁Σ₂)^½ = √(tr Σ₁Σ₂ + 2 √det Σ₁Σ₂)."""
    a = torch.tensor([[2.0, 0.9], [0.9, 1.0]], dtype=torch.float64)
    b = torch.tensor([[1.0, -0.4], [-0.4, 3.0]], dtype=torch.float64)
    product = a @ b
    expected = 7.0 - 2 * math.sqrt(float(product.trace()) + 2 * math.sqrt(float(torch.linalg.det(product))))
    assert frechet_distance(known(torch.zeros(2), a), known(torch.zeros(2), b)) == pytest.approx(expected, rel=1e-12)


def test_frechet_is_that_of_scipys_matrix_root() -> None:
    linalg = pytest.importorskip("scipy.linalg")
    mix = gaussian(20, 20, 3)
    one, other = FeatureStatistics.of(gaussian(500, 20, 1)), FeatureStatistics.of(gaussian(400, 20, 2) @ mix + 1)
    root = linalg.sqrtm((one.covariance @ other.covariance).numpy()).real
    expected = float((one.mean - other.mean).square().sum() + (one.covariance + other.covariance).trace())
    assert frechet_distance(one, other) == pytest.approx(expected - 2 * root.trace(), rel=1e-9)


def test_frechet_identical_symmetric_and_translated() -> None:
    features = gaussian(300, 8, 0) @ gaussian(8, 8, 1)
    one, other = FeatureStatistics.of(features), FeatureStatistics.of(gaussian(200, 8, 2))
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(one, other) == pytest.approx(frechet_distance(other, one), rel=1e-12)
    shift = torch.arange(8.0, dtype=torch.float64)
    assert frechet_distance(one, FeatureStatistics.of(features + shift)) == pytest.approx(140.0, rel=1e-9)


def test_frechet_with_fewer_images_than_features_and_dead_features() -> None:
    features = gaussian(10, 84, 0)
    features[:, 40:] = 0
    few = FeatureStatistics.of(features)
    assert frechet_distance(few, few) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(few, FeatureStatistics.of(features + 1)) == pytest.approx(84, rel=1e-6)


def test_streaming_statistics_are_those_of_all_at_once() -> None:
    features = gaussian(1000, 12, 0) * 3 + 1e4  # a large mean: naive sums of squares would lose it
    streamed = FeatureStatistics(12)
    for part in features.split([1, 0, 7, 400, 592]):
        streamed.update(part)
    assert streamed.count == 1000
    np.testing.assert_allclose(streamed.mean, features.mean(dim=0), rtol=1e-13)
    np.testing.assert_allclose(streamed.covariance, np.cov(features.numpy(), rowvar=False), rtol=1e-7, atol=1e-7)


def test_frechet_refuses_what_it_cannot_measure() -> None:
    some = FeatureStatistics.of(gaussian(5, 3, 0))
    for other in (FeatureStatistics(3), FeatureStatistics.of(gaussian(5, 4, 0))):
        with pytest.raises(DataError, match="needed are images on both sides"):
            frechet_distance(some, other)
    with pytest.raises(DataError, match="not finite"):
        some.update(torch.tensor([[0.0, math.nan, 0.0]]))


# --- neighbours ---


def naive(real: np.ndarray, made: np.ndarray) -> dict[str, float]:
    """The papers' definitions, one pair at a time."""

    def radius(points: np.ndarray, i: int, k: int) -> float:
        return sorted(float(np.linalg.norm(points[i] - p)) for j, p in enumerate(points) if j != i)[k - 1]

    def within(x: np.ndarray, points: np.ndarray, k: int) -> list[bool]:
        return [float(np.linalg.norm(x - p)) <= radius(points, i, k) for i, p in enumerate(points)]

    covered = np.array([within(x, real, 5) for x in made])
    return {
        "precision": float(np.mean([any(within(x, real, 3)) for x in made])),
        "recall": float(np.mean([any(within(x, made, 3)) for x in real])),
        "density": float(covered.sum() / (5 * len(made))),
        "coverage": float(covered.any(axis=0).mean()),
    }


@pytest.mark.parametrize("block", [1, 100, 2**22])
def test_neighbour_figures_are_the_naive_ones_whatever_the_block(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "BLOCK", block)
    real, made = gaussian(40, 3, 0), gaussian(30, 3, 1) * 0.8 + 0.4
    found = neighbours.neighbour_figures(real, made)
    assert found == pytest.approx(naive(real.numpy(), made.numpy()), abs=1e-12)
    assert 0 < found["precision"] < 1 and 0 < found["recall"] < 1 and 0 < found["coverage"] < 1


def test_neighbour_figures_by_hand() -> None:
    real = torch.arange(8, dtype=torch.float64)[:, None]  # 0 … 7: k = 3 radii 3 2 2 2 2 2 2 3; k = 5: 5 4 3 3 3 3 4 5
    same = neighbours.neighbour_figures(real, real.clone())
    assert same["precision"] == same["recall"] == same["coverage"] == 1
    far = neighbours.neighbour_figures(real, real + 100)
    assert far == {"precision": 0, "recall": 0, "density": 0, "coverage": 0}
    one_place = torch.full((6, 1), 2.0, dtype=torch.float64)  # collapsed onto a real one: precise, recalls it alone
    found = neighbours.neighbour_figures(real, one_place)
    assert found["precision"] == 1 and found["recall"] == 1 / 8
    inside = [abs(2 - i) <= r for i, r in enumerate([5, 4, 3, 3, 3, 3, 4, 5])]
    assert found["coverage"] == sum(inside) / 8 and found["density"] == sum(inside) / 5


def test_too_few_for_neighbours() -> None:
    with pytest.raises(DataError, match="5 images are too few"):
        neighbours.neighbour_figures(gaussian(5, 2, 0), gaussian(9, 2, 0))


def test_nearest_finds_row_and_exact_distance() -> None:
    among = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (50, 1, 28, 28), dtype=np.uint8))
    images = among[[3, 41]].clone()
    images[1, 0, 0, :2] ^= 1  # two pixels one step away
    distance, row = neighbours.nearest(images, among)
    assert row.tolist() == [3, 41]
    assert distance.tolist() == pytest.approx([0, math.sqrt(2) / 255], abs=1e-12)


# --- classifiers and quality ---


@pytest.fixture(scope="module")
def classifiers() -> Classifiers:
    return Classifiers.shipped()


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    """The 297 embedded test digits."""
    table = digits_table("test")
    images = np.stack([decode_png(row["bytes"]) for row in table["image"].to_pylist()])
    return torch.from_numpy(images)[:, None], torch.from_numpy(table["label"].to_numpy().copy())


@pytest.mark.parametrize("name", ["lenet", "residual"])
def test_tampered_and_missing_weights_are_refused(name: str, tmp_path: Path) -> None:
    for file in lenet.FOLDER.glob("*.pt"):
        shutil.copy(file, tmp_path)
    data = bytearray(lenet.weights_file(name, tmp_path).read_bytes())
    data[len(data) // 2] ^= 1
    lenet.weights_file(name, tmp_path).write_bytes(data)
    with pytest.raises(CheckpointError, match=f"not {lenet.SHA256[name]}") as refused:
        Classifiers.shipped(folder=tmp_path)
    assert "\n" not in str(refused.value)
    lenet.weights_file(name, tmp_path).unlink()
    with pytest.raises(CheckpointError, match="No such file"):
        Classifiers.shipped(folder=tmp_path)


def test_shipped_weights_are_small_and_different_networks(classifiers: Classifiers) -> None:
    sizes = [lenet.weights_file(name).stat().st_size for name in lenet.NETWORKS]
    assert max(sizes) < 400_000
    assert not {tuple(p.shape) for p in classifiers.lenet.parameters() if p.dim() > 1} & {
        tuple(p.shape) for p in classifiers.residual.parameters()
    }


def test_accuracy_on_mnist(shared: Shared, classifiers: Classifiers) -> None:
    images, labels = load_source(str(shared.mnist), "test", shared.mnist).decode()
    assert accuracy(classifiers.lenet, images, labels) >= 0.99
    assert accuracy(classifiers.residual, images, labels) >= 0.992


def test_training_learns_and_repeats(digits: tuple[Tensor, Tensor]) -> None:
    networks = [train_network("lenet", *digits, seed=1, epochs=12) for _ in range(2)]
    assert accuracy(networks[0], *digits) > 0.5
    one, other = (list(network.parameters()) for network in networks)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("bad", [torch.zeros(2, 1, 28, 28), torch.zeros(2, 28, 28).byte(), torch.zeros(0, 1, 28, 28)])
def test_images_of_another_kind_are_refused(bad: Tensor, classifiers: Classifiers) -> None:
    with pytest.raises(DataError, match=r"needed are uint8 \(N, 1, 28, 28\)"):
        classifiers.features(bad)


def test_quality_of_the_reference_itself(digits: tuple[Tensor, Tensor], classifiers: Classifiers) -> None:
    images, labels = digits
    found: dict[str, Any] = quality(images, labels, Reference.of(images, images, classifiers))
    assert found["count"] == len(images) and found["fd_lenet"] == pytest.approx(0, abs=1e-6)
    assert found["precision"] == found["recall"] == found["coverage"] == 1
    assert found["nearest_train"] == 0 and sum(found["histogram"]) == len(images)
    right = (classifiers.classify(images) == labels).double().mean()
    assert found["accuracy"] == pytest.approx(float(right)) and right > 0.7


def test_quality_sees_damage_copies_and_wrong_labels(digits: tuple[Tensor, Tensor], classifiers: Classifiers) -> None:
    images, labels = digits
    test, train = images[:150], images[150:]
    reference = Reference.of(test, train, classifiers)
    copies, damaged = (quality(x, labels[150:], reference) for x in (train, 255 - train))
    assert copies["close_to_train"] == 1 and copies["nearest_train_ratio"] == 0
    assert damaged["close_to_train"] == 0 and damaged["nearest_train_ratio"] > 1
    assert damaged["fd_lenet"] > 5 * copies["fd_lenet"] and damaged["precision"] < copies["precision"]
    wrong = quality(train, (labels[150:] + 1) % 10, reference, neighbours=False, memorisation=False)
    assert wrong["accuracy"] < 0.2 and "precision" not in wrong and "nearest_train" not in wrong
    sevens = quality(train[:8], torch.full((8,), 7), reference)
    assert [digit for digit, share in enumerate(sevens["accuracy_per_class"]) if share is not None] == [7]
    assert "accuracy" not in quality(train, None, reference)
    for bad in (labels, labels[150:] + 10):
        with pytest.raises(DataError, match="do not match"):
            quality(train, bad, reference)
