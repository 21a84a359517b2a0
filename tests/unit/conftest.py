"""Unit tests: no Ray, no server, no browser. ``make check`` runs them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ldm_ray.diffusion.schedule import NoiseSchedule
from ldm_ray.engine.generator import Generator
from ldm_ray.models import registry
from ldm_ray.models.codec import LatentCodec
from tests.helpers.asgi import InProcess, in_process
from tests.helpers.checkpoints import write_small_checkpoint
from tests.helpers.networks import busy_denoiser


@pytest.fixture(scope="module", params=["mlp", "conv"])
def generator(request: pytest.FixtureRequest) -> Generator:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        codec = LatentCodec(registry.build(request.param, 16), request.param)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        return Generator(busy_denoiser(), codec, NoiseSchedule())
    finally:
        torch.set_num_threads(before)


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory: pytest.TempPathFactory, ae_file: Path) -> Path:
    """A small checkpoint, alone in its folder."""
    folder = tmp_path_factory.mktemp("served")
    return write_small_checkpoint(folder / "small.pt", ae_file)


@pytest.fixture(scope="module")
def small(ckpt: Path) -> Iterator[InProcess]:
    """A service of it, in-process."""
    with in_process(ckpt) as running:
        yield running
