"""The bodies of answers: whole ones and chunks of streams, of chats and of completions."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from llmbuild.runtime.tokenizer import Tokenizer
from llmbuild.serve.api.asked import Asked
from llmbuild.serve.api.bridge import Answers, Numbered
from llmbuild.serve.api.errors import ApiError, of_fault
from llmbuild.serve.events import Delta, Ended, Finish, Logprob
from llmbuild.serve.tools import Parser

Json = dict[str, object]


@dataclass
class Part:
    """What came of one choice: its text, the log-probabilities of its tokens, and its finish."""

    text: list[str] = field(default_factory=list)
    logprobs: list[Logprob] = field(default_factory=list)
    finish: Finish | None = None

    def take(self, delta: Delta) -> None:
        """Take a token."""
        self.text.append(delta.text)
        if delta.logprob is not None:
            self.logprobs.append(delta.logprob)
        self.finish = delta.finish


def parts(events: Iterable[Numbered], found: dict[int, Part] | None = None) -> dict[int, Part]:
    """Return what events say of each choice, added to what was `found` before.

    Raises:
        ApiError: the engine gave one up.
    """
    found = {} if found is None else found
    for choice, event in events:
        if isinstance(event, Ended):
            raise of_fault(event.fault, event.why)
        found.setdefault(choice, Part()).take(event)
    return found


@dataclass
class Said:
    """What of a part is text, the calls in it as OpenAI's API has them, and its finish reason."""

    text: str
    calls: list[Json]
    end: Json


class Replies:
    """Makes the bodies of the answers to one request."""

    def __init__(self, asked: Asked, name: str, created: int) -> None:
        self._asked, self._name, self._created = asked, name, created
        self._parsers = [Parser(asked.tools) for _ in range(asked.choices)] if asked.tools else []
        self._offsets = [0] * asked.choices
        """Characters of each choice's tokens so far, for the offsets of completions."""
        self._begin = b"data: " + _json(self._head(self._kind()))[:-1] + b',"choices":'
        self._end = b',"usage":null}\n\n' if asked.include_usage else b"}\n\n"
        """What all chunks begin and end with: a stream has one for each token."""

    def whole(self, found: dict[int, Part], answers: Answers) -> Json:
        """Return the body of an answer that is not streamed."""
        kind = "chat.completion" if self._asked.chat else "text_completion"
        choices = [self._choice(i, found[i], whole=True) for i in range(self._asked.choices)]
        return {**self._head(kind), "choices": choices, "usage": self.usage(answers)}

    def opening(self) -> bytes:
        """Return the first chunks of a stream: a chat's choices in their order, each with the role."""
        if not self._asked.chat:
            return b""
        delta = {"role": "assistant", "content": ""}
        empty: Iterable[Json] = (
            {"index": i, "delta": delta, "logprobs": None, "finish_reason": None} for i in range(self._asked.choices)
        )
        return b"".join(self._chunk([one]) for one in empty)

    def chunks(self, found: dict[int, Part]) -> bytes:
        """Return the chunks that say what came; none for a choice of which there is nothing to say."""
        told = ((i, one) for i, one in found.items() if one.finish or one.logprobs or any(one.text))
        return b"".join(self._chunks(i, one) for i, one in told)

    def ending(self, answers: Answers) -> bytes:
        """Return the end of a stream, behind the usage if it is asked for."""
        usage = b""
        if self._asked.include_usage:
            usage = _event({**self._head(self._kind()), "choices": [], "usage": self.usage(answers)})
        return usage + b"data: [DONE]\n\n"

    def usage(self, answers: Answers) -> Json:
        """Return the tokens of prompts and answers."""
        prompt, completion = self._asked.prompt_tokens, answers.completion_tokens
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": answers.cached_tokens},
        }

    def _chunks(self, index: int, part: Part) -> bytes:
        """Return a chunk with text, and for a chat one more with the finish."""
        if not self._asked.chat:
            return self._chunk([self._choice(index, part, whole=False)])
        said, logprobs = self._said(index, part), self._logprobs(index, part)
        deltas: list[Json] = [{"content": said.text}] if said.text or part.logprobs else []
        for call in said.calls:
            place, function = call["index"], call["function"]
            assert isinstance(function, dict)
            deltas.append({"tool_calls": [{**call, "function": {**function, "arguments": ""}}]})
            deltas.append({"tool_calls": [{"index": place, "function": {"arguments": function["arguments"]}}]})
        told: list[Json] = [
            {"index": index, "delta": delta, "logprobs": None, "finish_reason": None} for delta in deltas
        ]
        if told:
            told[0]["logprobs"] = logprobs
        if part.finish is not None:
            told.append({"index": index, "delta": {}, "logprobs": None, **said.end})
        return b"".join(self._chunk([one]) for one in told)

    def _said(self, index: int, part: Part) -> Said:
        """Return what a part says: its text, and the calls that have become whole."""
        text, end = "".join(part.text), _finished(part.finish)
        if not self._parsers:
            return Said(text, [], end)
        parser = self._parsers[index]
        known = len(parser.calls)
        text = parser.push(text)
        if part.finish is not None:
            text += parser.end()
            if parser.calls and part.finish.reason == "stop":
                end["finish_reason"] = "tool_calls"
        calls: list[Json] = [
            {
                "index": place,
                "id": f"call_{secrets.token_hex(12)}",
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for place, call in enumerate(parser.calls[known:], known)
        ]
        return Said(text, calls, end)

    def _choice(self, index: int, part: Part, whole: bool) -> Json:
        logprobs = self._logprobs(index, part)
        if not self._asked.chat:
            return {"index": index, "text": "".join(part.text), "logprobs": logprobs, **_finished(part.finish)}
        assert whole
        said = self._said(index, part)
        message: Json = {"role": "assistant", "content": said.text, "refusal": None}
        if said.calls:
            calls = [{name: value for name, value in call.items() if name != "index"} for call in said.calls]
            message |= {"content": said.text.strip("\n") or None, "tool_calls": calls}
        return {"index": index, "message": message, "logprobs": logprobs, **said.end}

    def _logprobs(self, index: int, part: Part) -> Json | None:
        if self._asked.requests[0].params.logprobs is None:
            return None
        if self._asked.chat:
            return {"content": [self._entry(one) for one in part.logprobs], "refusal": None}
        texts, offsets = [], []
        for one in part.logprobs:
            texts.append(_text_of(self._asked.served.tokenizer, one.token))
            offsets.append(self._offsets[index])
            self._offsets[index] += len(texts[-1])
        return {
            "tokens": texts,
            "token_logprobs": [one.logprob for one in part.logprobs],
            "top_logprobs": [self._top(one) for one in part.logprobs],
            "text_offset": offsets,
        }

    def _top(self, one: Logprob) -> dict[str, float]:
        """Return the most likely tokens, and the one that was taken, by their texts; of equal texts the likelier."""
        tokenizer = self._asked.served.tokenizer
        listed = [*one.top, (one.token, one.logprob)]
        return {_text_of(tokenizer, token): value for token, value in reversed(listed)}

    def _entry(self, one: Logprob) -> Json:
        return {**self._shown(one.token, one.logprob), "top_logprobs": [self._shown(*each) for each in one.top]}

    def _shown(self, token: int, value: float) -> Json:
        data = self._asked.served.tokenizer.bytes_of(token)
        return {"token": data.decode(errors="replace"), "logprob": value, "bytes": list(data)}

    def _kind(self) -> str:
        return "chat.completion.chunk" if self._asked.chat else "text_completion"

    def _chunk(self, choices: Sequence[Json]) -> bytes:
        return self._begin + _json(choices) + self._end

    def _head(self, kind: str) -> Json:
        served = self._asked.served
        head: Json = {"id": self._name, "object": kind, "created": self._created, "model": served.name}
        return {**head, "system_fingerprint": served.variant[:12]}


def failed(error: ApiError) -> bytes:
    """Return the end of a stream that has failed: clients raise an error of it."""
    return _event(error.body)


def _text_of(tokenizer: Tokenizer, token: int) -> str:
    """Return the text of a token; of one that is not whole characters its bytes, in OpenAI's form."""
    data = tokenizer.bytes_of(token)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _finished(finish: Finish | None) -> Json:
    if finish is None:
        return {"finish_reason": None}
    return {"finish_reason": finish.reason, "stop_reason": finish.stop_reason}


_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def _json(body: object) -> bytes:
    return _encode(body).encode()


def _event(body: object) -> bytes:
    return b"data: " + _json(body) + b"\n\n"
