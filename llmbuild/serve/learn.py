"""Answers of a variant to prompts of a file, and their lengths: what a predictor of lengths is trained on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from llmbuild.errors import InputError
from llmbuild.runtime import checks
from llmbuild.runtime.chat import Message
from llmbuild.runtime.model import Model, load
from llmbuild.serve.offline import LLM, RequestOutput
from llmbuild.serve.predict.files import Header
from llmbuild.serve.predict.fit import LEAST, Answered, fit
from llmbuild.serve.predict.judge import Score, held_out, scores
from llmbuild.serve.predict.model import LengthModel
from llmbuild.serve.request import SamplingParams
from llmbuild.system.strict_json import dumps, loads

KEYS = ("prompt", "messages", "group", "tenant", "output_tokens", "cut")
MOST_TOKENS, TEMPERATURE, TOP_P = 256, 0.7, 0.95
_PART = 128
"""Prompts that are answered between two reports."""


@dataclass(frozen=True)
class Line:
    """A prompt of a file: a text or the messages of a chat, and the length of its answer where it is known."""

    prompt: str | None
    messages: Sequence[Message]
    group: str = ""
    tenant: str = ""
    output_tokens: int | None = None
    cut: bool = False


@dataclass(frozen=True)
class Sampled:
    """How prompts are answered."""

    max_tokens: int = MOST_TOKENS
    temperature: float = TEMPERATURE
    seed: int = 0

    def params(self, number: int) -> SamplingParams:
        """Return the parameters of a prompt; each has draws of its own."""
        return SamplingParams(
            temperature=self.temperature, top_p=TOP_P, max_tokens=self.max_tokens, seed=self.seed + number
        )


def read(path: Path) -> list[Line]:
    """Return the prompts of a file of JSON Lines.

    Raises:
        InputError: the file, or a line of it, cannot be read; or there are too few.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    found = [_line(f"{path}:{i}", text) for i, text in enumerate(lines, 1) if text.strip()]
    if len(found) < LEAST:
        raise InputError(f"{path} has {len(found)} prompts: a predictor of lengths takes at least {LEAST}")
    return found


def _line(place: str, text: str) -> Line:
    try:
        found = loads(text)
    except ValueError as error:
        raise InputError(f"{place}: {error}") from None
    if not isinstance(found, dict):
        raise InputError(f'{place} is no object: write {{"prompt": TEXT}} or {{"messages": [...]}}')
    if unknown := sorted(set(found) - set(KEYS)):
        raise InputError(f"{place}: {unknown[0]} is unknown; a line has {', '.join(KEYS)}")
    if ("prompt" in found) == ("messages" in found):
        raise InputError(f"{place} must have either prompt or messages")
    try:
        return _checked(found)
    except InputError as error:
        raise InputError(f"{place}: {error}") from None


def _checked(found: Mapping[str, Any]) -> Line:
    prompt = checks.text("prompt", found["prompt"]) if "prompt" in found else None
    messages = found.get("messages", ())
    if prompt is None and not (isinstance(messages, list) and all(isinstance(one, dict) for one in messages)):
        raise InputError("messages must be a list of objects")
    group, tenant = (checks.text(name, found.get(name, "")) for name in ("group", "tenant"))
    tokens = found.get("output_tokens")
    known = None if tokens is None else checks.integer("output_tokens", tokens, 1)
    cut = found.get("cut", False)
    if not isinstance(cut, bool):
        raise InputError("cut must be true or false")
    return Line(prompt, messages, group, tenant, known, cut)


def answered(
    lines: Sequence[Line], catalog: Path, variant: str, sampled: Sampled, tell: Callable[[str], None]
) -> tuple[list[Answered], Header]:
    """Return the prompts with the lengths of their answers, and the header of what is trained on them.

    The variant answers those of which nothing is known.

    Raises:
        LlmbuildError: it cannot be opened, or not answer a prompt.
    """
    model = load(catalog, variant=variant)
    try:
        unknown = [i for i, one in enumerate(lines) if one.output_tokens is None]
        prompts = [_tokens(model, one) for one in lines]
        header = _header(model)
    finally:
        model.close()
    found = [
        Answered(ids, one.output_tokens or 0, one.cut, one.group or str(i), one.tenant)
        for i, (ids, one) in enumerate(zip(prompts, lines, strict=True))
    ]
    if unknown:
        with LLM(header.model, catalog=catalog, variant=header.variant) as llm:
            for at in range(0, len(unknown), _PART):
                part = unknown[at : at + _PART]
                outputs = _ask(llm, [lines[i] for i in part], [sampled.params(i) for i in part])
                for i, output in zip(part, outputs, strict=True):
                    found[i] = _with_answer(found[i], output)
                tell(f"{at + len(part)} of {len(unknown)} prompts are answered")
    return found, replace(header, answers=len(found), max_tokens=max(one.tokens for one in found))


@dataclass(frozen=True)
class Trained:
    """A predictor of all answers, and what models that have not seen a prompt, or its whole group, say of its z."""

    model: LengthModel
    of_prompts: Sequence[float]
    of_groups: Sequence[float] | None
    """None where every prompt is a group of its own."""
    scores: Sequence[Score]


def trained(answers: Sequence[Answered], seed: int = 0) -> Trained:
    """Return a predictor, and how it does on unseen prompts.

    Raises:
        InputError: there are too few answers.
    """
    model = fit(answers, seed)
    groups = [one.group for one in answers]
    of_prompts = held_out(answers, [str(one.prompt) for one in answers], seed)
    of_groups = held_out(answers, groups, seed) if len(set(groups)) < len(groups) else None
    unseen = {"trained": of_prompts, **({"trained on other groups": of_groups} if of_groups else {})}
    return Trained(model, of_prompts, of_groups, scores(answers, model.spread, unseen))


def held_out_text(answers: Sequence[Answered], header: Header, done: Trained) -> str:
    """Return a JSON document of lengths, with what is predicted of each prompt by models that have not seen it."""
    rows = [
        {"prompt": len(one.prompt), "output": one.tokens, "cut": one.cut, "tenant": one.tenant, "z": round(z, 4)}
        for one, z in zip(answers, done.of_prompts, strict=True)
    ]
    for row, z in zip(rows, done.of_groups or (), strict=False):
        row["z_other_groups"] = round(z, 4)
    return dumps({**asdict(header), "quantiles": done.model.spread.quantiles, "rows": rows}) + "\n"


def _tokens(model: Model, one: Line) -> tuple[int, ...]:
    if one.prompt is not None:
        return model.tokenizer.encode(one.prompt).tokens
    return model.encode_chat(one.messages).tokens


def _header(model: Model) -> Header:
    row = model.row
    if not row.get("tokenizer"):
        raise InputError(f"model {row['model']} has no tokenizer: prompts cannot be read")
    return Header(str(row["model"]), str(row["variant"]), str(row["tokenizer"]), 0, 0)


def _ask(llm: LLM, lines: Sequence[Line], params: Sequence[SamplingParams]) -> list[RequestOutput]:
    """Return the answers to texts and chats, in their order."""
    chats = [i for i, one in enumerate(lines) if one.prompt is None]
    texts = [i for i, one in enumerate(lines) if one.prompt is not None]
    found: dict[int, RequestOutput] = {}
    if chats:
        made = llm.chat([lines[i].messages for i in chats], [params[i] for i in chats])
        found.update(zip(chats, made, strict=True))
    if texts:
        made = llm.generate([lines[i].prompt or "" for i in texts], [params[i] for i in texts])
        found.update(zip(texts, made, strict=True))
    return [found[i] for i in range(len(lines))]


def _with_answer(asked: Answered, output: RequestOutput) -> Answered:
    one = output.outputs[0]
    if one.finish_reason == "error":
        raise InputError(f"prompt {output.request_id} cannot be answered: {one.error}")
    return replace(asked, tokens=len(one.token_ids), cut=one.finish_reason == "length")
