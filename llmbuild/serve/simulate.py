"""Requests through a scheduler on a simulated clock: the steps take what a load curve says.

The scheduler is the one that a server runs, and admission is the engine's: in the order of arrival, as far as there are
slots, and memory for all that a sequence may take. Nothing here is random, and nothing needs a library.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

from llmbuild.serve.cores import Cores
from llmbuild.serve.lengths import AGAIN
from llmbuild.serve.schedule.state import SEEN, Batch, Entry, Scheduler, State
from llmbuild.serve.schedule.vtc import Accounts
from llmbuild.spec.load_curve import OwnTime, Work

StepTime = Callable[[Work], float]
"""Seconds of a step."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request: when it comes, the tokens of its prompt and of its answer, and what schedulers see of it."""

    arrival_s: float
    prompt: int
    output: int
    tenant: str = ""
    priority: int = 0
    ttft_s: float | None = None
    tpot_s: float | None = None
    predicted: float | None = None
    """How many tokens its answer is expected to have."""


class Expects(Protocol):
    """Predicts the lengths of simulated answers: asked when the engine asks, and told of ends as the engine tells."""

    def predict(self, asked: Arrival, tokens: int) -> float | None:
        """Return how many tokens an answer is expected to have in all when it has `tokens`; None where unknown."""

    def learn(self, asked: Arrival, tokens: int) -> None:
        """Take an answer that has ended after so many tokens."""


@dataclass(frozen=True)
class Host:
    """What a server has: slots, blocks of keys and values of `page` positions, and the context."""

    slots: int
    blocks: int
    page: int
    context: int

    def takes(self, one: Arrival) -> int:
        """Return the blocks that a request takes at most."""
        return -(-min(self.context, one.prompt + one.output - 1) // self.page)


@dataclass(slots=True)
class Life:
    """A request on its way, and its times."""

    number: int
    asked: Arrival
    takes: int
    computed: int = 0
    tokens: int = 0
    admitted_s: float = -1.0
    first_s: float = -1.0
    end_s: float = -1.0
    predicted: float | None = None

    @property
    def ttft_s(self) -> float:
        """Seconds from its arrival to its first token."""
        return self.first_s - self.asked.arrival_s

    @property
    def tpot_s(self) -> float | None:
        """Seconds for each token after the first; None of an answer of one token."""
        return (self.end_s - self.first_s) / (self.tokens - 1) if self.tokens > 1 else None

    @property
    def e2e_s(self) -> float:
        """Seconds from its arrival to its last token."""
        return self.end_s - self.asked.arrival_s

    @property
    def pending(self) -> int:
        """Tokens to compute before its next one can be chosen."""
        return 1 if self.tokens else self.asked.prompt - self.computed

    def entry(self) -> Entry:
        """Return what a scheduler sees."""
        asked = self.asked
        return Entry(
            self.number,
            self.pending,
            bool(self.tokens),
            asked.arrival_s,
            self.computed,
            self.tokens,
            asked.prompt,
            asked.tenant,
            asked.priority,
            asked.ttft_s,
            asked.tpot_s,
            self.predicted,
            self.takes,
        )


@dataclass(frozen=True)
class Simulated:
    """The requests in the order of their arrival, and how the server spent its time."""

    lives: tuple[Life, ...]
    waiting: tuple[int, ...]
    """How many sequences waited without a slot when each request came."""
    steps: int
    busy_s: float
    end_s: float
    outside: int
    """Steps that are larger than those that were measured."""


class _Server:
    """The state of one simulated server."""

    def __init__(self, scheduler: Scheduler, host: Host, lengths: Expects | None) -> None:
        self.scheduler, self.host, self.lengths = scheduler, host, lengths
        self.running: dict[int, Life] = {}
        self.waiting: list[Life] = []
        self.reserved = 0
        self.accounts = Accounts()

    def queue(self, one: Life) -> None:
        """Take a request that has come."""
        self.accounts.arrived(one.asked.tenant)
        one.predicted = one.asked.predicted if self.lengths is None else self.lengths.predict(one.asked, 0)
        insort(self.waiting, one, key=lambda each: (each.asked.priority, each.number))

    def batch(self, now: float) -> Batch:
        """Ask the scheduler, and admit what it takes."""
        front = {one.number: one for one in islice(self.waiting, SEEN)}
        state = State(
            tuple(one.entry() for one in self.running.values()),
            tuple(one.entry() for one in front.values()),
            self._fitting(),
            self.host.slots - len(self.running),
            self.host.blocks - self.reserved,
            self.accounts.served,
        )
        batch = self.scheduler(state, now)
        for share in batch.shares:
            if share.number not in self.running:
                one = front[share.number]
                self.waiting.remove(one)
                assert len(self.running) < self.host.slots and one.takes <= self.host.blocks - self.reserved
                one.admitted_s, self.running[one.number] = now, one
                self.reserved += one.takes
                self.accounts.prompt(one.asked.tenant, one.asked.prompt)
        return batch

    def _fitting(self) -> int:
        """Return how many sequences at the front of the queue fit."""
        room, count = self.host.blocks - self.reserved, 0
        for one in islice(self.waiting, self.host.slots - len(self.running)):
            if one.takes > room:
                break
            room, count = room - one.takes, count + 1
        return count

    def work(self, batch: Batch) -> Work:
        """Return what a batch computes."""
        running = self.running
        return Work.of((_position(running[share.number]), share.tokens) for share in batch.shares)

    def ran(self, batch: Batch, now: float) -> None:
        """Take a step that has ended."""
        for number, count in batch.shares:
            one = self.running[number]
            whole = count == one.pending
            if not one.tokens:
                one.computed += count
            if whole:
                one.tokens += 1
                self.accounts.token(one.asked.tenant)
                if one.tokens == 1:
                    one.first_s = now
                if self.lengths is not None and not one.tokens % AGAIN:
                    one.predicted = self.lengths.predict(one.asked, one.tokens)
                if one.tokens == one.asked.output:
                    self._end(one, now)

    def _end(self, one: Life, now: float) -> None:
        """Free what an answer that has ended holds, and learn of it, as the engine does."""
        one.end_s = now
        self.reserved -= one.takes
        self.accounts.ended(one.asked.tenant)
        del self.running[one.number]
        if self.lengths is None:
            return
        self.lengths.learn(one.asked, one.tokens)
        for other in (*self.running.values(), *islice(self.waiting, SEEN)):
            if other.predicted is None and other.asked.tenant == one.asked.tenant:
                other.predicted = self.lengths.predict(other.asked, other.tokens)


def _position(one: Life) -> int:
    """Return the position of the next token that is computed."""
    return one.asked.prompt + one.tokens - 1 if one.tokens else one.computed


def simulate(
    arrivals: Sequence[Arrival],
    scheduler: Scheduler,
    host: Host,
    step_s: StepTime,
    covers: Callable[[Work], bool] = lambda work: True,
    lengths: Expects | None = None,
    request_s: float = 0.0,
    cores: Cores | None = None,
) -> Simulated:
    """Run requests, in the order of their arrival, to their ends.

    Schedulers are told what `lengths` says of answers, or else what the requests say. Each request takes `request_s` of
    the server's time, which lengthens the next step. `cores` are slow after rests; None: never.

    Raises:
        ValueError: a request does not fit in an empty server.
    """
    lives = tuple(Life(i, one, host.takes(one)) for i, one in enumerate(arrivals, 1))
    for one in lives:
        if one.takes > host.blocks or one.asked.prompt > host.context:
            raise ValueError(f"a request of {one.asked.prompt} + {one.asked.output} tokens does not fit")
    server, coming = _Server(scheduler, host, lengths), deque(lives)
    cores = cores or Cores(OwnTime(0.0, 0.0, 0.0, 0.0))
    now = busy = 0.0
    steps = outside = 0
    seen: list[int] = []
    while coming or server.running or server.waiting:
        if not (server.running or server.waiting):
            came_s = max(now, coming[0].asked.arrival_s)
            cores.rested(came_s - now)
            now = came_s
        came = 0
        while coming and coming[0].asked.arrival_s <= now:
            came += 1
            seen.append(len(server.waiting))
            server.queue(coming.popleft())
        batch = server.batch(now)
        work = server.work(batch)
        took = cores.wall_s(step_s(work) + request_s * came)
        cores.worked(took)
        steps, outside, busy = steps + 1, outside + (not covers(work)), busy + took
        now += took
        server.ran(batch, now)
    return Simulated(lives, tuple(seen), steps, busy, now, outside)
