"""Errors as clients see them: ``{"error": {"message", "type", "param", "code"}}``, never a traceback or a path."""

import json
import logging
import uuid
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

log = logging.getLogger("ray.serve")
BRANCHES = ("function-", "list[", "constrained-")  # what pydantic calls the alternatives of a field
CODES = {
    "extra_forbidden": "unknown_parameter",
    "missing": "missing_parameter",
    "json_invalid": "invalid_json",
}
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


EXAMPLE = '{"prompt": "7"}'
MESSAGE, PARAM = 400, 100  # characters: what a client sent is repeated to it, but not at any length


class ApiError(Exception):
    """An answer that is no success."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param = status, message, param
        self.code = code or NAMES.get(status, "error")
        self.headers = headers or {}

    @property
    def kind(self) -> str:
        if self.status == 429:
            return "rate_limit_error"
        if self.status == 401:
            return "authentication_error"
        return "server_error" if self.status >= 500 else "invalid_request_error"

    def body(self) -> dict[str, Any]:
        param = None if self.param is None else cut(self.param, PARAM)
        told = {"message": cut(self.message, MESSAGE), "type": self.kind, "param": param, "code": self.code}
        return {"error": told}

    def response(self) -> Response:
        return json_response(self.body(), self.status, self.headers)


def cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 2]} …"


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

    @app.exception_handler(ApiError)
    async def own(_: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def validation(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = [str(part) for part in first["loc"][1:]]
        where = [part for i, part in enumerate(where) if not i or not part.startswith(BRANCHES)]
        code = CODES.get(first["type"], "invalid_value")
        param = None if code == "invalid_json" else ".".join(where) or None
        message = first["msg"].removeprefix("Value error, ")
        if code == "invalid_json":
            message = f"the body is not JSON: {first.get('ctx', {}).get('error', message)}"
        elif not where and (first["type"] == "missing" or first["type"].endswith("_type")):
            message = f"the body must be a JSON object, such as {EXAMPLE}"
        return invalid(param, f"{param}: {message}" if param else message, code).response()

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
