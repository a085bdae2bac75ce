"""Count the steps in which a server answers the same requests, by the worst case and by what is expected of them.

    python scripts/bench/admission.py [--contexts N ...] [--sequences N] [--requests N] [--json]

The engine is the server's, with its blocks, its queue and its scheduler; the device computes nothing, and ends each
answer at a length that is drawn. All requests are there at the beginning, and none has a `max_tokens`: each may fill
the context. Lengths are log-normal about medians. "Unknown" is by what is expected, where each request has an API key
of its own: no answer before it tells of its length. Nothing is timed: seconds are those of the load curve of
SmolLM2-135M in int8 on two cores that `schedulers.py` has, so each run prints the same.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from schedulers import MEASURED, log_normal

from llmbuild.report.rows import table
from llmbuild.runtime.answers import Text
from llmbuild.runtime.detokenize import Decoder, stages
from llmbuild.serve.admission import EXPECTED, WORST_CASE, Expected
from llmbuild.serve.blocks import Names, Tables
from llmbuild.serve.engine import Engine, Limits
from llmbuild.serve.observe import Observer, Turned
from llmbuild.serve.request import Request, SamplingParams
from llmbuild.serve.schedule.fcfs import Fcfs
from llmbuild.serve.step import Output, Rows
from llmbuild.spec.load_curve import Work

PAGE, END, WORD = 32, 0, 1
UNKNOWN = "unknown"
WAYS = (WORST_CASE, EXPECTED, UNKNOWN)
"""Ways of admission that are compared."""


class Device:
    """A device that ends the answer to a prompt at its length; the first token of a prompt says which one it is."""

    cut, drafts, ends = 1, False, (END,)

    def __init__(self, slots: int, contexts: int, context: int, lengths: Sequence[tuple[int, int]]) -> None:
        self.slots, self.context, self.vocabulary = slots, context, len(lengths) + 2
        self.tables = Tables(slots, context, PAGE, contexts)
        self._ends = [sum(one) - 1 for one in lengths]
        self._number = [0] * slots
        self.steps, self.seconds = 0, 0.0

    @property
    def room(self) -> int:
        """Blocks of the cache."""
        return self.tables.blocks.count

    def takes(self, positions: int) -> int:
        """Return the blocks that so many positions are in."""
        return self.tables.takes(positions)

    def names(self, tokens: Sequence[int], salt: bytes) -> Names:
        """Return the names of the blocks that a prompt fills."""
        return self.tables.names(tokens, salt)

    def known(self, names: Names) -> int:
        """Return how many tokens of a prompt are there."""
        return self.tables.known(names)

    def begin(self, slot: int, tokens: Sequence[int], names: Names, salt: bytes) -> int:
        """Give a free slot to a sequence."""
        self._number[slot] = tokens[0] - 2
        return self.tables.begin(slot, tokens, names, salt)

    def run(self, batch: Sequence[Rows]) -> list[Output]:
        """Say an end where an answer has its length, else a word."""
        self.steps += 1
        self.seconds += MEASURED.seconds(Work.of((rows.start, len(rows.tokens)) for rows in batch))
        return [self._one(rows, rows.start + len(rows.tokens)) for rows in batch]

    def _one(self, rows: Rows, count: int) -> Output:
        self.tables.grow(rows.slot, count)
        self.tables.computed(rows.slot, rows.tokens)
        return Output(END if count == self._ends[self._number[rows.slot]] else WORD)

    def keep(self, slot: int, tokens: Sequence[int]) -> None:
        """Do nothing: there are no drafts."""

    def end(self, slot: int) -> None:
        """Free a slot."""
        self.tables.end(slot)

    def close(self) -> None:
        """Nothing is held."""


class Counted(Observer):
    """Counts rows, sequences and preemptions."""

    def __init__(self) -> None:
        self.sequences = self.computed = self.preemptions = 0

    def preempted(self) -> None:
        """Count a preemption."""
        self.preemptions += 1

    def turned(self, turn: Turned) -> None:
        """Count a step."""
        self.sequences, self.computed = self.sequences + turn.sequences, self.computed + turn.computed


@dataclass(frozen=True)
class Row:
    """What one way of admission takes for all requests."""

    contexts: int
    admission: str
    steps: int
    sequences: float
    """In a step, in the mean."""
    preempted: int
    again: int
    """Tokens that were computed more than once."""
    seconds: float


def answered(name: str, contexts: int, slots: int, context: int, lengths: Sequence[tuple[int, int]]) -> Row:
    """Return what it takes to answer requests of these lengths."""
    device, counted = Device(slots, contexts, context, lengths), Counted()
    admission = None if name == WORST_CASE else Expected(device.tables)
    limits = Limits(len(lengths), 1e9)
    engine = Engine(device, Fcfs(), _text, lambda events: None, limits, counted, admission=admission)
    params = SamplingParams(temperature=0, max_tokens=None)
    for number, (prompt, _) in enumerate(lengths):
        tenant = str(number) if name == UNKNOWN else ""
        engine.submit(Request(str(number), (number + 2, *[WORD] * (prompt - 1)), params, 0, tenant=tenant))
    while engine.turn():
        pass
    if fault := engine.snapshot().fault:
        raise RuntimeError(fault)
    again = counted.computed - sum(prompt + output - 1 for prompt, output in lengths)
    steps, seconds = device.steps, device.seconds
    return Row(contexts, name, steps, counted.sequences / steps, counted.preemptions, again, seconds)


def _text(request: Request, ends: frozenset[int]) -> Text:
    return Text(Decoder(stages({"type": "ByteFallback"}), lambda token: "a"), tuple(ends), ())


def main(words: list[str] | None = None) -> None:
    """Print a table, or one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, nargs="+", default=[1, 4], help="whole contexts that memory holds")
    parser.add_argument("--context", type=int, default=1664)
    parser.add_argument("--sequences", type=int, default=16, help="that run at a time at most")
    parser.add_argument("--requests", type=int, default=60)
    parser.add_argument("--prompt", type=int, default=32, help="median of the tokens of prompts")
    parser.add_argument("--output", type=int, default=96, help="median of the tokens of answers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args(words)
    draw, lengths_of = random.Random(asked.seed), log_normal(asked.prompt, asked.output, asked.context)
    lengths = [lengths_of(draw) for _ in range(asked.requests)]
    rows = [answered(name, count, asked.sequences, asked.context, lengths) for count in asked.contexts for name in WAYS]
    if asked.json:
        print(json.dumps([asdict(one) for one in rows]))
        return
    heads = ["contexts", "admission", "steps", "sequences", "preempted", "again", "seconds"]
    told = [
        [str(r.contexts), r.admission, str(r.steps), f"{r.sequences:.1f}", str(r.preempted), str(r.again)] for r in rows
    ]
    cells = [[*row, f"{r.seconds:.1f}"] for row, r in zip(told, rows, strict=True)]
    print(table(heads, cells, (0, 2, 3, 4, 5, 6)))


if __name__ == "__main__":
    main()
