"""Products of bytes in registers of 32 bytes: AVX-VNNI, and AVX2 alone.

`vpmaddubsw` adds two products of an unsigned and a signed byte and saturates at sixteen bits: 255 * 127 * 2 is too
much. So int8 weights become signed again, then their magnitude, and activations take over their signs: 128 * 127 * 2 =
32512 fits, and the sum is exact. An activation is never -128, which has no opposite; a weight may be. Codes of fewer
bits are not negative, and several such sums fit together: eight of 4 bits, two of 6.
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


def _dot_codes_vnni(w: Writer, total: str, codes: list[str], fours: list[str], _: int) -> str:
    for both in zip(codes, fours, strict=True):
        total = _dot_vnni(w, total, *both)
    return total


def _dot(w: Writer, total: str, weights: str, four: str) -> str:
    size = _call(w, "psign.b", weights, weights, BYTES, BYTES)
    turned = _call(w, "psign.b", four, weights, BYTES, BYTES)
    return _added(w, total, _call(w, "pmadd.ub.sw", size, turned, BYTES, PAIRS))


def _dot_codes(w: Writer, total: str, codes: list[str], fours: list[str], bits: int) -> str:
    most = 32767 // (2 * 127 * ((1 << bits) - 1))  # sums of two products that sixteen bits hold together
    for first in range(0, len(codes), most):
        some = slice(first, first + most)
        pairs = [_call(w, "pmadd.ub.sw", *both, BYTES, PAIRS) for both in zip(codes[some], fours[some], strict=True)]
        found = pairs[0]
        for pair in pairs[1:]:
            found = w.op("arith.addi", found, pair, kind=PAIRS)
        total = _added(w, total, found)
    return total


def _added(w: Writer, total: str, pairs: str) -> str:
    """Return the lanes of 32 bits plus two of 16 bits each."""
    return w.op("arith.addi", _call(w, "pmadd.wd", pairs, w.lanes(1, PAIRS), PAIRS, INTEGERS), total, kind=INTEGERS)


def _call(w: Writer, name: str, left: str, right: str, taken: str, result: str) -> str:
    return w.let(f'llvm.call_intrinsic "llvm.x86.avx2.{name}"({left}, {right}) : ({taken}, {taken}) -> {result}')


AVXVNNI = Registers(LANES, True, _dot_vnni, _dot_codes_vnni)
AVX2 = Registers(LANES, False, _dot, _dot_codes)
