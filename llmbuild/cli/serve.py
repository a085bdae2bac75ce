"""The command that answers over HTTP: serve."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llmbuild.cli.options import PATH, catalog_option, selection_of, slo_options, trust_of, trust_options
from llmbuild.cli.requests import Selection, Trust
from llmbuild.cli.sizes import size_of
from llmbuild.errors import InputError

if TYPE_CHECKING:
    from llmbuild.runtime.model import Model
    from llmbuild.serve.served import Served

SCHEDULERS = ("fcfs", "sarathi")
"""`serve/schedule/named.py` has them; a test holds the two against each other."""
CUT_OFF = 130
"""The exit code where answers were cut off at the end."""
VERDICTS = 4
"""Variants of each model whose verdict is told."""


@click.command(short_help="Answer over an OpenAI-compatible API.")
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0 for any.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0: any that is free.")
@click.option("--memory", metavar="SIZE", help="Memory for weights and caches, such as 4GB; else 80 % of what is free.")
@click.option(
    "--scheduler", type=click.Choice(SCHEDULERS), default="fcfs", show_default=True, help="Who runs in each step."
)
@click.option(
    "--max-sequences",
    type=click.IntRange(1, 1024),
    default=16,
    show_default=True,
    help="Sequences of a model that run at a time, as far as the memory holds them.",
)
@click.option(
    "--max-queue", type=click.IntRange(1, 1 << 16), default=256, show_default=True, help="Sequences that may wait."
)
@click.option(
    "--request-timeout",
    type=click.FloatRange(0, min_open=True),
    default=600.0,
    show_default=True,
    metavar="SECONDS",
    help="Time from a request's arrival to the end of its answer.",
)
@click.option(
    "--shutdown-timeout",
    type=click.FloatRange(0),
    default=30.0,
    show_default=True,
    metavar="SECONDS",
    help="Time that answers have to end after SIGTERM or Ctrl-C.",
)
@click.option("--api-keys", type=PATH, metavar="FILE", help="Take only requests with a key of this file, one a line.")
@click.option("--variant", help="Open this variant instead of picking one; for one MODEL.")
@slo_options
@catalog_option
@trust_options
def serve(models: tuple[str, ...], **options: Any) -> int:
    """Pick a variant of each MODEL and answer requests over an OpenAI-compatible API, until SIGTERM or Ctrl-C.

    The address is printed on standard output as soon as requests are answered.
    """
    from llmbuild.serve.api.keys import Keys
    from llmbuild.serve.api.server import Place, Told, serve, to_stderr
    from llmbuild.serve.engine import Limits
    from llmbuild.serve.served import Settings

    if len(set(models)) < len(models):
        raise InputError("a model is named twice: each has one variant in a server")
    if options["variant"] and len(models) > 1:
        raise InputError("--variant is for one MODEL")
    memory = options["memory"]
    settings = Settings(
        None if memory is None else size_of("--memory", memory),
        options["max_sequences"],
        options["scheduler"],
        Limits(options["max_queue"], options["request_timeout"]),
    )
    keys = Keys() if options["api_keys"] is None else Keys.read(options["api_keys"])
    place = Place(options["host"], options["port"], options["shutdown_timeout"])
    if not place.local and not keys.digests:
        click.echo(f"warning: anybody who reaches {place.host} is answered: --api-keys FILE asks for a key", err=True)
    asked = (Path(options["catalog"]), selection_of(options), trust_of(options), options["variant"])
    picked = [_picked(model, *asked) for model in models]
    done = serve(picked, settings, place, keys, Told(_ready, to_stderr))
    click.echo("every answer was finished" if done else "answers were cut off", err=True)
    return 0 if done else CUT_OFF


def _picked(name: str, catalog: Path, selection: Selection, trust: Trust, variant: str | None) -> Model:
    """Return a model whose variant was picked, and say why."""
    from llmbuild.runtime.model import load

    model = load(
        catalog,
        name,
        selection.slo,
        selection.objective,
        selection.target,
        selection.workload,
        variant,
        trust_keys=trust.keys,
        allow_unsigned=trust.allow_unsigned,
    )
    if variant and model.row["model"] != name:
        raise InputError(f"variant {variant} is of model {model.row['model']}, not of {name}")
    told = f"{name}: variant {model.row['variant'][:12]}"
    click.echo(f"{told}, named" if variant else f"{told}\n{model.pick.explain(VERDICTS)}", err=True)
    return model


def _ready(url: str, found: Sequence[Served]) -> None:
    """Say where the server listens, and what each model takes."""
    for one in found:
        click.echo(f"{one.name}: {one.told()}", err=True)
    click.echo(url)


COMMANDS = (serve,)
