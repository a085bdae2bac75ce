"""Kernels that do nothing but reach a limit of the machine: arithmetic without memory, and reads without arithmetic.

A module of them is compiled for a target like any other; each function is cut into as many pieces as workers share it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from llmbuild.kernels.layer import bind, executable, worker
from llmbuild.kernels.layouts import LINE
from llmbuild.kernels.text import BYTES, VF, VI, Writer

READ, F32, INT8 = "read", "multiply_f32", "multiply_int8"
"""Functions `NAME_N(data i8[read_bytes], wait fence, signal fence) -> i8[64 * N]` in N pieces; READ reads all of
`data`, the others two lines.
"""

LANES = 16
STEPS = 1 << 20
"""Rounds of the arithmetic loops: some milliseconds, so that calling costs nothing."""

_INT8_INTRINSICS = {"avx512vnni": "llvm.x86.avx512.vpdpbusd.512"}
"""Instructions that add four products of bytes to each 32-bit lane, by the CPU feature that brings them."""


def has_int8(features: frozenset[str]) -> bool:
    """Say whether there is an int8 kernel for a host with these features (LLVM's names)."""
    return bool(features & _INT8_INTRINSICS.keys())


def accumulators(features: frozenset[str]) -> int:
    """Return how many sums run side by side: enough to hide the latency of a multiply-add, few enough for registers."""
    return 12 if "avx512f" in features else 6


def operations(features: frozenset[str], workers: int) -> dict[str, int]:
    """Return how many multiplications and additions one call of each arithmetic function does."""
    calls = STEPS * accumulators(features) * workers
    return {F32: 2 * LANES * calls, **({INT8: 2 * 4 * LANES * calls} if has_int8(features) else {})}


def function(limit: str, workers: int) -> str:
    """Return the name of the function that reaches a limit with so many workers."""
    return f"{limit}_{workers}"


def module(features: frozenset[str], workers: Sequence[int], read_bytes: int) -> str:
    """Return MLIR with a function for each number of workers and each limit that a host with these features has.

    `read_bytes` must be a multiple of 512 for each worker.
    """
    bodies: dict[str, Callable[[Writer, dict[str, str], str, int], str]] = {
        READ: lambda w, p, me, n: _read(w, p["data"], me, read_bytes // n),
        F32: lambda w, p, _, __: _multiply_f32(w, p["data"], accumulators(features)),
    }
    if has_int8(features):
        bodies[INT8] = lambda w, p, _, __: _multiply_int8(w, p["data"], accumulators(features))
    return "\n".join(_function(limit, body, n, read_bytes) for limit, body in bodies.items() for n in workers)


def _function(limit: str, body: Callable[[Writer, dict[str, str], str, int], str], workers: int, size: int) -> str:
    name, w = function(limit, workers), Writer()
    p = bind(w, ["data", "out"], {"data": size, "out": LINE * workers})
    me = worker(w)
    w.store(body(w, p, me, workers), w.at(p["out"], w.mul(me, LINE)), VI)
    data, out = f"tensor<{size}xi8>", f"tensor<{LINE * workers}xi8>"
    return f"""{executable(name, ["data", "out"], w, workers)}
util.func public @{name}(%data: {data}) -> {out} attributes {{iree.abi.model = "coarse-fences"}} {{
%one = arith.constant 1 : index
%out = flow.dispatch @{name}_ex::@{name}(%data, %one) : ({data}, index) -> {out}
util.return %out : {out}
}}"""


def _read(w: Writer, data: str, me: str, size: int) -> str:
    """Join eight lines at a time with exclusive or: one instruction a load, and none waits for another."""
    start = w.at(data, w.mul(me, size))

    def body(offset: str, *sums: str) -> list[str]:
        line = w.at(start, offset)
        return [w.op("arith.xori", s, w.load(w.at(line, i * LINE), VI), kind=VI) for i, s in enumerate(sums)]

    return _joined(w, w.loop(0, size, 8 * LINE, body, [(w.lanes(0, VI), VI)] * 8))


def _multiply_f32(w: Writer, data: str, count: int) -> str:
    left, right = w.load(data, VF), w.load(w.at(data, LINE), VF)
    sums = w.loop(
        0, STEPS, 1, lambda _, *s: [w.op("math.fma", left, right, x) for x in s], [(w.lanes(0.0), VF)] * count
    )
    return _joined(w, [w.cast("vector.bitcast", s, VF, VI) for s in sums])


def _multiply_int8(w: Writer, data: str, count: int) -> str:
    left, right = w.load(data, BYTES), w.load(w.at(data, LINE), BYTES)
    name = _INT8_INTRINSICS["avx512vnni"]

    def dot(total: str) -> str:
        return w.let(f'llvm.call_intrinsic "{name}"({total}, {left}, {right}) : ({VI}, {BYTES}, {BYTES}) -> {VI}')

    sums = w.loop(0, STEPS, 1, lambda _, *s: [dot(x) for x in s], [(w.lanes(0, VI), VI)] * count)
    return _joined(w, sums)


def _joined(w: Writer, values: list[str]) -> str:
    """Use every value, so that none is dropped as dead."""
    first, *rest = values
    for value in rest:
        first = w.op("arith.xori", first, value, kind=VI)
    return first
