"""Ray clusters of several nodes on this machine, and losing parts of them."""

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

import psutil
import pytest
from ray.cluster_utils import Cluster
from ray.util import get_node_ip_address

from tests.helpers.commands import below, kill
from tests.helpers.ports import free_port

RAY = str(Path(sys.executable).with_name("ray"))


class Head:
    """``ray start --head`` with a token; ``command`` runs a program that has the token."""

    def __init__(self, **settings: str) -> None:
        """settings: more of Ray's environment."""
        self.address = f"{get_node_ip_address()}:{free_port()}"
        self.environment = os.environ | settings
        self.environment |= {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_ADDRESS": self.address,
            "RAY_USAGE_STATS_ENABLED": "0",
        }

    def start(self, folder: Path, *more: str) -> subprocess.Popen[bytes]:
        ports = ["--port", self.address.partition(":")[2], "--ray-client-server-port", str(free_port())]
        command = [
            RAY,
            "start",
            "--head",
            "--block",
            "--num-cpus=0",
            "--include-dashboard=false",
            "--include-log-monitor=false",
            *ports,
        ]
        with (folder / "head.log").open("wb") as log:
            return subprocess.Popen(
                [*command, *more, "--disable-usage-stats", f"--temp-dir={folder}"],
                env=self.environment,
                stdout=log,
                stderr=log,
                cwd=folder,
                start_new_session=True,
            )

    def command(self, *words: object, **settings: str) -> subprocess.CompletedProcess[str]:
        environment = self.environment | settings
        command = [sys.executable, *map(str, words)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@contextlib.contextmanager
def running(head: Head, *flags: str) -> Iterator[Head]:
    """The head once it answers, until the end. flags: of ``ray start``."""
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder:
        log = Path(folder, "head.log")
        process = head.start(Path(folder), *flags)
        try:
            for _ in range(240):
                if "Ray runtime started" in log.read_text():
                    break
                assert process.poll() is None, log.read_text()
                time.sleep(0.25)
            else:
                pytest.fail(log.read_text()[-3000:])
            yield head
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                kill(psutil.Process(process.pid))
                process.wait()


@contextlib.contextmanager
def two_nodes() -> Iterator[Cluster]:
    """A head of one CPU, and a node of one CPU; their processes are this one's children."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        cluster.add_node(num_cpus=1)
        yield cluster
    finally:
        cluster.shutdown()


def lose(cluster: Cluster) -> None:
    """The one node beside the head goes with everything that runs on it, as when its power does."""
    [node] = cluster.worker_nodes
    kill(psutil.Process(node.all_processes["raylet"][0].process.pid))
    cluster.remove_node(node, allow_graceful=False)


def lose_all(cluster: Cluster) -> None:
    """The head goes too, and with it the cluster."""
    for node in (cluster.head_node, *cluster.worker_nodes):
        for started in (info for infos in node.all_processes.values() for info in infos):
            with contextlib.suppress(psutil.Error):
                kill(psutil.Process(started.process.pid))


def workers_of(cluster: Cluster, title: str) -> list[psutil.Process]:
    """The workers of all nodes whose title holds the text."""
    raylets = [node.all_processes["raylet"][0].process.pid for node in cluster.list_all_nodes()]
    return [worker for pid in raylets for worker in below(psutil.Process(pid), title)]
