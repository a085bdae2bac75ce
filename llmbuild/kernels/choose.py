"""Which instruction set our kernels use on a target."""

from __future__ import annotations

from collections.abc import Iterable

from llmbuild.kernels.avx2 import AVX2, AVXVNNI
from llmbuild.kernels.avx512 import AVX512
from llmbuild.kernels.instructions import Instructions

KNOWN = (AVX512, AVXVNNI, AVX2)
"""The fastest first."""


def choose(features: Iterable[str]) -> Instructions | None:
    """Return the fastest instruction set that a CPU with these features (LLVM's names) has, or nothing."""
    has = {feature.lstrip("+") for feature in features if not feature.startswith("-")}
    return next((unit for unit in KNOWN if has.issuperset(unit.features)), None)
