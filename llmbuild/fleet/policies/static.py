"""Policies that decide once: for the trace's peak, or for its mean. Both know the trace's rates and lengths."""

from __future__ import annotations

from llmbuild.fleet.plan.plan import plan
from llmbuild.fleet.policy import WINDOW_S, Given, Observation, Target, target_of


class Static:
    """A plan that is made before the trace begins, and kept."""

    def __init__(self, given: Given, peak: bool) -> None:
        rates = given.most(0.0, float("inf")) if peak else given.mean()
        made = plan(given.fleet, given.profiles, given.load(rates))
        self._target = target_of(made)
        what = f"the largest rate of {WINDOW_S:g} s" if peak else "the mean rate"
        self._told = f"planned once for {what} of the trace, {made.load.rate:.3g}/s"

    def observe(self, seen: Observation) -> None:
        """Look away."""

    def decide(self) -> Target:
        """Return what was planned."""
        return self._target

    def explain(self) -> str:
        """Return what it was planned for."""
        return self._told


def static_peak(given: Given) -> Static:
    """Return a plan for the peak of the trace."""
    return Static(given, peak=True)


def static_mean(given: Given) -> Static:
    """Return a plan for the mean of the trace."""
    return Static(given, peak=False)
