"""Everything that computes, rehearsed on tensors that say they are on a GPU; and that the rehearsal sees faults."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image as Picture

import ldm_ray
from ldm_ray import checkpoint
from ldm_ray.config import AutoencoderConfig, RunConfig, SamplingConfig, TrainConfig
from ldm_ray.data.examples import fingerprint, fixed_size, write_examples
from ldm_ray.data.images import encode_png
from ldm_ray.data.sources import ImageSource, load_source
from ldm_ray.devices import settle
from ldm_ray.diffusion import noise, samplers
from ldm_ray.diffusion.schedule import Noiser, NoiseSchedule
from ldm_ray.distributed import encode
from ldm_ray.generator import Generator, fingerprint_of
from ldm_ray.metrics.floors import floors
from ldm_ray.metrics.lenet import Classifiers
from ldm_ray.metrics.quality import Reference, quality
from ldm_ray.models import registry
from ldm_ray.models.codec import LatentCodec, LatentStatistics, PixelCodec
from ldm_ray.runs import RunPaths
from ldm_ray.slot_tiles import Board
from ldm_ray.slots import Slots
from ldm_ray.tiles import PIXEL_SIZES
from ldm_ray.training import fitter as fitting
from ldm_ray.training import trial
from ldm_ray.training.fit import Job, Place, fit
from ldm_ray.training.fitter import Fitter
from ldm_ray.training.tasks import build_task
from tests.helpers import commands
from tests.helpers.checkpoints import write_small_checkpoint
from tests.helpers.networks import busy_denoiser, busy_unet
from tests.helpers.pretend_cuda import Mismatch, OnCuda, pretending
from tests.helpers.slots import Waited

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
SAMPLERS = [
    SamplingConfig(),
    SamplingConfig(sampler="ddpm", num_inference_steps=70),  # noise for 64 steps at a time
    SamplingConfig(sampler="ddim", eta=0.5, num_inference_steps=4, guidance_start=0.0),
    SamplingConfig(sampler="unipc", guidance_scale=1.0),
    SamplingConfig(sampler="dpmpp_2m", num_inference_steps=3),
    SamplingConfig(precision="bf16"),
]


@pytest.fixture(autouse=True)
def small_tiles_of_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    """1,024 rows of a U-Net take a CPU seconds."""
    monkeypatch.setitem(PIXEL_SIZES, "cuda", (2, 8))


def there(*shape: int) -> torch.Tensor:
    return torch.ones(shape or (3, 3), device="cuda")


def rows(device: str) -> torch.Tensor:
    return torch.zeros(1, dtype=torch.int64, device=device)


HERE = torch.ones(3, 3)
REFUSED: dict[str, Callable[[], Any]] = {
    "a sum": lambda: there() + HERE,
    "a product": lambda: HERE @ there(),
    "a list": lambda: torch.cat([HERE, there()]),
    "in place": lambda: there().add_(HERE),
    "a loss": lambda: torch.nn.functional.mse_loss(there().requires_grad_(), HERE),
    "a layer of the CPU": lambda: torch.nn.Linear(3, 3)(there()),
    "an input of the CPU": lambda: torch.nn.Linear(3, 3).to("cuda")(HERE),
    "a generator of the CPU": lambda: torch.randn(3, device="cuda", generator=torch.Generator()),
    "a generator of the GPU": lambda: torch.randn(3, generator=torch.Generator("cuda")),
    "an index of the GPU": lambda: HERE[rows("cuda")],
    "set at an index of the GPU": lambda: HERE.clone().__setitem__(rows("cuda"), 0.0),
    "set to values of the CPU": lambda: there().__setitem__(rows("cuda"), HERE[:1]),
    "numpy": lambda: there().numpy(),
    "pinned": lambda: there().pin_memory(),
}
WAITS: dict[str, Callable[[], Any]] = {
    "a number": lambda: there(1).item(),
    "a decision": lambda: bool(there(1)),
    "a list": lambda: there().tolist(),
    "to the CPU": lambda: there().cpu(),
    "to the CPU by name": lambda: there().to("cpu", non_blocking=True),
    "of numbers": lambda: torch.tensor([1.0, 2.0], device="cuda"),
    "like another": lambda: there().new_tensor([1.0]),
    "from the CPU": lambda: HERE.to("cuda"),
    "not pinned": lambda: HERE.to("cuda", non_blocking=True),
    "no longer pinned": lambda: HERE.pin_memory()[rows("cpu")].to("cuda", non_blocking=True),
    "pinned and waited for": lambda: HERE.pin_memory().to("cuda"),
    "a mask": lambda: there()[there() > 0],
    "an index of the CPU": lambda: there()[rows("cpu")],
    "a comparison": lambda: torch.equal(there(), there()),
    "a copy": lambda: there().copy_(HERE),
}
NO_WAITS: dict[str, Callable[[], Any]] = {
    "pinned": lambda: HERE.pin_memory().to("cuda", non_blocking=True),
    "gathered in pinned memory": lambda: torch.index_select(
        HERE, 0, rows("cpu"), out=torch.empty(1, 3, pin_memory=True)
    ).to("cuda", non_blocking=True),
    "filled": lambda: torch.full((2,), 3.0, device="cuda") + torch.arange(2, device="cuda"),
    "an index": lambda: there()[rows("cuda")],
    "set": lambda: there().__setitem__(rows("cuda"), 0.0),
    "a number of the CPU": lambda: there() * torch.tensor(2.0),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_gpu_refuses_is_refused(name: str) -> None:
    with pretending(), pytest.raises((Mismatch, TypeError)):
        REFUSED[name]()


@pytest.mark.parametrize("name", [*WAITS, *NO_WAITS])
def test_waits_for_the_device_are_counted(name: str) -> None:
    with pretending() as seen:
        (WAITS | NO_WAITS)[name]()
        assert seen.waits.total() == (name in WAITS and name != "pinned")


def test_tensors_say_where_they_are() -> None:
    with pretending():
        assert there().device == torch.device("cuda", 0) and there().is_cuda and not HERE.is_cuda
        assert (there() + 1).is_cuda and there().cpu().device == CPU
        layer = torch.nn.Linear(3, 3).to("cuda")
        layer(there()).sum().backward()
        assert layer.weight.grad is not None and layer.weight.grad.is_cuda
    assert not isinstance(torch.ones(1), OnCuda)


# --- training ---


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


# --- images ---


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
            assert torch.equal(job.images, generator(job.seeds, job.labels, sampling)[:, 0])
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


def test_latents_of_a_gpu_lie_apart_and_a_cpus_where_they_always_did(
    ae_file: Path, digits_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, autoencoder = load_source(str(digits_folder), "test", tmp_path), checkpoint.load_autoencoder(ae_file)
    encoded: list[bool] = []

    def run(source: ImageSource, autoencoder: object, count: int, gpu: bool, what: str) -> pa.Table:
        encoded.append(gpu)
        vectors = np.zeros((len(source), 16), np.float32) if autoencoder else np.zeros((len(source), 784), np.uint8)
        columns = {"label": source.table["label"], "index": source.table["index"]}
        return pa.table({"latent" if autoencoder else "pixels": fixed_size(vectors), **columns})

    monkeypatch.setattr(encode, "check_shared", lambda folder: None)
    monkeypatch.setattr(encode, "resources", lambda: (2, 1))
    monkeypatch.setattr(encode, "use_gpu", lambda device: device == "cuda")
    monkeypatch.setattr(encode, "run", run)
    folders = [encode.encode(source, autoencoder, tmp_path, None, device) for device in ("cpu", "cuda", "cpu", "cuda")]
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
    assert encode.encode(source, None, tmp_path, None, "cpu") == encode.encode(source, None, tmp_path, None, "cuda")
    assert not any(key in encode.record_of(source, autoencoder) for key in ("device", "precision"))  # may change


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


# --- faults in the product are seen ---


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


# --- determinism ---


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
