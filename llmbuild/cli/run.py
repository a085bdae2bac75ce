"""The command that opens a variant and generates: run."""

from __future__ import annotations

import sys
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llmbuild.cli.options import PATH, catalog_option, selection_of, slo_options, trust_of, trust_options
from llmbuild.cli.requests import RunRequest, Sampling
from llmbuild.errors import InputError
from llmbuild.system.terminal import data

if TYPE_CHECKING:
    from llmbuild.runtime.model import Model


@click.command(short_help="Pick a variant of MODEL and let it continue a text.")
@click.argument("model")
@click.option("--prompt", metavar="TEXT", help="Text to continue; -: standard input, as also where that is redirected.")
@click.option("--max-new-tokens", type=click.IntRange(1, 1 << 20), default=64, show_default=True, help="Tokens to add.")
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
    """
    asked = {name: options[name] for name in ("variant", "lock", "fallback")}
    request = RunRequest(Path(options["catalog"]), model, selection_of(options), trust=trust_of(options), **asked)
    sampling = Sampling(**{field.name: options[field.name] for field in fields(Sampling)})
    with _opened(request) as opened:
        return _say(opened, _given(prompt), sampling)


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
    tpot = opened.row["tpot_s"]
    read = "never measured" if tpot is None else f"tpot {tpot:.3g} s"
    click.echo(f"variant {opened.row['variant'][:12]}, {read}", err=True)
    begun = f", {' '.join(answer.before)} put first" if answer.before else ""
    left = opened.tokenizer.behind if sampling.add_special_tokens else ()
    ends = f", the tokenizer's {' '.join(left)} at the end left out" if left else ""
    click.echo(f"prompt of {len(answer.prompt)} tokens{begun}{ends}", err=True)
    data(prompt or "")
    for piece in answer:
        data(piece)
    click.echo()
    if answer.finish_reason == "context":
        click.echo(f"the context of {opened.session.abi.context} tokens is full: the answer ends here", err=True)
    return 0


COMMANDS = (run,)
