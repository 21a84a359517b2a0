"""What is put into Ray's proxy, in-process."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from ldm_ray.service.proxy import ENOUGH, Front, middlewares


def answer(status: int, kind: bytes, body: bytes) -> list[dict[str, Any]]:
    fields = [(b"content-type", kind), (b"content-length", str(len(body)).encode())]
    return [
        {"type": "http.response.start", "status": status, "headers": fields},
        {"type": "http.response.body", "body": body},
    ]


def through(
    messages: list[dict[str, Any]], path: str = "/", headers: list[tuple[bytes, bytes]] | None = None
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(what the client is sent, the scope that the proxy sees)"""
    seen: dict[str, Any] = {}
    sent: list[dict[str, Any]] = []

    async def proxy(scope: dict[str, Any], receive: Any, send: Any) -> None:
        seen.update(scope)
        for message in messages:
            await send(message)

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    (middleware,) = middlewares()
    made: Any = middleware.cls
    app = made(proxy)
    asyncio.run(app({"type": "http", "path": path, "headers": headers or []}, None, send))
    return sent, seen


def test_the_proxys_own_errors_are_json() -> None:
    for status in (404, 408, 429, 500, 503):
        start, body = through(answer(status, b"text/plain", b"Path not found"))[0]
        headers = dict(start["headers"])
        assert start["status"] == status and headers[b"content-type"] == b"application/json"
        assert headers[b"content-length"] == str(len(body["body"])).encode()
        error = json.loads(body["body"])["error"]
        assert set(error) == {"message", "type", "param", "code"} and "Path not" not in error["message"]
        assert (b"retry-after" in headers) == (status in (429, 503))


def test_everything_else_passes_as_it_is() -> None:
    json_error = answer(404, b"application/json", b"{}")
    for messages, path in (
        (json_error, "/"),
        (answer(200, b"text/plain", b"fine"), "/"),
        (answer(503, b"text/plain", b"draining"), "/-/healthz"),
    ):
        assert through(messages, path)[0] == messages


def test_a_body_goes_on_as_it_came_and_half_of_one_does_not() -> None:
    seen: list[bytes] = []
    sent: list[dict[str, Any]] = []

    async def proxy(scope: dict[str, Any], receive: Any, send: Any) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message["body"], message["more_body"]
        seen.append(body)

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    front = Front(proxy)
    front.bodies.seconds = 0.1
    scope = {"type": "http", "path": "/", "headers": [(b"content-length", b"9")]}
    for parts, more in (([b"abc", b"def"], False), ([b"x" * ENOUGH, b"y" * 10, b"z"], False), ([b"abc"], True)):
        messages = [{"type": "http.request", "body": part, "more_body": True} for part in parts]
        messages[-1]["more_body"] = more

        async def receive(messages: list[dict[str, Any]] = messages) -> dict[str, Any]:
            return messages.pop(0) if messages else await asyncio.Event().wait()  # type: ignore[return-value]

        asyncio.run(front(dict(scope), receive, send))
    assert seen == [b"abcdef", b"x" * ENOUGH + b"y" * 10 + b"z"]
    assert sent[0]["status"] == 408 and json.loads(sent[1]["body"])["error"]["code"] == "body_timeout"


def test_a_client_does_not_switch_the_proxys_deadline_or_cancelling() -> None:
    headers = [(b"X-Request-Timeout-Seconds", b"0.001"), (b"x-request-disconnect-disabled", b"?1"), (b"a", b"b")]
    assert through([], headers=headers)[1]["headers"] == [(b"a", b"b")]
