"""Products of bytes in registers of 32 bytes: AVX-VNNI, and AVX2 alone.

`vpmaddubsw` adds two products of an unsigned and a signed byte and saturates at sixteen bits: 255 * 127 * 2 is too
much. So int8 weights become signed again, then their magnitude, and activations take over their signs: 128 * 127 * 2 =
32512 fits, and the sum is exact. An activation is never -128, which has no opposite; a weight may be. Codes of int4 are
0..15, so that two such sums fit together; those of int7 are 0..127, of which one fits.
"""

from __future__ import annotations

from llmbuild.kernels.short import Registers
from llmbuild.kernels.text import Writer

LANES = 8
INTEGERS, BYTES, PAIRS = "vector<8xi32>", "vector<32xi8>", "vector<16xi16>"


def _dot_vnni(w: Writer, total: str, weights: str, four: str) -> str:
    return w.let(
        f'llvm.call_intrinsic "llvm.x86.avx512.vpdpbusd.256"({total}, {weights}, {four}) '
        f": ({INTEGERS}, {BYTES}, {BYTES}) -> {INTEGERS}"
    )


def _dot_codes_vnni(w: Writer, total: str, codes: list[str], fours: list[str]) -> str:
    for both in zip(codes, fours, strict=True):
        total = _dot_vnni(w, total, *both)
    return total


def _dot(w: Writer, total: str, weights: str, four: str) -> str:
    size = _call(w, "psign.b", weights, weights, BYTES, BYTES)
    turned = _call(w, "psign.b", four, weights, BYTES, BYTES)
    return _added(w, total, _call(w, "pmadd.ub.sw", size, turned, BYTES, PAIRS))


def _dot_code(w: Writer, total: str, codes: str, four: str) -> str:
    return _added(w, total, _call(w, "pmadd.ub.sw", codes, four, BYTES, PAIRS))


def _dot_codes(w: Writer, total: str, codes: list[str], fours: list[str]) -> str:
    low, high = (_call(w, "pmadd.ub.sw", *both, BYTES, PAIRS) for both in zip(codes, fours, strict=True))
    return _added(w, total, w.op("arith.addi", low, high, kind=PAIRS))


def _added(w: Writer, total: str, pairs: str) -> str:
    """Return the lanes of 32 bits plus two of 16 bits each."""
    return w.op("arith.addi", _call(w, "pmadd.wd", pairs, w.lanes(1, PAIRS), PAIRS, INTEGERS), total, kind=INTEGERS)


def _call(w: Writer, name: str, left: str, right: str, taken: str, result: str) -> str:
    return w.let(f'llvm.call_intrinsic "llvm.x86.avx2.{name}"({left}, {right}) : ({taken}, {taken}) -> {result}')


AVXVNNI = Registers(LANES, True, _dot_vnni, _dot_codes_vnni, _dot_vnni)
AVX2 = Registers(LANES, False, _dot, _dot_codes, _dot_code)
