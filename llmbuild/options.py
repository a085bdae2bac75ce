"""What commands share: options, and printing rows as a table, JSON or CSV."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

from llmbuild.errors import LlmbuildError, NothingUsable

F = TypeVar("F", bound=Callable[..., Any])


def catalog_option(command: F) -> F:
    """Add `-C`."""
    return click.option(
        "-C",
        "--catalog",
        envvar="LLMBUILD_CATALOG",
        default="catalog",
        show_default=True,
        callback=_folder,
        help="Folder of the catalog, or postgresql://...",
    )(command)


def _folder(_: click.Context, __: click.Parameter, value: str) -> str:
    """Return the folder of a catalog; the rows of one named by URL are in a server, its blobs in a folder here."""
    if "://" not in value:
        return value
    from llmbuild.catalog.schema import folder_of

    return str(folder_of(value))


def format_options(command: F) -> F:
    """Add `--json` and `--csv`."""
    command = click.option("--csv", "form", flag_value="csv", help="CSV on stdout.")(command)
    return click.option("--json", "form", flag_value="json", help="JSON on stdout.")(command)


def on_option(command: F) -> F:
    """Add what says where it is measured."""
    return click.option(
        "--on",
        metavar="ssh://[USER@]HOST[:PORT][/PYTHON]",
        help="Compile here and measure there; the target is the highest that it supports if left out.",
    )(command)


def trust_options(command: F) -> F:
    """Add what decides whose catalogs are opened."""
    for option in (
        click.option("--allow-unsigned", is_flag=True, help="Open an unsigned catalog although keys are trusted."),
        click.option(
            "--trust", multiple=True, metavar="PATH", help="A public key, or a folder of them; else $LLMBUILD_TRUST."
        ),
    ):
        command = option(command)
    return command


def slo_options(command: F) -> F:
    """Add what picks a row."""
    for option in (
        click.option("--objective", metavar="METRIC", help="What to improve; the first SLO's metric if left out."),
        click.option("--slo", multiple=True, metavar="BOUND", help="What must hold, such as 'tpot_s<=0.02'."),
        click.option("--workload", help="Only rows of this workload."),
        click.option("-t", "--target", help="Only rows of this target."),
    ):
        command = option(command)
    return command


def build_options(command: F) -> F:
    """Add what steers a build."""
    for option in (
        click.option(
            "--random-init", is_flag=True, help="Take the model's shape only; weights are random, quality is absent."
        ),
        click.option("--set", "pinned", multiple=True, metavar="KNOB=VALUE", help="Pin a knob; may be given again."),
        click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of the search."),
        click.option("--budget", metavar="TIME", help="Stop the search after this long, such as 20m."),
        click.option("--trials", type=click.IntRange(min=1), help="Unique evaluations, known ones included."),
        click.option("-B", "--always-make", "force", is_flag=True, help="Make everything again."),
        click.option(
            "-k", "--keep-going", is_flag=True, help="Go on with the other recipes and targets when one fails."
        ),
        click.option(
            "-j", "--jobs", type=click.IntRange(1, 64), default=1, show_default=True, help="Compiles side by side."
        ),
        click.option("-n", "--dry-run", is_flag=True, help="Print each step and why it would run; do nothing."),
        click.option("--explain", is_flag=True, help="Give each step's key, and each field of it that changed."),
        click.option("-t", "--target", "targets", multiple=True, help="Target name or file; the host if left out."),
    ):
        command = option(command)
    return command


# --- printing ----------------------------------------------------------------------------------------------------


def over(
    jobs: Sequence[Callable[[], Any]], options: dict[str, Any], act: Callable[[Any], Any], form: str | None
) -> int:
    """Do every job and print what came of all of them; with `-k` go on past an error and end with the first one's code.

    Tables are printed as each job ends; JSON and CSV hold the rows of all jobs, and so does a plan.
    """
    codes, done = [], []
    for job in jobs:
        try:
            built = act(job())
            done.append(built)
            if built.plan is None and form is None:
                print_built(built, form)
            if not built.usable:
                raise NothingUsable(built.advice)
        except LlmbuildError as error:
            if not options["keep_going"]:
                _print_all(done, form)
                raise
            click.echo(f"error: {error}", err=True)
            codes.append(error.exit_code)
    _print_all(done, form)
    return next((code for code in codes if code), 0)


def _print_all(done: Sequence[Any], form: str | None) -> None:
    planned = [row for built in done for row in built.plan or ()]
    if planned:
        print_rows(planned, form)
    elif form and done:
        from llmbuild.report.rows import public

        print_rows([row if built.plain else public(row) for built in done for row in built.rows], form)


def print_built(built: Any, form: str | None) -> None:
    """Print the rows of a build."""
    from llmbuild.report.rows import footnotes, front_table

    if built.plain:
        print_rows(built.rows, form)
    elif form:
        print_public(built.rows, form)
    elif built.rows:
        click.echo(front_table(built.rows))
        click.echo("\n".join(footnotes(built.rows)), err=True)


def print_public(rows: Sequence[dict[str, Any]], form: str | None) -> int:
    """Print the columns of the contract."""
    from llmbuild.report.rows import public

    return print_rows([public(row) for row in rows], form)


def print_rows(rows: Sequence[dict[str, Any]], form: str | None) -> int:
    """Print rows as a table, JSON or CSV."""
    from llmbuild.report.rows import as_csv, as_json, table

    if form == "json":
        click.echo(as_json(rows))
    elif form == "csv":
        click.echo(as_csv(rows))
    elif rows:
        names = list(rows[0])
        click.echo(table(names, [[str(row[n]) for n in names] for row in rows], left=range(len(names))))
    else:
        click.echo("nothing to list", err=True)
    return 0
