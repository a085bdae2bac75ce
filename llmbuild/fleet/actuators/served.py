"""A server as whoever has started it sees it: whether it is ready, and how long that may take."""

from __future__ import annotations

import http.client
import os
from typing import BinaryIO

DRAIN_S = 30.0
"""Seconds that a replica has to finish what it has begun."""
KILL_S = 5.0
"""Seconds beyond these after which it is killed."""
READY_S = 120.0
"""Seconds from the start after which a replica that is not ready is given up."""
ASK_S = 2.0
"""Seconds that a replica has to say whether it is ready."""
CHECK_S, SILENT = 5.0, 3
"""A replica that serves is asked so often, and killed when it has not been ready for so many times in a row."""
_LAST = 400
"""Bytes of the log's end that are looked at for its last line."""


def ready(url: str) -> bool:
    """Ask a server whether it is ready."""
    host, _, port = url.removeprefix("http://").rpartition(":")
    connection = http.client.HTTPConnection(host.strip("[]"), int(port), timeout=ASK_S)
    try:
        connection.request("GET", "/ready")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def address(said: BinaryIO) -> str:
    """Return where a server says, in its first line, that it answers; empty until it does."""
    said.seek(0)
    line, end, _ = said.read().decode(errors="replace").partition("\n")
    return line.strip() if end else ""


def ended(code: int | None, log: BinaryIO | None = None) -> str:
    """Return how a server ended: its exit code, None where that is not known, and what it said last."""
    told = "ended" if code is None else f"killed by signal {-code}" if code < 0 else f"exit code {code}"
    if log is None:
        return told
    log.seek(max(0, log.seek(0, os.SEEK_END) - _LAST))
    lines = log.read().decode(errors="replace").splitlines()
    return f"{told}: {lines[-1]}" if lines else told
