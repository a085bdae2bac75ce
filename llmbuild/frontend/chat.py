"""Find a model's chat template where the library finds it, and the texts of the special tokens that it may name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmbuild.errors import InputError
from llmbuild.frontend.documents import check_file, read_json, shown, told
from llmbuild.runtime.chat import NAMED, ChatTemplate

TEMPLATE, SETTINGS = "chat_template.jinja", "tokenizer_config.json"
LARGEST_BYTES = 1 << 20
"""Of a template: those of models have a few thousand."""
DEFAULT = "default"
"""The name of the template, of several, that answers a chat without tools."""


def chat_of(folder: Path) -> ChatTemplate | None:
    """Return the chat template of a model folder; None where it has none.

    Raises:
        InputError: a file cannot be read, or the template or a token is no text, or the template is too large.
    """
    settings = read_json(folder / SETTINGS) if _is_there(folder / SETTINGS) else {}
    text = _file(folder / TEMPLATE) if _is_there(folder / TEMPLATE) else _entry(folder / SETTINGS, settings)
    if not text:
        return None
    tokens = {name: _token(folder / SETTINGS, name, settings[name]) for name in NAMED if name in settings}
    return ChatTemplate(text, {name: token for name, token in tokens.items() if token is not None})


def unusable(chat: ChatTemplate | None) -> list[str]:
    """Return what to tell of a template that no chat can be answered through."""
    fault = chat.fault() if chat else ""
    return [f"{fault}: chats with this model will be refused"] if fault else []


def _is_there(path: Path) -> bool:
    return path.exists() or path.is_symlink()


def _file(path: Path) -> str:
    _check_size(path, check_file(path))
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {told(error)}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text: byte {error.start} cannot be read") from None


def _entry(path: Path, settings: Mapping[str, Any]) -> str | None:
    """Return the template in the settings of a tokenizer: the only one, or the one of several that is the default."""
    found = settings.get("chat_template")
    if isinstance(found, list):
        if not all(isinstance(one, dict) and {"name", "template"} <= one.keys() for one in found):
            raise InputError(f"{path}: chat_template is a list whose entries are not all a name and a template")
        found = next((one["template"] for one in reversed(found) if one["name"] == DEFAULT), None)
    elif isinstance(found, dict):
        found = found.get(DEFAULT)
    if found is not None and not isinstance(found, str):
        raise InputError(f"{path}: chat_template is {shown(found)}, which is no text")
    _check_size(path, len((found or "").encode()))
    return found


def _token(path: Path, name: str, value: Any) -> str | None:
    """Return the text of a special token, which may stand beside how it is found; None for a token that is absent."""
    text = value.get("content") if isinstance(value, dict) else value
    if text is not None and not isinstance(text, str):
        raise InputError(f"{path}: {name} is {shown(value)}, which is no text")
    return text


def _check_size(path: Path, size: int) -> None:
    if size > LARGEST_BYTES:
        raise InputError(f"{path}: a chat template of {size} bytes; {LARGEST_BYTES} are taken at most")
