"""The names and parameters of weight formats: shared by the search, the frontend and the transforms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

SHARED = "f12_e4m7"
"""Weights of 12 bits: sign, 4 bits of exponent, 7 stored bits of significand (those of bf16), and one exponent per
row, that of its largest weight. A value below the 15 binades of 4 bits is rounded to 0 or the smallest number: no
weight is off by more than 2^-8 of itself or 2^-15 of the row's largest.
"""

FLOATS = ("f32", "f16", "bf16", SHARED)
GROUPS = (32, 64, 128)
LEAST_GROUP = 8
"""A shorter group spends as many bits on scales as on codes."""

Scales = Literal["bf16", "f16", "i8"]
"""Types of the scales of groups: `i8` times a power of two that the groups of a row share, which is f32."""


@dataclass(frozen=True)
class Format:
    """The integer encoding of weights: `(code - zero) * scale + minimum`, with one scale for each group of a row's
    columns.
    """

    bits: int
    """2 to 8: codes are -2..1 to -128..127; of 4 bits above a minimum 0..15."""
    group: int = 0
    """Columns that share a scale; 0 is the whole row."""
    symmetric: bool = True
    """Whether the zero is always code 0; else each group has its own zero code."""
    scale: Scales = "bf16"
    """Type of the scales of groups; those of whole rows are f32."""
    minimum: bool = False
    """Whether codes count from the least weight of their group, which is stored in the type of the scales."""

    @property
    def is_block(self) -> bool:
        """Whether groups are the blocks of GGUF files: never fitted to a row's length, its last one may be short."""
        return self.scale == "f16"

    @property
    def has_sides(self) -> bool:
        """Whether scales may be negative: of symmetric codes so few that the lowest one, which has no opposite, counts.

        The blocks of GGUF have rules of their own.
        """
        return self.symmetric and self.bits < 8 and not self.is_block

    @property
    def lowest(self) -> int:
        """The lowest code."""
        return 0 if self.minimum else -(1 << (self.bits - 1))

    @property
    def highest(self) -> int:
        """The highest code."""
        return self.lowest + (1 << self.bits) - 1


FEW = (7, 6, 5, 4, 3, 2)
"""Bits of the symmetric formats whose scales may be negative."""

INTEGERS: dict[str, Format] = {
    "int8": Format(8),
    **{f"int8_g{group}": Format(8, group) for group in GROUPS},
    **{f"int{bits}_g{group}": Format(bits, group) for bits in FEW for group in GROUPS},
    **{f"int{bits}_g32s8": Format(bits, 32, scale="i8") for bits in FEW},
    **{f"int4a_g{group}": Format(4, group, symmetric=False) for group in GROUPS},
    "q8_0": Format(8, 32, scale="f16"),
    "q4_0": Format(4, 32, scale="f16"),
    "q4_1": Format(4, 32, scale="f16", minimum=True),
}
"""`int8`: one scale for each output row. `_gN`: one for each N inputs of a row. `int4a`: with zeros (asymmetric).
`_gNs8`: one of 8 bits for each N inputs, times a power of two for each row.
`q8_0`, `q4_0`, `q4_1`: the blocks of GGUF files, by GGUF's names; their scales may be 0, those of `q4_0` negative.
"""

BLOCKS = tuple(name for name, form in INTEGERS.items() if form.is_block)

WEIGHT_FORMATS = (*FLOATS, *INTEGERS)

SAME = "same"
"""As `head_format`: the format of the layers."""


def fit_group(columns: int, group: int) -> int:
    """Return the effective group: halved until it divides the columns, and the whole row where 8 does not.

    All groups of a matrix are equally long, so that it has the shape `[N, groups, group]` for every kernel.
    """
    while group >= LEAST_GROUP:
        if columns % group == 0:
            return group
        group //= 2
    return columns


def bits(form: str, panels: bool = True) -> float:
    """Return the bits per weight of a format, scales of groups and zeros included.

    They are those of `panels`, as our kernels for CPUs read them, or those of the compiler's layouts: there only codes
    of 4 bits share a byte, scales of groups have 16 bits, and `f12_e4m7` is kept as bf16.
    """
    if form in INTEGERS:
        of = INTEGERS[form]
        scale, code = (8 if of.scale == "i8" else 16, of.bits) if panels else (16, 4 if of.bits == 4 else 8)
        each = scale + (0 if of.symmetric else 8) + (16 if of.minimum else 0)
        return code + (each / of.group if of.group else 0.0)
    return {"f32": 32.0, SHARED: 12.0 if panels else 16.0}.get(form, 16.0)


def in_panels(choices: Mapping[str, object]) -> bool:
    """Return whether choices of knobs keep weights in the panels of our kernels for CPUs."""
    return choices.get("kernel") == "own" and choices.get("layout") == "packed"
