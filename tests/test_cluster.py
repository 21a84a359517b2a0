"""Commands on a cluster that is there already: its token, the code they bring, the folder they need, its cores."""

from __future__ import annotations

import contextlib
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster
from ray.util import get_node_ip_address
from served import free_port

ROOT = Path(__file__).resolve().parents[1]
RAY = str(Path(sys.executable).with_name("ray"))


class Head:
    """``ray start --head`` with a token, in a folder of its own; ``command`` runs a program that has the token."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.address = folder, f"{get_node_ip_address()}:{free_port()}"
        self.environment = os.environ | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_ADDRESS": self.address,
            "RAY_USAGE_STATS_ENABLED": "0",
        }

    def start(self, *more: str) -> subprocess.Popen[bytes]:
        ports = ["--port", self.address.partition(":")[2], "--ray-client-server-port", str(free_port())]
        ports += ["--dashboard-port", str(free_port()), "--dashboard-host", "127.0.0.1"]
        command = [RAY, "start", "--head", "--block", "--num-cpus=0", *ports]
        with (self.folder / "head.log").open("wb") as log:
            return subprocess.Popen(
                [*command, *more, "--disable-usage-stats", f"--temp-dir={self.folder}"],
                env=self.environment,
                stdout=log,
                stderr=log,
                cwd=self.folder,
                start_new_session=True,
            )

    def command(self, *words: object, **settings: str) -> subprocess.CompletedProcess[str]:
        environment = self.environment | settings
        command = [sys.executable, *map(str, words)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with (
        tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder,
        running(Head(Path(folder))) as made,
    ):
        yield made


@contextlib.contextmanager
def running(made: Head, *flags: str) -> Iterator[Head]:
    """The head once it answers, until the end."""
    process = made.start(*flags)
    try:
        for _ in range(60):
            asked = subprocess.run([RAY, "health-check", "--address", made.address], env=made.environment)
            if asked.returncode == 0:
                break
            assert process.poll() is None, (made.folder / "head.log").read_text()
            time.sleep(1)
        else:
            pytest.fail((made.folder / "head.log").read_text()[-3000:])
        yield made
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()


def test_without_the_token_a_command_ends_with_one_line(head: Head, digits_folder: Path, tmp_path: Path) -> None:
    done = head.command(
        "-m", "ldm_ray.train", "--dataset", digits_folder, "--outdir", tmp_path, RAY_AUTH_TOKEN="another" * 8
    )
    assert done.returncode == 2, done.stderr
    [line] = [line for line in done.stderr.splitlines() if line.startswith("python -m ldm_ray.train: ")]
    assert head.address in line and "Traceback" not in done.stderr


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
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 5})
    try:
        cluster.add_node(num_cpus=2)
        environment = os.environ | {"RAY_ADDRESS": cluster.address, "PYTHONPATH": str(ROOT)}
        done = subprocess.run([sys.executable, "-c", CORES], env=environment, capture_output=True, text=True)
        assert done.stdout.split() == ["5", "2", "2", "1", "1"], done.stderr
    finally:
        cluster.shutdown()
