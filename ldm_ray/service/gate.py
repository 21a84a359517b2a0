"""What every request passes before its route: id, token, size and type of the body; and what is logged after it."""

import base64
import binascii
import hmac
import json
import logging
import time
from collections.abc import MutableMapping
from typing import Any

from starlette.responses import Response

from ldm_ray.service.bodies import Bodies
from ldm_ray.service.cors import PREFLIGHT, Origins
from ldm_ray.service.errors import ApiError, internal
from ldm_ray.service.service import Service

SLOW_S = 1.0  # requests that fail or take longer are logged at INFO, the others at DEBUG
CHALLENGES = ("Bearer", 'Basic realm="ldm_ray"')  # the second is for browsers; a header each, or they do not read it
OPEN_PATHS = ("/health", "/ready")
log = logging.getLogger("ray.serve")


class Gate:
    """ASGI middleware."""

    def __init__(self, app: Any, service: Service, json_paths: frozenset[str]) -> None:
        """json_paths: the addresses that take a body, which is JSON."""
        self.app, self.service, self.json_paths = app, service, json_paths
        self.bodies = Bodies(service.settings.max_body, service.settings.body_s)
        self.origins = Origins(service.settings.cors)

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {key.decode("latin-1").lower(): value.decode("latin-1") for key, value in scope["headers"]}
        mark = headers.get("x-request-id", "")[:64]  # Serve's proxy gives every request one, and answers with it
        scope.setdefault("state", {})
        head = scope["method"] == "HEAD"
        if head:
            scope["method"] = "GET"  # the same answer, without its body
        fields = [(b"x-content-type-options", b"nosniff"), *self.origins.fields(headers.get("origin"))]
        started, status = time.perf_counter(), 499  # the client went away

        async def answer(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), *fields]
            elif head and message["type"] == "http.response.body":
                message["body"] = b""
            await send(message)

        try:
            if self.origins.is_preflight(scope["method"], headers, headers.get("origin")):
                await answer({"type": "http.response.start", "status": 204, "headers": PREFLIGHT})
                await answer({"type": "http.response.body", "body": b""})
                return
            if scope.get("root_path") and scope["path"] == scope["root_path"]:  # the page's links begin at its folder
                where = {"Location": f"{scope['path'].rpartition('/')[2]}/"}
                await Response(None, 307, where)(scope, receive, answer)
                return
            takes_json = scope["method"] == "POST" and path_of(scope) in self.json_paths
            try:
                self.check_token(path_of(scope), headers.get("authorization", ""))
                if takes_json:
                    self.bodies.check(headers)
            except ApiError:
                await self.bodies.drain(receive)
                raise
            await self.app(scope, await self.bodies.whole(receive) if takes_json else receive, answer)
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

    def check_token(self, path: str, authorization: str) -> None:
        """ApiError 401."""
        token = self.service.settings.token
        if token and path not in OPEN_PATHS and not has_token(authorization, token):
            raise ApiError(401, "a valid bearer token is needed: send Authorization: Bearer TOKEN")

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


def path_of(scope: dict[str, Any]) -> str:
    """The address below the application's route prefix."""
    path, root = str(scope["path"]), str(scope.get("root_path") or "").rstrip("/")
    return path.removeprefix(root) if path.startswith(f"{root}/") else path


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
