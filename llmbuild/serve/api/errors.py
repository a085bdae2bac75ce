"""Errors as OpenAI's clients expect them: a status, and a body with message, type, param and code."""

from __future__ import annotations

from collections.abc import Mapping

from llmbuild.errors import InputError, LlmbuildError
from llmbuild.serve.errors import QueueFull, RequestRefused, Unavailable
from llmbuild.serve.events import Fault

Body = dict[str, dict[str, object]]

INVALID, UNAVAILABLE, TIMEOUT, INTERNAL = "invalid_request_error", "unavailable_error", "timeout_error", "server_error"


class ApiError(LlmbuildError):
    """What a client is told, with its status."""

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = INVALID,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.kind, self.code, self.param, self.headers = status, kind, code, param, dict(headers or {})

    @property
    def body(self) -> Body:
        """The body of the answer."""
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}


_OF_FAULT: Mapping[Fault, tuple[int, str, str]] = {
    "cancelled": (499, INVALID, "cancelled"),
    "deadline": (504, TIMEOUT, "deadline_exceeded"),
    "engine": (500, INTERNAL, "engine_error"),
    "closed": (503, UNAVAILABLE, "shutting_down"),
}


def of_fault(fault: Fault, why: str) -> ApiError:
    """Return the error of an answer that the engine gave up."""
    status, kind, code = _OF_FAULT[fault]
    return ApiError(status, why, kind, code)


def of_exception(error: Exception) -> ApiError:
    """Return what a client is told of an exception; of a bug nothing but that it is one."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestRefused):
        return ApiError(400, str(error), code=error.code, param=error.param)
    if isinstance(error, QueueFull):
        again = {"retry-after": str(error.retry_after_s)}
        return ApiError(429, str(error), "rate_limit_error", "queue_full", headers=again)
    if isinstance(error, Unavailable):
        return ApiError(503, str(error), UNAVAILABLE, "unavailable")
    if isinstance(error, InputError):
        return ApiError(400, str(error))
    return ApiError(500, "the server has made an error: its log has the request's id", INTERNAL, "internal_error")


def of_status(status: int) -> ApiError:
    """Return the error of a status that the routes themselves give."""
    told = {404: "there is no such path", 405: "the path does not take this method"}
    return ApiError(status, told.get(status, "the request cannot be answered"))
