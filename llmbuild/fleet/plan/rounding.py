"""From fractions of replicas to whole ones: fill up greedily, then local search over replicas, services and nodes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from llmbuild.fleet.plan.layouts import Nodes, changed, settled
from llmbuild.fleet.plan.program import Program

_SLACK = 1e-9


@dataclass(frozen=True)
class Fit:
    """How a service's requests are shared out over whole replicas: flows by option and class, shortage, cost."""

    flows: dict[tuple[int, int], float]
    """Requests a second by option and class."""
    missing: tuple[float, ...]
    """By class."""
    cost: float
    """Of replicas and requests, without nodes."""


class Rounding:
    """Whole replicas of a program, changed move by move; the order of moves is fixed, so equal programs end alike.

    One class: replicas, the slots they use and the fits that are known change together.
    """

    def __init__(
        self,
        program: Program,
        current: Sequence[int] | None = None,
        horizon_s: float = 0.0,
        layouts: Sequence[Nodes | None] | None = None,
        keep: bool = False,
    ) -> None:
        """Begin with nothing; starts of replicas that are not in `current` are paid for over the horizon.

        With `keep` no move takes a replica of `current` away; another clock takes none.

        `layouts` are those of the nodes that are on, by class of nodes; where they are not known, the fewest for
        `current`.
        """
        self.program = program
        self._of_service = [program.of_service(s) for s in range(len(program.demands))]
        self._paid = 1 / horizon_s if current is not None and horizon_s > 0 else 0.0
        self._current = list(current) if current is not None else [0] * len(program.options)
        self._alike = program.alike()
        self._held = [0] * (max(self._alike, default=0) + 1)
        for kind, count in zip(self._alike, self._current, strict=True):
            self._held[kind] += count
        self._on: list[Nodes] = [(0,) * len(of.layouts) for of in program.columns]
        used = self._uses(self._current)
        known = layouts if layouts is not None else [None] * len(self._on)
        self._on = [self._settled(k, used) if on is None else on for k, on in enumerate(known)]
        self._left, self._keep = 0, keep
        self._known: dict[tuple[int, tuple[int, ...]], Fit] = {}
        self.replicas = [0] * len(program.options)
        self._used = [0] * len(program.places)

    # --- what a state is worth ---------------------------------------------------------------------------------------

    def fit(self, service: int, counts: tuple[int, ...]) -> Fit:
        """Return how a service's requests are shared out over these replicas of its options."""
        key = service, counts
        if key not in self._known:
            self._known[key] = self._shared(service, counts)
        return self._known[key]

    def _shared(self, service: int, counts: tuple[int, ...]) -> Fit:
        """Fill classes that few options take first, cheap options first."""
        program, places = self.program, self._of_service[service]
        room = dict(zip(places, map(float, counts), strict=True))
        flows: dict[tuple[int, int], float] = {}
        missing = list(program.demands[service])
        cost = 0.0
        for option, count in zip(places, counts, strict=True):
            cost += program.options[option].hold * count
        cost += self._paid * self._starts(places, counts)
        takers = [[o for o in places if program.options[o].takes[c].rate > 0] for c in range(len(missing))]
        for c in sorted(range(len(missing)), key=lambda c: len(takers[c])):
            for o in sorted(takers[c], key=lambda o: program.options[o].costs[c]):
                take = program.options[o].takes[c].rate
                flow = min(missing[c], room[o] * take)
                if flow > 0:
                    flows[o, c] = flow
                    room[o] -= flow / take
                    missing[c] -= flow
                    cost += flow * program.options[o].costs[c]
        rates = program.demands[service]
        left = tuple(m if m > _SLACK * max(1.0, rate) else 0.0 for m, rate in zip(missing, rates, strict=True))
        return Fit(flows, left, cost)

    def _starts(self, places: Sequence[int], counts: Sequence[int]) -> float:
        """Return the cost of the starts among a service's options; another clock of what runs is no start."""
        cost, wanted = 0.0, dict[int, int]()
        for option, count in zip(places, counts, strict=True):
            kind = self._alike[option]
            before = wanted.get(kind, 0)
            wanted[kind] = before + count
            more = max(0, wanted[kind] - self._held[kind]) - max(0, before - self._held[kind])
            cost += more * self.program.options[option].start
        return cost

    def starts(self) -> float:
        """Return the cost of all starts, of nodes too, in the unit of the objective times seconds."""
        parts = range(len(self.program.demands))
        return sum(self._starts(self._of_service[s], self.counts(s)) for s in parts) + self._boots(self._used)

    def _boots(self, used: Sequence[int]) -> float:
        """Return the cost of turning nodes on, and of other layouts for those that are on."""
        cost = 0.0
        for k, (count, on) in enumerate(zip(self.program.nodes(used), self._on, strict=True)):
            cost += max(0, count - sum(on)) * self.program.boot_cost[k]
            if self.program.change_cost[k] and count:
                cost += changed(on, self._settled(k, used)) * self.program.change_cost[k]
        return cost

    def _kinds(self) -> range:
        return range(len(self.program.fleet.nodes))

    def _settled(self, k: int, used: Sequence[int]) -> Nodes:
        """Return the nodes of a class by layout, near to those that are on."""
        of, wanted = self.program.columns[k], self.program.wanted(k, used)
        if len(of.layouts) == 1:
            return (of.nodes(wanted),)
        return settled(of, self._on[k], wanted)

    def layouts(self) -> tuple[Nodes, ...]:
        """Return the nodes that are on by layout, by class of nodes."""
        return tuple(self._settled(k, self._used) for k in self._kinds())

    def counts(self, service: int) -> tuple[int, ...]:
        """Return the replicas of a service's options."""
        return tuple(self.replicas[o] for o in self._of_service[service])

    def value(self) -> tuple[float, float]:
        """Return the weighted shortage and the cost of the present state."""
        shortage = cost = 0.0
        for s in range(len(self.program.demands)):
            fit = self.fit(s, self.counts(s))
            shortage += sum(fit.missing) * self.program.fleet.services[s].priority
            cost += fit.cost
        return shortage, cost + self._nodes_cost(self._used)

    def _uses(self, replicas: Sequence[int]) -> list[int]:
        """Return the slots that replicas take, by class of nodes."""
        used = [0] * len(self.program.places)
        for option, count in zip(self.program.options, replicas, strict=True):
            used[option.place] += count
        return used

    def _nodes_cost(self, used: Sequence[int]) -> float:
        counts = self.program.nodes(used)
        running = sum(count * cost for count, cost in zip(counts, self.program.node_cost, strict=True))
        return running + (self._paid * self._boots(used) if self._paid else 0.0)

    # --- moves -------------------------------------------------------------------------------------------------------

    def place(self, replicas: Sequence[int]) -> None:
        """Take replicas as they are."""
        self.replicas = list(replicas)
        self._used = self._uses(replicas)

    def fill(self) -> None:
        """Add replicas where requests find no place, those that cost least for each request first."""
        for s in sorted(range(len(self.program.demands)), key=lambda s: -self.program.fleet.services[s].priority):
            while sum(self.fit(s, self.counts(s)).missing) > 0:
                best = min(self._additions(s), default=None)
                if best is None or best[0] == float("inf"):
                    break
                self._apply(((best[1], 1),))

    def _additions(self, service: int) -> Iterator[tuple[float, int]]:
        """Yield the cost of each request that one more replica of an option would place."""
        before = self.fit(service, self.counts(service))
        lacking = sum(before.missing)
        for option in self._of_service[service]:
            used = self._with(((option, 1),))
            if not self.program.fits(used):
                continue
            after = self.fit(service, self._counts_with(service, ((option, 1),)))
            placed = lacking - sum(after.missing)
            if placed > _SLACK:
                share = self.program.node_cost[self.program.options[option].node] * self.program.share(
                    self.program.options[option]
                )
                yield (after.cost - before.cost + share) / placed, option

    def _with(self, changes: Sequence[tuple[int, int]]) -> list[int]:
        used = list(self._used)
        for option, by in changes:
            used[self.program.options[option].place] += by
        return used

    def _counts_with(self, service: int, changes: Sequence[tuple[int, int]]) -> tuple[int, ...]:
        moved = dict(changes)
        return tuple(self.replicas[o] + moved.get(o, 0) for o in self._of_service[service])

    def _apply(self, changes: Sequence[tuple[int, int]]) -> None:
        self._used = self._with(changes)
        for option, by in changes:
            self.replicas[option] += by

    def improve(self, moves: int) -> None:
        """Make the first move that helps, service after service, until none does or so many were looked at."""
        self._left, moved = moves, True
        while moved and self._left > 0:
            moved = False
            for s in range(len(self.program.demands)):
                while self._step(s):
                    moved = True
                while not self._keep and self._yield_slot(s):
                    moved = True
            while not self._keep and self._pack():
                moved = True

    def _step(self, service: int) -> bool:
        """Make one move of a service that helps; return whether there was one."""
        before = self._worth(service, self.counts(service), self._used)
        for changes in self._moves(service):
            self._left -= 1
            if self._left < 0:
                return False
            used = self._with(changes)
            if not self.program.fits(used) or (self._keep and not self._keeps(changes)):
                continue
            after = self._worth(service, self._counts_with(service, changes), used)
            if after < (before[0] - _SLACK, float("inf")) or (
                after[0] <= before[0] + _SLACK and after[1] < before[1] * (1 - 1e-9) - _SLACK
            ):
                self._apply(changes)
                return True
        return False

    def _keeps(self, changes: Sequence[tuple[int, int]]) -> bool:
        """Return whether as many replicas as are held are there after changes, of each kind but for its clock."""
        by_kind: dict[int, int] = {}
        for option, by in changes:
            by_kind[self._alike[option]] = by_kind.get(self._alike[option], 0) + by
        for kind, by in by_kind.items():
            there = sum(n for of, n in zip(self._alike, self.replicas, strict=True) if of == kind)
            if by < 0 and there + by < self._held[kind]:
                return False
        return True

    def _yield_slot(self, service: int) -> bool:
        """Give a service that lacks a place a slot of another one, where that places more by priority."""
        before = self.value()
        if sum(self.fit(service, self.counts(service)).missing) <= 0:
            return False
        for mine in self._of_service[service]:
            for other, option in enumerate(self.program.options):
                if not self.replicas[other] or option.service == service:
                    continue
                if option.node != self.program.options[mine].node or self._left < 0:
                    continue
                self._left -= 1
                if not self.program.fits(self._with(((other, -1), (mine, 1)))):
                    continue
                self._apply(((other, -1), (mine, 1)))
                if self.value()[0] < before[0] - _SLACK:
                    return True
                self._apply(((other, 1), (mine, -1)))
        return False

    def _pack(self) -> bool:
        """Divide one more node for what runs elsewhere, where all of it together is worth it: no single move is."""
        before = self.value()
        for k, of in enumerate(self.program.columns):
            for counts in of.counts if self.program.fleet.nodes[k].partitions else ():
                if self._left < 0:
                    return False
                best: tuple[tuple[int, int], ...] = ()
                least = before
                changes: dict[int, int] = {}
                for place, move in self._packed(k, counts):
                    changes[place] = changes.get(place, 0) - 1
                    changes[move] = changes.get(move, 0) + 1
                    after = self._after(tuple(changes.items()))
                    if after is not None and after[0] <= before[0] + _SLACK and after[1] < least[1] * (1 - 1e-9):
                        best, least = tuple(changes.items()), after
                if best:
                    self._apply(best)
                    return True
        return False

    def _packed(self, k: int, counts: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Yield replicas and what would take their place in the slots of a node, those that save the most first."""
        taken: dict[int, int] = {}
        for part, slots in enumerate(counts):
            at = next(i for i, p in enumerate(self.program.places) if (p.node, p.part) == (k, part))
            moves = []
            for mine, option in enumerate(self.program.options):
                if option.place != at:
                    continue
                service = option.service
                now = self.fit(service, self.counts(service))
                for other in self._of_service[service]:
                    theirs = self.program.options[other]
                    if self.replicas[other] and theirs.place != at:
                        self._left -= 1
                        then = self.fit(service, self._counts_with(service, ((other, -1), (mine, 1))))
                        freed = self.program.node_cost[theirs.node] * self.program.share(theirs)
                        moves.append((sum(then.missing) - sum(now.missing), then.cost - now.cost - freed, other, mine))
            left = slots
            for lacking, _, other, mine in sorted(moves):
                while left and lacking <= _SLACK and taken.get(other, 0) < self.replicas[other]:
                    taken[other] = taken.get(other, 0) + 1
                    left -= 1
                    yield other, mine

    def _after(self, changes: Sequence[tuple[int, int]]) -> tuple[float, float] | None:
        """Return what the state would be worth after changes of several services; None where they do not fit."""
        self._left -= 1
        if not self.program.fits(self._with(changes)):
            return None
        back = tuple((option, -by) for option, by in changes)
        self._apply(changes)
        found = self.value()
        self._apply(back)
        return found

    def _worth(self, service: int, counts: tuple[int, ...], used: Sequence[int]) -> tuple[float, float]:
        fit = self.fit(service, counts)
        return sum(fit.missing), fit.cost + self._nodes_cost(used)

    def _moves(self, service: int) -> Iterator[tuple[tuple[int, int], ...]]:
        """Yield changes of replicas: one less, one more, one for another, two for one, and whole nodes drained."""
        places = self._of_service[service]
        here = [o for o in places if self.replicas[o]]
        yield from (((o, -1),) for o in here)
        for o in here:
            yield from (((o, -1), (other, 1)) for other in places if other != o)
            if self.replicas[o] > 1:
                yield from (((o, -2), (other, 1)) for other in places if other != o)
            yield from (((o, -1), (other, 2)) for other in places if other != o)
        for o in here:
            mine = self.program.options[o]
            spare = self._used[mine.place] % round(1 / self.program.share(mine))
            for count in sorted({spare, self.replicas[o]} & set(range(2, self.replicas[o] + 1))):
                for other in (each for each in places if each != o):
                    yield from (((o, -count), (other, by)) for by in range(1, count + 1))
        yield from (((o, 1),) for o in places)
