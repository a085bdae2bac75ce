"""Unusual texts, token ids and tokenizer files for `fuzz.py`: each has one correct result, or one error."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

from llmbuild.runtime.tokenizer import Tokenizer

TEXTS = [
    *"|  |  a|a  |\x00|a\x00b|é|e\u0301|€|😀|\u202e abc|\ufeff|ﬁ|İ|ß".split("|"),
    *"\r\n|\u2028|\ufffd|\U0010ffff|\ue000|\x7f\x80".split("|"),
    *"<s>|</s>|<s><s>a|<|end|>|<0x41>|▁|▁▁a|Ġ|##a|a</w>|\ud800|a\udfffb|\ud83d\ude00|def main(".split("|"),
    *("0123456789" * 9, "a" * 5000, "é" * 3000, " " * 2000),
]
IDS = [0, 1, 2, 3, 5, 17, 258, 259, 260, 300, 999, 2**31, 2**32 - 1]
ODD_IDS: list[Any] = [-1, 2**32, 2**64, 1.5, "a", None, True, [1], b"x", float("nan"), 10**30]
VALUES: list[Any] = [
    None,
    True,
    -1,
    0,
    1,
    1.5,
    2**31,
    2**32,
    2**64,
    "",
    "a",
    "▁",
    "<s>",
    " ",
    [],
    {},
    [[]],
    ["a", "b"],
    {"a": 0},
]
DECODERS: list[Any] = [
    None,
    {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
    {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
    {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never", "split": True},
    {"type": "WordPiece", "prefix": "##", "cleanup": True},
    {"type": "BPEDecoder", "suffix": "</w>"},
    {"type": "BPEDecoder", "suffix": ""},
    {"type": "CTC", "pad_token": "a", "word_delimiter_token": "|", "cleanup": True},
    {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
    {"type": "Replace", "pattern": {"String": ""}, "content": "x"},
    {"type": "Replace", "pattern": {"Regex": "a*"}, "content": "b"},
    {"type": "Replace", "pattern": {"Regex": "("}, "content": "b"},
    {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    {"type": "Strip", "content": "a", "start": 3, "stop": 9},
    {"type": "Rot13"},
]
NORMALIZERS: list[Any] = [
    None,
    {"type": "NFKC"},
    {"type": "Lowercase"},
    {"type": "Prepend", "prepend": "▁"},
    {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    {"type": "Replace", "pattern": {"Regex": "a*"}, "content": ""},
    {"type": "Strip", "strip_left": True, "strip_right": True},
    {"type": "StripAccents"},
    {
        "type": "BertNormalizer",
        "clean_text": True,
        "handle_chinese_chars": True,
        "strip_accents": None,
        "lowercase": True,
    },
    {"type": "ByteLevel"},
    {"type": "Precompiled", "precompiled_charsmap": "AAAAAA=="},
    {"type": "Precompiled", "precompiled_charsmap": ""},
]
PRE_TOKENIZERS: list[Any] = [
    None,
    {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": True},
    {"type": "Whitespace"},
    {"type": "BertPreTokenizer"},
    {"type": "Digits", "individual_digits": True},
    {"type": "Split", "pattern": {"Regex": ""}, "behavior": "Isolated", "invert": False},
    {"type": "Split", "pattern": {"String": "a"}, "behavior": "Removed", "invert": True},
    {"type": "Punctuation", "behavior": "MergedWithNext"},
    {"type": "UnicodeScripts"},
    {"type": "FixedLength", "length": 3},
]


def _template(single: str, ids: list[int]) -> dict[str, Any]:
    pieces = [
        {"Sequence": {"id": word[1:], "type_id": 0}} if word[0] == "$" else {"SpecialToken": {"id": word, "type_id": 0}}
        for word in single.split()
    ]
    named = {w: {"id": w, "ids": ids, "tokens": [w] * len(ids)} for w in single.split() if w[0] != "$"}
    return {"type": "TemplateProcessing", "single": pieces, "pair": pieces, "special_tokens": named}


POST_PROCESSORS: list[Any] = [
    None,
    {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    {"type": "BertProcessing", "sep": ["</s>", 1], "cls": ["<s>", 0]},
    {
        "type": "RobertaProcessing",
        "sep": ["</s>", 1],
        "cls": ["<s>", 0],
        "trim_offsets": True,
        "add_prefix_space": True,
    },
    _template("<s> $A </s>", [0]),
    _template("<s> $A", [0, 1, 2**32 - 1]),
    _template("$A $A", [0]),
    _template("<s>", [0]),
    _template("<s> $B", [0]),
    _template("<s> <s> $A", [3]),
]


def _model() -> dict[str, Any]:
    """Return one of four kinds of models; ids may have holes."""
    step = random.choice([1, 1, 1, 3])
    words = [
        "<s>",
        "</s>",
        "<unk>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *"abcdefmin▁ ().",
        "▁a",
        "ab",
        "##b",
        "é",
    ]
    words += [chr(code) for code in range(0x100, 0x144)] if random.random() < 0.5 else []
    vocabulary = {word: i * step for i, word in enumerate(dict.fromkeys(words))}
    kind = random.choice(["BPE", "Unigram", "WordPiece", "WordLevel"])
    if kind == "Unigram":
        return {
            "type": kind,
            "unk_id": 2,
            "vocab": [[w, -float(i)] for i, w in enumerate(vocabulary)],
            "byte_fallback": True,
        }
    if kind == "WordPiece":
        prefix = {"unk_token": "<unk>", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100}
        return {"type": kind, "vocab": vocabulary, **prefix}
    if kind == "WordLevel":
        return {"type": kind, "vocab": vocabulary, "unk_token": "<unk>"}
    merges = [["▁", "a"], ["a", "b"]]
    settings = {
        "dropout": random.choice([None, 0.5]),
        "unk_token": random.choice([None, "<unk>"]),
        "byte_fallback": True,
    }
    affixes = {"continuing_subword_prefix": None, "end_of_word_suffix": random.choice([None, "</w>"])}
    return {"type": kind, "vocab": vocabulary, "merges": merges, "fuse_unk": False, **affixes, **settings}


def _several(choices: list[Any], listed: str) -> Any:
    if random.random() < 0.7:
        return random.choice(choices)
    return {"type": "Sequence", listed: [one for one in random.choices(choices, k=random.randint(0, 4)) if one]}


def tokenizer() -> dict[str, Any]:
    """Return a tokenizer's JSON form whose parts are drawn one by one, and no two of them are the same object."""
    added = [
        {"id": at, "content": content, "special": random.random() < 0.5, "normalized": random.random() < 0.5}
        | {"single_word": False, "lstrip": random.random() < 0.3, "rstrip": False}
        for at, content in random.choices([(0, "<s>"), (1, "</s>"), (999, "<|end|>"), (5, ""), (2**32 - 1, "x y")], k=2)
    ]
    made = {
        "version": "1.0",
        "truncation": random.choice(
            [None, {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": random.choice([0, 2])}]
        ),
        "padding": random.choice(
            [
                None,
                {"strategy": {"Fixed": 9}, "direction": "Left", "pad_to_multiple_of": None, "pad_id": 1}
                | {"pad_type_id": 0, "pad_token": "</s>"},
            ]
        ),
        "added_tokens": random.choice([[], added]),
        "normalizer": _several(NORMALIZERS, "normalizers"),
        "pre_tokenizer": _several(PRE_TOKENIZERS, "pretokenizers"),
        "post_processor": _several(POST_PROCESSORS, "processors"),
        "decoder": _several(DECODERS, "decoders"),
        "model": _model(),
    }
    return dict(json.loads(json.dumps(made)))


def _places(node: Any) -> list[tuple[Any, Any]]:
    """Return every container of a JSON form with each of its keys; of long lists the first few."""
    keys = list(node)[:8] if isinstance(node, dict) else range(min(len(node), 8)) if isinstance(node, list) else []
    return [(node, key) for key in keys] + [place for key in keys for place in _places(node[key])]


def change_a_value(body: dict[str, Any]) -> None:
    """Put something else where a value of a JSON form was, or nothing."""
    node, key = random.choice(_places(body))
    if isinstance(node, dict) and random.random() < 0.3:
        del node[key]
    else:
        node[key] = deepcopy(random.choice(VALUES))


def try_it(path: Path) -> None:
    """Open a tokenizer and hold what it says against the laws."""
    made = Tokenizer(path)
    text = "".join(random.choices(TEXTS, k=random.randint(0, 3)))
    encoded = made.encode(text)
    assert encoded == made.encode(text), "a text has other tokens the second time"
    own = made.encode_chat(text)
    assert encoded.tokens[len(encoded.tokens) - len(own.tokens) :] == own.tokens, "something stands behind the text"
    decode(made, [*own.tokens[:50], *random.choices(IDS, k=random.randint(0, 20))])


def decode(made: Tokenizer, ids: list[int]) -> None:
    """Hold the pieces of tokens against the text of all of them."""
    whole, split = made.decode(ids), random.randint(0, len(ids))
    begun, stream = made.decode(ids[:split]), made.decoder(ids[:split])
    pieces = "".join([*map(stream.push, ids[split:]), stream.end()])
    assert not whole.startswith(begun) or begun + pieces == whole, "the pieces are not the text"
    whole.encode()


class Texts:
    """What is fed; each works in a folder of its own."""

    def __init__(self, plain: Path) -> None:
        self.plain = plain
        """A byte-level tokenizer, whose texts come back as they are."""

    def bytes(self, change: Callable[[bytes], bytes], work: Path) -> None:
        """Read a tokenizer whose file was mutated."""
        (work / "t.json").write_bytes(change(json.dumps(tokenizer(), ensure_ascii=random.random() < 0.5).encode()))
        try_it(work / "t.json")

    def values(self, _: Callable[[bytes], bytes], work: Path) -> None:
        """Read a tokenizer some of whose values are others."""
        body = tokenizer()
        for _ in range(random.randint(0, 3)):
            change_a_value(body)
        (work / "t.json").write_text(json.dumps(body))
        try_it(work / "t.json")

    def text(self, change: Callable[[bytes], bytes], work: Path) -> None:
        """Take an odd text there and back."""
        made = Tokenizer(self.plain)
        odd = random.choice(
            [random.choice(TEXTS), change(random.choice(TEXTS).encode(errors="replace")).decode(errors="replace")]
        )
        odd = random.choice([odd, odd * 50, odd + chr(random.randrange(0x110000))])
        assert made.decode(made.encode(odd).ids) == odd, "a text does not come back"

    def ids(self, _: Callable[[bytes], bytes], work: Path) -> None:
        """Make text of odd ids."""
        drawn = random.choices([*IDS, *range(300), *random.choices(ODD_IDS, k=random.choice([0, 0, 2]))], k=20)
        decode(Tokenizer(self.plain), random.choice([drawn, drawn, "abc", None, 5, {1: 2}]))
