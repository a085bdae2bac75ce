"""What a model is calibrated on: windows of a recipe's texts, and chats that the model itself writes, by their shares.

What a build knows before anything runs is here: windows of given texts, and what the model will be asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from llmbuild import digest
from llmbuild.errors import InputError
from llmbuild.profiler.heldout import WINDOW, cut, read_text, unfit
from llmbuild.spec.recipe import Calibration, Recipe, Text

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Chats:
    """What a model is asked to write: `windows` texts of `length` tokens, with answers to `prompts`, each of tokens."""

    prompts: tuple[tuple[int, ...], ...]
    windows: int
    length: int


@dataclass(frozen=True)
class Parts:
    """The windows i64[W,L] of each text of a recipe, or what the model is asked to write for it."""

    each: tuple[NDArray[np.int64] | Chats, ...]

    def identity(self) -> str:
        """Return the digest of what decides on the tokens, beside the model."""
        named = [digest.of(asdict(p)) if isinstance(p, Chats) else digest.of_bytes(p.tobytes()) for p in self.each]
        return named[0] if len(named) == 1 else digest.of(named)


def parts(asked: Calibration, tokenizer: Path, context: int, chat: bytes | None) -> Parts:
    """Return the parts of a calibration's texts; `chat` is the model's chat template, as a catalog keeps it.

    Raises:
        InputError: the tokenizer or a text cannot be read, or a text has no window of tokens.
    """
    length = min(WINDOW, context)
    counts = shared_out([text.share for text in asked.texts], max(1, asked.tokens // length))
    made: list[NDArray[np.int64] | Chats] = []
    for text, count in zip(asked.texts, counts, strict=True):
        if text.chats:
            made.append(Chats(tuple(_prompts(text, tokenizer, chat)), count, length))
        else:
            made.append(cut(text, count, length, tokenizer))
    return Parts(tuple(made))


def shared_out(shares: Sequence[float], windows: int) -> list[int]:
    """Return the windows of each text: by its share, and at least one."""
    each = windows / sum(shares)
    ends = [int(each * sum(shares[:i]) + 0.5) for i in range(len(shares) + 1)]
    return [max(1, end - begin) for begin, end in pairwise(ends)]


def mixed(windows: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    """Return the windows i64[W,L] of all texts, those of each spread evenly: the first few have something of all."""
    import numpy as np

    places = np.concatenate([(np.arange(len(each)) + 0.5) / len(each) for each in windows])
    found: NDArray[np.int64] = np.concatenate(list(windows))[np.argsort(places, kind="stable")]
    return found


def uncalibrated(recipe: Recipe, tokenizer: Path | None, vocabulary: int, chat: bytes | None) -> str:
    """Return why a model cannot be calibrated on the texts of a recipe; '' where it can, or there is no such text.

    Raises:
        InputError: a module or a file is missing.
    """
    if recipe.calibration is None or recipe.model.random_init:
        return ""
    for text in recipe.calibration.texts:
        if why := _unanswered(text, tokenizer, recipe.context, chat) if text.chats else "":
            return why
        if not text.chats and (why := unfit(text, tokenizer, recipe.context, vocabulary)):
            return why
    return ""


def _unanswered(text: Text, tokenizer: Path | None, context: int, chat: bytes | None) -> str:
    """Return why a model cannot be asked these prompts; '' where it can."""
    if tokenizer is None:
        return "the model has no tokenizer.json to read calibration prompts with"
    try:
        longest = max(map(len, _prompts(text, tokenizer, chat)))
    except InputError as error:
        return str(error)
    length = min(WINDOW, context)
    return "" if longest < length else f"a calibration prompt has {longest} tokens, and a window {length}: shorten it"


def _prompts(text: Text, tokenizer: Path, chat: bytes | None) -> list[tuple[int, ...]]:
    """Return the tokens of each prompt of a text, up to where the model answers."""
    from llmbuild.runtime.chat import USER, ChatTemplate
    from llmbuild.runtime.tokenizer import Tokenizer

    if chat is None:
        raise InputError("the model has no chat template to ask calibration prompts through")
    template, door = ChatTemplate.of(chat, "the model's chat template"), Tokenizer(tokenizer)
    lines = [line.strip() for line in read_text(text).splitlines() if line.strip()]
    if not lines:
        raise InputError(f"calibration prompts {text.chats}: no line of text")
    return [tuple(template.encode([{"role": USER, "content": line}], door).ids) for line in lines]
