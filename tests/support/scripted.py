"""A model that says what a test wrote, with a real tokenizer, chat template and grammars, over no device."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from llmbuild.runtime.answers import Text
from llmbuild.runtime.chat import ChatTemplate
from llmbuild.runtime.tokenizer import Tokenizer as Loaded
from llmbuild.serve.api.bridge import Bridge
from llmbuild.serve.api.metrics import Metrics
from llmbuild.serve.blocks import Names
from llmbuild.serve.engine import Engine, Limits
from llmbuild.serve.grammar import Grammars
from llmbuild.serve.request import Request
from llmbuild.serve.schedule.fcfs import Fcfs
from llmbuild.serve.served import Prompt
from llmbuild.serve.step import Output, Rows
from llmbuild.serve.tools import Form, form_of

HERMES = (
    "{% if tools %}<|im_start|>system\nTools: {% for t in tools %}{{ t | tojson }}\n{% endfor %}"
    'Answer as <tool_call>\n{"name": ..., "arguments": ...}\n</tool_call><|im_end|>\n{% endif %}'
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>\n{{ c.function | tojson }}\n</tool_call>{% endfor %}<|im_end|>\n"
    "{% endfor %}<|im_start|>assistant\n"
)
LLAMA3 = (
    '{% if tools %}Answer as {"name": function name, "parameters": dictionary}.{% for t in tools %}{{ t | tojson }}'
    "{% endfor %}{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
)
PLAIN = "{% for m in messages %}{{ m.content }}{% endfor %}"
SPECIAL = ["<|im_end|>", "<|im_start|>"]


def tokenizer(folder: Path, added: Sequence[str] = ()) -> Path:
    """Write a tokenizer of bytes, with special tokens and added ones."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(SPECIAL)
    made.add_tokens([AddedToken(name, special=False) for name in added])
    path = folder / "tokenizer.json"
    made.save(str(path))
    return path


class ScriptedStep:
    """A device that prefers the tokens of a script, one after another, and behind it the end."""

    slots, context, cut, room, drafts = 4, 4096, 1, 4, False

    def __init__(self, script: Sequence[int], vocabulary: int, end: int) -> None:
        self.script, self.vocabulary, self.ends = [*script, end], vocabulary, (end,)
        self._prompts: dict[int, int] = {}
        self.prompts: list[list[int]] = []

    def takes(self, positions: int) -> int:
        """Return 1."""
        return 1

    def names(self, tokens: Sequence[int], salt: bytes) -> Names:
        """Return nothing."""
        return ()

    def known(self, names: Names) -> int:
        """Return 0."""
        return 0

    def begin(self, slot: int, tokens: Sequence[int], names: Names, salt: bytes) -> int:
        """Note a prompt."""
        self._prompts[slot] = len(tokens)
        self.prompts.append(list(tokens))
        return 0

    def keep(self, slot: int, tokens: Sequence[int]) -> None:
        """There are no drafts."""

    def end(self, slot: int) -> None:
        """Free a slot."""

    def run(self, batch: Sequence[Rows]) -> list[Output]:
        """Say the next token of the script."""
        return [self._one(rows.start + len(rows.tokens) - self._prompts[rows.slot]) for rows in batch]

    def _one(self, place: int) -> Output:
        logits = np.random.default_rng(place).normal(0, 1, self.vocabulary).astype(np.float32)
        token = self.script[min(place, len(self.script) - 1)]
        logits[token] = 50.0
        return Output(token, logits)

    def close(self) -> None:
        """Nothing is held."""


class Scripted:
    """What the routes need of a model."""

    name, variant, context = "fake", "f" * 64, ScriptedStep.context

    def __init__(self, path: Path, template: str, says: str, bridge: Bridge, metrics: Metrics) -> None:
        library = Tokenizer.from_file(str(path))
        self.tokenizer: Any = Loaded(path)
        self.step = ScriptedStep(library.encode(says).ids, library.get_vocab_size(), library.token_to_id("<|im_end|>"))
        self.template = ChatTemplate(template)
        self.classes: dict[str, Any] = {}
        self.observer = metrics.observe(self.name)
        self.grammars = Grammars(path, self.step.vocabulary, self.step.ends)
        self.engine = Engine(self.step, Fcfs(), self._text, bridge.outlet, Limits(), self.observer)

    @property
    def call_form(self) -> Form | None:
        """In which form calls are written."""
        return form_of(self.template.template)

    def chat(self, messages: Sequence[Any], tools: Sequence[Any] = ()) -> Prompt:
        """Return the prompt of a chat."""
        return Prompt(self.template.encode(messages, self.tokenizer, tools).tokens)

    def prompt(self) -> str:
        """Return the text of the last prompt, with its control tokens."""
        return "".join(self.tokenizer.bytes_of(token).decode("latin-1") for token in self.step.prompts[-1])

    def _text(self, request: Request, ends: frozenset[int]) -> Text:
        return Text(self.tokenizer.decoder(request.prompt), tuple(ends), request.params.stops)
