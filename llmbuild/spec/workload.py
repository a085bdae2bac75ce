"""The workload of a measurement."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Workload:
    """A prompt of `prompt` tokens, then `output` tokens one by one, in a cache of `context` tokens.

    A batch has `batch` such sequences, each with its own prompt: times are per step of the batch, rates and energy
    count all tokens.
    """

    name: str
    prompt: int
    output: int
    context: int
    batch: int = 1
    seed: int = 0
