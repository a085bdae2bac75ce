"""One request to a replica over HTTP/1.1: its status, then its body piece by piece, and every way in which it breaks.

A connection for each request: on one host it costs less than a millisecond, and what one request breaks is its own.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import h11

CONNECT_S = 2.0
"""Seconds that a replica has to take a connection."""
SILENT_S = 60.0
"""Seconds without a byte after which a stream is taken as broken: a server says that it is alive every 15 s."""
_PIECE = 1 << 16


class Broken(Exception):
    """The replica took no connection, ended it early, or was silent for too long."""


@dataclass
class Answer:
    """The answer of a replica: its status, its headers, and its body as it comes."""

    status: int
    headers: dict[str, str]
    _connection: h11.Connection
    _reader: asyncio.StreamReader
    _writer: asyncio.StreamWriter
    _silent_s: float = field(default=SILENT_S)

    async def pieces(self) -> AsyncIterator[bytes]:
        """Yield the body.

        Raises:
            Broken: it ended early.
        """
        while True:
            event = await _event(self._connection, self._reader, self._silent_s)
            if isinstance(event, h11.Data):
                yield bytes(event.data)
            elif isinstance(event, h11.EndOfMessage):
                return

    async def whole(self) -> bytes:
        """Return the body.

        Raises:
            Broken: it ended early.
        """
        return b"".join([piece async for piece in self.pieces()])

    def close(self) -> None:
        """End the connection: a server stops what nobody waits for."""
        self._writer.close()


async def ask(url: str, path: str, body: bytes, headers: dict[str, str], silent_s: float) -> Answer:
    """Post a body and return the answer as soon as its status is there.

    Raises:
        Broken: nobody answers.
    """
    host, _, port = url.removeprefix("http://").rpartition(":")
    try:
        async with asyncio.timeout(CONNECT_S):
            reader, writer = await asyncio.open_connection(host.strip("[]"), int(port))  # of an IPv6 address
    except (OSError, TimeoutError) as error:
        raise Broken(f"{url} takes no connection: {error or type(error).__name__}") from None
    connection = h11.Connection(h11.CLIENT)
    fields = {"host": f"{host}:{port}", "content-length": str(len(body)), "connection": "close", **headers}
    try:
        head = h11.Request(method="POST", target=path, headers=list(fields.items()))
        for part in (head, h11.Data(data=body), h11.EndOfMessage()):
            writer.write(connection.send(part) or b"")
        await _written(writer, url)
        while not isinstance(event := await _event(connection, reader, silent_s), h11.Response):
            pass
    except BaseException:
        writer.close()
        raise
    found = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in event.headers}
    return Answer(event.status_code, found, connection, reader, writer)


async def _written(writer: asyncio.StreamWriter, url: str) -> None:
    try:
        await writer.drain()
    except OSError as error:
        raise Broken(f"{url} has closed the connection: {error}") from None


async def _event(connection: h11.Connection, reader: asyncio.StreamReader, silent_s: float) -> object:
    """Return the next part of an answer.

    Raises:
        Broken: there is none.
    """
    try:
        while (event := connection.next_event()) is h11.NEED_DATA:
            async with asyncio.timeout(silent_s):
                connection.receive_data(await reader.read(_PIECE))
    except TimeoutError:
        raise Broken(f"it was silent for {silent_s:g} s") from None
    except (OSError, h11.RemoteProtocolError):
        raise Broken("it ended in the middle of an answer") from None
    if isinstance(event, h11.ConnectionClosed):
        raise Broken("it closed the connection")
    return event
