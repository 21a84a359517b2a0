"""System tests: real Ray, real servers, a real browser, real kills."""

from __future__ import annotations

import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator

import pytest

from ldm_ray.distributed.cluster import connected
from tests.helpers.commands import none_left
from tests.helpers.ports import free_port
from tests.helpers.service import server as server


@pytest.fixture(scope="session")
def store_credentials() -> Iterator[None]:
    """What the tests' S3 takes; Ray's workers have the environment in which their Ray was started."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"ACCESS_KEY_ID": "a", "SECRET_ACCESS_KEY": "b", "EC2_METADATA_DISABLED": "true"}.items():
            patch.setenv(f"AWS_{name}", value)
        yield


@pytest.fixture(scope="session")
def bucket(store_credentials: None) -> Iterator[str]:
    """The URI of an empty bucket, up to its query."""
    pytest.importorskip("moto.server")
    port = free_port()
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        request = urllib.request.Request(f"http://127.0.0.1:{port}/bucket", method="PUT")
        for _ in range(120):
            try:
                urllib.request.urlopen(request, timeout=5)
                break
            except OSError:
                time.sleep(0.5)
        yield f"s3://bucket/tests?scheme=http&region=us-east-1&endpoint_override=127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(30)


@pytest.fixture(scope="session")
def ray_here(store_credentials: None) -> Iterator[None]:
    """The Ray of this process, which every command that ``commands.run`` runs here joins."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        with connected():
            yield


@pytest.fixture(autouse=True)
def ended() -> Iterator[None]:
    with none_left():
        yield
