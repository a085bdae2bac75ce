"""Cells simulated call by call: batches queue at devices, cross links, and take requests in between.

This judges plans. It shares the seconds of calls with them, and nothing of how they count queues: a call waits for the
device that others keep busy, in the order of arrival.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from llmbuild.fleet.capacity import MEMORY_SHARE, PROMPT_TOKENS
from llmbuild.fleet.operators.cell import IN_FLIGHT, MOST_ROWS, Cell, Phase, moved_s
from llmbuild.fleet.operators.plan import CellPlan, Choice
from llmbuild.fleet.operators.profile import LAYER, Kind
from llmbuild.spec.fleet import NodeClass, RequestClass


class Request(NamedTuple):
    """Seconds of arrival, tokens of the prompt and of the answer."""

    at_s: float
    prompt: int
    output: int


class Answered(NamedTuple):
    """A request, and the seconds at which its first and its last token came."""

    request: Request
    first_s: float
    last_s: float

    def meets(self, kind: RequestClass) -> bool:
        """Return whether it meets its class's SLO."""
        each_s = (self.last_s - self.first_s) / max(1, self.request.output - 1)
        return self.first_s - self.request.at_s <= kind.ttft_s and each_s <= kind.tpot_s


def attained(answered: Sequence[Answered], kind: RequestClass, after_s: float = 0.0) -> float:
    """Return the share of requests that met their SLO, of those that came after so many seconds."""
    judged = [each.meets(kind) for each in answered if each.request.at_s >= after_s]
    return sum(judged) / len(judged) if judged else 1.0


def run(plan: CellPlan, requests: Sequence[Request], node: NodeClass, kind: RequestClass) -> list[Answered]:
    """Return what a plan's cells answer; requests go round its cells, by what each takes.

    `kind` says what lengths are expected: how many batches a cell keeps in flight is decided before.
    """
    cells = [choice for choice, count in plan.cells for _ in range(count)]
    prompts = [choice for choice in cells if choice.phase == "prompt"]
    answers = [choice for choice in cells if choice.phase == "decode"]
    if not prompts:
        return _through(cells, requests, plan.rate, node, kind)
    cell = prompts[0].cell
    begun = _through(prompts, requests, plan.rate, node, kind)
    handed = sorted(((one.last_s + moved_s(cell, one.request.prompt), one) for one in begun), key=lambda each: each[0])
    later = [one.request._replace(at_s=at) for at, one in handed]
    first = {id(request): one for request, (_, one) in zip(later, handed, strict=True)}
    found = []
    for each in _through(answers, later, plan.rate, node, kind):
        one = first[id(each.request)]
        last_s = each.last_s if one.request.output > 1 else one.last_s
        found.append(Answered(one.request, one.last_s, last_s))
    return found


def _through(
    cells: Sequence[Choice], requests: Sequence[Request], rate: float, node: NodeClass, kind: RequestClass
) -> list[Answered]:
    """Return the answers of cells of one phase."""
    parts: list[list[Request]] = [[] for _ in cells]
    owed = [0.0] * len(cells)
    total = sum(choice.takes.rate for choice in cells)
    for request in requests:
        owed = [due + choice.takes.rate / total for due, choice in zip(owed, cells, strict=True)]
        chosen = owed.index(max(owed))
        owed[chosen] -= 1
        parts[chosen].append(request)
    found = []
    for choice, part in zip(cells, parts, strict=True):
        batches = flights(choice.cell, choice.phase, kind, rate * choice.takes.rate / total)
        found += simulate(choice.cell, part, choice.phase, node, batches)
    return found


def flights(cell: Cell, phase: Phase, kind: RequestClass, rate: float) -> int:
    """Return how many batches a cell keeps in flight at a rate."""
    if cell.placement.devices == 1:
        return 1
    if phase == "prompt":
        return IN_FLIGHT
    context, rows = kind.prompt + kind.output / 2, 1.0
    for _ in range(_SETTLED):
        rows = min(rate * kind.output * cell.step_s(max(rows, 1.0), context, phase), float(MOST_ROWS * cell.devices))
    return cell.best(max(rows, 1.0), context, phase)[1]


_SETTLED = 20


def simulate(cell: Cell, requests: Sequence[Request], phase: Phase, node: NodeClass, batches: int) -> list[Answered]:
    """Return how a cell of such devices answers requests in the order of their arrival, in the order of their ends."""
    return _Run(cell, requests, phase, node.memory_bytes * MEMORY_SHARE, batches).answers()


@dataclass
class _Row:
    request: Request
    left: int
    """Tokens of the answer that are to come."""
    seen: int
    first_s: float = 0.0


@dataclass
class _Batch:
    """One of the batches in flight: its rows, the prompts of its step, and where in the step it is."""

    rows: list[_Row] = field(default_factory=list)
    prompts: list[_Row] = field(default_factory=list)
    at: int = 0
    running: int = 0
    """Calls of the present operator that are not done."""
    idle: bool = True


class _Call(NamedTuple):
    batch: int
    seconds: float


class _Run:
    def __init__(self, cell: Cell, requests: Sequence[Request], phase: Phase, room_bytes: float, batches: int) -> None:
        self.cell, self.phase = cell, phase
        self.steps = _calls(cell)
        self.batches = [_Batch() for _ in range(batches)]
        self.kv_tokens = cell.placement.kv_tokens(cell.profile.shape, room_bytes)
        self.prompt_s: dict[tuple[Kind, int], float] = {}
        self.waiting: deque[Request] = deque()
        self.held = 0.0
        self.rows = 0
        self.queues: list[deque[_Call]] = [deque() for _ in range(cell.placement.devices)]
        self.busy = [False] * cell.placement.devices
        self.events: list[tuple[float, int, int, int]] = []
        """Seconds, a number that orders equal ones, a batch (-1: arrivals), and a device (-1: a link was crossed)."""
        self.number = 0
        self.requests = requests
        self.found: list[Answered] = []

    def answers(self) -> list[Answered]:
        coming = 0
        if self.requests:
            self._later(self.requests[0].at_s, -1, -1)
        while self.events:
            now, _, batch, device = heapq.heappop(self.events)
            if batch < 0:
                self.waiting.append(self.requests[coming])
                coming += 1
                if coming < len(self.requests):
                    self._later(self.requests[coming].at_s, -1, -1)
                self._wake(now)
            elif device < 0:
                self._arrive(now, batch)
            else:
                self._done(now, batch, device)
        return self.found

    def _later(self, at: float, batch: int, device: int) -> None:
        self.number += 1
        heapq.heappush(self.events, (at, self.number, batch, device))

    def _wake(self, now: float) -> None:
        """Let idle batches begin."""
        for i, batch in enumerate(self.batches):
            if batch.idle and self.waiting:
                self._begin(now, i)

    def _begin(self, now: float, number: int) -> None:
        """Begin a step: take requests, in the order of their arrival, as far as memory and the prompt budget go."""
        batch = self.batches[number]
        part = math.ceil((self.rows + len(self.waiting)) / len(self.batches))
        tokens = 0
        while self.waiting and (len(batch.rows) + len(batch.prompts) < part or self.phase == "prompt"):
            request = self.waiting[0]
            kept = request.prompt + (0 if self.phase == "prompt" else request.output)
            if self.rows and (self.held + kept > self.kv_tokens or self.rows >= MOST_ROWS * self.cell.devices):
                break
            if self.phase != "decode" and tokens and tokens + request.prompt > PROMPT_TOKENS:
                break
            self.waiting.popleft()
            self.held, self.rows = self.held + kept, self.rows + 1
            row = _Row(request, request.output, request.prompt)
            if self.phase == "decode":
                row.left, row.first_s = row.left - 1, now
                if row.left:
                    batch.rows.append(row)
                else:
                    self._leave(row, now)
            else:
                tokens += request.prompt
                batch.prompts.append(row)
        batch.idle = not (batch.rows or batch.prompts)
        if not batch.idle:
            batch.at = 0
            self._arrive(now, number)

    def _arrive(self, now: float, number: int) -> None:
        """Queue the calls of a batch's present operator."""
        batch = self.batches[number]
        kind, devices, _ = self.steps[batch.at]
        batch.running = len(devices)
        count = len(batch.rows)
        context = sum(row.seen for row in batch.rows) / count if count else 0.0
        prompts = sum(self._prompt_s(kind, row.request.prompt) for row in batch.prompts)
        if count:
            own = [self.cell.call_s(kind, count * share, context) for _, share in devices]
        else:  # prompts alone read the weights too
            own = [self.cell.call_s(kind, 1.0, 1.0) if kind != "attention" else 0.0 for _ in devices]
        for (device, share), seconds in zip(devices, own, strict=True):
            seconds += share * prompts
            self.queues[device].append(_Call(number, seconds))
            if not self.busy[device]:
                self._start(now, device)

    def _prompt_s(self, kind: Kind, tokens: int) -> float:
        """Return the seconds that a prompt adds to an operator; of the head it needs one row."""
        if kind == "head":
            return 0.0
        if (kind, tokens) not in self.prompt_s:
            self.prompt_s[kind, tokens] = tokens * self.cell.prompt_call_s(kind, tokens)
        return self.prompt_s[kind, tokens]

    def _start(self, now: float, device: int) -> None:
        call = self.queues[device].popleft()
        self.busy[device] = True
        self._later(now + call.seconds, call.batch, device)

    def _done(self, now: float, number: int, device: int) -> None:
        self.busy[device] = False
        if self.queues[device]:
            self._start(now, device)
        batch = self.batches[number]
        batch.running -= 1
        if batch.running:
            return
        batch.at += 1
        if batch.at == len(self.steps):
            self._end(now, number)
            return
        to, _, part = self.steps[batch.at]
        if part <= 0:
            self._arrive(now, number)
            return
        rows = len(batch.rows) + sum(row.request.prompt for row in batch.prompts)
        sent = part * rows * self.cell.profile.shape.passed(to)
        self._later(now + self.cell.link.latency_s + sent / self.cell.link.bandwidth, number, -1)

    def _end(self, now: float, number: int) -> None:
        """End a step: every row has a token more, and prompts have their first."""
        batch = self.batches[number]
        kept = []
        for row in batch.rows:
            row.left, row.seen = row.left - 1, row.seen + 1
            if row.left:
                kept.append(row)
            else:
                self._leave(row, now)
        for row in batch.prompts:
            row.first_s, row.left = now, row.left - 1
            if row.left and self.phase != "prompt":
                kept.append(row)
            else:
                self._leave(row, now)
        batch.rows, batch.prompts = kept, []
        self._begin(now, number)
        self._wake(now)

    def _leave(self, row: _Row, now: float) -> None:
        self.rows -= 1
        self.held -= row.request.prompt + (0 if self.phase == "prompt" else row.request.output)
        self.found.append(Answered(row.request, row.first_s, now))


Step = tuple[Kind, tuple[tuple[int, float], ...], float]
"""An operator, the devices that compute it with their shares of rows, and the share of rows that came over a link."""


def _calls(cell: Cell) -> list[Step]:
    """Return the operators of a step in their order."""
    place, of = cell.placement, cell.profile.shape
    spread = tuple((device, share) for device, share in enumerate(place.rows) if share > 0)
    moves = iter(place.moves(of))
    found: list[Step] = []
    for layer in range(of.layers):
        for kind in LAYER:
            part, _ = next(moves)
            owner = place.owner("qkv" if kind == "attention" else kind)[layer]
            found.append((kind, spread if kind == "attention" and spread else ((owner, 1.0),), part))
    found.append(("head", ((place.head, 1.0),), next(moves)[0]))
    return found
