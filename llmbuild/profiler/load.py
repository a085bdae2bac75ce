"""Measure a load curve: which steps of a server are timed, in which rounds, and the fit with its error.

Cells are kinds of steps: some sequences that decode, at positions near the beginning or the end of the context, and
pieces of prompts. Every round visits every cell once, in random order, in one fresh process. By how much the machine
was slower or faster meanwhile, which is the same for all cells, is taken out. Cells that are drawn at random are held
out: the fit does not see them, and its error is theirs.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import monotonic

import numpy as np

from llmbuild.process.child import Limits
from llmbuild.profiler import noise, statistics
from llmbuild.profiler.child import Child, ChildFailed
from llmbuild.profiler.drift import levelled
from llmbuild.profiler.live import Live
from llmbuild.profiler.load_steps import SHORTEST_VISIT_S, SLOW_S
from llmbuild.profiler.meters.meter import SCREEN_STEPS
from llmbuild.profiler.protocol import Subject
from llmbuild.spec.load_curve import Cell, Fit, Table, Work
from llmbuild.spec.variant import Failure

BUDGET_S = 30.0
"""Seconds of a measurement, unless others are asked for."""
LEAST_ROUNDS, MOST_ROUNDS = 3, 25
STRETCH = 12
"""Visits one after another in which the machine is taken to have one speed: some fewer tell less of it."""
HELD_OUT, LEAST_JUDGES = 20, 5
"""Cells that judge the fit; and how many at least, of these and of the others."""
DECODES = (1, 2, 3, 4, 5, 8, 9, 12, 13, 16, 17, 24, 25, 32, 33, 48, 64, 96, 128)
PROMPTS = (8, 16, 17, 24, 32, 33, 48, 64, 65, 96, 128, 129, 192, 256, 512)
"""Kernels compute some rows together, 4 or more: one row more than these is a stair, so it has a place of its own."""
_MIXED = ((2, 16), (4, 48), (8, 24), (8, 88), (16, 80), (12, 160))
"""Sequences that decode and tokens of a prompt beside them."""

Pieces = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Bounds:
    """Up to which steps cells are planned. Where not `shared`, each sequence of a step has a call of its own.

    There is memory for the keys and values of `contexts` whole contexts.
    """

    shared: bool
    context: int
    decodes: int
    prompt: int
    contexts: int

    @property
    def sequences(self) -> int:
        """Sequences of the largest step."""
        return self.decodes + 1


@dataclass(frozen=True)
class Planned:
    """A kind of step: the first position and the tokens of each sequence."""

    pieces: Pieces
    held_out: bool = False

    @property
    def work(self) -> Work:
        """What is computed."""
        return Work.of(self.pieces)


@dataclass(frozen=True)
class Measured:
    """The cells of a curve, its fit and error, and what else is to be said of it."""

    cells: tuple[Cell, ...]
    fit: Fit
    error_p95: float
    energy_source: str | None
    watts: Table | None
    notes: dict[str, str]


def planned(bounds: Bounds, seed: int = 0) -> list[Planned]:
    """Return the cells, those with the fewest rows first."""
    drawn, context = random.Random(seed), bounds.context
    low, high = max(1, context // 16), max(1, context - 1 - context // 16)
    decodes = _upto(DECODES, bounds.decodes)
    if not bounds.shared:
        decodes = [count for count in decodes if count in (1, 2, 4, 8)]
    prompts = _upto(PROMPTS, bounds.prompt)
    found = {Planned(((start, 1),) * count) for count in decodes for start in (low, high)}
    found |= {Planned(((0, count),)) for count in prompts}
    found |= {Planned((((context - count) // 2, count),)) for count in prompts[2::4]}
    for count, tokens in _MIXED:
        if count <= bounds.decodes and tokens <= bounds.prompt:
            found.add(Planned((*((high if i % 2 else low, 1) for i in range(count)), (0, tokens))))
    held = {Planned(_drawn(i, bounds, drawn), True) for i in range(HELD_OUT)}
    return sorted(found | held, key=lambda one: (one.work.rows, one.held_out, one.pieces))


def _upto(values: Sequence[int], most: int) -> list[int]:
    return sorted({*(value for value in values if value < most), most})


def _drawn(number: int, bounds: Bounds, drawn: random.Random) -> Pieces:
    """Return a step drawn at random: decodes alone, a piece of a prompt alone, or both."""
    kind = number % 3
    starts = [drawn.randint(1, bounds.context - 1) for _ in range(drawn.randint(1, bounds.decodes))] if kind else []
    decodes = tuple((start, 1) for start in starts)
    if kind == 1:
        return decodes
    tokens = min(bounds.prompt, max(2, round(math.exp(drawn.uniform(math.log(2), math.log(bounds.prompt))))))
    return (*decodes, (drawn.randint(0, bounds.context - tokens), tokens))


def measure(
    subject: Subject, bounds: Bounds, budget_s: float, limits: Limits, tell: Callable[[str], None] = lambda text: None
) -> Measured | Failure:
    """Measure a curve within about `budget_s` seconds, in a fresh process; at least `LEAST_ROUNDS` rounds.

    Cells that would take too long are left out, the largest first: the curve then reaches less far.
    """
    live = Live(subject, limits)
    try:
        live.open(1)
        cells, spans, slow = _rounds(live.child, bounds, budget_s, tell)
        judges = sum(cell.held_out for cell in cells)
        if judges < LEAST_JUDGES or len(cells) - judges < LEAST_JUDGES:
            few = f"only {len(cells)} kinds of steps fit into {budget_s:g} s: give more with --budget"
            return Failure("profile", few, live.child.pasteable(), "", lasting=False)
        fit = fitted(cells, bounds.shared)
        source, watts, why = _power(live, bounds, cells)
    except ChildFailed as failed:
        return failed.failure
    finally:
        live.child.close()
    notes = {"rounds": str(len(spans)), "medians": _sure(cells), "drift": f"{min(slow):.2f} to {max(slow):.2f}"}
    notes |= {name: text for name, text in (("noise", noise.description(spans)), ("energy", why)) if text}
    if bounds.contexts < bounds.sequences:
        notes["memory"] = f"{bounds.sequences} sequences shared the memory of {bounds.contexts}"
    return Measured(cells, fit, error_p95(fit, cells), source, watts, notes)


def _rounds(
    child: Child, bounds: Bounds, budget_s: float, tell: Callable[[str], None]
) -> tuple[tuple[Cell, ...], list[noise.Shares], tuple[float, ...]]:
    """Return the cells with their readings, what disturbed each round, and how slow each stretch of visits was."""
    _visits(child, bounds, [])  # memory for the keys and values
    order, begin = random.Random(0), monotonic()
    cells, round_s = _affordable(child, planned(bounds), bounds, budget_s)
    stretches, spans = list[list[tuple[Planned, float]]](), list[noise.Shares]()
    while len(spans) < LEAST_ROUNDS or (len(spans) < MOST_ROUNDS and monotonic() - begin + round_s <= budget_s):
        began, shuffled, watch = monotonic(), order.sample(cells, len(cells)), noise.Watch([child.pid])
        visits = list(zip(shuffled, _visits(child, bounds, shuffled), strict=True))
        parts = max(1, len(visits) // STRETCH)
        stretches += [visits[i * len(visits) // parts : (i + 1) * len(visits) // parts] for i in range(parts)]
        spans.append(watch.shares())
        round_s = monotonic() - began
        tell(f"round {len(spans)}: {len(cells)} kinds of steps in {round_s:.2g} s")
    taken, slow = levelled(stretches)
    return tuple(_cell(one, taken[one]) for one in cells), spans, slow


def _affordable(child: Child, cells: list[Planned], bounds: Bounds, budget_s: float) -> tuple[list[Planned], float]:
    """Return the cells whose rounds fit, by one untimed visit to each, and the seconds of a round."""
    round_s, begin, found = 0.0, monotonic(), list[Planned]()
    for one in cells:
        (seconds,) = _visits(child, bounds, [one])
        visit = seconds if seconds > SLOW_S else 2 * max(seconds, SHORTEST_VISIT_S)
        if found and monotonic() - begin + (round_s + visit) * LEAST_ROUNDS > budget_s:
            break
        found.append(one)
        round_s += visit
    known = [one.work for one in found if not one.held_out]
    most = max(work.tokens for work in known), max(work.decodes for work in known)
    return [one for one in found if one.work.tokens <= most[0] and one.work.decodes <= most[1]], round_s


def _visits(child: Child, bounds: Bounds, cells: Sequence[Planned]) -> list[float]:
    asked = [list(map(list, one.pieces)) for one in cells]
    told = child.ask("profile", "load", sequences=bounds.sequences, contexts=bounds.contexts, cells=asked)
    return [float(seconds) for seconds in told["seconds"]]


def _cell(one: Planned, samples: Sequence[float]) -> Cell:
    few = len(samples) <= statistics.FEW
    reading = statistics.few_of(samples) if few else statistics.median_of(samples)
    return Cell(one.work, reading.median, reading.low, reading.high, len(samples), one.held_out)


def fitted(cells: Sequence[Cell], shared: bool) -> Fit:
    """Return the fit with the least squares of relative errors; what it adds per item is not negative."""
    known = [cell for cell in cells if not cell.held_out]
    knots = sorted({_x(cell.work, shared) for cell in known if not (cell.work.decodes and cell.work.prompts)})
    seconds = np.array([cell.seconds for cell in known])
    hats = np.array([_hats(cell.work, knots, shared) for cell in known])
    more = np.array([[cell.work.reads * shared, cell.work.context, cell.work.seen] for cell in known], np.float64)
    used = [i for i in range(3) if more[:, i].any()]
    while True:
        scale = more[:, used].max(0) if used else np.ones(0)
        matrix = np.hstack([hats, more[:, used] / scale]) / seconds[:, None]
        found = np.linalg.lstsq(matrix, np.ones(len(known)), rcond=None)[0]
        each = found[len(knots) :] / scale
        if not (each < 0).any():
            break
        del used[int(each.argmin())]
    added = dict(zip(used, map(float, each), strict=True))
    table = Table(tuple(knots), tuple(max(0.0, float(value)) for value in found[: len(knots)]))
    return Fit(shared, table, added.get(0, 0.0), added.get(1, 0.0), added.get(2, 0.0))


def _x(work: Work, shared: bool) -> int:
    """Return the place of a step with decodes or a prompt alone in the table."""
    return work.rows if shared else max(1, work.tokens)


def _hats(work: Work, knots: Sequence[int], shared: bool) -> list[float]:
    """Return the share of each knot in the table's part of a step."""
    places = [(work.rows, 1)] if shared else [(1, work.decodes), (work.tokens / max(1, work.prompts), work.prompts)]
    shares = [0.0] * len(knots)
    for i in range(len(knots)):
        unit = Table(tuple(knots), tuple(float(i == j) for j in range(len(knots))))
        shares[i] = sum(count * unit(x) for x, count in places)
    return shares


def error_p95(fit: Fit, cells: Sequence[Cell]) -> float:
    """Return the 95th percentile of the fit's relative error on the held-out cells, the next larger of them."""
    errors = sorted(abs(fit.seconds(cell.work) / cell.seconds - 1) for cell in cells if cell.held_out)
    return errors[math.ceil(0.95 * len(errors)) - 1]


def _sure(cells: Sequence[Cell]) -> str:
    """Return how sure the medians are."""
    widths = [max(cell.high / cell.seconds, cell.seconds / cell.low) - 1 for cell in cells]
    return f"half of the medians are known to {statistics.middle(widths):.1%} or better"


def _power(live: Live, bounds: Bounds, cells: Sequence[Cell]) -> tuple[str | None, Table | None, str]:
    """Return the meter's source and the mean power over rows, or why there is none."""
    meter = live.meter()
    if meter.source is None:
        return None, None, meter.reason
    found: dict[int, float] = {}
    decodes = sorted({cell.work.decodes for cell in cells if not cell.work.prompts and not cell.held_out})
    prompt = max(cell.work.tokens for cell in cells)
    steps: list[Pieces] = [((bounds.context // 2, 1),) * count for count in {decodes[0], decodes[-1]}]
    for pieces in (*steps, ((0, prompt),)):
        cell = list(map(list, pieces))
        asked = {"sequences": bounds.sequences, "contexts": bounds.contexts, "cell": cell, "steps": SCREEN_STEPS}
        told = live.child.ask("profile", "load_energy", **asked)
        if "absent" in told:
            return None, None, str(told["absent"])
        found[Work.of(pieces).rows] = told["joules"] / told["seconds"]
    at = tuple(sorted(found))
    return meter.source, Table(at, tuple(found[rows] for rows in at)), ""
