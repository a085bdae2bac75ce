"""A model's chat template is the one that the library finds in its folder, with the texts of its special tokens."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llmbuild.errors import InputError
from llmbuild.frontend.chat import LARGEST_BYTES
from llmbuild.frontend.source import FoundModel, find_model
from llmbuild.runtime.chat import ChatTemplate
from llmbuild.spec.recipe import ModelSource
from tests.runtime.test_tokenizer import byte_level
from tests.support import folders

SAID: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
ONE, TWO, THREE = "{{ bos_token }}é", "{{ messages }}", "tools: {{ tools }}"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = folders.write(tmp_path / "model")
    made = byte_level()
    made.add_special_tokens(["<s>", "</s>"])
    made.save(str(folder / "tokenizer.json"))
    return folder


def say(folder: Path, **changes: Any) -> None:
    """Write the tokenizer's settings."""
    (folder / "tokenizer_config.json").write_text(json.dumps({**SAID, **changes}))


def found(folder: Path) -> FoundModel:
    return find_model(ModelSource("huggingface", str(folder)), 64)


def template(folder: Path) -> str | None:
    blob = found(folder).chat
    return None if blob is None else json.loads(blob)["template"]


def default(folder: Path) -> str | None:
    """Return the template that the library renders a chat without tools with."""
    from transformers import AutoTokenizer

    given = AutoTokenizer.from_pretrained(folder).chat_template
    return given.get("default") if isinstance(given, dict) else given


NAMED = [{"name": "tool_use", "template": THREE}, {"name": "default", "template": TWO}]
SETTINGS: dict[str, tuple[dict[str, Any], str | None]] = {
    "none": ({}, None),
    "null": ({"chat_template": None}, None),
    "a text": ({"chat_template": ONE}, ONE),
    "a list": ({"chat_template": NAMED}, TWO),
    "a list with two defaults": ({"chat_template": [*NAMED, {"name": "default", "template": ONE}]}, ONE),
    "a list without a default": ({"chat_template": NAMED[:1]}, None),
    "an object": ({"chat_template": {"default": ONE, "rag": TWO}}, ONE),
}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("file", [None, "{{ 1 }}\r\nof a file"])
def test_the_template_is_the_one_that_the_library_finds(name: str, file: str | None, model: Path) -> None:
    said, expected = SETTINGS[name]
    say(model, **said)
    if file is not None:
        (model / "chat_template.jinja").write_bytes(file.encode())
        expected = file.replace("\r\n", "\n")
    assert template(model) == expected == default(model)


def test_a_folder_without_settings_has_the_template_of_its_file(model: Path) -> None:
    assert found(model).chat is None
    (model / "chat_template.jinja").write_text(ONE)
    assert found(model).chat == ChatTemplate(ONE).blob()


def test_special_tokens_are_texts_however_they_are_written(model: Path) -> None:
    marked = {"content": "</s>", "lstrip": False, "normalized": False, "__type": "AddedToken"}
    say(model, chat_template=ONE, eos_token=marked, pad_token=None, unk_token="?", mask_token="[M]", bos_token="<s>")
    assert found(model).chat == ChatTemplate(ONE, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "?"}).blob()


def test_the_same_template_in_either_place_is_the_same(model: Path) -> None:
    say(model, chat_template=ONE)
    before = found(model).chat
    say(model)
    (model / "chat_template.jinja").write_text(ONE)
    assert found(model).chat == before


def test_a_template_changes_no_digest_of_a_model(model: Path) -> None:
    before = found(model)
    say(model, chat_template=ONE)
    assert (found(model).digest, found(model).notes, before.chat) == (before.digest, before.notes, None)


def test_a_model_without_a_tokenizer_has_no_use_for_one(model: Path) -> None:
    say(model, chat_template=ONE)
    (model / "tokenizer.json").unlink()
    assert found(model).chat is None


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "a number": ({"chat_template": 3}, "chat_template is 3, which is no text"),
    "a default that is a list": ({"chat_template": {"default": []}}, "chat_template is [], which is no text"),
    "a list of texts": ({"chat_template": [ONE]}, "chat_template is a list whose entries are not all a name"),
    "a list of other objects": ({"chat_template": [{"name": "default"}]}, "entries are not all a name and a template"),
    "too large a text": ({"chat_template": "a" * (LARGEST_BYTES + 1)}, "a chat template of 1048577 bytes"),
    "a token that is a number": ({"chat_template": ONE, "eos_token": 2}, "eos_token is 2, which is no text"),
    "a token without its text": ({"chat_template": ONE, "bos_token": {"content": 1}}, 'is {"content": 1}, which is'),
}


@pytest.mark.parametrize("name", FAULTS)
def test_settings_that_hold_no_template_are_refused_by_file_and_key(name: str, model: Path) -> None:
    said, told = FAULTS[name]
    say(model, **said)
    with pytest.raises(InputError) as caught:
        found(model)
    assert str(caught.value).startswith(f"{model / 'tokenizer_config.json'}: ")
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"\xff{{", "not UTF-8 text: byte 0 cannot be read"),
        (b"a" * (LARGEST_BYTES + 1), "a chat template of 1048577 bytes; 1048576 are taken at most"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer, not the file itself"),
    ],
)
def test_a_file_that_is_no_template_is_refused(data: bytes, told: str, model: Path) -> None:
    (model / "chat_template.jinja").write_bytes(data)
    with pytest.raises(InputError, match=f"chat_template.jinja: {told}"):
        found(model)


def test_settings_that_are_no_json_are_refused(model: Path) -> None:
    (model / "tokenizer_config.json").write_text("{")
    with pytest.raises(InputError, match=r"tokenizer_config.json: not JSON"):
        found(model)


def test_a_template_that_cannot_be_rendered_is_told_and_the_model_is_taken(model: Path) -> None:
    say(model, chat_template="{{ a }}\n{% if %}")
    assert found(model).notes == (
        "the chat template is not one of Jinja2: line 2: Expected an expression, got 'end of statement block': chats "
        "with this model will be refused",
    )


def test_a_model_is_found_without_torch(model: Path) -> None:
    say(model, chat_template=ONE)
    code = (
        "import sys; from llmbuild.frontend.source import find_model; from llmbuild.spec.recipe import ModelSource; "
        f"assert find_model(ModelSource('huggingface', {str(model)!r}), 64).chat; "
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
