"""What becomes of a flag: mapped to the recipe or to `llmbuild serve`, moot, or refused, each with the reason."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Literal

from llmbuild.serve.speculate import DRAFT, NGRAM

Kind = Literal["mapped", "moot", "refused"]


@dataclass(frozen=True)
class Told:
    """What became of a flag: where it went, or why it did not."""

    kind: Kind
    why: str


@dataclass
class Draft:
    """What a launch line comes to, while its flags are read."""

    memory_bytes: int | None = None
    """Memory of this host, for shares of it."""
    model: str = ""
    gguf: bool = False
    random_init: bool = False
    name: str = ""
    context: int | None = None
    knobs: dict[str, str] = field(default_factory=dict)
    serve: dict[str, str] = field(default_factory=dict)
    given: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """The values of all flags, for those that say something together."""


Rule = Callable[[tuple[str, ...], Draft], Told]


@dataclass(frozen=True)
class Flag:
    """A flag that is known: what becomes of it, and how many values it has; -1 for any number."""

    rule: Rule
    takes: int = 1


def mapped(why: str) -> Told:
    """Say where a flag went."""
    return Told("mapped", why)


def moot(why: str) -> Rule:
    """Return the rule of a flag that changes nothing here."""
    return lambda values, draft: Told("moot", why)


def refuse(why: str) -> Rule:
    """Return the rule of a flag that asks for what there is not."""
    return lambda values, draft: Told("refused", why)


def only(allowed: Collection[str], why: str, otherwise: str) -> Rule:
    """Return the rule of a flag that is moot with these values, and refused with all others."""

    def rule(values: tuple[str, ...], draft: Draft) -> Told:
        fits = " ".join(values).lower() in allowed
        return Told("moot", why) if fits else Told("refused", otherwise)

    return rule


def serve(option: str) -> Rule:
    """Return the rule of a flag that `llmbuild serve` has by another name."""

    def rule(values: tuple[str, ...], draft: Draft) -> Told:
        draft.serve[option] = values[0]
        return mapped(f"llmbuild serve {option} {values[0]}")

    return rule


def count(option: str, least: int, most: int) -> Rule:
    """Return the rule of a flag with a number that `llmbuild serve` takes within bounds."""

    def rule(values: tuple[str, ...], draft: Draft) -> Told:
        found = whole(values[0])
        if found is None or not least <= found <= most:
            return Told("refused", f"llmbuild serve {option} takes {least} to {most}")
        draft.serve[option] = str(found)
        return mapped(f"llmbuild serve {option} {found}")

    return rule


def choices(options: Mapping[str, tuple[str, str] | str], otherwise: str) -> Rule:
    """Return the rule of a flag whose values pin a knob of the recipe, as (knob, value), or are moot for a reason."""

    def rule(values: tuple[str, ...], draft: Draft) -> Told:
        found = options.get(" ".join(values).lower())
        if found is None:
            return Told("refused", otherwise)
        if isinstance(found, str):
            return Told("moot", found)
        knob, value = found
        draft.knobs[knob] = value
        return mapped(f"recipe knobs: {knob}: [{value}]")

    return rule


def model(values: tuple[str, ...], draft: Draft) -> Told:
    """Take the model."""
    draft.model, draft.gguf = values[0], draft.gguf or values[0].lower().endswith(".gguf")
    return mapped(f"recipe model: {'gguf' if draft.gguf else 'huggingface'}")


def name(values: tuple[str, ...], draft: Draft) -> Told:
    """Take the name that clients know."""
    if len(values) > 1:
        return Told("refused", "a model has one name here: keep one")
    draft.name = values[0]
    return mapped("recipe name")


def context(values: tuple[str, ...], draft: Draft) -> Told:
    """Take the context; vLLM's `4k` is 4,000 and its `4K` 4,096 tokens."""
    text, factors = values[0], {"k": 1000, "K": 1024, "m": 10**6, "M": 1 << 20}
    factor = factors.get(text[-1:], 1)
    found = whole(text[:-1] if factor > 1 else text)
    if found is None or found < 2:
        return Told("refused", "write the context as a number of tokens")
    draft.context = found * factor
    return mapped(f"recipe workloads: context: {draft.context}")


def share(values: tuple[str, ...], draft: Draft) -> Told:
    """Take a share of the memory as bytes of this host's."""
    try:
        found = float(values[0])
    except ValueError:
        found = 0.0
    if not 0 < found <= 1:
        return Told("refused", "a share of memory is above 0 and at most 1")
    if draft.memory_bytes is None:
        return Told("refused", "how much memory this host has is not known: give llmbuild serve --memory SIZE")
    draft.serve["--memory"] = f"{int(found * draft.memory_bytes / 1e6)}MB"
    return mapped(f"llmbuild serve --memory {draft.serve['--memory']}: the share of this host's memory, not a GPU's")


def one(what: str) -> Rule:
    """Return the rule of a number of parts, of which there is one here."""

    def rule(values: tuple[str, ...], draft: Draft) -> Told:
        if values[0] == "1":
            return Told("moot", f"there is one {what}")
        return Told("refused", f"a model has one {what} here")

    return rule


def keys(values: tuple[str, ...], draft: Draft) -> Told:
    """Take keys, which are in a file here; what they are is told nobody."""
    draft.serve["--api-keys"] = "keys.txt"
    return mapped("llmbuild serve --api-keys keys.txt: write them there, one a line, of 16 characters or more")


def load_format(values: tuple[str, ...], draft: Draft) -> Told:
    """Take in which form weights are stored."""
    if values[0] in ("auto", "safetensors"):
        return Told("moot", "the files of the model say it")
    if values[0] == "dummy":
        draft.random_init = True
        return mapped("recipe model: random_init: true")
    if values[0] == "gguf":
        draft.gguf = True
        return mapped("recipe model: gguf")
    return Told("refused", "weights are read from safetensors, PyTorch's files of a Hugging Face folder, or GGUF")


def chunked(values: tuple[str, ...], draft: Draft) -> Told:
    """Take prompts in pieces; of how many tokens is the scheduler's to say."""
    if values and values[0].lower() in ("-1", "false", "0"):
        return whole_prompts(values, draft)
    draft.serve["--scheduler"] = "sarathi"
    size = f", 96 tokens a step in place of {values[0]}" if values and values[0].lower() != "true" else ""
    return mapped(f"llmbuild serve --scheduler sarathi{size}")


def whole_prompts(values: tuple[str, ...], draft: Draft) -> Told:
    """Take prompts as a whole."""
    draft.serve["--scheduler"] = "fcfs"
    return mapped("llmbuild serve --scheduler fcfs")


def whole(text: str) -> int | None:
    """Return a number without a sign; None where a text is none."""
    return int(text) if text.isascii() and text.isdigit() else None


QUANTIZED = "reads no checkpoint of this kind: name the model that is not quantized, and try `weight_format`"
_QUANTIZATION: Mapping[str, tuple[str, str] | str] = {
    "none": "every weight format is tried; `weight_format` narrows it",
    "gguf": "the file says it",
}
DTYPE = choices(
    {
        "auto": "every weight format is tried; `weight_format` narrows it",
        **dict.fromkeys(("half", "float16", "fp16"), ("weight_format", "f16")),
        **dict.fromkeys(("bfloat16", "bf16"), ("weight_format", "bf16")),
        **dict.fromkeys(("float", "float32", "fp32"), ("weight_format", "f32")),
    },
    "is no type of weights here",
)
QUANTIZATION = choices(_QUANTIZATION, QUANTIZED)
KV_DTYPE = choices(
    {
        "auto": "each type of keys and values is tried; `kv_dtype` narrows it",
        **dict.fromkeys(("half", "float16", "fp16"), ("kv_dtype", "f16")),
        "int8": ("kv_dtype", "int8"),
        **dict.fromkeys(("float", "float32"), ("kv_dtype", "f32")),
    },
    "keys and values are f32, f16 or int8: `kv_dtype: [int8]` has the bytes of fp8, `kv_dtype: [f16]` those of bf16",
)
PARSER = only(
    ("hermes", "qwen", "qwen25", "qwen3", "llama3", "llama3_json"),
    "the chat template says in which form calls are written",
    "calls are read as Hermes, Qwen and Llama 3 write them",
)
NO_LORA = refuse("there are no adapters: merge them into the weights")
NO_MEDIA = refuse("models take text alone")
NO_DRAFTS = refuse(
    "tokens are guessed by prompt lookup or by a smaller model: `llmbuild serve --speculation ngram|draft`"
)
HEADS = ("eagle", "medusa", "mlp-speculator", "mlp_speculator", "mtp")
"""Words in the names of what drafts and is no model of its own."""
STANDALONE = "STANDALONE"
"""What SGLang calls drafts of a model of its own."""
AS_PAY = "as many tokens are guessed as pay"


def speculation(values: tuple[str, ...], draft: Draft) -> Told:
    """Take the method of vLLM's JSON, or the name that SGLang has; how many tokens are guessed is the server's."""
    try:
        asked = json.loads(values[0])
    except ValueError:
        asked = values[0]
    said = asked if isinstance(asked, dict) else {"method": asked}
    method, small = said.get("method"), said.get("model")
    if method is None and isinstance(small, str):  # vLLM finds the method by the model's name
        heads = any(word in small.lower() for word in HEADS)
        method = small.strip("[]") if small.strip("[]").lower() == NGRAM else "head" if heads else "draft_model"
    if not isinstance(method, str):
        return NO_DRAFTS(values, draft)
    if method.lower() == NGRAM:
        draft.serve["--speculation"] = NGRAM
        return mapped(f"llmbuild serve --speculation {NGRAM}: {AS_PAY}")
    if method.lower() == "draft_model" and isinstance(small, str) and small:
        return _drafts(small, draft)
    if method.upper() == STANDALONE and (path := draft.given.get("speculative-draft-model-path")):
        return _drafts(path[0], draft)
    return NO_DRAFTS(values, draft)


def draft_path(values: tuple[str, ...], draft: Draft) -> Told:
    """Take the model that SGLang drafts with, which is one of ours where the algorithm is `STANDALONE`."""
    return _drafts(values[0], draft) if _algorithm(draft) == STANDALONE else NO_DRAFTS(values, draft)


def draft_tokens(values: tuple[str, ...], draft: Draft) -> Told:
    """Take how many tokens SGLang guesses."""
    told = Told("moot", AS_PAY)
    return told if _algorithm(draft) in (STANDALONE, NGRAM.upper()) else NO_DRAFTS(values, draft)


def _algorithm(draft: Draft) -> str:
    return next(iter(draft.given.get("speculative-algorithm", ())), "").upper()


def _drafts(small: str, draft: Draft) -> Told:
    """Take a model that drafts."""
    draft.serve["--speculation"], draft.serve["--draft"] = DRAFT, (called := plain(small))
    told = f"build {small} into the same catalog by the name {called}, with kernel=own and the same tokenizer"
    return mapped(f"llmbuild serve --speculation {DRAFT} --draft {called}: {told}; {AS_PAY}")


def plain(name: str) -> str:
    """Return what a model is called, in the letters of a recipe's name."""
    last = name.rstrip("/").rsplit("/", 1)[-1].removesuffix(".gguf")
    return re.sub(r"[^A-Za-z0-9._-]", "-", last)[:64].strip("-.") or "model"


NO_TLS = refuse("the server speaks no TLS: put a proxy in front of it")
STREAM_INTERVAL = moot("chunks join tokens by the time between them: `llmbuild serve --stream-interval SECONDS`")
NO_GRAPHS = moot("steps are compiled before, and captured by nobody")
NO_CODE = refuse("code of a model is never run: it must be of a kind that `llmbuild doctor` lists")
NOT_LOGGED = moot("each request is a line of the log, without prompts and answers")
