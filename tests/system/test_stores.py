"""Training and ``generate`` on Ray into object stores: real S3 and GCS servers on this machine."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ldm_ray.checkpoints import checkpoint
from ldm_ray.files.paths import AnyPath, RemotePath, append_line, to_path
from ldm_ray.files.store import Store
from ldm_ray.service.service import Service
from ldm_ray.service.settings import Settings, check
from ldm_ray.settings.errors import CheckpointError, DataError
from tests.helpers.checkpoints import write_small_checkpoint
from tests.helpers.commands import run
from tests.helpers.ports import free_port
from tests.helpers.runs import SMALL, epochs

FLAGS = ["--seeds", "0-199", "--shard-size", "50", "--device", "cpu", "--num-inference-steps", "4"]


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


def test_the_service_takes_its_checkpoint_from_a_store(bucket: str, ae_file: Path, tmp_path: Path) -> None:
    """As ``serve run serve.app:deployment ckpt=s3://…/best.pt`` does, in this process."""
    root = to_path(bucket) / "served"
    local = write_small_checkpoint(tmp_path / "best.pt", ae_file)
    (root / "best.pt").write_bytes(local.read_bytes())
    settings = Settings(ckpt=str(root / "best.pt"), outdir=str(root), threads=1, device="cpu").resolved()
    assert settings.ckpt and settings.outdir
    check(settings.ckpt, settings.ae_ckpt, settings.outdir)
    service = Service(settings)
    try:
        served = service.library.default
        assert served.name == "best" and served.describe(settings)["sha256"] == checkpoint.file_sha256(local)
    finally:
        service.close()


def recorded(out: AnyPath) -> list[int]:
    return [line["epoch"] for line in epochs(out)]


def test_training_into_gcs_goes_on_from_there(
    ray_here: None, gcs: str, digits_folder: Path, ae_file: Path, tmp_path: Path
) -> None:
    flags = ["--dataset", digits_folder, *SMALL, "--ae-ckpt", ae_file, "--outdir", gcs]
    run("train", *flags, "--epochs", 2)
    assert "after epoch 2, step 0" in run("train", *flags, "--epochs", 3, "--auto-resume")
    assert recorded(to_path(gcs)) == [1, 2, 3]


def test_workers_write_to_s3_what_they_write_to_a_disk(
    ray_here: None, bucket: str, ae_file: Path, tmp_path: Path
) -> None:
    ckpt = write_small_checkpoint(tmp_path / "latest.pt", ae_file)
    flags, folder, uri = ["--ckpt", ckpt, *FLAGS], tmp_path / "set", str(to_path(bucket) / "set")
    run("generate", *flags, "--outdir", folder)
    run("generate", *flags, "--outdir", uri, "--num-workers", 2)
    store = Store(uri)
    names = sorted(str(file.relative_to(folder)) for file in (folder / "data").iterdir())
    assert len(names) == 4
    for name in [*names, "SHA256SUMS"]:
        assert store.read(name) == (folder / name).read_bytes()
    store.fs.delete_file(store.path(names[2]))  # as if its upload had not been completed
    assert "3 of 4 shards there" in run("generate", *flags, "--outdir", uri)
    assert store.read(names[2]) == (folder / names[2]).read_bytes()
