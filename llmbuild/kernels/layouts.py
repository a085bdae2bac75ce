"""How a weight matrix lies in memory for our kernels, in each format they read: panels of 64 rows, one stream each."""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

from llmbuild.spec.formats import BLOCKS, INTEGERS, SHARED, fit_group

PANEL, LINE, QUAD = 64, 64, 4
PERIOD = 32
"""Columns that a matrix of integers has a multiple of: codes of any length fill whole bytes by then."""
TWO_BYTES = {"int8": (), "int16": ("qkv", "out", "gate_up", "down", "head"), "mixed": ("qkv", "head")}
"""By what activations of integer weights are rounded to: the matrices that read two bytes of each, not one."""
ACTIVATIONS = tuple(TWO_BYTES)
"""The first is the default."""
ALLOCATIONS = {"uniform": 0.0, "sensitive": 0.0, "sensitive+half": 0.5}
"""How bits of weights are shared out among the matrices of all layers, with the bits of a weight in the mean that are
spent beyond those of the format; the first is the default, in which all have that format.
"""
UNIFORM = next(iter(ALLOCATIONS))
LOW_BITS = 7
LOW = 1 << LOW_BITS
"""What the first byte of an activation of two bytes counts; the second one is -64..63."""
LIFT = 2.0**112
"""The exponent bits of `f12_e4m7` are read as the lowest of f32, so that all its numbers are 2^-112 of their own: what
they are multiplied by makes up for it, and nothing is added to every weight.
"""

HALVES = ("f16", "bf16")
FORMATS = (
    *(n for n, f in INTEGERS.items() if f.symmetric and not f.is_block and (f.bits < 8 or not f.group)),
    *HALVES,
    SHARED,
    *BLOCKS,
)
"""Formats that our kernels read."""


def up_to(size: int, multiple: int) -> int:
    """Return the size rounded up to a multiple."""
    return -(-size // multiple) * multiple


def family(form: str) -> str:
    """Return what kernels tell formats apart by: `int4` or `int7` whatever its groups."""
    return f"int{INTEGERS[form].bits}" if form in INTEGERS and form not in BLOCKS else form


def rounded_together(bits: int, group: int) -> int:
    """Return how many columns of activations are rounded to bytes with one scale, a part of the weights' group or all.

    One large number makes the step of all others in its block coarse: 32 columns as in the blocks of GGUF, or 64 for
    codes of 5 bits and fewer, beside whose own error that of the activations is small.
    """
    return fit_group(group, 32 if bits > 5 else 64)


@dataclass(frozen=True)
class Bits:
    """Bits of a code: `count` of them, from bit `place` of it on, that are stored from bit `start` of a byte on."""

    byte: int
    start: int
    count: int
    place: int

    @property
    def mask(self) -> int:
        """So many ones."""
        return (1 << self.count) - 1


@dataclass(frozen=True)
class Codes:
    """How codes of so many bits lie in bytes: some quads of columns together, the first ones in the lower bits of a
    byte each.

    The bits above these, taken byte after byte from the lowest on, are one string: the codes of the other quads.
    """

    bits: int

    @property
    def bytes_(self) -> int:
        """Bytes for the columns of a quad's place that lie together."""
        return self.bits // gcd(8, self.bits)

    @property
    def quads(self) -> int:
        """Quads that lie together."""
        return 8 // gcd(8, self.bits)

    @property
    def columns(self) -> int:
        """Columns that lie together."""
        return QUAD * self.quads

    def pieces(self, quad: int) -> tuple[Bits, ...]:
        """Return where the bits of a quad's codes lie."""
        if quad < self.bytes_:
            return (Bits(quad, 0, self.bits, 0),)
        found, spare, done = [], 8 - self.bits, 0
        while done < self.bits:
            byte, used = divmod((quad - self.bytes_) * self.bits + done, spare)
            count = min(spare - used, self.bits - done)
            found.append(Bits(byte, self.bits + used, count, done))
            done += count
        return tuple(found)


@dataclass(frozen=True)
class Layout:
    """A matrix of so many columns, a multiple of 16 or, of integers, of 32, in a format.

    A panel's data are

    - of integers: bytes `[K/(4*quads)][bytes][64][4]`, as `Codes` says, of codes that the `offset` is added to. So
      `int8` and `q8_0` are `[K/4][64][4]`, and `int4`, `q4_0` and `q4_1` are `[K/8][64][4]`, columns 8j..8j+3 in the
      low halves, 8j+4..8j+7 above them;
    - `f16`: `[K][64]`; `bf16`: `[K/2][64][2]`;
    - `f12_e4m7`: `[K/8][3][64]` of 32 bits, of columns 8j+2i and 8j+2i+1 in the i-th: sign in bit 15, code in 10..0.
      8j+6 and 8j+7 are, in these bits, the exclusive or of the three shifted right by 4, by 8, and rotated right by 12;
      bits 14..11 of the three are chosen for that.

    Its scales are bf16`[groups][64]`, or f32`[64]` where there is one for a row; those of f16 and bf16 are 1, those of
    `f12_e4m7` the powers of two that the rows share. Those of `q8_0` and `q4_0` are f16`[K/32][64]`, also where that is
    one for a row; those of `q4_1` are f16`[K/32][2][64]`, the 64 scales of a group and then its 64 minima. Those in
    bytes are i8`[groups][64]`, and then f32`[64]` that those of a row are multiplied by.

    A row of activations is prepared for it

    - as f32`[K]` for f16 and bf16, or bf16`[K]` where it is `narrow`;
    - for `f12_e4m7` as a line with a power of two, f32, and then f32`[K]` divided by it and multiplied by `LIFT`, or
      bf16`[K]` where it is `narrow`;
    - for integers as lines with a scale for each block of columns, f32, lines with the sum of each block's numbers
      times minus the offset, i32, and then signed bytes `[K]`; where groups have a minimum, sums are times the scale,
      f32. Where it is `wide`, a number is 128 times its byte plus another byte, which lines of their own have.
    """

    form: str
    columns: int
    narrow: bool = False
    """Whether activations of floating-point weights are rounded to bf16."""
    wide: bool = False
    """Whether activations of integers have two bytes each: -16256..16256, so that their rounding costs nothing."""
    spread: bool = False
    """Whether codes have a byte each, as several rows read them from scratch: `[K/4][64][4]`."""

    @property
    def group(self) -> int:
        """Columns that share a scale."""
        wanted = INTEGERS[self.form].group if self.form in INTEGERS else 0
        if self.is_block:
            return wanted
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
    def is_block(self) -> bool:
        """Whether weights are in the blocks of GGUF, of 32 columns."""
        return self.form in BLOCKS

    @property
    def has_minimum(self) -> bool:
        """Whether each group has a minimum besides its scale."""
        return self.is_block and INTEGERS[self.form].minimum

    @property
    def offset(self) -> int:
        """What is added to codes, so that none is negative."""
        return -INTEGERS[self.form].lowest

    @property
    def bits(self) -> int:
        """Bits of the codes of integers."""
        return INTEGERS[self.form].bits

    @property
    def codes(self) -> Codes:
        """How the codes of integers lie."""
        return Codes(8 if self.spread else self.bits)

    @property
    def spread_bytes(self) -> int:
        """Bytes of a panel whose codes have a byte each; 0 where they have one as they are stored."""
        return 0 if self.is_real or self.bits == 8 else PANEL * self.columns

    @property
    def by_row(self) -> bool:
        """Whether a row has one scale, f32, and no others."""
        return self.groups == 1 and not self.is_block

    @property
    def has_powers(self) -> bool:
        """Whether scales of groups are bytes, times one number of their row, f32."""
        return self.groups > 1 and INTEGERS[self.form].scale == "i8"

    @property
    def block(self) -> int:
        """Columns of activations that are rounded to bytes with one scale; 0 where none are."""
        return 0 if self.is_real else rounded_together(self.bits, self.group)

    @property
    def blocks(self) -> int:
        """Scales of a row of activations; 0 where it is not rounded to bytes."""
        return 0 if self.is_real else self.columns // self.block

    @property
    def planes(self) -> int:
        """Bytes that an activation of integers is rounded to."""
        return 2 if self.wide else 1

    @property
    def most(self) -> int:
        """What the largest activation of a block is rounded to."""
        return 127 * LOW if self.wide else 127

    @property
    def plane_bytes(self) -> int:
        """Bytes from one byte of a row's activations to the other one."""
        return up_to(self.columns, LINE)

    @property
    def element(self) -> str:
        """Type of the stored data in MLIR."""
        return self.form if self.is_half else "i8"

    @property
    def scale_element(self) -> str:
        """Type of the stored scales in MLIR."""
        return "f32" if self.by_row else INTEGERS[self.form].scale

    @property
    def scales(self) -> int:
        """Stored scales and minima of a row."""
        return 2 * self.groups if self.has_minimum else self.groups

    @property
    def panel_elements(self) -> int:
        """Stored elements of one panel."""
        if self.is_half:
            return PANEL * self.columns
        return PANEL * self.columns * (12 if self.is_shared else self.codes.bits) // 8

    @property
    def panel_bytes(self) -> int:
        """Bytes of one panel's data."""
        return self.panel_elements * (2 if self.is_half else 1)

    @property
    def scale_bytes(self) -> int:
        """Bytes of one panel's scales."""
        return PANEL * self.scale_size * self.scales + (4 * PANEL if self.has_powers else 0)

    @property
    def scale_size(self) -> int:
        """Bytes of a stored scale."""
        return {"f32": 4, "i8": 1}.get(self.scale_element, 2)

    @property
    def scale_elements(self) -> int:
        """Stored elements of one panel's scales."""
        return self.scale_bytes // self.scale_size

    @property
    def row_scales(self) -> int | None:
        """Bytes of a panel's scales before those of rows, f32`[64]`; None where there are none."""
        return 0 if self.by_row else PANEL * self.scales if self.has_powers else None

    @property
    def sums_bytes(self) -> int:
        """Bytes of the sums of blocks before a prepared row's own bytes."""
        return up_to(4 * self.blocks, LINE)

    @property
    def factors_bytes(self) -> int:
        """Bytes of what a prepared row is scaled by, at its begin."""
        return LINE if self.is_shared else up_to(4 * self.blocks, LINE)

    @property
    def prepared_bytes(self) -> int:
        """Bytes of one row of activations, prepared."""
        each = 1 if not self.is_real else 2 if self.narrow else 4
        return self.header_bytes + self.planes * up_to(each * self.columns, LINE)

    @property
    def header_bytes(self) -> int:
        """Bytes of a prepared row before its values: what they are scaled by, and sums of them."""
        return self.factors_bytes + self.sums_bytes
