"""On a CUDA GPU alone: what the rehearsal of ``test_rehearsed_*.py`` cannot show. ``benchmarks/gpu.py`` runs these.

Nothing of the tests' configuration is needed: python -m pytest --noconftest -o addopts= -m gpu tests/unit/test_gpu.py
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from ldm_ray.checkpoints import checkpoint
from ldm_ray.devices.device import picked, sent, settle
from ldm_ray.diffusion.noise import gaussian
from ldm_ray.diffusion.schedule import NoiseSchedule
from ldm_ray.engine.generator import Generator
from ldm_ray.engine.jobs import Outcome
from ldm_ray.engine.request import ImageRequest
from ldm_ray.engine.slots import Slots
from ldm_ray.models import registry
from ldm_ray.models.codec import LatentCodec, PixelCodec
from ldm_ray.settings.sampling import SamplingConfig
from ldm_ray.settings.training import AutoencoderConfig, RunConfig, TrainConfig
from ldm_ray.training.fitter import Fitter
from ldm_ray.training.tasks import build_task
from tests.helpers.networks import busy_denoiser, busy_unet

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

ROWS, BATCH = 256, 64
RUNS: dict[str, RunConfig] = {
    "mlp autoencoder": AutoencoderConfig(model="mlp", batch_size=BATCH, epochs=2),
    "conv autoencoder": AutoencoderConfig(model="conv", batch_size=BATCH, epochs=2),
    "denoiser": TrainConfig(batch_size=BATCH, epochs=2),
    "denoiser of half precision": TrainConfig(batch_size=BATCH, epochs=2, amp=True),
    "denoiser not clipped": TrainConfig(batch_size=BATCH, epochs=2, grad_clip=0.0),
    "u-net": TrainConfig(batch_size=BATCH, epochs=2, space="pixel", hidden_dim=8),
}
SAMPLERS = [
    SamplingConfig(),
    SamplingConfig(sampler="ddpm", num_inference_steps=70, guidance_scale=1.0),
    SamplingConfig(sampler="ddim", eta=0.5, num_inference_steps=4, guidance_start=0.0),
    SamplingConfig(sampler="unipc"),
    SamplingConfig(precision="bf16"),
]


@contextlib.contextmanager
def waiting_refused() -> Iterator[None]:
    """RuntimeError at a call that waits for the device."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def codec_of(kind: str) -> LatentCodec | PixelCodec:
    if kind == "pixels":
        return PixelCodec()
    torch.manual_seed(5)
    return LatentCodec(registry.build(kind, 16), kind)


def generator_on(device: str, kind: str) -> Generator:
    denoiser = busy_unet() if kind == "pixels" else busy_denoiser()
    return Generator(denoiser, codec_of(kind), NoiseSchedule(), device)


def fitter_on(device: str, config: RunConfig) -> Fitter:
    place = torch.device(device)
    latent = isinstance(config, TrainConfig) and config.space == "latent"
    codec = codec_of("mlp")
    assert isinstance(codec, LatentCodec)
    inside = checkpoint.embed(checkpoint.AutoencoderCheckpoint(codec=codec, path="none", sha256=""))
    task = build_task(config, place, inside if latent else None)
    random = torch.Generator().manual_seed(3)
    if isinstance(config, AutoencoderConfig):
        data = (torch.rand(ROWS, 1, 28, 28, generator=random) * 255).to(torch.uint8)
    else:
        data = torch.randn(ROWS, 16 if latent else 784, generator=random)
    return Fitter(task, task.model, config, data, torch.arange(ROWS) % 10, ROWS, 0, 1, place)


def trained(fitter: Fitter, epochs: int) -> list[float]:
    losses = []
    for _ in range(epochs):
        fitter.run_epoch(lambda step: False)
        losses.append(fitter.end_epoch())
    return losses


def state(fitter: Fitter) -> dict[str, Any]:
    """What a checkpoint holds, as copies."""
    content = {"model": fitter.task.content(fitter.averaged)["model"], "training": fitter.state()}
    return content | ({"ema": fitter.ema.model.state_dict()} if fitter.ema else {})


def same(one: Fitter, other: Fitter) -> bool:
    pairs = zip(one.averaged.state_dict().values(), other.averaged.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("name", RUNS)
def test_training_repeats_itself_and_resumes_bit_for_bit(name: str) -> None:
    config = RUNS[name]
    whole, again = fitter_on("cuda", config), fitter_on("cuda", config)
    losses = trained(whole, 2)
    assert trained(again, 1) == losses[:1]
    resumed = fitter_on("cuda", config)
    resumed.load(state(again))
    assert trained(resumed, 1) == losses[1:] == trained(again, 1)
    assert same(whole, resumed) and same(whole, again)


@pytest.mark.parametrize("name", RUNS)
def test_every_kernel_of_training_has_a_deterministic_form(name: str) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*deterministic.*")
        trained(fitter_on("cuda", RUNS[name]), 1)


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("resident", [True, False])
def test_a_training_step_does_not_wait(name: str, resident: bool) -> None:
    fitter = fitter_on("cuda", RUNS[name])
    if not resident:
        fitter.data, fitter.labels = fitter.data.cpu(), fitter.labels.cpu()
    batches = fitter.order().to(fitter.data.device).split(fitter.batch)
    fitter.train_step(batches[0])  # what is only prepared once
    with waiting_refused():
        for rows in batches:
            fitter.train_step(rows)


@pytest.mark.parametrize("name", RUNS)
def test_training_is_the_cpus_to_rounding(name: str) -> None:
    config = RUNS[name]
    close = 0.05 if config.amp else 0.01  # the random numbers are others: the mean over an epoch is what is compared
    made, wanted = trained(fitter_on("cuda", config), 2), trained(fitter_on("cpu", config), 2)
    assert made == pytest.approx(wanted, rel=close if isinstance(config, AutoencoderConfig) else 0.1)


@pytest.mark.parametrize("kind", ["mlp", "conv", "pixels"])
def test_bytes_are_the_same_in_any_company(kind: str) -> None:
    generator = generator_on("cuda", kind)
    largest = generator.tiles.sizes[-1]
    most = 2 * largest + largest // 3
    labels = [i % 10 for i in range(most)]
    for sampling in SAMPLERS:
        if kind == "pixels" and (sampling.precision == "bf16" or sampling.sampler == "ddpm"):
            continue
        whole = generator(range(most), labels, sampling)
        assert torch.equal(generator(range(most), labels, sampling), whole)
        for first, count in ((0, 1), (11, 1), (3, 9), (most // 3, most // 2), (most - 1, 1)):
            part = generator(range(first, first + count), labels[first : first + count], sampling)
            assert torch.equal(part, whole[first : first + count]), (sampling, first, count)
        assert torch.equal(generator_on("cuda", kind)([5], [5], sampling)[0], whole[5])


@pytest.mark.parametrize("kind", ["mlp", "conv"])
def test_bytes_of_the_slots_are_the_generators(kind: str) -> None:
    generator = generator_on("cuda", kind)
    slots = Slots(generator)
    fine = [sampling for sampling in SAMPLERS if sampling.precision == "fp32"]
    jobs = [
        slots.submit(ImageRequest(range(i, i + 1 + i % 7), [3] * (1 + i % 7), fine[i % len(fine)])) for i in range(40)
    ]
    slots.close(drain_s=120)
    for job in jobs:
        assert set(job.outcomes) == {Outcome.DONE} and job.request.sampling is not None
        assert torch.equal(job.images, generator(job.request.seeds, job.request.labels, job.request.sampling)[:, 0]), (
            job.request.sampling
        )


@pytest.mark.parametrize("kind", ["mlp", "conv", "pixels"])
def test_sampling_does_not_wait(kind: str) -> None:
    generator = generator_on("cuda", kind)
    for sampling in SAMPLERS:
        if kind == "pixels" and (sampling.precision == "bf16" or sampling.sampler == "ddpm"):
            continue
        generator.latents([1, 2, 3], [1, None, 3], sampling)  # compares tiles
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")  # of the process: tiles are computed in threads
        try:
            generator.latents([1, 2, 3], [1, None, 3], sampling)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("kind", ["mlp", "conv", "pixels"])
def test_images_are_the_cpus_within_tolerance(kind: str) -> None:
    """fp32: 0.1 % of the pixels may be off by more than one step of 255 and none by more than 8; bf16 on average."""
    seeds, labels = range(64), [i % 10 for i in range(64)]
    for sampling in SAMPLERS:
        if kind == "pixels" and (sampling.precision == "bf16" or sampling.sampler == "ddpm"):
            continue
        made, wanted = (generator_on(device, kind)(seeds, labels, sampling).int() for device in ("cuda", "cpu"))
        off = (made - wanted).abs()
        if sampling.precision == "bf16":
            assert off.float().mean() < 2
        else:
            assert off.max() <= 8 and (off > 1).float().mean() < 1e-3, (sampling, off.max())


def test_noise_is_the_cpus_to_the_last_bits() -> None:
    seeds = torch.tensor([0, 1, 2**53 - 1, 12345])
    made = gaussian(seeds.cuda(), 3, 16, 70).cpu()
    torch.testing.assert_close(made, gaussian(seeds, 3, 16, 70), rtol=1e-6, atol=1e-7)


def test_products_are_ieee_fp32_and_half_precision_is_summed_in_it() -> None:
    settle("cuda")
    random = torch.Generator().manual_seed(0)
    a, b = (torch.randn(512, 512, generator=random) for _ in range(2))
    exact = a.double() @ b.double()
    error = ((a.cuda() @ b.cuda()).cpu().double() - exact).abs().max()
    assert error < 1e-3  # TF32: 0.05
    images, weight = torch.randn(8, 32, 28, 28, generator=random), torch.randn(32, 32, 3, 3, generator=random)
    exact = torch.nn.functional.conv2d(images.double(), weight.double(), padding=1)
    made = torch.nn.functional.conv2d(images.cuda(), weight.cuda(), padding=1)
    assert (made.cpu().double() - exact).abs().max() < 1e-3


def test_pinned_memory_is_really_used() -> None:
    data, rows = torch.arange(600.0).view(200, 3), torch.tensor([3, 1, 199])
    with waiting_refused():
        made = picked(data, rows, torch.device("cuda"))
        number = sent(torch.tensor([7]), torch.device("cuda"))
    assert torch.equal(made.cpu(), data[rows]) and number.item() == 7
    many = [sent(torch.full((1000,), float(i)), torch.device("cuda")) for i in range(200)]  # none overwrites another
    assert [float(part.mean()) for part in many] == [float(i) for i in range(200)]
