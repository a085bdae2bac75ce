"""The load curve of a variant: the time, and the joules, of one step of a server by what is in it, with its error."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from llmbuild.digest import plain

LOAD_PROTOCOL = 1
"""Version of how cells are measured and fitted; curves of different versions are never compared."""

DOUBTFUL = 0.25
"""Error of a curve above which it is doubtful."""


class Work(NamedTuple):
    """What one step computes."""

    decodes: int = 0
    """Sequences with a single token behind others."""
    context: int = 0
    """Positions that these tokens see, all together, themselves included."""
    prompts: int = 0
    """Pieces of prompts."""
    tokens: int = 0
    """Tokens of these pieces."""
    seen: int = 0
    """Positions that these tokens see, all together."""

    def add(self, start: int, tokens: int) -> Work:
        """Return the work with that of one more sequence: so many tokens from a position on."""
        if start and tokens == 1:
            return Work(self.decodes + 1, self.context + start + 1, self.prompts, self.tokens, self.seen)
        seen = tokens * start + tokens * (tokens + 1) // 2
        return Work(self.decodes, self.context, self.prompts + 1, self.tokens + tokens, self.seen + seen)

    @staticmethod
    def of(pieces: Iterable[tuple[int, int]]) -> Work:
        """Return the work of pieces of sequences: the position of the first token, and how many there are."""
        found = Work()
        for start, tokens in pieces:
            found = found.add(start, tokens)
        return found

    @property
    def rows(self) -> int:
        """Tokens that are computed."""
        return self.decodes + self.tokens

    @property
    def reads(self) -> int:
        """Sequences with logits."""
        return self.decodes + self.prompts


@dataclass(frozen=True)
class Table:
    """Values at increasing integers, with straight lines between them, and the last line beyond."""

    at: tuple[int, ...]
    values: tuple[float, ...]

    def __call__(self, x: float) -> float:
        """Return the value at x; below the first place, its value."""
        if x <= self.at[0] or len(self.at) == 1:
            return self.values[0]
        i = min(bisect_right(self.at, x), len(self.at) - 1)
        low, high = self.at[i - 1], self.at[i]
        return self.values[i - 1] + (self.values[i] - self.values[i - 1]) * (x - low) / (high - low)


@dataclass(frozen=True)
class Fit:
    """Seconds of a step: a table over rows, and what each sequence with logits and each seen position adds.

    Where the rows of a step share a call, the table is over all its rows. Else each sequence has a call of its own: the
    table is over the tokens of a call, its first value that of a decode.
    """

    shared: bool
    table: Table
    read_s: float
    context_s: float
    """For each position that a decoded token sees."""
    seen_s: float
    """For each position that a token of a prompt sees."""

    def seconds(self, work: Work) -> float:
        """Return the seconds of a step."""
        attended = self.context_s * work.context + self.seen_s * work.seen
        if self.shared:
            return self.table(work.rows) + self.read_s * work.reads + attended
        prompts = work.prompts * self.table(work.tokens / work.prompts) if work.prompts else 0.0
        return work.decodes * self.table(1) + prompts + attended

    def times(self, factor: float) -> Fit:
        """Return the fit of a device that is slower by a factor."""
        table = Table(self.table.at, tuple(value * factor for value in self.table.values))
        return Fit(self.shared, table, self.read_s * factor, self.context_s * factor, self.seen_s * factor)


@dataclass(frozen=True)
class OwnTime:
    """Seconds that a server takes besides its device, the engine, the event loop and HTTP together.

    Measured over HTTP, so where the client shares the server's cores its time is in them.
    """

    step_s: float
    """For each step."""
    row_s: float
    """For each sequence that gets a token in a step."""
    request_s: float
    """For each request, up to its place in the queue."""
    end_s: float
    """For each request, behind its last token."""
    wake_s: float = 0.0
    """For a request that finds it idle: what passes besides, while nothing is computed."""
    device_factor: float = 1.0
    """By which factor the device's steps take longer in the server than in the curve's own process."""
    cold_factor: float = 1.0
    """By which factor everything takes longer on cores that were idle before: their clock is slow."""
    cold_s: float = 0.0
    """Seconds of work after which such cores are at full speed."""

    def seconds(self, reads: int) -> float:
        """Return the seconds of a step in which so many sequences get a token."""
        return self.step_s + self.row_s * reads

    @property
    def speeds(self) -> str:
        """How fast the device is in a server, in words; empty where it is as the curve says."""
        found = [f"the device takes {self.device_factor:.2f} of the curve's time"] if self.device_factor != 1.0 else []
        if self.cold_factor > 1.0:
            found.append(f"after a rest all takes {self.cold_factor:.2f} times as long for {self.cold_s * 1e3:.0f} ms")
        return ", ".join(found)


@dataclass(frozen=True)
class Cell:
    """One measured kind of step: its work, the median of its seconds with its 95 % interval, and its visits.

    `held_out` cells are not fitted: the fit is judged by them. `watts` is the mean power in a window of such steps.
    """

    work: Work
    seconds: float
    low: float
    high: float
    visits: int
    held_out: bool = False
    watts: float | None = None


@dataclass(frozen=True)
class LoadCurve:
    """The seconds of a step of an artifact with its settings on a machine, up to what was measured.

    `error_p95` is the 95th percentile of the relative error on the held-out cells. `turn_s` and `row_s` are the seconds
    of the engine itself for each step and for each sequence in it, measured on the same machine over a device that
    takes none. `watts` is the mean power over rows; None without a meter. `served` is what the whole server takes; None
    where it was not measured. `cores` says on how many cores the process was held that measured; 0: on none.
    """

    key: str
    variant: str
    artifact: str
    machine: str
    driver: str
    workers: int
    context: int
    decodes_most: int
    """Sequences up to which cells were measured."""
    prompt_most: int
    """Tokens of prompts in a step up to which cells were measured."""
    fit: Fit
    cells: tuple[Cell, ...]
    error_p95: float
    turn_s: float
    row_s: float
    notes: Mapping[str, str]
    energy_source: str | None = None
    watts: Table | None = None
    protocol: int = LOAD_PROTOCOL
    served: OwnTime | None = None
    cores: int = 0

    def step_s(self, work: Work) -> float:
        """Return the seconds of a step on the device and in the engine; HTTP is not in them."""
        return self.fit.seconds(work) + self.turn_s + self.row_s * work.reads

    @property
    def own(self) -> OwnTime:
        """Return what a server takes besides the device: of the engine alone, where no more was measured."""
        return self.served or OwnTime(self.turn_s, self.row_s, 0.0, 0.0)

    @property
    def served_fit(self) -> Fit:
        """Return what the device takes in a server."""
        factor = self.own.device_factor
        return self.fit if factor == 1.0 else self.fit.times(factor)

    def served_s(self, work: Work) -> float:
        """Return the seconds of a step with all that a server takes for it."""
        return self.served_fit.seconds(work) + self.own.seconds(work.reads)

    def joules(self, work: Work) -> float | None:
        """Return the joules of a step on the device; None without a meter."""
        return None if self.watts is None else self.watts(work.rows) * self.fit.seconds(work)

    def covers(self, work: Work) -> bool:
        """Return whether steps of this size were measured; else the last line of the table goes on."""
        return work.decodes <= self.decodes_most and work.tokens <= self.prompt_most

    @property
    def doubt(self) -> str:
        """Why what is computed of the curve is doubtful; empty where nothing is known against it."""
        found = [self.notes[name] for name in ("noise", "held back") if name in self.notes]
        return ", ".join([*found, *([f"its error is {self.error_p95:.0%}"] if self.error_p95 > DOUBTFUL else [])])

    @property
    def held_out(self) -> int:
        """Number of cells that judge the fit."""
        return sum(cell.held_out for cell in self.cells)


def row_of(curve: LoadCurve) -> dict[str, object]:
    """Return the cells of a catalog's `load_curve`, except `created_at`."""
    kinds = {
        "decode": Work.of([(curve.context // 2, 1)]),
        "decodes": Work.of([(curve.context // 2, 1)] * curve.decodes_most),
        "prompt": Work.of([(0, curve.prompt_most)]),
    }
    body: dict[str, object] = plain(curve)
    columns = ("key variant artifact machine driver workers context decodes_most prompt_most").split()
    return {
        **{name: body[name] for name in (*columns, "turn_s", "row_s", "error_p95", "energy_source", "protocol")},
        "held_out": curve.held_out,
        **{f"{name}_s": curve.fit.seconds(work) for name, work in kinds.items()},
        **{f"{name}_j": curve.joules(work) for name, work in kinds.items()},
        "body": body,
    }


def curve_from(body: Mapping[str, Any]) -> LoadCurve:
    """Return a curve from its JSON form."""
    fit, watts = body["fit"], body.get("watts")
    cells = tuple(Cell(**{**cell, "work": Work(*cell["work"])}) for cell in body["cells"])
    served = body.get("served")
    made = {**body, "cells": cells, "fit": Fit(**{**fit, "table": _table(fit["table"])})}
    made |= {"watts": _table(watts) if watts else None, "served": OwnTime(**served) if served else None}
    return LoadCurve(**made)


def taken_on(curves: Iterable[LoadCurve], cores: int) -> LoadCurve | None:
    """Return the curve that was measured on so many cores, else the one of the whole machine; 0: of the machine.

    The curves are of one variant on one machine.
    """
    by_cores = {curve.cores: curve for curve in curves}
    return by_cores.get(cores) or by_cores.get(0)


def _table(body: Mapping[str, Any]) -> Table:
    return Table(tuple(body["at"]), tuple(body["values"]))
