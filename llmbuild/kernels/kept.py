"""How the keys or values of one head at one position lie in a cache: as numbers, or as integers with scales.

A head of integers is turned first, by a Hadamard transform of as many numbers as the largest power of two that divides
it: numbers that are much larger than the others are spread over all of them. Each half of a head then has a scale in
bf16; both lie behind the codes. Scales belong to one head at one position: what was written before never changes.
`int8` has `max|x| / 127`, rounded, as its scale and `round(x / scale)` as codes. Of `int4` the number that is farthest
from 0 has the lowest code, -8, which has no opposite: the scale may be negative. A byte has two codes, in its lower
four bits one of the head's first half.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

CACHES = ("f32", "f16", "int8", "k8v4", "int4")
"""What our kernels for CPUs keep keys and values as; `k8v4` is keys as int8 and values as int4."""
SCALES_BYTES = 4
"""Two scales, which are read as one word: that of the first half in its lower 16 bits."""
_BITS = {"f32": 32, "f16": 16, "int8": 8, "int4": 4}


@dataclass(frozen=True)
class Kept:
    """Keys or values of one head at one position: `size` numbers as f32, f16, int8 or int4."""

    kind: str
    size: int

    @property
    def bits(self) -> int:
        """Bits of a number, without scales."""
        return _BITS[self.kind]

    @property
    def is_integer(self) -> bool:
        """Whether numbers are codes with scales."""
        return self.bits < 16

    @property
    def most(self) -> int:
        """The largest magnitude of a code."""
        return 127 if self.bits == 8 else 8

    @property
    def code_bytes(self) -> int:
        """Bytes of the numbers or codes; scales behind them are aligned."""
        size = self.size * self.bits // 8
        return -(-size // SCALES_BYTES) * SCALES_BYTES if self.is_integer else size

    @property
    def bytes(self) -> int:
        """Bytes of all."""
        return self.code_bytes + SCALES_BYTES * self.is_integer

    @property
    def element(self) -> str:
        """Type of the elements of a buffer, as MLIR names it."""
        return "i8" if self.is_integer else self.kind

    @property
    def dtype(self) -> str:
        """Type of the elements of a buffer, as NumPy names it."""
        return {"f32": "float32", "f16": "float16"}.get(self.kind, "int8")

    @property
    def elements(self) -> int:
        """Elements of a buffer for each head and position."""
        return self.bytes if self.is_integer else self.size

    @property
    def turned(self) -> int:
        """Numbers that are turned together, a power of two; 1 where none are."""
        return self.size & -self.size if self.is_integer else 1

    def lanes(self, most: int) -> int:
        """Return how many numbers are taken at a time: as many as `most`, or the most that divide what is alike."""
        return gcd(most, self.size // 2 if self.is_integer else self.size)


def keys_and_values(cache: str, size: int) -> tuple[Kept, Kept]:
    """Return how keys and how values of heads of a size lie in a cache, one of `CACHES`: numbers, or both integers."""
    kinds = ("int8", "int4") if cache == "k8v4" else (cache, cache)
    return Kept(kinds[0], size), Kept(kinds[1], size)
