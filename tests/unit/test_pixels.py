"""Diffusion of pixels: the U-Net, and the same engine, checkpoints and commands as for latents."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ldm_ray import compare, evaluate, generate, infer
from ldm_ray.checkpoints import checkpoint
from ldm_ray.data.images import to_float, to_uint8
from ldm_ray.diffusion.schedule import NoiseSchedule
from ldm_ray.engine.generator import Generator
from ldm_ray.engine.slots import Slots
from ldm_ray.engine.tiles import PIXEL_SIZES, SIZES, Tiles, within_room
from ldm_ray.metrics.comparison import names_of
from ldm_ray.models.codec import PixelCodec
from ldm_ray.models.unet import UNet
from ldm_ray.settings.errors import CheckpointError, ConfigError
from ldm_ray.settings.sampling import SamplingConfig
from ldm_ray.settings.training import TrainConfig
from ldm_ray.training.fitter import Fitter
from ldm_ray.training.tasks import build_task
from tests.helpers.networks import busy_unet
from tests.helpers.slots import Waited

FEW = SamplingConfig(num_inference_steps=3)
CPU = torch.device("cpu")


def write(path: Path, model: UNet, **config: object) -> Path:
    settings = TrainConfig(space="pixel", hidden_dim=8, **config).to_dict()  # type: ignore[arg-type]
    content = checkpoint.diffusion_content(model, model, NoiseSchedule(), None, settings, epoch=1, train_seconds=2.0)
    checkpoint.write(path, content)
    return path


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("pixels") / "latest.pt", busy_unet())


@pytest.fixture(scope="module")
def generator(ckpt: Path) -> Generator:
    return Generator.open(ckpt)


# --- network and pixels ---


def test_pixels_come_back_exactly() -> None:
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    codec = PixelCodec((16, 16))
    latents = codec.encode(to_float(images))
    assert latents.min() == -1 and latents.max() == 1
    assert torch.equal(codec.whiten(images.flatten(1)), latents)
    assert torch.equal(to_uint8(codec.decode(latents)), images)


def test_a_fresh_unet_predicts_nothing_and_depends_on_time_and_class_once_trained() -> None:
    xt, t = torch.randn(3, 784, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 5, 900])
    assert not UNet(hidden_dim=8)(xt, t, torch.tensor([1, 2, 10])).any()
    model = busy_unet()
    made = model(xt, t, torch.tensor([1, 2, 10]))
    assert made.shape == (3, 784)
    torch.testing.assert_close(made[2:], model(xt[2:], t[2:]))  # the null label is no label
    for other in (model(xt, t + 50, torch.tensor([1, 2, 10])), model(xt, t, torch.tensor([3, 4, 5]))):
        assert ((other - made).abs().amax(dim=1) > 1e-3).all()


@pytest.mark.parametrize(
    ("size", "width", "said"),
    [((30, 28), 8, "30x28; --space pixel takes"), ((28, 28), 12, "multiple of 8"), ((260, 4), 8, "up to 256")],
)
def test_sizes_that_cannot_be_are_refused(size: tuple[int, int], width: int, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        UNet(size, width)


def test_training_lowers_the_loss() -> None:
    config = TrainConfig(space="pixel", hidden_dim=8, batch_size=32, epochs=40, lr=3e-3)
    task = build_task(config, CPU, None, {"image_size": [8, 8], "class_names": ["a", "b"]})
    labels = torch.arange(32) % 2
    data = torch.full((32, 64), -1.0)
    data[labels == 1, :32] = 1.0
    fitter = Fitter(task, task.model, config, data, labels, 32, 0, 1, CPU)
    losses = []
    while fitter.epoch < config.epochs:
        fitter.run_epoch(lambda _: False)
        losses.append(fitter.end_epoch())
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


def test_the_denoising_is_shown_whole_where_several_tiles_make_it(
    ckpt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tiles, "size_for", lambda *_: 4)
    flags = ["--num-images", "8", "--num-inference-steps", "3", "--process-steps", "3", "--device", "cpu"]
    assert infer.main(["--ckpt", str(ckpt), "--output", str(tmp_path / "a.png"), "--show-process", *flags]) == 0
    strip = np.asarray(Image.open(tmp_path / "a_process.png"))
    assert strip.shape == (8 * 30 + 2, 3 * 30 + 2)
    wanted = Generator.open(ckpt)(range(42, 50), range(8), FEW)[:, 0].numpy()
    for i, image in enumerate(wanted):  # the last x0 is the image
        np.testing.assert_array_equal(strip[2 + 30 * i : 30 + 30 * i, 62:90], image)


def test_a_unet_samples_in_fp32_alone(ckpt: Path, generator: Generator, tmp_path: Path) -> None:
    said = "--precision bf16 is for models of latents"
    with pytest.raises(ConfigError, match=said):
        generator([1], [1], SamplingConfig(precision="bf16"))
    out = tmp_path / "set"
    flags = ["--ckpt", str(ckpt), "--outdir", str(out), "--seeds", "0-9", "--precision", "bf16", "--device", "cpu"]
    with pytest.raises(ConfigError, match=said):
        generate.main(flags)
    assert not out.exists()
    for refused in (compare.main, evaluate.main):
        with pytest.raises(ConfigError, match=said):  # before any data is read: there is none of that name
            refused(["--ckpt", str(ckpt), "--precision", "bf16", "--dataset", str(tmp_path), "--device", "cpu"])


# --- checkpoints and settings ---


def test_a_checkpoint_is_read_back(ckpt: Path, tmp_path: Path, ae_file: Path) -> None:
    assert checkpoint.read(ckpt)[1] == "pixel_diffusion"
    found = checkpoint.load_diffusion(ckpt)
    assert isinstance(found.denoiser, UNet) and found.codec is not None and found.autoencoder is None
    assert found.codec.kind == "pixels" and found.autoencoder_sha256 == "" and found.info["train_seconds"] == 2.0
    assert all(torch.equal(a, b) for a, b in zip(found.denoiser.parameters(), busy_unet().parameters(), strict=True))
    with pytest.raises(CheckpointError, match="has no autoencoder: leave --ae-ckpt out"):
        checkpoint.load_diffusion(ckpt, ae_file)
    other = checkpoint.load_diffusion(write(tmp_path / "a.pt", busy_unet((32, 20))))
    assert other.codec is not None and other.codec.image_size == (32, 20)


@pytest.mark.parametrize(
    "change",
    [
        {"image_size": [30, 30]},
        {"image_size": "large"},
        {"model": {"time.fc1.weight": torch.zeros(4, 4)}, "ema": None},
        {"kind": "sound_diffusion"},
    ],
)
def test_a_damaged_checkpoint_is_refused_in_one_line(ckpt: Path, tmp_path: Path, change: dict) -> None:
    checkpoint.write(tmp_path / "bad.pt", torch.load(ckpt, weights_only=True) | change)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load_diffusion(tmp_path / "bad.pt")
    assert len(str(caught.value).splitlines()) == 1


def test_recipes_have_values_of_their_own_for_pixels() -> None:
    pixel = TrainConfig(space="pixel")
    assert (pixel.batch_size, pixel.lr, pixel.hidden_dim, pixel.whiten) == (128, 1e-3, 32, False)
    assert pixel.prediction_type == TrainConfig().prediction_type == "v_prediction"
    classic = TrainConfig(space="pixel", recipe="classic")
    assert (classic.lr, classic.hidden_dim, classic.prediction_type) == (2e-4, 32, "epsilon")
    assert TrainConfig(space="pixel", lr=1e-4).lr == 1e-4


@pytest.mark.parametrize("given", [{"ae_ckpt": "a.pt"}, {"ae_ckpt_dir": "a"}, {"whiten": True}, {"num_blocks": 2}])
def test_what_belongs_to_latents_is_refused(given: dict) -> None:
    with pytest.raises(ConfigError, match="belongs to --space latent"):
        TrainConfig(space="pixel", **given)


# --- the same engine ---


def test_images_do_not_depend_on_their_company(generator: Generator) -> None:
    labels = [i % 10 for i in range(70)]
    together = generator(range(70), labels, FEW)
    assert together.float().std() > 1
    for i in (0, 33, 69):
        assert torch.equal(generator([i], [labels[i]], FEW)[0], together[i])


@pytest.mark.parametrize("sampler", ["unipc", "dpmpp_2m_sde", "dpmpp_2m", "ddim", "ddpm"])
def test_slots_make_the_bytes_of_the_generator(generator: Generator, sampler: str) -> None:
    dice, slots = random.Random(1), Slots(generator)
    try:
        settings = [
            SamplingConfig(sampler=sampler, num_inference_steps=dice.randint(2, 14), guidance_scale=scale)
            for scale in (1.0, 2.0, 1.0)
        ]
        jobs = [Waited(slots, dice.randint(1, 12), each, 100 * i) for i, each in enumerate(settings)]
        for i, (waited, each) in enumerate(zip(jobs, settings, strict=True)):
            job = waited.wait()
            wanted = generator(range(100 * i, 100 * i + len(job.request.seeds)), job.request.labels, each)
            assert torch.equal(job.images, wanted[:, 0])
    finally:
        slots.close()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--outdir", "EMPTY"], "no checkpoint of --space latent"),
        (["--batches", "0"], "numbers from 1"),
        (["--samples", "5"], "0 or at least 10"),
    ],
)
def test_compare_refuses_in_one_line(flags: list[str], said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        compare.main([str(tmp_path) if flag == "EMPTY" else flag for flag in flags])


def test_tiles_of_large_images_are_small_and_those_of_digits_stay() -> None:
    assert within_room(PIXEL_SIZES, 28 * 28 * 32) == PIXEL_SIZES and within_room(SIZES, 28 * 28 * 32) == SIZES
    assert within_room(PIXEL_SIZES, 256 * 256 * 32)["cpu"] == (1, 2, 4, 8)
    assert within_room(SIZES, 2**30)["cpu"] == (4,)


def test_a_unet_too_large_to_be_opened_is_refused_before_it_is_trained() -> None:
    with pytest.raises(
        ConfigError, match=r"--hidden-dim 64 is too large for images of 256x256; at most 32 is possible"
    ):
        UNet((256, 256), 64)
    UNet((256, 256), 32)


def test_names_of_compared_checkpoints() -> None:
    rows: list[dict[str, Any]] = [
        {"space": "pixel", "epochs": 1},
        {"space": "latent", "epochs": 30},
        {"space": "latent", "epochs": None},
    ]
    assert names_of(rows) == ["pixel, 1 epoch", "latent, 30 epochs", "latent"]
