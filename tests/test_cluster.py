"""Commands on a cluster that is there already: its token, the code they bring, the folder they need, its scaling."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from ray.cluster_utils import Cluster
from ray.util import get_node_ip_address
from served import free_port

from ldm_ray.config import outdir
from ldm_ray.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]
RAY = str(Path(sys.executable).with_name("ray"))


@pytest.mark.parametrize("uri", ["s3://bucket/outputs", "gs://bucket"])
def test_training_refuses_an_object_store_in_one_line(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for given, scratch in ((uri, ""), (None, uri)):
        monkeypatch.setenv("SCRATCH", scratch)
        with pytest.raises(ConfigError, match=rf"{uri} is no folder.*ldm_ray.generate$"):
            outdir(given)


# A head that runs no work, and GPU workers from zero, as in cluster.yaml; here the GPUs are only a number.
SCALING = {
    "cluster_name": "fake",
    "max_workers": 2,
    "idle_timeout_minutes": 0.1,
    "provider": {"type": "fake_multinode"},
    "available_node_types": {
        "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
        "gpu_worker": {"resources": {"CPU": 1, "GPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": 2},
    },
    "head_node_type": "ray.head.default",
}


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

    def start(self) -> subprocess.Popen[bytes]:
        config = self.folder / "autoscaling.yaml"
        config.write_text(yaml.safe_dump(SCALING))
        ports = ["--port", self.address.partition(":")[2], "--ray-client-server-port", "0"]
        ports += ["--dashboard-port", str(free_port()), "--dashboard-host", "127.0.0.1"]
        command = [RAY, "start", "--head", "--block", "--num-cpus=0", *ports, f"--autoscaling-config={config}"]
        with (self.folder / "head.log").open("wb") as log:
            return subprocess.Popen(
                [*command, "--disable-usage-stats", f"--temp-dir={self.folder}"],
                env=self.environment | {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"},
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
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder:
        made = Head(Path(folder))
        process = made.start()
        try:
            for _ in range(60):
                asked = subprocess.run([RAY, "health-check", "--address", made.address], env=made.environment)
                if asked.returncode == 0:
                    break
                assert process.poll() is None, (Path(folder) / "head.log").read_text()
                time.sleep(1)
            else:
                pytest.fail((Path(folder) / "head.log").read_text()[-3000:])
            yield made
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, 9)
                process.wait()


NODES = """
import json, sys, time, ray
ray.init(logging_level="ERROR", log_to_driver=False)
for _ in range(120):
    alive = [node["Resources"].get("GPU", 0) for node in ray.nodes() if node["Alive"]]
    if len(alive) == int(sys.argv[1]):
        break
    time.sleep(1)
print(json.dumps(alive))
"""


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


ENCODE = """
import sys
from pathlib import Path
import ray
from ldm_ray.checkpoint import load_autoencoder
from ldm_ray.data.sources import load_source
from ldm_ray.distributed.cluster import connected
from ldm_ray.distributed.encode import encode
with connected():
    @ray.remote(num_cpus=0, num_gpus=1)
    def where():
        import ldm_ray
        return ldm_ray.__file__
    print("CODE", ray.get(where.remote()))
    source = load_source(sys.argv[1], "train", Path(sys.argv[3]), None)
    print("FOLDER", encode(source, load_autoencoder(Path(sys.argv[2])), Path(sys.argv[3]), workers=1, device="cpu"))
"""


@pytest.mark.slow
def test_encoding_makes_the_cluster_grow_from_zero_and_shrink_again(
    head: Head, digits_folder: Path, ae_file: Path, tmp_path: Path
) -> None:
    """No node but the head is there; the code that runs on the new one is what the command sent."""
    assert json.loads(head.command("-c", NODES, 1).stdout.splitlines()[-1]) == [0]
    done = head.command("-c", ENCODE, digits_folder, ae_file, tmp_path, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stdout + done.stderr
    told = dict(line.split(" ", 1) for line in done.stdout.splitlines() if line.startswith(("CODE", "FOLDER")))
    assert "/runtime_resources/py_modules_files/" in told["CODE"]
    assert (Path(told["FOLDER"]) / "manifest.json").is_file()
    assert json.loads(head.command("-c", NODES, 1).stdout.splitlines()[-1]) == [0]


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
