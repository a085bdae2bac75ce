"""Phases of work inside one dispatch, shared by its work-groups, without assuming that work-groups run at the same
time.

Each phase is a number of units. Every work-group has a segment of them, one contiguous stream of memory; units are
claimed one by one with an atomic counter, from the own segment first, then from the others'. Who finds nothing left
to claim waits until all units of the phase are done: only for units that a running work-group holds. So one work-
group alone finishes all. Who waits asks the memory for the head of what it reads next: the bus is idle otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from llmbuild.kernels.text import I32, I64, PTR, Writer

LINE = 64
"""Bytes from one counter to the next: two on one cache line would be one lock."""

AHEAD_BYTES = 128 * 1024
"""How much is asked for ahead at most; it must stay in a core's own cache until it is used."""
AHEAD_STEP = 4
"""Cache lines asked for between two looks at the counter."""


@dataclass(frozen=True)
class Ahead:
    """What a coming phase reads: `units` of `unit_bytes` each, one after the other from `pointer` on."""

    pointer: str
    units: int
    unit_bytes: int | str


def counter_bytes(phases: int, workers: int) -> int:
    """Return the size of the zeroed counters that `phases` phases need."""
    return phases * (workers + 1) * LINE


class Phases:
    """Writes phases, one after the other, into a function."""

    def __init__(self, writer: Writer, counters: str, worker: str, workers: int, pause: str) -> None:
        """Take a pointer to zeroed counters, the work-group's number (i64), how many there are, and the operation that
        waits a moment.
        """
        self._w = writer
        self._counters = counters
        self._worker = worker
        self._workers = workers
        self._pause = pause
        self._phase = 0

    def run(self, units: int | str, unit: Callable[[str], None], ahead: Ahead | None = None) -> None:
        """Write one phase: `unit(i)` writes the work of unit i (i64). Nothing after it starts before all units are
        done; who waits for that reads `ahead`.
        """
        w = self._w
        base = w.at(self._counters, self._phase * (self._workers + 1) * LINE)
        self._phase += 1

        def segment(turn: str, done: str) -> list[str]:
            which = w.integers("remui", w.add(self._worker, turn), self._workers)
            first = w.integers("divui", w.mul(units, which), self._workers)
            stop = w.integers("divui", w.mul(units, w.add(which, 1)), self._workers)
            counter = w.at(base, w.mul(w.add(which, 1), LINE))
            return [self._drain(counter, first, stop, done, unit)]

        zero = w.constant("0", I32)
        (mine,) = w.loop(0, self._workers, 1, segment, [(zero, I32)])
        w.let(f"llvm.atomicrmw add {base}, {mine} acq_rel : {PTR}, {I32}")
        self._wait(base, units, ahead)

    def _drain(self, counter: str, first: str, stop: str, done: str, unit: Callable[[str], None]) -> str:
        w = self._w
        result, before, count, claimed = w.name(), w.name(), w.name(), w.name()
        one = w.constant("1", I32)
        w.line(f"{result}:2 = scf.while ({before} = {done}) : ({I32}) -> ({I32}, {I64}) {{")
        taken = w.let(f"llvm.atomicrmw add {counter}, {one} monotonic : {PTR}, {I32}")
        index = w.add(first, w.cast("arith.extui", taken, I32, I64))
        w.line(f"scf.condition({w.below(index, stop)}) {before}, {index} : {I32}, {I64}")
        w.line(f"}} do {{\n^bb0({count}: {I32}, {claimed}: {I64}):")
        unit(claimed)
        w.line(f"scf.yield {w.let(f'arith.addi {count}, {one} : {I32}')} : {I32}")
        w.line("}")
        return f"{result}#0"

    def _wait(self, base: str, units: int | str, ahead: Ahead | None) -> None:
        w = self._w
        goal = w.cast("arith.trunci", w.integer(units), I64, I32)
        source, stop = self._segment(ahead) if ahead else (base, w.integer(0))
        before, offset = w.name(), w.name()
        w.line(f"{w.name()} = scf.while ({before} = {w.integer(0)}) : ({I64}) -> {I64} {{")
        seen = w.let(f'"llvm.load"({base}) <{{alignment = 4 : i64, ordering = 4 : i64}}> : ({PTR}) -> {I32}')
        w.line(f"scf.condition({w.let(f'arith.cmpi slt, {seen}, {goal} : {I32}')}) {before} : {I64}")
        w.line(f"}} do {{\n^bb0({offset}: {I64}):")
        if ahead:
            with w.when(w.below(offset, stop)):
                for line in range(AHEAD_STEP):
                    w.prefetch(w.at(source, offset, line * LINE))
        w.line(self._pause)
        w.line(f"scf.yield {w.add(offset, AHEAD_STEP * LINE)} : {I64}\n}}")

    def _segment(self, ahead: Ahead) -> tuple[str, str]:
        """Return where this work-group's part of what comes begins, and how many bytes of it to ask for."""
        w = self._w
        first, last = (
            w.integers("divui", w.mul(ahead.units, number), self._workers)
            for number in (self._worker, w.add(self._worker, 1))
        )
        size = w.mul(w.integers("subi", last, first), ahead.unit_bytes)
        return w.at(ahead.pointer, w.mul(first, ahead.unit_bytes)), w.integers("minsi", size, AHEAD_BYTES)
