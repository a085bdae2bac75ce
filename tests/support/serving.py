"""An engine over a device that is a function of tokens alone, and what is needed to hold it against itself."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from llmbuild.runtime.answers import Text
from llmbuild.runtime.detokenize import Decoder, stages
from llmbuild.serve.admission import EXPECTED, WORST_CASE, Expected
from llmbuild.serve.blocks import Names, Tables
from llmbuild.serve.draft import Drafter
from llmbuild.serve.engine import Engine, Limits
from llmbuild.serve.events import Delta, Ended, Event
from llmbuild.serve.request import Request, SamplingParams
from llmbuild.serve.schedule.fair_batching import FairBatching
from llmbuild.serve.schedule.fcfs import Fcfs
from llmbuild.serve.schedule.isrtf import Isrtf
from llmbuild.serve.schedule.state import Scheduler
from llmbuild.serve.schedule.vtc import Vtc
from llmbuild.serve.speculate import Speculation
from llmbuild.serve.step import Output, Rows
from llmbuild.spec.load_curve import Work

VOCABULARY, CONTEXT, END, PAGE = 64, 24, 0, 4
LETTERS = [f"<0x{byte:02X}>" for byte in "aé€😀".encode()]
WORDS = ["", *LETTERS, *(chr(ord("a") + n % 26) * (1 + n // 26) for n in range(VOCABULARY - 1 - len(LETTERS)))]
"""Texts of tokens: the end, bytes of characters of one to four bytes, and letters."""


def logits_of(tokens: Sequence[int]) -> Any:
    """Return f32[V] that any change of the tokens before changes."""
    seed = hashlib.sha256(np.asarray(tokens, np.int64).tobytes()).digest()[:8]
    return np.random.default_rng(int.from_bytes(seed, "big")).normal(0, 2, VOCABULARY).astype(np.float32)


class FakeStep:
    """A device whose blocks hold the tokens that were run there; it refuses what no engine may ask of it."""

    context, vocabulary, ends = CONTEXT, VOCABULARY, (END,)

    drafts = True

    shares = True
    """Whether it knows the beginnings of prompts again."""

    def __init__(
        self,
        slots: int,
        cut: int = 1,
        before: Callable[[Sequence[Rows]], None] = lambda batch: None,
        contexts: int = 0,
    ) -> None:
        self.slots, self.cut, self._before = slots, cut, before
        self.tables = Tables(slots, CONTEXT, PAGE, contexts or slots)
        self.content: list[list[int]] = [[] for _ in range(self.room)]
        self.held: list[list[int]] = [[] for _ in range(slots)]
        self.taken: set[int] = set()
        self.steps = self.found = self.kept = 0
        self.guessed: list[list[int]] = [[] for _ in range(slots)]
        self.forced: dict[int, int] = {}
        """Tokens that follow so many others, whatever these are."""

    @property
    def room(self) -> int:
        """Blocks of the cache."""
        return self.tables.blocks.count

    def takes(self, positions: int) -> int:
        """Return the blocks that so many positions are in."""
        return self.tables.takes(positions)

    def names(self, tokens: Sequence[int], salt: bytes) -> Names:
        """Return the names of the blocks that a prompt fills."""
        return self.tables.names(tokens, salt)

    def known(self, names: Names) -> int:
        """Return how many tokens of a prompt are there."""
        return self.tables.known(names) if self.shares else 0

    def begin(self, slot: int, tokens: Sequence[int], names: Names, salt: bytes) -> int:
        """Give a free slot to a sequence: what is there must be its own prompt."""
        assert slot not in self.taken
        self.taken.add(slot)
        count = self.tables.begin(slot, tokens, names if self.shares else (), salt)
        blocks = self.tables.array[slot, : count // PAGE].tolist()
        self.held[slot] = [token for block in blocks for token in self.content[block]]
        assert self.held[slot] == list(tokens[:count]) and count < len(tokens)
        self.found += count
        return count

    def keep(self, slot: int, tokens: Sequence[int]) -> None:
        """Take drafts as right: they must be the next that were run."""
        assert slot in self.taken and list(tokens) == self.guessed[slot][: len(tokens)]
        del self.guessed[slot][: len(tokens)]
        self.held[slot].extend(tokens)
        self.kept += len(tokens)
        self.tables.computed(slot, tokens)

    def end(self, slot: int) -> None:
        """Free a slot."""
        self.taken.remove(slot)
        self.tables.end(slot)

    def run(self, batch: Sequence[Rows]) -> list[Output]:
        """Run rows; positions must follow on those that are there."""
        self._before(batch)
        self.steps += 1
        assert len({rows.slot for rows in batch}) == len(batch)
        return [self._one(rows) for rows in batch]

    def _one(self, rows: Rows) -> Output:
        assert len(rows.tokens) > 0
        assert rows.start + len(rows.tokens) + len(rows.drafts) <= CONTEXT
        held = self.held[rows.slot]
        assert rows.slot in self.taken and rows.start == len(held)
        self.tables.grow(rows.slot, rows.start + len(rows.tokens) + len(rows.drafts))
        for position, token in enumerate((*rows.tokens, *rows.drafts), rows.start):
            block = int(self.tables.array[rows.slot, position // PAGE])
            assert self.tables.blocks._references[block] == 1, "a block that is written has one owner"
            self.content[block][position % PAGE :] = [token]
        self.tables.computed(rows.slot, rows.tokens)
        held.extend(rows.tokens)
        self.guessed[rows.slot] = list(rows.drafts)
        first, *rest = (self._said([*held, *rows.drafts[:n]], rows.logits) for n in range(len(rows.drafts) + 1))
        return replace(first, drafts=tuple(rest))

    def _said(self, tokens: Sequence[int], logits: bool) -> Output:
        made = logits_of(tokens)
        if len(tokens) in self.forced:
            made[self.forced[len(tokens)]] = 1e3
        return Output(int(made.argmax()), made if logits else None)

    def close(self) -> None:
        """Nothing is held."""


class FakeDraft(FakeStep):
    """A drafter's device: it says what the other device says behind the same tokens, but where `errs` of them is."""

    def __init__(
        self,
        slots: int,
        of: FakeStep,
        errs: Callable[[Sequence[int]], bool] = lambda tokens: False,
        before: Callable[[Sequence[Rows]], None] = lambda batch: None,
        contexts: int = 0,
    ) -> None:
        super().__init__(slots, before=before, contexts=contexts)
        self._of, self._errs = of, errs
        self.rows: list[int] = []
        """Of each step."""

    def run(self, batch: Sequence[Rows]) -> list[Output]:
        """Run tokens that are the sequence's own."""
        self.rows.append(sum(len(rows.tokens) for rows in batch))
        return super().run(batch)

    def ahead(self, batch: Sequence[Rows]) -> list[Output]:
        """Run guesses: each must follow on those before, and none is taken as right."""
        self._before(batch)
        self.steps += 1
        self.rows.append(len(batch))
        return [self._guess(rows) for rows in batch]

    def _guess(self, rows: Rows) -> Output:
        (token,), slot = rows.tokens, rows.slot
        guessed = self.guessed[slot]
        assert slot in self.taken and rows.start == len(self.held[slot]) + len(guessed) < CONTEXT
        self.tables.grow(slot, rows.start + 1)
        block = int(self.tables.array[slot, rows.start // PAGE])
        assert self.tables.blocks._references[block] == 1, "a block that is written has one owner"
        self.content[block][rows.start % PAGE :] = [token]
        guessed.append(token)
        return self._said([*self.held[slot], *guessed], False)

    def _said(self, tokens: Sequence[int], logits: bool) -> Output:
        token = self._of._said(tokens, False).token
        return Output((token + 1) % VOCABULARY if self._errs(tokens) else token)


def text_of(request: Request, ends: frozenset[int]) -> Text:
    """Return the text of an answer."""
    return Text(Decoder(stages({"type": "ByteFallback"}), WORDS.__getitem__), tuple(ends), request.params.stops)


@dataclass(frozen=True)
class PerRow:
    """Seconds of a step: so many for each row. Unlike a function, it is told alike in each process that names tests."""

    seconds: float

    def __call__(self, work: Work) -> float:
        """Return the seconds of a step."""
        return self.seconds * work.rows


ADAPTIVE = (
    FairBatching(PerRow(0.1), 1.0, 0.2, 1, 6),
    FairBatching(PerRow(0.1), 1.0, 0.2, 0, 6),
    Isrtf(2, 1.0, 6, 1),
    Isrtf(2, 0.0, 4, 0),
    Vtc(6, 1),
    Vtc(4, 0),
)
"""Schedulers that may admit in another order than that of the arrivals."""


@dataclass
class Clock:
    """A clock that a test sets."""

    now: float = 0.0

    def __call__(self) -> float:
        """Return the time; no two readings are equal."""
        self.now += 1e-6
        return self.now


@dataclass
class Bench:
    """An engine whose turns a test takes, and what it said."""

    slots: int = 3
    scheduler: Scheduler = Fcfs(prompt_tokens=8)  # noqa: RUF009 - frozen
    limits: Limits = Limits(queue=32)  # noqa: RUF009 - frozen
    cut: int = 1
    observer: Any = None
    contexts: int = 0
    clock: Clock = field(default_factory=Clock)
    speculation: Speculation | None = None
    admission: str = WORST_CASE
    draft: Callable[[FakeStep], Drafter] | None = None
    """Makes what drafts beside the device."""
    events: list[Event] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.step = FakeStep(self.slots, self.cut, contexts=self.contexts)
        if self.draft is not None:
            self.speculation = Speculation(False, drafter=self.draft(self.step))
        self.engine = Engine(
            self.step,
            self.scheduler,
            text_of,
            self.events.extend,
            self.limits,
            self.observer,
            clock=self.clock,
            speculation=self.speculation,
            admission=Expected(self.step.tables) if self.admission == EXPECTED else None,
        )

    def submit(self, name: str, prompt: Sequence[int], seed: int = 0, **params: Any) -> Request:
        """Submit a request."""
        made = request(name, prompt, seed, **params)
        self.engine.submit(made)
        return made

    def settle(self) -> None:
        """Take turns until there is nothing to do."""
        for _ in range(10_000):
            if not self.engine.turn():
                return
        raise AssertionError("the engine does not come to an end")

    def of(self, name: str, index: int = 0) -> list[Event]:
        """Return what was said of a sequence."""
        return [e for e in self.events if (e.request, e.index) == (name, index)]

    def tokens(self, name: str, index: int = 0) -> list[int]:
        """Return the tokens of a sequence."""
        return [e.token for e in self.of(name, index) if isinstance(e, Delta)]

    def text(self, name: str, index: int = 0) -> str:
        """Return the text of a sequence."""
        return "".join(e.text for e in self.of(name, index) if isinstance(e, Delta))

    def ends(self, name: str, index: int = 0) -> list[str]:
        """Return how a sequence ended: once, or there is a fault."""
        found = self.of(name, index)
        faults = [e.fault for e in found if isinstance(e, Ended)]
        return [*faults, *(e.finish.reason for e in found if isinstance(e, Delta) and e.finish)]


def request(name: str, prompt: Sequence[int], seed: int = 0, **params: Any) -> Request:
    """Return a request, greedy unless its parameters say otherwise."""
    deadline, salt = params.pop("deadline_s", None), params.pop("salt", b"")
    more = {name: params.pop(name) for name in ("tenant", "priority", "ttft_s", "tpot_s") if name in params}
    made = SamplingParams.of({"temperature": 0, **params})
    return Request(
        name, tuple(prompt), made, seed if made.seed is None else made.seed, deadline_s=deadline, salt=salt, **more
    )


def alone(made: Request, index: int = 0) -> tuple[list[int], str, list[str]]:
    """Return tokens, text and ends of a sequence that has an engine for itself."""
    bench = Bench(slots=1, limits=Limits(queue=200, deadline_s=1e9))
    bench.engine.submit(made)
    bench.settle()
    return bench.tokens(made.id, index), bench.text(made.id, index), bench.ends(made.id, index)
