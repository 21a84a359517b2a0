"""Bodies of requests: their type, how long they are, and how long they take to come."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from ldm_ray.engine.schema import EXAMPLE
from ldm_ray.service.errors import ApiError, invalid

DRAIN_S, DRAIN_BODIES = 2.0, 8  # how long, and how many times the longest body, a refused body is read on
AWAITED = 1024  # bodies that may be on their way at once; the one that has taken longest makes room
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]


class Bodies:
    """Reads bodies whole; half-sent ones shut nobody out."""

    def __init__(self, limit: int, seconds: float) -> None:
        """limit: bytes of the longest. seconds: by then it must have come."""
        self.limit, self.seconds = limit, seconds
        self.awaited: dict[asyncio.Task[Any], Callable[[], None]] = {}  # in the order in which they began

    def check(self, headers: dict[str, str]) -> None:
        """ApiError, by the headers alone: 400 for an empty body, 413, 415."""
        length = headers.get("content-length", "")
        if length.isdigit() and int(length[:20]) > self.limit:
            raise self.too_large()
        if not length.strip("0") and "transfer-encoding" not in headers:
            raise empty()
        coding = headers.get("content-encoding", "").strip().lower()
        if coding not in ("", "identity"):
            raise compressed(coding)
        kind = headers.get("content-type", "").split(";")[0].strip().lower()
        if kind != "application/json":
            raise ApiError(415, f"the body must be JSON, sent with Content-Type: application/json{said(kind)}")

    def too_large(self) -> ApiError:
        return ApiError(413, f"a body is at most {self.limit:,} bytes")

    async def whole(self, receive: Receive) -> Receive:
        """A ``receive`` that begins with the whole body. ApiError: 408 where it does not come in time, 413, 400 where
        there is none, 415 where it is compressed."""
        body, complete = await self.read(receive, self.limit + 1)
        if len(body) > self.limit:
            if not complete:
                await self.drain(receive)
            raise self.too_large()
        if not body.strip():
            raise empty()
        if body[:2] == b"\x1f\x8b":
            raise compressed("gzip")
        return resumed(body, complete, receive)

    async def read(self, receive: Receive, enough: int) -> tuple[bytes, bool]:
        """(a body, or as much of it as is enough; whether that is all). ApiError 408 where it does not come in time."""
        task, expired = asyncio.current_task(), False
        assert task is not None

        def expire() -> None:
            nonlocal expired
            expired = True
            task.cancel()

        timer = asyncio.get_running_loop().call_later(self.seconds, expire)
        if len(self.awaited) >= AWAITED:
            self.awaited.pop(next(iter(self.awaited)))()
        self.awaited[task] = expire
        body, complete = bytearray(), False
        try:
            while not complete and len(body) < enough:
                message = await receive()
                if message["type"] != "http.request":
                    raise ApiError(400, "the client went away")
                body += message.get("body", b"")
                complete = not message.get("more_body", False)
        except asyncio.CancelledError:
            if not expired:
                raise
            if hasattr(task, "uncancel"):
                task.uncancel()
            reason = f"the body did not come within {self.seconds:g} s: send it at once, or a smaller one"
            raise ApiError(408, reason, code="body_timeout", headers={"Connection": "close"}) from None
        finally:
            timer.cancel()
            self.awaited.pop(task, None)
        return bytes(body), complete

    async def drain(self, receive: Receive) -> None:
        """Read on, and drop it: a client that is still sending when the connection is closed never sees the answer."""

        async def drop() -> None:
            size, message = 0, await receive()
            while message["type"] == "http.request" and message.get("more_body") and size < DRAIN_BODIES * self.limit:
                message = await receive()
                size += len(message.get("body", b""))

        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(drop(), DRAIN_S)


def resumed(body: bytes, complete: bool, receive: Receive) -> Receive:
    """A ``receive`` that begins with what was read already."""
    first: list[dict[str, Any]] = [{"type": "http.request", "body": body, "more_body": not complete}]

    async def take() -> MutableMapping[str, Any]:
        return first.pop() if first else await receive()

    return take


def empty() -> ApiError:
    return invalid(None, f"the body is empty: send a JSON object, such as {EXAMPLE}", "empty_body")


def compressed(coding: str) -> ApiError:
    message = f"the body is compressed ({coding[:20]}): send the JSON as it is, without Content-Encoding"
    return ApiError(415, message, "Content-Encoding")


def said(kind: str) -> str:
    return f", not {kind[:100]}" if kind else ""
