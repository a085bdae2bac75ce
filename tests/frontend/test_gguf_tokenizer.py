"""Tokenizers of GGUF files: the ids of the model's own tokenizer, and of the library's converter, over much text."""

from __future__ import annotations

import json
import sysconfig
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from llmbuild.frontend import gguf_tokenizer
from llmbuild.frontend.source import examine
from llmbuild.runtime.tokenizer import Tokenizer as Door
from tests.support import gguf_files

pytestmark = pytest.mark.usefixtures("cache")

NORMAL, UNKNOWN, CONTROL, OWN, UNUSED, BYTE = range(1, 7)
MARKS = ("<|begin|>", "<|end|>", "<|im_start|>")
ODD = [
    "",
    " ",
    "\n\n  \n",
    "a  b\t\tc   1234567 12,345.67  x=10",
    "It's we'll THEY'RE I'M",
    "naïve café, cafe\u0301 — “quoted” … ½ ² Ⅷ",
    "日本語のテキスト。中文 한국어 العربية हिन्दी",
    "👩‍👩‍👧 emoji 🎉!!!???",
    "tabs\tand\r\nreturns\r\n\r\n   trailing   ",
    "def f(x):\n        return x**2  # 42\n",
    "<|im_start|>user\nhi<|end|> there<think>",
]
GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


@cache
def texts() -> tuple[str, ...]:
    """Return pages of this repository and modules of the standard library, some 300 kB."""
    root, library = Path(__file__).parents[2], Path(sysconfig.get_paths()["stdlib"])
    pages = sorted(root.glob("docs/**/*.md"))
    modules = [library / f"{name}.py" for name in ("argparse", "colorsys", "datetime", "heapq")]
    return (*ODD, *(path.read_text(encoding="utf-8") for path in (*pages, *modules)))


def byte_level(pre_tokenizer: Any, normalizer: Any = None, size: int = 1500) -> Any:
    """Train a byte-level tokenizer."""
    made: Any = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizer, decoders.ByteLevel()
    if normalizer is not None:
        made.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False, special_tokens=[])
    made.train_from_iterator([text for text in texts() if text], trainer)
    made.add_special_tokens(list(MARKS))
    made.add_tokens(["<think>"])
    return made


def split_by(pattern: str) -> Any:
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), behavior="isolated"), bytes_])


def keys_of(made: Any, pre: str) -> dict[str, Any]:
    """Return the metadata that llama.cpp's converter writes of a byte-level tokenizer."""
    state = json.loads(made.to_str())
    tokens = [token for token, _ in sorted(made.get_vocab().items(), key=lambda pair: pair[1])]
    kinds = dict.fromkeys(MARKS, CONTROL) | {"<think>": OWN}
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in state["model"]["merges"]]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [kinds.get(token, NORMAL) for token in tokens],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": tokens.index(MARKS[0]),
        "tokenizer.ggml.eos_token_id": tokens.index(MARKS[1]),
    }


def pieces(add: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the metadata of a SentencePiece tokenizer: pieces with scores, and bytes for what is in none."""
    made: Any = Tokenizer(models.BPE())
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"▁?[^▁\n]+|\n|▁+"), behavior="isolated")
    made.train_from_iterator([t for t in texts() if t], trainers.BpeTrainer(vocab_size=1200, show_progress=False))
    learned = [token for token, _ in sorted(made.get_vocab().items(), key=lambda pair: pair[1])]
    first = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens = [*first, *learned, "<|im_start|>"]
    kinds = [UNKNOWN, CONTROL, CONTROL, *([BYTE] * 256), *([NORMAL] * len(learned)), OWN]
    scores = [0.0] * len(first) + [-float(rank) for rank in range(len(learned))] + [-1000.0]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        **(add or {}),
    }


def write(folder: Path, keys: dict[str, Any], kind: str = "llama") -> Path:
    """Write a model whose vocabulary these keys have."""
    return gguf_files.write(folder / "m.gguf", kind, keys=keys, vocab_size=len(keys["tokenizer.ggml.tokens"]))


def door(path: Path) -> Door:
    found = examine(path, False).files.tokenizer
    assert found is not None
    return Door(found)


def library(folder: Path) -> Any:
    """Return the library's own tokenizer of the file."""
    pytest.importorskip("transformers.integrations.gguf", reason="this version of transformers has another converter")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, gguf_file="m.gguf")


# --- ids -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pre", "split"),
    [
        ("gpt-2", GPT2),
        ("default", GPT2),
        ("llama-bpe", gguf_tokenizer.SPLITS["llama-bpe"].pattern),
        ("qwen2", gguf_tokenizer.SPLITS["qwen2"].pattern),
        ("tekken", gguf_tokenizer.SPLITS["tekken"].pattern),
    ],
)
def test_ids_are_those_of_the_librarys_converter(tmp_path: Path, pre: str, split: str) -> None:
    path = write(tmp_path, keys_of(byte_level(split_by(split)), pre))
    ours, theirs = door(path), library(tmp_path)
    for text in texts():
        composed = text if pre != "qwen2" else normalizers.NFC().normalize_str(text)  # which its converter leaves out
        assert ours.encode(text, False).ids == theirs(composed, add_special_tokens=False)["input_ids"], text[:40]


@pytest.mark.parametrize(
    ("pre", "steps", "normalizer"),
    [
        (
            "smollm",
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
            None,
        ),
        ("gpt-2", [pre_tokenizers.ByteLevel(add_prefix_space=False)], None),
        ("qwen2", [split_by(gguf_tokenizer.SPLITS["qwen2"].pattern)], normalizers.NFC()),
    ],
)
def test_ids_are_those_of_the_tokenizer_that_was_written(tmp_path: Path, pre: str, steps: Any, normalizer: Any) -> None:
    made = byte_level(pre_tokenizers.Sequence(steps), normalizer)
    ours = door(write(tmp_path, keys_of(made, pre)))
    for text in texts():
        ids = ours.encode(text, False).ids
        assert ids == made.encode(text).ids
        if normalizer is None:
            shown = text
            for mark in MARKS:
                shown = shown.replace(mark, "")
            assert ours.decode(ids) == shown


def test_smollm_has_digits_alone_and_the_spaces_before_them_together(tmp_path: Path) -> None:
    ours = door(write(tmp_path, keys_of(byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False)), "smollm")))
    assert [ours.name(token) for token in ours.encode("x    2024").ids] == ["x", "ĠĠĠĠ", "2", "0", "2", "4"]


def test_a_part_that_is_a_token_is_taken_whole_where_the_family_does(tmp_path: Path) -> None:
    keys = keys_of(byte_level(split_by(gguf_tokenizer.SPLITS["llama-bpe"].pattern)), "llama-bpe")
    word = "Ġzyzzyva"
    keys["tokenizer.ggml.tokens"] += [word]
    keys["tokenizer.ggml.token_type"] += [NORMAL]
    assert door(write(tmp_path, keys)).encode("a zyzzyva", False).ids[-1] == len(keys["tokenizer.ggml.tokens"]) - 1
    qwen = door(write(tmp_path, {**keys, "tokenizer.ggml.pre": "qwen2"}))
    assert len(qwen.encode(" zyzzyva", False).ids) > 1


def test_sentencepiece_ids_are_those_of_the_librarys_converter(tmp_path: Path) -> None:
    path = write(tmp_path, pieces())
    ours, theirs = door(path), library(tmp_path)
    for text in texts():
        plain = text.lstrip(" ").replace("<|im_start|>", "")  # where theirs puts no space in front
        assert ours.encode(plain, False).ids == theirs(plain, add_special_tokens=False)["input_ids"], plain[:40]
        if plain:
            assert ours.decode(ours.encode(plain, False).ids) == plain


def test_sentencepiece_puts_one_space_in_front_unless_the_file_says_no(tmp_path: Path) -> None:
    ours = door(write(tmp_path, pieces()))
    for text, spelled in (("the", "▁the"), (" the", "▁▁the")):
        assert "".join(ours.name(token) for token in ours.encode(text, False).ids) == spelled
        assert ours.decode(ours.encode(text).ids) == text
    bare = door(write(tmp_path, pieces({"tokenizer.ggml.add_space_prefix": False})))
    assert "".join(bare.name(token) for token in bare.encode("the", False).ids) == "the"
    assert bare.decode(bare.encode(" the").ids) == " the"


def test_what_is_in_no_piece_becomes_its_bytes(tmp_path: Path) -> None:
    ours = door(write(tmp_path, pieces()))
    names = [ours.name(token) for token in ours.encode("\u1234", False).ids]
    assert names[-3:] == ["<0xE1>", "<0x88>", "<0xB4>"]
    assert ours.decode(ours.encode("\u1234").ids) == "\u1234"


# --- what is put around a text -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pre", "said", "begins"),
    [
        ("gpt-2", None, False),
        ("gpt-2", True, True),
        ("qwen2", None, False),
        ("llama-bpe", None, True),
        ("llama-bpe", False, False),
    ],
)
def test_a_text_begins_as_the_file_says_or_else_as_the_family_does(
    tmp_path: Path, pre: str, said: bool | None, begins: bool
) -> None:
    keys = keys_of(byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False), size=400), pre)
    if said is not None:
        keys["tokenizer.ggml.add_bos_token"] = said
    path = write(tmp_path, keys)
    first = door(path).encode("hello").ids[0]
    assert (first == keys["tokenizer.ggml.bos_token_id"]) == begins
    assert settings(path)["add_bos_token"] == begins


def settings(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((examine(path, False).files.folder / "tokenizer_config.json").read_text())
    return found


def test_sentencepiece_begins_with_its_token_and_an_end_is_added_where_the_file_says(tmp_path: Path) -> None:
    path = write(tmp_path, pieces({"tokenizer.ggml.add_eos_token": True}))
    whole = Tokenizer.from_file(str(examine(path, False).files.tokenizer)).encode("hello").ids
    assert (whole[0], whole[-1]) == (1, 2)
    assert door(path).encode("hello").ids == whole[:-1]  # an end would end the prompt


def test_the_template_and_the_tokens_that_it_names_are_kept(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    from transformers import AutoTokenizer

    template = "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['content'] }}{{ eos_token }}{% endfor %}"
    keys = {**keys_of(byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False), size=400), "gpt-2")}
    path = write(tmp_path, {**keys, "tokenizer.chat_template": template})
    assert settings(path)["chat_template"] == template
    reads = AutoTokenizer.from_pretrained(examine(path, False).files.folder)
    chat = [{"role": "user", "content": "hi"}]
    assert reads.apply_chat_template(chat, tokenize=False) == "<|begin|><|im_start|>hi<|end|>"
    assert (reads.bos_token_id, reads.eos_token_id) == (
        keys["tokenizer.ggml.bos_token_id"],
        keys["tokenizer.ggml.eos_token_id"],
    )
    more = {"tokenizer.chat_template": template, "tokenizer.chat_template.tool_use": "tools"}
    assert settings(write(tmp_path, {**keys, **more}))["chat_template"] == [
        {"name": "default", "template": template},
        {"name": "tool_use", "template": "tools"},
    ]


# --- tokenizers that are not taken ---------------------------------------------------------------------------------

BYTES = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": ["a", "b", "ab", "<e>"],
    "tokenizer.ggml.token_type": [1, 1, 1, 3],
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.eos_token_id": 3,
}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"tokenizer.ggml.pre": "poro-chat"}, 'tokenizer.ggml.pre is "poro-chat"; taken are default, gpt-2, smollm'),
        ({"tokenizer.ggml.pre": ...}, "tokenizer.ggml.pre is null; taken are"),
        ({"tokenizer.ggml.model": "t5"}, 'tokenizer.ggml.model is "t5"; taken are gpt2, llama'),
        (
            {"tokenizer.ggml.model": "llama", "tokenizer.ggml.merges": ...},
            "tokenizer.ggml.scores is no array of 4 values, one for each token",
        ),
        ({"tokenizer.ggml.merges": ...}, "tokenizer.ggml.merges is no array of texts"),
        ({"tokenizer.ggml.merges": ["a b c"]}, 'tokenizer.ggml.merges has "a b c", which is no pair'),
        ({"tokenizer.ggml.merges": ["a z"]}, "the tokenizers library refuses it"),
        ({"tokenizer.ggml.token_type": [1, 1]}, "tokenizer.ggml.token_type is no array of 4 values"),
        ({"tokenizer.ggml.tokens": ["a", "b", "a", "<e>"]}, 'tokenizer.ggml.tokens has "a" twice'),
        ({"tokenizer.ggml.bos_token_id": 9, "tokenizer.ggml.add_bos_token": True}, "which is none of 4 tokens"),
    ],
)
def test_a_tokenizer_that_cannot_be_made_leaves_a_model_without_and_is_told(
    tmp_path: Path, change: dict[str, Any], told: str
) -> None:
    found = examine(write(tmp_path, {**BYTES, **change}), False)
    assert found.files.tokenizer is None
    (note,) = found.notes
    assert note.startswith("built without a tokenizer, so that texts cannot be read: ")
    assert told in note


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"tokenizer.ggml.scores": [0.0]}, "tokenizer.ggml.scores is no array of"),
        ({"tokenizer.ggml.scores": ...}, "tokenizer.ggml.scores is no array of"),
        ({"tokenizer.ggml.remove_extra_whitespaces": True}, "remove_extra_whitespaces is true, which is not supported"),
        ({"tokenizer.ggml.precompiled_charsmap": [1, 2]}, "precompiled_charsmap is [1, 2], which is not supported"),
    ],
)
def test_pieces_that_do_not_say_how_a_text_is_cut_are_not_guessed(
    tmp_path: Path, change: dict[str, Any], told: str
) -> None:
    found = examine(write(tmp_path, {**pieces(), **change}), False)
    assert found.files.tokenizer is None
    assert told in found.notes[0]


def test_scores_that_are_all_alike_are_not_guessed(tmp_path: Path) -> None:
    keys = pieces()
    alike = [-1000.0] * len(keys["tokenizer.ggml.tokens"])
    found = examine(write(tmp_path, {**keys, "tokenizer.ggml.scores": alike}), False)
    assert "tokenizer.ggml.scores are all alike" in found.notes[0]


def test_a_model_without_any_tokenizer_is_told(tmp_path: Path) -> None:
    found = examine(gguf_files.write(tmp_path / "m.gguf"), False)
    assert (found.files.tokenizer, found.notes) == (None, ("the file has no tokenizer: texts cannot be read",))


def test_a_split_that_the_file_leaves_open_is_told(tmp_path: Path) -> None:
    found = examine(write(tmp_path, {**BYTES, "tokenizer.ggml.pre": "default"}), False)
    assert found.notes == ("tokenizer.ggml.pre is default: texts are split as GPT-2 splits them",)
    assert found.files.tokenizer is not None
