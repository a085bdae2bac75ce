"""The policies by their names, as the command line and fleet files take them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from llmbuild.errors import InputError
from llmbuild.fleet.policies.adaptive import adaptive, oracle
from llmbuild.fleet.policies.reactive import lowest_clock, reactive
from llmbuild.fleet.policies.routing import Choose, by_slack, least_loaded
from llmbuild.fleet.policies.static import static_mean, static_peak
from llmbuild.fleet.policy import Make
from llmbuild.spec.fleet import Fleet


@dataclass(frozen=True)
class Named:
    """A policy, its router, and what it knows that a live one could not."""

    make: Make
    router: Callable[[Fleet], Choose]
    knows: str


def _least(fleet: Fleet) -> Choose:
    return least_loaded


ORACLE = "oracle"
POLICIES = {
    "static-peak": Named(static_peak, _least, "the trace's peak and lengths"),
    "static-mean": Named(static_mean, _least, "the trace's mean and lengths"),
    "reactive": Named(reactive, _least, "the trace's lengths"),
    "lowest-clock": Named(lowest_clock, _least, "the trace's peak and lengths"),
    "adaptive": Named(adaptive, by_slack, "the rate of the first minute"),
    ORACLE: Named(oracle, by_slack, "the whole trace"),
}


def policy(name: str) -> Named:
    """Return the policy of that name.

    Raises:
        InputError: no such policy.
    """
    if name not in POLICIES:
        raise InputError(f"no policy {name!r}: there are {', '.join(POLICIES)}")
    return POLICIES[name]


def live_policy(name: str) -> Named:
    """Return the policy of that name for a fleet that runs.

    Raises:
        InputError: no such policy, or one that knows what will come.
    """
    if name == ORACLE:
        raise InputError(f"policy {ORACLE} knows the trace: it can be simulated, and nothing live knows what will come")
    return policy(name)
