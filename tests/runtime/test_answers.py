"""Answers of a built model: stream, batch and command say the same; several go on at a time; what is odd is told."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import llmbuild
from llmbuild.errors import InputError
from llmbuild.runtime import load
from llmbuild.runtime.answers import Reading, Stops, Text
from llmbuild.runtime.detokenize import Decoder, stages
from llmbuild.runtime.model import Model
from llmbuild.runtime.sampling import Sampling
from llmbuild.runtime.together import answer
from llmbuild.runtime.tokenizer import Tokenizer
from tests.conftest import Project
from tests.runtime.test_tokenizer import BOTH, byte_fallback, saved

CONTEXT = 32
HOT: dict[str, Any] = {"temperature": 3.0}


@pytest.fixture(scope="module")
def model(built: Project) -> Model:
    return load(built.catalog, "tiny")


@pytest.fixture(scope="module")
def foreign(built: Project, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """The built model with a tokenizer as Llama's: most of what it draws are bytes of no character."""
    made = byte_fallback()
    made.post_processor = BOTH
    found = load(built.catalog, "tiny")
    found.__dict__["tokenizer"] = saved(made, tmp_path_factory.mktemp("foreign") / "tokenizer.json")
    return found


@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=3), max_size=3), st.data())
def test_stop_strings_end_a_text_alike_for_every_split(text: str, stops: list[str], data: Any) -> None:
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=4)))
    found = Stops(stops)
    pieces = [found.push(text[a:b]) for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert "".join([*pieces, found.end()]) == (text[: min(ends)[1]] if ends else text)
    assert found.found == bool(ends)


def test_end_tokens_are_no_text_and_a_cut_character_is_told() -> None:
    words = ["a", "<|end|>", "<0xE2>"]
    text = Text(Decoder(stages({"type": "ByteFallback"}), words.__getitem__), [1], ["b"])
    assert [text.push(0), text.push(2), text.push(1), text.end()] == ["a", "", "", "\ufffd"]


@pytest.mark.parametrize("drawn", [{}, *({**HOT, "seed": seed} for seed in range(8))], ids=str)
@pytest.mark.parametrize("stop", [(), ("a", "\ufffd\ufffd")], ids=str)
def test_stream_and_batch_say_the_same(foreign: Model, drawn: dict[str, Any], stop: tuple[str, ...]) -> None:
    stream = foreign.generate("ab", 12, stop=stop, **drawn)
    text = "".join(stream)
    (whole,) = foreign.complete(["ab"], 12, stop=stop, **drawn)
    assert (whole.text, whole.finish_reason) == (text, stream.finish_reason)
    assert foreign.generate_batch(["ab"], 12, stop=stop, **drawn) == [text]
    if not stop:
        ids = foreign.tokenizer.encode("ab").ids
        assert foreign.tokenizer.decode(ids + list(whole.tokens)) == foreign.tokenizer.decode(ids) + text


def test_run_prints_what_the_stream_says(built: Project, model: Model) -> None:
    done = run(built, "--prompt", "é", "--max-new-tokens", "9", "--temperature", "3", "--seed", "1")
    text = "".join(model.generate("é", 9, temperature=3.0, seed=1))
    assert (done.returncode, done.stdout) == (0, f"é{text}\n"), done.stderr


def test_answers_read_in_turns_are_those_read_alone(model: Model) -> None:
    prompts, hot = [[7, 8, 9], [11] * 9, [5, 6]], Sampling(temperature=2.0, seed=1)
    alone = [list(model.tokens(prompt, 8, hot)) for prompt in prompts]
    streams = [model.tokens(prompt, 8, hot) for prompt in prompts]
    assert list(zip(*streams, strict=True)) == list(zip(*alone, strict=True))
    assert [stream.finish_reason for stream in streams] == ["length"] * 3


def test_an_answer_that_is_given_up_frees_its_place(model: Model) -> None:
    session = model.session
    first, second, third = (model.tokens([n], 8) for n in (1, 2, 3))
    assert [next(first), next(second)] and len(session._taken) == 2
    first.close()
    with second:
        pass
    del third
    assert (len(session._taken), len(session._spare)) == (0, 1)
    assert first.finish_reason is None


def test_a_batch_between_the_tokens_of_a_stream_changes_neither(model: Model) -> None:
    alone, batch = list(model.tokens([7, 8, 9], 6)), answer(model.session, [[5], [6, 7]], 4, Sampling())
    stream = model.tokens([7, 8, 9], 6)
    begun = [next(stream), next(stream)]
    assert answer(model.session, [[5], [6, 7]], 4, Sampling()) == batch
    model.session.prefill([300, 2, 1])
    assert [*begun, *stream] == alone


@pytest.mark.parametrize(
    ("prompt", "most", "reason", "tokens"),
    [
        ([5] * (CONTEXT - 2), 64, "context", 3),
        ([5] * CONTEXT, 64, "context", 1),
        ([5], 3, "length", 3),
        ([5], 0, "length", 0),
    ],
)
def test_an_answer_says_why_it_ended(model: Model, prompt: list[int], most: int, reason: str, tokens: int) -> None:
    stream = model.tokens(prompt, most)
    assert (len(list(stream)), stream.finish_reason) == (tokens, reason)


def test_an_end_token_that_is_not_marked_is_not_printed(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    tokens = list(model.tokens(model.tokenizer.encode("def").ids, 4))
    ends = replace(model.session.abi, eos_tokens=(tokens[2],))
    monkeypatch.setattr(model.session, "abi", ends)
    stream = model.generate("def", 4)
    whole = model.complete(["def"], 4)[0]
    assert ("".join(stream), stream.finish_reason) == (model.tokenizer.decode(tokens[:2]), "stop")
    assert (whole.text, whole.finish_reason, list(whole.tokens)) == (
        "".join(model.generate("def", 4)),
        "stop",
        tokens[:3],
    )


CALLS: dict[str, tuple[Callable[[Model], Any], str]] = {
    "a token past the vocabulary": (lambda m: m.session.decode(320, 3), "token is 320; it must be 0 to 319"),
    "a negative token": (lambda m: m.session.decode(-1, 3), "token is -1"),
    "a huge token": (lambda m: m.session.decode(10**30, 3), "token is 10"),
    "a token of text": (lambda m: m.session.decode("a", 3), "token is str 'a'; it must be an integer"),
    "a fraction": (lambda m: m.session.decode(1.5, 3), "token is float 1.5"),
    "a truth value": (lambda m: m.session.decode(True, 3), "token is bool True"),
    "a position past the context": (lambda m: m.session.decode(1, CONTEXT), "position is 32; it must be 0 to 31"),
    "a negative position": (lambda m: m.session.decode(1, -1), "position is -1"),
    "a batch with a token past it": (lambda m: m.session.decode_batch(np.array([400]), 3), "token 400 is outside"),
    "a batch of floats": (lambda m: m.session.decode_batch(np.array([1.0]), 3), "tokens is a ndarray of float64"),
    "places of another shape": (lambda m: m.session.decode_batch(np.array([1]), np.array([1, 2])), "its shape is"),
    "no place": (lambda m: m.session.decode_batch(np.array([1]), None), "positions"),
    "a prompt of text": (lambda m: m.session.prefill("abc"), "the prompt is str 'abc'; it must be integers"),
    "a prompt of floats": (lambda m: m.session.prefill([1.0]), "the prompt is a list of float64"),
    "a prompt of prompts": (lambda m: m.session.prefill([[1], [2]]), r"the shape \[2, 1\]"),
    "an empty prompt": (lambda m: m.session.prefill([]), "the prompt is empty"),
    "a start before the first": (lambda m: m.session.prefill([1], -1), "start is -1"),
    "a start past the context": (lambda m: m.session.prefill([1, 2], 31), "2 tokens from position 31 on do not fit"),
    "a cache of something else": (lambda m: m.session.decode(1, 3, cache=[1]), "what `Session.cache` gives"),
    "a long prompt": (lambda m: m.tokens([1] * 33), "33 tokens do not fit in a context of 32"),
    "tokens of no number": (lambda m: m.tokens([1], "many"), "max_new_tokens is str 'many'"),
    "fewer than no tokens": (lambda m: m.tokens([1], -1), "max_new_tokens is -1"),
    "sampling of another type": (lambda m: m.tokens([1], 1, {"seed": 1}), "must be a `Sampling`"),
    "a text as prompts": (lambda m: m.generate_batch("abc"), "prompts is str 'abc'; it must be a list of strings"),
    "prompts of tokens": (lambda m: m.generate_batch([[1, 2]]), r"prompts\[0\] is a list; it must be a string"),
    "a text as prompts of tokens": (lambda m: m.tokens_batch("abc"), "a list of lists"),
    "tokens as prompts": (lambda m: m.tokens_batch([1, 2]), r"prompts\[0\] has the shape \[\]"),
    "one bad prompt of several": (lambda m: m.tokens_batch([[1], [999]]), r"prompts\[1\]: token 999 is outside"),
    "a prompt that is none": (lambda m: m.generate(7), "the text is int 7"),
    "a prompt of no text": (lambda m: m.generate("\udc80"), "U\\+DC80 alone"),
    "an empty text": (lambda m: m.generate(""), "the prompt is empty"),
    "an empty stop": (lambda m: m.generate("a", stop=[""]), "stop has an empty string"),
    "a stop of bytes": (lambda m: m.generate("a", stop=[b"x"]), r"stop\[0\] is a bytes"),
    "an option that is not known": (lambda m: m.generate("a", tempreture=1), "tempreture: no such option"),
}


LOADS: dict[str, tuple[dict[str, Any], str]] = {
    "a catalog of no path": ({"catalog": 3}, "catalog is a int; it must be a path"),
    "a model of no name": ({"model": 7}, "model is int 7; it must be a string"),
    "bounds of no text": ({"slo": 5}, "slo is int 5; it must be a list of strings"),
    "a bound of no text": ({"slo": [5]}, r"slo\[0\] is int 5"),
    "an objective of no text": ({"objective": b"tpot_s"}, "objective is a bytes"),
}


@pytest.mark.parametrize("name", LOADS)
def test_a_load_that_makes_no_sense_is_one_message(built: Project, name: str) -> None:
    changed, told = LOADS[name]
    with pytest.raises(InputError, match=told):
        load(**{"catalog": built.catalog, "model": "tiny", **changed})


def test_one_bound_may_be_given_as_a_string(built: Project) -> None:
    assert (
        load(built.catalog, "tiny", "artifact_bytes<=1e12").pick.slo
        == load(built.catalog, "tiny", ["artifact_bytes<=1e12"]).pick.slo
    )


@pytest.mark.parametrize("name", CALLS)
def test_what_makes_no_sense_is_one_message(model: Model, name: str) -> None:
    call, told = CALLS[name]
    with pytest.raises(InputError, match=told):
        call(model)


def test_a_model_is_closed_at_the_end_of_a_with(built: Project) -> None:
    with load(built.catalog, "tiny") as opened:
        session, stream = opened.session, opened.tokens([1, 2], 8)
        next(stream)
    for call in (lambda: opened.tokens([1], 1), lambda: next(stream), lambda: session.prefill([1]), session.logits):
        with pytest.raises(InputError, match="closed"):
            call()
    opened.close()


def test_logits_of_no_call_are_told(built: Project) -> None:
    with load(built.catalog, "tiny") as opened, pytest.raises(InputError, match="call `prefill` first"):
        opened.session.logits()


def test_the_module_names_what_it_has() -> None:
    assert set(llmbuild.__all__) <= set(dir(llmbuild))


def run(built: Project, *arguments: str, stdin: bytes = b"") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "llmbuild", "run", "tiny", "-C", str(built.catalog), *arguments]
    done = subprocess.run(command, input=stdin, capture_output=True, check=False, timeout=300)
    return subprocess.CompletedProcess(command, done.returncode, done.stdout.decode(), done.stderr.decode())


def test_run_reads_a_prompt_from_standard_input(built: Project, model: Model) -> None:
    text = "".join(model.generate("self\n", 3))
    for arguments in ((), ("--prompt", "-")):
        done = run(built, "--max-new-tokens", "3", *arguments, stdin=b"self\n")
        assert (done.returncode, done.stdout) == (0, f"self\n{text}\n"), done.stderr


def test_run_without_a_prompt_lets_the_model_begin(built: Project, model: Model) -> None:
    done = run(built, "--max-new-tokens", "3")
    assert (done.returncode, done.stdout) == (0, "".join(model.generate(None, 3)) + "\n"), done.stderr
    assert "put first" in done.stderr


def test_run_checks_before_it_prints_and_says_when_the_context_is_full(built: Project, model: Model) -> None:
    refused = [
        (run(built, "--prompt", "self." * 200), "do not fit in a context of 32"),
        (run(built, "--prompt", "-", stdin=b"\xff"), "standard input is not UTF-8"),
        (run(built, "--prompt", "a", "--temperature", "nan"), "temperature is nan"),
    ]
    assert [(r.returncode, r.stdout, told in r.stderr) for r, told in refused] == [(2, "", True)] * 3
    streams = {text: model.generate(text, 99) for n in range(16, 10, -1) for text in ["self." * n]}
    prompt = next(text for text, stream in streams.items() if list(stream) and stream.finish_reason == "context")
    full = run(built, "--prompt", prompt, "--max-new-tokens", "99")
    assert (full.returncode, "the context of 32 tokens is full" in full.stderr) == (0, True), full.stderr


def test_reading_gathers_what_a_stream_gives() -> None:
    made = Reading(Decoder(stages(None), ["a", "b"].__getitem__), (), ("b",))
    assert [made.push(0), made.push(1)] == [False, True]
    assert made.whole((0, 1), "length").finish_reason == "stop"


def test_a_tokenizer_that_cannot_be_read_refuses_the_load(built: Project, tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read"):
        Tokenizer(tmp_path / "t.json")
