"""What a terminal is shown: text from outside is data, so whatever would steer a terminal is written as an escape.

The standard streams of a command are guarded, so that there is one place which prints, whoever calls it. Rows of a
stranger's catalog, names of files, errors of libraries and logs all pass through it.
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
"""Controls of C0 and C1, marks without a width (bidirectional overrides are among them), halves of a character that no
encoding has (what is left of a file's name in no known encoding), and separators of lines and paragraphs."""


def _escaped(one: str) -> str:
    code = ord(one)
    if 0xDC80 <= code <= 0xDCFF:
        return f"\\x{code - 0xDC00:02x}"  # the byte that `os.fsdecode` could not read
    if one in "\n\t\r":
        return {"\n": "\\n", "\t": "\\t", "\r": "\\r"}[one]
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def shown(text: str, kept: str = "\n") -> str:
    """Return text of several lines as a terminal may be given it; what is `kept` stays as it is."""
    if text.isascii() and (text.replace("\n", "") if kept else text).isprintable():
        return text
    return "".join(_escaped(one) if one not in kept and unicodedata.category(one) in _STEERING else one for one in text)


def cell(text: object) -> str:
    """Return what stands in one line: a value of a row, a name; ends of lines are escaped, too."""
    return shown(str(text), "")


class _Guarded(io.TextIOWrapper):
    """A standard stream that writes what may be shown."""

    def write(self, text: str) -> int:
        """Write text of whatever origin."""
        super().write(shown(text))
        return len(text)

    def as_is(self, text: str) -> None:
        """Write text that is our own to the last character, or that is no terminal's to read."""
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
    """Guard the standard streams, for as long as a command runs."""
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
            with contextlib.suppress(OSError):  # whoever wrote was told already
                stream.detach()  # flushes; what is below stays open, for it belongs to the stream before


def control(stream: TextIO, text: str) -> None:
    """Write our own text with what steers a terminal; whatever of it came from outside went through `cell`."""
    stream.as_is(text) if isinstance(stream, _Guarded) else stream.write(text)


_live: list[TextIO] = []
"""The terminal whose last line is one that the next replaces."""


def replace_line(stream: TextIO, text: str) -> None:
    """Write a line that the next one replaces, no wider than the terminal, which would break it into two."""
    control(stream, "\r\x1b[K" + cell(text)[: shutil.get_terminal_size().columns - 1])
    stream.flush()
    _live[:] = [stream]


def clear_line() -> None:
    """Take back a line that was to be replaced, so that nothing else is written behind it."""
    for stream in _live:
        with contextlib.suppress(OSError, ValueError):  # the terminal is gone: nobody sees the line
            control(stream, "\r\x1b[K")
            stream.flush()
    _live.clear()


def data(text: str) -> None:
    """Write data to standard output: as it is where a program reads it, guarded where a terminal shows it."""
    stream = sys.stdout
    control(stream, shown(text, "\n\t") if stream.isatty() else text)
    stream.flush()
