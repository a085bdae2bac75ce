"""Text that is given piece by piece is the library's own text of the same tokens, whatever the decoder is."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders

from llmbuild.runtime.detokenize import BYTES, Decoder, overlap, stages

LLAMA: list[dict[str, Any]] = [
    {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
    {"type": "Strip", "content": " ", "start": 1, "stop": 0},
]
NAMED: dict[str, dict[str, Any] | None] = {
    "byte level": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    "byte fallback": {"type": "Sequence", "decoders": LLAMA},
    "word pieces": {"type": "WordPiece", "prefix": "##", "cleanup": True},
    "unigram": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
    "suffixes": {"type": "BPEDecoder", "suffix": "</w>"},
    "ctc": {"type": "CTC", "pad_token": "<pad>", "word_delimiter_token": "|", "cleanup": True},
    "none": None,
}
SINGLE = st.one_of(
    st.sampled_from([one for one in NAMED.values() if one and one["type"] != "Sequence"]),
    st.sampled_from(LLAMA),
    st.builds(
        lambda pattern, content: {"type": "Replace", "pattern": pattern, "content": content},
        st.sampled_from([{"String": "ab"}, {"String": "aa"}, {"String": " "}, {"Regex": "a+"}]),
        st.sampled_from(["", "b", "  "]),
    ),
    st.builds(
        lambda content, start, stop: {"type": "Strip", "content": content, "start": start, "stop": stop},
        st.sampled_from([" ", "a"]),
        st.integers(0, 2),
        st.integers(0, 2),
    ),
)
ANY = st.one_of(
    st.sampled_from(list(NAMED.values())),
    st.lists(SINGLE, min_size=1, max_size=4).map(lambda found: {"type": "Sequence", "decoders": found}),
)
WORDS = (
    ["a", "b", "aa", "ab", "aab", " ", "  ", " a", "▁", "▁a", "a▁b", "##a", "##", ".", "'s", "a</w>", "</w>", "a</w>b"]
    + ["<pad>", "|", "é", "€", "Ġa", "Ã", "©", "âĤ", "¬", "ðŁĺĢ", "<0x41>", "<0x+5>", "<0xG1>", "�"]
    + [f"<0x{byte:02X}>" for byte in "é€😀".encode()]
)
TOKENS = st.lists(st.sampled_from(WORDS), max_size=12)


def library(state: dict[str, Any] | None) -> Any:
    """The library's decoder of a JSON form."""
    model = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}
    return Tokenizer.from_str(json.dumps({"version": "1.0", "model": model, "decoder": state})).decoder


def pieces(state: dict[str, Any] | None, tokens: list[str], before: list[str] | None = None) -> list[str]:
    """What a decoder gives for each token, and at the end."""
    made = Decoder(stages(state), (tokens + (before or [])).__getitem__)
    made.begin(range(len(tokens), len(tokens) + len(before or [])))
    return [*(made.push(i) for i in range(len(tokens))), made.end()]


def whole(state: dict[str, Any] | None, tokens: list[str]) -> str | None:
    """The library's text; None where it panics, or where bytes are none of UTF-8 to it."""
    made = library(state)
    try:
        text = " ".join(tokens) if made is None else made.decode(tokens)
    except BaseException as error:  # a panic is no Exception
        if type(error).__name__ != "PanicException":
            raise
        return None
    return None if "�" in text and "ByteFallback" in json.dumps(state) else text


@settings(max_examples=300)
@given(ANY, TOKENS)
def test_pieces_joined_are_the_librarys_text(state: dict[str, Any] | None, tokens: list[str]) -> None:
    expected = whole(state, tokens)
    if expected is not None:
        assert "".join(pieces(state, tokens)) == expected


@settings(max_examples=200)
@given(ANY, TOKENS, st.data())
def test_a_continuation_is_what_the_text_has_beyond_its_beginning(
    state: dict[str, Any] | None, tokens: list[str], data: Any
) -> None:
    split = data.draw(st.integers(0, len(tokens)))
    expected, begun = "".join(pieces(state, tokens)), "".join(pieces(state, tokens[:split]))
    if expected.startswith(begun):
        assert begun + "".join(pieces(state, tokens[split:], tokens[:split])) == expected


@settings(max_examples=100)
@given(st.binary(max_size=24), st.sampled_from(["byte level", "byte fallback"]))
def test_any_bytes_become_text_and_a_bad_one_takes_nothing_with_it(data: bytes, name: str) -> None:
    signs = {byte: sign for sign, byte in BYTES.items()}
    tokens = [signs[byte] if name == "byte level" else f"<0x{byte:02X}>" for byte in data]
    text = data.decode("utf-8", "replace")
    assert "".join(pieces(NAMED[name], tokens)) == (text if name == "byte level" else text.removeprefix(" "))
    if name == "byte level":
        assert decoders.ByteLevel().decode(tokens) == text


@pytest.mark.parametrize(
    ("name", "tokens", "expected"),
    [
        ("byte level", ["Ã", "©"], ["", "é", ""]),
        ("byte level", ["Ã", "a"], ["", "�a", ""]),
        ("byte fallback", ["▁a", "<0xE2>", "<0x82>", "<0xAC>", "b"], ["a", "", "", "€", "b", ""]),
        ("byte fallback", ["<0xE2>", "<0x82>", "<0xAC>", "<0xFF>", "▁b"], ["", "", "€", "�", " b", ""]),
        ("byte fallback", ["a", "<0xE2>", "<0x82>"], ["a", "", "", "�"]),
        ("suffixes", ["a</w>", "b</w>"], ["a", " b", ""]),
        ("word pieces", ["a", "##b", ".", "a"], ["a", "b", ".", " a", ""]),
    ],
)
def test_a_piece_is_given_as_soon_as_it_is_certain(name: str, tokens: list[str], expected: list[str]) -> None:
    assert pieces(NAMED[name], tokens) == expected


def test_a_continuation_of_a_cut_character_gives_the_character() -> None:
    state = NAMED["byte fallback"]
    assert pieces(state, ["<0x82>", "<0xAC>"], ["a", "<0xE2>"]) == ["", "€", ""]
    assert pieces(state, ["b"], ["a", "<0xE2>"]) == ["b", ""]


def test_a_decoder_that_is_not_known_is_named() -> None:
    with pytest.raises(KeyError, match="Rot13"):
        stages({"type": "Rot13"})


@given(st.text("ab", max_size=8), st.text("ab", min_size=1, max_size=4))
def test_overlap_is_the_longest_end_that_may_begin_the_pattern(text: str, pattern: str) -> None:
    ends = [n for n in range(min(len(text), len(pattern) - 1) + 1) if text.endswith(pattern[:n])]
    assert overlap(text, pattern) == max(ends)
