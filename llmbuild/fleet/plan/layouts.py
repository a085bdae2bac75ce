"""How many nodes of which layouts have the slots that are wanted: layouts are columns, as in the program.

A class without partitions has one layout, its devices. All nodes of a class cost the same, so fewest come first; among
the fewest those that keep what the nodes have.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import ceil

from llmbuild.spec.fleet import Fleet, NodeClass
from llmbuild.spec.partitions import Layout, Slice, widest

EXACT = 4.0
"""Nodes, by the memory of what is wanted, up to which the fewest are found exactly; above, the best layout is repeated.
"""

Slots = tuple[int, ...]
"""How many slots of each kind, in the order of `Columns.parts`."""
Nodes = tuple[int, ...]
"""How many nodes of each layout, in the order of `Columns.layouts`."""


@dataclass(frozen=True)
class Columns:
    """The layouts of a class of nodes, and the slots that a node has by each."""

    layouts: tuple[Layout | None, ...]
    """None: each device is one slot."""
    parts: tuple[Slice | None, ...]
    """The largest first."""
    counts: tuple[Slots, ...]

    @cached_property
    def weights(self) -> tuple[float, ...]:
        """Return the share of a node that a slot of each kind takes at least."""
        kinds = range(len(self.parts))
        return tuple(1 / max(max(counts[p] for counts in self.counts), 1) for p in kinds)

    @cached_property
    def known(self) -> dict[Slots, Nodes]:
        """The fewest nodes for what was asked before."""
        return {}

    @cached_property
    def near(self) -> dict[tuple[Nodes, Slots], Nodes]:
        """The same, near to nodes that are held."""
        return {}

    def nodes(self, wanted: Slots) -> int:
        """Return the fewest nodes that have these slots."""
        if self.layouts == (None,):
            return ceil(wanted[0] / self.counts[0][0])
        return sum(fewest(self, wanted))

    def slots(self, nodes: Sequence[int]) -> Slots:
        """Return the slots of nodes by layout."""
        kinds = range(len(self.parts))
        return tuple(sum(n * counts[p] for n, counts in zip(nodes, self.counts, strict=True)) for p in kinds)

    def most(self, part: int, nodes: int) -> int:
        """Return how many slots of one kind so many nodes can have."""
        return nodes * max((counts[part] for counts in self.counts), default=0)


def columns(fleet: Fleet, node: NodeClass, useful: Collection[Slice] | None = None) -> Columns:
    """Return the layouts that a class of nodes may take, without those that others have all slots of.

    With `useful` slices those alone count; a layout that is told keeps its other slices.
    """
    if node.partitions is None:
        return Columns((None,), (None,), ((node.slots,),))
    return _columns(fleet.layouts(node), None if useful is None else frozenset(useful), node.slots)


@lru_cache(256)
def _columns(layouts: tuple[Layout, ...], useful: frozenset[Slice] | None, devices: int) -> Columns:
    seen: dict[Layout, Layout] = {}
    for layout in layouts:
        kept = Layout(tuple(each for each in layout.slices if useful is None or each in useful))
        if kept.slices:
            seen.setdefault(kept, layout)
    some = widest(tuple(seen))
    parts = sorted({each for one in some for each in one.slices}, key=lambda each: (-each.compute, -each.size))
    counts = tuple(tuple(devices * one.slices.count(part) for part in parts) for one in some)
    return Columns(tuple(seen[one] for one in some), tuple(parts), counts)


def fewest(of: Columns, wanted: Slots) -> Nodes:
    """Return the fewest nodes that have these slots, by layout; nearly the fewest where they are many."""
    if wanted not in of.known:
        of.known[wanted] = _repeated(of, wanted)
    return of.known[wanted]


def _repeated(of: Columns, wanted: Slots) -> Nodes:
    chosen, rest = [0] * len(of.layouts), wanted
    while sum(weight * count for weight, count in zip(of.weights, rest, strict=True)) > EXACT:
        best = max(range(len(of.layouts)), key=lambda i: _covered(of, of.counts[i], rest))
        counts = of.counts[best]
        times = max(1, min((w // c for w, c in zip(rest, counts, strict=True) if c and w), default=1) // 2)
        rest = tuple(max(0, w - times * c) for w, c in zip(rest, counts, strict=True))
        chosen[best] += times
    return tuple(a + b for a, b in zip(chosen, _searched(of, rest), strict=True))


def _searched(of: Columns, wanted: Slots) -> Nodes:
    """Return the fewest nodes: a layout that has the largest slot that is wanted, and the fewest for the rest."""
    part = next((p for p, count in enumerate(wanted) if count), None)
    if part is None:
        return (0,) * len(of.layouts)
    best: Nodes | None = None
    for i, rest in _rests(of, wanted, part):
        found = fewest(of, rest)
        if best is None or sum(found) + 1 < sum(best):
            best = (*found[:i], found[i] + 1, *found[i + 1 :])
    assert best is not None, "a part is a part of some layout"
    return best


def _rests(of: Columns, wanted: Slots, part: int) -> list[tuple[int, Slots]]:
    """Return what each layout with a part leaves of what is wanted, without those that leave more than another one."""
    rests: dict[Slots, int] = {}
    for i, counts in enumerate(of.counts):
        if counts[part]:
            rests.setdefault(_rest(wanted, counts), i)
    least = [
        rest
        for rest in rests
        if not any(other != rest and all(x <= y for x, y in zip(other, rest, strict=True)) for other in rests)
    ]
    return [(rests[rest], rest) for rest in least]


def settled(of: Columns, held: Nodes, wanted: Slots) -> Nodes:
    """Return the fewest nodes that have these slots, and of these as many as are held as can be told quickly."""
    if (held, wanted) not in of.near:
        of.near[held, wanted] = _settled(of, held, wanted)
    return of.near[held, wanted]


def _settled(of: Columns, held: Nodes, wanted: Slots) -> Nodes:
    least = of.nodes(wanted)
    kept, rest = [0] * len(of.layouts), wanted
    steps: list[tuple[Nodes, Slots]] = [(tuple(kept), rest)]
    while any(rest):
        left = [i for i, count in enumerate(held) if kept[i] < count]
        best = max(left, key=lambda i: _covered(of, of.counts[i], rest), default=None)
        if best is None or _covered(of, of.counts[best], rest) <= 0:
            break
        kept[best] += 1
        rest = _rest(rest, of.counts[best])
        steps.append((tuple(kept), rest))
    for nodes, lacking in reversed(steps):
        more = fewest(of, lacking)
        if sum(nodes) + sum(more) <= least:
            return tuple(a + b for a, b in zip(nodes, more, strict=True))
    return fewest(of, wanted)


def changed(held: Nodes, wanted: Nodes) -> int:
    """Return how many nodes that are on take another layout."""
    more = sum(max(0, w - h) for h, w in zip(held, wanted, strict=True))
    return min(more, sum(max(0, h - w) for h, w in zip(held, wanted, strict=True)))


def lacked(
    fleet: Fleet, node: NodeClass, there: Iterable[Layout], wanted: Mapping[Slice, int]
) -> tuple[Counter[Layout], Counter[Layout]]:
    """Return the layouts that nodes lack for the slices that are wanted, and those of which they have too many."""
    of, have = columns(fleet, node), Counter(there)
    slots = tuple(wanted.get(part, 0) if part else 0 for part in of.parts)
    held = tuple(have[layout] if layout else 0 for layout in of.layouts)
    want = Counter({layout: n for layout, n in zip(of.layouts, settled(of, held, slots), strict=True) if layout})
    return want - have, have - want


class Room:
    """Slots of a fleet that are given away one after another, as far as its nodes have them by any layouts."""

    def __init__(self, fleet: Fleet) -> None:
        self._nodes = {node.name: (node, columns(fleet, node)) for node in fleet.nodes}
        self._taken = {name: [0] * len(of.parts) for name, (_, of) in self._nodes.items()}

    def take(self, name: str, part: Slice | None, count: int) -> int:
        """Take up to so many slots of a class of nodes, and return how many there were."""
        node, of = self._nodes[name]
        if part not in of.parts:
            return 0
        taken, at = self._taken[name], of.parts.index(part)
        given = 0
        while given < count:
            taken[at] += 1
            if of.nodes(tuple(taken)) > node.count:
                taken[at] -= 1
                break
            given += 1
        return given


def _rest(wanted: Slots, counts: Slots) -> Slots:
    return tuple(max(0, w - c) for w, c in zip(wanted, counts, strict=True))


def _covered(of: Columns, counts: Slots, wanted: Slots) -> float:
    """Return how much of what is wanted a node of a layout has."""
    return sum(weight * min(c, w) for weight, c, w in zip(of.weights, counts, wanted, strict=True))
