"""The plot of goodput against the offered rate, with what is picked, what was measured, and which is preferred."""

from __future__ import annotations

from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING

from comparison.highest_rate import Preferred
from comparison.plot import saved
from comparison.rate_judgement import Judged, Judgement

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def write(made: Judgement, path: Path) -> None:
    """Write the plot; the type of picture is that of the file's name."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 5.5), layout="constrained")
    figure.suptitle(f"{made.measured.machine}\n{'  '.join(made.measured.slo)}", fontsize="small")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(6, 1))
    colors = {one.variant.name: f"C{number}" for number, one in enumerate(made.variants)}
    most = max((at.rate for one in made.variants for at in one.rates), default=1.0)
    upper.plot([0, most], [0, most], ":", color="gray", label="all requests")
    for one in made.variants:
        _curve(upper, one, colors[one.variant.name], most)
    upper.plot([], [], "v", color="gray", label="picked by the load curve")
    upper.axvspan(0, 0, color="gray", alpha=0.25, label="highest rate, measured")
    upper.set(ylabel="requests a second within the bounds", xlim=(0, 1.03 * most), ylim=(0, None))
    upper.grid(True, alpha=0.3)
    upper.legend(fontsize="small")
    _bars(lower, 1, made.predicted_spans, colors)
    _bars(lower, 0, made.measured_spans, colors)
    lower.set(xlabel="requests a second", ylim=(-0.5, 1.5), title=f"preferred by {made.objective}")
    lower.title.set_fontsize("small")
    lower.set_yticks([1, 0], ["predicted", "measured"])
    saved(figure, path)


def _curve(axes: Axes, one: Judged, color: str, most: float) -> None:
    """Draw the goodput of a variant: the mean over runs, from the least to the most of a run; its pick, its bracket."""
    means = [at.mean for at in one.rates]
    below = [mean - min(at.goodput) for mean, at in zip(means, one.rates, strict=True)]
    above = [max(at.goodput) - mean for mean, at in zip(means, one.rates, strict=True)]
    rates = [at.rate for at in one.rates]
    label = f"{one.variant.form}  {one.variant.name}"
    axes.errorbar(rates, means, [below, above], fmt="o-", markersize=3.5, capsize=2, color=color, label=label)
    axes.plot([one.picked], [one.picked], "v", color=color, markersize=9, markeredgecolor="black")
    if one.measured.low:
        high = one.measured.high if isfinite(one.measured.high) else most
        axes.axvspan(one.measured.low, high, color=color, alpha=0.25, linewidth=0)


def _bars(axes: Axes, height: int, spans: tuple[Preferred, ...], colors: dict[str, str]) -> None:
    for one in spans:
        axes.barh(height, one.up_to - one.above, left=one.above, height=0.7, color=colors[one.name])
