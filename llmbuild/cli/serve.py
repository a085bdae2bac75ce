"""The command that answers over HTTP: serve."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llmbuild.cli.listening import ended, listen_options, listens
from llmbuild.cli.options import (
    PATH,
    catalog_option,
    lengths_option,
    selection_of,
    slo_options,
    trust_of,
    trust_options,
)
from llmbuild.cli.requests import LoadRequest, Selection
from llmbuild.cli.sizes import size_of
from llmbuild.errors import InputError, UnknownLoad

if TYPE_CHECKING:
    from llmbuild.runtime.model import Model
    from llmbuild.serve.pick_load import LoadPick
    from llmbuild.serve.schedule.named import Targets
    from llmbuild.serve.served import Plan, Served

SCHEDULERS = ("fcfs", "sarathi", "fairbatching", "isrtf", "vtc")
"""`serve/schedule/named.py` has them; a test holds the two against each other."""
SPECULATIONS = ("none", "ngram", "draft")
"""As `serve/speculate.py` has them."""
ADMISSIONS = ("worst-case", "expected")
"""As `serve/admission.py` has them."""
STREAM_INTERVAL_S = 0.02
"""As `serve/served.py` has it."""
VERDICTS = 4
"""Variants of each model whose verdict is told."""


@click.command(short_help="Answer over an OpenAI-compatible API.")
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@listen_options
@click.option("--memory", metavar="SIZE", help="Memory for weights and caches, such as 4GB; else 80 % of what is free.")
@click.option(
    "--scheduler",
    type=click.Choice(SCHEDULERS),
    help="Who runs in each step.  [default: fcfs; for bounds of load what holds them best]",
)
@click.option(
    "--max-sequences",
    type=click.IntRange(1, 1024),
    help="Sequences of a model that run at a time, as far as the memory holds them.  [default: 16; or as --scheduler]",
)
@click.option(
    "--speculation",
    type=click.Choice(SPECULATIONS),
    default="none",
    show_default=True,
    help="Guess tokens from what followed the same ones before, or by --draft, where it pays. Answers stay the same.",
)
@click.option(
    "--draft",
    metavar="VARIANT",
    help="A variant or a model with the same tokenizer that guesses tokens, with --speculation draft; for one MODEL.",
)
@click.option(
    "--admission",
    type=click.Choice(ADMISSIONS),
    default="worst-case",
    show_default=True,
    help="Run a sequence when all that it may take is free, or what it is expected to take. Answers stay the same.",
)
@click.option(
    "--predictor",
    type=PATH,
    metavar="FILE",
    help="What predicts the lengths of answers, for isrtf and --admission expected: `profile --answers` writes it.",
)
@click.option(
    "--slo-class",
    "classes",
    multiple=True,
    metavar="NAME=TTFT:TPOT",
    help="A class that requests may name, with its deadlines in seconds, such as chat=0.5:0.05.",
)
@lengths_option
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
@click.option(
    "--stream-interval",
    type=click.FloatRange(0, 1),
    default=STREAM_INTERVAL_S,
    show_default=True,
    metavar="SECONDS",
    help="Tokens of a stream that come within so long after others are one chunk with them. First tokens never wait.",
)
@click.option("--variant", help="Open this variant instead of picking one; for one MODEL.")
@slo_options
@catalog_option
@trust_options
def serve(models: tuple[str, ...], **options: Any) -> int:
    """Pick a variant of each MODEL and answer requests over an OpenAI-compatible API, until SIGTERM or Ctrl-C.

    The address is printed on standard output as soon as requests are answered.
    """
    from llmbuild.serve.api.server import Told, serve, to_stderr
    from llmbuild.serve.engine import Limits
    from llmbuild.serve.served import Settings

    if len(set(models)) < len(models):
        raise InputError("a model is named twice: each has one variant in a server")
    for name in ("variant", "predictor", "draft"):
        if options[name] and len(models) > 1:
            raise InputError(f"--{name} is for one MODEL")
    place, keys = listens(options, options["shutdown_timeout"])
    classes, given = dict(map(_class_of, options["classes"])), options["memory"]
    memory = None if given is None else size_of("--memory", given)
    served = [_planned(model, options, memory, len(models)) for model in models]
    settings = Settings(
        memory,
        limits=Limits(options["max_queue"], options["request_timeout"]),
        plans={name: plan for name, (_, plan) in zip(models, served, strict=True)},
        classes=classes,
        stream_interval_s=options["stream_interval"],
    )
    picked = [model for model, _ in served]
    return ended(serve(picked, settings, place, keys, Told(_ready, to_stderr)))


def _planned(name: str, options: Mapping[str, Any], memory: int | None, models: int) -> tuple[Model, Plan]:
    """Return a model with how it is served; where requests are bounded, by its load curves."""
    from llmbuild.serve.pick_load import curve_here, targets_of
    from llmbuild.serve.schedule.named import FAIR_BATCHING
    from llmbuild.serve.served import Plan
    from llmbuild.spec.slo import parse_load

    bounds, rest = parse_load(options["slo"])
    selection = replace(selection_of(options), slo=rest)
    plan = Plan(
        options["scheduler"] or Plan.scheduler,
        options["max_sequences"] or Plan.sequences,
        targets_of(bounds),
        speculation=options["speculation"],
        admission=options["admission"],
        predictor=options["predictor"],
        draft=_draft(options),
    )
    variant = options["variant"]
    if bounds and not variant:
        made = _by_load(name, options, None if memory is None else memory // models)
        if made is not None:
            variant, best = str(made.row["variant"]), made.capacity.server
            plan = replace(plan, scheduler=best.name, sequences=best.host.slots)
    elif bounds:
        told = ", ".join(map(str, bounds))
        click.echo(f"{name}: whether {told} holds is not asked of a variant that is named", err=True)
    model = _picked(name, options, selection, variant)
    if plan.scheduler == FAIR_BATCHING:
        plan = replace(plan, curve=curve_here(Path(options["catalog"]), str(model.row["variant"])))
    return model, plan


def _draft(options: Mapping[str, Any]) -> Model | None:
    """Return the variant that guesses tokens, where one is named."""
    from llmbuild.serve.draft_model import draft_model

    if not options["draft"]:
        return None
    trust = trust_of(options)
    found = draft_model(
        options["catalog"], options["draft"], trust_keys=trust.keys, allow_unsigned=trust.allow_unsigned
    )
    click.echo(f"draft: variant {found.row['variant'][:12]} of {found.row['model']}", err=True)
    return found


def _by_load(name: str, options: Mapping[str, Any], memory: int | None) -> LoadPick | None:
    """Return what holds the bounds on requests best, and say so; None where nothing is known."""
    from llmbuild.cli import reading

    most, scheduler = options["max_sequences"], options["scheduler"]
    selection, lengths = selection_of(options), options["lengths"]
    request = LoadRequest(Path(options["catalog"]), name, selection, None, lengths, most, scheduler, memory)
    try:
        made = reading.pick_load(request, trust_of(options))
    except UnknownLoad as error:
        click.echo(f"{name}: whether {', '.join(selection.slo)} holds is not known: {error}", err=True)
        return None
    click.echo(f"{name}: {made.explain()}", err=True)
    return made


def _class_of(text: str) -> tuple[str, Targets]:
    """Return the name and the deadlines of a class of requests."""
    from llmbuild.serve.schedule.named import Targets

    name, _, limits = text.partition("=")
    try:
        ttft, tpot = map(float, limits.split(":"))
    except ValueError:
        ttft = tpot = 0.0
    if not name or not (0 < ttft < math.inf and 0 < tpot < math.inf):
        raise InputError(f"cannot read --slo-class {text!r}: write NAME=TTFT:TPOT in seconds, such as chat=0.5:0.05")
    return name, Targets(ttft, tpot)


def _picked(name: str, options: Mapping[str, Any], selection: Selection, variant: str | None) -> Model:
    """Return a model whose variant was picked, and say why."""
    from llmbuild.runtime.model import load

    trust = trust_of(options)
    model = load(
        Path(options["catalog"]),
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
