"""A model that is served: an opened variant, its step and its engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from llmbuild.errors import InputError
from llmbuild.runtime.answers import Text
from llmbuild.runtime.chat import Message
from llmbuild.runtime.model import Model
from llmbuild.runtime.session import Session
from llmbuild.serve import budget
from llmbuild.serve.admission import EXPECTED, WORST_CASE, Admission, Expected, WorstCase
from llmbuild.serve.budget import Need
from llmbuild.serve.draft import Drafter
from llmbuild.serve.draft_model import check_draft
from llmbuild.serve.engine import Engine, Limits
from llmbuild.serve.errors import RequestRefused
from llmbuild.serve.events import Outlet
from llmbuild.serve.grammar import Grammars
from llmbuild.serve.lengths import History, Lengths
from llmbuild.serve.observe import Observer
from llmbuild.serve.per_sequence import PerSequenceStep
from llmbuild.serve.predict.files import of_tokens
from llmbuild.serve.predict.learned import Learned
from llmbuild.serve.ragged import RaggedStep
from llmbuild.serve.request import Request
from llmbuild.serve.schedule.named import FCFS, Targets, scheduler
from llmbuild.serve.speculate import DRAFT, NGRAM, NONE, Speculation
from llmbuild.serve.tools import BEGIN, Form, form_of
from llmbuild.spec.load_curve import LoadCurve
from llmbuild.spec.program import Abi, abi_from
from llmbuild.spec.rows import present

MOST_SEQUENCES = 16
STREAM_INTERVAL_S = 0.02
"""Tokens of a stream that come within so many seconds are one chunk: about as long as a screen shows a picture."""


@dataclass(frozen=True)
class Plan:
    """How one model is served: the scheduler by its name, and the sequences that run at a time at most."""

    scheduler: str = FCFS
    sequences: int = MOST_SEQUENCES
    targets: Targets | None = None
    """Deadlines of requests that have none of their own, for schedulers that go by them."""
    curve: LoadCurve | None = None
    """What the variant's steps take, for schedulers that go by it."""
    speculation: str = NONE
    """How tokens are guessed ahead, by its name."""
    admission: str = WORST_CASE
    """By what sequences are admitted, by its name."""
    predictor: Path | None = None
    """The file of what predicts the lengths of answers; None for what earlier answers had."""
    draft: Model | None = None
    """The variant that guesses tokens, where speculation is `draft`."""

    def __post_init__(self) -> None:
        """Refuse half of a choice.

        Raises:
            InputError: a variant is to draft and none is given, or one is given and none is to.
        """
        if self.draft is None and self.speculation == DRAFT:
            raise InputError(f"speculation {DRAFT} needs a variant that drafts: name it as --draft, or `draft`")
        if self.draft is not None and self.speculation != DRAFT:
            raise InputError(f"a variant that drafts is for --speculation {DRAFT}")


@dataclass(frozen=True)
class Settings:
    """How models are served; `memory_bytes` is for all of them together, `plans` are of models by their names."""

    memory_bytes: int | None = None
    max_sequences: int = MOST_SEQUENCES
    scheduler: str = FCFS
    limits: Limits = Limits()  # noqa: RUF009 - frozen
    speculation: str = NONE
    admission: str = WORST_CASE
    predictor: Path | None = None
    plans: Mapping[str, Plan] = field(default_factory=dict)
    classes: Mapping[str, Targets] = field(default_factory=dict)
    """Deadlines of the classes that requests may name."""
    draft: Model | None = None
    """The variant that guesses tokens, as in `Plan`; for one model."""
    stream_interval_s: float = STREAM_INTERVAL_S

    def of(self, name: str) -> Plan:
        """Return how a model is served."""
        if name in self.plans:
            return self.plans[name]
        return Plan(
            self.scheduler,
            self.max_sequences,
            speculation=self.speculation,
            admission=self.admission,
            predictor=self.predictor,
            draft=self.draft,
        )


@dataclass(frozen=True)
class Prompt:
    """The tokens of a prompt, and the tokens that end its answer besides the model's."""

    tokens: tuple[int, ...]
    ends: tuple[int, ...] = ()


class Served:
    """One model, its engine, and what its clients may ask of its texts."""

    def __init__(
        self, model: Model, need: Need, slots: int, settings: Settings, outlet: Outlet, observer: Observer
    ) -> None:
        """Open the variant and allocate caches for `slots` whole contexts.

        Raises:
            LlmbuildError: the variant cannot be opened, or not be served so.
        """
        self.model, self.name = model, str(model.row["model"])
        self.need, self.classes = need, settings.classes
        self.tokenizer = model.tokenizer
        plan = settings.of(self.name)
        self.step = _step(model.session, slots, plan)
        policy = scheduler(plan.scheduler, self.step.cut, self.name, plan.curve, plan.targets)
        self._draft = plan.draft
        self.speculation = _speculation(self.name, self.step, plan)
        self.admission = _admission(self.name, self.step, plan)
        self.engine = Engine(
            self.step,
            policy,
            self._text,
            outlet,
            settings.limits,
            observer,
            lengths=_lengths(model, plan.predictor),
            speculation=self.speculation,
            admission=self.admission,
        )

    @property
    def variant(self) -> str:
        """The digest of the variant."""
        return str(self.model.row["variant"])

    @property
    def context(self) -> int:
        """Positions of a sequence."""
        return self.step.context

    def told(self) -> str:
        """Return how many sequences run at a time, and what they take."""
        slots = self.step.slots
        if isinstance(self.step, RaggedStep):
            contexts, calls = self.step.contexts, "in one call"
        else:
            contexts, calls = slots, "in a call each"
        memory = f"memory for {contexts * self.context} tokens: {self.need.told(contexts)}"
        expected = "; admitted by what they are expected to take" if isinstance(self.admission, Expected) else ""
        return f"up to {slots} sequences at a time, {calls}, of {self.context} tokens at most; {memory}{expected}"

    def text(self, text: str, add_special_tokens: bool = True) -> Prompt:
        """Return the prompt of a text.

        Raises:
            RequestRefused: it has no token.
        """
        made = self.tokenizer.encode(text, add_special_tokens)
        if not made.tokens:
            raise RequestRefused("the prompt is empty: give at least one character", "prompt")
        return Prompt(made.tokens)

    @cached_property
    def call_form(self) -> Form | None:
        """In which form the model writes calls of tools; None where its chat template takes no tools."""
        template = self.model.chat_template
        form = None if template is None else form_of(template.template)
        return None if form == "hermes" and BEGIN in self.tokenizer.special else form

    def chat(self, messages: Sequence[Message], tools: Sequence[Message] = ()) -> Prompt:
        """Return the prompt of a chat, in which the model may call tools.

        Raises:
            RequestRefused: the model has no chat template, or it refuses these messages.
        """
        try:
            made = self.model.encode_chat(messages, tools)
        except InputError as error:
            raise RequestRefused(str(error), "messages") from None
        return Prompt(made.tokens, self._template_ends)

    @cached_property
    def grammars(self) -> Grammars:
        """What compiles schemas for this model."""
        ends = dict.fromkeys((*self.step.ends, *self._template_ends))
        return Grammars(self.tokenizer.path, self.step.vocabulary, tuple(ends))

    def close(self) -> None:
        """End what runs, and release the device."""
        self.engine.close()
        self.release()
        self.model.close()
        if self._draft is not None:
            self._draft.close()

    def release(self) -> None:
        """Free the caches on the device; the models stay open."""
        if self.speculation is not None:
            self.speculation.close()
        self.step.close()

    def _text(self, request: Request, ends: frozenset[int]) -> Text:
        return Text(self.tokenizer.decoder(request.prompt), tuple(ends), request.params.stops)

    @cached_property
    def _template_ends(self) -> tuple[int, ...]:
        template = self.model.chat_template
        return template.ends(self.tokenizer) if template else ()


def _step(session: Session, contexts: int, plan: Plan) -> RaggedStep | PerSequenceStep:
    """Return a step with memory for so many contexts: one that runs all rows by one call, where the artifact can. Its
    sequences are then as many as are asked for, as far as what they take fits.
    """
    if session.abi.page:
        return RaggedStep(session, plan.sequences, contexts)
    step = PerSequenceStep(session, contexts)
    if plan.scheduler != FCFS:
        step.probe()
    return step


def _speculation(name: str, step: RaggedStep | PerSequenceStep, plan: Plan) -> Speculation | None:
    """Return what guesses tokens; None where the variant computes one row at a time.

    Raises:
        InputError: it does, and they are to be guessed; or there is no memory for what guesses them.
    """
    if isinstance(step, RaggedStep):
        draft = None if plan.draft is None else RaggedStep(plan.draft.session, plan.sequences, step.contexts)
        return Speculation(plan.speculation == NGRAM, drafter=None if draft is None else Drafter(draft))
    if plan.speculation != NONE:
        told = f"{name}: speculation {plan.speculation} needs a variant that computes several rows in one call"
        raise InputError(f"{told}: one with kernel=own")
    return None


def _lengths(model: Model, place: Path | None) -> Lengths:
    """Return what predicts the lengths of a model's answers.

    Raises:
        InputError: a predictor that cannot be read, or of other tokens.
    """
    if place is None:
        return History()
    made = of_tokens(place, str(model.row["model"]), model.row.get("tokenizer"))
    return Learned(made.location, made.spread)


def _admission(name: str, step: RaggedStep | PerSequenceStep, plan: Plan) -> Admission:
    """Return by what sequences are admitted.

    Raises:
        InputError: by what is expected, and each sequence has a cache of the whole context.
    """
    if plan.admission != EXPECTED:
        return WorstCase(step)
    if not isinstance(step, RaggedStep):
        told = f"{name}: admission {EXPECTED} needs a variant whose sequences share a cache in blocks"
        raise InputError(f"{told}: one with kernel=own, or take {WORST_CASE}")
    return Expected(step.tables)


def opened(
    models: Sequence[Model], settings: Settings, outlet: Outlet, observers: Mapping[str, Observer]
) -> list[Served]:
    """Open models, with as many sequences as fit in the memory; none is left open where one fails.

    Raises:
        LlmbuildError: one cannot be opened, or they do not fit.
    """
    plans = [settings.of(str(model.row["model"])) for model in models]
    most = [plan.sequences for plan in plans]
    needs = [_need(*one) for one in zip(models, plans, strict=True)]
    counts = budget.sequences(needs, budget.memory(settings.memory_bytes), most)
    found: list[Served] = []
    try:
        for model, taken, slots in zip(models, needs, counts, strict=True):
            observer = observers.get(taken.name, Observer())
            found.append(Served(model, taken, slots, settings, outlet, observer))
    except BaseException:
        for one in found:
            one.close()
        raise
    return found


def _need(model: Model, plan: Plan) -> Need:
    """Return what a model takes, with the variant that drafts for it.

    Raises:
        InputError: that one cannot draft for it.
    """
    name = str(model.row["model"])
    found = budget.need(name, model.row, abi_of(model), plan.sequences)
    if plan.draft is None:
        return found
    check_draft(name, model, plan.draft)
    drafts = str(plan.draft.row["variant"])[:12]
    return found.beside(budget.need(drafts, plan.draft.row, abi_of(plan.draft), plan.sequences))


def abi_of(model: Model) -> Abi:
    """Return how a model's variant is called, without opening it."""
    return abi_from(present(model.row["abi"]))
