"""Partitions of a GPU by NVIDIA's MIG: profiles of slices, where they may start, and the layouts that come of them.

A GPU has 8 slices of memory and 7 of compute. A slice takes `size` memory slices from one of its starts on, and no two
overlap. Profiles are the data; layouts are enumerated from them. Source: NVIDIA's MIG user guide, "Supported MIG
Profiles" and its listings of `nvidia-smi mig -lgip` and `-lgipp`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

MEMORY_SLICES = 8
COMPUTE_SLICES = 7
GIB = 2.0**30


@dataclass(frozen=True)
class Slice:
    """A kind of slice of a GPU, and its share of the undivided one."""

    name: str
    compute: int
    """Compute slices, of 7."""
    size: int
    """Memory slices, of 8: also the share of the memory's bandwidth."""
    starts: tuple[int, ...]
    """Memory slices at which it may begin."""
    memory_bytes: float
    compute_share: float
    """Of the multiprocessors of a GPU that is not in MIG mode."""

    @property
    def memory_share(self) -> float:
        """Return its share of the memory and of its bandwidth."""
        return self.size / MEMORY_SLICES


@dataclass(frozen=True)
class Layout:
    """Slices that a GPU can have at the same time, the largest first."""

    slices: tuple[Slice, ...]

    @property
    def name(self) -> str:
        """Return it in words."""
        counts = Counter(each.name for each in self.slices)
        return " + ".join(name if count == 1 else f"{count}x {name}" for name, count in counts.items())

    @property
    def memory_share(self) -> float:
        """Return the share of the memory that its slices have together."""
        return sum(each.memory_share for each in self.slices)

    def within(self, other: Layout) -> bool:
        """Return whether another layout has all its slices, too."""
        return Counter(self.slices) <= Counter(other.slices)


Placement = frozenset[tuple[Slice, int]]
"""Slices, each with its first memory slice."""


@dataclass(frozen=True)
class Gpu:
    """A GPU that can be divided: its profiles of slices, the largest first."""

    name: str
    slices: tuple[Slice, ...]
    source: str

    @property
    def undivided(self) -> Layout:
        """Return the layout of one slice that has everything."""
        return Layout((self.slices[0],))

    def slice_of(self, name: str) -> Slice | None:
        """Return the profile of that name; None where there is none."""
        return next((each for each in self.slices if each.name == name), None)


ChangeBy = Literal["direct", "operator"]


@dataclass(frozen=True)
class Change:
    """What a new layout takes on a drained node, and who says so."""

    seconds: float
    source: str


CHANGES: dict[ChangeBy, Change] = {
    "direct": Change(2.15, "`nvidia-smi mig` on an A100, one public report"),
    "operator": Change(45.9 + 20.0, "GPU Operator by label, 45.9 s, and its device plugin, 20.0 s, on A100: MIGRANT"),
}


@dataclass(frozen=True)
class Partitions:
    """How the devices of a class of nodes may be divided. All devices of a node have the same layout."""

    gpu: str
    layouts: tuple[Layout, ...]
    now: Layout
    """Of every node before anything is changed."""
    change: Change


_STARTS = {"7g": (0,), "4g": (0,), "3g": (0, 4), "2g": (0, 2, 4), "1g": (0, 1, 2, 3, 4, 5, 6), "1g wide": (0, 2, 4, 6)}
_SIZES = {"7g": 8, "4g": 4, "3g": 4, "2g": 2, "1g": 1, "1g wide": 2}


def _gpu(name: str, multiprocessors: int, source: str, rows: dict[str, tuple[str, float, int]]) -> Gpu:
    """Return a GPU from rows of a name, GiB and multiprocessors by kind of slice."""
    return Gpu(
        name,
        tuple(
            Slice(profile, int(kind[0]), _SIZES[kind], _STARTS[kind], gib * GIB, of / multiprocessors)
            for kind, (profile, gib, of) in rows.items()
        ),
        source,
    )


_GUIDE = "NVIDIA MIG user guide"
GPUS: dict[str, Gpu] = {
    each.name: each
    for each in (
        _gpu(
            "A100-40GB",
            108,
            _GUIDE,
            {
                "7g": ("7g.40gb", 39.25, 98),
                "4g": ("4g.20gb", 19.5, 56),
                "3g": ("3g.20gb", 19.5, 42),
                "2g": ("2g.10gb", 9.62, 28),
                "1g wide": ("1g.10gb", 9.62, 14),
                "1g": ("1g.5gb", 4.75, 14),
            },
        ),
        _gpu(
            "A100-80GB",
            108,
            _GUIDE,
            {
                "7g": ("7g.80gb", 78.5, 98),
                "4g": ("4g.40gb", 39.25, 56),
                "3g": ("3g.40gb", 39.25, 42),
                "2g": ("2g.20gb", 19.5, 28),
                "1g wide": ("1g.20gb", 19.5, 14),
                "1g": ("1g.10gb", 9.625, 14),
            },
        ),
        _gpu(
            "H100-80GB",
            132,
            _GUIDE,
            {
                "7g": ("7g.80gb", 79.25, 132),
                "4g": ("4g.40gb", 39.5, 64),
                "3g": ("3g.40gb", 39.5, 60),
                "2g": ("2g.20gb", 19.62, 32),
                "1g wide": ("1g.20gb", 19.62, 26),
                "1g": ("1g.10gb", 9.75, 16),
            },
        ),
        _gpu(
            "H200-141GB",
            132,
            f"{_GUIDE}; 1g, 2g and 7g: a public listing; the rest are estimates: as on H100, memory by that of 2g",
            {
                "7g": ("7g.141gb", 140.0, 132),
                "4g": ("4g.71gb", 65.0, 64),
                "3g": ("3g.71gb", 65.0, 60),
                "2g": ("2g.35gb", 32.5, 32),
                "1g wide": ("1g.35gb", 32.5, 26),
                "1g": ("1g.18gb", 16.0, 16),
            },
        ),
    )
}


def placements(slices: Sequence[Slice]) -> tuple[Placement, ...]:
    """Return every way to place some of these kinds of slices on a GPU, without the empty one."""
    places = [(each, start) for each in slices for start in each.starts]
    found: list[Placement] = []

    def go(first: int, chosen: tuple[tuple[Slice, int], ...], taken: int, compute: int) -> None:
        for i in range(first, len(places)):
            each, start = places[i]
            mask = ((1 << each.size) - 1) << start
            if taken & mask or compute + each.compute > COMPUTE_SLICES:
                continue
            more = (*chosen, (each, start))
            found.append(frozenset(more))
            go(i + 1, more, taken | mask, compute + each.compute)

    go(0, (), 0, 0)
    return tuple(found)


def maximal(found: Iterable[Placement]) -> tuple[Placement, ...]:
    """Return the placements to which nothing can be added."""
    all_ = tuple(found)
    return tuple(one for one in all_ if not any(one < other for other in all_))


def layout_of(slices: Iterable[Slice]) -> Layout:
    """Return the layout of some slices."""
    return Layout(tuple(sorted(slices, key=lambda each: (-each.compute, -each.size))))


@cache
def _placements(gpu: str) -> tuple[Placement, ...]:
    return placements(GPUS[gpu].slices)


@cache
def _by_layout(gpu: str) -> dict[Layout, list[Placement]]:
    found: dict[Layout, list[Placement]] = {}
    for one in _placements(gpu):
        found.setdefault(layout_of(each for each, _ in one), []).append(one)
    return found


@cache
def layouts(gpu: str) -> tuple[Layout, ...]:
    """Return every valid layout of a GPU."""
    return tuple(_by_layout(gpu))


@cache
def fullest(gpu: str) -> tuple[Layout, ...]:
    """Return the layouts of a GPU that are not part of another one: what can be planned with any can be with these."""
    return widest(layouts(gpu))


def widest(some: Sequence[Layout]) -> tuple[Layout, ...]:
    """Return those of some layouts that are not part of another of them."""
    return tuple(one for one in some if not any(one != other and one.within(other) for other in some))


@cache
def placed(gpu: str, layout: Layout) -> tuple[tuple[Slice, int], ...]:
    """Return where the slices of a layout begin, so that most can be added: a 3g at 0 leaves less room than at 4."""
    best = max(_by_layout(gpu)[layout], key=lambda one: sum(one < other for other in _placements(gpu)))
    return tuple(sorted(best, key=lambda place: place[1]))


def refusal(gpu: Gpu, names: Sequence[str]) -> str | None:
    """Return why these slices are no layout of a GPU; None where they are one."""
    told = f"[{', '.join(names)}] is no layout of {gpu.name}"
    for name in names:
        if gpu.slice_of(name) is None:
            return f"{told}: it has no slice {name}, there are {', '.join(each.name for each in gpu.slices)}"
    slices = [each for name in names if (each := gpu.slice_of(name)) is not None]
    if not slices:
        return f"{told}: name at least one slice; undivided is [{gpu.slices[0].name}]"
    for what, have, most in (
        ("compute", sum(each.compute for each in slices), COMPUTE_SLICES),
        ("memory", sum(each.size for each in slices), MEMORY_SLICES),
    ):
        if have > most:
            return f"{told}: it takes {have} {what} slices, there are {most}"
    if layout_of(slices) in layouts(gpu.name):
        return None
    for each in slices:
        if names.count(each.name) > len(each.starts):
            where = ", ".join(map(str, each.starts))
            return f"{told}: {each.name} begins at memory slice {where} alone, so there are {len(each.starts)} at most"
    return f"{told}: its slices overlap wherever they begin"
