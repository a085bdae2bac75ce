"""Attention of one head to its cache, and how results of parts of the positions become one.

Written for the length of registers: it holds many sums at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import gcd

from llmbuild.kernels import elementwise as k
from llmbuild.kernels.cache import Cache
from llmbuild.kernels.instructions import Instructions
from llmbuild.kernels.layouts import LINE, up_to
from llmbuild.kernels.text import F32, I32, I64, Writer

MASKED = -1e30
MIX_STEP = 4
"""Positions per turn of the weighted sum of values, at most."""


UNPAGED = 62
"""`Pages.shift` of a cache that is one page: no position reaches a second one."""
LEAST_PAGE = 16
"""Positions that a page has at least, a power of two: positions that are taken together lie in one page."""


@dataclass(frozen=True)
class Pages:
    """Where the positions of one sequence are: a page of `2^shift` (i64) of them is the block of the cache that the
    i64 at `table` names; `some` is 1 (i64), or 0 where the cache is one page and no table is looked at.
    """

    table: str
    shift: str
    some: str

    def place(self, w: Writer, position: str) -> str:
        """Return the place in the cache of a position."""
        return w.add(position, self.ahead(w, w.integers("shrui", position, self.shift)))

    def ahead(self, w: Writer, page: str) -> str:
        """Return how much larger than its position the place of each position of a page is."""
        block = w.mul(w.load(w.at(self.table, w.mul(page, 8)), I64, 8), self.some)
        return w.integers("shli", w.integers("subi", block, page), self.shift)

    def each(
        self,
        w: Writer,
        first: str,
        stop: str,
        body: Callable[..., Sequence[str]],
        carried: Sequence[tuple[str, str]] = (),
    ) -> list[str]:
        """Write a loop over the pages of some positions, at least one; `body(ahead, first, stop, *values)` is for those
        of one page.
        """

        def page(number: str, *values: str) -> Sequence[str]:
            begin = w.integers("shli", number, self.shift)
            end = w.integers("shli", w.add(number, 1), self.shift)
            inside = w.integers("maxsi", first, begin), w.integers("minsi", stop, end)
            return body(self.ahead(w, number), *inside, *values)

        last = w.integers("shrui", w.add(stop, -1), self.shift)
        return w.loop(w.integers("shrui", first, self.shift), w.add(last, 1), 1, page, carried)


def lanes_of(unit: Instructions, size: int) -> int:
    """Return how many values of a head are taken at a time: a register of them, or the most that divide it."""
    return gcd(unit.lanes, size)


def attend(
    w: Writer,
    unit: Instructions,
    query: str,
    keys: Cache,
    values: Cache,
    pages: Pages,
    first: str,
    visible: str,
    size: int,
    scale: float,
    scores: str,
    out: str,
    outcome: str,
) -> None:
    """Attend with one head's query f32[size] to `visible` positions (i64, more than none) from `first` on, a multiple
    of 16; `scores` is room for them, rounded up to 16. At `outcome` the largest score and the sum of exponentials below
    it are left, f32 each.
    """
    lanes = keys.kept.lanes(unit.lanes)
    chains = unit.mix_chains if lanes == unit.lanes else 1  # shorter vectors are more sums as they are
    vf, parts = f"vector<{lanes}xf32>", range(0, size, lanes)
    loaded = [w.op("arith.mulf", w.load(w.at(query, e * 4), vf), w.lanes(scale, vf), kind=vf) for e in parts]
    seen = _Seen(pages, first, w.add(first, visible), scores)
    _store_scores(w, lanes, keys, seen, loaded)
    top, total = _softmax(w, scores, visible, lanes)
    mixed = _mixed(w, lanes, values, seen, len(parts), chains)
    mean = _mean(w, [mixed[i :: len(parts)] for i in range(len(parts))], total, lanes)
    if values.kept.is_integer:
        mean = k.times(w, k.turned(w, mean, vf, values.kept.turned), vf, 1 / values.kept.turned)
    for e, vector in mean:
        w.store(vector, w.at(out, e * 4), vf)
    w.store(top, outcome, F32)
    w.store(total, w.at(outcome, 4), F32)


@dataclass(frozen=True)
class _Seen:
    """Positions (i64) from `first` up to `stop`, the pages that they lie in, and the room of their scores."""

    pages: Pages
    first: str
    stop: str
    scores: str

    def score(self, w: Writer, position: str) -> str:
        """Return where the score of a position is."""
        return w.at(self.scores, w.mul(w.integers("subi", position, self.first), 4))


def _store_scores(w: Writer, lanes: int, keys: Cache, seen: _Seen, query: Sequence[str]) -> None:
    """Write the score of each position, up to a multiple of the lanes; `query` are its vectors, scaled."""
    vf, vi = f"vector<{lanes}xf32>", f"vector<{lanes}xi32>"
    last = w.add(seen.stop, -1)
    order = w.constant(f"dense<[{', '.join(str(lane) for lane in range(lanes))}]>", vi)

    def score(own: Cache, place: str) -> list[str]:
        sums = []
        for lane in range(lanes):
            of = own.place(w, w.integers("minsi", w.add(place, lane), last))
            sums.append(own.product(w, of, query, lanes))
        left = w.splat(w.cast("arith.trunci", w.integers("subi", seen.stop, place), I64, I32), vi)
        inside = w.let(f"arith.cmpi slt, {order}, {left} : {vi}")
        masked = w.lanes(MASKED, vf)
        made = w.let(f"arith.select {inside}, {_lane_sums(w, sums)}, {masked} : vector<{lanes}xi1>, {vf}")
        w.store(made, seen.score(w, place), vf)
        return []

    def scored(ahead: str, begin: str, end: str) -> list[str]:
        own = keys.moved(w, ahead)
        w.loop(begin, end, lanes, lambda place: score(own, place))
        return []

    seen.pages.each(w, seen.first, seen.stop, scored)


def _mixed(w: Writer, lanes: int, values: Cache, seen: _Seen, parts: int, chains: int) -> list[str]:
    """Return weighted sums of values, `parts` vectors for each of so many chains."""
    vf, last = f"vector<{lanes}xf32>", w.add(seen.stop, -1)
    turn = min(MIX_STEP, lanes)  # scores are known up to a multiple of the lanes

    def mix(own: Cache, start: str, *sums: str) -> list[str]:
        new = list(sums)
        for step in range(turn):
            place, chain = w.add(start, step), step % chains * parts
            weight, of = w.splat(w.load(seen.score(w, place), F32), vf), own.place(w, w.integers("minsi", place, last))
            weights = own.scaled(w, of, weight, lanes)
            for i, value in own.numbers(w, of, lanes):
                new[chain + i] = w.op("math.fma", weights[i], value, new[chain + i], kind=vf)
        return new

    def mixed_of(ahead: str, begin: str, end: str, *sums: str) -> list[str]:
        own = values.moved(w, ahead)
        kinds = [(value, vf) for value in sums]
        return w.loop(begin, end, turn, lambda place, *old: mix(own, place, *old), kinds)

    return seen.pages.each(w, seen.first, seen.stop, mixed_of, [(w.lanes(0.0, vf), vf)] * parts * chains)


def _mean(w: Writer, sums: Sequence[Sequence[str]], total: str, lanes: int) -> list[tuple[int, str]]:
    """Return weighted sums over their total weight, and where each is; those of one place are added up in order."""
    kind = f"vector<{lanes}xf32>"
    inverse = w.splat(w.op("arith.divf", w.real(1.0), total, kind=F32), kind)
    found = []
    for i, (whole, *more) in enumerate(sums):
        for value in more:
            whole = w.op("arith.addf", whole, value, kind=kind)
        found.append((i * lanes, w.op("arith.mulf", whole, inverse, kind=kind)))
    return found


@dataclass(frozen=True)
class Parts:
    """What attention to parts of the positions came to, for one head: `count` (i64) times a result f32[size] and a
    line with its largest score and its sum.
    """

    base: str
    count: str
    size: int

    @staticmethod
    def stride(size: int) -> int:
        """Return the bytes from one part to the next."""
        return up_to(4 * size, LINE) + LINE

    def outcome(self, w: Writer, part: str) -> str:
        """Return the pointer to a part's largest score."""
        return w.at(self.base, w.mul(part, self.stride(self.size)), up_to(4 * self.size, LINE))

    def join(self, w: Writer, lanes: int, out: str) -> None:
        """Write the f32[size] that attention to all positions at once would have come to."""
        vf, places = f"vector<{lanes}xf32>", range(0, self.size, lanes)

        def larger(part: str, most: str) -> list[str]:
            return [w.larger(w.load(self.outcome(w, part), F32), most, F32)]

        (most,) = w.loop(0, self.count, 1, larger, [(w.real(MASKED), F32)])

        def body(part: str, total: str, *sums: str) -> list[str]:
            at = self.outcome(w, part)
            lower = w.op("arith.subf", w.load(at, F32), most, kind=F32)
            weight = w.op(
                "arith.mulf",
                w.op("math.exp", w.splat(lower, vf), kind=vf),
                w.splat(w.load(w.at(at, 4), F32), vf),
                kind=vf,
            )
            of = w.at(self.base, w.mul(part, self.stride(self.size)))
            grown = [
                w.op("math.fma", weight, w.load(w.at(of, e * 4), vf), s, kind=vf)
                for e, s in zip(places, sums, strict=True)
            ]
            return [w.op("arith.addf", total, weight, kind=vf), *grown]

        zero = (w.lanes(0.0, vf), vf)
        total, *sums = w.loop(0, self.count, 1, body, [zero] * (1 + len(places)))
        for e, whole in zip(places, sums, strict=True):
            w.store(w.op("arith.divf", whole, total, kind=vf), w.at(out, e * 4), vf)


def _lane_sums(w: Writer, vectors_: list[str]) -> str:
    """Return the sums of as many vectors as each has lanes, one in each lane: pairs are folded into one vector until
    one is left.
    """
    lanes, left = len(vectors_), vectors_
    kind, width = f"vector<{lanes}xf32>", lanes // 2
    while len(left) > 1:
        blocks = range(0, lanes, 2 * width)
        low = [lane + side for block in blocks for side in (0, lanes) for lane in range(block, block + width)]
        high = [lane + width for lane in low]
        left = [
            w.op(
                "arith.addf",
                *(w.let(f"vector.shuffle {one}, {other} {taken} : {kind}, {kind}") for taken in (low, high)),
                kind=kind,
            )
            for one, other in zip(left[:width], left[width:], strict=True)
        ]
        width //= 2
    return left[0]


def _softmax(w: Writer, scores: str, visible: str, lanes: int) -> tuple[str, str]:
    """Replace scores by exp(score - largest) and return the largest and their sum, f32; lanes past the end hold
    `MASKED`.
    """
    vf = f"vector<{lanes}xf32>"

    def at(i: str) -> str:
        return w.load(w.at(scores, w.mul(i, 4)), vf)

    (most,) = w.loop(0, visible, lanes, lambda i, m: [w.larger(at(i), m, vf)], [(w.lanes(MASKED, vf), vf)])
    highest = w.top(most, vf)
    top = w.splat(highest, vf)

    def body(i: str, total: str) -> list[str]:
        grown = w.op("math.exp", w.op("arith.subf", at(i), top, kind=vf), kind=vf)
        w.store(grown, w.at(scores, w.mul(i, 4)), vf)
        return [w.op("arith.addf", grown, total, kind=vf)]

    (total,) = w.loop(0, visible, lanes, body, [(w.lanes(0.0, vf), vf)])
    return highest, w.total(total, vf)
