"""The small files of a model folder that a GGUF file stands for, made once and kept in this user's cache.

A folder is named by what it is made from. It is written under another name, synced and renamed, so that it is whole or
absent, whoever else makes it at the same time; one that was changed since is made again.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from llmbuild import digest
from llmbuild.errors import InputError
from llmbuild.frontend.documents import told
from llmbuild.frontend.files import CONFIG, GENERATION, TOKENIZER
from llmbuild.frontend.gguf_file import Described
from llmbuild.frontend.gguf_header import Header
from llmbuild.frontend.gguf_rope import FACTORS
from llmbuild.frontend.gguf_tokenizer import texts_of

CACHE = "XDG_CACHE_HOME"
_VERSION = 1
"""Of the rules by which files are made: a new one makes them all again."""
_SETTINGS, _MADE = "tokenizer_config.json", "made.json"
_TRIES = 5
"""How often others may take the name while a folder is made."""


@dataclass(frozen=True)
class Folder:
    """A folder with config.json and what a model needs for texts, and what is worth telling of it."""

    path: Path
    notes: tuple[str, ...]


def folder_of(header: Header, described: Described) -> Folder:
    """Return the folder that a GGUF file stands for; it is made if it is not there.

    Raises:
        InputError: the cache cannot be written.
    """
    factors = digest.of_bytes(header.read(FACTORS)) if FACTORS in header.tensors else ""
    name = digest.of({"rules": _VERSION, "header": header.digest, "factors": factors})
    try:
        path = _cache() / name
        if (found := _whole(path)) is None:
            path.parent.mkdir(parents=True, exist_ok=True)
            _make(path, header, described)
            found = _whole(path)
    except (OSError, RuntimeError) as error:
        where = getattr(error, "filename", None) or "~/.cache"
        raise InputError(f"{where}: cannot be written: {told(error)}: set {CACHE} to a folder that can be") from None
    if found is None:
        raise InputError(f"{path}: changes while it is read: set {CACHE} to a folder of your own")
    return found


def _cache() -> Path:
    """Return where this user keeps such folders; the standard has relative paths of the variable ignored."""
    named = Path(os.environ.get(CACHE, ""))
    return (named if named.is_absolute() else Path.home() / ".cache") / "llmbuild" / "gguf"


def _whole(path: Path) -> Folder | None:
    """Return a folder that holds what was written into it; None where there is none."""
    try:
        made = json.loads((path / _MADE).read_text(encoding="utf-8"))
        for name, known in made["files"].items():
            if digest.of_file(path / name) != known:
                return None
        return Folder(path, tuple(made["notes"]))
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


def _make(path: Path, header: Header, described: Described) -> None:
    draft = Path(mkdtemp(prefix=".making-", dir=path.parent))
    try:
        _write(draft, header, described)
        for _ in range(_TRIES):
            try:
                draft.rename(path)
                break
            except OSError:
                if not path.is_dir():
                    raise
            if _whole(path) is not None:  # another process was first
                break
            _put_away(path)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _put_away(path: Path) -> None:
    """Remove a folder that is not whole, in one step for those who look for it."""
    away = Path(mkdtemp(prefix=".old-", dir=path.parent))
    try:
        path.rename(away / path.name)
    except FileNotFoundError:
        pass
    finally:
        shutil.rmtree(away, ignore_errors=True)


def _write(folder: Path, header: Header, described: Described) -> None:
    """Write all files into a folder, what it holds last."""
    texts = texts_of(header.metadata)
    files = {CONFIG: _as_json(described.config), _SETTINGS: _as_json(texts.settings), TOKENIZER: texts.tokenizer}
    if described.generation:
        files[GENERATION] = _as_json(described.generation)
    kept = {name: text.encode() for name, text in files.items() if text}
    made = {"files": {name: digest.of_bytes(data) for name, data in kept.items()}, "notes": list(texts.notes)}
    for name, data in {**kept, _MADE: _as_json(made).encode()}.items():
        with open(folder / name, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    folder.chmod(0o755)
    place = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(place)
    finally:
        os.close(place)


def _as_json(value: dict[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False, indent=1, sort_keys=True) + "\n"
