"""The cost of a race, computed before it begins: from each variant's pace to rounds, tokens and participants.

Where whole answers leave no time for the rounds of a race, answers are shortened, equally for all variants; then
rounds are dropped, down to the least number that has intervals; then the slowest variants, which keep their
screening's readings. Two variants and the least rounds always run; a note reports an exceeded budget.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llmbuild.profiler.protocol import Protocol

LEAST_TOKENS = 8
"""Least output tokens of a race's answer, where the workload has as many."""

BASELINE_TOKENS = 4
"""Least output tokens of the baseline's answer."""

COME_BACK_S = 0.2
"""Maximum seconds of untimed decoding before each timed answer, after the prompt's prefill."""

START_S = 0.3
"""Seconds that a worker takes to start, while others start too."""

LAST_VISITS = 3
"""Baseline visits at the end of a race, where all its rounds fit: they are compared with its first ones."""


@dataclass(frozen=True)
class Pace:
    """Seconds to the first token, per later one, and to open the artifact where each visit does (else 0)."""

    ttft_s: float
    tpot_s: float
    reopen_s: float = 0.0

    def answer_s(self, tokens: int) -> float:
        """Return the seconds of one answer."""
        return self.ttft_s + self.tpot_s * (tokens - 1)

    def visit_s(self, tokens: int, least_s: float) -> float:
        """Return the seconds of a visit: opening, untimed work, and answers for `least_s`, at least one."""
        untimed = self.ttft_s + min(self.tpot_s * (tokens - 1), COME_BACK_S)
        return self.reopen_s + untimed + max(self.answer_s(tokens), least_s)

    def tokens_in(self, seconds: float) -> int:
        """Return how many output tokens an answer of that many seconds has."""
        return int((seconds - self.ttft_s) / self.tpot_s) + 1 if self.tpot_s > 0 else 1


@dataclass(frozen=True)
class Plan:
    """The participants of a race, by index, their output tokens, and the seconds of the least rounds.

    `last_visits` of the baseline come after the rounds.
    """

    racers: tuple[int, ...]
    tokens: int
    baseline_tokens: int
    last_visits: int
    least_s: float
    note: str


def baseline_tokens(baseline: Pace, output: int, protocol: Protocol) -> int:
    """Return the output tokens of the baseline's visits: those of an answer, or as many as fit into its time."""
    fits = max(BASELINE_TOKENS, baseline.tokens_in(protocol.baseline_round_s))
    return output if baseline.answer_s(output) <= protocol.baseline_round_s else min(output, fits)


def plan(
    paces: Sequence[Pace], baseline: Pace | None, output: int, seconds: float, protocol: Protocol, starts: bool
) -> Plan:
    """Return the plan of a race of variants with these paces within that many seconds.

    With `starts`, their workers are not running yet: starting takes time too, and a variant that is too slow may be
    left out.
    """
    whole = 0 if baseline is None else baseline_tokens(baseline, output, protocol)

    def cost(racers: Sequence[int], rounds: int, tokens: int) -> float:
        visits = [paces[i].visit_s(tokens, protocol.visit_s) for i in racers]
        last = LAST_VISITS if rounds > protocol.rounds else 0
        ours = (rounds + last) * baseline.visit_s(min(whole, tokens), protocol.visit_s) if baseline else 0.0
        return starting(racers) + rounds * sum(visits) + ours

    def starting(racers: Sequence[int]) -> float:
        once = (max(paces[i].visit_s(least, 0.0), protocol.warmup_s) for i in racers)
        return len(racers) * START_S + sum(once) if starts else 0.0

    everyone, least = tuple(range(len(paces))), min(output, LEAST_TOKENS)
    shorter = [n for n in (output >> k for k in range(output.bit_length())) if n > least] + [least]
    for rounds in (protocol.race_rounds, protocol.rounds):
        tokens = next((n for n in shorter if cost(everyone, rounds, n) <= seconds), None)
        if tokens is not None:
            last = LAST_VISITS if rounds > protocol.rounds else 0
            took = cost(everyone, protocol.rounds, tokens)
            return Plan(everyone, tokens, min(whole, tokens), last, took, _shortened(tokens, output))
    racers = sorted(everyone, key=lambda i: paces[i].visit_s(least, protocol.visit_s))
    while starts and len(racers) > 2 and cost(racers, protocol.rounds, least) > seconds:
        racers.pop()
    took = cost(racers, protocol.rounds, least)
    told = [_shortened(least, output)]
    if took > seconds:
        told.append(f"{protocol.rounds} rounds, the least, take {took:.0f} s, more than the {seconds:.0f} s there are")
    return Plan(tuple(sorted(racers)), least, min(whole, least), 0, took, "; ".join(t for t in told if t))


def _shortened(tokens: int, output: int) -> str:
    return f"answers of {tokens} of {output} output tokens, to race within the budget" if tokens < output else ""
