"""What several tests share: small real data, a small real checkpoint, and the files beside the project."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from ldm_ray import checkpoint
from ldm_ray.data.digits import digits_table
from ldm_ray.models import registry

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
