"""One real ``serve run`` for all tests of the service, on a port of its own, and a way to ask it."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from ldm_ray.engine.generator import Generator
from ldm_ray.service.proxy import CALLBACK
from tests.helpers.checkpoints import write_checkpoint, write_pixels
from tests.helpers.commands import kill
from tests.helpers.data import ROOT
from tests.helpers.ports import free_port

TOKEN = "a-secret-of-the-tests"
MAX_IMAGES = 2000
DEADLINE_S = 2
POST = "/v1/images/generations"


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        assert self.headers["content-type"] == "application/json", self.body[:300]
        error = self.json["error"]
        assert set(error) == {"message", "type", "param", "code"} and error["message"]
        assert "Traceback" not in error["message"] and str(ROOT) not in error["message"]
        return error


@dataclass(frozen=True)
class Server:
    port: int
    ckpt: Path
    generator: Generator
    config: Path
    log: Path

    @property
    def dashboard(self) -> str:
        """The address of Ray's."""
        match = re.search(r"dashboard at .*?(http://127\.0\.0\.1:\d+)", self.log.read_text())
        assert match, self.log.read_text()[-2000:]
        return match[1]

    def ask(
        self, path: str, body: Any = None, token: str | None = TOKEN, method: str | None = None, **headers: str
    ) -> Answer:
        """One request; a dict goes as JSON, bytes as they are."""
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        fields = {name.replace("_", "-"): value for name, value in headers.items()}
        if data is not None:
            fields.setdefault("content-type", "application/json")
        if token:
            fields["authorization"] = f"Bearer {token}"
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data, fields, method=method)
        try:
            with urllib.request.urlopen(request, timeout=100) as answer:
                return Answer(answer.status, {k.lower(): v for k, v in answer.headers.items()}, answer.read())
        except urllib.error.HTTPError as error:
            return Answer(error.code, {k.lower(): v for k, v in error.headers.items()}, error.read())

    def images(self, **body: Any) -> np.ndarray:
        answer = self.ask(POST, body, accept="application/x-npy")
        assert answer.status == 200, answer.body
        return np.load(io.BytesIO(answer.body))

    def metric(self, name: str) -> float:
        lines = self.ask("/metrics").body.decode().splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(f"{name}{{"))


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, ae_file: Path) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("served")
    runs = [folder / "checkpoints" / f"latent-diffusion-{name}" / "latest.pt" for name in ("broken", "other", "main")]
    runs[0].parent.mkdir(parents=True)
    runs[0].write_bytes(b"no checkpoint")
    write_checkpoint(runs[1], ae_file, shift=0.1)
    write_checkpoint(runs[2], ae_file)
    write_pixels(folder / "checkpoints" / "pixel-diffusion-small" / "latest.pt")
    port, config = free_port(), folder / "config.json"
    arguments = {
        "outdir": str(folder),
        "token": TOKEN,
        "threads": 2,
        "max_images": MAX_IMAGES,
        "deadline_s": DEADLINE_S,
    }
    arguments |= {"ckpt": str(runs[2]), "max_body": 1_000_000}
    application = {"name": "images", "route_prefix": "/", "import_path": "serve.app:deployment", "args": arguments}
    config.write_text(json.dumps({"http_options": {"host": "127.0.0.1", "port": port}, "applications": [application]}))
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path, "RAY_ADDRESS": "local", "RAY_USAGE_STATS_ENABLED": "0"}
    environment |= dict([CALLBACK])
    log = folder / "log"
    command = [sys.executable, "-m", "ray.serve.scripts", "run", str(config)]
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=stream, stderr=stream, start_new_session=True
        )
    running = Server(port, runs[2], Generator.open(runs[2]), config, log)
    try:
        for _ in range(240):
            assert process.poll() is None, log.read_text()[-3000:]
            try:
                if running.ask("/ready").status == 200:
                    break
            except OSError:
                pass
            time.sleep(0.5)
        else:
            pytest.fail(log.read_text()[-3000:])
        yield running
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            kill(psutil.Process(process.pid))
            process.wait()
