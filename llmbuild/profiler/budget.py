"""The cost of screenings and races, computed before they begin: from each variant's pace to rounds, tokens, racers.

Where whole answers leave no time for the rounds of a race, the baseline takes part in fewer of them; then answers are
shortened, equally for all variants; then rounds are dropped, down to the least number that has intervals; then the
slowest variants, which keep their screening's readings. Two variants and the least rounds always run; a note reports
an exceeded budget.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llmbuild.profiler.protocol import Protocol

LEAST_TOKENS = 8
"""Least output tokens of an answer, where the workload has as many."""

BASELINE_TOKENS = 4
"""Least output tokens of the baseline's answer beside others."""

BRIEF = 3
"""Rounds of the short screen, and of a variant that is too slow for more."""

FEWEST = 2
"""Rounds of a variant for which even those take more than twice its time: the fewest that have an interval."""

COME_BACK_S = 0.2
"""Maximum seconds of untimed decoding before each timed answer, after the prompt's prefill."""

SLOW_PROMPT_S = 0.2
"""Seconds of a prefill above which it is not run untimed before each timed answer: it is no warmer for that."""

START_S = 0.3
"""Seconds that a worker takes to start, while others start too."""

LAST_VISITS = 3
"""Baseline visits at the end of a race, where they fit: they are compared with its first ones."""


@dataclass(frozen=True)
class Pace:
    """Seconds to the first token, per later one, and to open the artifact where each visit does (else 0).

    A variant that is visited by decoding alone has no seconds to the first token.
    """

    ttft_s: float
    tpot_s: float
    reopen_s: float = 0.0

    def answer_s(self, tokens: int) -> float:
        """Return the seconds of one answer."""
        return self.ttft_s + self.tpot_s * (tokens - 1)

    def visit_s(self, tokens: int, least_s: float) -> float:
        """Return the seconds of a visit: opening, untimed work, and answers for `least_s`, at least one."""
        untimed = min(self.tpot_s * (tokens - 1), COME_BACK_S)
        if self.ttft_s <= SLOW_PROMPT_S:
            untimed += self.ttft_s
        return self.reopen_s + untimed + max(self.answer_s(tokens), least_s)

    def tokens_in(self, seconds: float) -> int:
        """Return how many output tokens an answer of that many seconds has."""
        return int((seconds - self.ttft_s) / self.tpot_s) + 1 if self.tpot_s > 0 else 1


@dataclass(frozen=True)
class Screen:
    """The least rounds of a variant's screening, and the output tokens of its answers."""

    rounds: int
    tokens: int

    def note(self, pace: Pace, output: int) -> str:
        """Return how the answers are shortened; empty where they are whole."""
        if self.tokens >= output:
            return ""
        told = f"answers of {self.tokens} of {output} output tokens in at least {self.rounds} rounds"
        return f"{told}: a whole one takes {pace.answer_s(output):.2g} s"


def screen(pace: Pace, output: int, protocol: Protocol) -> Screen:
    """Return the screening of a variant of that pace: whole answers where they fit into `screen_s`, else shorter ones.

    Where not even few rounds of the least tokens fit, these are the last resort, whatever they take.
    """
    few, least = min(BRIEF, protocol.rounds), min(output, LEAST_TOKENS)

    def took(rounds: int, tokens: int) -> float:
        return rounds * pace.visit_s(tokens, protocol.visit_s)

    for rounds in (protocol.rounds, few):
        tokens = next((n for n in shorter(output) if took(rounds, n) <= protocol.screen_s), None)
        if tokens is not None:
            return Screen(rounds, tokens)
    return Screen(few if took(few, least) <= 2 * protocol.screen_s else min(FEWEST, few), least)


def shorter(output: int) -> list[int]:
    """Return the numbers of output tokens that an answer may have: the workload's, halved down to the least."""
    least = min(output, LEAST_TOKENS)
    return [*(n for n in (output >> k for k in range(output.bit_length())) if n > least), least]


@dataclass(frozen=True)
class Plan:
    """The participants of a race, by index, their output tokens, and the seconds of the least rounds.

    The baseline takes part in the first `baseline_rounds`; `last_visits` of it come after the rounds.
    """

    racers: tuple[int, ...]
    tokens: int
    baseline_tokens: int
    baseline_rounds: int
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

    def cost(racers: Sequence[int], rounds: int, tokens: int, visits: int) -> float:
        each = sum(paces[i].visit_s(tokens, protocol.visit_s) for i in racers)
        ours = visits * baseline.visit_s(min(whole, tokens), protocol.visit_s) if baseline else 0.0
        return starting(racers) + rounds * each + ours

    def starting(racers: Sequence[int]) -> float:
        once = (max(paces[i].visit_s(least, 0.0), protocol.warmup_s) for i in racers)
        return len(racers) * START_S + sum(once) if starts else 0.0

    def planned(racers: Sequence[int], tokens: int, visits: int, last: int, note: str) -> Plan:
        took = cost(racers, protocol.rounds, tokens, min(visits, protocol.rounds))
        return Plan(tuple(sorted(racers)), tokens, min(whole, tokens), visits, last, took, note)

    everyone, least = tuple(range(len(paces))), min(output, LEAST_TOKENS)
    for rounds in (protocol.race_rounds, protocol.rounds):
        for tokens in shorter(output):
            for visits, last in _visits(rounds, protocol):
                if cost(everyone, rounds, tokens, visits + last) <= seconds:
                    return planned(everyone, tokens, visits, last, _shortened(tokens, output))
    racers = sorted(everyone, key=lambda i: paces[i].visit_s(least, protocol.visit_s))
    while starts and len(racers) > 2 and cost(racers, protocol.rounds, least, protocol.rounds) > seconds:
        racers.pop()
    took = cost(racers, protocol.rounds, least, protocol.rounds)
    told = [_shortened(least, output)]
    if took > seconds:
        told.append(f"{protocol.rounds} rounds, the least, take {took:.0f} s, more than the {seconds:.0f} s there are")
    return planned(racers, least, protocol.rounds, 0, "; ".join(t for t in told if t))


def _visits(rounds: int, protocol: Protocol) -> list[tuple[int, int]]:
    """Return the baseline's visits within that many rounds and after them, the most first."""
    if rounds <= protocol.rounds:
        return [(rounds, 0)]
    return [(rounds, LAST_VISITS), (protocol.rounds, LAST_VISITS), (protocol.rounds, 0)]


def _shortened(tokens: int, output: int) -> str:
    return f"answers of {tokens} of {output} output tokens, to race within the budget" if tokens < output else ""
