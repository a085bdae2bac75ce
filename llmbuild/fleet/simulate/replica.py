"""A replica: the server's scheduler over sequences whose steps take simulated time.

Where every running sequence decodes and none waits, the scheduler is asked once and its batch is repeated until a
sequence ends or something comes: what it sees changes by nothing but the clock. `stepwise` asks it at each step.

Where a profile comes from a load curve, a step takes what the curve says of its work, prompts beside decoding rows too,
and what the server was measured to take: for the step, for each sequence in it, for a request that comes, which makes
the step that runs longer, and for one that has ended.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import islice

from llmbuild.fleet.capacity import OperatingPoint
from llmbuild.fleet.simulate.meter import Meter
from llmbuild.fleet.simulate.trace import Asked
from llmbuild.serve.cores import Cores
from llmbuild.serve.schedule.state import Batch, Entry, Scheduler, State
from llmbuild.spec.fleet import StepTime
from llmbuild.spec.load_curve import Fit, OwnTime, Work

SEEN = 64
"""Sequences at the front of the queue that a scheduler sees, as in the engine."""
QUEUE = 256
"""Sequences that may wait at a replica, the server's default."""


_NO_TIME = OwnTime(0.0, 0.0, 0.0, 0.0)


class Job:
    """A request on its way. It ends once: finished, rejected or lost."""

    __slots__ = ("ask", "emitted", "ended", "entry", "first_s", "last_s", "pending", "takes")

    def __init__(self, ask: Asked) -> None:
        self.ask = ask
        self.takes = ask.prompt + ask.output
        self.first_s = self.last_s = -1.0
        self.ended = ""
        self.restart()

    def restart(self) -> None:
        """Forget what was computed: it begins anew elsewhere."""
        self.emitted, self.pending = 0, self.ask.prompt
        self.entry = Entry(self.ask.number, self.pending, False, self.ask.at_s)

    @property
    def ttft_s(self) -> float:
        """Return the seconds from arrival to the first token."""
        return self.first_s - self.ask.at_s

    @property
    def tpot_s(self) -> float:
        """Return the seconds between tokens, on average; 0 for a single token."""
        return (self.last_s - self.first_s) / (self.ask.output - 1) if self.ask.output > 1 else 0.0


class Replica:
    """Sequences of one operating point on one slot, and the step that runs.

    One class: as in the engine, sequences, memory and the step change together.
    """

    def __init__(
        self,
        point: OperatingPoint,
        service: int,
        takes: tuple[float, ...],
        scheduler: Scheduler,
        meter: Meter,
        stepwise: bool = False,
    ) -> None:
        self.service, self._scheduler, self._meter, self._stepwise = service, scheduler, meter, stepwise
        self.takes = takes
        """Requests a second by class; 0 where the class's SLO does not hold."""
        self.running: dict[int, Job] = {}
        self.waiting: deque[Job] = deque()
        self.draining = False
        self._context = 0
        """Positions that the decoding rows see together in the next step."""
        self._entries: tuple[Entry, ...] | None = None
        self._idle_since = 0.0
        self._begin_s = 0.0
        self._count = 0
        self._decoding = 0
        self._prompts = 0
        self._one_s = 0.0
        """Seconds of the step that runs, or of the first of a run."""
        self._plain_s = 0.0
        """Those without the prompts in it."""
        self._more_s = 0.0
        """Seconds that requests add to the step."""
        self._ends_s = 0.0
        """Seconds that requests that have ended take still: what follows at once waits for them."""
        self._batch: Batch | None = None
        self._rest_since = -math.inf
        """When the last step ended."""
        self.end_s = math.inf
        """When the step, or the run of steps, ends; infinite while nothing runs."""
        self._next: OperatingPoint | None = None
        self._take_point(point)
        self.kv_tokens = self._free_kv = point.kv_tokens

    def set_clock(self, point: OperatingPoint, now: float) -> None:
        """Take the times and watts of a point with another clock, from the next step on."""
        self.point = self._next = point
        self.interrupt(now)

    def _take_point(self, point: OperatingPoint) -> None:
        self.point, self._next = point, None
        step, power, parked_w = point.step, point.power, point.parked_w
        rows = range(point.batch + 1)
        self._fit, self._own = step.fit, step.own or _NO_TIME
        self._cores = Cores(self._own)
        self._rows_s = [_rows_s(step, r) for r in rows]
        self._context_s, self._prompt_s = step.context_s, step.prompt_s
        self._parked_w = parked_w
        self._rows_w = [max(parked_w, power.rows_w(max(1.0, float(r)))) if power else parked_w for r in rows]
        self._prompt_w = max(parked_w, power.prompt_w) if power else parked_w

    # --- what a router asks ------------------------------------------------------------------------------------------

    @property
    def load(self) -> int:
        """Return the sequences that run or wait."""
        return len(self.running) + len(self.waiting)

    @property
    def idle(self) -> bool:
        """Return whether nothing runs or waits."""
        return not self.running and not self.waiting

    def expected_ttft_s(self, prompt: int, now: float) -> float:
        """Return an estimate of the seconds to the first token of one more prompt: what is before it, and itself."""
        before = sum(job.pending for job in self.waiting) + self._prompts
        slots = self.point.batch - len(self.running) - len(self.waiting)
        step_s = self._rows_s[min(len(self.running), self.point.batch)] + self._context_s * self._context
        wait = 0.0 if slots > 0 else self._turnover_s(step_s) * (1 - slots)
        return wait + 2 * step_s + (before + prompt) * self._prompt_s

    def _turnover_s(self, step_s: float) -> float:
        """Return the mean seconds until one of the running sequences ends."""
        left = [job.ask.output - job.emitted for job in self.running.values()]
        return step_s * sum(left) / len(left) / len(left) if left else 0.0

    # --- sequences ---------------------------------------------------------------------------------------------------

    def take(self, job: Job, now: float) -> None:
        """Queue a job; a run of steps ends with the step that is on its way."""
        self.waiting.append(job)
        self.interrupt(now)
        self._more_s += self._own.request_s
        if self.end_s < math.inf:
            self.end_s = self._ends_at(self._count)
        else:
            self._more_s += self._own.wake_s

    def interrupt(self, now: float) -> None:
        """End a run of steps with the step that is on its way."""
        if self._count > 1:
            count = self._steps_begun(self._cores.work_s(now - self._begin_s))
            if count < self._count:
                self._count = count
                self.end_s = self._ends_at(count)

    def start(self, now: float) -> None:
        """Begin the next step where there is anything to compute."""
        if self.idle or self.end_s < math.inf:
            return
        self._meter.add("parked", self._idle_since, now - self._idle_since, self._parked_w)
        self._cores.rested(now - self._rest_since)
        self._more_s += max(0.0, self._ends_s - (now - self._idle_since))
        self._ends_s = 0.0
        if self._next is not None:
            self._take_point(self._next)
        if self._entries is None:
            self._entries = tuple(job.entry for job in self.running.values())
        fitting = self._fitting()
        waiting = tuple(job.entry for job in islice(self.waiting, SEEN))
        batch = self._scheduler(State(self._entries, waiting, fitting), now)
        prompts = decoding = context = 0
        pieces = list[tuple[int, int]]()
        for number, tokens in batch.shares:
            job = self.running.get(number)
            if job is None:
                job = self._admit(number)
            if job.emitted:
                decoding += 1
                context += job.ask.prompt + job.emitted
            else:
                prompts += tokens
                pieces.append((job.ask.prompt - job.pending, tokens))
        self._batch, self._decoding, self._prompts, self._context = batch, decoding, prompts, context
        self._begin_s, self._count = now, 1
        self._plain_s = self._rows_s[decoding] + self._context_s * context
        self._one_s = self._plain_s + self._prompt_s * prompts
        if pieces and self._fit is not None:
            self._one_s = _mixed_s(self._fit, self._own, decoding, context, pieces)
        if not self._stepwise and not prompts and not self.waiting and decoding == len(self.running):
            self._count = min(job.ask.output - job.emitted for job in self.running.values())
        self.end_s = self._ends_at(self._count)

    def _fitting(self) -> int:
        """Return how many of the front of the queue may be admitted: a slot for each, and memory to its end."""
        room, count = self._free_kv, 0
        for job in islice(self.waiting, self.point.batch - len(self.running)):
            if job.takes > room:
                break
            room -= job.takes
            count += 1
        return count

    def _admit(self, number: int) -> Job:
        if self.waiting and self.waiting[0].ask.number == number:
            job = self.waiting.popleft()
        else:
            job = next(each for each in self.waiting if each.ask.number == number)
            self.waiting.remove(job)
        self.running[number] = job
        self._free_kv -= job.takes
        self._entries = None
        return job

    def _ends_at(self, count: int) -> float:
        """Return when so many steps of the run end."""
        return self._begin_s + self._cores.wall_s(self._run_s(count))

    def _run_s(self, count: int) -> float:
        """Return the seconds of so many steps at full speed: each row sees one more position in each."""
        seen = self._decoding * (count * (count - 1) // 2)
        return self._more_s + count * self._one_s + self._context_s * seen

    def _steps_begun(self, passed_s: float) -> int:
        """Return how many steps of the run have begun after so many seconds at full speed."""
        one, more = self._one_s, self._context_s * self._decoding
        passed_s = max(0.0, passed_s - self._more_s)
        if more > 0:
            half = one - more / 2
            count = int((math.sqrt(half * half + 2 * more * passed_s) - half) / more)
        else:
            count = int(passed_s / one)
        count = min(max(count, 0), self._count)
        while count < self._count and self._run_s(count) - self._more_s <= passed_s:
            count += 1
        return max(1, count)

    def finish(self) -> list[Job]:
        """End the step or run that is due, and return the jobs that ended with it."""
        assert self._batch is not None
        now, count, done = self.end_s, self._count, list[Job]()
        self._measure(now - self._begin_s)
        self._cores.worked(now - self._begin_s)
        if count > 1 or (not self._prompts and self._decoding == len(self.running)):
            for job in self.running.values():
                job.emitted += count
                job.last_s = now
                if job.emitted >= job.ask.output:
                    done.append(job)
        else:
            self._finish_step(now, done)
        for job in done:
            job.ended = "finished"
            del self.running[job.ask.number]
            self._free_kv += job.takes
        if done:
            self._entries = None
        self.end_s, self._count, self._prompts, self._batch = math.inf, 0, 0, None
        self._idle_since = self._rest_since = now
        self._more_s, self._ends_s = 0.0, self._own.end_s * len(done)
        return done

    def _finish_step(self, now: float, done: list[Job]) -> None:
        """Apply one step with prompts in it."""
        assert self._batch is not None
        for number, tokens in self._batch.shares:
            job = self.running[number]
            if job.emitted:
                job.emitted += 1
            elif tokens < job.pending:
                job.pending -= tokens
                job.entry = job.entry._replace(pending=job.pending)
                self._entries = None
                continue
            else:
                job.pending, job.emitted, job.first_s = 1, 1, now
                job.entry = Entry(number, 1, True, job.ask.at_s)
                self._entries = None
            job.last_s = now
            if job.emitted >= job.ask.output:
                done.append(job)

    def _measure(self, wall_s: float) -> None:
        prompt_s = min(wall_s, max(0.0, self._one_s - self._plain_s)) if self._prompts else 0.0
        decode_s = wall_s - prompt_s
        if self._decoding:
            self._meter.add("decode", self._begin_s, decode_s, self._rows_w[self._decoding])
            self._meter.add("prompt", self._begin_s + decode_s, prompt_s, self._prompt_w)
        else:
            self._meter.add("prompt", self._begin_s, decode_s + prompt_s, self._prompt_w)

    # --- its ends ----------------------------------------------------------------------------------------------------

    def ready(self, now: float) -> None:
        """Begin to wait for sequences."""
        self._idle_since = now

    def settle(self, now: float) -> None:
        """Count the time up to now, in which nothing ran, as parked."""
        if self.end_s == math.inf:
            self._meter.add("parked", self._idle_since, now - self._idle_since, self._parked_w)
            self._idle_since = now

    def abandon(self, now: float) -> Iterator[Job]:
        """Yield all its jobs: the node has gone. What runs is counted up to now."""
        if self.end_s < math.inf:
            whole = self.end_s - self._begin_s
            share = min(1.0, (now - self._begin_s) / whole) if whole else 0.0
            watts = self._rows_w[self._decoding] if self._decoding else self._prompt_w
            self._meter.add("decode" if self._decoding else "prompt", self._begin_s, share * whole, watts)
            self.end_s, self._count = math.inf, 0
        else:
            self.settle(now)
        self._more_s = self._ends_s = 0.0
        self._idle_since = now
        jobs = [*self.running.values(), *self.waiting]
        self.running.clear()
        self.waiting.clear()
        self._entries, self._free_kv = None, self.kv_tokens
        yield from jobs


def _rows_s(step: StepTime, rows: int) -> float:
    """Return the seconds of a step of so many decoding rows at no context."""
    if step.fit is None or step.own is None:
        return max(step.rows_s(float(rows)), 0.0)
    return (step.fit.seconds(Work(decodes=rows)) if rows else 0.0) + step.own.seconds(rows)


def _mixed_s(fit: Fit, own: OwnTime, decoding: int, context: int, pieces: Iterable[tuple[int, int]]) -> float:
    """Return the seconds of a step with pieces of prompts: the position of the first token of each, and their count."""
    work = Work(decodes=decoding, context=context)
    for start, tokens in pieces:
        work = work.add(start, tokens)
    return fit.seconds(work) + own.seconds(work.reads)


Router = Callable[[list[Replica], Job, float], Replica | None]
"""Chooses a replica for a job among those that are ready and serve its class; None: it is rejected."""
