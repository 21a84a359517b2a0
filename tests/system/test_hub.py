"""The real loading code of a hub dataset, against a small hub of the test's own on loopback."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import pyarrow.parquet as pq
import pytest

SHA = "0123456789abcdef0123456789abcdef01234567"
LOAD = """
import sys, time
from pathlib import Path
from ldm_ray.data.sources import load_source
started = time.perf_counter()
source = load_source(sys.argv[1], "train", Path(sys.argv[2]))
print(source.name, source.revision, len(source), source.table["label"].to_pylist()[:5])
print("|".join(source.class_names), source.image_size)
"""


class Hub(http.server.BaseHTTPRequestHandler):
    """Answers what the hub's client asks for one dataset, whose files lie in ``folder``."""

    folder: Path
    name = "ylecun/mnist"

    def log_message(self, *_: Any) -> None: ...

    def reply(self, body: bytes, kind: str = "application/json", **headers: str) -> None:
        self.send_response(200)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def entries(self) -> list[dict[str, Any]]:
        return [
            {"type": "file", "path": f"mnist/{file.name}", "size": file.stat().st_size, "oid": oid(file)}
            for file in sorted(self.folder.iterdir())
        ]

    def do_GET(self) -> None:
        path = unquote(urlparse(self.path).path)
        if re.fullmatch(rf"/api/datasets/{self.name}(/revision/({SHA}|main))?", path):
            names = [{"rfilename": entry["path"]} for entry in self.entries()]
            info = {"id": self.name, "sha": SHA, "private": False, "tags": [], "siblings": names, "downloads": 0}
            self.reply(json.dumps(info).encode())
        elif match := re.fullmatch(rf"/api/datasets/{self.name}/tree/{SHA}(?:/(.+))?", path):
            folder = {"type": "directory", "path": "mnist", "size": 0, "oid": "0" * 40}
            recursive = "recursive=true" in self.path.lower()
            inside = match[1] == "mnist"
            shown = self.entries() if inside or recursive else []
            self.reply(json.dumps(shown if inside else [folder, *shown]).encode())
        elif (match := re.fullmatch(rf"/datasets/{self.name}/resolve/{SHA}/mnist/(.+)", path)) and (
            file := self.folder / match[1]
        ).is_file():
            self.reply(file.read_bytes(), "application/octet-stream", ETag=f'"{oid(file)}"', X_Repo_Commit=SHA)
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound" if "/resolve/" in path else "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

    do_HEAD = do_GET

    def do_POST(self) -> None:
        asked = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        wanted = [entry for entry in self.entries() if entry["path"] in unquote(asked)]
        self.reply(json.dumps(wanted).encode())


def oid(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


@contextmanager
def serving(folder: Path, name: str = Hub.name) -> Iterator[str]:
    """The hub's address."""
    handler = type("DigitsHub", (Hub,), {"folder": folder, "name": name})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def hub(digits_folder: Path) -> Iterator[str]:
    with serving(digits_folder) as address:
        yield address


def load(name: str, cache: Path, endpoint: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(cache / "home"), "HF_HUB_DISABLE_XET": "1"}
    environment["NO_PROXY"] = "127.0.0.1"
    code = [sys.executable, "-c", LOAD, name, str(cache)]
    return subprocess.run(code, env=environment, capture_output=True, text=True, timeout=90)


def test_hub_dataset_then_its_cache(hub: str, tmp_path: Path, digits_folder: Path) -> None:
    count = str(pq.read_metadata(next(digits_folder.glob("train-*"))).num_rows)
    for name in ("auto", "ylecun/mnist"):
        done = load(name, tmp_path, hub)
        assert done.stdout.split()[:3] == ["ylecun/mnist", SHA, count], done.stderr
    away = load("ylecun/mnist", tmp_path, "http://127.0.0.1:9")
    assert away.stdout.split()[0::2][:2] == ["ylecun/mnist", count], away.stderr


def test_another_dataset_with_the_names_of_its_classes(tmp_path: Path, digits_folder: Path) -> None:
    folder, names = tmp_path / "files", [f"class {i}" for i in range(12)]
    folder.mkdir()
    features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
    for file in digits_folder.iterdir():
        table = pq.read_table(file)
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
        pq.write_table(table, folder / file.name)
    with serving(folder, "someone/garments") as address:
        done = load("someone/garments", tmp_path / "cache", address)
    assert done.stdout.splitlines()[-1] == f"{'|'.join(names)} (28, 28)", done.stderr


def test_unknown_dataset_is_one_line(hub: str, tmp_path: Path) -> None:
    done = load("someone/nothing", tmp_path, hub)
    assert "the hub has no such dataset" in done.stderr.splitlines()[-1]


def test_unreachable_hub(tmp_path: Path) -> None:
    done = load("ylecun/mnist", tmp_path, "http://127.0.0.1:9")
    assert "the hub cannot be reached and nothing of it is cached" in done.stderr.splitlines()[-1]
    done = load("auto", tmp_path, "http://127.0.0.1:9")
    assert done.stdout.split()[0] == "digits" and "EMBEDDED DIGITS" in done.stderr
