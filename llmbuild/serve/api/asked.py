"""What the bodies of requests ask for: chats, completions, and texts to tokens and back."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from llmbuild.runtime import checks
from llmbuild.serve.api.errors import ApiError
from llmbuild.serve.api.fields import Fields, mapping, truth
from llmbuild.serve.api.tool_fields import calls_of, offered
from llmbuild.serve.errors import RequestRefused
from llmbuild.serve.grammar import WHITESPACE, Grammar
from llmbuild.serve.request import LARGEST_SEED, Request, SamplingParams
from llmbuild.serve.schedule.named import Targets
from llmbuild.serve.served import Prompt, Served
from llmbuild.serve.tools import Tools, grammar_of
from llmbuild.system.strict_json import JsonObject

Models = Mapping[str, Served]

ROLES = ("system", "developer", "user", "assistant", "tool")
MOST_PROMPTS, MOST_MESSAGES = 128, 4096
MOST_PRIORITY = 100
LONGEST_DEADLINE_S = 86400.0
_LEGACY_LOGPROBS = 5

_SAMPLING = (
    "temperature top_p top_k min_p n stop stop_token_ids seed presence_penalty frequency_penalty repetition_penalty "
    "logit_bias min_tokens ignore_eos"
).split()
"""Fields that `SamplingParams` checks itself."""

_CHAT_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "reasoning_effort": ("none",),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "echo": (False,),
}
_BOTH_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "store": (False,),
    "service_tier": ("auto", "default"),
    "use_beam_search": (False,),
    "length_penalty": (1, 1.0),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True, False),
    "include_stop_str_in_output": (False,),
}
_LEGACY_NEUTRAL: Mapping[str, tuple[object, ...]] = {"echo": (False,), "suffix": ("",)}


@dataclass(frozen=True)
class Asked:
    """A request of the API: the engine's requests, one for each prompt, and how the answer is to be told."""

    served: Served
    requests: tuple[Request, ...]
    chat: bool
    stream: bool
    include_usage: bool
    user: str
    tools: Tools | None = None
    """The functions that the answers may call."""

    @property
    def choices(self) -> int:
        """Number of answers."""
        return sum(one.params.n for one in self.requests)

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompts, each counted once however many answers it has."""
        return sum(len(one.prompt) for one in self.requests)


def chat(body: Mapping[str, object], models: Models, name: str) -> Asked:
    """Return what a chat asks; `name` is the id of the answer.

    Raises:
        RequestRefused, ApiError: a field is unknown, not supported or wrong.
    """
    fields = Fields(body)
    served = model_of(fields, models)
    messages = fields.needed("messages", messages_of)
    shown = fields.take("logprobs", truth, False)
    top = fields.take("top_logprobs", lambda n, v: checks.integer(n, v, 0, 20), 0)
    if top and not shown:
        raise RequestRefused("top_logprobs needs logprobs: true", "top_logprobs")
    given = fields.taken("max_tokens", "max_completion_tokens")
    most = given.get("max_completion_tokens", given.get("max_tokens"))
    fields.neutral(_CHAT_NEUTRAL)
    params = _params(fields, {"max_tokens": most, "logprobs": top if shown else None})
    grammar = fields.take("response_format", lambda n, v: _grammar(served, params, n, v), None)
    functions = offered(fields, served.call_form, served.name)
    if functions.tools is not None:
        grammar = _of_calls(served, params, functions.tools, grammar)
    asked = replace(_asked(fields, served, params, chat=True), tools=functions.tools)
    return _with(asked, [served.chat(messages, functions.shown)], params, name, fields, grammar)


def _of_calls(served: Served, params: SamplingParams, tools: Tools, other: Grammar | None) -> Grammar | None:
    """Return the grammar of answers that may call tools; None where any text may come."""
    if other is not None:
        raise RequestRefused("tools go with no response_format of JSON", "response_format")
    text = grammar_of(tools, WHITESPACE, served.tokenizer.added)
    if text is None:
        return None
    if params.ignore_eos or params.min_tokens:
        raise RequestRefused("tools go with neither ignore_eos nor min_tokens", "tools")
    return served.grammars.of_text("tools", text)


def completion(body: Mapping[str, object], models: Models, name: str) -> Asked:
    """Return what a completion asks; `name` is the id of the answer.

    Raises:
        RequestRefused, ApiError: a field is unknown, not supported or wrong.
    """
    fields = Fields(body)
    served = model_of(fields, models)
    add = fields.take("add_special_tokens", truth, True)
    prompts = fields.needed("prompt", lambda n, v: prompts_of(served, n, v, add))
    logprobs = fields.take("logprobs", lambda n, v: checks.integer(n, v, 0, _LEGACY_LOGPROBS), -1)
    best = fields.taken("best_of")
    fields.neutral(_LEGACY_NEUTRAL)
    most = fields.taken("max_tokens")
    params = _params(fields, {**most, "logprobs": None if logprobs < 0 else logprobs})
    if best and best["best_of"] != params.n:
        raise RequestRefused("best_of other than n is not supported by this server", "best_of")
    return _with(_asked(fields, served, params, chat=False), prompts, params, name, fields)


def model_of(fields: Fields, models: Models) -> Served:
    """Return the model that a body names.

    Raises:
        ApiError: it is not served here.
        RequestRefused: the body names none.
    """
    return model_named(fields.needed("model", checks.text), models)


def model_named(name: str, models: Models) -> Served:
    """Return a model that is served.

    Raises:
        ApiError: it is not.
    """
    if name not in models:
        told = f"model {name[:100]!r} is not served here: {', '.join(models)}"
        raise ApiError(404, told, code="model_not_found", param="model")
    return models[name]


def messages_of(name: str, value: object) -> list[dict[str, object]]:
    """Return messages as chat templates take them: texts, and the developer as the system.

    Raises:
        RequestRefused: not messages, or one has what this server does not support.
    """
    if not isinstance(value, list) or not value:
        raise RequestRefused(f"{name} must be a list of at least one message", name)
    if len(value) > MOST_MESSAGES:
        raise RequestRefused(f"{name} has {len(value)} messages; at most {MOST_MESSAGES} are taken", name)
    return [_message(f"{name}[{i}]", one) for i, one in enumerate(value)]


def prompts_of(served: Served, name: str, value: object, add: bool) -> list[Prompt]:
    """Return the prompts of a completion: a text or a list of token ids, or a list of these.

    Raises:
        RequestRefused: not prompts, or too many.
    """
    one = isinstance(value, str) or (isinstance(value, list) and bool(value) and _is_token(value[0]))
    listed = [value] if one else value
    if not isinstance(listed, list) or not listed:
        raise RequestRefused(f"{name} must be a text, a list of token ids, or a list of these", name)
    if len(listed) > MOST_PROMPTS:
        raise RequestRefused(f"{name} has {len(listed)} prompts; at most {MOST_PROMPTS} are taken", name)
    return [_prompt(served, name if one else f"{name}[{i}]", each, add) for i, each in enumerate(listed)]


def tokens_of(name: str, value: object) -> list[int]:
    """Return token ids.

    Raises:
        RequestRefused, InputError: not token ids.
    """
    if not isinstance(value, list):
        raise RequestRefused(f"{name} must be a list of token ids", name)
    return [checks.integer(f"{name}[{i}]", one, 0, checks.LARGEST) for i, one in enumerate(value)]


def _is_token(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _prompt(served: Served, name: str, value: object, add: bool) -> Prompt:
    if isinstance(value, str):
        return served.text(checks.text(name, value), add)
    return Prompt(tuple(tokens_of(name, value)))


def _message(name: str, value: object) -> dict[str, object]:
    fields = Fields(mapping(name, value), f"{name}.")
    role = fields.needed("role", checks.text)
    if role not in ROLES:
        raise RequestRefused(f"{name}.role is {role[:40]!r}; this server takes {', '.join(ROLES)}", f"{name}.role")
    fields.neutral({"refusal": (), "audio": (), "function_call": ()})
    calls: list[JsonObject] = []
    if role == "assistant":
        calls = fields.take("tool_calls", calls_of, calls)
    answers = fields.needed("tool_call_id", checks.text) if role == "tool" else ""
    empty = "" if role == "assistant" else None
    content = fields.take("content", _content, empty)
    if content is None:
        raise RequestRefused(f"{name}.content is missing", f"{name}.content")
    named = fields.take("name", checks.text, "")
    fields.end()
    told: dict[str, object] = {"role": "system" if role == "developer" else role, "content": content}
    more = {"name": named, "tool_calls": calls, "tool_call_id": answers}
    return {**told, **{key: value for key, value in more.items() if value}}


def _content(name: str, value: object) -> str | None:
    """Return the text of a message, given as one or as parts that are texts."""
    if not isinstance(value, list):
        return checks.text(name, value)
    parts = []
    for i, one in enumerate(value):
        part = Fields(mapping(f"{name}[{i}]", one), f"{name}[{i}].")
        kind = part.needed("type", checks.text)
        if kind != "text":
            raise RequestRefused(f"{name}[{i}] is of type {kind[:40]!r}: this server takes text alone", name)
        parts.append(part.needed("text", checks.text))
        part.end()
    return "".join(parts)


def _params(fields: Fields, more: Mapping[str, object]) -> SamplingParams:
    given = fields.taken(*_SAMPLING)
    return SamplingParams.of({**given, **more})


def _asked(fields: Fields, served: Served, params: SamplingParams, chat: bool) -> Asked:
    stream = fields.take("stream", truth, False)
    options: dict[str, object] = fields.take("stream_options", mapping, {})
    if options and not stream:
        raise RequestRefused("stream_options is for stream: true alone", "stream_options")
    inner = Fields(options, "stream_options.")
    include = inner.take("include_usage", truth, False)
    inner.neutral({"include_obfuscation": (False,), "continuous_usage_stats": (False,)})
    inner.end()
    user = fields.take("user", checks.text, "")
    return Asked(served, (), chat, stream, include, user)


def _grammar(served: Served, params: SamplingParams, name: str, value: object) -> Grammar | None:
    """Return the grammar of a response format; None of plain text."""
    form = Fields(mapping(name, value), f"{name}.")
    kind = form.needed("type", checks.text)
    schema: object = {"type": "object"}
    if kind == "json_schema":
        inner = Fields(form.needed("json_schema", mapping), f"{name}.json_schema.")
        schema = inner.needed("schema", mapping)
        inner.taken("name", "description", "strict")  # every schema is kept to strictly
        inner.end()
    elif kind not in ("text", "json_object"):
        raise RequestRefused(f"{name}.type is {kind[:40]!r}; it must be text, json_object or json_schema", name)
    form.end()
    if kind == "text":
        return None
    if params.ignore_eos or params.min_tokens:
        raise RequestRefused(f"{name} goes with neither ignore_eos nor min_tokens", name)
    return served.grammars.of_schema(name, schema)


def _with(
    asked: Asked,
    prompts: Sequence[Prompt],
    params: SamplingParams,
    name: str,
    fields: Fields,
    grammar: Grammar | None = None,
) -> Asked:
    """Return what is asked with the engine's requests."""
    deadline = fields.take("deadline_s", _deadline, None)
    priority = fields.take("priority", lambda n, v: checks.integer(n, v, -MOST_PRIORITY, MOST_PRIORITY), 0)
    targets = fields.take("slo_class", lambda n, v: _class(asked.served, n, v), None)
    fields.neutral(_BOTH_NEUTRAL)
    fields.end()
    count, most = len(prompts) * params.n, asked.served.engine.limits.queue
    if count > most:  # else it would be asked again for ever
        raise RequestRefused(f"{count} answers are asked for; at most {most} sequences may wait", "n")
    seed = secrets.randbelow(LARGEST_SEED) if params.seed is None else params.seed
    first = Request("", (), params, seed, (), grammar, deadline, priority=priority)
    if targets is not None:
        first = replace(first, ttft_s=targets.ttft_s, tpot_s=targets.tpot_s)
    requests = (replace(first, id=f"{name}-{i}", prompt=one.tokens, ends=one.ends) for i, one in enumerate(prompts))
    return replace(asked, requests=tuple(requests))


def _class(served: Served, name: str, value: object) -> Targets:
    """Return the deadlines of a class that the server has."""
    found = served.classes.get(checks.text(name, value))
    if found is None:
        told = ", ".join(served.classes) or "none: `llmbuild serve --slo-class` names some"
        raise RequestRefused(f"{name} is {str(value)[:40]!r}; this server has {told}", name)
    return found


def _deadline(name: str, value: object) -> float | None:
    found = checks.number(name, value)
    if not 0 < found <= LONGEST_DEADLINE_S:
        raise RequestRefused(f"{name} is {found:g}; it must be above 0 and at most {LONGEST_DEADLINE_S:g}", name)
    return found
