"""A GGUF file's tokenizer as a tokenizer.json, and the settings that stand beside it.

A file has the vocabulary and names the rest: `tokenizer.ggml.model` the kind, `tokenizer.ggml.pre` how a text is split
before it is merged. The rules for each name are those of the models' own tokenizers. The transformers library has a
converter too; it splits by fewer names, and loading it takes longer than all else that a model is judged by.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmbuild.frontend.documents import shown, told
from llmbuild.frontend.gguf_header import Value

PREFIX = "tokenizer.ggml."
TEMPLATE = "tokenizer.chat_template"

_NORMAL, _UNKNOWN, _CONTROL, _OWN = 1, 2, 3, 4
"""Kinds of tokens: of the vocabulary; for what is in no token; with a meaning of their own; added by the model."""
_SPACE = "▁"

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}{_REST}"
_QWEN2 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{_REST}"
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Split:
    """How a text is split before bytes are merged."""

    pattern: str = ""
    """What is kept together; empty for GPT-2's rule."""
    digits: bool = False
    """Whether each digit is alone, before that."""
    composed: bool = False
    """Whether characters are composed first (NFC)."""
    whole: bool = False
    """Whether a part that is a token is taken without merging."""
    begins: bool = False
    """Whether a text gets a beginning token where the file does not say."""


SPLITS = {
    **dict.fromkeys(("default", "gpt-2"), Split()),
    "smollm": Split(digits=True),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), Split(_LLAMA3, whole=True, begins=True)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), Split(_QWEN2, composed=True)),
    "tekken": Split(_TEKKEN, whole=True, begins=True),
}
"""By `tokenizer.ggml.pre`, for byte-level vocabularies (`tokenizer.ggml.model` gpt2)."""


@dataclass(frozen=True)
class Texts:
    """What a model needs for texts: a tokenizer.json, '' where it cannot be made, settings and notes."""

    tokenizer: str
    settings: dict[str, Any]
    notes: tuple[str, ...] = ()


class _Unfit(Exception):
    """Why no tokenizer can be made."""


def texts_of(metadata: Mapping[str, Value]) -> Texts:
    """Return the tokenizer and the settings that a file's metadata means."""
    reading = _Reading(metadata)
    if not reading.has("model") and not reading.has("tokens"):
        return Texts("", reading.settings(), ("the file has no tokenizer: texts cannot be read",))
    try:
        return Texts(reading.tokenizer(), reading.settings(), reading.notes())
    except _Unfit as error:
        return Texts("", reading.settings(), (f"built without a tokenizer, so that texts cannot be read: {error}",))


class _Reading:
    """One pass over the metadata of a tokenizer; keys are those below `tokenizer.ggml.`."""

    def __init__(self, metadata: Mapping[str, Value]) -> None:
        self.metadata = metadata
        self.kind, self.pre = (self._found(key) for key in ("model", "pre"))
        self.split = SPLITS.get(self.pre, Split()) if isinstance(self.pre, str) else Split()

    def has(self, key: str) -> bool:
        """Return whether there is such a key."""
        return PREFIX + key in self.metadata

    def tokenizer(self) -> str:
        """Return the tokenizer as JSON.

        Raises:
            _Unfit: an unknown kind, or one that contradicts itself.
        """
        tokens = self._texts("tokens")
        if len({*tokens}) < len(tokens):
            twice = next(token for number, token in enumerate(tokens) if token in tokens[:number])
            raise _Unfit(f"{PREFIX}tokens has {shown(twice)} twice")
        kinds = self._array("token_type", len(tokens)) if self.has("token_type") else (_NORMAL,) * len(tokens)
        makers: dict[object, Callable[[Sequence[str], Sequence[Value]], Any]] = {
            "gpt2": self._byte_level,
            "llama": self._sentencepiece,
        }
        if self.kind not in makers:
            raise _Unfit(f"{PREFIX}model is {shown(self.kind)}; taken are {', '.join(map(str, makers))}")
        try:
            made = makers[self.kind](tokens, kinds)
            self._add(made, tokens, kinds)
            self._surround(made, tokens)
            return str(made.to_str())
        except _Unfit:
            raise
        except Exception as error:  # noqa: BLE001 - the library's errors have no class of their own
            raise _Unfit(f"the tokenizers library refuses it: {told(error)}") from None

    def settings(self) -> dict[str, Any]:
        """Return what a tokenizer_config.json says of the tokenizer."""
        tokens = self._found("tokens")
        named = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
        found: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "add_bos_token": self._begins(),
            "add_eos_token": self._found("add_eos_token") is True,
        }
        for key, name in named.items():
            token = self._found(f"{name}_token_id")
            if isinstance(tokens, tuple) and type(token) is int and 0 <= token < len(tokens):
                found[key] = tokens[token]
        templates = {
            key.removeprefix(TEMPLATE).removeprefix(".") or "default": text
            for key, text in self.metadata.items()
            if (key == TEMPLATE or key.startswith(f"{TEMPLATE}.")) and isinstance(text, str)
        }
        if len(templates) == 1 and "default" in templates:
            found["chat_template"] = templates["default"]
        elif templates:
            found["chat_template"] = [{"name": name, "template": text} for name, text in templates.items()]
        return found

    def notes(self) -> tuple[str, ...]:
        """Return what is worth telling of a tokenizer that could be made."""
        guessed = self.kind == "gpt2" and self.pre == "default"
        return (f"{PREFIX}pre is default: texts are split as GPT-2 splits them",) if guessed else ()

    # --- values by key -------------------------------------------------------------------------------------------

    def _found(self, key: str) -> Value | None:
        return self.metadata.get(PREFIX + key)

    def _array(self, key: str, length: int) -> tuple[Any, ...]:
        found = self._found(key)
        if not isinstance(found, tuple) or len(found) != length:
            raise _Unfit(f"{PREFIX}{key} is no array of {length} values, one for each token")
        return found

    def _texts(self, key: str) -> tuple[str, ...]:
        found = self._found(key)
        if not isinstance(found, tuple) or not found or not isinstance(found[0], str):
            raise _Unfit(f"{PREFIX}{key} is no array of texts")
        return tuple(map(str, found))

    def _id(self, name: str, tokens: Sequence[str]) -> int | None:
        found = self._found(f"{name}_token_id")
        if found is not None and not (type(found) is int and 0 <= found < len(tokens)):
            raise _Unfit(f"{PREFIX}{name}_token_id is {shown(found)}, which is none of {len(tokens)} tokens")
        return found if isinstance(found, int) else None

    def _begins(self) -> bool:
        found = self._found("add_bos_token")
        return found if isinstance(found, bool) else self.kind == "llama" or (self.kind == "gpt2" and self.split.begins)

    def _spaced(self, otherwise: bool) -> bool:
        """Return whether a text gets a space in front."""
        found = self._found("add_space_prefix")
        return found if isinstance(found, bool) else otherwise

    # --- kinds of tokenizers -------------------------------------------------------------------------------------

    def _byte_level(self, tokens: Sequence[str], _: Sequence[Value]) -> Any:
        from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

        if self.pre not in SPLITS:
            raise _Unfit(f"{PREFIX}pre is {shown(self.pre)}; taken are {', '.join(SPLITS)}")
        split, spaced = self.split, self._spaced(False)
        merges = self._merges()
        vocabulary = {token: number for number, token in enumerate(tokens)}
        made: Any = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=split.whole))
        if split.composed:
            made.normalizer = normalizers.NFC()
        steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if split.digits else []
        if split.pattern:
            steps.append(pre_tokenizers.Split(Regex(split.pattern), behavior="isolated"))
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=spaced, use_regex=not split.pattern))
        made.pre_tokenizer = pre_tokenizers.Sequence(steps)
        made.decoder = decoders.ByteLevel()
        return made

    def _merges(self) -> list[tuple[str, str]]:
        pairs = [tuple(merge.split(" ")) for merge in self._texts("merges")]
        if odd := next((pair for pair in pairs if len(pair) != 2), None):
            raise _Unfit(f"{PREFIX}merges has {shown(' '.join(odd))}, which is no pair")
        return [(pair[0], pair[1]) for pair in pairs]

    def _sentencepiece(self, tokens: Sequence[str], kinds: Sequence[Value]) -> Any:
        from tokenizers import Tokenizer, decoders, models, normalizers

        plain: dict[str, Value] = {
            "precompiled_charsmap": (),
            "remove_extra_whitespaces": False,
            "escape_whitespaces": True,
        }
        for key, value in plain.items():
            if self.has(key) and self._found(key) != value:
                raise _Unfit(f"{PREFIX}{key} is {shown(self._found(key))}, which is not supported")
        merges = self._merges() if self.has("merges") else _merges_of(tokens, kinds, self._array("scores", len(tokens)))
        unknown = self._id("unknown", tokens)
        if unknown is None:
            unknown = next((number for number, kind in enumerate(kinds) if kind == _UNKNOWN), None)
        vocabulary = {token: number for number, token in enumerate(tokens)}
        made: Any = Tokenizer(
            models.BPE(
                vocab=vocabulary,
                merges=merges,
                unk_token=None if unknown is None else tokens[unknown],
                fuse_unk=True,
                byte_fallback=True,
            )
        )
        front = self._spaced(True)
        spaces: list[Any] = [normalizers.Prepend(_SPACE)] if front else []
        made.normalizer = normalizers.Sequence([*spaces, normalizers.Replace(" ", _SPACE)])
        stages: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        made.decoder = decoders.Sequence([*stages, *([decoders.Strip(" ", 1, 0)] if front else [])])
        return made

    def _add(self, made: Any, tokens: Sequence[str], kinds: Sequence[Value]) -> None:
        """Have tokens with a meaning of their own found in a text before anything is merged."""
        from tokenizers import AddedToken

        special = (_CONTROL, _UNKNOWN) if self.kind == "llama" else (_CONTROL,)
        pairs = [(token, kind) for token, kind in zip(tokens, kinds, strict=True) if token]
        made.add_special_tokens([AddedToken(t, normalized=False, special=True) for t, kind in pairs if kind in special])
        made.add_tokens([AddedToken(t, normalized=False, special=False) for t, kind in pairs if kind == _OWN])

    def _surround(self, made: Any, tokens: Sequence[str]) -> None:
        """Put a beginning token before a text, and an end token after it, as the file says."""
        from tokenizers.processors import TemplateProcessing

        begin = self._id("bos", tokens) if self._begins() else None
        end = self._id("eos", tokens) if self._found("add_eos_token") is True else None
        around = [[tokens[number]] if number is not None else [] for number in (begin, end)]
        if begin is None and end is None:
            return
        made.post_processor = TemplateProcessing(
            single=[*around[0], "$A", *around[1]],
            pair=[*around[0], "$A", *around[1], *around[0], "$B:1", *around[1]],
            special_tokens=[(tokens[number], number) for number in {begin, end} if number is not None],
        )


def _merges_of(tokens: Sequence[str], kinds: Sequence[Value], scores: Sequence[Any]) -> list[tuple[str, str]]:
    """Return the merges that a vocabulary of pieces means: each piece of two others, the best scores first."""
    ids = {token: number for number, (token, kind) in enumerate(zip(tokens, kinds, strict=True)) if kind == _NORMAL}
    if len({scores[number] for number in ids.values()}) < 2:
        raise _Unfit(f"{PREFIX}scores are all alike: they do not say which pieces are merged first")
    found = []
    for token, number in ids.items():
        cuts = ((token[:at], token[at:]) for at in range(1, len(token)))
        pairs = sorted((ids[left], ids[right], left, right) for left, right in cuts if left in ids and right in ids)
        found += [(scores[number], left, right) for _, _, left, right in pairs]
    found.sort(key=lambda each: (each[0], len(each[1]), len(each[2])), reverse=True)
    return [(left, right) for _, left, right in found]
