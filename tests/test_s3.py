"""``generate`` on Ray into an object store: a real S3 server on this machine (moto's)."""

from __future__ import annotations

import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from served import free_port
from test_generate import busy_checkpoint, finish, start

from ldm_ray.dataset.store import Store

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
        yield f"s3://bucket/set?scheme=http&region=us-east-1&endpoint_override=127.0.0.1:{port}"
    finally:
        patch.undo()
        server.terminate()
        server.wait(30)


@pytest.mark.slow
def test_workers_write_to_s3_what_they_write_to_a_disk(bucket: str, ae_file: Path, tmp_path: Path) -> None:
    ckpt = busy_checkpoint(tmp_path / "latest.pt", ae_file)
    finish(start("--ckpt", ckpt, *FLAGS, "--outdir", tmp_path / "set"))
    finish(start("--ckpt", ckpt, *FLAGS, "--outdir", bucket, "--num-workers", 2))
    store = Store(bucket)
    names = sorted(str(f.relative_to(tmp_path / "set")) for f in (tmp_path / "set" / "data").iterdir())
    assert len(names) == 4
    for name in [*names, "SHA256SUMS"]:
        assert store.read(name) == (tmp_path / "set" / name).read_bytes()
    store.fs.delete_file(store.path(names[2]))  # as if its upload had not been completed
    assert "3 of 4 shards there" in finish(start("--ckpt", ckpt, *FLAGS, "--outdir", bucket))
    assert store.read(names[2]) == (tmp_path / "set" / names[2]).read_bytes()
