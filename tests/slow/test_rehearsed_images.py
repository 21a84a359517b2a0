"""All else that computes, on tensors that say they are on a GPU: samplers, slots, encoder, figures, commands."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image as Picture

import ldm_ray
from ldm_ray.checkpoints import checkpoint
from ldm_ray.data.examples import fixed_size
from ldm_ray.data.identity import record_of
from ldm_ray.data.images import encode_png
from ldm_ray.data.sources import ImageSource, load_source
from ldm_ray.data.statistics import LatentStatistics
from ldm_ray.devices.device import settle
from ldm_ray.diffusion import noise, samplers
from ldm_ray.diffusion.schedule import NoiseSchedule
from ldm_ray.distributed import encode
from ldm_ray.distributed.gpus import Share
from ldm_ray.engine.board import Board
from ldm_ray.engine.generator import Generator, fingerprint_of
from ldm_ray.engine.slots import Slots
from ldm_ray.files.records import fingerprint
from ldm_ray.metrics.floors import floors
from ldm_ray.metrics.lenet import Classifiers
from ldm_ray.metrics.quality import Reference, quality
from ldm_ray.models import registry
from ldm_ray.models.codec import LatentCodec, PixelCodec
from ldm_ray.settings.sampling import SamplingConfig
from tests.helpers import commands
from tests.helpers.checkpoints import write_small_checkpoint
from tests.helpers.networks import busy_denoiser, busy_unet
from tests.helpers.pretend_cuda import pretending
from tests.helpers.slots import Waited

CPU = torch.device("cpu")
SAMPLERS = [
    SamplingConfig(),
    SamplingConfig(sampler="ddpm", num_inference_steps=70),  # noise for 64 steps at a time
    SamplingConfig(sampler="ddim", eta=0.5, num_inference_steps=4, guidance_start=0.0),
    SamplingConfig(sampler="unipc", guidance_scale=1.0),
    SamplingConfig(sampler="dpmpp_2m", num_inference_steps=3),
    SamplingConfig(precision="bf16"),
]


def codec_of(kind: str) -> LatentCodec:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return LatentCodec(registry.build(kind, 16), kind)


def generator_on(device: str, kind: str = "conv") -> Generator:
    if kind == "pixels":
        return Generator(busy_unet(), PixelCodec(), NoiseSchedule(), device)
    return Generator(busy_denoiser(), codec_of(kind), NoiseSchedule(), device)


SEEDS, LABELS = [3, 1, 4, 1, 5], [0, None, 9, 9, 2]


@pytest.mark.parametrize("kind", ["mlp", "conv", "pixels"])
def test_no_sampler_waits_for_the_device(kind: str) -> None:
    """From seeds to latents; images then take the one wait for their bytes."""
    for sampling in SAMPLERS:
        if kind == "pixels" and (sampling.precision == "bf16" or sampling.sampler == "ddpm"):
            continue
        wanted = generator_on("cpu", kind).latents(SEEDS, LABELS, sampling)
        with pretending() as seen:
            generator = generator_on("cuda", kind)
            generator(SEEDS, LABELS, sampling)  # compares tiles
            seen.clear()
            latents = generator.latents(SEEDS, LABELS, sampling)
            assert latents.is_cuda and seen.calls > 50
            assert not seen.waits, (sampling, seen.waits)
            generator(SEEDS, LABELS, sampling)
            assert {wait.partition(" at ")[0] for wait in seen.waits} == {"copy to the CPU"}
            close = 0.2 if sampling.precision == "bf16" else 1e-3
            torch.testing.assert_close(latents.cpu(), wanted, rtol=close, atol=close)


def test_a_single_image_never_takes_more_rows_than_the_largest_tile() -> None:
    with pretending():
        tiles = generator_on("cuda", "mlp").tiles
        assert tiles.sizes[-1] == 1024 and tiles.size_for(100_000) == 1024


def test_a_step_of_the_slots_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs of all samplers, with given latents and pictures on the way; the bytes are the generator's."""
    waits: Counter[str] = Counter()
    steps = Board._steps
    with pretending() as seen:

        def watched(board: Board, tile: Any) -> Any:
            before = seen.waits.copy()
            leg = steps(board, tile)
            waits.update(seen.waits - before)
            return leg

        monkeypatch.setattr(Board, "_steps", watched)
        generator = generator_on("cuda", "mlp")
        slots = Slots(generator)
        some = [sampling for sampling in SAMPLERS if sampling.precision == "fp32"]
        jobs = [Waited(slots, 3, sampling, 10 * i, show=(2,)) for i, sampling in enumerate(some)]
        jobs.append(Waited(slots, 2, some[3], start=torch.ones(2, 16)))
        done = [waited.wait() for waited in jobs]
        slots.close()
        for sampling, job in zip(some, done, strict=False):
            assert torch.equal(job.images, generator(job.request.seeds, job.request.labels, sampling)[:, 0])
    assert not waits


@pytest.mark.parametrize("pixels", [False, True])
def test_the_encoder_of_an_actor(pixels: bool, ae_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode.ray, "get", lambda held: held)
    images = np.random.default_rng(0).integers(0, 256, (5, 28, 28)).astype(np.uint8)
    rows = [{"bytes": encode_png(image), "path": None} for image in images]
    batch = pa.table({"image": rows, "label": list(range(5)), "index": list(range(5))})

    def made(gpu: bool) -> np.ndarray:
        codec = None if pixels else checkpoint.load_autoencoder(ae_file).codec
        held: list[Any] = [codec]
        table = encode.Encoder(held, (28, 28), gpu)(batch)
        return np.array(table["pixels" if pixels else "latent"].to_pylist())

    wanted = made(False)
    with pretending() as seen:
        np.testing.assert_allclose(made(True), wanted, rtol=1e-5, atol=1e-6)
        assert pixels or seen.calls


ONE_GPU, NO_GPU = Share(1), Share()


def test_latents_of_a_gpu_lie_apart_and_a_cpus_where_they_always_did(
    ae_file: Path, digits_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, autoencoder = load_source(str(digits_folder), "test", tmp_path), checkpoint.load_autoencoder(ae_file)
    encoded: list[bool] = []

    def run(source: ImageSource, autoencoder: object, count: int, share: Share, what: str) -> pa.Table:
        encoded.append(bool(share))
        vectors = np.zeros((len(source), 16), np.float32) if autoencoder else np.zeros((len(source), 784), np.uint8)
        columns = {"label": source.table["label"], "index": source.table["index"]}
        return pa.table({"latent" if autoencoder else "pixels": fixed_size(vectors), **columns})

    monkeypatch.setattr(encode, "check_shared", lambda folder: None)
    monkeypatch.setattr(Share, "room", lambda share: 2)
    monkeypatch.setattr(encode, "check_gpus", lambda share: None)
    monkeypatch.setattr(encode, "run", run)
    folders = [
        encode.encode(source, autoencoder, tmp_path, None, share) for share in (NO_GPU, ONE_GPU, NO_GPU, ONE_GPU)
    ]
    assert encoded == [False, True]
    assert folders[:2] == folders[2:] and folders[0] != folders[1]
    identity: dict[str, Any] = {
        "autoencoder_sha256": autoencoder.sha256,
        "dataset": "folder",
        "revision": source.revision,
    }
    identity |= {"split": "test", "only_digit": None, "version": ldm_ray.__version__}
    assert folders[0].name == fingerprint(identity)  # as versions without a GPU in it named it
    made_on = json.loads((folders[1] / "manifest.json").read_text())["identity"]
    assert made_on == identity | {"device": "cuda", "precision": "fp32"}
    assert encode.encode(source, None, tmp_path, None, NO_GPU) == encode.encode(source, None, tmp_path, None, ONE_GPU)
    assert not any(key in record_of(source, autoencoder.sha256) for key in ("device", "precision"))  # may change


def test_quality_and_floors_are_the_cpus() -> None:
    random = torch.Generator().manual_seed(0)
    images = (torch.rand(90, 1, 28, 28, generator=random) * 255).to(torch.uint8)
    labels = torch.arange(90) % 10
    train, test = (images[:50], labels[:50]), (images[50:], labels[50:])

    def figures(device: str) -> dict[str, Any]:
        reference = Reference.of(test[0], train[0], Classifiers.shipped(device))
        codec = codec_of("mlp").with_statistics(LatentStatistics.identity(16)).to(device)
        return quality(images, labels, reference) | floors(codec, train, test, reference, 30)

    wanted = flat(figures("cpu"))
    with pretending() as seen:
        assert flat(figures("cuda")) == pytest.approx(wanted, rel=1e-3, abs=1e-6, nan_ok=True) and seen.calls


def flat(figures: dict[str, Any]) -> list[float]:
    values: list[float] = []
    for value in figures.values():
        part = flat(value) if isinstance(value, dict) else value if isinstance(value, list) else [value]
        values += [float("nan") if number is None else float(number) for number in part]
    return values


@pytest.mark.parametrize("command", ["infer", "explore"])
def test_commands_make_the_cpus_pictures(command: str, ae_file: Path, tmp_path: Path) -> None:
    ckpt = write_small_checkpoint(tmp_path / "latest.pt", ae_file)
    more = ["--num-images", 3, "--show-process"] if command == "infer" else ["--columns", 3, "--digits", "1,2"]

    def picture(device: str) -> np.ndarray:
        output = tmp_path / f"{device}.png"
        commands.run(command, "--ckpt", ckpt, "--device", device, "--output", output, *more)
        return np.asarray(Picture.open(output)).astype(int)

    wanted = picture("cpu")
    with pretending() as seen:
        made = picture("cuda")
        assert seen.calls
    assert np.abs(made - wanted).max() <= 1
    assert (
        Picture.open(tmp_path / "cuda.png").info["fingerprint"]
        != Picture.open(tmp_path / "cpu.png").info["fingerprint"]
    )


@pytest.fixture
def old_noise(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Constants as tensors of numbers, as philox once had them."""
    original = torch.full

    def tensor(size: Any, value: Any, **settings: Any) -> torch.Tensor:
        return torch.tensor(value, **settings).view(size) if size == (1, 1) else original(size, value, **settings)

    monkeypatch.setattr(noise.torch, "full", tensor)
    yield


def test_a_generator_that_waits_is_seen(old_noise: None) -> None:
    with pretending() as seen:
        generator_on("cuda", "mlp").latents(SEEDS, LABELS)
        assert any("diffusion/noise.py" in wait for wait in seen.waits)


def test_a_plan_that_is_waited_for_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samplers, "sent", lambda tensor, device: tensor.to(device, non_blocking=True))
    with pretending() as seen:
        generator_on("cuda", "mlp").latents(SEEDS, LABELS)
        assert any("copy to the device" in wait for wait in seen.waits)


def test_a_gpu_is_set_up_to_repeat_itself_and_a_cpu_left_alone() -> None:
    before = torch.backends.cudnn.deterministic, torch.are_deterministic_algorithms_enabled()
    assert settle("cpu", training=True) == CPU
    assert before == (torch.backends.cudnn.deterministic, torch.are_deterministic_algorithms_enabled())
    with pretending():
        torch.backends.cudnn.benchmark = True
        settle("cuda")
        matmul: Any = torch.backends.cuda.matmul
        cudnn: Any = torch.backends.cudnn
        assert matmul.fp32_precision == cudnn.conv.fp32_precision == "ieee"
        assert not matmul.allow_bf16_reduced_precision_reduction
        assert cudnn.deterministic and not cudnn.benchmark
        assert not torch.are_deterministic_algorithms_enabled()
        settle("cuda", training=True)
        assert torch.are_deterministic_algorithms_enabled() and torch.is_deterministic_algorithms_warn_only_enabled()


@pytest.mark.parametrize("change", ["get_device_name", "cuda", "cudnn"])
def test_the_fingerprint_of_a_gpu_knows_its_kind_and_versions(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pretending():
        first = fingerprint_of(torch.device("cuda"))
        assert first != fingerprint_of(CPU)
        home = {"cuda": torch.version, "cudnn": torch.backends.cudnn, "get_device_name": torch.cuda}[change]
        with monkeypatch.context() as patch:
            patch.setattr(home, "version" if change == "cudnn" else change, lambda *_: "another" if change else None)
            if change == "cuda":
                patch.setattr(home, change, "another")
            assert fingerprint_of(torch.device("cuda")) != first
        assert fingerprint_of(torch.device("cuda")) == first
