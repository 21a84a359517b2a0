"""Errors as clients see them: ``{"error": {"message", "type", "param", "code"}}``, never a traceback or a path."""

import json
import logging
import uuid
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from ldm_ray.engine.schema import Refused, cut, refusal

log = logging.getLogger("ray.serve")
KINDS = {401: "authentication_error", 429: "rate_limit_error"}
NAMES = {
    400: "bad_request",
    401: "unauthorized",
    404: "not_found",
    405: "method_not_allowed",
    406: "not_acceptable",
    408: "deadline_exceeded",
    413: "body_too_large",
    415: "unsupported_media_type",
    429: "queue_full",
    500: "internal_error",
    503: "unavailable",
}


class ApiError(Refused):
    """An answer that is no success."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message, param, code or NAMES.get(status, "error"))
        self.status, self.headers = status, headers or {}
        self.kind = KINDS.get(status, "server_error" if status >= 500 else Refused.kind)

    def response(self) -> Response:
        return json_response({"error": self.body()}, self.status, self.headers)


def json_response(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """JSON in ASCII, so that whatever a client sent can be repeated to it."""
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)  # NaN is no JSON
    return Response(text, status, headers, "application/json")


def invalid(param: str | None, message: str, code: str = "invalid_value") -> ApiError:
    return ApiError(400, message, param, code)


def internal(error: BaseException) -> ApiError:
    """Logs an error under an id, and tells the client only the id."""
    mark = uuid.uuid4().hex[:12]
    log.error("internal error %s", mark, exc_info=error)
    return ApiError(500, f"the server failed; its log has the reason under {mark}")


def install(app: FastAPI) -> None:
    """Makes every error of an application one of ours."""

    @app.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> Response:
        return (error if isinstance(error, ApiError) else invalid(error.param, error.message, error.code)).response()

    @app.exception_handler(RequestValidationError)
    async def validation(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return invalid(None, f"the body is not JSON: {first['ctx']['error']}", "invalid_json").response()
        return await refused(request, refusal(first, first["loc"][1:]))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        messages = {
            404: f"there is no {request.scope['path']}",
            405: f"{cut(request.method, 20)} is not for this address",
        }
        message, headers = messages.get(error.status_code, str(error.detail)), dict(error.headers or {})
        if "GET" in headers.get("Allow", "").split(", "):
            headers["Allow"] += ", HEAD"
        return ApiError(error.status_code, message, headers=headers).response()

    @app.exception_handler(Exception)
    async def unexpected(_: Request, error: Exception) -> Response:
        return internal(error).response()
