"""Matrix-vector products on GPUs: y f32[N] = W[N,K] x f32[K] over row-major weights, every one of them read once.

Lanes of a subgroup stand side by side along a row and read neighbouring pieces of it, up to sixteen bytes each at a
time; several rows at a time, so that reads are in flight while others are summed. Weights become f32 in registers and
are summed in f32. The kernels are plain `gpu`, `scf`, `arith` and `memref` operations: one text for CUDA, ROCm, Vulkan
and Metal. Which matrix is shared out how is `plan`'s answer; `kernel` writes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import gcd, prod
from typing import NamedTuple

from llmbuild.kernels.text import F32, I32, Writer
from llmbuild.spec.formats import BLOCKS, INTEGERS, SHARED, WEIGHT_FORMATS, fit_group

FORMATS = tuple(form for form in WEIGHT_FORMATS if form not in ("f32", *BLOCKS))
"""Formats that these kernels read; f12_e4m7 lies as bf16 in row-major matrices, codes of 7 bits lie as bytes."""

ROW_TILES = ("4x4", "1x4", "2x4", "8x4", "4x2", "4x8")
"""Rows that a lane sums at a time, and subgroups of a work-group; the first is the default."""

WIDE = "wide"
ROW_READS = ("narrow", WIDE)
"""How much of a row lanes read at a time; the first is the default."""

READS = (16, 8, 4)
"""Bytes that a lane may read of a row at a time."""

COALESCED = 128
"""Bytes of a row that lanes had best read side by side: a line of a GPU's cache."""

LEAST_COALESCED = 32
"""Below this, a read from memory brings bytes that nobody asked for: the compiler's own code is no worse."""

LEAST_SUBGROUPS = 1024
"""Subgroups that a product should have at least: two for each scheduler of a large GPU. Small matrices take fewer rows
at a time to get there."""

MOST_WORK_GROUPS = 65535
"""What Vulkan promises."""

IN_FLIGHT = 64
"""Bytes of weights that a lane should have asked for before it sums."""

NEAR_PIECES = 2
"""Pieces of sixteen bytes of x for each read of weights up to which lanes read them where they are."""

BITS = {"f16": 16, "bf16": 16, "i8": 8, "i4": 4}


@dataclass(frozen=True)
class Stored:
    """A row-major matrix `[N, K]` of elements f16, bf16, i8 or i4 (two in a byte, the low half first).

    `group` columns of a row share a bf16 scale, and a code for zero (i8) where there are `zeros`; without groups,
    integers have an f32 scale for each row.
    """

    rows: int
    columns: int
    element: str
    group: int = 0
    zeros: bool = False

    @property
    def is_integer(self) -> bool:
        """Whether elements are codes that scales belong to."""
        return self.element in ("i8", "i4")

    @property
    def groups(self) -> int:
        """Scales of a row."""
        return self.columns // self.group if self.group else 1

    @property
    def row_bits(self) -> int:
        """Size of a row."""
        return self.columns * BITS[self.element]


def stored_as(rows: int, columns: int, form: str) -> Stored | None:
    """Return how a matrix lies in a format; nothing for one that these kernels do not read."""
    if form not in FORMATS:
        return None
    if form not in INTEGERS:
        return Stored(rows, columns, "bf16" if form == SHARED else form)
    of = INTEGERS[form]
    group = fit_group(columns, of.group) if of.group else columns
    grouped = group < columns or not of.symmetric
    return Stored(rows, columns, "i4" if of.bits == 4 else "i8", group if grouped else 0, not of.symmetric)


@dataclass(frozen=True)
class Work:
    """How a GPU's lanes are put to work: lanes of a `subgroup`, `rows` that each of them sums at a time, and
    subgroups of a work-group.

    Reads of weights are `wide` as far as rows allow, or as short as lets lanes read x where it is.
    """

    subgroup: int
    rows: int
    groups: int
    wide: bool = False


def work(subgroup: int, tile: str, reads: str) -> Work:
    """Return what a tile like `4x2`, rows by subgroups, and one of `ROW_READS` say."""
    rows, groups = map(int, tile.split("x"))
    return Work(subgroup, rows, groups, reads == WIDE)


@dataclass(frozen=True)
class Plan:
    """A product and how it is shared out: `lanes` side by side along a row read `read` bytes each at a time."""

    stored: Stored
    work: Work
    lanes: int
    read: int

    @property
    def each(self) -> int:
        """Columns that a lane reads at a time."""
        return self.read * 8 // BITS[self.stored.element]

    @property
    def steps(self) -> int:
        """Reads of each lane along a row."""
        return self.stored.columns // (self.lanes * self.each)

    @property
    def beside(self) -> int:
        """Rows that a subgroup has side by side."""
        return self.work.subgroup // self.lanes

    @property
    def tile(self) -> int:
        """Rows of a work-group."""
        return self.work.groups * self.beside * self.work.rows

    @property
    def work_groups(self) -> int:
        """Number of work-groups."""
        return -(-self.stored.rows // self.tile)

    @property
    def ahead(self) -> int:
        """Steps whose weights are asked for together."""
        return max(1, min(self.steps, IN_FLIGHT // (self.work.rows * self.read)))

    @property
    def arranged(self) -> bool:
        """Whether neighbouring lanes read neighbouring sixteen bytes of x, too.

        Then x is `[steps, each/4, lanes, 4]`, which is a dispatch of its own where nothing that computes x can write it
        so. Otherwise it is `[steps, lanes, each/4, 4]`, as it was: cheap enough where it is read in few pieces.
        """
        return self.each // 4 > NEAR_PIECES

    @property
    def x_shape(self) -> tuple[int, int, int, int]:
        """Shape of x as the kernel reads it."""
        pieces = self.each // 4
        return (self.steps, pieces, self.lanes, 4) if self.arranged else (self.steps, self.lanes, pieces, 4)


def plan(stored: Stored, work: Work) -> Plan | None:
    """Return how a product is shared out; nothing where rows are too short or odd to be read side by side."""
    choices = []
    for read in READS:
        each = read * 8 // BITS[stored.element]
        if stored.row_bits % (8 * read) or each % 4 or (each // 4 > NEAR_PIECES and not work.wide):
            continue
        lanes = gcd(stored.row_bits // (8 * read), work.subgroup)  # the largest power of two that divides both
        choices.append((min(lanes * read, COALESCED), read, lanes))
    side_by_side, read, lanes = max(choices, default=(0, 0, 0))
    if side_by_side < LEAST_COALESCED:
        return None
    return Plan(stored, replace(work, rows=_rows(stored, work, lanes)), lanes, read)


def _rows(stored: Stored, work: Work, lanes: int) -> int:
    """Return the rows at a time with which the product has neither too few subgroups nor too many work-groups."""
    rows, beside = work.rows, work.subgroup // lanes
    while rows > 1 and stored.rows < LEAST_SUBGROUPS * beside * rows:
        rows //= 2
    while stored.rows > MOST_WORK_GROUPS * work.groups * beside * rows:
        rows *= 2
    return rows


def kernel(name: str, plan: Plan) -> str:
    """Return the executable and `util.func @name(x, weights, scales, zeros) -> y [N]`; x has `Plan.x_shape`.

    Scales and zeros are taken where the matrix has them.
    """
    stored, work = plan.stored, plan.work
    n, k, x = stored.rows, stored.columns, "x".join(map(str, plan.x_shape))
    data = f"{n}x{k // 2}xi8" if stored.element == "i4" else f"{n}x{k}x{stored.element}"
    shapes = [f"{x}xf32", data]
    if stored.is_integer:
        shapes.append(f"{n}x{stored.groups}xbf16" if stored.group else f"{n}xf32")
    if stored.zeros:
        shapes.append(f"{n}x{stored.groups}xi8")
    taken = [f"tensor<{shape}>" for shape in shapes]
    names = [f"%a{i}" for i in range(len(taken))]
    arguments = ", ".join(f"{name}: {kind}" for name, kind in zip(names, taken, strict=True))
    bindings = ", ".join(f"%b{i}: !stream.binding" for i in range(len(taken) + 1))
    threads = work.subgroup * work.groups
    return f"""stream.executable private @{name}_ex {{
stream.executable.export public @{name} workgroups() -> (index, index, index) {{
%x = arith.constant {plan.work_groups} : index
%one = arith.constant 1 : index
stream.return %x, %one, %one : index, index, index
}}
builtin.module {{
func.func @{name}({bindings}) attributes {{translation_info = #iree_codegen.translation_info<
    pipeline = #iree_codegen.no_pipeline workgroup_size = [{threads}, 1, 1] subgroup_size = {work.subgroup}>}} {{
{_Body(plan).text()}
return
}}
}}
}}
util.func private @{name}({arguments}) -> tensor<{n}xf32> {{
%y = flow.dispatch @{name}_ex::@{name}({", ".join(names)}) : ({", ".join(taken)}) -> tensor<{n}xf32>
util.return %y : tensor<{n}xf32>
}}"""


INDEX = "index"
BIAS = {"i8": 0x80, "i4": 0x8}
"""What makes a code in two's complement a number that is not negative: its highest bit, flipped."""

MAGIC = 0x4B000000
"""2^23 in f32: an integer below 2^23 in its lowest bits adds itself."""


class Memory(NamedTuple):
    """What a binding holds: a flat memory of rows of so many `columns`."""

    name: str
    kind: str
    columns: int


class _Body:
    """Writes the function of one product. Rows are clamped to the last one when read, and dropped when written."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.stored, self.w = plan, plan.stored, Writer()
        self.bindings = 0
        self.start = self.w.let(f"util.optimization_barrier {self._index(0)} : index")
        stored, w = plan.stored, self.w
        self.x = self._bind("vector<4xf32>", plan.steps * plan.each // 4 * plan.lanes)
        words = plan.read // 4
        self.words = I32 if words == 1 else f"vector<{words}xi32>"
        self.data = self._bind(self.words, stored.rows, plan.steps * plan.lanes)
        if stored.is_integer:
            self.scale = self._bind("i16", stored.rows, stored.groups) if stored.group else self._bind(F32, stored.rows)
        if stored.zeros:
            self.zero = self._bind("i8", stored.rows, stored.groups)
        self.y = self._bind(F32, stored.rows)
        thread, lanes = w.let("gpu.thread_id x"), self._index(plan.lanes)
        self.lane = w.let(f"arith.remui {thread}, {lanes} : index")
        team = w.let(f"arith.divui {thread}, {lanes} : index")
        group = w.let("stream.dispatch.workgroup.id[0] : index")
        subgroup, beside = (
            w.let(f"arith.{op} {team}, {self._index(plan.beside)} : index") for op in ("divui", "remui")
        )
        first = self._sum(
            self._product(group, plan.tile), self._product(subgroup, plan.work.rows * plan.beside), beside
        )
        self.rows = [self._sum(first, self._index(r * plan.beside)) for r in range(plan.work.rows)]
        last = self._index(stored.rows - 1)
        self.ragged = stored.rows % plan.tile != 0
        self.read_rows = [w.let(f"arith.minui {r}, {last} : index") for r in self.rows] if self.ragged else self.rows

    def text(self) -> str:
        """Return the body."""
        plan, w = self.plan, self.w
        sums = [w.real(0.0)] * plan.work.rows
        whole = plan.steps // plan.ahead * plan.ahead
        if whole > plan.ahead:
            sums = self._loop(whole, sums)
        elif whole:
            sums = self._block(self._index(0), plan.ahead, sums)
        if whole < plan.steps:
            sums = self._block(self._index(whole), plan.steps - whole, sums)
        self._store(self._across(sums))
        return w.text()

    # --- words ---------------------------------------------------------------------------------------------------

    def _bind(self, element: str, *sizes: int) -> Memory:
        """Return the memory of the next binding, flat."""
        kind, number = f"memref<{prod(sizes)}x{element}, strided<[1], offset: ?>>", self.bindings
        self.bindings += 1
        name = self.w.let(f"stream.binding.subspan %b{number}[{self.start}] : !stream.binding -> {kind}")
        return Memory(name, kind, sizes[-1])

    def _load(self, memory: Memory, *place: str) -> str:
        """Return an element by its row, if there are rows, and its place in it."""
        at = place[-1] if len(place) == 1 else self._sum(self._product(place[0], memory.columns), place[1])
        return self.w.let(f"memref.load {memory.name}[{at}] : {memory.kind}")

    def _index(self, value: int) -> str:
        return self.w.constant(str(value), INDEX)

    def _sum(self, *terms: str) -> str:
        total = terms[0]
        for term in terms[1:]:
            total = self.w.let(f"arith.addi {total}, {term} : index")
        return total

    def _product(self, value: str, factor: int) -> str:
        return self.w.let(f"arith.muli {value}, {self._index(factor)} : index")

    def _word(self, operation: str, value: str, constant: int) -> str:
        signed = constant - (1 << 32) if constant >> 31 else constant
        return self.w.let(f"arith.{operation} {value}, {self.w.constant(str(signed), I32)} : i32")

    def _real(self, word: str) -> str:
        return self.w.cast("arith.bitcast", word, I32, F32)

    def _fma(self, a: str, b: str, c: str) -> str:
        return self.w.op("math.fma", a, b, c, kind=F32)

    # --- sums ----------------------------------------------------------------------------------------------------

    def _loop(self, steps: int, sums: Sequence[str]) -> list[str]:
        w, step, result = self.w, self.w.name(), self.w.name()
        inner = [w.name() for _ in sums]
        carried = ", ".join(f"{name} = {first}" for name, first in zip(inner, sums, strict=True))
        kinds = ", ".join([F32] * len(sums))
        bounds = f"{self._index(0)} to {self._index(steps)} step {self._index(self.plan.ahead)}"
        w.line(f"{result}:{len(sums)} = scf.for {step} = {bounds} iter_args({carried}) -> ({kinds}) {{")
        w.line(f"scf.yield {', '.join(self._block(step, self.plan.ahead, inner))} : {kinds}")
        w.line("}")
        return [f"{result}#{i}" for i in range(len(sums))]

    def _block(self, first: str, count: int, sums: Sequence[str]) -> list[str]:
        """Add some steps to the sums of all rows; what they need of the weights is asked for before anything is
        summed.
        """
        steps = [self._sum(first, self._index(u)) if u else first for u in range(count)]
        chunks = [self._sum(self._product(step, self.plan.lanes), self.lane) for step in steps]
        weights = [[self._load(self.data, row, chunk) for row in self.read_rows] for chunk in chunks]
        for step, chunk, of_rows in zip(steps, chunks, weights, strict=True):
            x = self._activations(step)
            sums = [
                self._add(total, words, x, row, chunk)
                for total, words, row in zip(sums, of_rows, self.read_rows, strict=True)
            ]
        return list(sums)

    def _activations(self, step: str) -> list[str]:
        """Return what the lane's columns are multiplied by in a step."""
        plan, pieces = self.plan, self.plan.each // 4
        if plan.arranged:
            first, apart = self._sum(self._product(step, pieces * plan.lanes), self.lane), plan.lanes
        else:
            first, apart = self._product(self._sum(self._product(step, plan.lanes), self.lane), pieces), 1
        x = []
        for piece in range(pieces):
            place = self._sum(first, self._index(piece * apart)) if piece else first
            four = self._load(self.x, place)
            x += [self.w.let(f"vector.extract {four}[{i}] : f32 from vector<4xf32>") for i in range(4)]
        return x

    def _add(self, total: str, words: str, x: Sequence[str], row: str, chunk: str) -> str:
        """Return the sum of a row and of what a lane has read of it."""
        each, group = self.plan.each, self.stored.group
        if not group:
            return self._dot(total, words, x, 0, each, None)
        run = min(each, group)  # one divides the other
        for first in range(0, each, run):
            place = self._group(chunk, first)
            zero = self._zero(row, place) if self.stored.zeros else None
            part = self._dot(self.w.real(0.0), words, x, first, run, zero)
            total = self._fma(part, self._half(self._load(self.scale, row, place)), total)
        return total

    def _group(self, chunk: str, first: int) -> str:
        """Return the group of a column of the lane's."""
        each, group = self.plan.each, self.stored.group
        if group >= each:
            return self.w.let(f"arith.divui {chunk}, {self._index(group // each)} : index")
        return self._sum(self._product(chunk, each // group), self._index(first // group))

    def _half(self, stored: str) -> str:
        """Return a bf16, read as i16, in f32."""
        return self._real(self._word("shli", self.w.cast("arith.extui", stored, "i16", I32), 16))

    def _zero(self, row: str, group: str) -> str:
        code = self.w.cast("arith.extsi", self._load(self.zero, row, group), "i8", I32)
        return self.w.cast("arith.sitofp", code, I32, F32)

    def _dot(self, total: str, words: str, x: Sequence[str], first: int, count: int, zero: str | None) -> str:
        """Return the sum and the products of `count` of the lane's columns; codes lose `zero` before."""
        per = 32 // BITS[self.stored.element]
        for number in range(first // per, -(-(first + count) // per)):
            word = words
            if self.words != I32:
                word = self.w.let(f"vector.extract {words}[{number}] : i32 from {self.words}")
            for i, value in enumerate(self._values(word, zero)):
                total = self._fma(value, x[number * per + i], total)
        return total

    def _values(self, word: str, zero: str | None) -> list[str]:
        """Return the weights in a word, in f32."""
        w, element = self.w, self.stored.element
        if element == "f16":
            one = w.let(f"vector.broadcast {word} : i32 to vector<1xi32>")
            two = w.cast("vector.bitcast", one, "vector<1xi32>", "vector<2xf16>")
            halves = [w.let(f"vector.extract {two}[{i}] : f16 from vector<2xf16>") for i in range(2)]
            return [w.cast("arith.extf", half, "f16", F32) for half in halves]
        if element == "bf16":
            return [self._real(self._word("shli", word, 16)), self._real(self._word("andi", word, 0xFFFF0000))]
        return self._codes(word, zero)

    def _codes(self, word: str, zero: str | None) -> list[str]:
        """Return the integers in a word less `zero`, in f32, without conversions, which GPUs are slow at.

        With its highest bit flipped a code is not negative; where it stands, it becomes the low end of an f32 of 2^23
        or more, and what it is too much goes in one exact step. Only the lower half of a word is below 2^23.
        """
        bits = BITS[self.stored.element]
        bias, mask = BIAS[self.stored.element], (1 << bits) - 1
        flipped = self._word("xori", word, sum(bias << place for place in range(0, 32, bits)))
        values = []
        for half in (flipped, self._word("shrui", flipped, 16)):
            for place in range(0, 16, bits):
                raw = self._real(self._word("ori", self._word("andi", half, mask << place), MAGIC))
                surplus = self.w.real(-(2.0 ** (23 - place) + bias))
                if zero is not None:
                    surplus = self.w.op("arith.subf", surplus, zero, kind=F32)
                factor = self.w.real(2.0**-place)
                values.append(self._fma(raw, factor, surplus))
        return values

    # --- results -------------------------------------------------------------------------------------------------

    def _across(self, sums: Sequence[str]) -> list[str]:
        """Return the sums of all lanes of a row, in every one of them."""
        w, width, distance = self.w, self.w.constant(str(self.plan.work.subgroup), I32), 1
        totals = list(sums)
        while distance < self.plan.lanes:
            far = w.constant(str(distance), I32)
            for i, total in enumerate(totals):
                other, valid = w.name(), w.name()
                w.line(f"{other}, {valid} = gpu.shuffle xor {total}, {far}, {width} : f32")
                totals[i] = w.op("arith.addf", total, other, kind=F32)
            distance *= 2
        return totals

    def _store(self, totals: Sequence[str]) -> None:
        w = self.w
        with w.when(w.let(f"arith.cmpi eq, {self.lane}, {self._index(0)} : index")):
            for row, total in zip(self.rows, totals, strict=True):
                if not self.ragged:
                    self._write(row, total)
                    continue
                with w.when(w.let(f"arith.cmpi ult, {row}, {self._index(self.stored.rows)} : index")):
                    self._write(row, total)

    def _write(self, row: str, total: str) -> None:
        if self.stored.is_integer and not self.stored.group:
            total = self.w.op("arith.mulf", total, self._load(self.scale, row), kind=F32)
        self.w.line(f"memref.store {total}, {self.y.name}[{row}] : {self.y.kind}")
