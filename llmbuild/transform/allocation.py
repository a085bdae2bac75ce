"""Share out bits among the kinds of matrices of a decoder: up to half a bit more than one format, for the least harm.

Rounding to codes of `b` bits moves weights by a step in proportion to `1 / (2^b - 1)`, and the KL divergence that small
errors cause grows with their square. So what one format does to a kind tells what its neighbours of the same group do.
Harms of kinds add up. Without the half bit, formats are whole bits apart and kinds too few: what one kind gives up is
more than the others gain.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from llmbuild.spec.formats import INTEGERS

EXTRA = 0.5
"""Bits of a weight, in the mean, that may be spent beyond those of the format."""


@dataclass(frozen=True)
class Kind:
    """Matrices that share a format: how many weights, and the KL divergence (nat) when they alone are rounded."""

    weights: int
    harm: float


def neighbours(form: str) -> tuple[str, ...]:
    """Return the symmetric formats of fewer than 8 bits with the same group, this one included; none of another."""
    of = INTEGERS.get(form)
    if of is None or not of.has_sides:
        return ()
    return tuple(name for name, other in INTEGERS.items() if other.has_sides and other.group == of.group)


def modelled(kinds: Mapping[str, Kind], base: str, formats: Mapping[str, str]) -> float:
    """Return the modelled harm of formats by kind; the kinds' own harms were measured in `base`."""
    steps = {name: _step(formats[name]) / _step(base) for name in kinds}
    return sum(kinds[name].harm * steps[name] ** 2 for name in sorted(kinds))  # in one order: the sum is the same


def share(kinds: Mapping[str, Kind], base: str) -> dict[str, str]:
    """Return a format for each kind: of all within the bits of `base` and `EXTRA`, those of the least harm."""
    names, choices = sorted(kinds), neighbours(base)
    budget = (INTEGERS[base].bits + EXTRA) * sum(kind.weights for kind in kinds.values())
    fitting = [
        found for found in (dict(zip(names, forms, strict=True)) for forms in product(choices, repeat=len(names)))
        if _bits(kinds, found) <= budget
    ]  # fmt: skip
    return min(fitting, key=lambda found: (modelled(kinds, base, found), _bits(kinds, found), _order(found)))


def _bits(kinds: Mapping[str, Kind], formats: Mapping[str, str]) -> int:
    return sum(kind.weights * INTEGERS[formats[name]].bits for name, kind in kinds.items())


def _order(formats: Mapping[str, str]) -> Sequence[str]:
    return [formats[name] for name in sorted(formats)]


def _step(form: str) -> float:
    return 1 / ((1 << INTEGERS[form].bits) - 1)
