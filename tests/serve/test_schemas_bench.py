"""The benchmark of answers of a form: a device that recites follows a grammar, and outcomes are kept."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from time import thread_time

import pytest

from llmbuild.errors import InputError
from llmbuild.serve.request import Request, SamplingParams
from tests.support.scripted import tokenizer

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "bench"))

import schemas
from comparison.recited import Recited
from schemas import Answers, Kept, Outcome

OF = {"model": "m", "variant": "v", "temperature": 1.5, "output": 9}
SHORT = {"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"], "additionalProperties": False}


def reciting(folder: Path, schema: object, errs: float) -> Answers:
    path = tokenizer(folder)
    return Answers(lambda made: Recited(path, schema, 2, errs, made.take, made.own, thread_time))


@pytest.mark.parametrize("heat", [0, 1.5])
@pytest.mark.parametrize("errs", [0.0, 0.5])
def test_answers_that_are_recited_match_their_schema(tmp_path: Path, heat: float, errs: float) -> None:
    answers, ended = reciting(tmp_path, SHORT, errs), dict[str, str]()
    answers.ended = ended.__setitem__
    grammar = answers.served.grammars.of_schema("f", SHORT)
    params = SamplingParams(temperature=heat, max_tokens=200)
    answers.run([Request(str(n), Recited.prompt(True), params, n, grammar=grammar) for n in range(4)])
    assert set(ended.values()) == {"stop"}
    assert all(schemas.valid(SHORT, answers.texts[name]) == "" for name in ended)
    assert answers.own.seconds > 0


def test_the_cost_is_of_tokens_with_a_grammar_and_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schemas, "ROUNDS", 1)
    monkeypatch.setattr(schemas, "TIMED", 4)
    answers, tokens = reciting(tmp_path, schemas.long(), 0.3), list[int]()
    run = answers.run

    def counted(requests: list[Request]) -> float:
        taken = run(requests)
        tokens.append(answers.tokens)
        return taken

    monkeypatch.setattr(answers, "run", counted)
    made = schemas.cost(answers, lambda n, s, p, g: Request(n, Recited.prompt(g is not None), p, s, grammar=g), 2, 1.5)
    assert tokens == [6, 6], "all tokens of two streams but the first of each"
    assert made["own_more_s"] == pytest.approx(made["own_bound_s"] - made["own_free_s"])


def test_outcomes_are_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "outcomes"
    first = Kept(path, OF)
    assert first.outcomes == []
    made = [Outcome(0, "ended", "", 0.1), Outcome(1, "refused", "no", 0.2)]
    for one in made:
        first.add(one)
    assert Kept(path, OF).outcomes == made
    with path.open("a") as file:
        file.write('{"seed": 2, "h')
    Kept(path, OF).add(Outcome(3, "cut", "", 0.3))
    assert [one.seed for one in Kept(path, OF).outcomes] == [0, 1, 3], "half a line is left out"


def test_outcomes_of_something_else_are_not_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "outcomes"
    Kept(path, OF)
    with pytest.raises(InputError, match="name another file"):
        Kept(path, {**OF, "variant": "w"})
    path.write_text(json.dumps(OF) + "\n{\n")
    with pytest.raises(InputError, match="name another file"):
        Kept(path, OF)
