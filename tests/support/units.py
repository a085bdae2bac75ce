"""With which instruction sets a test tries a case: with all, or by default with enough of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import pytest

from llmbuild.kernels.choose import KNOWN
from llmbuild.kernels.instructions import Instructions
from llmbuild.kernels.layouts import family
from tests.support.machines import MACHINES

LONG_ONLY = ("whole panels", "smallest", "int4 in one group", "int4 smallest", "whole panel", "part of a panel")
"""Cases that only the longest registers are tried with: what they are about is the same for all."""
UNITS = {unit.name: unit for unit in KNOWN}
Pair = tuple[str, str]
"""The name of an instruction set, and that of a case."""


def all_pairs(forms: Mapping[str, str]) -> list[Pair]:
    """Return the pairs that there is a kernel for; `forms` are the formats of the weights, by case."""
    able = [(unit.name, case) for unit in KNOWN for case, form in forms.items() if family(form) in unit.kernels]
    return [(unit, case) for unit, case in able if unit == "avx512" or case not in LONG_ONLY]


def covering(pairs: Sequence[Pair], groups: Mapping[str, str]) -> list[Pair]:
    """Return pairs with every instruction set that a group of cases has, and one for every case."""
    chosen: list[Pair] = []
    for unit, group in dict.fromkeys((unit, groups[case]) for unit, case in pairs):
        tried = Counter(case for _, case in chosen)
        alike = (pair for pair in pairs if (pair[0], groups[pair[1]]) == (unit, group))
        chosen.append(min(alike, key=lambda pair: tried[pair[1]]))
    for case in groups:
        if not any(pair[1] == case for pair in chosen):
            used = Counter(unit for unit, _ in chosen)
            left = [pair for pair in pairs if pair[1] == case and pair not in chosen]
            chosen += sorted(left, key=lambda pair: used[pair[0]])[:1]
    return [pair for pair in pairs if pair in chosen]


def runnable(pairs: Sequence[Pair]) -> list[Pair]:
    """Return the pairs whose instruction set runs here."""
    return [pair for pair in pairs if not MACHINES[pair[0]].lacks]


def families(forms: Mapping[str, str]) -> dict[str, str]:
    """Return the family of the format of each case: cases of one go through the same kernel."""
    return {case: family(form) for case, form in forms.items()}


def with_enough(argument: str, forms: Mapping[str, str], groups: Mapping[str, str]) -> pytest.MarkDecorator:
    """Give a fixture (instruction set, name of the case) for each pair; what `covering` leaves is exhaustive."""
    return _parametrize(argument, all_pairs(forms), _left(forms, groups), indirect=True)


def with_each_family(argument: str, forms: Mapping[str, str]) -> pytest.MarkDecorator:
    """Give a test (instruction set, name of the case) for every pair; those that `covering` leaves are exhaustive."""
    return _parametrize(argument, all_pairs(forms), _left(forms, families(forms)))


def _left(forms: Mapping[str, str], groups: Mapping[str, str]) -> list[Pair]:
    here = runnable(all_pairs(forms))
    kept = covering(here, groups)
    return [pair for pair in here if pair not in kept]


def _parametrize(
    argument: str, pairs: Sequence[Pair], left: Sequence[Pair], indirect: bool = False
) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(argument, [_param(pair, pair in left) for pair in pairs], indirect=indirect)


def _param(pair: Pair, left: bool) -> object:
    unit, case = pair
    lacks = MACHINES[unit].lacks
    marks = [pytest.mark.skipif(bool(lacks), reason=lacks), *([pytest.mark.exhaustive] if left else [])]
    given: tuple[Instructions, str] = UNITS[unit], case
    return pytest.param(given, id=f"{unit}-{case.replace(' ', '-')}", marks=marks)
