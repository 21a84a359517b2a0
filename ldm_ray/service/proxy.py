"""Serve's HTTP proxy, as far as Ray lets it be changed.

Its own errors become JSON, clients do not turn its switches, and half-sent bodies get no further than here: a request
costs the proxy ten times as much once it goes to a replica. RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=
ldm_ray.service.proxy:middlewares in the environment where Ray starts puts it there.
"""

from collections.abc import MutableMapping
from typing import Any

from starlette.middleware import Middleware

from ldm_ray.service.bodies import Bodies, resumed
from ldm_ray.service.errors import ApiError
from ldm_ray.service.settings import Settings

CALLBACK = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH", "ldm_ray.service.proxy:middlewares"
ENOUGH = 65_536  # bytes of a body that are awaited here
SWITCHES = (b"x-request-timeout-seconds", b"x-request-disconnect-disabled")
MESSAGES = {
    404: "no application answers here: it may still be starting",
    408: "the proxy's own deadline (request_timeout_s) came first",
    429: "there are too many requests; try again",
    500: "the replica died; try again",
    503: "no replica is ready; try again",
}


def middlewares() -> list[Middleware]:
    return [Middleware(Front)]


class Front:
    """ASGI middleware of the proxy."""

    def __init__(self, app: Any) -> None:
        self.app = app
        self.bodies = Bodies(ENOUGH, Settings.model_fields["body_s"].default)

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["path"].startswith("/-/"):  # what Ray asks itself
            await self.app(scope, receive, send)
            return
        scope["headers"] = [(name, value) for name, value in scope["headers"] if name.lower() not in SWITCHES]
        replaced = False

        async def answer(message: MutableMapping[str, Any]) -> None:
            nonlocal replaced
            if message["type"] == "http.response.start":
                kind = dict(message.get("headers", ())).get(b"content-type", b"")
                error = None if kind.startswith(b"application/json") else error_of(message["status"])
                if error is not None:
                    replaced = True
                    response = error.response()
                    message["headers"] = [*kept(message), *response.raw_headers]
                    await send(message)
                    await send({"type": "http.response.body", "body": response.body})
                    return
            if not replaced:
                await send(message)

        fields = dict(scope["headers"])
        if fields.get(b"content-length", b"").strip(b"0") or b"transfer-encoding" in fields:
            try:
                body, complete = await self.bodies.read(receive, ENOUGH)
            except ApiError as error:
                await error.response()(scope, receive, send)
                return
            receive = resumed(body, complete, receive)
        await self.app(scope, receive, answer)


def error_of(status: int) -> ApiError | None:
    """What is said in place of the proxy's text; None where it is no error of the proxy."""
    if status not in MESSAGES:
        return None
    return ApiError(status, MESSAGES[status], headers={"Retry-After": "1"} if status in (429, 503) else None)


def kept(message: MutableMapping[str, Any]) -> list[tuple[bytes, bytes]]:
    """The fields that do not speak of the body."""
    return [(name, value) for name, value in message.get("headers", ()) if not name.startswith(b"content-")]
