"""Share out bits among the matrices of all layers: as many as one format has, or half a bit more, for the least harm.

Rounding to codes of `b` bits moves weights by a step in proportion to `1 / (2^b - 1)`, and the KL divergence that small
errors cause grows with their square. So what one format does to a matrix tells what its neighbours of the same group
do. Harms of matrices add up. A bit more does less the more there are, so that taking the bit that does most for its
weights, again and again, is best but for the last one.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from typing import TypeVar

from llmbuild.spec.formats import INTEGERS

Name = TypeVar("Name", bound=Hashable)


@dataclass(frozen=True)
class Part:
    """Matrices that share a format: how many weights, and the KL divergence (nat) when they alone are rounded."""

    weights: int
    harm: float


def neighbours(form: str) -> tuple[str, ...]:
    """Return the symmetric formats of fewer than 8 bits with the same group and type of scales, this one included; none
    of another.
    """
    of = INTEGERS.get(form)
    if of is None or not of.has_sides:
        return ()
    alike = of.group, of.scale
    return tuple(name for name, other in INTEGERS.items() if other.has_sides and (other.group, other.scale) == alike)


def modelled(parts: Mapping[Name, Part], base: str, formats: Mapping[Name, str]) -> float:
    """Return the modelled harm of formats by part; the parts' own harms were measured in `base`."""
    return sum(part.harm * _share_of_harm(formats[name], base) for name, part in parts.items())


def share(parts: Mapping[Name, Part], base: str, extra: float = 0.0) -> dict[Name, str]:
    """Return a format for each part, within the bits of `base` and `extra` for each weight in the mean.

    Of parts for which a bit does as much, the first one has it. Never worse than `base` for all, which parts of very
    different sizes could lead to.
    """
    choices = sorted(neighbours(base), key=lambda form: INTEGERS[form].bits)
    number, names = dict.fromkeys(parts, 0), list(parts)
    left = (INTEGERS[base].bits + extra - INTEGERS[choices[0]].bits) * sum(part.weights for part in parts.values())

    def gain(name: Name) -> float:
        now, then = choices[number[name]], choices[number[name] + 1]
        part = parts[name]
        return part.harm * (_share_of_harm(now, base) - _share_of_harm(then, base)) / part.weights

    waiting = [(-gain(name), place) for place, name in enumerate(names)]
    heapify(waiting)
    while waiting:
        _, place = heappop(waiting)
        name = names[place]
        if parts[name].weights > left:
            continue
        left -= parts[name].weights
        number[name] += 1
        if number[name] + 1 < len(choices):
            heappush(waiting, (-gain(name), place))
    found, alike = {name: choices[number[name]] for name in names}, dict.fromkeys(names, base)
    return min(found, alike, key=lambda formats: modelled(parts, base, formats))


def _share_of_harm(form: str, base: str) -> float:
    return float((_step(form) / _step(base)) ** 2)


def _step(form: str) -> float:
    return 1 / ((1 << INTEGERS[form].bits) - 1)
