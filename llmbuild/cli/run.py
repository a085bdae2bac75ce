"""The command that opens a variant and generates: run; `talk` holds its chats."""

from __future__ import annotations

import sys
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llmbuild.cli import talk
from llmbuild.cli.options import PATH, catalog_option, selection_of, slo_options, trust_of, trust_options
from llmbuild.cli.requests import RunRequest, Sampling
from llmbuild.errors import InputError
from llmbuild.system.terminal import data

if TYPE_CHECKING:
    from llmbuild.runtime.model import Model


TOKENS, MOST_TOKENS = 64, 1 << 20
"""Tokens that are added to a text where no number is given, and the largest number."""


@click.command(short_help="Pick a variant of MODEL and let it continue a text.")
@click.argument("model")
@click.option("--prompt", metavar="TEXT", help="Text to continue; -: standard input, as also where that is redirected.")
@click.option("--chat", is_flag=True, help="Answer through the model's chat template; on a terminal, hold a chat.")
@click.option("--system", metavar="TEXT", help="The system message that a --chat begins with.")
@click.option(
    "--max-new-tokens",
    type=click.IntRange(1, MOST_TOKENS),
    show_default=f"{TOKENS}; in a --chat as many as fit",
    help="Tokens to add.",
)
@click.option("--temperature", type=float, default=0.0, show_default=True, help="Above 0: draw tokens; 0 is greedy.")
@click.option("--top-k", type=int, default=0, help="Draw from the k most likely tokens only.")
@click.option("--top-p", type=float, default=1.0, help="Draw from the most likely tokens that reach this share.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of the draws.")
@click.option("--stop", multiple=True, metavar="TEXT", help="End the answer before this text; may be given again.")
@click.option(
    "--add-special-tokens/--no-add-special-tokens",
    default=True,
    show_default=True,
    help="Put before the prompt what the tokenizer puts before a text; a rendered chat has it already.",
)
@click.option("--variant", help="Open this variant instead of picking one.")
@click.option("--lock", type=PATH, help="Open what this lock file pins.")
@click.option("--fallback", is_flag=True, help="Where a variant's files are refused, open the next that meets the SLO.")
@slo_options
@catalog_option
@trust_options
def run(model: str, prompt: str | None, **options: Any) -> int:
    """Pick a variant of MODEL and let it continue a text, token by token.

    Without --prompt the text is what standard input holds; where that is a terminal or empty, the model begins itself.

    With --chat the text is a user's message and only the answer is printed; on a terminal without --prompt, each line
    is a message of one chat.
    """
    chat, system = options["chat"], options["system"]
    if system is not None and not chat:
        raise InputError("--system is the system message of a chat: give --chat too")
    options["max_new_tokens"] = options["max_new_tokens"] or (MOST_TOKENS if chat else TOKENS)
    asked = {name: options[name] for name in ("variant", "lock", "fallback")}
    request = RunRequest(Path(options["catalog"]), model, selection_of(options), trust=trust_of(options), **asked)
    sampling = Sampling(**{field.name: options[field.name] for field in fields(Sampling)})
    with _opened(request) as opened:
        if not chat:
            return _say(opened, _given(prompt), sampling)
        if prompt is None and sys.stdin is not None and sys.stdin.isatty():
            return talk.converse(opened, system, sampling)
        text = _given(prompt)
        if text and prompt in (None, "-"):
            text = text.removesuffix("\n")  # the end of a line, as `echo` writes it, is not part of a message
        return talk.answer(opened, system, text, sampling)


def _opened(request: RunRequest) -> Model:
    from llmbuild.runtime.model import load

    selection = request.selection
    return load(
        request.catalog,
        request.model,
        selection.slo,
        selection.objective,
        selection.target,
        selection.workload,
        request.variant,
        locked=request.lock,
        trust_keys=request.trust.keys,
        allow_unsigned=request.trust.allow_unsigned,
        fallback=request.fallback,
    )


def _given(prompt: str | None) -> str | None:
    """Return the prompt: the given one, or else standard input; None where there is none."""
    if prompt not in (None, "-"):
        return prompt
    if sys.stdin is None or (prompt is None and sys.stdin.isatty()):
        if prompt == "-":
            raise InputError("--prompt -: standard input is closed")
        return None
    try:
        text = sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise InputError(f"standard input is not UTF-8 text: byte {error.start} cannot be read") from None
    return text if text or prompt else None


def _say(opened: Model, prompt: str | None, sampling: Sampling) -> int:
    """Print the prompt and its continuation; notes go to stderr."""
    answer = opened.generate(prompt, **asdict(sampling))
    click.echo(talk.opening(opened), err=True)
    begun = f", {' '.join(answer.before)} put first" if answer.before else ""
    left = opened.tokenizer.behind if sampling.add_special_tokens else ()
    ends = f", the tokenizer's {' '.join(left)} at the end left out" if left else ""
    click.echo(f"prompt of {len(answer.prompt)} tokens{begun}{ends}", err=True)
    data(prompt or "")
    talk.print_out(opened, answer)
    return 0


COMMANDS = (run,)
