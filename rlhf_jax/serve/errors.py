"""What a request can get wrong, as the JSON of OpenAI's errors with its status code."""

from __future__ import annotations

from collections.abc import Mapping

from starlette.responses import JSONResponse

HEADERS = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}, 503: {"Retry-After": "1"}}
ERROR_KINDS = {429: "rate_limit_error", 500: "server_error", 503: "server_error", 504: "server_error"}


class ApiError(Exception):
    """An answer that is an error.

    Attributes:
        status: of HTTP.
        code: for programs, such as "model_not_found".
        param: the field that is wrong.
    """

    def __init__(self, status: int, message: str, code: str, param: str | None = None):
        super().__init__(message)
        self.status, self.code, self.param = status, code, param

    def content(self) -> dict:
        kind = ERROR_KINDS.get(self.status, "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def response(self, headers: Mapping[str, str] | None = None) -> JSONResponse:
        return JSONResponse(self.content(), self.status, headers={**HEADERS.get(self.status, {}), **(headers or {})})


def invalid(message: str, param: str | None = None, code: str = "invalid_value") -> ApiError:
    return ApiError(400, message, code, param)


SHUTTING_DOWN = (503, "the server is shutting down: ask another, or again once it has started", "shutting_down")
TOO_LATE = (504, "the answer took longer than the server allows: ask for fewer tokens, or fewer scores", "timeout")
FAILED = (500, "the server failed to answer; its log says why", "internal_error")
