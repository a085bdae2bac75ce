"""Plots of policies: energy against attainment on each fleet, and power and replicas over a day."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, log10
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING

from comparison.fleet_runs import OURS, STATIC, Simulated
from comparison.plot import saved
from llmbuild.errors import InputError
from llmbuild.fleet.policies.named import POLICIES
from llmbuild.fleet.simulate.outcome import Outcome
from llmbuild.report.fleet import bootstrap

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MARKS = dict(zip(POLICIES, "sDv^o*", strict=False))
ACROSS = 3
"""Panels beside each other."""
NINES = ("0 %", "90 %", "99 %", "99.9 %", "≥ 99.99 %")
"""Attainment by the number of nines."""
COLORS = {name: f"C{number}" for number, name in enumerate(POLICIES)}


def energy(fleets: Sequence[Simulated], path: Path) -> None:
    """Write energy for each token against attainment, a panel for each fleet, a mark for each policy."""
    from matplotlib.figure import Figure

    across = min(len(fleets), ACROSS)
    down = ceil(len(fleets) / across)
    figure = Figure(figsize=(4.6 * across, 4.2 * down), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False).flatten()
    for empty in panels[len(fleets) :]:
        empty.remove()
    for axes, made in zip(panels, fleets, strict=False):
        for name in (one for one in made.policies if one in MARKS):
            _mark(axes, name, made.of(name))
        axes.axvline(_nines(made.asked), linestyle=":", color="gray", label="asked for")
        axes.set_xticks(range(len(NINES)), NINES)
        axes.set_xlabel("requests that met their SLO, worst class")
        axes.set_ylabel(f"J for each output token ({made.outcomes[0].basis})")
        axes.set_title(made.fleet + (", a made-up day" if made.day else ""), fontsize="medium")
        axes.set_ylim(0, None)
        axes.grid(True, alpha=0.3)
        axes.legend(fontsize="small")
    saved(figure, path)


def _nines(share: float) -> float:
    """Return how many nines a share has, up to as many as the axis shows."""
    return -log10(max(1 - share, 0.1 ** (len(NINES) - 1)))


def _mark(axes: Axes, name: str, those: Sequence[Outcome]) -> None:
    """Draw the mean of a policy over seeds, with 95 % intervals where there are several seeds."""
    x, y = [one.worst for one in those], [one.joules_per_token for one in those]
    ends = [bootstrap(values) if len(those) > 2 else (mean(values), mean(values)) for values in (x, y)]
    place = _nines(mean(x)), mean(y)
    across = [[place[0] - _nines(ends[0][0])], [_nines(ends[0][1]) - place[0]]]
    upward = [[place[1] - ends[1][0]], [ends[1][1] - place[1]]]
    form = {"fmt": MARKS[name], "color": COLORS[name], "capsize": 2, "label": name}
    axes.errorbar(*place, xerr=across, yerr=upward, **form)


def day(made: Simulated, path: Path) -> None:
    """Write requests, power and replicas over time, by the first seed: of the static plan, the best in use, and ours.

    Raises:
        InputError: the file has no power by time.
    """
    from matplotlib.figure import Figure

    names = [name for name in (STATIC, made.best_in_use, OURS) if name is not None and made.of(name)]
    if not names or not all(made.of(name)[0].moments for name in names):
        raise InputError("what is saved has no power by time: --every SECONDS measures it")
    figure = Figure(figsize=(8, 6.5), layout="constrained")
    load, power, replicas = figure.subplots(3, 1, sharex=True, height_ratios=(1, 2, 2))
    moments = made.of(names[0])[0].moments
    hours = 24 / made.seconds if made.day else 1 / 3600
    load.step(
        [hours * one.begin_s for one in moments],
        [one.requests / one.seconds for one in moments],
        where="post",
        color="gray",
    )
    for name in names:
        first = made.of(name)[0]
        told = f"{name}: {first.joules_per_token:.3g} J for each token, {first.worst:.2%} met"
        x, whole = [hours * one.begin_s for one in first.moments], {"where": "post", "color": COLORS[name]}
        power.step(x, [one.watts for one in first.moments], label=told, **whole)
        replicas.step(x, [one.replicas for one in first.moments], **whole)
    load.set(ylabel="requests/s", title=f"fleet {made.fleet}")
    power.set(ylabel=f"W ({made.of(names[0])[0].basis})")
    replicas.set(ylabel="replicas", xlabel="hour of the made-up day" if made.day else "hours")
    for axes in (load, power, replicas):
        axes.set_ylim(0, None)
        axes.grid(True, alpha=0.3)
    load.set_xlim(0, hours * made.seconds)
    figure.legend(*power.get_legend_handles_labels(), loc="outside upper center", fontsize="small")
    saved(figure, path)
