"""Chats of the command `run`: one answer, or a conversation on a terminal whose history stays within the context."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from llmbuild.cli.requests import Sampling
from llmbuild.errors import InputError
from llmbuild.system.terminal import data

if TYPE_CHECKING:
    from llmbuild.runtime.answers import Answer
    from llmbuild.runtime.model import Model

Turn = dict[str, str]
SHARE = 4
"""One part in so many of the context is kept free for an answer, where its length is not bounded otherwise."""


def opening(opened: Model) -> str:
    """Return which variant was opened, and its time per token."""
    tpot = opened.row["tpot_s"]
    read = "never measured" if tpot is None else f"tpot {tpot:.3g} s"
    return f"variant {opened.row['variant'][:12]}, {read}"


def print_out(opened: Model, answer: Answer[str]) -> str:
    """Print an answer as it is made and return it; a note on stderr tells that the context is full."""
    pieces = []
    for piece in answer:
        data(piece)
        pieces.append(piece)
    click.echo()
    if answer.finish_reason == "context":
        click.echo(f"the context of {opened.session.abi.context} tokens is full: the answer ends here", err=True)
    return "".join(pieces)


def answer(opened: Model, system: str | None, text: str | None, sampling: Sampling) -> int:
    """Print the answer to one message of a user.

    Raises:
        InputError: there is no message, or the model has no chat template or no room for it.
    """
    if not text:
        raise InputError("--chat: standard input holds no message: give one there, or with --prompt TEXT")
    said = _answer(opened, _chat(system, [_turn("user", text)]), sampling)
    click.echo(f"{opening(opened)}\nprompt of {len(said.prompt)} tokens", err=True)
    print_out(opened, said)
    return 0


def converse(opened: Model, system: str | None, sampling: Sampling) -> int:
    """Hold a chat until standard input ends: each line is a message of the user.

    Raises:
        InputError: the model has no chat template, or it refuses the system message.
    """
    turns: list[Turn] = []
    _answer(opened, _chat(system, [_turn("user", "a")]), sampling).close()  # what refuses every message is told at once
    click.echo(f"{opening(opened)}\neach line is a message; end the chat with Ctrl-D", err=True)
    while (line := _line()) is not None:
        if not line.strip():
            continue
        asked = [*turns, _turn("user", line)]
        try:
            kept = fitting(opened, system, asked, sampling.max_new_tokens)
            said = _answer(opened, _chat(system, kept), sampling)
        except InputError as error:
            click.echo(f"error: {error}", err=True)
            continue
        if left := len(asked) - len(kept):
            context = opened.session.abi.context
            click.echo(f"the context of {context} tokens is full: the first {left} messages are left out", err=True)
        turns = [*kept, _turn("assistant", print_out(opened, said))]
    click.echo(err=True)
    return 0


def fitting(opened: Model, system: str | None, turns: list[Turn], most: int) -> list[Turn]:
    """Return the last of a chat's turns that leave room for an answer of `most` tokens, at least the last one.

    A turn of the user and its answer are left out together. An answer may need a part of the context, not all of it.
    """
    context = opened.session.abi.context
    room = context - min(most, context // SHARE)
    while len(turns) > 1 and len(opened.encode_chat(_chat(system, turns)).tokens) > room:
        turns = turns[2:]
    return turns


def _answer(opened: Model, messages: list[Turn], sampling: Sampling) -> Answer[str]:
    drawn = {name: getattr(sampling, name) for name in ("temperature", "top_k", "top_p", "seed")}
    return opened.chat(messages, sampling.max_new_tokens, stop=sampling.stop, **drawn)


def _chat(system: str | None, turns: list[Turn]) -> list[Turn]:
    return [*([] if system is None else [_turn("system", system)]), *turns]


def _turn(role: str, text: str) -> Turn:
    return {"role": role, "content": text}


def _line() -> str | None:
    """Return the next line of the terminal without its end; None where there is no more."""
    click.echo("> ", nl=False, err=True)
    line = sys.stdin.buffer.readline()
    try:
        return line.decode().removesuffix("\n") if line else None
    except UnicodeDecodeError as error:
        click.echo(f"error: not UTF-8 text: byte {error.start} cannot be read", err=True)
        return ""
