"""A recipe's texts for quality scoring and calibration: read, tokenized and cut into windows."""

from __future__ import annotations

import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

from llmbuild.errors import InputError
from llmbuild.spec.recipe import Calibration, Quality, Text

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

WINDOW = 128
"""Maximum tokens of a window; a shorter context shortens windows."""


COPIED = 0.1
"""Share of the held-out text's lines that calibration text may also contain: licences and idioms, not content."""

GLANCE = 1 << 15
"""Characters that are tokenized first to check that a text fills a window; the whole text only where these do not."""

LONG_LINE = 30
"""Least characters of a distinctive line."""


def read_text(text: Quality | Text) -> str:
    """Return a text: modules of this interpreter's standard library, files, or prompts, one behind the other.

    Raises:
        InputError: a module or a file is missing.
    """
    prompts = (text.chats,) if isinstance(text, Text) and text.chats else ()
    files = [_file(name, _named(text)) for name in (*text.files, *prompts)]
    return "\n".join([*files, *(_module(name, _named(text)) for name in text.stdlib)])


def check_apart(calibration: Calibration, quality: Quality) -> None:
    """Refuse calibration text that quality is measured on: the scores would be too good.

    Raises:
        InputError: both name a module or a file, or one contains much of the other's text.
    """
    named = {name for text in calibration.texts for name in (*text.stdlib, *text.files)}
    shared = sorted(named & {*quality.stdlib, *quality.files})
    if shared:
        told = ", ".join(shared)
        raise InputError(f"calibration text {told} is quality text too: quality is measured on what was not seen")
    held = {line for line in read_text(quality).splitlines() if len(line.strip()) >= LONG_LINE}
    copied = held & {line for text in calibration.texts for line in read_text(text).splitlines()}
    if len(copied) > COPIED * len(held):
        part = len(copied) / len(held)
        raise InputError(f"calibration text has {part:.0%} of the quality text's lines: choose another text")


def _named(text: Quality | Text) -> str:
    return "calibration" if isinstance(text, Text) else "quality"


def _file(name: str, purpose: str) -> str:
    try:
        return Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{purpose} text {name}: cannot be read: {error}") from None


def _module(name: str, purpose: str) -> str:
    base = Path(sysconfig.get_paths()["stdlib"]).joinpath(*name.split("."))
    for path in (base.with_suffix(".py"), base / "__init__.py"):
        if path.is_file():
            return path.read_text(encoding="utf-8")
    raise InputError(f"{purpose} text: this Python's standard library has no module {name!r}")


def unfit(text: Quality | Text, tokenizer: Path | None, context: int, vocabulary: int) -> str:
    """Return why a text has no window of tokens for a model; '' where it has one.

    Raises:
        InputError: a module or the file is missing.
    """
    if tokenizer is None:
        return f"the model has no tokenizer.json to read {_called(text)} with"
    from llmbuild.runtime.tokenizer import Tokenizer

    whole, length, ids = read_text(text), min(WINDOW, context), list[int]()
    try:
        door = Tokenizer(tokenizer)
        begin = () if door.largest >= vocabulary else (whole[:GLANCE],)
        for part in (*begin, whole):
            ids = door.encode(part).ids
            if len(ids) >= length:
                break
    except InputError as error:
        return f"{_called(text)}: {error}"
    if len(ids) < length:
        return _too_short(text, len(ids), length)
    if max(ids) >= vocabulary:
        return f"{_called(text)}: {tokenizer} makes token {max(ids)} of it, and the model has {vocabulary}"
    return ""


def _called(text: Quality | Text) -> str:
    return "calibration text" if isinstance(text, Text) else "the held-out text"


def _too_short(text: Quality | Text, found: int, length: int) -> str:
    return f"{_called(text)}: {found} tokens are fewer than one window of {length}"


def windows(text: Quality, tokenizer: Path, context: int) -> NDArray[np.int64]:
    """Return i64[W, L]: about `text.tokens` tokens in windows spread evenly over the text.

    Raises:
        InputError: the tokenizer cannot be read, or the text is shorter than one window.
    """
    length = min(WINDOW, context)
    return cut(text, max(1, text.tokens // length), length, tokenizer)


def cut(text: Quality | Text, count: int, length: int, tokenizer: Path) -> NDArray[np.int64]:
    """Return `count` windows i64[count, length] spread evenly over a text.

    Raises:
        InputError: the tokenizer cannot be read, or the text is shorter than one window.
    """
    import numpy as np

    from llmbuild.runtime.tokenizer import Tokenizer

    ids = np.asarray(Tokenizer(tokenizer).encode(read_text(text)).tokens, np.int64)
    if len(ids) < length:
        raise InputError(_too_short(text, len(ids), length))
    starts = np.linspace(0, len(ids) - length, count).astype(np.int64)
    found: NDArray[np.int64] = ids[starts[:, None] + np.arange(length)]
    return found
