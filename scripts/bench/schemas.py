"""Answers under JSON schemas: how many that end are valid, and what the grammar costs for a token.

    python scripts/bench/schemas.py MODEL -C CATALOG [--schemas N] [--temperature T] [--streams N] [--json]

Schemas are drawn by a seed, of the kinds that function calls have: objects in objects, arrays with bounds,
enumerations, patterns, formats, numbers with limits, alternatives, references. A chat model is asked for an object,
at a temperature at which it would hardly write any by itself. Answers that end are parsed and validated by the
package `jsonschema`; those cut at `--output` tokens are counted apart. The cost is that of a turn of the engine,
sampling included: rounds with grammars and without run in turns on as many streams, and the ratio of their seconds
for a token is paired by round; greedy, and at the temperature. Tokens that the grammar forces are computed ahead, so
an answer with one may well take less time.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from time import perf_counter
from typing import Any

from comparison.script import end, say

from llmbuild.errors import InputError, LlmbuildError
from llmbuild.profiler.statistics import median_of, paired_ratio
from llmbuild.report.rows import quantity
from llmbuild.runtime import host, load, reader
from llmbuild.serve.errors import RequestRefused
from llmbuild.serve.events import Delta, Ended, Event
from llmbuild.serve.grammar import Grammar
from llmbuild.serve.request import Request, SamplingParams
from llmbuild.serve.served import Served, Settings, opened

WORDS = ("name", "id", "kind", "count", "price", "tags", "owner", "items", "note", "state", "limit", "point", "date")
PATTERNS = ("^[A-Z]{2}-[0-9]{3}$", "^(a|b)+c?$", "^[0-9a-f]{8}$")
ASKED = "Write a JSON object with made-up values."
ROUNDS, TIMED = 8, 48
"""Rounds of the timing, and tokens of each answer in it."""


def drawn(seed: int) -> dict[str, Any]:
    """Return a schema."""
    of = random.Random(seed)
    made = _object(of, 3)
    if of.random() < 0.3:
        made["$defs"] = {"shared": _value(of, 1)}
        made["properties"]["shared"] = {"$ref": "#/$defs/shared"}
    return made


def _object(of: random.Random, depth: int) -> dict[str, Any]:
    names = of.sample(WORDS, of.randint(1, 5))
    return {
        "type": "object",
        "properties": {name: _value(of, depth - 1) for name in names},
        "required": of.sample(names, of.randint(1, len(names))),
        "additionalProperties": False,
    }


def _value(of: random.Random, depth: int) -> dict[str, Any]:
    kinds = ["string", "enum", "integer", "number", "boolean", "pattern", "format", "const", "null"]
    kind = of.choice(kinds + ["object", "array", "any"] * 2 if depth > 0 else kinds)
    low = of.randint(-100, 100)
    return {
        "object": lambda: _object(of, depth),
        "array": lambda: {"type": "array", "items": _value(of, depth - 1), "minItems": of.randint(0, 2), "maxItems": 4},
        "any": lambda: {"anyOf": [_value(of, depth - 1), _value(of, 0)]},
        "string": lambda: {"type": "string", "minLength": of.randint(0, 3), "maxLength": of.randint(4, 20)},
        "enum": lambda: {"enum": of.sample(["red", "green", "blue", 1, 2.5, None, True], 3)},
        "integer": lambda: {"type": "integer", "minimum": low, "maximum": low + of.randint(0, 500)},
        "number": lambda: {"type": "number", "minimum": low, "exclusiveMaximum": low + 1 + of.randint(0, 50)},
        "boolean": lambda: {"type": "boolean"},
        "pattern": lambda: {
            "type": "string",
            "pattern": of.choice(["^[A-Z]{2}-[0-9]{3}$", "^(a|b)+c?$", "^[0-9a-f]{8}$"]),
        },
        "format": lambda: {"type": "string", "format": of.choice(["date", "time", "uuid", "ipv4"])},
        "const": lambda: {"const": of.choice(["fixed", 7, False])},
        "null": lambda: {"type": ["null", "integer"]},
    }[kind]()


class Answers:
    """A model that is served in this process."""

    def __init__(self, asked: argparse.Namespace) -> None:
        model = load(asked.catalog, asked.model, variant=asked.variant)
        (self.served,) = opened([model], Settings(max_sequences=asked.streams), self._take, {})
        self.texts, self.finished, self.tokens = dict[str, str](), dict[str, str](), 0

    def run(self, requests: Sequence[Request]) -> float:
        """Answer requests, and return the seconds from when all had their first token."""
        self.texts = {one.id: "" for one in requests}
        self.finished, self.tokens = {}, 0
        for one in requests:
            self.served.engine.submit(one)
        self.served.engine.turn()
        begin, self.tokens = perf_counter(), 0
        while self.served.engine.turn():
            pass
        return perf_counter() - begin

    def _take(self, events: Sequence[Event]) -> None:
        for event in events:
            if isinstance(event, Ended):
                raise LlmbuildError(f"an answer ended: {event.why}")
            assert isinstance(event, Delta)
            self.tokens += 1
            self.texts[event.request] += event.text
            if event.finish is not None:
                self.finished[event.request] = event.finish.reason


def request(served: Served, name: str, seed: int, params: SamplingParams, grammar: Grammar | None) -> Request:
    """Return a request for an object."""
    prompt = served.chat([{"role": "user", "content": ASKED}])
    return Request(name, prompt.tokens, params, seed, prompt.ends, grammar=grammar)


def valid(schema: dict[str, Any], text: str) -> str:
    """Return why a text is no valid answer; '' where it is one."""
    from jsonschema import Draft202012Validator

    try:
        Draft202012Validator(schema).validate(json.loads(text))
    except Exception as error:  # noqa: BLE001 - whatever it is makes the answer invalid
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return ""


def answered(answers: Answers, asked: argparse.Namespace) -> dict[str, Any]:
    """Return how many answers ended, and which of them are invalid."""
    params = SamplingParams(temperature=asked.temperature, max_tokens=asked.output)
    schemas, requests, compile_s, refused = [drawn(seed) for seed in range(asked.schemas)], [], [], []
    for seed, schema in enumerate(schemas):
        begin = perf_counter()
        try:
            grammar = answers.served.grammars.of_schema("schema", schema)
        except RequestRefused as error:
            refused.append(f"{seed}: {error}")
            continue
        compile_s.append(perf_counter() - begin)
        requests.append(request(answers.served, str(seed), seed, params, grammar))
    ended = list[tuple[dict[str, Any], str]]()
    for at in range(0, len(requests), 100):
        say(f"{at} of {len(requests)} schemas")
        batch = requests[at : at + 100]
        answers.run(batch)
        ended += [(schemas[int(n)], answers.texts[n]) for n, why in answers.finished.items() if why != "length"]
    whys = [why for schema, text in ended if (why := valid(schema, text))]
    return {
        "schemas": asked.schemas,
        "refused": refused,
        "ended": len(ended),
        "cut": len(requests) - len(ended),
        "invalid": whys,
        "compile_s": median_of(compile_s).median,
        "compile_most_s": max(compile_s),
    }


def cost(answers: Answers, asked: argparse.Namespace, temperature: float) -> dict[str, Any]:
    """Return the seconds for a token with grammars and without."""
    params = SamplingParams(temperature=temperature, max_tokens=TIMED, ignore_eos=True)
    long = {"type": "array", "items": _object(random.Random(1), 3), "minItems": 1000}
    grammar = answers.served.grammars.of_schema("schema", long)
    seconds: dict[str, list[float]] = {"free": [], "bound": []}
    for number in range(ROUNDS):
        for kind in random.Random(number).sample(list(seconds), 2):
            of = grammar if kind == "bound" else None
            batch = [request(answers.served, f"{kind}{i}", 1000 * number + i, params, of) for i in range(asked.streams)]
            taken = answers.run(batch)
            seconds[kind].append(taken / answers.tokens)
    found = paired_ratio(seconds["bound"], seconds["free"])
    return {
        "temperature": temperature,
        "free_s": median_of(seconds["free"]).median,
        "bound_s": median_of(seconds["bound"]).median,
        "ratio": found.median,
        "ratio_low": found.low,
        "ratio_high": found.high,
    }


def text(made: dict[str, Any]) -> str:
    """Return what was found, in lines."""
    said = made["answers"]
    return "\n".join(
        [
            f"{made['machine']}; {made['model']} {made['variant']}, temperature {made['temperature']:g}",
            f"{said['schemas']} schemas: {len(said['refused'])} refused, {said['ended']} answers ended, "
            f"{said['cut']} were cut; invalid: {len(said['invalid'])}",
            f"a grammar: {quantity(said['compile_s'], 's')}, at most {quantity(said['compile_most_s'], 's')}",
            *(
                f"a token of {made['streams']} streams at temperature {took['temperature']:g}: "
                f"{quantity(took['free_s'], 's')} free, {quantity(took['bound_s'], 's')} with a grammar: "
                f"{took['ratio']:.3f} [{took['ratio_low']:.3f}, {took['ratio_high']:.3f}]"
                for took in made["costs"]
            ),
            *said["refused"][:5],
            *said["invalid"][:5],
        ]
    )


def main() -> int:
    """Print what was found; 1 where an answer that ended is invalid."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("-C", "--catalog", default=reader.default_location())
    parser.add_argument("--variant", help="digest of the variant; the pick if left out")
    parser.add_argument("--schemas", type=int, default=500)
    parser.add_argument("--temperature", type=float, default=1.5)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--output", type=int, default=400, help="tokens of an answer at most")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    try:
        import jsonschema  # noqa: F401 - what answers are held against
    except ImportError:
        raise InputError("answers are validated by a package that is not here: pip install jsonschema") from None
    answers = Answers(asked)
    try:
        made = {
            "machine": host.machine().describe(),
            "model": answers.served.name,
            "variant": answers.served.variant[:12],
            "temperature": asked.temperature,
            "streams": asked.streams,
            "answers": answered(answers, asked),
            "costs": [cost(answers, asked, heat) for heat in dict.fromkeys((0.0, asked.temperature))],
        }
    finally:
        answers.served.close()
    print(json.dumps(made) if asked.json else text(made))
    return 1 if made["answers"]["invalid"] else 0


if __name__ == "__main__":
    end(main)
