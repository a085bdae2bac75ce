"""How a weight matrix lies in memory for our kernels, in each format they read: panels of 64 rows, one stream each."""

from __future__ import annotations

from dataclasses import dataclass

from llmbuild.spec.formats import INTEGERS, SHARED, fit_group

PANEL, LINE, QUAD = 64, 64, 4
LIFT = 2.0**112
"""The exponent bits of `f12_e4m7` are read as the lowest of f32, so that all its numbers are 2^-112 of their own: what
they are multiplied by makes up for it, and nothing is added to every weight.
"""

HALVES = ("f16", "bf16")
FORMATS = ("int8", "int4_g32", "int4_g64", "int4_g128", *HALVES, SHARED)
"""Formats that our kernels read."""


def up_to(size: int, multiple: int) -> int:
    """Return the size rounded up to a multiple."""
    return -(-size // multiple) * multiple


def family(form: str) -> str:
    """Return what kernels tell formats apart by: `int4` whatever its groups."""
    return "int4" if form in INTEGERS and INTEGERS[form].bits == 4 else form


@dataclass(frozen=True)
class Layout:
    """A matrix of so many columns, a multiple of 16, in a format.

    A panel's data are, `int8`: bytes (code + 128) `[K/4][64][4]`; `int4`: bytes `[K/8][64][4]`, codes + 8, those of
    columns 8j..8j+3 in the low halves, 8j+4..8j+7 above them; `f16`: `[K][64]`; `bf16`: `[K/2][64][2]`; `f12_e4m7`:
    bytes `[K/8][3][64][4]`, the upper eight bits of columns 8j, 8j+2, 8j+1, 8j+3, those of the next four in this order,
    and the lower four bits: of the even columns from the lowest bits on in two bytes, then of the odd ones.
    Its scales are bf16`[groups][64]`, or f32`[64]` where there is one for a row; those of f16 and bf16 are 1, those of
    `f12_e4m7` the powers of two that the rows share.

    A row of activations is prepared for it as f32`[K]` for f16 and bf16. `f12_e4m7` has a line with a power of two
    before that, f32, and the rest divided by it and multiplied by `LIFT`. Integers have signed bytes `[K]` after a line
    with their scale, f32, and for `int8` the sum of the bytes, i32; `int4` has lines of i32 between them, for each
    group the sum of the bytes times -8.
    """

    form: str
    columns: int

    @property
    def group(self) -> int:
        """Columns that share a scale."""
        wanted = INTEGERS[self.form].group if self.form in INTEGERS else 0
        return fit_group(self.columns, wanted) if wanted else self.columns

    @property
    def groups(self) -> int:
        """Scales of a row, as the format has them."""
        return self.columns // self.group

    @property
    def family(self) -> str:
        """What kernels tell formats apart by."""
        return family(self.form)

    @property
    def is_half(self) -> bool:
        """Whether weights are stored as floating-point numbers of 16 bits."""
        return self.form in HALVES

    @property
    def is_shared(self) -> bool:
        """Whether weights share the exponent of their row."""
        return self.form == SHARED

    @property
    def is_real(self) -> bool:
        """Whether weights are floating-point: what they are multiplied by is not rounded then."""
        return self.is_half or self.is_shared

    @property
    def is_nibble(self) -> bool:
        """Whether two codes share a byte."""
        return self.family == "int4"

    @property
    def element(self) -> str:
        """Type of the stored data in MLIR."""
        return self.form if self.is_half else "i8"

    @property
    def scale_element(self) -> str:
        """Type of the stored scales in MLIR."""
        return "bf16" if self.groups > 1 else "f32"

    @property
    def panel_elements(self) -> int:
        """Stored elements of one panel."""
        size = PANEL * self.columns
        return size * 3 // 2 if self.is_shared else size // 2 if self.is_nibble else size

    @property
    def panel_bytes(self) -> int:
        """Bytes of one panel's data."""
        return self.panel_elements * (2 if self.is_half else 1)

    @property
    def scale_bytes(self) -> int:
        """Bytes of one panel's scales."""
        return PANEL * (2 * self.groups if self.groups > 1 else 4)

    @property
    def sums_bytes(self) -> int:
        """Bytes of the sums of groups before a prepared row's own bytes."""
        return up_to(4 * self.groups, LINE) if self.is_nibble else 0

    @property
    def prepared_bytes(self) -> int:
        """Bytes of one row of activations, prepared."""
        return self.header_bytes + up_to(4 * self.columns if self.is_real else self.columns, LINE)

    @property
    def header_bytes(self) -> int:
        """Bytes of a prepared row before its values: what they are scaled by, and sums of them."""
        return 0 if self.is_half else LINE + self.sums_bytes
