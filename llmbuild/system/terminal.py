"""Terminal output: external text is data, so its control characters are escaped.

The standard streams of a command are guarded, so that all output passes through one place. Rows of an untrusted
catalog, names of files, errors of libraries and logs all pass through it.
"""

from __future__ import annotations

import contextlib
import io
import shutil
import sys
import unicodedata
from collections.abc import Iterator
from typing import TextIO

_STEERING = frozenset(("Cc", "Cf", "Cs", "Zl", "Zp"))
"""Control characters of C0 and C1, zero-width marks (including bidirectional overrides), surrogates (from undecodable
file names), and line and paragraph separators.
"""


def _escaped(one: str) -> str:
    code = ord(one)
    if 0xDC80 <= code <= 0xDCFF:
        return f"\\x{code - 0xDC00:02x}"  # a byte that `os.fsdecode` could not decode
    if one in "\n\t\r":
        return {"\n": "\\n", "\t": "\\t", "\r": "\\r"}[one]
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def shown(text: str, kept: str = "\n") -> str:
    """Return text of several lines, escaped for a terminal; the characters in `kept` are unchanged."""
    if text.isascii() and (text.replace("\n", "") if kept else text).isprintable():
        return text
    return "".join(_escaped(one) if one not in kept and unicodedata.category(one) in _STEERING else one for one in text)


def cell(text: object) -> str:
    """Return text for one line, such as a value or a name; line ends are escaped, too."""
    return shown(str(text), "")


class _Guarded(io.TextIOWrapper):
    """A standard stream that escapes control characters."""

    def write(self, text: str) -> int:
        """Write text of any origin."""
        super().write(shown(text))
        return len(text)

    def as_is(self, text: str) -> None:
        """Write llmbuild's own text, or text that does not go to a terminal."""
        super().write(text)


def _guarded(stream: TextIO) -> TextIO:
    if isinstance(stream, _Guarded) or not isinstance(stream, io.TextIOWrapper):
        return stream
    stream.flush()
    encoding = "utf-8" if stream.encoding.lower() in ("ascii", "us-ascii", "ansi_x3.4-1968") else stream.encoding
    return _Guarded(
        stream.buffer,
        encoding=encoding,
        errors="backslashreplace",
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """Guard the standard streams while a command runs."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(_guarded, before)
    ours = [
        now
        for now, was in zip((sys.stdout, sys.stderr), before, strict=True)
        if isinstance(now, _Guarded) and now is not was
    ]
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        for stream in ours:
            with contextlib.suppress(OSError):  # the error was reported on write
                stream.detach()  # flushes; the underlying buffer stays open, since it belongs to the original stream


def control(stream: TextIO, text: str) -> None:
    """Write llmbuild's own text with control sequences; external parts of it went through `cell`."""
    stream.as_is(text) if isinstance(stream, _Guarded) else stream.write(text)


_live: list[TextIO] = []
"""The terminal whose last line the next one replaces."""


def replace_line(stream: TextIO, text: str) -> None:
    """Write a line that the next one replaces, at most as wide as the terminal, so that it does not wrap."""
    control(stream, "\r\x1b[K" + cell(text)[: shutil.get_terminal_size().columns - 1])
    stream.flush()
    _live[:] = [stream]


def clear_line() -> None:
    """Clear the replaceable line, so that nothing else is appended to it."""
    for stream in _live:
        with contextlib.suppress(OSError, ValueError):  # the terminal is closed
            control(stream, "\r\x1b[K")
            stream.flush()
    _live.clear()


def data(text: str) -> None:
    """Write data to standard output: unchanged for a program, escaped for a terminal."""
    stream = sys.stdout
    control(stream, shown(text, "\n\t") if stream.isatty() else text)
    stream.flush()
