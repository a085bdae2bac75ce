"""What a client asks of the engine, as frozen data; every number has bounds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from llmbuild.errors import InputError
from llmbuild.runtime import checks
from llmbuild.serve.errors import RequestRefused

if TYPE_CHECKING:
    from llmbuild.serve.grammar import Grammar

MOST_CHOICES = 128
"""Largest `n`."""
MOST_TOP_LOGPROBS = 20
MOST_STOPS, LONGEST_STOP = 16, 1024
"""Number of stop strings, and characters of one."""
MOST_BIASES = 1024
LARGEST_SEED = 2**63 - 1
LARGEST_COUNT = 2**31 - 1


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of an answer are chosen, and where it ends; names and defaults are vLLM's.

    A temperature of 0 is greedy. `top_k` 0 or -1, `top_p` 1 and `min_p` 0 leave all tokens in. Presence and frequency
    penalties count the answer's tokens, the repetition penalty those of the prompt too. The same `seed` gives the same
    answer from the same variant, whatever else runs; without one it is drawn for each request. `max_tokens` None is as
    many as fit in the context. `logprobs` is the number of most likely tokens that are told with each token; 0 tells
    the token's own alone, None nothing. They are of the model's own distribution, before temperature and penalties.
    """

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | Sequence[str] | None = ()
    stop_token_ids: Sequence[int] | None = ()
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    logit_bias: Mapping[int, float] | None = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Bring every value into one form.

        Raises:
            RequestRefused: a value of the wrong type or out of bounds; `param` names it.
        """
        for each in fields(self):
            try:
                object.__setattr__(self, each.name, _CHECKS[each.name](each.name, getattr(self, each.name)))
            except InputError as error:
                raise RequestRefused(str(error), each.name) from None
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestRefused(
                f"min_tokens is {self.min_tokens}, more than max_tokens {self.max_tokens}", "min_tokens"
            )

    @staticmethod
    def of(values: Mapping[str, Any]) -> SamplingParams:
        """Return the parameters of values that nobody has checked.

        Raises:
            RequestRefused: a value is wrong.
        """
        return SamplingParams(**values)

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return self.stop if isinstance(self.stop, tuple) else ()

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        """The tokens that end an answer, besides the model's."""
        return self.stop_token_ids if isinstance(self.stop_token_ids, tuple) else ()

    @property
    def biases(self) -> Mapping[int, float]:
        """What is added to the logits of tokens."""
        return self.logit_bias or {}

    @property
    def penalized(self) -> bool:
        """Whether earlier tokens change the choice."""
        return bool(self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1)

    @property
    def narrowed(self) -> bool:
        """Whether draws are from less than all tokens."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

    @property
    def plain(self) -> bool:
        """Whether the device's own choice is taken: greedy, and nothing changes a logit."""
        changed = self.penalized or self.biases or self.min_tokens
        return self.temperature == 0 and not changed


@dataclass(frozen=True)
class Request:
    """One prompt and what is asked of it: `params.n` sequences continue it."""

    id: str
    prompt: tuple[int, ...]
    params: SamplingParams
    seed: int
    """The seed of the draws: the client's, or one drawn for this request."""
    ends: tuple[int, ...] = ()
    """Tokens that end an answer besides the model's end tokens, such as that of a chat template."""
    grammar: Grammar | None = None
    """What the answer must match."""
    deadline_s: float | None = None
    """Seconds from the arrival on by which the answer must have ended; None for as long as the engine allows."""
    salt: bytes = b""
    """Of whom it is: beginnings of prompts are computed once for all requests of one salt, and never for others."""
    tenant: str = ""
    """Of whom it is, for schedulers that share out what is served."""
    priority: int = 0
    """Requests with a lower number go before all others that wait."""
    ttft_s: float | None = None
    """Seconds from the arrival within which the first token is asked for; None as for all requests."""
    tpot_s: float | None = None
    """Seconds that are asked for between tokens; None as for all requests."""


def _number(low: float, high: float, above: bool = False) -> Callable[[str, object], float]:
    def checked(name: str, value: object) -> float:
        found = checks.number(name, value)
        if not low <= found <= high or (above and found == low):
            raise InputError(f"{name} is {found:g}; it must be {'above ' if above else ''}{low:g} to {high:g}")
        return found

    return checked


def _integer(low: int, high: int) -> Callable[[str, object], int]:
    return lambda name, value: checks.integer(name, value, low, high)


def _or_none(low: int, high: int) -> Callable[[str, object], int | None]:
    return lambda name, value: None if value is None else checks.integer(name, value, low, high)


def _all(name: str, value: object) -> int:
    """Return k; -1 is all tokens too."""
    return max(0, checks.integer(name, value, -1, LARGEST_COUNT))


def _truth(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise InputError(f"{name} is a {type(value).__name__}; it must be true or false")
    return value


def _stops(name: str, value: object) -> tuple[str, ...]:
    if value is None:
        return ()
    found = [checks.text(name, value)] if isinstance(value, str) else checks.texts(name, value)
    if len(found) > MOST_STOPS:
        raise InputError(f"{name} has {len(found)} strings; at most {MOST_STOPS} are taken")
    for one in found:
        if not 0 < len(one) <= LONGEST_STOP:
            raise InputError(f"{name} has a string of {len(one)} characters; each must have 1 to {LONGEST_STOP}")
    return tuple(found)


def _tokens(name: str, value: object) -> tuple[int, ...]:
    if value is None:
        return ()
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        raise InputError(f"{name} is a {type(value).__name__}; it must be a list of token ids")
    if len(value) > MOST_BIASES:
        raise InputError(f"{name} has {len(value)} tokens; at most {MOST_BIASES} are taken")
    return tuple(checks.integer(f"{name}[{i}]", one, 0, checks.LARGEST) for i, one in enumerate(value))


def _biases(name: str, value: object) -> dict[int, float]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise InputError(f"{name} is a {type(value).__name__}; it must map token ids to numbers")
    if len(value) > MOST_BIASES:
        raise InputError(f"{name} has {len(value)} tokens; at most {MOST_BIASES} are taken")
    bounded = _number(-100, 100)
    return {_token(name, key): bounded(f"{name}[{key}]", one) for key, one in value.items()}


def _token(name: str, key: object) -> int:
    if isinstance(key, str) and key.isascii() and key.isdigit() and len(key) <= 10:
        key = int(key)  # JSON has no other keys
    return checks.integer(f"a token of {name}", key, 0, checks.LARGEST)


_CHECKS: Mapping[str, Callable[[str, object], object]] = {
    "n": _integer(1, MOST_CHOICES),
    "presence_penalty": _number(-2, 2),
    "frequency_penalty": _number(-2, 2),
    "repetition_penalty": _number(0, 10, above=True),
    "temperature": _number(0, 100),
    "top_p": _number(0, 1, above=True),
    "top_k": _all,
    "min_p": _number(0, 1),
    "seed": _or_none(-LARGEST_SEED - 1, LARGEST_SEED),
    "stop": _stops,
    "stop_token_ids": _tokens,
    "ignore_eos": _truth,
    "max_tokens": _or_none(1, LARGEST_COUNT),
    "min_tokens": _integer(0, LARGEST_COUNT),
    "logprobs": _or_none(0, MOST_TOP_LOGPROBS),
    "logit_bias": _biases,
}
