"""The commands that make and measure variants: build, compile, profile, tune."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llmbuild.cli.options import PATH, PLACE, build_options, catalog_option, format_options, on_option
from llmbuild.cli.output import over, print_built, print_rows
from llmbuild.errors import InputError, NothingUsable

if TYPE_CHECKING:
    from llmbuild.build.request import BuildRequest


@click.command(short_help="Search, measure and keep the front of each RECIPE.")
@click.argument("recipes", nargs=-1, required=True, type=PATH)
@build_options
@click.option(
    "--until", type=click.Choice(["import", "compile", "profile"]), help="Stop every variant after this step."
)
@on_option
@catalog_option
@format_options
def build(recipes: tuple[Path, ...], form: str | None, keep_going: bool, **options: Any) -> int:
    """Build each RECIPE for each target: search, measure, and keep the front."""
    from llmbuild.build.jobs import jobs_of
    from llmbuild.cli import building

    request = build_request(recipes, options)
    jobs = jobs_of(request)
    building.prefetch(jobs, request)
    return over(jobs, keep_going, lambda job: building.build(job, request), form)


@click.command("compile", short_help="Compile each RECIPE for each target; nothing is run.")
@click.argument("recipes", nargs=-1, required=True, type=PATH)
@build_options
@catalog_option
@format_options
def compile_(recipes: tuple[Path, ...], form: str | None, keep_going: bool, **options: Any) -> int:
    """Compile each RECIPE for each target; nothing is run, so the target need not be this host."""
    from llmbuild.build.jobs import jobs_of
    from llmbuild.cli import building

    request = replace(build_request(recipes, options), until="compile")
    jobs = jobs_of(request)
    building.prefetch(jobs, request)
    return over(jobs, keep_going, lambda job: building.build(job, request), form)


@click.command(short_help="Measure what is compiled: a RECIPE, or VARIANTs by digest.")
@click.argument("what", nargs=-1, required=True, type=PLACE)
@catalog_option
@format_options
@on_option
@click.option("-t", "--target", "targets", multiple=True, help="Target name or file; the host if left out.")
@click.option("--random-init", is_flag=True, help="The recipe was compiled with --random-init.")
@click.option("--load", is_flag=True, help="Measure load curves: the time of a server's step by what is in it.")
@click.option("--budget", metavar="TIME", help="With --load: time for each variant.  [default: 30s]")
@click.option(
    "--sequences", type=click.IntRange(1, 128), metavar="N", help="With --load: up to so many at a time.  [default: 16]"
)
@click.option(
    "--answers",
    type=PATH,
    metavar="PROMPTS",
    help="Let one VARIANT answer the prompts of a JSON Lines file, and train a predictor of the lengths of answers.",
)
@click.option("-o", "--output", type=PATH, metavar="FILE", help="With --answers: where the predictor is written.")
@click.option(
    "--held-out", type=PATH, metavar="FILE", help="With --answers: write what is predicted of each unseen prompt, too."
)
@click.option(
    "--max-tokens", type=click.IntRange(2), metavar="N", help="With --answers: tokens of an answer.  [default: 256]"
)
def profile(what: tuple[str, ...], form: str | None, load: bool, **options: Any) -> int:
    """Measure what is compiled, on this machine: a RECIPE, or VARIANTs by digest."""
    from llmbuild.cli import building

    budget, sequences = options.pop("budget"), options.pop("sequences")
    answers = {name: options.pop(name) for name in ("answers", "output", "held_out", "max_tokens")}
    if answers["answers"]:
        if load or budget or sequences or options["on"]:
            raise InputError("--answers is neither with --load nor with --on")
        return print_rows(building.profile_answers(what, Path(options["catalog"]), **answers), form)
    if any(answers.values()):
        raise InputError("--output, --held-out and --max-tokens are for --answers")
    if load:
        return print_rows(building.profile_load(what, build_request((), options), budget, sequences), form)
    if budget or sequences:
        raise InputError("--budget and --sequences are for --load")
    built = building.profile(what, build_request((), options))
    print_built(built, form)
    if not built.usable:
        raise NothingUsable(built.advice)
    return 0


@click.command(short_help="Tune the costliest dispatches of a VARIANT on this machine.")
@click.argument("variant")
@catalog_option
@format_options
def tune(variant: str, catalog: str, form: str | None) -> int:
    """Tune the costliest dispatches of a VARIANT on this machine; later builds for its target try what won."""
    from llmbuild.cli import building

    return print_rows(building.tune(variant, Path(catalog)), form)


COMMANDS = (build, compile_, profile, tune)


def build_request(recipes: tuple[Path, ...], options: Mapping[str, Any]) -> BuildRequest:
    """Return the request of a command's options; missing options have the request's defaults."""
    from llmbuild.build.request import BuildRequest, pins_of, seconds_of

    given = {name: options[name] for name in _PLAIN if name in options}
    return BuildRequest(
        recipes=recipes,
        catalog=Path(options["catalog"]),
        pins=pins_of(options.get("pinned", ())),
        budget_s=seconds_of(options["budget"]) if options.get("budget") else None,
        **given,
    )


_PLAIN = ("targets", "random_init", "seed", "trials", "sampler", "until", "on", "jobs", "force", "dry_run", "explain")
"""Options whose values are copied into a request."""
