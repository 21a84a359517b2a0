"""What unit and system tests share: small real data, a small real checkpoint, and the files beside the project."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from ldm_ray.data.digits import digits_table
from tests.helpers import schedule, tidy
from tests.helpers.checkpoints import write_autoencoder
from tests.helpers.data import Shared

torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    tidy.begin(config)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: schedule.place(item.nodeid))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> schedule.ByFile:
    return schedule.ByFile(config, log)


@pytest.fixture(scope="session")
def shared() -> Shared:
    shared = Shared()
    for folder in (shared.mnist, shared.checkpoints):
        if not folder.is_dir():
            pytest.skip(f"needs real MNIST and existing checkpoints beside the project: {folder} is not there")
    return shared


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
    write_autoencoder(path)
    return path


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a disk of its own by its options (``size=64k``); its folder."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options: str) -> Path:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True)
        if done.returncode:
            pytest.skip(f"needs to mount a small disk: {done.stderr.decode().strip()}")
        return folder

    yield mount
    subprocess.run(["umount", "-l", str(folder)], capture_output=True)
