"""Answers of a form: whatever the device prefers, an answer that ends matches its schema."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from llmbuild.serve.choose import Chooser
from llmbuild.serve.errors import RequestRefused
from llmbuild.serve.grammar import Grammars
from llmbuild.serve.request import Request, SamplingParams
from llmbuild.serve.step import Output

LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
VOCABULARY, END = len(LETTERS) + 8, len(LETTERS)
"""Each byte is a token, then comes the end, then tokens that no text has."""

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 4}, "age": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def grammars(tmp_path_factory: pytest.TempPathFactory) -> Grammars:
    made = Tokenizer(models.BPE({letter: i for i, letter in enumerate(LETTERS)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<end>"])
    path = tmp_path_factory.mktemp("grammar") / "tokenizer.json"
    made.save(str(path))
    return Grammars(path, VOCABULARY, [END])


def answer(grammars: Grammars, schema: Any, seed: int, **params: Any) -> str:
    """Return an answer of a device that prefers anything."""
    grammar = grammars.of_schema("f", schema)
    chooser = Chooser(Request("r", (1,), SamplingParams.of(params), seed, grammar=grammar), 0, [END])
    assert chooser.reads
    drawn, found = np.random.default_rng(seed), list[int]()
    while END not in found:
        row = drawn.normal(0, 3, VOCABULARY).astype(np.float32)
        best = restricted(chooser, row)
        found.append(chooser.choose(Output(int(row.argmax()), row))[0])
        if chooser._params.plain:
            assert found[-1] == best, "the likeliest of those that may follow"
        assert len(found) < 200
    back = {letter: byte for byte, letter in _bytes().items()}
    return bytes(back[LETTERS[token]] for token in found[:-1]).decode()


def restricted(chooser: Chooser, row: Any) -> int:
    """Return the likeliest token of those that may follow, of all of them."""
    assert chooser._matching is not None
    allowed = chooser._matching.allowed()
    return int(allowed[row[allowed].argmax()])


def _bytes() -> dict[int, str]:
    from llmbuild.runtime.detokenize import BYTES

    return {byte: letter for letter, byte in BYTES.items()}


@pytest.mark.parametrize("params", [{"temperature": 0}, {"temperature": 1.5}, {"frequency_penalty": 1.0}], ids=str)
def test_every_answer_matches_its_schema(grammars: Grammars, params: dict[str, Any]) -> None:
    found = [json.loads(answer(grammars, SCHEMA, seed, **params)) for seed in range(20)]
    for one in found:
        assert set(one) == {"name", "age"}
        assert isinstance(one["name"], str) and len(one["name"]) <= 4
        assert one["age"] in range(10)
    assert len({str(one) for one in found}) > 10


def test_what_a_grammar_leaves_no_choice_about_is_known_ahead(grammars: Grammars) -> None:
    grammar = grammars.of_schema("f", {"const": "abc"})
    chooser = Chooser(Request("r", (1,), SamplingParams(temperature=0), 0, grammar=grammar), 0, [END])
    assert "".join(LETTERS[token] for token in chooser.forced()) == '"abc"'
    row = np.zeros(VOCABULARY, np.float32)
    assert LETTERS[chooser.choose(Output(0, row))[0]] == '"'
    assert "".join(LETTERS[token] for token in chooser.forced()) == 'abc"'
    free = Chooser(Request("r", (1,), SamplingParams(temperature=0), 0), 0, [END])
    assert free.forced() == []


def test_a_device_that_loves_line_breaks_does_not_go_on_for_ever(grammars: Grammars) -> None:
    chooser = Chooser(
        Request("r", (1,), SamplingParams(temperature=0), 0, grammar=grammars.of_schema("f", {"type": "array"})),
        0,
        [END],
    )
    row = np.zeros(VOCABULARY, np.float32)
    row[LETTERS.index("\u010a")] = 9  # the line break
    row[LETTERS.index("]")] = 5
    said = [chooser.choose(Output(int(row.argmax()), row))[0] for _ in range(12)]
    assert said[0] == LETTERS.index("[")
    assert LETTERS.index("]") in said


@pytest.mark.parametrize("schema", [SCHEMA, {"type": "string"}, {"type": "integer"}, {}], ids=str)
def test_one_token_is_asked_about_as_all_are(grammars: Grammars, schema: Any) -> None:
    at, drawn = grammars.of_schema("f", schema).begin(), np.random.default_rng(3)
    for _ in range(12):
        allowed = at.allowed()
        if allowed.tolist() == [END]:
            break  # nothing but the end may follow: it is found by asking about all
        assert allowed.tolist() == sorted(set(allowed.tolist()))
        for token in set(range(VOCABULARY)) - set(allowed.tolist()):
            assert not at.tries(token)
        assert at.tries(int(drawn.choice(allowed)))


@pytest.mark.parametrize("schema", [{"type": "nothing"}, {"$ref": "#/none"}, {"pattern": "(?=a)", "type": "string"}, 7])
def test_a_schema_that_is_none_is_refused_and_the_next_one_taken(grammars: Grammars, schema: Any) -> None:
    with pytest.raises(RequestRefused) as told:
        grammars.of_schema("response_format", schema)
    assert told.value.param == "response_format"
    assert json.loads(answer(grammars, {"const": 5}, 1)) == 5


def test_a_model_without_an_end_is_told(tmp_path: Path) -> None:
    with pytest.raises(RequestRefused, match="no end token"):
        Grammars(tmp_path, 5, []).of_schema("f", {})


def test_rows_with_and_without_a_grammar_do_not_mix(grammars: Grammars) -> None:
    free = Chooser(Request("a", (1,), SamplingParams(temperature=0), 0), 0, [END])
    held = Chooser(
        Request("b", (1,), SamplingParams(temperature=0), 0, grammar=grammars.of_schema("f", SCHEMA)), 0, [END]
    )
    row = np.arange(VOCABULARY, dtype=np.float32)
    assert free.choose(Output(VOCABULARY - 1, row))[0] == VOCABULARY - 1
    assert held.choose(Output(VOCABULARY - 1, row))[0] == LETTERS.index("{")
    assert (row == np.arange(VOCABULARY)).all()
