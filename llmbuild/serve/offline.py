"""Many prompts answered in this process, without a server: the classes that vLLM's users know."""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from llmbuild.errors import InputError
from llmbuild.runtime.chat import Message
from llmbuild.runtime.model import load
from llmbuild.serve.admission import NAMES as ADMISSIONS
from llmbuild.serve.admission import WORST_CASE
from llmbuild.serve.draft_model import draft_model
from llmbuild.serve.engine import Limits
from llmbuild.serve.errors import RequestRefused
from llmbuild.serve.events import Delta, Ended, Event
from llmbuild.serve.request import LARGEST_COUNT, LARGEST_SEED, Request, SamplingParams
from llmbuild.serve.schedule.named import FCFS
from llmbuild.serve.served import MOST_SEQUENCES, Prompt, Settings, opened
from llmbuild.serve.speculate import NAMES, NONE
from llmbuild.spec.pick import Pick

Params = SamplingParams | Sequence[SamplingParams] | None
Asked = str | Sequence[int] | Mapping[str, Sequence[int]]
"""A prompt: a text, token ids, or `{"prompt_token_ids": [...]}`."""


@dataclass(frozen=True)
class Logprob:
    """A token's log-probability in the model's own distribution, and its rank where it is among the most likely."""

    logprob: float
    rank: int | None
    decoded_token: str


@dataclass
class CompletionOutput:
    """One answer. `finish_reason` is `stop`, `length`, or `error` with `error` telling why."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    error: str | None = None


@dataclass
class RequestOutput:
    """The answers to one prompt."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]

    @property
    def finished(self) -> bool:
        """Whether every answer has ended."""
        return all(one.finish_reason for one in self.outputs)


class LLM:
    """The variant of a model that meets an SLO here, with an engine that answers many prompts at a time."""

    def __init__(
        self,
        model: str,
        *,
        catalog: str | Path = "catalog",
        slo: Sequence[str] = (),
        objective: str | None = None,
        variant: str | None = None,
        memory_bytes: int | None = None,
        max_sequences: int = MOST_SEQUENCES,
        scheduler: str = FCFS,
        speculation: str = NONE,
        admission: str = WORST_CASE,
        predictor: str | Path | None = None,
        draft: str | None = None,
    ) -> None:
        """Pick and open the variant; `predictor` is a file of what predicts the lengths of answers, and `draft` a
        variant or a model that guesses tokens, for speculation `draft`.

        Raises:
            LlmbuildError: as `llmbuild.load`, or the memory does not hold one sequence.
        """
        for what, name, names in (("speculation", speculation, NAMES), ("admission", admission, ADMISSIONS)):
            if name not in names:
                raise InputError(f"{what} {name!r} is unknown: {' or '.join(names)}")
        found = load(catalog, model, slo, objective, variant=variant)
        drafts = draft_model(catalog, draft) if draft else None
        self.pick: Pick = found.pick
        self._outputs: dict[str, RequestOutput] = {}
        limits = Limits(LARGEST_COUNT, math.inf)
        place = None if predictor is None else Path(predictor)
        how = scheduler, limits, speculation, admission, place
        settings = Settings(memory_bytes, max_sequences, *how, draft=drafts)
        (self._served,) = opened([found], settings, self._take, {})
        self._asked = 0

    def generate(self, prompts: Asked | Sequence[Asked], sampling_params: Params = None) -> list[RequestOutput]:
        """Return the answers to prompts, in their order; `sampling_params` are for all, or one for each.

        Raises:
            InputError: a prompt cannot be answered, which is told before any of them is.
        """
        listed = [prompts] if isinstance(prompts, (str, Mapping)) or _is_tokens(prompts) else list(prompts)
        made = [(one if isinstance(one, str) else None, self._prompt(i, one)) for i, one in enumerate(listed)]
        return self._answer(made, sampling_params)

    def chat(
        self, messages: Sequence[Message] | Sequence[Sequence[Message]], sampling_params: Params = None
    ) -> list[RequestOutput]:
        """Return the answers to a chat, or to several, through the model's chat template.

        Raises:
            InputError: as `generate`, or the model has no template.
        """
        listed = [messages] if not messages or isinstance(messages[0], Mapping) else messages
        return self._answer([(None, self._served.chat(one)) for one in listed], sampling_params)  # type: ignore[arg-type]

    def close(self) -> None:
        """Release the device and the memory."""
        self._served.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _prompt(self, number: int, one: object) -> Prompt:
        try:
            if isinstance(one, str):
                return self._served.text(one)
            if isinstance(one, Mapping) and set(one) == {"prompt_token_ids"}:
                one = one["prompt_token_ids"]
            if _is_tokens(one):
                return Prompt(tuple(one))  # type: ignore[arg-type]
        except RequestRefused as error:
            raise InputError(f"prompts[{number}]: {error}") from None
        told = "must be a text, a list of token ids, or {'prompt_token_ids': [...]}"
        raise InputError(f"prompts[{number}] is a {type(one).__name__}; it {told}")

    def _answer(self, made: Sequence[tuple[str | None, Prompt]], given: Params) -> list[RequestOutput]:
        params = _each(given, len(made))
        requests = [self._request(prompt, each) for (_, prompt), each in zip(made, params, strict=True)]
        for i, one in enumerate(requests):
            try:
                self._served.engine.check(one)
            except RequestRefused as error:
                raise InputError(f"prompts[{i}]: {error}") from None
        for one, (text, _) in zip(requests, made, strict=True):
            outputs = [_empty(n, one.params) for n in range(one.params.n)]
            self._outputs[one.id] = RequestOutput(one.id, text, list(one.prompt), outputs)
            self._served.engine.submit(one)
        try:
            while self._served.engine.turn():
                pass
        finally:
            for one in requests:
                if not self._outputs[one.id].finished:  # interrupted
                    self._served.engine.cancel(one.id)
        return [self._outputs.pop(one.id) for one in requests]

    def _request(self, prompt: Prompt, params: SamplingParams) -> Request:
        self._asked += 1
        seed = secrets.randbelow(LARGEST_SEED) if params.seed is None else params.seed
        return Request(str(self._asked - 1), prompt.tokens, params, seed, prompt.ends)

    def _take(self, events: Sequence[Event]) -> None:
        for event in events:
            if event.request in self._outputs:
                self._add(self._outputs[event.request].outputs[event.index], event)

    def _add(self, output: CompletionOutput, event: Event) -> None:
        if isinstance(event, Ended):
            output.finish_reason, output.error = "error", event.why
            return
        output.text += event.text
        output.token_ids.append(event.token)
        if event.logprob is not None and output.logprobs is not None:
            output.logprobs.append(self._logprobs(event))
            output.cumulative_logprob = (output.cumulative_logprob or 0.0) + event.logprob.logprob
        if event.finish is not None:
            output.finish_reason, output.stop_reason = event.finish.reason, event.finish.stop_reason

    def _logprobs(self, event: Delta) -> dict[int, Logprob]:
        assert event.logprob is not None
        top = {token: (value, rank) for rank, (token, value) in enumerate(event.logprob.top, 1)}
        mine = {event.token: (event.logprob.logprob, None)}
        return {token: Logprob(value, rank, self._shown(token)) for token, (value, rank) in {**mine, **top}.items()}

    def _shown(self, token: int) -> str:
        return self._served.tokenizer.bytes_of(token).decode(errors="replace")


def _is_tokens(value: object) -> bool:
    if not isinstance(value, (list, tuple)) or not value:
        return False
    return all(isinstance(one, int) and not isinstance(one, bool) for one in value)


def _empty(index: int, params: SamplingParams) -> CompletionOutput:
    return CompletionOutput(index, logprobs=None if params.logprobs is None else [])


def _each(given: Params, count: int) -> Sequence[SamplingParams]:
    """Return the parameters of each prompt.

    Raises:
        InputError: not as many as prompts.
    """
    if given is None or isinstance(given, SamplingParams):
        return [given or SamplingParams()] * count
    if len(given) != count:
        raise InputError(f"sampling_params has {len(given)} items for {count} prompts")
    return given
