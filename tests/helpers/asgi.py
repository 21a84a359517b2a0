"""The service's application in-process: no Ray, no server, no port."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI

from ldm_ray.service.routes import build
from ldm_ray.service.service import Service
from ldm_ray.service.settings import Settings

T = TypeVar("T")
POST = "/v1/images/generations"


@dataclass
class Answer:
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        error = self.json["error"]
        assert set(error) == {"message", "type", "param", "code"} and error["message"]
        return error


@dataclass(frozen=True)
class InProcess:
    service: Service
    app: FastAPI
    loop: asyncio.AbstractEventLoop

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """All of a service's requests are in one event loop."""
        return self.loop.run_until_complete(work)

    async def send(
        self,
        path: str = POST,
        body: Any = None,
        method: str | None = None,
        parts: list[bytes] | None = None,
        root: str = "",
        **headers: str,
    ) -> Answer:
        """One request; a dict goes as JSON, bytes as they are. parts: the body comes as these, and does not end."""
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        fields = {name.replace("_", "-"): value for name, value in headers.items()}
        if data is not None or parts is not None:
            fields = {"content-type": "application/json", "content-length": str(len(data or b"") or 0)} | fields
        if parts is not None:
            fields["content-length"] = "100"
        messages = [{"type": "http.request", "body": part, "more_body": True} for part in parts or []]
        if parts is None:
            messages = [{"type": "http.request", "body": data or b"", "more_body": False}]
        answer = Answer()

        async def receive() -> dict[str, Any]:
            if messages:
                return messages.pop(0)
            await asyncio.Event().wait()
            raise AssertionError

        async def send(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                answer.status = message["status"]
                answer.headers = {key.decode().lower(): value.decode() for key, value in message["headers"]}
            else:
                answer.body += message.get("body", b"")

        address, _, query = path.partition("?")
        scope: dict[str, Any] = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "scheme": "http"}
        scope |= {"method": method or ("GET" if data is None and parts is None else "POST"), "path": root + address}
        scope |= {"raw_path": address.encode(), "query_string": query.encode(), "root_path": root}
        scope |= {"headers": [(key.encode(), value.encode("latin-1")) for key, value in fields.items()]}
        scope |= {"client": ("127.0.0.1", 1), "server": ("127.0.0.1", 1), "state": {}}
        await self.app(scope, receive, send)  # type: ignore[arg-type]
        return answer

    def ask(self, path: str = POST, body: Any = None, **more: Any) -> Answer:
        return self.run(self.send(path, body, **more))


@contextmanager
def in_process(ckpt: Path, **settings: Any) -> Iterator[InProcess]:
    """A service of one checkpoint and of those beside it."""
    service = Service(Settings(ckpt=str(ckpt), device="cpu", threads=1, drain_s=0, **settings))
    loop = asyncio.new_event_loop()
    try:
        yield InProcess(service, build(service), loop)
    finally:
        service.close()
        loop.close()
