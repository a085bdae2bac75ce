"""The table of our kernels: for each instruction set and format the CPU features that it needs."""

from __future__ import annotations

from collections.abc import Iterable

from llmbuild.errors import ChoiceRefused
from llmbuild.kernels import avx2, integers, neon, products, short
from llmbuild.kernels.instructions import Instructions, Kernel
from llmbuild.kernels.layouts import FORMATS, family
from llmbuild.kernels.short import Registers
from llmbuild.spec.formats import INTEGERS, SHARED

_PAUSE_X86 = 'llvm.call_intrinsic "llvm.x86.sse2.pause"() : () -> ()'
_PAUSE_ARM = 'llvm.inline_asm has_side_effects "isb", "" : () -> ()'
_AVX512 = ("avx512f", "avx512bw", "avx512vl")
_AVX2 = ("avx2", "fma", "f16c")
_ARM = ("dotprod",)


def _integers(features: tuple[str, ...], row_tile: int, unit: Registers) -> dict[str, Kernel]:
    """Return the kernels of all families of formats of integers, which one text serves."""
    kernel = Kernel(features, row_tile, integers.sums(unit), spread=integers.spread(unit), ahead=unit.ahead)
    return dict.fromkeys((family(form) for form in FORMATS if form in INTEGERS), kernel)


KNOWN = (
    Instructions("avx512bf16", 16, 2, _PAUSE_X86, {
        "bf16": Kernel((*_AVX512, "avx512bf16"), products.ROW_TILE, products.pair_sums, True),
        SHARED: Kernel((*_AVX512, "avx512bf16"), products.ROW_TILE, products.pair_sums, True),
    }),
    Instructions("avx512", 16, 2, _PAUSE_X86, {
        **_integers((*_AVX512, "avx512vnni"), products.ROW_TILE, products.AVX512),
        "f16": Kernel(_AVX512, products.ROW_TILE, products.half_sums),
        "bf16": Kernel(_AVX512, products.ROW_TILE, products.half_sums),
        SHARED: Kernel(_AVX512, products.ROW_TILE, products.half_sums),
    }),
    Instructions("avxvnni", 8, 1, _PAUSE_X86, {
        **_integers((*_AVX2, "avxvnni"), 4, avx2.AVXVNNI),
    }),
    Instructions("avx2", 8, 1, _PAUSE_X86, {
        **_integers(_AVX2, 4, avx2.AVX2),
        "f16": Kernel(_AVX2, 4, short.half_sums(avx2.LANES, avx2.AHEAD), ahead=avx2.AHEAD),
        "bf16": Kernel(_AVX2, 4, short.half_sums(avx2.LANES, avx2.AHEAD), ahead=avx2.AHEAD),
        SHARED: Kernel(_AVX2, 4, short.half_sums(avx2.LANES, avx2.AHEAD), ahead=avx2.AHEAD),
    }),
    Instructions("i8mm", 4, 1, _PAUSE_ARM, {
        "int8": Kernel(("i8mm",), 4, neon.int8_sums_i8mm),
    }),
    Instructions("dotprod", 4, 1, _PAUSE_ARM, {
        **_integers(_ARM, 4, neon.DOTPROD),
        "f16": Kernel(_ARM, 4, short.half_sums(neon.LANES)),
        "bf16": Kernel(_ARM, 4, short.half_sums(neon.LANES)),
        SHARED: Kernel(_ARM, 4, short.half_sums(neon.LANES)),
    }),
)  # fmt: skip
"""The fastest first. What is not in the table would abort the compiler: it is refused before."""

FEATURES = tuple(dict.fromkeys(f for unit in KNOWN for kernel in unit.kernels.values() for f in kernel.features))
"""CPU features that the choice depends on; a program without our kernels depends on none."""


def choose(features: Iterable[str], form: str) -> Instructions | None:
    """Return the fastest instruction set with a kernel for the format on a CPU with these features, or nothing."""
    has = {feature.lstrip("+") for feature in features if not feature.startswith("-")}
    known = (unit for unit in KNOWN if family(form) in unit.kernels)
    return next((unit for unit in known if has.issuperset(unit.kernels[family(form)].features)), None)


def instructions(features: Iterable[str], form: str) -> Instructions:
    """Return what `choose` does.

    Raises:
        ChoiceRefused: the target has no instruction set that there is a kernel for the format in.
    """
    given = tuple(features)
    if unit := choose(given, form):
        return unit
    if form not in FORMATS:
        raise ChoiceRefused(f"kernel=own reads {', '.join(FORMATS)}; found {form}")
    told = " ".join(f for f in given if f.lstrip("+") in FEATURES) or "none of these"
    raise ChoiceRefused(
        f"kernel=own needs CPU features that the target does not have, {needs(form)} for {form}; found {told}"
    )


def needs(form: str) -> str:
    """Return what CPU features are enough for a format, in words."""
    kernels = (unit.kernels[family(form)] for unit in KNOWN if family(form) in unit.kernels)
    return " or ".join(" ".join(kernel.features) for kernel in kernels)


def required_features(features: Iterable[str], *formats: str) -> tuple[str, ...]:
    """Return the CPU features that the kernels chosen for these formats need; none for one that there is none for."""
    given = tuple(features)
    units = ((choose(given, form), family(form)) for form in formats)
    return tuple(dict.fromkeys(feature for unit, name in units if unit for feature in unit.kernels[name].features))


def readable(features: Iterable[str]) -> tuple[str, ...]:
    """Return the formats that there is a kernel for on a CPU with these features."""
    given = tuple(features)
    return tuple(form for form in FORMATS if choose(given, form))
