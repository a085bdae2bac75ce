"""A stream of server-sent events on its way through: passed on as it comes, its times and its usage noted."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator

from llmbuild.fleet.gateway.upstream import Broken

_END = b"\n\n"
_DONE = b"data: [DONE]"


class Relay:
    """Passes events on. The last one with the usage is kept from a client that did not ask for it."""

    def __init__(self, pieces: AsyncIterator[bytes], usage: bool) -> None:
        self._pieces, self._usage = pieces, usage
        self._rest = b""
        self.done = False
        """Whether the answer came to its end."""
        self.failed = False
        """Whether the replica itself has told an error."""
        self.first_s = self.last_s = 0.0
        self.prompt = self.output = 0

    async def first(self) -> bytes:
        """Return what comes first.

        Raises:
            Broken: nothing came.
        """
        async for piece in self._pieces:
            if made := self._passed(piece):
                return made
        raise Broken("it ended without a byte")

    async def rest(self) -> AsyncIterator[bytes]:
        """Yield what comes behind it.

        Raises:
            Broken: the stream ended before the answer did.
        """
        async for piece in self._pieces:
            if made := self._passed(piece):
                yield made
        if not (self.done or self.failed):
            raise Broken("it ended before the answer did")

    def _passed(self, piece: bytes) -> bytes:
        """Return the whole events of what has come."""
        *events, self._rest = (self._rest + piece).split(_END)
        return b"".join(event + _END for event in events if self._kept(event))

    def _kept(self, event: bytes) -> bool:
        if event == _DONE:
            self.done = True
            return True
        if not event.startswith(b"data: "):
            return True
        if b'"usage"' in event and (usage := _usage(event)):
            self.prompt, self.output = usage
            return self._usage
        if event.startswith(b'data: {"error"'):
            self.failed = True
            return True
        self.last_s = time.monotonic()
        self.first_s = self.first_s or self.last_s
        return True


def _usage(event: bytes) -> tuple[int, int] | None:
    """Return the tokens of the event that ends a stream with them; None for any other."""
    try:
        found = json.loads(event[len(b"data: ") :])
        if found["choices"] != [] or not found["usage"]:
            return None
        return int(found["usage"]["prompt_tokens"]), int(found["usage"]["completion_tokens"])
    except (ValueError, KeyError, TypeError):
        return None
