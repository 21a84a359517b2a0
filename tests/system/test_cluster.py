"""Commands on a cluster that is there already: its token, the code they bring, the folder they need, its cores."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from ray.cluster_utils import Cluster

from ldm_ray.distributed.cluster import check_temporary
from ldm_ray.settings.errors import ConfigError
from tests.helpers.clusters import Head, running
from tests.helpers.data import ROOT


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with running(Head()) as head:
        yield head


@pytest.fixture(scope="module")
def gpu_head() -> Iterator[Head]:
    """Two GPUs of a type, so it says."""
    with running(Head(), "--num-cpus=4", "--num-gpus=2", '--resources={"accelerator_type:L4": 1}') as head:
        yield head


def test_without_the_token_a_command_ends_with_one_line(head: Head, digits_folder: Path, tmp_path: Path) -> None:
    done = head.command(
        "-m", "ldm_ray.train", "--dataset", digits_folder, "--outdir", tmp_path, RAY_AUTH_TOKEN="another" * 8
    )
    assert done.returncode == 2, done.stderr
    [line] = [line for line in done.stderr.splitlines() if line.startswith("python -m ldm_ray.train: ")]
    assert head.address in line and "Traceback" not in done.stderr


def test_a_temporary_folder_too_long_for_rays_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", "/tmp")
    check_temporary()
    monkeypatch.setenv("TMPDIR", "/tmp/" + "x" * 100)
    with pytest.raises(ConfigError, match=r"^TMPDIR=/tmp/x+ is \d+ characters too long .*set RAY_TMPDIR to a shorter"):
        check_temporary()
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    check_temporary()


SEEN = """
from ldm_ray.distributed.cluster import connected, resources, use_gpu
with connected():
    print(*resources(), use_gpu(None))
"""


def test_workers_that_are_not_there_yet_count_where_the_cluster_file_names_them(head: Head) -> None:
    def seen(**settings: str) -> str:
        return head.command("-c", SEEN, PYTHONPATH=str(ROOT), **settings).stdout.strip()

    assert seen() == "1 0 False"
    assert seen(LDM_RAY_CPUS="16", LDM_RAY_GPUS="4") == "16 4 True"


CODE = """
import ray
from ldm_ray.distributed.cluster import connected
with connected():
    @ray.remote(num_cpus=0)
    def where():
        import sys
        from pathlib import Path
        return [path for path in sys.path if Path(path, "ldm_ray", "train.py").is_file()]
    print(*ray.get(where.remote()))
"""


def test_workers_get_the_code_that_the_command_brings(head: Head) -> None:
    """Here the project is installed as well; on a node without it this copy is the one that is found."""
    done = head.command("-c", CODE, PYTHONPATH=str(ROOT))
    assert "/py_modules_files/" in done.stdout, done.stdout + done.stderr


CORES = """
import ray
from ldm_ray.distributed.cluster import connected, cores_of_each
with connected():
    print(*(cores_of_each(workers) for workers in (1, 2, 3, 4, 9)))
"""


def test_no_worker_needs_more_cores_than_a_node_has() -> None:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 5, "include_dashboard": False})
    try:
        cluster.add_node(num_cpus=2)
        environment = os.environ | {"RAY_ADDRESS": cluster.address, "PYTHONPATH": str(ROOT)}
        done = subprocess.run([sys.executable, "-c", CORES], env=environment, capture_output=True, text=True)
        assert done.stdout.split() == ["5", "2", "2", "1", "1"], done.stderr
    finally:
        cluster.shutdown()


PACKED = """
import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ldm_ray.distributed.cluster import connected
from ldm_ray.distributed.gpus import shared_out
with connected():
    for gpus in (0.2, 0.15, 0.6, 1, 2):
        room = shared_out(None, gpus, "L4", "--gpus-per-worker").room()
        for count in (room, room + 1):
            group = placement_group([{"GPU": gpus}] * count)
            print(count, group.wait(10 if count == room else 1))
            remove_placement_group(group)
"""


def test_as_many_workers_fit_on_gpus_as_ray_places(gpu_head: Head) -> None:
    told = gpu_head.command("-c", PACKED, PYTHONPATH=str(ROOT))
    counts = [(room, "True", room + 1, "False") for room in (10, 12, 2, 2, 1)]
    assert told.stdout.split() == [str(word) for line in counts for word in line], told.stdout + told.stderr


REFUSED = """
import asyncio
import sys
import ray
from pathlib import Path
from ldm_ray.checkpoints.checkpoint import load_autoencoder
from ldm_ray.settings.training import AutoencoderConfig
from ldm_ray.data.sources import load_source
from ldm_ray.distributed import encode, fit, generate, pipeline
from ldm_ray.distributed import trials as trial
from ldm_ray.distributed.cluster import connected
from ldm_ray.distributed.gpus import Share
from ldm_ray.settings.errors import ConfigError
from serve.app import Images

def told(*calls):
    lines = []
    for call in calls:
        try:
            call()
            lines.append("started")
        except ConfigError as error:
            lines.append(str(error))
    return lines

starts = (
    lambda: encode.Encoder([], (28, 28), True),
    lambda: fit.train_worker({}),
    lambda: generate.Worker([], "cuda"),
    lambda: trial.run_trial({}, None, {}, {}),
    lambda: asyncio.run(Images.func_or_class.__init__(object.__new__(Images.func_or_class), {})),  # Serve's wrapper
)
with connected():
    source, autoencoder = load_source(sys.argv[1], "train", Path("cache")), load_autoencoder(Path(sys.argv[2]))
    settings = AutoencoderConfig(dataset=sys.argv[1], outdir=sys.argv[3], epochs=1, gpus_per_worker=0.5)
    for line in told(
        lambda: encode.encode(source, autoencoder, Path(sys.argv[3]), None, Share(0.5)),
        lambda: generate.where(None, "fp32", Share(0.5, "L4")),
        lambda: pipeline.train_autoencoder(settings),
    ):
        print(line)
    for line in ray.get(ray.remote(num_gpus=0.5)(told).remote(*starts)):
        print(line)
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_cannot_be_used_is_told_wherever_a_worker_starts(
    gpu_head: Head, digits_folder: Path, ae_file: Path, tmp_path: Path
) -> None:
    """None falls back on the CPU in silence. The GPUs are Ray's word for it: torch sees none."""
    done = gpu_head.command("-c", REFUSED, digits_folder, ae_file, tmp_path / "out", PYTHONPATH=str(ROOT))
    lines = done.stdout.splitlines()
    assert len(lines) == 8, done.stdout + done.stderr
    for line in lines:
        assert re.match(r"the GPU worker on \S+ cannot use its GPU: ", line), line


def test_gpus_that_the_cluster_has_not_are_refused(gpu_head: Head, head: Head, digits_folder: Path) -> None:
    words = ["-m", "ldm_ray.train_autoencoder", "--dataset", digits_folder]
    for cluster, flags, part in (
        (gpu_head, ["--accelerator-type", "H100"], "has L4"),
        (gpu_head, ["--gpus-per-worker", "3"], "no node"),
        (head, ["--gpus-per-worker", "0.5"], "no GPU"),
    ):
        done = cluster.command(*words, *flags)
        assert done.returncode == 2 and flags[0] in done.stderr and part in done.stderr, done.stderr
