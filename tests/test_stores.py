"""Training and ``generate`` on Ray into object stores: real S3 and GCS servers on this machine."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import test_faults as faults
import torch
from ray.cluster_utils import Cluster
from served import free_port
from test_generate import busy_checkpoint, finish, start

from ldm_ray import checkpoint
from ldm_ray.errors import CheckpointError, DataError
from ldm_ray.paths import AnyPath, RemotePath, append_line, to_path
from ldm_ray.store import Store

FLAGS = ["--seeds", "0-199", "--shard-size", "50", "--device", "cpu", "--num-inference-steps", "4"]


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """The URI of an empty bucket, up to its query; AWS_* of the environment suit it."""
    pytest.importorskip("moto.server")
    port = free_port()
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    patch = pytest.MonkeyPatch()
    try:
        request = urllib.request.Request(f"http://127.0.0.1:{port}/bucket", method="PUT")
        for _ in range(120):
            try:
                urllib.request.urlopen(request, timeout=5)
                break
            except OSError:
                time.sleep(0.5)
        for name, value in {"ACCESS_KEY_ID": "a", "SECRET_ACCESS_KEY": "b", "EC2_METADATA_DISABLED": "true"}.items():
            patch.setenv(f"AWS_{name}", value)
        patch.setenv("RAY_ADDRESS", "local")
        yield f"s3://bucket/tests?scheme=http&region=us-east-1&endpoint_override=127.0.0.1:{port}"
    finally:
        patch.undo()
        server.terminate()
        server.wait(30)


GCS = """
import sys, time
from gcp_storage_emulator.server import create_server
create_server("127.0.0.1", int(sys.argv[1]), in_memory=True, default_bucket="bucket").start()
print("up", flush=True)
time.sleep(3600)
"""


@pytest.fixture(scope="module")
def gcs() -> Iterator[str]:
    """The URI of a folder in an empty bucket of Google's kind."""
    pytest.importorskip("gcp_storage_emulator")
    port = free_port()
    command = [sys.executable, "-c", GCS, str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        assert server.stdout and server.stdout.readline() == "up\n"
        yield f"gs://anonymous@bucket/tests?scheme=http&endpoint_override=127.0.0.1:{port}&retry_limit_seconds=20"
        server.kill()


@pytest.mark.parametrize("kind", ["bucket", "gcs"])
def test_a_path_in_a_store_is_one_of_pathlib(kind: str, request: pytest.FixtureRequest) -> None:
    root = to_path(request.getfixturevalue(kind))
    assert isinstance(root, RemotePath) and to_path(str(root / "a" / "b.txt")) == root / "a/b.txt"
    file = root / "paths" / "one" / "file.txt"
    assert not file.exists() and not list((root / "paths").glob("*/file.txt"))
    file.parent.mkdir(parents=True, exist_ok=True)
    append_line(file, "ä")
    append_line(file, "b")
    again = to_path(str(file))  # named by its own URI
    assert again.read_text() == "ä\nb\n" and again.stat().st_size == 5 and again.stat().st_mtime > 1e9
    assert file.is_file() and not file.is_dir() and file.parent.is_dir() and not file.parent.is_file()
    assert (file.name, file.parent.name, again.parent) == ("file.txt", "one", file.parent)
    (root / "paths" / "one" / "deeper" / "file.txt").touch()
    assert [path.key for path in (root / "paths").glob("o*/file.txt")] == ["paths/one/file.txt"]
    assert len(list((root / "paths").rglob("*.txt"))) == 2
    file.unlink()
    file.unlink(missing_ok=True)
    assert not file.exists()
    with pytest.raises(FileNotFoundError):
        file.read_bytes()
    with pytest.raises(FileNotFoundError):
        file.stat()


def test_what_a_store_refuses_is_one_line(bucket: str) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        checkpoint.read(to_path(bucket) / "none.pt")
    gone = to_path(bucket.rpartition(":")[0] + ":1")
    with pytest.raises(DataError, match="cannot be read") as told:
        gone.exists()
    assert "\n" not in str(told.value)
    file = to_path(bucket) / "damaged.pt"
    file.write_bytes(b"no torch file")
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoint.read(file)


def recorded(out: AnyPath) -> list[int]:
    """The recorded epochs of the only run."""
    for file in out.glob("runs/latent-diffusion-*/metrics.jsonl"):
        return [json.loads(line)["epoch"] for line in file.read_text().splitlines()]
    return []


@contextlib.contextmanager
def two_nodes() -> Iterator[Cluster]:
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        made.add_node(num_cpus=1)
        yield made
    finally:
        made.shutdown()


@pytest.mark.slow
def test_training_on_two_nodes_into_s3_and_on_a_disk_gives_the_same_weights(
    bucket: str, digits_folder: Path, ae_file: Path, tmp_path: Path
) -> None:
    """On the way the whole cluster is lost, head and all; another one goes on from the store alone, with a stop."""
    root = to_path(bucket) / "runs"
    kept = root / "autoencoder.pt"
    kept.write_bytes(ae_file.read_bytes())
    flags = ["--dataset", digits_folder, *faults.TRAIN, "--epochs", 30, "--checkpoint-every", 1, "--num-workers", 2]
    command = ["-m", "ldm_ray.train", *flags, "--ae-ckpt", kept, "--outdir", root]
    with two_nodes() as cluster:
        process = faults.start(cluster.address, *command)
        faults.wait_for(lambda: len(recorded(root)) > 1, process)
        faults.lose_all(cluster)
        told = faults.finish(process, 2)
        assert "training failed" in told and "--auto-resume" in told and "Traceback" not in told
    first = len(recorded(root))
    with two_nodes() as cluster:
        process = faults.start(cluster.address, *command, "--auto-resume")
        faults.wait_for(lambda: len(recorded(root)) > first, process)
        process.send_signal(signal.SIGINT)
        assert "going on with" in faults.finish(process, 130)
        second = len(recorded(root))
        faults.finish(faults.start(cluster.address, *command, "--auto-resume"))
        beside = ["--ae-ckpt", ae_file, "--outdir", tmp_path / "disk"]
        faults.finish(faults.start(cluster.address, "-m", "ldm_ray.train", *flags, *beside))
    assert 1 < first < second < 30 and recorded(root) == recorded(tmp_path / "disk") == list(range(1, 31))
    run = next(root.glob("checkpoints/*/latest.pt")).parent.name
    there, _ = checkpoint.read(root / "checkpoints" / run / "latest.pt")
    here, _ = checkpoint.read(next((tmp_path / "disk").glob("checkpoints/*/latest.pt")))
    for part in ("model", "ema"):
        assert all(torch.equal(there[part][name], here[part][name]) for name in here[part])
    assert (root / "logs" / f"{run}.log").read_text().count("/30  train ") == 30
    assert list(root.glob(f"runs/{run}/events.out.tfevents.*"))
    faults.finish(faults.start("local", "-m", "ldm_ray.infer", "--outdir", root, "--output", tmp_path / "x.png"))
    assert (tmp_path / "x.png").stat().st_size > 1000


@pytest.mark.slow
def test_training_into_gcs_goes_on_from_there(gcs: str, digits_folder: Path, ae_file: Path, tmp_path: Path) -> None:
    flags = ["--dataset", digits_folder, *faults.TRAIN, "--ae-ckpt", ae_file, "--outdir", gcs]
    faults.finish(faults.start("local", "-m", "ldm_ray.train", *flags, "--epochs", 2))
    again = faults.start("local", "-m", "ldm_ray.train", *flags, "--epochs", 3, "--auto-resume")
    assert "after epoch 2, step 0" in faults.finish(again)
    assert recorded(to_path(gcs)) == [1, 2, 3]


@pytest.mark.slow
def test_workers_write_to_s3_what_they_write_to_a_disk(bucket: str, ae_file: Path, tmp_path: Path) -> None:
    ckpt, where = busy_checkpoint(tmp_path / "latest.pt", ae_file), str(to_path(bucket) / "set")
    finish(start("--ckpt", ckpt, *FLAGS, "--outdir", tmp_path / "set"))
    finish(start("--ckpt", ckpt, *FLAGS, "--outdir", where, "--num-workers", 2))
    store = Store(where)
    names = sorted(str(f.relative_to(tmp_path / "set")) for f in (tmp_path / "set" / "data").iterdir())
    assert len(names) == 4
    for name in [*names, "SHA256SUMS"]:
        assert store.read(name) == (tmp_path / "set" / name).read_bytes()
    store.fs.delete_file(store.path(names[2]))  # as if its upload had not been completed
    assert "3 of 4 shards there" in finish(start("--ckpt", ckpt, *FLAGS, "--outdir", where))
    assert store.read(names[2]) == (tmp_path / "set" / names[2]).read_bytes()
