"""The requests of a comparison of servers: prompts cut out of a text, with lengths of a trace, and forced outputs."""

from __future__ import annotations

import csv
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from llmbuild.errors import InputError

PROMPT, OUTPUT, SPREAD = 128, 48, 0.6
"""Without a trace: medians of the tokens of prompts and answers, and the deviation of their logarithms."""
LEAST_OUTPUT = 2
"""Tokens of an answer at least: one has no time per token after the first."""
PROMPT_COLUMN, OUTPUT_COLUMN = "ContextTokens", "GeneratedTokens"

Lengths = Callable[[random.Random], tuple[int, int]]
"""Draws the tokens of a prompt and of its answer."""


@dataclass(frozen=True)
class Ask:
    """One request: the tokens of its prompt, and how many tokens its answer has, end tokens or not."""

    prompt: tuple[int, ...]
    output: int


def drawn(draw: random.Random) -> tuple[int, int]:
    """Return log-normal lengths."""
    return round(PROMPT * math.exp(draw.gauss(0, SPREAD))), round(OUTPUT * math.exp(draw.gauss(0, SPREAD)))


def of_trace(path: Path, scale: tuple[float, float]) -> Lengths:
    """Return what draws rows of a trace of Azure's form, their lengths divided by `scale`.

    Raises:
        InputError: no such file, or not of that form.
    """
    try:
        with open(path, newline="") as file:
            rows = [(int(row[PROMPT_COLUMN]), int(row[OUTPUT_COLUMN])) for row in csv.DictReader(file)]
    except (OSError, KeyError, ValueError, TypeError) as error:
        told = f"--trace {path}: a CSV file with {PROMPT_COLUMN} and {OUTPUT_COLUMN} is asked for: {error!r}"
        raise InputError(told) from None
    if not rows:
        raise InputError(f"--trace {path}: it has no rows")

    def one(draw: random.Random) -> tuple[int, int]:
        prompt, output = draw.choice(rows)
        return round(prompt / scale[0]), round(output / scale[1])

    return one


def scale_of(text: str) -> tuple[float, float]:
    """Return the divisors of `PROMPT:OUTPUT`.

    Raises:
        InputError: not two positive numbers.
    """
    try:
        prompt, output = map(float, text.split(":"))
    except ValueError:
        prompt = output = math.nan
    if not (0 < prompt < math.inf and 0 < output < math.inf):
        raise InputError(f"cannot read --scale {text!r}: write PROMPT:OUTPUT, such as 8:4")
    return prompt, output


class Cutter:
    """Cuts prompts out of the tokens of a text, no two from one place: no prompt begins as another does."""

    def __init__(self, tokens: Sequence[int], draw: random.Random) -> None:
        self._tokens, self._draw = tokens, draw
        self._places = list(range(len(tokens)))
        draw.shuffle(self._places)

    def cut(self, count: int) -> tuple[int, ...]:
        """Return so many tokens; the text goes on at its beginning where it ends.

        Raises:
            InputError: there is no place left.
        """
        if not self._places or count > len(self._tokens):
            raise InputError(f"the text has {len(self._tokens)} tokens: too few for so many prompts, or so long ones")
        at = self._places.pop()
        whole = (*self._tokens[at : at + count], *self._tokens[: max(0, at + count - len(self._tokens))])
        return tuple(whole)

    def asks(self, lengths: Lengths, count: int, context: int) -> list[Ask]:
        """Return requests whose prompt and answer fit in a context together."""
        return [self._ask(*lengths(self._draw), context) for _ in range(count)]

    def _ask(self, prompt: int, output: int, context: int) -> Ask:
        prompt = min(max(1, prompt), context - LEAST_OUTPUT)
        return Ask(self.cut(prompt), min(max(LEAST_OUTPUT, output), context - prompt))
