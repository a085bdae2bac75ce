"""What is kept of texts while a model writes them, so that a run that was ended goes on where it was."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from time import monotonic
from zipfile import BadZipFile

import numpy as np

TOGETHER = 32
"""Texts that are written at once, one position after another."""
SAVE_S = 2.0
"""Seconds between two records of the tokens so far."""
TRANSCRIPT_FILE = "transcript.npz"


class Transcript:
    """A file with the tokens of each text so far; `key` names all that decides on them, '' keeps nothing."""

    def __init__(self, path: Path, key: str) -> None:
        self._path, self._key, self._saved_at = path, key, monotonic()

    def tokens(self, texts: int) -> list[list[int]]:
        """Return the tokens of each of `texts` texts that an earlier run has kept; none of another key."""
        found = _read(self._path) if self._key else {}
        if not found or str(found["key"]) != self._key or len(found["ends"]) != texts:
            return [[] for _ in range(texts)]
        return [part.tolist() for part in np.split(found["tokens"], found["ends"][:-1])]

    def keep(self, texts: Sequence[Sequence[int]]) -> None:
        """Keep the tokens of each text, unless some were kept a moment ago; no reader sees a part of a record."""
        if not self._key or monotonic() < self._saved_at + SAVE_S:
            return
        draft = self._path.with_suffix(".part")
        with open(draft, "wb") as file:
            tokens, ends = np.array([t for text in texts for t in text], np.int64), np.cumsum([*map(len, texts)])
            np.savez(file, key=self._key, tokens=tokens, ends=ends)
        draft.replace(self._path)
        self._saved_at = monotonic()


def count(path: Path) -> int:
    """Return how many tokens a transcript has; 0 where there is none."""
    found = _read(path)
    return len(found["tokens"]) if found else 0


def _read(path: Path) -> dict[str, np.ndarray]:
    try:
        with open(path, "rb") as data, np.load(data) as file:
            return {name: file[name] for name in ("key", "tokens", "ends")}
    except (OSError, ValueError, KeyError, EOFError, BadZipFile):
        return {}
