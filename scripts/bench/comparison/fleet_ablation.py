"""`adaptive` without one of its parts: what each of them is worth."""

from __future__ import annotations

from dataclasses import replace

from llmbuild.fleet.policies.adaptive import ALL, Adaptive
from llmbuild.fleet.policies.named import POLICIES, Named, policy
from llmbuild.fleet.policies.routing import Choose, least_loaded
from llmbuild.fleet.policy import Given
from llmbuild.spec.fleet import Fleet

WHOLE = POLICIES["adaptive"]


def _without(name: str) -> Named:
    parts = replace(ALL, **{name: False})

    def make(given: Given) -> Adaptive:
        return Adaptive(given, parts)

    return replace(WHOLE, make=make)


def _least(fleet: Fleet) -> Choose:
    return least_loaded


PARTS = {
    "without head-room": "headroom",
    "without trend": "trend",
    "without hold": "hold",
    "without worth": "worth",
    "without urgency": "urgent",
    "without clocks": "clocks",
}
ABLATIONS = {
    **{name: _without(part) for name, part in PARTS.items()},
    "without slack routing": replace(WHOLE, router=_least),
    "static, slack routing": replace(POLICIES["static-peak"], router=WHOLE.router),
}
"""The last one is the static plan for the peak with the router of `adaptive`."""


def named(name: str) -> Named:
    """Return a policy, or one of these.

    Raises:
        InputError: neither.
    """
    return ABLATIONS[name] if name in ABLATIONS else policy(name)
