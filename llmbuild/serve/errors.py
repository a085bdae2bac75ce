"""What the engine refuses, each kind with what a client needs to know."""

from __future__ import annotations

from llmbuild.errors import InputError, LlmbuildError

CONTEXT_EXCEEDED = "context_length_exceeded"
"""The code of a prompt that is longer than the context, as OpenAI's clients know it."""


class RequestRefused(InputError):
    """A request that can never be answered as it stands; `param` names the field, `code` the kind where it has one."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param, self.code = param, code


class QueueFull(LlmbuildError):
    """Too many sequences wait; one may ask again in `retry_after_s` seconds."""

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Unavailable(LlmbuildError):
    """The engine takes no requests: it is draining, or it has failed."""
