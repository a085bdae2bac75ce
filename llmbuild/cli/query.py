"""The commands that read: query, pick, explain, recipes, targets, doctor."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from llmbuild.cli.options import (
    PATH,
    ByOption,
    Shared,
    catalog_option,
    format_options,
    lengths_option,
    selection_of,
    slo_options,
    trust_of,
    trust_options,
)
from llmbuild.cli.output import print_public, print_rows
from llmbuild.cli.requests import LoadRequest, PickRequest, QueryRequest
from llmbuild.errors import InputError, NoVariant
from llmbuild.system.strict_json import dumps

VERDICTS = 200
"""Number of variants above which `pick` prints their verdicts only on request."""


@click.command(cls=ByOption)
@click.option("-m", "--model", help="Only rows of this model.")
@slo_options
@click.option("--all", "everything", is_flag=True, help="Dominated, infeasible and failed variants too.")
@catalog_option
@format_options
def query(form: str | None, catalog: str, model: str | None, everything: bool, **options: Any) -> int:
    """List the variants that meet an SLO, the best first."""
    from llmbuild.cli import reading
    from llmbuild.report.listings import nothing_found
    from llmbuild.report.rows import front_table

    request = QueryRequest(Path(catalog), model, selection_of(options), everything)
    rows = reading.query(request)
    if form or not rows:
        return print_public(rows, form, "" if form else nothing_found(*reading.named(request)))
    click.echo(front_table(rows))
    return 0


@click.command(cls=ByOption, short_help="Print the one variant a loader would open here, and why.")
@click.option("-m", "--model", help="The model; not needed where the catalog has only one.")
@slo_options
@click.option("--lock", type=PATH, help="Pin the pick in this file, for `run --lock`.")
@click.option("--as", "cpu", metavar="CPU", help="Pick for a host with this CPU instead, such as haswell or zen4.")
@click.option("--why", is_flag=True, help="Give the verdict on every variant, however many there are.")
@click.option("--rate", metavar="N/s", help="Requests per second to hold, by the load curves of this machine.")
@lengths_option
@catalog_option
@format_options
@trust_options
def pick(form: str | None, why: bool, **options: Any) -> int:
    """Print the one variant a loader would open on this host, and say why on stderr."""
    from llmbuild.cli import reading
    from llmbuild.report.rows import front_table, public
    from llmbuild.runtime.reader import count

    if options["rate"] or reading.of_load(options["slo"]):
        return _pick_load(form, options)
    asked = {name: options[name] for name in ("model", "cpu", "lock")}
    request = PickRequest(Path(options["catalog"]), selection=selection_of(options), trust=trust_of(options), **asked)
    try:
        made = reading.pick(request)
    except NoVariant as error:
        if form == "json" and error.pick is not None and error.pick.nearest:
            near = {"nearest": public(error.pick.nearest), "distance": error.pick.distance, "reason": str(error)}
            click.echo(dumps(near))
        raise
    assert made.chosen is not None
    others = count(request.catalog, made.chosen["model"]) - 1
    if why or others < VERDICTS:
        click.echo(made.explain(), err=True)
    else:
        click.echo(f"chosen of {others + 1} variants: --why gives the verdict on each", err=True)
    if form == "json":
        click.echo(dumps(public(made.chosen)))
    elif form == "csv":
        print_public([made.chosen], form)
    else:
        click.echo(front_table([made.chosen]))
    return 0


def _pick_load(form: str | None, options: Mapping[str, Any]) -> int:
    """Print the variant that holds the most requests, or the rate that is asked for, and say why on stderr."""
    from llmbuild.cli import reading
    from llmbuild.report.rows import front_table

    if options["lock"] or options["cpu"]:
        raise InputError("--rate goes with neither --lock nor --as: load curves are of this machine")
    request = LoadRequest(
        Path(options["catalog"]), options["model"], selection_of(options), options["rate"], options["lengths"]
    )
    made = reading.pick_load(request, trust_of(options))
    click.echo(made.explain(), err=True)
    if form:
        print_rows([reading.public_load(made)], form) if form == "csv" else click.echo(dumps(reading.public_load(made)))
    else:
        click.echo(front_table([made.row]))
    return 0


@click.command(short_help="Say everything about a VARIANT.")
@click.argument("variant")
@catalog_option
@click.option("--json", "form", cls=Shared, flag_value="json", help="JSON on stdout.")
def explain(variant: str, catalog: str, form: str | None) -> int:
    """Say everything about a VARIANT: what it is, how it was made, what was read, why it stands where it does."""
    from llmbuild.cli import reading

    click.echo(reading.explain(variant, Path(catalog), form == "json"))
    return 0


@click.command(short_help="List the recipes of FOLDER and what each asks for.")
@format_options
@click.argument("folder", required=False, type=PATH)
def recipes(folder: Path | None, form: str | None) -> int:
    """List the recipes of FOLDER and what each asks for; without one those of `recipes`, or else those that ship."""
    from llmbuild.frontend.config import TAKEN
    from llmbuild.report import listings

    folder = folder or listings.recipe_folder()
    print_rows(listings.recipes(folder), form, listings.no_recipes(folder))
    click.echo(f"architectures that are taken: {TAKEN}", err=True)
    return 0


@click.command()
@click.option("-t", "--target", "targets", multiple=True, help="Only this target; may be given again.")
@click.option("--probe", "probed", is_flag=True, help="Generate code for a matrix-vector product to be sure.")
@click.option("--knobs", is_flag=True, help="List the knobs of the search space instead, and what is left out of it.")
@catalog_option
@format_options
def targets(targets: tuple[str, ...], probed: bool, knobs: bool, catalog: str, form: str | None) -> int:
    """List the targets, and which of them this host can use."""
    from llmbuild.cli import reading

    rows = reading.knobs(targets) if knobs else reading.targets(targets, Path(catalog), probed)
    return print_rows(rows, form)


@click.command(short_help="Check this installation, this host and the catalog.")
@catalog_option
@format_options
def doctor(catalog: str, form: str | None) -> int:
    """Check this installation, this host and the catalog; say what to do about what is wrong."""
    from llmbuild.cli import reading

    rows = reading.doctor(Path(catalog))
    print_rows(rows, form)
    return 1 if any(row["state"] == "wrong" for row in rows) else 0


COMMANDS = (query, pick, explain, recipes, targets, doctor)
