"""What a machine's driver must be for torch's CUDA, and how GPUs are shared out; without a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ldm_ray.devices import cuda
from ldm_ray.search.space import SearchConfig
from ldm_ray.service.settings import Mistake, Settings
from ldm_ray.settings.datasets import GenerateConfig
from ldm_ray.settings.errors import ConfigError
from ldm_ray.settings.gpu_share import fitting
from ldm_ray.settings.options import Config
from ldm_ray.settings.training import TrainConfig

PROPRIETARY = (
    "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  Thu Jan 23 22:50:36 UTC 2025\nGCC version: 12\n"
)
OPEN = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.105.08  Release Build  (dvs-builder@U22)\n"
OLD = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  450.80.02  Wed Sep 23 01:13:39 UTC 2020\n"


# --- the driver ---


@pytest.mark.parametrize(
    ("text", "version"), [(PROPRIETARY, (570, 86, 15)), (OPEN, (580, 105, 8)), (OLD, (450, 80, 2)), ("nothing", None)]
)
def test_the_driver_is_read_from_its_own_file(tmp_path: Path, text: str, version: tuple[int, ...] | None) -> None:
    (tmp_path / "version").write_text(text)
    assert cuda.driver_here(tmp_path / "version") == version
    assert cuda.driver_here(tmp_path / "none") is None


def test_each_cuda_has_its_oldest_driver() -> None:
    assert cuda.driver_needed("13.0") == cuda.driver_needed("13.2") == (580, 65, 6)
    assert cuda.driver_needed("12.6") == (525, 60, 13)
    assert cuda.driver_needed("14.0") >= (580, 65, 6)
    assert cuda.dotted((580, 65, 6)) == "580.65.06"


def test_an_old_driver_is_told_with_what_is_there_what_is_needed_and_what_to_do() -> None:
    told = cuda.reason("2.14.1+cu130", "13.0", (570, 86, 15), "0")
    for part in ("570.86.15", "2.14.1+cu130", "580.65.06", "LDM_RAY_CUDA"):
        assert part in told
    assert "LDM_RAY_CUDA" not in cuda.reason("2.14.1+cu130", "13.0", (450, 80, 2), "0")  # CUDA 12 needs 525
    assert "\n" not in told


def test_other_reasons_are_told_apart() -> None:
    assert "without CUDA" in cuda.reason("2.14.1+cpu", None, (580, 65, 6), "0")
    assert "no NVIDIA driver" in cuda.reason("2.14.1+cu130", "13.0", None, "0")
    told = cuda.reason("2.14.1+cu130", "13.0", (580, 65, 6), "3")
    assert "CUDA_VISIBLE_DEVICES=3" in told and "too old" not in told


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_worker_without_a_usable_gpu_is_refused_in_one_line() -> None:
    with pytest.raises(ConfigError, match=r"^the GPU worker on \S+ cannot use its GPU: [^\n]+$"):
        cuda.check_visible()


# --- shares ---


@pytest.mark.parametrize(
    ("gpus", "share", "workers"),
    # as Ray places them: test_cluster.py asks it
    [
        *[(1, 0.2, 5), (1, 0.1, 10), (1, 0.15, 6), (1, 0.3, 3), (1, 0.3333, 3), (1, 0.7, 1), (1, 1, 1), (1, 2, 0)],
        *[(2, 0.6, 2), (2, 0.4, 4), (2, 0.25, 8), (4, 2, 2), (3, 2, 1), (0, 0.5, 0)],
    ],
)
def test_how_many_workers_fit(gpus: int, share: float, workers: int) -> None:
    assert fitting(gpus, share) == workers


@pytest.mark.parametrize(
    ("kind", "name"),
    [(TrainConfig, "gpus_per_worker"), (GenerateConfig, "gpus_per_worker"), (SearchConfig, "gpus_per_trial")],
)
def test_shares_that_ray_cannot_give_are_refused(kind: type[Config], name: str) -> None:
    for share in (0.5, 0.2, 0.3333, 1.0, 2.0):
        assert getattr(kind(**{name: share}), name) == share
    for share in (1.5, 0.33333, -0.5, 65, float("nan")):
        with pytest.raises(ConfigError, match="--" + name.replace("_", "-")):
            kind(**{name: share})


def test_zero_is_a_share_of_trials_alone() -> None:
    assert SearchConfig(gpus_per_trial=0).gpus_per_trial == 0
    with pytest.raises(ConfigError, match="above 0"):
        TrainConfig(gpus_per_worker=0)


def test_replicas_have_the_same_rules() -> None:
    assert Settings.model_validate({"gpus_per_replica": "0.5", "accelerator_type": "L4"}).gpus_per_replica == 0.5
    for share in ("1.5", "0.33333", "0", "65"):
        with pytest.raises(Mistake, match="gpus_per_replica"):
            Settings.model_validate({"gpus_per_replica": share})


def test_a_search_hands_the_type_of_accelerator_on_to_its_best_run() -> None:
    assert SearchConfig(accelerator_type="L4").train_config().accelerator_type == "L4"
