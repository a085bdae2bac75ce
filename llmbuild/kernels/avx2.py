"""Products of bytes in registers of 32 bytes: AVX-VNNI, and AVX2 alone.

`vpmaddubsw` adds two products of an unsigned and a signed byte and saturates at sixteen bits: 255 * 127 * 2 is too
much. So int8 weights become signed again, then their magnitude, and activations take over their signs: 128 * 127 * 2 =
32512 fits, and the sum is exact. An activation is never -128, which has no opposite; a weight may be. Codes of fewer
bits are not negative, and several such sums fit together: eight of 4 bits, two of 6.
"""

from __future__ import annotations

from llmbuild.kernels.short import Pairs, Registers
from llmbuild.kernels.text import Writer

LANES = 8
INTEGERS, BYTES, PAIRS = "vector<8xi32>", "vector<32xi8>", "vector<16xi16>"
AHEAD = 2048
"""Bytes, measured on Zen 3: its own guesses stop at pages of 4 KB and where a panel is read in pieces."""


def _dot_vnni(w: Writer, total: str, weights: str, four: str) -> str:
    return w.let(
        f'llvm.call_intrinsic "llvm.x86.avx512.vpdpbusd.256"({total}, {weights}, {four}) '
        f": ({INTEGERS}, {BYTES}, {BYTES}) -> {INTEGERS}"
    )


def _dot(w: Writer, total: str, weights: str, four: str) -> str:
    size = _call(w, "psign.b", weights, weights, BYTES, BYTES)
    turned = _call(w, "psign.b", four, weights, BYTES, BYTES)
    return _widen(w, total, _multiply(w, size, turned))


def _dot_codes(w: Writer, total: str, codes: str, four: str) -> str:
    return _widen(w, total, _multiply(w, codes, four))


def _multiply(w: Writer, unsigned: str, signed: str) -> str:
    return _call(w, "pmadd.ub.sw", unsigned, signed, BYTES, PAIRS)


def _add(w: Writer, left: str, right: str) -> str:
    """Return the sum of pairs, which fits: an addition that saturates keeps its place among others."""
    return w.let(f"llvm.intr.sadd.sat({left}, {right}) : ({PAIRS}, {PAIRS}) -> {PAIRS}")


def _widen(w: Writer, total: str, pairs: str) -> str:
    """Return the lanes of 32 bits plus two of 16 bits each."""
    return w.op("arith.addi", _call(w, "pmadd.wd", pairs, w.lanes(1, PAIRS), PAIRS, INTEGERS), total, kind=INTEGERS)


def _call(w: Writer, name: str, left: str, right: str, taken: str, result: str) -> str:
    return w.let(f'llvm.call_intrinsic "llvm.x86.avx2.{name}"({left}, {right}) : ({taken}, {taken}) -> {result}')


AVXVNNI = Registers(LANES, True, _dot_vnni, _dot_vnni)
AVX2 = Registers(LANES, False, _dot, _dot_codes, Pairs(PAIRS, _multiply, _add, _widen), AHEAD, "x")
