"""Answers under JSON schemas: how many that end are valid, and what the grammar costs for a token.

    python scripts/bench/schemas.py MODEL -C CATALOG [--schemas N] [--temperature T] [--streams N] [--json]
        [--seconds S] [--resume FILE]
    python scripts/bench/schemas.py --recite RECIPE [--errs PART] [--temperature T] [--streams N] [--json]

Schemas are drawn by a seed, of the kinds that function calls have: objects in objects, arrays with bounds,
enumerations, patterns, formats, numbers with limits, alternatives, references. A chat model is asked for an object,
at a temperature at which it would hardly write any by itself. Answers that end are parsed and validated by the
package `jsonschema`; those cut at `--output` tokens are counted apart. How many have ended, and how long the others
will take by the pace so far, is told on the way. `--seconds` begins no more answers after so long; `--resume` keeps
each outcome in a file as it comes, and goes on behind those that are there.

The cost is that of a turn of the engine, sampling included: rounds with grammars and without run in turns on as many
streams, and the ratio of their seconds for a token is paired by round; greedy, and at the temperature. Tokens that
the grammar forces are computed ahead, so an answer with one may well take less time. What of a token is the server's
own, without the device, is told apart.

`--recite` needs no model: a device that computes nothing says logits over the tokenizer of a recipe's model, and errs
in a part of all places, where its likeliest token may not follow. What is timed is the server's own work for a token,
in seconds of its thread's CPU time, so that a busy machine disturbs it little.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import monotonic, perf_counter, thread_time
from typing import Any, Protocol

from comparison import saved
from comparison.recited import Recited
from comparison.script import end, say

from llmbuild.errors import InputError, LlmbuildError
from llmbuild.profiler.statistics import median_of, paired_ratio
from llmbuild.report.rows import quantity
from llmbuild.runtime import host, load, reader
from llmbuild.serve.engine import Engine
from llmbuild.serve.errors import RequestRefused
from llmbuild.serve.events import Delta, Ended, Event
from llmbuild.serve.grammar import Grammar, Grammars
from llmbuild.serve.observe import Observer, Turned
from llmbuild.serve.request import Request, SamplingParams
from llmbuild.serve.served import Settings, opened

WORDS = ("name", "id", "kind", "count", "price", "tags", "owner", "items", "note", "state", "limit", "point", "date")
PATTERNS = ("^[A-Z]{2}-[0-9]{3}$", "^(a|b)+c?$", "^[0-9a-f]{8}$")
ASKED = "Write a JSON object with made-up values."
ROUNDS, TIMED = 8, 48
"""Rounds of the timing, and tokens of each answer in it."""
AT_ONCE, TOLD_S = 100, 10.0
"""Answers that are asked for together, and seconds between words on how far they are."""


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
            "pattern": of.choice(PATTERNS),
        },
        "format": lambda: {"type": "string", "format": of.choice(["date", "time", "uuid", "ipv4"])},
        "const": lambda: {"const": of.choice(["fixed", 7, False])},
        "null": lambda: {"type": ["null", "integer"]},
    }[kind]()


def long() -> dict[str, Any]:
    """Return the schema that is timed: no answer ends."""
    return {"type": "array", "items": _object(random.Random(1), 3), "minItems": 1000}


class Served(Protocol):
    """What is measured: a model that is served in this process, or what recites."""

    engine: Engine
    grammars: Grammars
    name: str
    variant: str

    def close(self) -> None:
        """End what runs."""


class Own(Observer):
    """Sums the seconds of turns that are not the device's."""

    seconds = 0.0

    def turned(self, turn: Turned) -> None:
        """Take a turn."""
        self.seconds += turn.turn_s - turn.step_s


class Answers:
    """Runs requests, and keeps their texts; `ended` is told each that has ended, and why it has."""

    def __init__(self, open_: Callable[[Answers], Served]) -> None:
        self.own, self.texts, self.tokens = Own(), dict[str, str](), 0
        self.ended: Callable[[str, str], None] = lambda name, why: None
        self.served = open_(self)

    def run(self, requests: Sequence[Request]) -> float:
        """Answer requests, and return the seconds from when all had their first token."""
        self.texts = {one.id: "" for one in requests}
        for one in requests:
            self.served.engine.submit(one)
        self.served.engine.turn()
        begin, self.tokens, self.own.seconds = perf_counter(), 0, 0.0
        while self.served.engine.turn():
            pass
        return perf_counter() - begin

    def take(self, events: Sequence[Event]) -> None:
        """Take what the engine tells."""
        for event in events:
            if isinstance(event, Ended):
                raise LlmbuildError(f"an answer ended: {event.why}")
            assert isinstance(event, Delta)
            self.tokens += 1
            self.texts[event.request] += event.text
            if event.finish is not None:
                self.ended(event.request, event.finish.reason)


Asking = Callable[[str, int, SamplingParams, Grammar | None], Request]
"""Makes a request of its name, its seed, how it is drawn, and its grammar."""


def of_model(asked: argparse.Namespace) -> tuple[Answers, Asking]:
    """Return a model that is served, and what asks it for an object."""
    model = load(asked.catalog, asked.model, variant=asked.variant)
    settings = Settings(max_sequences=asked.streams)
    name = str(model.row["model"])

    def open_(answers: Answers) -> Served:
        return opened([model], settings, answers.take, {name: answers.own})[0]

    answers = Answers(open_)
    prompt = answers.served.chat([{"role": "user", "content": ASKED}])  # type: ignore[attr-defined]
    return answers, lambda name, seed, params, grammar: Request(
        name, prompt.tokens, params, seed, prompt.ends, grammar=grammar
    )


def of_nothing(asked: argparse.Namespace) -> tuple[Answers, Asking]:
    """Return a device that recites, and what asks it for tokens."""
    from llmbuild.frontend.source import find_model
    from llmbuild.spec.files.reader import read_recipe

    recipe = read_recipe(asked.recite)
    tokenizer = find_model(recipe.model, recipe.context).tokenizer
    if tokenizer is None:
        raise InputError(f"{asked.recite}: its model has no tokenizer.json: name another recipe")
    answers = Answers(
        lambda made: Recited(tokenizer, long(), asked.streams, asked.errs, made.take, made.own, thread_time)
    )
    return answers, lambda name, seed, params, grammar: Request(
        name, Recited.prompt(grammar is not None), params, seed, grammar=grammar
    )


def valid(schema: dict[str, Any], text: str) -> str:
    """Return why a text is no valid answer; '' where it is one."""
    from jsonschema import Draft202012Validator

    try:
        Draft202012Validator(schema).validate(json.loads(text))
    except Exception as error:  # noqa: BLE001 - whatever it is makes the answer invalid
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return ""


@dataclass(frozen=True)
class Outcome:
    """What became of a schema: `refused`, `cut`, or `ended`; and why it was refused, or is invalid."""

    seed: int
    how: str
    why: str
    compile_s: float


class Kept:
    """Outcomes, each in a line of a file as it comes, where there is one; the first line says of what they are."""

    def __init__(self, path: Path | None, of: dict[str, Any]) -> None:
        """Read what a file has, or begin it.

        Raises:
            InputError: it cannot be read, or has outcomes of something else.
        """
        self._path, self.outcomes = path, list[Outcome]()
        if path is None:
            return
        try:
            first, *others = [json.loads(line) for line in saved.lines(path)] or [None]
            if first is None:
                saved.add(path, of)
            elif first != of:
                raise InputError(f"{path}: has outcomes of {first}, and {of} is asked for: name another file")
            self.outcomes = [Outcome(**one) for one in others]
        except (OSError, ValueError, TypeError) as error:
            raise InputError(f"{path}: cannot be gone on with: {error}: name another file") from None

    def add(self, one: Outcome) -> None:
        """Take an outcome."""
        self.outcomes.append(one)
        if self._path is not None:
            saved.add(self._path, asdict(one))


class Progress:
    """Tells from time to time how many answers there are, and how long the others will take."""

    def __init__(self, count: int) -> None:
        self._count, self._done, self._begin_s, self._told_s = count, 0, monotonic(), monotonic()

    def one(self) -> None:
        """Take an answer."""
        self._done += 1
        now = monotonic()
        if now - self._told_s >= TOLD_S:
            left_s = (now - self._begin_s) / self._done * (self._count - self._done)
            say(f"{self._done} of {self._count} answers; the others take some {left_s / 60:.1f} min")
            self._told_s = now


def answered(answers: Answers, asking: Asking, asked: argparse.Namespace) -> dict[str, Any]:
    """Return how many answers ended, and which of them are invalid."""
    model = {"model": answers.served.name, "variant": answers.served.variant}
    kept = Kept(asked.resume, {**model, "temperature": asked.temperature, "output": asked.output})
    there = {one.seed for one in kept.outcomes}
    left = [seed for seed in range(asked.schemas) if seed not in there]
    begin, progress = monotonic(), Progress(len(left))
    for at in range(0, len(left), AT_ONCE):
        if asked.seconds is not None and monotonic() - begin > asked.seconds:
            say(f"{asked.seconds:g} s have passed: {len(left) - at} schemas are left out")
            break
        _answer(answers, asking, asked, left[at : at + AT_ONCE], kept, progress)
    found = [one for one in kept.outcomes if one.seed < asked.schemas]
    compile_s = [one.compile_s for one in found if one.how != "refused"]
    return {
        "schemas": len(found),
        "refused": [f"{one.seed}: {one.why}" for one in found if one.how == "refused"],
        "ended": sum(one.how == "ended" for one in found),
        "cut": sum(one.how == "cut" for one in found),
        "invalid": [f"{one.seed}: {one.why}" for one in found if one.how == "ended" and one.why],
        "compile_s": median_of(compile_s).median if compile_s else None,
        "compile_most_s": max(compile_s, default=None),
    }


def _answer(
    answers: Answers, asking: Asking, asked: argparse.Namespace, seeds: list[int], kept: Kept, progress: Progress
) -> None:
    """Ask for an answer of each schema, and keep what becomes of it as it ends."""
    params = SamplingParams(temperature=asked.temperature, max_tokens=asked.output)
    requests, compile_s = [], dict[str, float]()
    for seed in seeds:
        begin = perf_counter()
        try:
            grammar = answers.served.grammars.of_schema("schema", drawn(seed))
        except RequestRefused as error:
            kept.add(Outcome(seed, "refused", str(error), perf_counter() - begin))
            progress.one()
            continue
        compile_s[str(seed)] = perf_counter() - begin
        requests.append(asking(str(seed), seed, params, grammar))

    def ended(name: str, reason: str) -> None:
        cut = reason == "length"
        why = "" if cut else valid(drawn(int(name)), answers.texts[name])
        kept.add(Outcome(int(name), "cut" if cut else "ended", why, compile_s[name]))
        progress.one()

    answers.ended = ended
    answers.run(requests)
    answers.ended = lambda name, why: None


def cost(answers: Answers, asking: Asking, streams: int, temperature: float) -> dict[str, Any]:
    """Return the seconds for a token with grammars and without, and those of them that are not the device's."""
    params = SamplingParams(temperature=temperature, max_tokens=TIMED, ignore_eos=True)
    grammar = answers.served.grammars.of_schema("schema", long())
    seconds: dict[str, list[float]] = {"free": [], "bound": []}
    own: dict[str, list[float]] = {"free": [], "bound": []}
    for number in range(ROUNDS):
        for kind in random.Random(number).sample(list(seconds), 2):
            of = grammar if kind == "bound" else None
            batch = [asking(f"{kind}{i}", 1000 * number + i, params, of) for i in range(streams)]
            taken = answers.run(batch)
            seconds[kind].append(taken / answers.tokens)
            own[kind].append(answers.own.seconds / answers.tokens)
    found = paired_ratio(seconds["bound"], seconds["free"])
    more = median_of([bound - free for bound, free in zip(own["bound"], own["free"], strict=True)])
    return {
        "temperature": temperature,
        "free_s": median_of(seconds["free"]).median,
        "bound_s": median_of(seconds["bound"]).median,
        "ratio": found.median,
        "ratio_low": found.low,
        "ratio_high": found.high,
        "own_free_s": median_of(own["free"]).median,
        "own_bound_s": median_of(own["bound"]).median,
        "own_more_s": more.median,
        "own_more_low_s": more.low,
        "own_more_high_s": more.high,
    }


def text(made: dict[str, Any]) -> str:
    """Return what was found, in lines."""
    said = made.get("answers")
    lines = [f"{made['machine']}; {made['model']} {made['variant']}, temperature {made['temperature']:g}"]
    if said is not None:
        lines += [
            f"{said['schemas']} schemas: {len(said['refused'])} refused, {said['ended']} answers ended, "
            f"{said['cut']} were cut; invalid: {len(said['invalid'])}",
            f"a grammar: {quantity(said['compile_s'], 's')}, at most {quantity(said['compile_most_s'], 's')}",
        ]
    for took in made["costs"]:
        of = f"a token of {made['streams']} streams at temperature {took['temperature']:g}"
        if said is not None:
            lines.append(
                f"{of}: {quantity(took['free_s'], 's')} free, {quantity(took['bound_s'], 's')} with a grammar: "
                f"{took['ratio']:.3f} [{took['ratio_low']:.3f}, {took['ratio_high']:.3f}]"
            )
        lines.append(
            f"{of}, the server's own: {_us(took['own_free_s'])} us free, {_us(took['own_bound_s'])} us with a grammar: "
            f"{_us(took['own_more_s'])} us more [{_us(took['own_more_low_s'])}, {_us(took['own_more_high_s'])}]"
        )
    return "\n".join([*lines, *(said["refused"][:5] + said["invalid"][:5] if said is not None else [])])


def _us(seconds: float) -> str:
    return f"{seconds * 1e6:.0f}"


def main() -> int:
    """Print what was found; 1 where an answer that ended is invalid."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("-C", "--catalog", default=reader.default_location())
    parser.add_argument("--variant", help="digest of the variant; the pick if left out")
    parser.add_argument("--schemas", type=int, default=500)
    parser.add_argument("--temperature", type=float, default=1.5)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--output", type=int, default=400, help="tokens of an answer at most")
    parser.add_argument("--seconds", type=float, help="begin no more answers after so long; the costs come behind them")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="keep outcomes there, and go on behind them")
    parser.add_argument("--recite", type=Path, metavar="RECIPE", help="time the server alone, without a model")
    parser.add_argument("--errs", type=float, default=0.3, help="part of the places where what recites errs")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    if (asked.model is None) == (asked.recite is None):
        raise InputError("name a model, or a recipe by --recite: one of them")
    if not 0 <= asked.errs <= 1:
        raise InputError(f"--errs is {asked.errs:g}; it must be 0 to 1")
    if asked.recite is None:
        try:
            import jsonschema  # noqa: F401 - what answers are held against
        except ImportError:
            raise InputError("answers are validated by a package that is not here: pip install jsonschema") from None
    answers, asking = of_nothing(asked) if asked.recite is not None else of_model(asked)
    try:
        heats = dict.fromkeys((0.0, asked.temperature))
        made = {
            "machine": host.machine().describe(),
            "model": answers.served.name,
            "variant": answers.served.variant if asked.recite is not None else answers.served.variant[:12],
            "temperature": asked.temperature,
            "streams": asked.streams,
            "answers": None if asked.recite is not None else answered(answers, asking, asked),
            "costs": [cost(answers, asking, asked.streams, heat) for heat in heats],
        }
    finally:
        answers.served.close()
    print(json.dumps(made) if asked.json else text(made))
    return 1 if made["answers"] is not None and made["answers"]["invalid"] else 0


if __name__ == "__main__":
    end(main)
