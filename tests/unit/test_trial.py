"""The objective of a search against closed forms, and a trial against the training command's own loop."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from ldm_ray.checkpoints import checkpoint
from ldm_ray.checkpoints.runs import RunPaths
from ldm_ray.data.examples import fixed_size, read_examples, split, write_examples
from ldm_ray.data.statistics import LatentStatistics
from ldm_ray.diffusion.schedule import NoiseSchedule
from ldm_ray.search import trial
from ldm_ray.search.objective import ClassFrechet
from ldm_ray.settings.errors import DataError
from ldm_ray.settings.training import TrainConfig
from ldm_ray.training.fit import Job, Place, fit
from ldm_ray.training.fitter import lr_factor

SHAPES = [
    NoiseSchedule(),
    NoiseSchedule(1000, 1e-4, 5e-3),
    NoiseSchedule(1000, 1e-4, 2e-2, "scaled_linear"),
    NoiseSchedule(1000, beta_schedule="squaredcos_cap_v2"),
    NoiseSchedule(10, 0.01, 0.3),
]


def two_classes(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    labels = torch.arange(count) % 2
    return torch.randn(count, 3, generator=torch.Generator().manual_seed(seed)) + 3.0 * labels[:, None], labels


def test_the_objective_sees_labels_that_are_ignored() -> None:
    held, labels = two_classes(4000, 1)
    metric, (made, wanted) = ClassFrechet(held, labels), two_classes(4000, 2)
    assert not metric.pooled and metric(made, wanted) < 0.02
    assert metric(made, wanted.roll(1)) == pytest.approx(27, rel=0.1)  # 3 · 3² between the classes
    assert metric(made.roll(1, dims=0), wanted) > 20


def test_the_objective_is_infinite_for_samples_that_are_not_finite() -> None:
    metric = ClassFrechet(*two_classes(100, 1))
    made, labels = two_classes(100, 2)
    made[3, 1] = math.nan
    assert metric(made, labels) == math.inf


def test_small_classes_are_pooled() -> None:
    held, labels = two_classes(100, 1)
    assert ClassFrechet(held[:8], labels[:8]).pooled is False  # 4 rows of 3 numbers each
    few = ClassFrechet(held[:7], labels[:7])
    assert few.pooled and math.isfinite(few(held, labels))
    assert few.balanced_labels(5).tolist() == [0, 1, 0, 1, 0]
    with pytest.raises(DataError, match="--val-fraction"):
        ClassFrechet(held[:1], labels[:1])


@pytest.mark.parametrize("schedule", SHAPES[:1] + SHAPES[2:4], ids=str)
def test_the_objective_of_the_exact_denoiser_is_near_zero(schedule: NoiseSchedule) -> None:
    """x0 ~ N(μ_y, s²): ε*(xt, t, y) = √(1 − ᾱ) (xt − √ᾱ μ_y)/(ᾱ s² + 1 − ᾱ). More steps come nearer to zero, under
    every schedule; with the labels exchanged the distance is that of the classes."""
    alphas_cumprod, scale = schedule.alphas_cumprod, 0.3
    generator = torch.Generator().manual_seed(4)
    labels = torch.arange(6000) % 2
    held = scale * torch.randn(6000, 3, generator=generator) + labels[:, None]
    metric = ClassFrechet(held, labels)

    def exact(xt: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        now = alphas_cumprod[t][:, None].float()
        return (1 - now).sqrt() * (xt - now.sqrt() * y[:, None]) / (now * scale**2 + 1 - now)

    class Stand:
        """What ``Score`` reads of a task and of a fitter."""

        def __init__(self, denoise: Any) -> None:
            self.schedule, self.denoiser, self.device = schedule, self, torch.device("cpu")
            self.latent_dim, self.averaged, self.config = 3, denoise, TrainConfig(prediction_type="epsilon")

    def score(denoise: Any, steps: int) -> float:
        stand: Any = Stand(denoise)
        return trial.Score(stand, stand, metric, 4000, steps)()

    few, many = score(exact, 10), score(exact, 80)
    assert many < 0.5 * few and many < 0.02
    assert score(exact, 10) == few
    assert score(lambda xt, t, y: exact(xt, t, 1 - y), 80) == pytest.approx(3, rel=0.1)


def test_a_trial_trains_as_the_command_does(tmp_path: Path, ae_file: Path) -> None:
    """The same validation losses, to the last bit, as ``training.fit`` gets on the same examples."""
    labels = np.arange(400) % 10
    latents = (np.random.default_rng(0).standard_normal((400, 16)) * 3 + labels[:, None]).astype(np.float32)
    columns = {"latent": fixed_size(latents), "label": labels, "index": np.arange(400)}
    write_examples(tmp_path / "examples", pa.table(columns), "latent", {"made": "here"})
    examples = read_examples(tmp_path / "examples")
    autoencoder = checkpoint.load_autoencoder(ae_file)
    autoencoder.codec = autoencoder.codec.with_statistics(LatentStatistics.of(examples.vectors))
    embedded = checkpoint.embed(autoencoder)
    settings: dict[str, Any] = {"lr": 2e-3, "beta_schedule": "scaled_linear", "weight_decay": 0.01, "hidden_dim": 32}
    config = TrainConfig(epochs=3, batch_size=32, val_fraction=0.25, device="cpu", **settings)
    losses: list[float] = []
    place = Place(0, 1, torch.device("cpu"), lambda model: model)
    job = Job(config, RunPaths(tmp_path, "run"), tmp_path / "examples", {}, embedded)
    fit(job, place, lambda metrics: losses.append(metrics["val_loss"]))

    train_rows, held_rows = split(examples, config.val_fraction)
    whitened = autoencoder.codec.whiten(examples.vectors)
    rows = (whitened[train_rows], examples.labels[train_rows], whitened[held_rows], examples.labels[held_rows])
    data = trial.TrialData(*rows, embedded)
    found = list(trial.run(config, data, torch.device("cpu"), 100, 10, lambda: False))
    assert [point["val_loss"] for point in found] == losses and len(losses) == 3
    again = list(trial.run(config, data, torch.device("cpu"), 100, 10, lambda: False))
    assert [point["objective"] for point in again] == [point["objective"] for point in found]
    assert found[-1]["objective"] < found[0]["objective"]
    asked = iter([False, True])  # a stop within the second epoch: 38 steps each, asked every 20
    short = TrainConfig(**{**config.to_dict(), "batch_size": 8})
    assert len(list(trial.run(short, data, torch.device("cpu"), 100, 10, lambda: next(asked)))) == 1


@pytest.mark.parametrize("total", [2, 32, 1000, 100_000])
def test_the_learning_rate_rises_and_falls(total: int) -> None:
    factors = [lr_factor("cosine", step, total) for step in range(1, total + 1)]
    top = factors.index(max(factors)) + 1
    assert factors[-1] < 1e-6 and 0.9 < max(factors) <= 1
    assert total // 20 <= top <= total // 2 + 1 and (total < 600 or top >= 300)
    assert factors[:top] == sorted(factors[:top]) and factors[top:] == sorted(factors[top:], reverse=True)
    assert lr_factor("constant", 1, total) == 1
