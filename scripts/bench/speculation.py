"""What guessing tokens ahead gains: one engine with guesses and one without, in turns, on the same requests.

    python scripts/bench/speculation.py MODEL -C CATALOG [--variant DIGEST] [--draft VARIANT] [--streams N...]
        [--text FILE] [--json]

Guesses are looked up in the prompt and the answer; with `--draft` a variant or a model with the same tokenizer makes
them. What it takes is in the times, and `drafting` is its share.

Two tasks: `repeat` asks a chat model to repeat a passage, whose words can be looked up; `question` asks short
questions, whose answers hardly can. Both answer greedily, `--output` tokens whatever they say. The answers of both
engines must be the same, token for token. A ratio is the seconds with guesses over those without, paired by round:
below 1 guessing is faster. `right` is the share of guesses that were.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

from answers import QUESTIONS
from comparison.conversion import ROOT
from comparison.script import end, say

from llmbuild.errors import LlmbuildError
from llmbuild.profiler.statistics import paired_ratio
from llmbuild.report.rows import table
from llmbuild.runtime import host, load, reader
from llmbuild.serve.draft_model import draft_model
from llmbuild.serve.events import Delta, Ended, Event
from llmbuild.serve.observe import Observer, Turned
from llmbuild.serve.request import Request, SamplingParams
from llmbuild.serve.served import Served, Settings, opened
from llmbuild.serve.speculate import DRAFT, NGRAM, NONE

REPEAT = "Repeat the following text word for word.\n\n{}"
PASSAGE = 400
"""Characters of a passage."""


class Counts(Observer):
    """Counts guesses."""

    def __init__(self) -> None:
        self.drafts = self.right = 0
        self.draft_s = 0.0

    def turned(self, turn: Turned) -> None:
        """Take a step."""
        self.draft_s += turn.draft_s
        self.drafts, self.right = self.drafts + turn.drafts, self.right + turn.right


class Entrant:
    """A model that is served with or without guesses."""

    def __init__(self, asked: argparse.Namespace, kind: str) -> None:
        self.counts, self._tokens = Counts(), dict[str, list[int]]()
        model = load(asked.catalog, asked.model, variant=asked.variant)
        draft = draft_model(asked.catalog, asked.draft) if kind == DRAFT else None
        settings = Settings(max_sequences=max(asked.streams), speculation=kind, draft=draft)
        (self.served,) = opened([model], settings, self._take, {str(model.row["model"]): self.counts})

    def answer(self, requests: Sequence[Request]) -> tuple[float, dict[str, list[int]]]:
        """Answer requests together; return the seconds from the first step on, and their tokens."""
        self._tokens = {one.id: [] for one in requests}
        for one in requests:
            self.served.engine.submit(one)
        begin = perf_counter()
        while self.served.engine.turn():
            pass
        return perf_counter() - begin, self._tokens

    def _take(self, events: Sequence[Event]) -> None:
        for event in events:
            if isinstance(event, Ended):
                raise LlmbuildError(f"an answer ended: {event.why}")
            assert isinstance(event, Delta)
            self._tokens[event.request].append(event.token)


def requests(served: Served, task: str, streams: int, number: int, asked: argparse.Namespace) -> list[Request]:
    """Return the requests of a round; no two rounds ask the same, so that no prompt is known before."""
    drawn = random.Random(f"{task} {streams} {number}")
    text = asked.text.read_text()
    params = SamplingParams(temperature=0, max_tokens=asked.output, ignore_eos=True)
    found = []
    for stream in range(streams):
        if task == "repeat":
            at = drawn.randrange(max(1, len(text) - PASSAGE))
            said = REPEAT.format(text[at : at + PASSAGE])
        else:
            said = f"{drawn.choice(QUESTIONS)} ({number}.{stream})"
        prompt = served.chat([{"role": "user", "content": said}])
        found.append(Request(f"{number}.{stream}", prompt.tokens, params, 0, prompt.ends))
    return found


def row(entrants: dict[str, Entrant], task: str, streams: int, asked: argparse.Namespace) -> dict[str, Any]:
    """Return the seconds of both, round by round."""
    (guessing,) = set(entrants) - {NONE}
    seconds: dict[str, list[float]] = {kind: [] for kind in entrants}
    for one in entrants.values():
        one.counts.drafts, one.counts.right, one.counts.draft_s = 0, 0, 0.0
    for number in range(asked.rounds):
        made = requests(entrants[NONE].served, task, streams, number, asked)
        said = {}
        for kind in random.Random(number).sample(list(entrants), len(entrants)):
            taken, said[kind] = entrants[kind].answer(made)
            seconds[kind].append(taken)
        if said[NONE] != said[guessing]:
            raise LlmbuildError(f"{task}, {streams} streams: answers with guesses are others")
    found = paired_ratio(seconds[guessing], seconds[NONE])
    counts = entrants[guessing].counts
    return {
        "task": task,
        "streams": streams,
        "plain_tokens_per_s": streams * asked.output * asked.rounds / sum(seconds[NONE]),
        "guessing_tokens_per_s": streams * asked.output * asked.rounds / sum(seconds[guessing]),
        "ratio": found.median,
        "ratio_low": found.low,
        "ratio_high": found.high,
        "guesses_per_token": counts.drafts / (streams * asked.output * asked.rounds),
        "right": counts.right / counts.drafts if counts.drafts else None,
        "drafting": counts.draft_s / sum(seconds[guessing]),
    }


def text(made: dict[str, Any]) -> str:
    """Return the table."""
    lines = [
        [
            one["task"],
            str(one["streams"]),
            f"{one['plain_tokens_per_s']:.0f}",
            f"{one['guessing_tokens_per_s']:.0f}",
            f"{one['ratio']:.2f} [{one['ratio_low']:.2f}, {one['ratio_high']:.2f}]",
            f"{one['guesses_per_token']:.2f}",
            "-" if one["right"] is None else f"{one['right']:.0%}",
            f"{one['drafting']:.0%}",
        ]
        for one in made["rows"]
    ]
    header = ["task", "streams", "tokens/s", "with guesses", "time of plain", "guesses per token", "right", "drafting"]
    head = f"{made['machine']}; {made['model']} {made['variant']}, {made['output']} tokens, {made['rounds']} rounds"
    head += f"; drafts by {made['draft']}" if made["draft"] else ""
    return "\n".join([head, table(header, lines)])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("-C", "--catalog", default=reader.default_location())
    parser.add_argument("--variant", help="digest of the variant; the pick if left out")
    parser.add_argument("--draft", help="the variant or model that guesses; prompt lookup if left out")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--output", type=int, default=96, help="tokens of each answer")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--text", type=Path, default=ROOT / "docs" / "explanation" / "measuring.md")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    entrants = {kind: Entrant(asked, kind) for kind in (NONE, DRAFT if asked.draft else NGRAM)}
    rows = []
    for task in ("repeat", "question"):
        for streams in asked.streams:
            say(f"{task}, {streams} streams")
            rows.append(row(entrants, task, streams, asked))
    served = entrants[NONE].served
    made = {
        "machine": host.machine().describe(),
        "model": served.name,
        "variant": served.variant[:12],
        "draft": asked.draft,
        "output": asked.output,
        "rounds": asked.rounds,
        "rows": rows,
    }
    for one in entrants.values():
        one.served.close()
    print(json.dumps(made) if asked.json else text(made))


if __name__ == "__main__":
    end(main)
