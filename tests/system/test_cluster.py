"""Commands on a cluster that is there already: its token, the code they bring, the folder they need, its cores."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from ldm_ray.distributed.cluster import check_temporary
from ldm_ray.errors import ConfigError
from tests.helpers.clusters import Head, running
from tests.helpers.data import ROOT


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with running(Head()) as head:
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
        return [path for path in sys.path if Path(path, "ldm_ray", "config.py").is_file()]
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
