"""Errors as OpenAI's clients read them: a status, and one sentence with its kind."""

from __future__ import annotations

from typing import Any

from starlette.responses import JSONResponse

from qeff_ir.errors import AdapterError, QeffError, RuntimeInputError
from qeff_ir.runtime.jobs import EngineClosedError, EngineFullError

_RETRY_SECONDS = 1
"""After which a client of a full server may ask again."""


class ApiError(QeffError):
    """A request that gets an error for an answer.

    Args:
        status: Of HTTP.
        message: One sentence.
        param: The field of the request that it is about.
        code: A name for programs, such as ``model_not_found``.

    Attributes:
        status: See above.
    """

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def body(self) -> dict[str, Any]:
        """The error as JSON, ``{"error": {"message": …, "type": …, "param": …, "code": …}}``."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = "rate_limit_error" if self.status == 429 else kind
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The error as an answer; one of a full server says when to come again."""
        headers = {"Retry-After": str(_RETRY_SECONDS)} if self.status in (429, 503) else None
        return JSONResponse(self.body(), self.status, headers)


def answer_of(error: Exception) -> ApiError:
    """The error that a client is told, whatever was raised; what is no `QeffError` is not shown to it."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, EngineFullError):
        return ApiError(429, str(error), code="rate_limit_exceeded")
    if isinstance(error, EngineClosedError):
        return ApiError(503, str(error), code="shutting_down")
    if isinstance(error, RuntimeInputError | AdapterError):
        return ApiError(400, str(error))
    if isinstance(error, QeffError):
        return ApiError(500, str(error))
    return ApiError(500, "the server failed on this request: its log says why", code="internal_error")
