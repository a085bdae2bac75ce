"""The text that quality is scored on: read, tokenized and cut into windows."""

from __future__ import annotations

import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

from llmbuild.errors import InputError
from llmbuild.spec.recipe import Quality

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

WINDOW = 128
"""Tokens of a window at most; a shorter context cuts them shorter."""


def read_text(quality: Quality) -> str:
    """Return the held-out text: modules of this interpreter's standard library, or a file.

    Raises:
        InputError: a module or the file is not there.
    """
    if quality.file:
        try:
            return Path(quality.file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"quality text {quality.file}: cannot be read: {error}") from None
    return "\n".join(_module(name) for name in quality.stdlib)


def _module(name: str) -> str:
    base = Path(sysconfig.get_paths()["stdlib"]).joinpath(*name.split("."))
    for path in (base.with_suffix(".py"), base / "__init__.py"):
        if path.is_file():
            return path.read_text(encoding="utf-8")
    raise InputError(f"quality text: this Python's standard library has no module {name!r}")


def windows(quality: Quality, tokenizer: Path, context: int) -> NDArray[np.int64]:
    """Return i64[W, L]: about `quality.tokens` tokens in windows spread evenly over the text.

    Raises:
        InputError: the text is shorter than one window.
    """
    import numpy as np
    from tokenizers import Tokenizer

    ids = np.asarray(Tokenizer.from_file(str(tokenizer)).encode(read_text(quality)).ids, np.int64)
    length = min(WINDOW, context)
    count = max(1, quality.tokens // length)
    if len(ids) < length:
        raise InputError(f"quality text: {len(ids)} tokens are fewer than one window of {length}")
    starts = np.linspace(0, len(ids) - length, count).astype(np.int64)
    cut: NDArray[np.int64] = ids[starts[:, None] + np.arange(length)]
    return cut
