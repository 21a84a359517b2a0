"""What every request passes before its route: id, token, size and type of the body; and what is logged after it."""

import asyncio
import base64
import binascii
import contextlib
import hmac
import json
import logging
import time
from collections.abc import MutableMapping
from typing import Any

from serve.errors import ApiError, internal
from serve.service import Service

SLOW_S = 1.0  # requests that fail or take longer are logged at INFO, the others at DEBUG
CHALLENGES = ("Bearer", 'Basic realm="ldm_ray"')  # the second is for browsers; a header each, or they do not read it
DRAIN_S, DRAIN_BODIES = 2.0, 8  # how long, and how many times the longest body, a refused body is read on
OPEN_PATHS = ("/health", "/ready")
log = logging.getLogger("ray.serve")


class Gate:
    """ASGI middleware."""

    def __init__(self, app: Any, service: Service, json_paths: frozenset[str]) -> None:
        """json_paths: the addresses that take a body, which is JSON."""
        self.app, self.service, self.json_paths = app, service, json_paths

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {key.decode("latin-1").lower(): value.decode("latin-1") for key, value in scope["headers"]}
        mark = headers.get("x-request-id", "")[:64]  # Serve's proxy gives every request one, and answers with it
        scope.setdefault("state", {})
        started, status = time.perf_counter(), 499  # the client went away

        async def answer(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-content-type-options", b"nosniff")]
            await send(message)

        try:
            try:
                self.check(scope, headers)
            except ApiError:
                await self.drain(receive)
                raise
            if scope["method"] == "POST" and scope["path"] in self.json_paths:
                receive = await self.whole(receive)
            await self.app(scope, receive, answer)
        except ApiError as error:
            if status == 499:
                response = error.response()
                for challenge in CHALLENGES if error.status == 401 else ():
                    response.headers.append("WWW-Authenticate", challenge)
                await response(scope, receive, answer)
        except Exception as error:
            if status != 499:
                raise
            await internal(error).response()(scope, receive, answer)
        finally:
            self.told(scope, status, time.perf_counter() - started, mark)

    def check(self, scope: dict[str, Any], headers: dict[str, str]) -> None:
        """ApiError 401, 413, 415."""
        token = self.service.settings.token
        if token and scope["path"] not in OPEN_PATHS and not has_token(headers.get("authorization", ""), token):
            raise ApiError(401, "a valid bearer token is needed")
        if scope["method"] != "POST" or scope["path"] not in self.json_paths:
            return
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length[:20]) > self.service.settings.max_body:
            raise self.too_large()
        kind = headers.get("content-type", "").split(";")[0].strip().lower()
        if kind != "application/json":
            raise ApiError(415, "the body is application/json", "Content-Type")

    def too_large(self) -> ApiError:
        return ApiError(413, f"a body is at most {self.service.settings.max_body:,} bytes")

    async def whole(self, receive: Any) -> Any:
        """A ``receive`` that begins with the whole body. ApiError 413 when it is too long."""
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] != "http.request":
                raise ApiError(400, "the client went away")
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > self.service.settings.max_body:
                await self.drain(receive)
                raise self.too_large()
        first: list[dict[str, Any]] = [{"type": "http.request", "body": body, "more_body": False}]

        async def take() -> dict[str, Any]:
            return first.pop() if first else await receive()

        return take

    async def drain(self, receive: Any) -> None:
        """Read on, and drop it: a client that is still sending when the connection is closed never sees the answer."""

        async def drop() -> None:
            size, message = 0, await receive()
            while message["type"] == "http.request" and message.get("more_body") and size < DRAIN_BODIES * limit:
                message = await receive()
                size += len(message.get("body", b""))

        limit = self.service.settings.max_body
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(drop(), DRAIN_S)

    def told(self, scope: dict[str, Any], status: int, seconds: float, mark: str) -> None:
        route = getattr(scope.get("route"), "path", "other")
        metrics = self.service.metrics
        metrics.requests.labels(route, str(status)).inc()
        metrics.latency.labels(route).observe(seconds)
        if status in (400, 401, 408, 413, 415, 429, 503):
            metrics.refused.labels(str(status)).inc()
        if route in (*OPEN_PATHS, "/metrics"):
            return
        line = {"id": mark, "method": scope["method"], "route": route, "status": status, "ms": round(seconds * 1e3, 1)}
        level = logging.INFO if status >= 400 or seconds > SLOW_S else logging.DEBUG
        if log.isEnabledFor(level):
            log.log(level, json.dumps(line | scope.get("state", {}).get("told", {})))


def has_token(authorization: str, token: str) -> bool:
    """``Bearer token``, or ``Basic`` with the token as password, which browsers ask for."""
    scheme, _, value = authorization.partition(" ")
    value = value.strip()
    if scheme.lower() == "basic":
        try:
            value = base64.b64decode(value, validate=True).decode().partition(":")[2]
        except (binascii.Error, ValueError):
            return False
    elif scheme.lower() != "bearer":
        return False
    return hmac.compare_digest(value.encode(), token.encode())
