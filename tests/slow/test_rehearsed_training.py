"""Training on tensors that say they are on a GPU: nothing waits, the numbers are the CPU's, faults are seen."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from ldm_ray.checkpoints import checkpoint
from ldm_ray.checkpoints.runs import RunPaths
from ldm_ray.data.examples import fixed_size, write_examples
from ldm_ray.diffusion.schedule import Noiser
from ldm_ray.search import trial
from ldm_ray.settings.training import AutoencoderConfig, RunConfig, TrainConfig
from ldm_ray.training import fitter as fitting
from ldm_ray.training.fit import Job, Place, fit
from ldm_ray.training.fitter import Fitter
from ldm_ray.training.tasks import build_task
from tests.helpers.pretend_cuda import Mismatch, pretending

CPU = torch.device("cpu")
ROWS, BATCH = 96, 32
SMALL: dict[str, Any] = {"batch_size": BATCH, "epochs": 2, "generate_images": True, "samples_per_epoch": 4}
RUNS: dict[str, tuple[RunConfig, dict[str, Any]]] = {
    "mlp autoencoder": (AutoencoderConfig(model="mlp", batch_size=BATCH, epochs=2, generate_images=True), {}),
    "conv autoencoder": (AutoencoderConfig(model="conv", batch_size=BATCH, epochs=2, generate_images=True), {}),
    "denoiser": (TrainConfig(hidden_dim=32, **SMALL), {}),
    "denoiser that does not fit": (TrainConfig(hidden_dim=32, **SMALL), {"free": 100}),
    "denoiser in bf16": (TrainConfig(hidden_dim=32, amp=True, **SMALL), {}),
    "denoiser in fp16": (TrainConfig(hidden_dim=32, amp=True, **SMALL), {"bf16": False}),
    "denoiser in fp16, not clipped": (TrainConfig(hidden_dim=32, amp=True, grad_clip=0.0, **SMALL), {"bf16": False}),
    "denoiser of x0": (TrainConfig(hidden_dim=32, prediction_type="sample", stratified=True, **SMALL), {}),
    "u-net": (TrainConfig(hidden_dim=8, space="pixel", **SMALL), {}),
}


def fitter_of(config: RunConfig, device: str, ae_file: Path) -> tuple[Fitter, torch.Tensor]:
    """A fitter over random rows, and the rows' order in its first epoch."""
    inside = checkpoint.embed(checkpoint.load_autoencoder(ae_file))
    place = torch.device(device)
    task = build_task(config, place, inside)
    random = torch.Generator().manual_seed(3)
    if isinstance(config, TrainConfig) and config.space == "latent":
        data = torch.randn(ROWS, 16, generator=random)
    elif isinstance(config, TrainConfig):
        data = torch.rand(ROWS, 784, generator=random) * 2 - 1
    else:
        data = (torch.rand(ROWS, 1, 28, 28, generator=random) * 255).to(torch.uint8)
    fitter = Fitter(task, task.model, config, data, torch.arange(ROWS) % 10, ROWS, 0, 1, place)
    return fitter, fitter.order().to(fitter.data.device)


@pytest.mark.parametrize("name", RUNS)
def test_a_training_step_does_not_wait_and_is_the_cpus(name: str, ae_file: Path) -> None:
    config, machine = RUNS[name]
    wanted, order = fitter_of(config, "cpu", ae_file)
    losses = [float(wanted.train_step(rows)) for rows in order.split(BATCH)]
    with pretending(**machine) as seen:
        fitter, order = fitter_of(config, "cuda", ae_file)
        assert fitter.data.is_cuda == (name != "denoiser that does not fit")
        seen.clear()
        made = [fitter.train_step(rows) for rows in order.split(BATCH)]
        assert not seen.waits and seen.calls > 20, seen.waits
        assert [float(loss) for loss in made] == pytest.approx(losses, rel=0.01 if config.amp else 1e-4)
        for weight, own in zip(wanted.averaged.parameters(), fitter.averaged.parameters(), strict=True):
            assert own.is_cuda
            if not config.amp:
                torch.testing.assert_close(own.detach().cpu(), weight.detach(), rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, ae_file: Path) -> Callable[[RunConfig], Job]:
    folder, random = tmp_path_factory.mktemp("fit"), np.random.default_rng(0)
    labels = np.arange(60) % 10
    latents = random.standard_normal((60, 16)).astype(np.float32)
    pixels = random.integers(0, 256, (60, 784)).astype(np.uint8)
    for column, vectors in (("latent", latents), ("pixels", pixels)):
        table = pa.table({column: fixed_size(vectors), "label": labels, "index": np.arange(60)})
        write_examples(folder / column, table, column, {"made": "here"})
    embedded = checkpoint.embed(checkpoint.load_autoencoder(ae_file))

    def of(config: RunConfig) -> Job:
        latent = isinstance(config, TrainConfig) and config.space == "latent"
        folder_of = folder / ("latent" if latent else "pixels")
        return Job(config, RunPaths(folder, "run"), folder_of, {}, embedded if latent else None)

    return of


@pytest.mark.parametrize("name", RUNS)
def test_a_run_stops_goes_on_and_ends_as_one_that_did_not(
    name: str, job: Callable[[RunConfig], Job], tmp_path: Path
) -> None:
    """Epochs, validation, pictures, checkpoints; stopped in the second epoch and resumed: the same weights."""
    config, machine = RUNS[name]
    base = job(config)
    place = Place(0, 1, torch.device("cuda"), lambda model: model)

    def trained(folder: str, stop_in: int) -> RunPaths:
        paths = RunPaths(tmp_path / folder, "run")
        told: list[dict[str, Any]] = []
        with pretending(**machine):
            fit(Job(config, paths, base.examples, base.data, base.autoencoder), place, told.append)
            if stop_in:
                assert told[-1]["epoch"] == 2
        return paths

    whole = trained("whole", 2)
    paths = RunPaths(tmp_path / "parts", "run")
    paths.stop.parent.mkdir(parents=True, exist_ok=True)
    paths.stop.touch()
    trained("parts", 0)  # stops at the end of its first epoch
    assert torch.load(str(paths.latest), weights_only=True)["epoch"] == 1
    paths.stop.unlink()
    trained("parts", 2)
    one, other = Path(str(whole.latest)), Path(str(paths.latest))
    content = torch.load(one, weights_only=True)
    assert all(value.device == CPU for value in content["model"].values())
    parts = ("model", "ema") if "ema" in content else ("model",)
    again = torch.load(other, weights_only=True)
    for part in parts:
        assert all(torch.equal(value, again[part][key]) for key, value in content[part].items())
    assert whole.sample(2).is_file()


def test_a_trial_is_the_cpus(ae_file: Path) -> None:
    random = torch.Generator().manual_seed(1)
    labels = torch.arange(160) % 10
    latents = torch.randn(160, 16, generator=random) + labels[:, None]
    inside = checkpoint.embed(checkpoint.load_autoencoder(ae_file))
    data = trial.TrialData(latents[:120], labels[:120], latents[120:], labels[120:], inside)
    config = TrainConfig(hidden_dim=32, epochs=2, batch_size=32)
    wanted = list(trial.run(config, data, CPU, 60, 4, lambda: False))
    with pretending():
        made = list(trial.run(config, data, torch.device("cuda"), 60, 4, lambda: False))
    for one, other in zip(wanted, made, strict=True):
        assert other["val_loss"] == pytest.approx(one["val_loss"], rel=1e-4)


def test_batches_from_memory_that_is_not_pinned_are_seen(monkeypatch: pytest.MonkeyPatch, ae_file: Path) -> None:
    def pageable(data: torch.Tensor, rows: torch.Tensor, device: torch.device) -> torch.Tensor:
        return data.pin_memory()[rows].to(device, non_blocking=True)

    monkeypatch.setattr(fitting, "picked", pageable)
    with pretending(free=100) as seen:
        fitter, order = fitter_of(RUNS["denoiser"][0], "cuda", ae_file)
        seen.clear()
        fitter.train_step(order[:BATCH])
        assert sum("copy to the device" in wait for wait in seen.waits) and seen.waits.total() == 2


def test_a_table_that_stays_behind_is_seen(monkeypatch: pytest.MonkeyPatch, ae_file: Path) -> None:
    original = Noiser.__init__
    monkeypatch.setattr(Noiser, "__init__", lambda noiser, schedule, device: original(noiser, schedule, "cpu"))
    with pretending():
        fitter, order = fitter_of(RUNS["denoiser"][0], "cuda", ae_file)
        with pytest.raises(Mismatch, match="indices"):
            fitter.train_step(order[:BATCH])


def test_a_generator_of_the_cpu_is_seen(ae_file: Path) -> None:
    with pretending():
        fitter, order = fitter_of(RUNS["denoiser"][0], "cuda", ae_file)
        fitter.generator = torch.Generator()
        with pytest.raises(Mismatch, match="generator"):
            fitter.train_step(order[:BATCH])
