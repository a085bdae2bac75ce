"""The engine: admit, schedule, preempt, step, sample, emit. One thread owns every sequence and every slot."""

from __future__ import annotations

import heapq
import threading
from bisect import insort
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from time import monotonic

from llmbuild.errors import InputError
from llmbuild.runtime.answers import Text
from llmbuild.serve.admission import Admission, WorstCase
from llmbuild.serve.choose import Chooser
from llmbuild.serve.errors import CONTEXT_EXCEEDED, RequestRefused
from llmbuild.serve.events import Delta, Ended, Event, Fault, Outlet
from llmbuild.serve.inbox import Inbox, Phase
from llmbuild.serve.lengths import AGAIN, History, Lengths
from llmbuild.serve.observe import Lived, Observer, Snapshot, Turned
from llmbuild.serve.request import Request
from llmbuild.serve.schedule.state import SEEN, Batch, Scheduler, Share, State
from llmbuild.serve.schedule.vtc import Accounts
from llmbuild.serve.sequence import Sequence
from llmbuild.serve.speculate import Asked, Speculation
from llmbuild.serve.step import Output, Rows, Step

Texts = Callable[[Request, frozenset[int]], Text]
"""Makes what turns tokens into text; the tokens given are those that end the answer, and are no text."""

_SPARE = 64
"""Deadlines of ended sequences that are kept before they are cleared away."""


@dataclass(frozen=True)
class Limits:
    """Bounds of what an engine holds: sequences that wait, and seconds from a request's arrival to its end."""

    queue: int = 256
    deadline_s: float = 600.0


class Engine:
    """Answers requests with one device, several sequences at a time.

    `check`, `submit`, `cancel`, `drain`, `close` and `snapshot` are for any thread; `turn` and `run` for one. Every
    sequence that was submitted ends once: with a `Delta` that has a finish, or an `Ended`. One class: its sequences,
    slots and queue change together, in one thread.
    """

    def __init__(
        self,
        step: Step,
        scheduler: Scheduler,
        texts: Texts,
        outlet: Outlet,
        limits: Limits = Limits(),
        observer: Observer | None = None,
        lengths: Lengths | None = None,
        clock: Callable[[], float] = monotonic,
        speculation: Speculation | None = None,
        admission: Admission | None = None,
    ) -> None:
        self._step, self._scheduler, self._texts, self._outlet = step, scheduler, texts, outlet
        self.limits, self._observer, self._clock = limits, observer or Observer(), clock
        self._lengths, self._accounts, self._speculation = lengths or History(), Accounts(), speculation
        self._inbox = Inbox(limits.queue)
        self._free = list(range(step.slots))
        self._admission = admission or WorstCase(step)
        self._running: dict[int, Sequence] = {}
        self._waiting: list[Sequence] = []
        """In their order: by priority, then by arrival."""
        self._by_request: dict[str, list[Sequence]] = {}
        self._deadlines: list[tuple[float, int, Sequence]] = []
        self._events: list[Event] = []
        self._arrived = 0
        self._last_step_s = self._last_end_s = clock()
        self._step_s = self._draft_s = 0.0
        self._thread: threading.Thread | None = None

    # --- for any thread ----------------------------------------------------------------------------------------------

    def submit(self, request: Request) -> None:
        """Queue a request; its events come by the outlet.

        Raises:
            RequestRefused: it can never be answered.
            QueueFull, Unavailable: it cannot be taken now.
        """
        self.check(request)
        now, params = self._clock(), request.params
        limit = self.limits.deadline_s
        late_s = now + (limit if request.deadline_s is None else min(limit, request.deadline_s))
        own = () if params.ignore_eos else (*self._step.ends, *request.ends)
        ends = frozenset((*own, *params.stop_tokens))
        names = self._step.names(request.prompt, request.salt)
        takes = self._takes(request)
        made = ((self._texts(request, ends), Chooser(request, i, sorted(ends))) for i in range(params.n))
        self._inbox.put(
            [
                Sequence(request, i, text, chooser, ends, now, late_s, names, takes, takes)
                for i, (text, chooser) in enumerate(made)
            ]
        )

    def check(self, request: Request) -> None:
        """Refuse what can never be answered.

        Raises:
            RequestRefused: the prompt is empty, too long, or names no tokens of the model.
        """
        count, context, vocabulary = len(request.prompt), self._step.context, self._step.vocabulary
        if not count:
            raise RequestRefused("the prompt is empty: give at least one token", "prompt")
        if count > context:
            told = f"the prompt has {count} tokens; the context of this model is {context} tokens"
            raise RequestRefused(told, "prompt", CONTEXT_EXCEEDED)
        if (takes := self._takes(request)) > self._step.room:
            told = f"the prompt and its answer take up to {takes} blocks of memory; this server has {self._step.room}"
            raise RequestRefused(told, "max_tokens")
        named = {"prompt": request.prompt, "stop_token_ids": request.params.stop_tokens}
        for name, tokens in {**named, "logit_bias": tuple(request.params.biases)}.items():
            if tokens and not 0 <= min(tokens) <= max(tokens) < vocabulary:
                wrong = next(token for token in tokens if not 0 <= token < vocabulary)
                raise RequestRefused(f"{name}: token {wrong} is outside the vocabulary of {vocabulary}", name)

    def _takes(self, request: Request) -> int:
        """Return what a sequence takes of the device's memory at most: its last token is never computed."""
        most, context = request.params.max_tokens, self._step.context
        return self._step.takes(context if most is None else min(context, len(request.prompt) + most - 1))

    def cancel(self, request: str) -> None:
        """End all sequences of a request before the next step, whatever they do."""
        self._inbox.cancel(request)

    def snapshot(self) -> Snapshot:
        """Return how much there is to do, and whether the engine does it."""
        with self._inbox.changed:
            busy = self._inbox.alive > 0
            running, waiting = self._inbox.alive - self._inbox.queued, self._inbox.queued
            idle = self._clock() - max(self._last_step_s, self._inbox.busy_s) if busy else 0.0
            used = self._admission.used
            slots, fault = self._step.slots, self._inbox.fault
            return Snapshot(running, waiting, slots, idle, fault, self._inbox.phase == "open", used)

    def start(self, name: str = "engine") -> None:
        """Run in a thread until `close`."""
        self._thread = threading.Thread(target=self.run, name=name, daemon=True)
        self._thread.start()

    def drain(self, timeout_s: float) -> bool:
        """Take no more requests, and wait until those that were taken have ended; return whether they have."""
        self._set("draining")
        with self._inbox.changed:
            return self._inbox.changed.wait_for(lambda: not self._inbox.alive, timeout_s)

    def close(self) -> None:
        """End what is left, and the thread; the device is the caller's to close."""
        self._set("closed")
        if self._thread is not None:
            self._thread.join()

    # --- the engine's thread -----------------------------------------------------------------------------------------

    def run(self) -> None:
        """Take turns until `close`, and sleep while there is nothing to do.

        What a turn says is told while the device runs the next step: who takes it may need this thread's interpreter.
        """
        while self._wait():
            self._turn()
            if not self._running and not self._waiting:
                self._emit()
        self._end_all("closed", "the server is shutting down")
        self._emit()

    def turn(self) -> bool:
        """Run one step where there is anything to run, tell what came of it, and return whether there was."""
        ran = self._turn()
        self._emit()
        return ran

    def _turn(self) -> bool:
        """Run one step where there is anything to run, and return whether there was; what came of it is to be told.

        A fault of the device or the scheduler ends every sequence, and the engine: what the device holds is unknown.
        """
        begun = self._clock()
        try:
            for one in self._admit():
                self._foresee(one)
            batch = self._spared()
            if batch.shares:
                rows = self._rows(batch)
                self._sample(batch, rows, self._run(rows), begun)
        except Exception as error:  # noqa: BLE001 - whatever it is, clients must be told, and none may wait for ever
            batch = Batch()
            self._fail(f"{type(error).__name__}: {error}")
        return bool(batch.shares)

    def _wait(self) -> bool:
        """Wait for something to do; return whether the engine goes on."""
        inbox = self._inbox
        with inbox.changed:
            while inbox.phase != "closed" and not (inbox.arrivals or inbox.cancelled):
                if self._running or self._waiting:
                    break
                inbox.changed.wait()
            return inbox.phase != "closed"

    def _admit(self) -> list[Sequence]:
        """Take what came, and return it: requests go to the end of the queue, cancelled and late ones leave."""
        arrivals, cancelled = self._inbox.taken()
        for one in arrivals:
            self._queue(one)
        for name in cancelled:
            for one in tuple(self._by_request.get(name, ())):
                self._give_up(one, "cancelled", "the client has gone")
        now = self._clock()
        while self._deadlines and (self._deadlines[0][0] <= now or self._deadlines[0][2].ended):
            one = heapq.heappop(self._deadlines)[2]
            if not one.ended:
                told = f"the answer took longer than {one.deadline_s - one.arrival_s:g} s"
                self._give_up(one, "deadline", told)
        return arrivals

    def _foresee(self, one: Sequence) -> None:
        """Note what is expected of a sequence; it is in the queue, so it is told if this fails."""
        if self._speculation is not None:
            forced = None if one.request.grammar is None else one.chooser.forced
            one.guesses = self._speculation.of(one.request.prompt, forced, one.request.salt)
        one.predicted = self._lengths.predict(one.request, 0)

    def _foresee_again(self, tenant: str) -> None:
        """Note what an answer that has ended tells of those to the same tenant of which nothing was known."""
        for one in (*self._running.values(), *islice(self._waiting, SEEN)):
            if one.predicted is None and one.request.tenant == tenant:
                one.predicted = self._lengths.predict(one.request, len(one.tokens))

    def _queue(self, one: Sequence) -> None:
        self._arrived += 1
        one.number = self._arrived
        self._accounts.arrived(one.request.tenant)
        insort(self._waiting, one, key=lambda each: each.order)
        self._by_request.setdefault(one.request.id, []).append(one)
        heapq.heappush(self._deadlines, (one.deadline_s, one.number, one))

    def _schedule(self) -> Batch:
        """Return the rows of the next step; sequences that it admits have slots."""
        if not self._running and not self._waiting:
            return Batch()
        running = tuple(one.entry() for one in self._running.values())
        front = {one.number: one for one in islice(self._waiting, SEEN)}
        slots, room = len(self._free), self._admission.room(self._running.values())
        if slots:
            for one in front.values():
                one.computed, one.takes = self._step.known(one.names), self._admission.takes(one)
        waiting = tuple(one.entry() for one in front.values())
        now = self._clock()
        batch = self._scheduler(State(running, waiting, self._fitting(room), slots, room, self._accounts.served), now)
        if not batch.shares:
            raise RuntimeError("the scheduler gives no batch, and there are sequences")
        admitted = [front[share.number] for share in batch.shares if share.number not in self._running]
        if len(admitted) > slots or sum(one.takes for one in admitted) > room:
            raise RuntimeError("the scheduler admits more than fits")
        for one in admitted:
            self._begin(one, now)
        if admitted:
            self._inbox.admitted(len(admitted))
        return batch

    def _begin(self, one: Sequence, now: float) -> None:
        """Give a sequence a slot. What it computes again after a preemption is told and charged once."""
        self._waiting.remove(one)
        one.slot = self._free.pop()
        found = self._step.begin(one.slot, one.so_far, one.names, one.request.salt)
        assert found == one.computed, "what is known stays there until it is taken"
        self._admission.begun(one)
        self._running[one.number] = one
        if one.admitted_s is None:
            one.admitted_s, one.cached = now, found
            self._accounts.prompt(one.request.tenant, len(one.request.prompt) - found)
            self._observer.admitted(len(one.request.prompt), found)

    def _fitting(self, room: int) -> int:
        """Return how many sequences at the front of the queue may be admitted together: there is a slot for each, and
        memory for what they and those before are to find.
        """
        count = 0
        for one in islice(self._waiting, len(self._free)):
            if one.takes > room:
                break
            count, room = count + 1, room - one.takes
        return count

    def _spared(self) -> Batch:
        """Return a batch for whose rows there is memory. Where it is short, the last of all that run, by priority and
        arrival, are preempted one after another, in the batch or not.

        So nobody is preempted for a later one, and the first never: alone it takes no more than there is.
        """
        while (batch := self._schedule()).shares:
            shares = batch.shares
            while self._admission.lacks(self._grown(share) for share in shares):
                last = max(self._running.values(), key=lambda one: one.order)
                assert len(self._running) > 1, "one sequence has room in the empty memory"
                self._preempt(last)
                shares = tuple(share for share in shares if share.number != last.number)
            if shares:
                return Batch(shares)
        return batch

    def _grown(self, share: Share) -> tuple[int, int]:
        """Return the slot of a sequence, and the positions that it has after its share."""
        one = self._running[share.number]
        assert one.slot is not None
        return one.slot, one.computed + share.tokens

    def _preempt(self, one: Sequence) -> None:
        """Take a sequence's slot and blocks. It waits in its place by its order, and its tokens are computed again."""
        self._release(one)
        one.slot, one.computed = None, 0
        one.names = self._step.names(one.so_far, one.request.salt)
        insort(self._waiting, one, key=lambda each: each.order)
        self._inbox.preempted()
        self._observer.preempted()

    def _release(self, one: Sequence) -> None:
        """Free what a sequence that runs holds."""
        assert one.slot is not None
        del self._running[one.number]
        self._step.end(one.slot)
        if one.guesses is not None:
            one.guesses.released()
        self._admission.ended(one)
        self._free.append(one.slot)

    def _rows(self, batch: Batch) -> list[Rows]:
        """Return the rows of a batch; where all of it decodes and nobody waits, sequences may have drafts, as far as
        there is memory.
        """
        self._draft_s, context = 0.0, self._step.context
        ones = [self._running[share.number] for share in batch.shares]
        plain = [one.rows(share.tokens) for one, share in zip(ones, batch.shares, strict=True)]
        guessing = any(one.guesses is not None for one in ones) and all(one.decoding for one in ones)
        if self._speculation is None or self._waiting or not guessing:
            return plain
        asked = [Asked(one.guesses, one.most_drafts(context), one.left(context)) for one in ones]
        before_s = self._speculation.spent_s
        drafts = self._speculation.drafts(asked)
        self._draft_s = self._speculation.spent_s - before_s
        if not any(drafts):
            return plain
        guessed = [one.rows(1, drafts) for one, drafts in zip(ones, drafts, strict=True)]
        lacks = self._admission.lacks((rows.slot, rows.start + 1 + len(rows.drafts)) for rows in guessed)
        return plain if lacks else guessed

    def _run(self, rows: list[Rows]) -> list[Output]:
        """Run the rows on the device, and tell what came of the step before."""
        self._emit()
        begun = self._clock()
        outputs = list(self._step.run(rows))
        self._last_step_s = self._clock()
        self._step_s = self._last_step_s - begun
        return outputs

    def _sample(self, batch: Batch, rows: list[Rows], outputs: list[Output], begun: float) -> None:
        """Choose a token for each sequence whose tokens are all computed, and go on behind drafts that are right."""
        computed = prompt_tokens = chosen = drafts = right = 0
        now = self._last_step_s
        for share, asked, output in zip(batch.shares, rows, outputs, strict=True):
            one = self._running[share.number]
            computed += share.tokens + len(asked.drafts)
            prompt_tokens += 0 if one.decoding else share.tokens
            whole = one.pending == share.tokens
            one.computed += share.tokens
            if whole:
                chosen += 1
                self._take(one, output, now)
                drafts, right = drafts + len(asked.drafts), right + self._verify(one, asked, output, now)
        if self._speculation is not None and not prompt_tokens:
            self._speculation.took(computed, self._step_s)
        turn_s, chosen = self._clock() - begun, chosen + right
        done = Turned(len(outputs), computed, prompt_tokens, chosen, self._step_s, turn_s, drafts, right, self._draft_s)
        self._observer.turned(done)

    def _verify(self, one: Sequence, asked: Rows, output: Output, now: float) -> int:
        """Keep the drafts of a sequence that are its tokens, choose behind each of them, and return their number."""
        right, tried = 0, 0
        for draft, behind in zip(asked.drafts, output.drafts, strict=True):
            if one.ended:
                break
            tried += 1
            if one.tokens[-1] != draft:
                break
            right += 1
            self._step.keep(asked.slot, (draft,))
            one.computed += 1
            self._take(one, behind, now)
        if one.guesses is not None:
            one.guesses.judged(right, tried)
        return right

    def _take(self, one: Sequence, output: Output, now: float) -> None:
        """Choose a sequence's next token; a fault in it ends this sequence alone."""
        try:
            delta = one.take(output, self._step.context)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is of this sequence alone
            bug = f"the server has made an error: {type(error).__name__}"
            self._give_up(one, "engine", str(error) if isinstance(error, InputError) else bug)
            return
        if len(one.tokens) == 1:
            one.first_s = now
            self._observer.first(now - one.arrival_s)
        else:
            self._observer.gap(now - one.last_s)
        one.last_s = now
        self._accounts.token(one.request.tenant)
        if not len(one.tokens) % AGAIN:
            one.predicted = self._lengths.predict(one.request, len(one.tokens))
        self._events.append(delta)
        if delta.finish is not None:
            self._end(one, delta)

    def _emit(self) -> None:
        """Tell what happened in this turn."""
        if self._events:
            events, self._events = self._events, []
            self._outlet(events)

    # --- ends --------------------------------------------------------------------------------------------------------

    def _give_up(self, one: Sequence, fault: Fault, why: str) -> None:
        self._events.append(Ended(one.request.id, one.index, fault, why))
        self._end(one, None)

    def _end(self, one: Sequence, last: Delta | None) -> None:
        """Free what a sequence holds; it must not have ended before."""
        assert not one.ended, f"sequence {one.number} ends twice"
        one.ended = True
        self._accounts.ended(one.request.tenant)
        if last is not None and last.finish is not None:
            self._lengths.learn(one.request, len(one.tokens))
            self._foresee_again(one.request.tenant)
        siblings = self._by_request[one.request.id]
        siblings.remove(one)
        if not siblings:
            del self._by_request[one.request.id]
        queued = one.slot is None
        if queued:
            self._waiting.remove(one)
        else:
            self._release(one)
        if len(self._deadlines) > _SPARE + 4 * (len(self._running) + len(self._waiting)):
            self._deadlines = [late for late in self._deadlines if not late[2].ended]
            heapq.heapify(self._deadlines)
        now = self._clock()
        self._inbox.ended(int(queued), int(not queued), now - self._last_end_s)
        self._last_end_s = now
        self._observer.lived(_lived(one, last, now))

    def _end_all(self, fault: Fault, why: str) -> None:
        self._admit()
        for one in (*self._running.values(), *self._waiting):
            self._give_up(one, fault, why)

    def _fail(self, why: str) -> None:
        """End everything, and take nothing more."""
        self._inbox.set("closed", why)
        self._end_all("engine", f"the engine has failed: {why}")

    def _set(self, phase: Phase) -> None:
        self._inbox.set(phase)


def _lived(one: Sequence, last: Delta | None, now: float) -> Lived:
    reason = last.finish.reason if last is not None and last.finish is not None else "abort"
    first, latest = (one.first_s, one.last_s) if one.tokens else (None, None)
    return Lived(len(one.request.prompt), len(one.tokens), reason, one.arrival_s, one.admitted_s, first, latest, now)
