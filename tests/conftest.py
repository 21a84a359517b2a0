"""What several tests share: small real data, a small real checkpoint, and the files beside the project."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from served import server as server

from ldm_ray import checkpoint
from ldm_ray.data.digits import digits_table
from ldm_ray.diffusion.schedule import NoiseSchedule
from ldm_ray.generator import Generator
from ldm_ray.models import registry
from ldm_ray.models.codec import LatentCodec
from ldm_ray.models.denoiser import Denoiser
from ldm_ray.models.unet import UNet

torch.set_num_threads(1)
SHARED = Path(__file__).resolve().parents[2] / "shared"


@dataclass(frozen=True)
class Shared:
    """Real MNIST and checkpoints in the existing format, made by an independent program."""

    mnist: Path
    checkpoints: Path


@pytest.fixture(scope="session")
def shared() -> Shared:
    found = Shared(SHARED / "data" / "mnist", SHARED / "data" / "checkpoints")
    for folder in (found.mnist, found.checkpoints):
        if not folder.is_dir():
            pytest.skip(f"needs real MNIST and existing checkpoints beside the project: {folder} is not there")
    return found


@pytest.fixture(scope="session")
def digits_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few hundred embedded digits as a folder in the schema of the hub's image datasets."""
    folder = tmp_path_factory.mktemp("digits")
    table = digits_table("test")
    pq.write_table(table.slice(0, 240), folder / "train-00000-of-00001.parquet")
    pq.write_table(table.slice(240), folder / "test-00000-of-00001.parquet")
    return folder


@pytest.fixture(scope="session")
def ae_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained MLP autoencoder in the project's own format."""
    path = tmp_path_factory.mktemp("ae") / "latest.pt"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = registry.build("mlp", 16)
    checkpoint.write(path, checkpoint.autoencoder_content(model, "mlp", {"seed": 42, "only_digit": None}, epoch=3))
    return path


def busy_denoiser(hidden_dim: int = 256) -> Denoiser:
    """Random weights everywhere, so that nothing is zero as it is at the start of training."""
    denoiser, generator = Denoiser(16, hidden_dim), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in denoiser.named_parameters():
            weight.normal_(std=0.04, generator=generator)
            if "norm.weight" in name:
                weight.add_(1)
    return denoiser.eval()


def busy_unet(image_size: tuple[int, int] = (28, 28)) -> UNet:
    """Random weights everywhere: at the start of training the last ones are zero."""
    model, random_ = UNet(image_size, 8), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(std=0.1, generator=random_)
            if "norm" in name and name.endswith("weight"):
                weight.add_(1)
    return model.eval()


@pytest.fixture(scope="module", params=["mlp", "conv"])
def generator(request: pytest.FixtureRequest) -> Generator:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        codec = LatentCodec(registry.build(request.param, 16), request.param)
    before, _ = torch.get_num_threads(), torch.set_num_threads(2)
    try:
        return Generator(busy_denoiser(), codec, NoiseSchedule())
    finally:
        torch.set_num_threads(before)
