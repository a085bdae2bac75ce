"""What load curves predict of rates, beside what was measured: by rate, by variant, and where preferences cross."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf, isfinite
from typing import Any

from comparison import highest_rate
from comparison.highest_rate import Bracket, Crossing, bracket, held_above
from comparison.rate_runs import AtRate, Measured, Variant, at_rates, hold, percentiles
from llmbuild.report.table import table
from llmbuild.serve import capacity
from llmbuild.serve.capacity import Capacity, Lengths
from llmbuild.serve.drive import Heard, Sending
from llmbuild.serve.schedule.fcfs import Fcfs
from llmbuild.serve.simulate import Arrival, Host, simulate
from llmbuild.spec.load_curve import LoadCurve
from llmbuild.spec.slo import METRICS, Bound

PAGE = 16
"""Positions of a block; with memory for all sequences it does not matter."""
LIMIT = 0.1
"""Relative error of the picked rate that is aimed at."""
TRIES = 40
"""Rates that are simulated, at most."""


def server_of(curve: LoadCurve, sequences: int) -> capacity.Server:
    """Return the server, with memory for all of its sequences."""
    slots = min(sequences, curve.decodes_most)
    return capacity.Server(curve, Host(slots, slots * -(-curve.context // PAGE), PAGE, curve.context), Fcfs(), "fcfs")


def picked(curve: LoadCurve, sequences: int, lengths: Lengths, bounds: Sequence[Bound]) -> Capacity:
    """Return the highest rate by the curve."""
    return capacity.capacity(server_of(curve, sequences), lengths, bounds)


def simulated(variant: Variant, sends: Sequence[Sending]) -> tuple[Heard, ...]:
    """Return what requests would see by the curve."""
    of = server_of(variant.curve, variant.sequences)
    asked = [Arrival(*one) for one in sends]
    found = simulate(asked, of.scheduler, of.host, of.step_s, request_s=of.request_s)
    return tuple(
        Heard(one.asked.arrival_s, 0.0, "answered", one.ttft_s, one.e2e_s, one.e2e_s, one.tokens) for one in found.lives
    )


def replayed(variant: Variant, made: Measured, first: float) -> float:
    """Return the highest rate that holds by the curve for the very requests that are sent; to 2 %.

    So it differs from the measured one by the error of the curve alone. The rate that is picked is for other draws, and
    a queue that seems to grow without end counts there.
    """
    held = dict[float, bool]()
    while len(held) < TRIES and (rate := highest_rate.next_rate(held, first, 0.02)) is not None:
        draws = made.sampling.draws(rate, made.bounds, variant.curve.context)
        heard = [one for sends in draws for one in simulated(variant, sends)]
        held[rate] = hold(percentiles(heard, made.bounds), made.bounds)
    return bracket(held).low


@dataclass(frozen=True)
class Judged:
    """A variant: the rates that are predicted, and what was measured."""

    variant: Variant
    loss: float
    """In the objective: lower is better, infinite where there is no reading."""
    picked: float
    sure: float
    """The rate that is held where every step takes longer by the curve's error."""
    replayed: float
    measured: Bracket
    rates: tuple[AtRate, ...]
    simulated: tuple[Mapping[str, float], ...]
    """Percentiles of the same requests at each rate, by the curve."""
    odd: tuple[float, ...]
    """Rates that were held although a lower one was not."""


@dataclass(frozen=True)
class Judgement:
    """All variants, and the rates at which another one becomes the preferred one."""

    measured: Measured
    objective: str
    variants: tuple[Judged, ...]
    crossings: tuple[Crossing, ...]

    @property
    def predicted_spans(self) -> tuple[highest_rate.Preferred, ...]:
        """Return which variant is preferred at which rates, by the curves."""
        return self._spans({one.variant.name: one.picked for one in self.variants})

    @property
    def measured_spans(self) -> tuple[highest_rate.Preferred, ...]:
        """Return which variant is preferred at which rates, by what was held."""
        return self._spans({one.variant.name: one.measured.low for one in self.variants})

    def _spans(self, rates: Mapping[str, float]) -> tuple[highest_rate.Preferred, ...]:
        holdings = (highest_rate.Holding(one.variant.name, one.loss, rates[one.variant.name]) for one in self.variants)
        return highest_rate.preferred(list(holdings))


def judged(made: Measured, objective: str) -> Judgement:
    """Return the comparison; of the objective, the readings in the catalog count."""
    known = at_rates(made)
    ones = tuple(
        _judged(one, made, objective, tuple(each for each in known if each.name == one.name)) for one in made.variants
    )
    found = highest_rate.crossings(
        {one.variant.name: one.loss for one in ones},
        {one.variant.name: one.picked for one in ones},
        {one.variant.name: one.measured for one in ones},
    )
    return Judgement(made, objective, ones, found)


def _judged(one: Variant, made: Measured, objective: str, rates: tuple[AtRate, ...]) -> Judged:
    best = picked(one.curve, one.sequences, made.sampling.lengths, made.bounds)
    held = {each.rate: each.holds for each in rates}
    return Judged(
        one,
        _loss(one.readings.get(objective), objective),
        best.rate,
        best.sure,
        replayed(one, made, best.rate) if best.rate else 0.0,
        bracket(held),
        rates,
        tuple(_simulated(one, made, each.rate) for each in rates),
        held_above(held),
    )


def _simulated(one: Variant, made: Measured, rate: float) -> dict[str, float]:
    runs = [run for run in made.runs if (run.name, run.rate) == (one.name, rate)]
    return percentiles([each for run in runs for each in simulated(one, run.sends)], made.bounds)


def _loss(reading: float | None, objective: str) -> float:
    if reading is None:
        return inf
    return reading if METRICS[objective].direction == "min" else -reading


# --- shown -----------------------------------------------------------------------------------------------------------


def document(made: Judgement) -> dict[str, Any]:
    """Return the comparison as JSON has it: what is infinite is null."""
    return {
        "machine": made.measured.machine,
        "slo": list(made.measured.slo),
        "lengths": [made.measured.sampling.lengths.prompt, made.measured.sampling.lengths.output],
        "least_requests": made.measured.least,
        "objective": made.objective,
        "variants": [_variant_json(one, made.objective) for one in made.variants],
        "crossings": [
            {
                "before": one.before,
                "after": one.after,
                "predicted": one.predicted,
                "measured": _bracket_json(one.measured) if one.measured else None,
                "sure": one.sure,
            }
            for one in made.crossings
        ],
    }


def _variant_json(one: Judged, objective: str) -> dict[str, Any]:
    return {
        "name": one.variant.name,
        "variant": one.variant.variant,
        "format": one.variant.form,
        "sequences": one.variant.sequences,
        objective: one.variant.readings.get(objective),
        "picked": one.picked,
        "sure": one.sure,
        "replayed": one.replayed,
        "measured": _bracket_json(one.measured),
        "within_10_percent": one.measured.agrees(one.picked, LIMIT),
        "held_above": list(one.odd),
        "rates": [
            {
                "rate": at.rate,
                "requests": list(at.requests),
                "goodput": list(at.goodput),
                "holds": at.holds,
                "runs_held": at.runs_held,
                "measured": {name: _known(value) for name, value in at.values.items()},
                "simulated": {name: _known(value) for name, value in simulated.items()},
                "client_share": at.client_share,
                "stolen_share": at.stolen_share,
            }
            for at, simulated in zip(one.rates, one.simulated, strict=True)
        ],
    }


def _bracket_json(one: Bracket) -> list[float | None]:
    return [one.low, _known(one.high)]


def _known(value: float) -> float | None:
    return value if isfinite(value) else None


def text(made: Judgement) -> str:
    """Return the tables, and what is to be known of them."""
    told = [_rates_table(made), _variants_table(made), _crossings_table(made), *_doubts(made)]
    return "\n\n".join(
        [f"{made.measured.machine}; {' '.join(made.measured.slo)}; {made.measured.sampling.lengths}", *told]
    )


def _rates_table(made: Judgement) -> str:
    names = [bound.metric for bound in made.measured.bounds]
    header = ["variant", "format", "requests/s", "sent", "goodput/s", "holds", "of runs"]
    lines = [
        [
            one.variant.name,
            one.variant.form,
            f"{at.rate:.3g}",
            "+".join(map(str, at.requests)),
            f"{at.mean:.3g}",
            "yes" if at.holds else "no",
            f"{at.runs_held}/{len(at.requests)}",
            *(f"{_ms(at.values[name])}, {_ms(simulated[name])}" for name in names),
            f"{100 * at.client_share:.0f}",
            f"{100 * at.stolen_share:.0f}",
        ]
        for one in made.variants
        for at, simulated in zip(one.rates, one.simulated, strict=True)
    ]
    return table([*header, *(f"{name}, simulated" for name in names), "client %", "stolen %"], lines, (0, 1))


def _variants_table(made: Judgement) -> str:
    header = ["variant", "format", made.objective, "picked/s", "sure/s", "replayed/s"]
    header += ["measured/s", "bracket", "error", "within 10%", "replayed, error"]
    lines = [
        [
            one.variant.name,
            one.variant.form,
            "-" if not isfinite(one.loss) else f"{one.variant.readings[made.objective]:.5g}",
            f"{one.picked:.3g}",
            f"{one.sure:.3g}",
            f"{one.replayed:.3g}",
            _span(one.measured),
            f"{one.measured.width:.1%}" if isfinite(one.measured.width) else "open",
            _error(one.measured, one.picked),
            one.measured.agrees(one.picked, LIMIT),
            _error(one.measured, one.replayed),
        ]
        for one in made.variants
    ]
    return table(header, lines, (0, 1))


def _crossings_table(made: Judgement) -> str:
    header = ["preferred up to", "then", "predicted/s", "measured/s", "error", ""]
    lines = [
        [
            one.before,
            one.after or "none",
            "-" if one.predicted is None else f"{one.predicted:.3g}",
            "-" if one.measured is None else _span(one.measured),
            "-" if one.measured is None or one.predicted is None else _error(one.measured, one.predicted),
            "" if one.sure or one.measured is None else "not sure: the brackets meet",
        ]
        for one in made.crossings
    ]
    rule = f"preferred at a rate, as by `llmbuild pick --rate`: the best {made.objective} of the variants that hold it"
    return f"{rule}\n{table(header, lines, (0, 1, 5))}"


def _doubts(made: Judgement) -> list[str]:
    """Return what makes figures doubtful."""
    least, told = made.measured.least, list[str]()
    for one in made.variants:
        few = [f"{at.rate:.3g}/s ({min(at.requests)})" for at in one.rates if min(at.requests) < least]
        if few:
            told.append(f"{one.variant.name}: fewer than {least} requests in a run at {', '.join(few)}: too few")
        if one.odd:
            rates = ", ".join(f"{rate:.3g}/s" for rate in one.odd)
            told.append(f"{one.variant.name}: held at {rates}, above a rate that was not held")
        if one.variant.curve.doubt:
            told.append(f"{one.variant.name}: its load curve is doubtful: {one.variant.curve.doubt}")
        if not isfinite(one.loss):
            told.append(f"{one.variant.name} has no {made.objective}: it is preferred where no other one holds")
    return ["\n".join(told)] if told else []


def _span(one: Bracket) -> str:
    return f"{one.low:.3g} to {one.high:.3g}" if isfinite(one.high) else f"{one.low:.3g} at least"


def _error(one: Bracket, predicted: float) -> str:
    least, most = one.errors(predicted)
    if not isfinite(one.high):
        return f"at most {most:+.0%}"
    return f"{least:+.0%} to {most:+.0%}" if isfinite(most) else f"at least {least:+.0%}"


def _ms(value: float) -> str:
    return f"{1000 * value:.3g} ms" if isfinite(value) else "-"
