"""Seconds that the engine itself takes for a step, over a device that takes none.

    python -m llmbuild.serve.own_time OUTPUT

writes `turn_s`, for each step, and `row_s`, for each sequence in it, as JSON.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from time import perf_counter

from llmbuild.runtime.answers import Text
from llmbuild.runtime.detokenize import Decoder, stages
from llmbuild.serve.blocks import Names
from llmbuild.serve.engine import Engine, Limits
from llmbuild.serve.request import Request, SamplingParams
from llmbuild.serve.schedule.fcfs import Fcfs
from llmbuild.serve.step import Output, Rows

FEW, MANY, TURNS = 1, 16, 400
_LETTER = Output(1)


class _NoDevice:
    """A device that says the same token at once, whatever it is asked."""

    context, vocabulary, ends, cut, drafts = 1 << 20, 2, (), 1, False

    def __init__(self, slots: int) -> None:
        self.slots = self.room = slots

    def takes(self, positions: int) -> int:
        return 1

    def names(self, tokens: Sequence[int], salt: bytes) -> Names:
        return ()

    def known(self, names: Names) -> int:
        return 0

    def begin(self, slot: int, tokens: Sequence[int], names: Names, salt: bytes) -> int:
        return 0

    def run(self, batch: Sequence[Rows]) -> list[Output]:
        return [_LETTER] * len(batch)

    def keep(self, slot: int, tokens: Sequence[int]) -> None:
        """There are no drafts."""

    def end(self, slot: int) -> None:
        """Nothing is held."""

    def close(self) -> None:
        """Nothing is held."""


def _text(request: Request, ends: frozenset[int]) -> Text:
    return Text(Decoder(stages({"type": "ByteFallback"}), lambda token: "a"), tuple(ends), ())


def _turn_s(sequences: int) -> float:
    """Return the median seconds of a turn with so many sequences."""
    engine = Engine(_NoDevice(sequences), Fcfs(), _text, lambda events: None, Limits(sequences, 1e9))
    params = SamplingParams(temperature=0, max_tokens=TURNS + 2)
    for number in range(sequences):
        engine.submit(Request(str(number), (1,), params, 0))
    engine.turn()
    taken = []
    for _ in range(TURNS):
        begin = perf_counter()
        engine.turn()
        taken.append(perf_counter() - begin)
    return median(taken)


def measured() -> dict[str, float]:
    """Return the seconds for each step, and for each sequence in it."""
    _turn_s(FEW)  # what is imported on first use
    few, many = _turn_s(FEW), _turn_s(MANY)
    row_s = max(0.0, (many - few) / (MANY - FEW))
    return {"turn_s": max(0.0, few - FEW * row_s), "row_s": row_s}


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(measured()))
