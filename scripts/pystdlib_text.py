"""The training and test text of the model of recipes/pystdlib, its tokens, and a bigram model of them.

Needs numpy and tokenizers.  The text is the source of the running interpreter's standard library; none of it is kept.
"""

from __future__ import annotations

import contextlib
import json
import math
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

Tokens = npt.NDArray[np.int64]

END = "<|endoftext|>"
END_ID = 0
VOCAB = 4096

# Folders and files that are data, tests or machine-specific settings rather than Python that a person would write.
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data", "encodings"}
SKIPPED_FILES = {"html/entities.py", "msilib/schema.py", "msilib/sequence.py"}
SKIPPED_PREFIX = "_sysconfigdata"
TWIN_LINE = 25  # characters from which a line is as_our_errors
TWIN_LINES = 6  # a file that shares more telling lines than this with a held-out module,
TWIN_SHARE = 0.08  # and more than this share of that module's telling lines, is a near-duplicate of it
TABLE_SHARE = 0.15  # share of digits and backslashes from which a file is a table


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON as people read it."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def heldout_modules(recipe: Path) -> list[str]:
    """Names of the modules that training never sees, from heldout.json."""
    names: list[str] = json.loads((recipe / "heldout.json").read_text(encoding="utf-8"))["modules"]
    return names


def is_skipped(name: Path) -> bool:
    """Whether a file, by its path relative to the library, is not among what the model should learn to write."""
    inner = set(name.parts[1:] if name.parts[0] == "test" else name.parts)
    return bool(SKIPPED_FOLDERS & inner) or name.as_posix() in SKIPPED_FILES or name.name.startswith(SKIPPED_PREFIX)


def is_table(text: str) -> bool:
    """Whether a text is mostly data: numbers and escapes rather than words."""
    return sum(text.count(sign) for sign in "0123456789\\") > TABLE_SHARE * len(text)


def library_files() -> dict[str, str]:
    """Text of the standard library's modules by slash-separated path, without what SKIPPED_* name."""
    base = Path(sysconfig.get_paths()["stdlib"])
    texts: dict[str, str] = {}
    for path in sorted(base.rglob("*.py")):
        name = path.relative_to(base)
        if not is_skipped(name):
            with contextlib.suppress(UnicodeDecodeError):
                text = path.read_text(encoding="utf-8")
                if text.strip() and not is_table(text):
                    texts[name.as_posix()] = text
    return texts


def telling_lines(text: str) -> set[str]:
    """Lines long enough that two files sharing many of them are relatives."""
    return {line.strip() for line in text.splitlines() if len(line.strip()) >= TWIN_LINE}


def is_twin(text: str, held_lines: list[set[str]]) -> bool:
    """Whether a file shares so many telling lines with a held-out module that it would give its text away."""
    lines = telling_lines(text)
    return any(len(lines & other) > max(TWIN_LINES, TWIN_SHARE * len(other)) for other in held_lines)


@dataclass
class Library:
    """The standard library's text by path, divided."""

    train: dict[str, str]  # modules to learn from
    extra: dict[str, str]  # its test suite: more Python to learn from, in the first part of a run only
    held: dict[str, str]  # modules never seen
    twins: list[str]  # near-duplicates and tests of held-out modules: left out


def held_texts(modules: list[str]) -> dict[str, str]:
    """Text of the held-out modules, given by dotted name, by path."""
    base = Path(sysconfig.get_paths()["stdlib"])
    paths = sorted(name.replace(".", "/") + ".py" for name in modules)
    return {path: (base / path).read_text(encoding="utf-8") for path in paths}


def split_library(modules: list[str]) -> Library:
    """Read the library and divide it; modules are the dotted names of what is held out."""
    library = Library({}, {}, held_texts(modules), [])
    held_lines = [telling_lines(text) for text in library.held.values()]
    tested = {f"test_{part}" for name in modules for part in name.split(".")}
    for path, text in library_files().items():
        is_test = path.startswith("test/")
        if path in library.held:
            continue
        if is_twin(text, held_lines) or (is_test and tested & set(path[:-3].split("/"))):
            library.twins.append(path)
        elif is_test:
            library.extra[path] = text
        else:
            library.train[path] = text
    return library


def train_tokenizer(texts: dict[str, str]) -> Tokenizer:
    """Byte-level BPE of VOCAB tokens, the end-of-text token first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        min_frequency=2,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        max_token_length=20,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts.values(), trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: dict[str, str]) -> list[Tokens]:
    """Token ids of each text, with the end-of-text token before and after it."""
    encoded = tokenizer.encode_batch(list(texts.values()), add_special_tokens=False)
    return [np.array([END_ID, *item.ids, END_ID], dtype=np.int64) for item in encoded]


def pack(documents: list[Tokens], seed: int) -> Tokens:
    """All documents in one row, in an order that the seed decides, one end-of-text token between neighbours."""
    order = np.random.default_rng(seed).permutation(len(documents))
    return np.concatenate([documents[i][:-1] for i in order] + [np.array([END_ID])])


@dataclass
class Score:
    """How well a model foretells some tokens."""

    nats: float  # sum over the tokens
    tokens: int

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """Per token."""
        return math.exp(self.loss)


class Bigram:
    """Interpolated Kneser-Ney: absolute discounting, backing off to how many different tokens precede a token."""

    def __init__(self, documents: list[Tokens], vocab: int, discount: float = 0.75) -> None:
        keys = np.concatenate([d[:-1] * vocab + d[1:] for d in documents])
        self.keys, self.counts = np.unique(keys, return_counts=True)
        self.vocab, self.discount = vocab, discount
        first, second = self.keys // vocab, self.keys % vocab
        self.totals = np.bincount(first, weights=self.counts, minlength=vocab)
        self.kinds = np.bincount(first, minlength=vocab)
        before = np.bincount(second, minlength=vocab) + 0.5
        self.unigram = before / before.sum()

    def measure(self, documents: list[Tokens]) -> Score:
        """Score of every token after a document's first."""
        first = np.concatenate([d[:-1] for d in documents])
        second = np.concatenate([d[1:] for d in documents])
        keys = first * self.vocab + second
        at = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        seen = np.where(self.keys[at] == keys, self.counts[at], 0)
        totals = np.maximum(self.totals[first], 1)
        backoff = np.where(self.totals[first] > 0, self.discount * self.kinds[first] / totals, 1.0)
        chance = np.maximum(seen - self.discount, 0) / totals + backoff * self.unigram[second]
        return Score(float(-np.log(chance).sum()), len(second))


def tuned_bigram(documents: list[Tokens], vocab: int) -> Bigram:
    """A bigram model of all documents, its discount being the best for every tenth of them given the others."""
    rest = [d for i, d in enumerate(documents) if i % 10]
    tenth = documents[::10]
    trial = Bigram(rest, vocab)
    scores = {}
    for discount in np.arange(0.3, 1.0, 0.05):
        trial.discount = float(discount)
        scores[trial.discount] = trial.measure(tenth).nats
    return Bigram(documents, vocab, min(scores, key=lambda discount: scores[discount]))
