"""What a variant is asked to do while it is measured."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Workload:
    """A prompt of `prompt` tokens, then `output` tokens one by one, in a cache of `context` tokens.

    `batch` such sequences are answered together, each with a prompt of its own: times are those of a step of all, rates
    and energy count the tokens of all.
    """

    name: str
    prompt: int
    output: int
    context: int
    batch: int = 1
    seed: int = 0
